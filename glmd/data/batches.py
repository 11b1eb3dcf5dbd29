"""From stored tokens and task examples to batches, as pure functions of (seed, epoch, example id).

Nothing depends on how often something was called before: a resumed run, another number of loader workers and a
cached teacher all see the same batches.

    loader = batch_loader(BlockDataset(store, tokenizer, ...), steps=StepPlan(...), start_step=120)
    for micro_batches in loader: ...   # one list of micro-batches for each optimizer step
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glmd.losses.labels import IGNORED_LABEL

CHUNK = 1000  # texts that are tokenized at once: their ids are Python numbers for a moment, ten times the size
Key = tuple[int, int]  # (epoch, example id)
Batch = dict[str, Tensor]


def key_columns(keys: Sequence[Key], size: int) -> tuple[np.ndarray, np.ndarray]:
    """(B,) epochs and (B,) example ids of keys into a data set of so many examples. Raises IndexError beyond it."""
    epochs, ids = np.array(list(zip(*keys, strict=True)), dtype=np.int64)
    if ids.min() < 0 or ids.max() >= size:
        raise IndexError(f"examples {ids.min()} to {ids.max()} of {size}")
    return epochs, ids


def positions_in_rows(lengths: np.ndarray) -> np.ndarray:
    """(R,) lengths of rows one after another -> (T,) the position of each token in its row."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)


# Columns of what a decoder beside an encoder says, where there is `target_ids`; its rows have lengths of their own.
TARGET_COLUMNS = ("target_ids", "lm_labels", "cloze_ids")


@dataclass(frozen=True)
class Grid:
    """Rows of tokens one after another, without padding. lengths: (R,). tokens: (T,) int64 of each column."""

    lengths: np.ndarray
    tokens: dict[str, np.ndarray]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, np.ndarray]]) -> "Grid":
        """From the columns of each row."""
        lengths = np.array([len(next(iter(row.values()))) for row in rows])
        return cls(lengths, {name: np.concatenate([row[name] for row in rows]) for name in rows[0]})

    def valid(self) -> np.ndarray:
        """(R, S) bool: not padding, where all rows are as long as the longest."""
        found: np.ndarray = np.arange(self.lengths.max()) < self.lengths[:, None]
        return found

    def rows(self) -> list[dict[str, np.ndarray]]:
        """The columns of each row, views of what is held."""
        columns = {name: np.split(each, np.cumsum(self.lengths)[:-1]) for name, each in self.tokens.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def chosen(self, rows: np.ndarray) -> "Grid":
        """Some of the rows, by their numbers."""
        first, lengths = self._first[rows], self.lengths[rows]
        spans = [slice(*span) for span in zip(first.tolist(), (first + lengths).tolist(), strict=True)]
        tokens = self.tokens.items()
        return Grid(
            lengths, {name: np.concatenate([each[span] for span in spans], dtype=np.int64) for name, each in tokens}
        )

    @cached_property
    def _first(self) -> np.ndarray:
        """(R,) where each row begins."""
        ends: np.ndarray = np.cumsum(self.lengths)
        return ends - self.lengths


@dataclass(frozen=True)
class Examples:
    """Examples on their way into a batch: their rows one after another, without padding.

    lengths: (R,) tokens of each row. tokens: (T,) int64 of each token column. numbers: (B,) or (B, C) int64 of each
    column of examples, or float32 of labels that are numbers. targets: of the same rows what a decoder is to say, where
    that is another text.
    """

    lengths: np.ndarray
    tokens: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]
    targets: Grid | None = None

    @classmethod
    def of(cls, examples: list[dict[str, Any]]) -> "Examples":
        """From examples one by one: (S,) of a token column, a list of these where there are choices, numbers."""
        columns = {name: [example[name] for example in examples] for name in examples[0]}
        said = TARGET_COLUMNS if "target_ids" in columns else ()
        rows = {name: _rows_of(column) for name, column in columns.items() if not isinstance(column[0], int | float)}
        lengths = [len(row) for row in rows["input_ids"]]
        targets = {name: np.concatenate(rows.pop(name)).astype(np.int64) for name in said if name in rows}
        others = ("verbalizers", "labels")
        found = {name: each for name, each in rows.items() if name not in others}
        tokens = {name: each for name, each in found.items() if [len(row) for row in each] == lengths}
        numbers = {name: each for name, each in columns.items() if name not in tokens and name not in said}
        return cls(
            np.array(lengths),
            {name: np.concatenate(each).astype(np.int64) for name, each in tokens.items()},
            {name: _numbers(each) for name, each in numbers.items()},
            Grid(np.array([len(row) for row in _rows_of(columns["target_ids"])]), targets) if said else None,
        )

    def alone(self) -> dict[str, Any]:
        """The only example, as `of` takes it."""
        grids = [Grid(self.lengths, self.tokens), *([self.targets] if self.targets is not None else [])]
        found: dict[str, Any] = {name: each for grid in grids for name, each in grid.tokens.items()}
        if "num_choices" in self.numbers:
            ends = {name: np.cumsum(grid.lengths)[:-1] for grid in grids for name in grid.tokens}
            found = {name: np.split(each, ends[name]) for name, each in found.items()}
        numbers = {name: each[0] if each.ndim > 1 else each[0].item() for name, each in self.numbers.items()}
        return found | numbers


