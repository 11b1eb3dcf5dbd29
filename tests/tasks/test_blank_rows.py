"""Tasks as a GLM's cloze: rows as arXiv:2103.10360 builds them, and scores that are those of a loop over tokens."""

from typing import Any

import numpy as np
import pytest
import torch
from glm_cases import tiny_glm
from glm_tokenizers import bpe_glm, wordpiece, wordpiece_glm

from glmd.data.batches import Collate, Examples
from glmd.errors import ConfigError, DataError
from glmd.losses.head import Head
from glmd.losses.labels import IGNORED_LABEL
from glmd.models.heads import Split
from glmd.tasks.blank_rows import blank_rows
from glmd.tasks.cloze import cloze_logits
from glmd.tasks.examples import TaskExample
from glmd.tasks.tasks import BLANK

CHOICES = ("cat", "the dark river", "dog s")


def asked(text: str, pair: str | None = None, choices: tuple[str, ...] = ()) -> list[TaskExample]:
    return [TaskExample(0, ((text, pair),) * max(1, len(choices)), 0, idx=31, choices=choices)]


def test_a_blank_is_one_mask_token_and_what_fills_it_stands_behind_the_text():
    tokenizer = wordpiece_glm()
    rows = blank_rows(asked(f"the {BLANK} ran .", "yes", CHOICES), tokenizer, max_length=30)
    number = tokenizer.convert_tokens_to_ids
    cls, end, mask, start = number(["[CLS]", "[PAD]", "[MASK]", "<|startofpiece|>"])
    context = [cls, number("the"), mask, number("ran"), number("."), number("yes"), end]
    none, filling = [IGNORED_LABEL] * 7, number(["the", "dark", "river"])
    assert {name: column.tolist() for name, column in rows.tokens[1].items()} == {
        "input_ids": [*context, start, *filling[:-1]],
        "position_ids": [0, 1, 2, 3, 4, 5, 6, 2, 2, 2],
        "block_position_ids": [0, 0, 0, 0, 0, 0, 0, 1, 2, 3],
        "context_mask": [1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "cloze_ids": [*none, *filling],
    }
    assert rows.tokens[0]["input_ids"].tolist() == [*context, start]
    assert rows.tokens[0]["cloze_ids"].tolist() == [*none, number("cat")]
    assert not any(rows.truncated)


def test_a_verbalizer_is_asked_at_the_start_of_piece():
    (row,) = blank_rows(asked(f"the cat ? {BLANK} .", "the dog"), wordpiece_glm(), max_length=30).tokens
    assert (row["cloze_ids"][:-1] == IGNORED_LABEL).all() and row["cloze_ids"][-1] == 0
    assert row["context_mask"].sum() == len(row["context_mask"]) - 1


@pytest.mark.parametrize("score_end", [False, True])
@pytest.mark.parametrize("tokenizer", [wordpiece_glm, bpe_glm], ids=["wordpiece", "bpe"])
def test_the_score_of_an_answer_is_the_sum_over_its_tokens_one_by_one(tokenizer, score_end):
    made = tokenizer()
    model = tiny_glm(vocab_size=len(made), max_position_embeddings=60)
    rows = blank_rows(asked(f"the {BLANK} ran .", "yes", CHOICES), made, max_length=40, score_end=score_end)
    batch = Collate(made.pad_token_id)(Examples.of([{**row, "example_id": i} for i, row in enumerate(rows.tokens)]))
    split = Split(model)
    hidden = split.hidden_before_final(split.run_backbone(split.inputs(batch)))
    found = cloze_logits(batch, None, hidden, split.head)[:, 0]
    for row, score in zip(rows.tokens, found, strict=True):
        length = int(row["context_mask"].sum())
        answer = row["cloze_ids"][length:].tolist()
        assert (answer[-1] == made.convert_tokens_to_ids("<|endofpiece|>")) == score_end
        expected = 0.0
        for i, token in enumerate(answer):  # what is read is what was predicted before
            ids = [*row["input_ids"][: length + 1].tolist(), *answer[:i]]
            mask = ids.index(made.mask_token_id)
            given = {
                "input_ids": ids,
                "position_ids": [*range(length), *[mask] * (i + 1)],
                "block_position_ids": [*[0] * length, *range(1, i + 2)],
                "context_mask": [*[1] * length, *[0] * (i + 1)],
            }
            logits = model(**{name: torch.tensor([each]) for name, each in given.items()}).logits[0, -1]
            expected += logits.log_softmax(-1)[token].item()
        assert score.item() == pytest.approx(expected, rel=1e-9)


def test_the_logits_of_verbalizers_are_those_of_the_model_at_the_start_of_piece():
    tokenizer = wordpiece_glm()
    model = tiny_glm(vocab_size=len(tokenizer))
    rows = blank_rows(asked(f"{BLANK} ?", "the dog ran") + asked(f"cat {BLANK} ?", "dog"), tokenizer, max_length=20)
    words = tokenizer.convert_tokens_to_ids(["yes", "no", "maybe"])
    examples = [{**row, "verbalizers": np.array(words), "example_id": i} for i, row in enumerate(rows.tokens)]
    batch = Collate(0)(Examples.of(examples))
    split = Split(model)
    inputs = split.inputs(batch)
    head: Head = split.head
    found = cloze_logits(batch, None, split.hidden_before_final(split.run_backbone(inputs)), head)
    for i, row in enumerate(rows.tokens):
        logits = model(
            **{name: torch.from_numpy(each)[None].long() for name, each in row.items() if name != "cloze_ids"}
        ).logits
        torch.testing.assert_close(found[i], logits[0, -1, words])


def test_both_parts_together_keep_to_the_length_and_the_other_text_is_cut():
    tokenizer = wordpiece_glm()
    rows = blank_rows(asked(f"the {BLANK} ran .", "dog " * 40, CHOICES), tokenizer, max_length=16)
    assert [len(row["input_ids"]) for row in rows.tokens] == [16, 16, 16] and all(rows.truncated)
    assert [int(row["context_mask"].sum()) for row in rows.tokens] == [15, 13, 14]
    assert all((row["input_ids"] == tokenizer.mask_token_id).sum() == 1 for row in rows.tokens)


@pytest.mark.parametrize(
    ("text", "pair", "max_length", "message"),
    [
        (f"{'cat ' * 30}{BLANK}", None, 12, r"example 0 \(idx 31\): the blank has no room at max_length 12"),
        (f"{'cat ' * 30}{BLANK}", "dog", 12, "the text around the blank has 31 tokens and what fills it 1, too many"),
        (f"cat {BLANK} [MASK]", "dog", 12, r"the text holds \[MASK\]"),
        (f"{BLANK}", "dog", 2, "the blank has no room at max_length 2"),
    ],
)
def test_a_blank_that_has_no_room_is_refused(text: str, pair: Any, max_length: int, message: str):
    with pytest.raises(DataError, match=message):
        blank_rows(asked(text, pair), wordpiece_glm(), max_length=max_length)


def test_a_tokenizer_of_no_glm_is_refused():
    with pytest.raises(ConfigError, match=r"lacks <\|startofpiece\|>"):
        blank_rows(asked(f"a {BLANK}"), wordpiece(), max_length=12)
