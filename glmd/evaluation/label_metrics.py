"""Scores of tasks whose answers are numbers, several labels, or a label for each word.

    pearson([1.2, 3.0], [1.0, 3.5])
    entity_f1(predictions, labels, names=("O", "B-PER", "I-PER"))

Those of several labels and of entities are fractions in [0, 1], correlations lie in [-1, 1]. Each but `spearman` comes
with a function to statistics whose sums over examples give it (`metrics.Metric`).
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

OUTSIDE = "O"  # the label of a word that is part of nothing


def pearson(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Pearson's correlation of (B,) numbers with (B,) numbers; 0 where either are all the same."""
    return float(pearson_of(number_marks(predictions, labels).sum(0)))


def spearman(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Spearman's: `pearson` of the ranks, of which equal numbers share the mean."""
    return pearson(_ranks(predictions), _ranks(labels))


def number_marks(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(B, 6) whose sum `pearson_of` takes, of numbers less their means, so that no digits are lost."""
    x, y = (np.asarray(each, dtype=np.float64) for each in (predictions, labels))
    # A constant is a constant, whatever rounding makes of its mean.
    x, y = (each - (each[0] if (each == each[0]).all() else each.mean()) for each in (x, y))
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def pearson_of(sums: np.ndarray) -> np.ndarray:
    """(..., 6) sums to (...)."""
    count, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    of_x, of_y = count * xx - x * x, count * yy - y * y
    scale = np.sqrt(np.maximum(of_x, 0) * np.maximum(of_y, 0))
    correlation: np.ndarray = np.where(scale > 0, (count * xy - x * y) / np.where(scale > 0, scale, 1), 0.0)
    return np.clip(correlation, -1, 1)


def _ranks(values: ArrayLike) -> np.ndarray:
    """(B,) ranks from 1; equal values have the mean of theirs."""
    _, places, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: np.ndarray = (ends - (counts - 1) / 2)[places]
    return ranks


def subset_accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Share of examples of which every label is right. Takes (B, C) of 0 and 1."""
    return float((np.asarray(predictions) == np.asarray(labels)).all(-1).mean())


def labels_micro_f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """F1 over all labels of all examples; 0 where none is given and none right. Takes (B, C) of 0 and 1."""
    return float(micro_of(label_marks(predictions, labels).sum(0)))


def labels_macro_f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Mean of the labels' F1, that of a label which is never given and never right is 0, as in scikit-learn."""
    return float(macro_of(label_marks(predictions, labels).sum(0)))


def label_marks(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(B, 3, C): given rightly, given, right."""
    given, gold = np.asarray(predictions, dtype=bool), np.asarray(labels, dtype=bool)
    return np.stack([given & gold, given, gold], axis=1).astype(np.float64)


def micro_of(sums: np.ndarray) -> np.ndarray:
    """(..., 3, C) sums to (...)."""
    return f1_of(sums.sum(-1))


def macro_of(sums: np.ndarray) -> np.ndarray:
    """(..., 3, C) sums to (...)."""
    mean: np.ndarray = f1_of(np.moveaxis(sums, -2, -1)).mean(-1)
    return mean


def f1_of(sums: np.ndarray) -> np.ndarray:
    """(..., 3) of both, given and right to (...)."""
    both, given, gold = np.moveaxis(sums, -1, 0)
    f1: np.ndarray = 2 * both / np.maximum(given + gold, 1)
    return f1


def word_accuracy(predictions: ArrayLike, labels: Sequence[Sequence[int]]) -> float:
    """Share of words with the right label. predictions: (B, W) ids, -1 beyond an example's words. labels: of each."""
    right, count = word_marks(predictions, labels).sum(0)
    return float(right / count)


def word_marks(predictions: ArrayLike, labels: Sequence[Sequence[int]]) -> np.ndarray:
    """(B, 2) of each example: how many words are right, and how many there are."""
    rows = zip(np.asarray(predictions).tolist(), labels, strict=True)
    marks = [[sum(map(int.__eq__, row, gold)), len(gold)] for row, gold in rows]
    return np.array(marks, dtype=np.float64)


def entity_f1(predictions: ArrayLike, labels: Sequence[Sequence[int]], names: Sequence[str]) -> float:
    """F1 of entities, whole and of the right type, over all examples, as conlleval and seqeval count it.

    predictions: (B, W) ids, -1 where nothing was said, which is no entity. labels: ids of each example's words. names:
    of the ids, as B-PER, I-PER, O.
    """
    return float(f1_of(entity_marks(predictions, labels, names).sum(0)))


def entity_marks(predictions: ArrayLike, labels: Sequence[Sequence[int]], names: Sequence[str]) -> np.ndarray:
    """(B, 3): entities found rightly, found, there."""
    marks = []
    for row, gold in zip(np.asarray(predictions).tolist(), labels, strict=True):
        given = set(entities([names[each] if each >= 0 else OUTSIDE for each in row[: len(gold)]]))
        right = set(entities([names[each] for each in gold]))
        marks.append([len(given & right), len(given), len(right)])
    return np.array(marks, dtype=np.float64)


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(type, first word, last word) of each entity of a text.

    B begins one, I and E go on with one of their type, and begin one where there is none; S is one of one word, and
    after E or S another begins. O is none.
    """
    begun, kind, before = 0, "", OUTSIDE
    for i, tag in enumerate([*tags, OUTSIDE]):
        letter, _, its_kind = tag.partition("-")
        goes_on = letter in ("I", "E") and before not in (OUTSIDE, "E", "S") and its_kind == kind
        if before != OUTSIDE and not goes_on:
            yield kind, begun, i - 1
        if letter != OUTSIDE and not goes_on:
            begun = i
        kind, before = its_kind, letter