def with_positions(batch: Mapping[str, Tensor]) -> Batch:
    """A batch that was made by hand, with the columns of positions that its `predicts` and `lm_labels` give it."""
    where = {"positions": batch["predicts"]}
    if "lm_labels" in batch:
        where["labeled_positions"] = batch["predicts"] & (batch["lm_labels"] != IGNORED_LABEL)
    return {**batch, **{name: each.flatten().nonzero()[:, 0] for name, each in where.items()}}


def is_full(batch: Mapping[str, Tensor]) -> bool:
    """Whether no row of a batch has padding, as the host can tell by sizes alone."""
    return "target_ids" not in batch and len(batch["positions"]) == batch["input_ids"].numel()


def _numbers(column: list[Any]) -> np.ndarray:
    found = np.array(column)
    return found.astype(np.float32 if found.dtype.kind == "f" else np.int64)


def _rows_of(column: list[Any]) -> list[Any]:
    """The rows of a column of examples, of which each has one or a list of them."""
    return [row for each in column for row in (each if isinstance(each, list) else [each])]


@dataclass(frozen=True)
class Collate:
    """Pad examples to the longest row of them. `pad_id` fills input_ids, 0 the masks, -100 the labels.

    Token columns are (B, S), or (R, S) with R rows for the choices of B examples one after another; `num_choices` (B,)
    then says how many are whose. `target_ids` (R, T) is what a decoder beside an encoder says, and `lm_labels` and
    `cloze_ids` are then of these. `predicts` (B, S) bool, or (R, T), is where words are predicted, which losses and
    scores look at: all tokens of masked and causal LMs unless examples have a column of it, as those of conversations;
    all targets of encoder-decoders. `positions` (N,) are these
    places in the flat batch, row * S + column, so that a device need not look for them; `labeled_positions` those of
    them that have an LM label. `attention_mask` is for models.

    Where an example has several decisions, `num_decisions` (B,) says how many, and `labels` are those of all, one after
    another: of several labels (B, C), or of words, at the tokens where `tagged` (B, S) is not 0, `tagged_positions` in
    the flat batch; their `tags` (S,) become the labels.
    """

    pad_id: int

    def __call__(self, examples: Examples | list[dict[str, Any]]) -> Batch:
        if isinstance(examples, list):
            examples = Examples.of(examples)
        read = Grid(examples.lengths, examples.tokens)
        said = read if examples.targets is None else examples.targets
        valid = read.valid()
        places = valid if said is read else said.valid()
        predicts = places
        if "predicts" in read.tokens:
            assert said is read and "lm_labels" not in read.tokens, "nothing is masked in a conversation"
            predicts = places.copy()
            predicts[places] = read.tokens["predicts"].astype(bool)
            read = Grid(read.lengths, {name: each for name, each in read.tokens.items() if name != "predicts"})
            said = read
        made = {"predicts": predicts, "positions": np.flatnonzero(predicts), "attention_mask": valid.astype(np.int64)}
        if "lm_labels" in said.tokens:
            made["labeled_positions"] = made["positions"][said.tokens["lm_labels"] != IGNORED_LABEL]
        made |= self._padded(read, valid)
        if said is not read:
            made |= self._padded(said, places)
        made = examples.numbers | made
        labels = made.get("labels")
        if "tagged" in made:
            marks = made["tagged"].astype(bool)
            made["tagged_positions"] = np.flatnonzero(marks)
            made |= {"num_decisions": marks.sum(1), "labels": made.pop("tags")[marks]}
        elif labels is not None and labels.ndim == 2:
            made |= {"num_decisions": np.full(len(labels), labels.shape[1]), "labels": labels.ravel()}
        return {name: torch.from_numpy(each) for name, each in made.items()}

    def _padded(self, grid: Grid, places: np.ndarray) -> dict[str, np.ndarray]:
        """Its columns (R, S), with tokens at their places."""
        fill = dict.fromkeys(("input_ids", "target_ids"), self.pad_id)
        fill |= dict.fromkeys(("lm_labels", "cloze_ids", "tags"), IGNORED_LABEL)
        found = {}
        for name, tokens in grid.tokens.items():
            padded = tokens
            if len(tokens) < places.size:
                padded = np.full(places.size, fill.get(name, 0), dtype=np.int64)
                padded[places.ravel()] = tokens
            found[name] = padded.reshape(places.shape)
        return found
