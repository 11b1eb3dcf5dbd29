"""GLM's blank infilling: rows are those of the paper, spans are drawn as it says, by nothing but their keys."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmd.data.batches import Collate, Examples
from glmd.data.blank_infilling import BlankInfilling, GlmTokens, blank_infilling_for, glm_tokens, sentence_end_ids
from glmd.errors import ConfigError
from glmd.losses.labels import IGNORED_LABEL

TOKENS = GlmTokens(mask=4, start=5, end=6, sentence_mask=7, document_mask=8)
CLS, SEP, DOT, FIRST = 2, 3, 9, 10
SPECIAL = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8])


def infilling(**options: Any) -> BlankInfilling:
    return BlankInfilling(TOKENS, SPECIAL, **{"seed": 0, "sentence_end_ids": [DOT], **options})


def row_of(length: int, *, seed: int = 0, special: Sequence[int] = ()) -> list[int]:
    """[CLS], tokens of which a tenth end a sentence, and separators, [SEP]."""
    rng = np.random.default_rng((seed, length))
    tokens = np.where(rng.random(length) < 0.1, DOT, rng.integers(FIRST, 200, length)).tolist()
    for place in special:
        tokens[place % length : place % length + 1] = [SEP]
    return [CLS, *tokens, SEP]


def applied(infill: BlankInfilling, rows: list[list[int]], epoch: int = 0, ids: Sequence[int] | None = None) -> Any:
    """For each row its columns as lists."""
    examples = Examples(np.array([len(row) for row in rows]), {"input_ids": np.concatenate(rows).astype(np.int64)}, {})
    names = np.array(range(len(rows)) if ids is None else ids)
    found = infill.corrupt(examples, np.stack([np.full_like(names, epoch), names, np.zeros_like(names)], axis=1))
    assert {len(column) for column in found.tokens.values()} == {found.lengths.sum()}
    parts = np.cumsum(found.lengths)[:-1]
    split = {name: np.split(column, parts) for name, column in found.tokens.items()}
    return [{name: split[name][i].tolist() for name in split} for i in range(len(rows))]


def plain_row(tokens: list[int], spans: list[tuple[int, int]], mask: int) -> dict[str, list[int]]:
    """Section 2.1 and 2.2 of arXiv:2103.10360 a token at a time. spans: (start, end) in the order of part B."""
    columns: dict[str, list[int]] = {
        name: [] for name in ("input_ids", "position_ids", "block_position_ids", "context_mask", "lm_labels")
    }

    def add(*values: int) -> None:
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)

    place_of_mask = {}
    starts, i = dict(spans), 0
    while i < len(tokens):
        place = len(columns["input_ids"])
        if i in starts:
            place_of_mask[i] = place
            add(mask, place, 0, 1, IGNORED_LABEL)
            i = starts[i]
        else:
            add(tokens[i], place, 0, 1, IGNORED_LABEL)
            i += 1
    for start, end in spans:
        read, told = [TOKENS.start, *tokens[start:end]], [*tokens[start:end], TOKENS.end]
        for within, (token, label) in enumerate(zip(read, told, strict=True)):
            add(token, place_of_mask[start], within + 1, 0, label)
    return columns


def spans_of(row: dict[str, list[int]], original: list[int]) -> list[tuple[int, int]]:
    """Where the blanks of a row are in its text, in the order of its part B."""
    pieces: list[tuple[int, list[int]]] = []
    for token, place, context in zip(row["input_ids"], row["position_ids"], row["context_mask"], strict=True):
        if not context and token == TOKENS.start:
            pieces.append((place, []))
        elif not context:
            pieces[-1][1].append(token)
    spans, removed = {}, 0
    for place, tokens in sorted(pieces):
        start = place + removed
        assert original[start : start + len(tokens)] == tokens, "the blank is the text's own"
        spans[place] = (start, start + len(tokens))
        removed += len(tokens) - 1
    return [spans[place] for place, _ in pieces]


LEVELS = {
    "tokens": {},
    "sentences": {"sentence_probability": 1.0},
    "documents": {"document_probability": 1.0},
    "all": {"sentence_probability": 0.3, "document_probability": 0.3},
}


@given(
    st.lists(st.tuples(st.integers(1, 90), st.lists(st.integers(0, 90), max_size=6)), min_size=1, max_size=6),
    st.sampled_from(list(LEVELS)),
    st.sampled_from([0.01, 0.15, 0.5]),
)
def test_every_row_is_that_of_the_paper_for_its_spans(shapes, level, ratio):
    rows = [row_of(length, seed=i, special=special) for i, (length, special) in enumerate(shapes)]
    infill = infilling(ratio=ratio, **LEVELS[level])
    for row, found in zip(rows, applied(infill, rows), strict=True):
        spans = spans_of(found, row)
        hidden = [i for start, end in spans for i in range(start, end)]
        assert not set(SPECIAL) & {row[i] for i in hidden} and len(set(hidden)) == len(hidden)
        ordinary = sum(token not in SPECIAL for token in row)
        mask = next((token for token in found["input_ids"] if token in (TOKENS.mask, 7, 8)), TOKENS.mask)
        assert found == plain_row(row, spans, mask)
        assert bool(spans) == bool(ordinary)
        assert len(found["input_ids"]) <= infill.num_targets(len(row))
        if level == "tokens":
            assert len(hidden) == min(ordinary, max(1, int(ratio * ordinary))) and mask == TOKENS.mask
            ends = {end for _, end in spans}
            assert not ends & {start for start, _ in spans}, "a token stands between two blanks"
        if level == "sentences" and spans:
            assert len(hidden) >= int(ratio * ordinary) and mask == TOKENS.sentence_mask
            assert len(hidden) - max(end - start for start, end in spans) < max(1, int(ratio * ordinary))
            for start, end in spans:
                assert row[start - 1] in (CLS, SEP, DOT) and (row[end - 1] == DOT or row[end] in (SEP,))
                assert DOT not in row[start : end - 1]
        if level == "documents" and spans:
            (start, end), kinds = spans[0], "".join("-x"[token not in SPECIAL] for token in row)
            longest = max(map(len, kinds.split("-")))
            assert len(spans) == 1 and mask == TOKENS.document_mask
            assert longest / 2 <= end - start <= longest


def test_a_row_is_a_function_of_its_keys_alone():
    rows = [row_of(length) for length in (40, 3, 80, 60)]
    infill = infilling(**LEVELS["all"])
    together = applied(infill, rows)
    for i, row in enumerate(rows):
        assert applied(infill, [row], ids=[i]) == [together[i]]
    reordered = applied(infill, rows[::-1], ids=[3, 2, 1, 0])
    assert reordered[::-1] == together
    assert applied(infill, rows, epoch=1) != together and applied(infilling(seed=1), rows) != applied(infilling(), rows)


def test_epochs_take_a_number_of_versions_in_turn():
    infill, rows = infilling(num_maskings=3), [row_of(60)]
    versions = [applied(infill, rows, epoch=epoch) for epoch in range(6)]
    assert versions[:3] == versions[3:] and versions[0] != versions[1] != versions[2]


def test_spans_are_as_long_as_poisson_says_anywhere_and_in_any_order():
    rows = [list(range(FIRST, FIRST + 300)) for _ in range(400)]
    lengths, hidden, ascending, firsts = [], np.zeros(300), 0, 0
    for row, found in zip(rows, applied(infilling(), rows), strict=True):
        spans = spans_of(found, row)
        lengths += [end - start for start, end in spans]
        for start, end in spans:
            hidden[start:end] += 1
        ascending += spans == sorted(spans)
        firsts += spans[0] == min(spans)
    # 3 / (1 - exp(-3)) = 3.157 tokens; the last one of each row is shortened by 1.2 on average, of 14.6.
    assert np.mean(lengths) == pytest.approx(3.08, abs=0.05)
    shares = np.bincount(lengths, minlength=8)[1:8] / len(lengths)
    poisson = [3**n / np.prod(np.arange(1, n + 1)) / (np.e**3 - 1) for n in range(1, 8)]
    assert shares == pytest.approx(poisson, abs=0.025)
    assert hidden.sum() == 400 * 45 and ascending == 0 and firsts < 60
    # Near the ends of a row as often as within it.
    assert hidden.reshape(10, 30).mean(1) / 400 == pytest.approx(np.full(10, 0.15), abs=0.02)


def test_levels_are_drawn_as_often_as_asked():
    rows = [row_of(50, seed=i) for i in range(600)]
    kinds = {4: 0, 7: 0, 8: 0}
    for found in applied(infilling(sentence_probability=0.3, document_probability=0.2), rows):
        kinds[next(token for token in found["input_ids"] if token in kinds)] += 1
    assert [kinds[kind] / 600 for kind in (4, 7, 8)] == pytest.approx([0.5, 0.3, 0.2], abs=0.06)


def test_documents_are_hidden_by_half_and_more_from_any_place():
    rows = [list(range(FIRST, FIRST + 100)) for _ in range(500)]
    found = applied(infilling(document_probability=1.0), rows)
    spans = np.array([spans_of(each, row)[0] for each, row in zip(found, rows, strict=True)])
    sizes = spans[:, 1] - spans[:, 0]
    assert (sizes.min(), sizes.max()) == (50, 100) and sizes.mean() == pytest.approx(75, abs=2)
    assert np.mean(spans[:, 0] / np.maximum(1, 100 - sizes)) == pytest.approx(0.5, abs=0.05)


def test_a_batch_of_such_rows_predicts_every_token_and_is_labeled_in_part_b():
    rows = [row_of(30), row_of(50)]
    examples = Examples(np.array([32, 52]), {"input_ids": np.concatenate(rows)}, {"example_id": np.arange(2)})
    made = infilling().corrupt(examples, np.array([[0, 0, 0], [0, 1, 0]]))
    batch = Collate(0)(made)
    assert batch["predicts"].sum() == made.lengths.sum() and batch["example_id"].tolist() == [0, 1]
    labeled = batch["lm_labels"].flatten()[batch["labeled_positions"]]
    part_b = (batch["context_mask"] == 0) & batch["predicts"]
    assert len(labeled) == part_b.sum() and (labeled != IGNORED_LABEL).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, r"ratio must be in \(0, 0.5\], got 0.0"),
        ({"ratio": 0.6}, "got 0.6: spans that do not touch need room"),
        ({"sentence_probability": 0.7, "document_probability": 0.4}, "together at most 1"),
        ({"document_probability": -0.1}, "document_probability -0.1 must be at least 0"),
        ({"sentence_probability": 0.1, "sentence_end_ids": []}, "needs sentence_end_ids"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        infilling(**options)


def test_a_text_of_a_tokenizer_keeps_its_frame():
    from glm_tokenizers import wordpiece_glm

    tokenizer = wordpiece_glm()
    row = tokenizer("the cat sang . the dog ran over under blue stone ?")["input_ids"]
    for options in ({}, {"sentence_probability": 1.0}, {"document_probability": 1.0}):
        (found,) = applied(blank_infilling_for(tokenizer, 0, **options), [row])
        context = found["input_ids"][: sum(found["context_mask"])]
        assert context[0] == tokenizer.cls_token_id and context[-1] == tokenizer.pad_token_id
        assert context.count(tokenizer.mask_token_id) == found["input_ids"].count(glm_tokens(tokenizer).start) >= 1
        assert found["lm_labels"][-1] == glm_tokens(tokenizer).end


def test_a_tokenizer_of_no_glm_is_refused_by_what_it_lacks():
    from families import byte_level_bpe
    from glm_tokenizers import wordpiece_glm

    tokenizer = wordpiece_glm()
    ids = glm_tokens(tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(ids)[:3]) == ["[MASK]", "<|startofpiece|>", "<|endofpiece|>"]
    assert ids.sentence_mask == ids.document_mask == ids.mask
    assert tokenizer.convert_ids_to_tokens(sentence_end_ids(tokenizer).tolist()) == [".", "?"]
    with pytest.raises(
        ConfigError, match=r"lacks <\|startofpiece\|> and <\|endofpiece\|> and a mask token; give a GLM"
    ):
        glm_tokens(byte_level_bpe())
