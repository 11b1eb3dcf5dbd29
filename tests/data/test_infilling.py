"""Span infilling: what is read and what is said together are the text, and every draw is a function of its counters."""

import numpy as np
import pytest
from families import FAMILIES

from glmd.data.batches import Collate, Examples, is_full
from glmd.data.infilling import SpanInfilling, infilling_for, sentinel_ids
from glmd.errors import ConfigError

SENTINELS, MASK, END = np.array([90, 89, 88, 87]), 3, np.array([1])
SPECIAL = np.array([0, 1, 2, MASK, *SENTINELS])


def infilling(*, sentinels: bool, **fields) -> SpanInfilling:
    names = np.r_[SENTINELS, np.arange(100, 200)] if sentinels else np.empty(0, dtype=np.int64)
    given = {"probability": 0.15 if sentinels else 0.3, "seed": 5, **fields}
    return SpanInfilling(sentinels=names, mask_id=MASK, special_ids=np.r_[SPECIAL, names], end=END, **given)


def texts(*lengths: int) -> list[np.ndarray]:
    """Rows of so many tokens, a special one among them and one at the end."""
    rng = np.random.default_rng(0)
    found = [rng.integers(10, 80, length) for length in lengths]
    for row in found:
        row[len(row) // 2 :: 40], row[-1:] = 2, 1
    return found


def corrupted(made: SpanInfilling, rows: list[np.ndarray], numbers=None, epoch: int = 0) -> Examples:
    numbers = range(len(rows)) if numbers is None else numbers
    examples = Examples(np.array([len(row) for row in rows]), {"input_ids": np.concatenate(rows)}, {})
    return made.corrupt(examples, np.array([[epoch, i, 0] for i in numbers]))


def split(values: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(values, np.cumsum(lengths)[:-1])]


def rows_of(examples: Examples) -> list[tuple[list[int], list[int], list[int]]]:
    """(what is read, what is said, labels) of each row."""
    assert examples.targets is not None
    read = split(examples.tokens["input_ids"], examples.lengths)
    said, labels = (
        split(examples.targets.tokens[name], examples.targets.lengths) for name in ("target_ids", "lm_labels")
    )
    return list(zip(read, said, labels, strict=True))


LENGTHS = (1, 2, 3, 17, 64, 200, 400)


def test_spans_that_are_said_put_in_the_place_of_their_sentinels_are_the_text():
    """Written as T5's paper has it, and one token after another."""
    made, originals = infilling(sentinels=True), texts(*LENGTHS)
    for original, (read, said, labels) in zip(originals, rows_of(corrupted(made, originals)), strict=True):
        assert said[-1] == END[0] and labels[-1] == -100
        spans, current = {}, None
        for token, label in zip(said[:-1], labels[:-1], strict=True):
            if token in made.sentinels:
                assert label == -100
                current = spans.setdefault(token, [])
            else:
                assert label == token and token not in SPECIAL
                current.append(token)
        assert list(spans) == made.sentinels[: len(spans)].tolist() == [each for each in read if each in made.sentinels]
        whole = [token for each in read for token in spans.get(each, [each])]
        assert whole == original.tolist()


def test_a_text_is_said_whole_and_each_of_its_spans_is_read_as_one_mask():
    made, originals = infilling(sentinels=False), texts(*LENGTHS)
    for original, (read, said, labels) in zip(originals, rows_of(corrupted(made, originals)), strict=True):
        assert said == original.tolist()
        noise = [label != -100 for label in labels]
        assert all(
            label == token and token not in SPECIAL for token, label in zip(said, labels, strict=True) if label != -100
        )
        kept = [token for token, is_noise in zip(said, noise, strict=True) if not is_noise]
        assert [token for token in read if token != MASK] == kept
        spans = sum(now and not before for before, now in zip([False, *noise], noise, strict=False))
        assert read.count(MASK) >= spans, "each span is a mask, and so are spans of no token"


def test_of_the_tokens_as_many_are_in_spans_as_asked_and_spans_have_three_on_average():
    originals = [np.random.default_rng(i).integers(10, 80, 300) for i in range(60)]
    for sentinels, share in ((True, 0.15), (False, 0.3)):
        rows = rows_of(corrupted(infilling(sentinels=sentinels), originals))
        lengths, masks, spans = [], 0, 0
        for read, _, labels in rows:
            noise = [label != -100 for label in labels]
            assert sum(noise) == round(300 * share)
            starts = [i for i, now in enumerate(noise) if now and not (i and noise[i - 1])]
            lengths += [next(n for n in range(1, 99) if i + n == len(noise) or not noise[i + n]) for i in starts]
            masks, spans = masks + read.count(MASK), spans + len(starts)
        if sentinels:
            assert np.mean(lengths) == 3
            continue
        # Poisson's law, of which those of no token, e**-3, stand as further masks; none are longer than the law's.
        assert 2.9 < sum(lengths) / masks < 3.1 and 0.03 < 1 - spans / masks < 0.07
        counts = np.bincount(lengths, minlength=12) / masks
        assert abs(counts[2] - 0.224) < 0.03 and abs(counts[5] - 0.101) < 0.02


def test_what_becomes_of_a_text_depends_on_seed_epoch_and_its_number_alone():
    originals = texts(64, 17, 200)
    for sentinels in (True, False):
        made = infilling(sentinels=sentinels)
        together, alone = rows_of(corrupted(made, originals)), rows_of(corrupted(made, originals[1:2], [1]))
        assert together[1] == alone[0]
        assert rows_of(corrupted(made, originals, epoch=1)) != together
        assert rows_of(corrupted(infilling(sentinels=sentinels, seed=6), originals)) != together
        cycled = infilling(sentinels=sentinels, num_maskings=2)
        assert rows_of(corrupted(cycled, originals, epoch=2)) == rows_of(corrupted(cycled, originals, epoch=0))


def test_the_longest_target_is_as_long_as_announced():
    for sentinels in (True, False):
        made, originals = infilling(sentinels=sentinels), [np.arange(10, 74)] * 20
        lengths = corrupted(made, originals).targets.lengths
        assert lengths.max() == made.num_targets(64)


def test_a_batch_has_a_grid_of_what_is_read_and_one_of_what_is_said():
    examples = corrupted(infilling(sentinels=True), texts(64, 17, 3))
    batch = Collate(pad_id=0)(examples)
    as_many = batch["input_ids"].new_zeros(1, len(batch["positions"]))
    assert not is_full({**batch, "input_ids": as_many}), "of two grids sizes do not tell"
    (read, said, labels), *_ = rows_of(examples)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, len(read))
    assert batch["target_ids"].shape == batch["predicts"].shape == batch["lm_labels"].shape == (3, len(said))
    assert batch["target_ids"][0].tolist() == said and batch["lm_labels"][0].tolist() == labels
    assert batch["predicts"].sum(1).tolist() == examples.targets.lengths.tolist()
    flat = batch["target_ids"].flatten()[batch["positions"]].tolist()
    assert flat == [token for _, each, _ in rows_of(examples) for token in each]
    chosen = batch["lm_labels"].flatten()[batch["labeled_positions"]]
    assert (chosen >= 0).all() and len(chosen) == sum(label != -100 for *_, each in rows_of(examples) for label in each)
    assert batch["attention_mask"].sum(1).tolist() == examples.lengths.tolist()


def test_more_spans_than_sentinels_are_refused_before_and_left_as_they_are_after_special_tokens_divide_them():
    few = infilling(sentinels=True, probability=0.4)
    few = SpanInfilling(**{**vars(few), "sentinels": SENTINELS})
    few.require_length(30, "pretraining.max_length")
    with pytest.raises(ConfigError, match=r"pretraining.max_length is 64: its 9 spans are more than .* 4 sentinel"):
        few.require_length(64, "pretraining.max_length")
    row = np.arange(10, 42)
    row[1::2] = 2  # each token stands between special ones
    ((read, said, _),) = rows_of(corrupted(few, [row]))
    assert [each for each in read if each in SENTINELS] == SENTINELS.tolist() and len(said) == 2 * 4 + 1


def test_the_tokenizer_says_how_spans_are_left_out():
    t5, bart, gpt2 = (FAMILIES[name]() for name in ("t5", "roberta", "gpt2"))
    assert sentinel_ids(t5).tolist() == t5.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(5)])
    assert infilling_for(t5, None, 0).probability == 0.15 and infilling_for(bart, None, 0).probability == 0.3
    assert infilling_for(bart, 0.2, 0).probability == 0.2 and not len(infilling_for(bart, None, 0).sentinels)
    t5.get_vocab = lambda: {"<extra_id_0>": 5, "<extra_id_2>": 6}
    assert not len(sentinel_ids(t5)), "one is missing"
    with pytest.raises(ConfigError, match=r"has neither sentinel tokens .* nor a mask token"):
        infilling_for(gpt2, None, 0)
