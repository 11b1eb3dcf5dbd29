"""From stored tokens and task examples to batches, as pure functions of (seed, epoch, example id).

Nothing depends on how often something was called before: a resumed run, another number of loader workers and a
cached teacher all see the same batches.

    loader = batch_loader(BlockDataset(store, tokenizer, ...), steps=StepPlan(...), start_step=120)
    for micro_batches in loader: ...   # one list of micro-batches for each optimizer step
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Examples:
    """Examples on their way into a batch: their rows one after another, without padding.

    lengths: (R,) tokens of each row. tokens: (T,) int64 of each token column. numbers: (B,) or (B, C) int64 of each
    column of examples.
    """

    lengths: np.ndarray
    tokens: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]

    @classmethod
    def of(cls, examples: list[dict[str, Any]]) -> "Examples":
        """From examples one by one: (S,) of a token column, a list of these where there are choices, numbers."""
        columns = {name: [example[name] for example in examples] for name in examples[0]}
        rows = {
            name: [row for each in column for row in (each if isinstance(each, list) else [each])]
            for name, column in columns.items()
            if not isinstance(column[0], int)
        }
        lengths = [len(row) for row in rows["input_ids"]]
        tokens = {name: each for name, each in rows.items() if [len(row) for row in each] == lengths}
        return cls(
            np.array(lengths),
            {name: np.concatenate(each).astype(np.int64) for name, each in tokens.items()},
            {name: np.array(each, dtype=np.int64) for name, each in columns.items() if name not in tokens},
        )

    def alone(self) -> dict[str, Any]:
        """The only example, as `of` takes it."""
        found: dict[str, Any] = dict(self.tokens)
        if "num_choices" in self.numbers:
            found = {name: np.split(each, np.cumsum(self.lengths)[:-1]) for name, each in self.tokens.items()}
        numbers = {name: each[0] if each.ndim > 1 else int(each[0]) for name, each in self.numbers.items()}
        return found | numbers


def with_positions(batch: Mapping[str, Tensor]) -> Batch:
    """A batch that was made by hand, with the columns of positions that its `predicts` and `lm_labels` give it."""
    where = {"positions": batch["predicts"]}
    if "lm_labels" in batch:
        where["labeled_positions"] = batch["predicts"] & (batch["lm_labels"] != IGNORED_LABEL)
    return {**batch, **{name: each.flatten().nonzero()[:, 0] for name, each in where.items()}}


def is_full(batch: Mapping[str, Tensor]) -> bool:
    """Whether no row of a batch has padding, as the host can tell by sizes alone."""
    return len(batch["positions"]) == batch["input_ids"].numel()


@dataclass(frozen=True)
class Collate:
    """Pad examples to the longest row of them. `pad_id` fills input_ids, 0 the masks, -100 the labels.

    Token columns are (B, S), or (R, S) with R rows for the choices of B examples one after another; `num_choices` (B,)
    then says how many are whose. `predicts` (B, S) bool is where words are predicted, which losses and scores look at:
    all tokens of masked and causal LMs. `positions` (N,) are these places in the flat batch, row * S + column, so that
    a device need not look for them; `labeled_positions` those of them that have an LM label. `attention_mask` is for
    models.
    """

    pad_id: int

    def __call__(self, examples: Examples | list[dict[str, Any]]) -> Batch:
        if isinstance(examples, list):
            examples = Examples.of(examples)
        fill = {"input_ids": self.pad_id, "lm_labels": IGNORED_LABEL, "cloze_ids": IGNORED_LABEL}
        lengths, batch = examples.lengths, Batch()
        predicts = np.arange(lengths.max()) < lengths[:, None]
        positions = np.flatnonzero(predicts)
        if "lm_labels" in examples.tokens:
            labeled = examples.tokens["lm_labels"] != IGNORED_LABEL
            batch["labeled_positions"] = torch.from_numpy(positions[labeled])
        for name, tokens in examples.tokens.items():
            padded = tokens
            if len(tokens) < predicts.size:
                padded = np.full(predicts.size, fill.get(name, 0), dtype=np.int64)
                padded[positions] = tokens
            batch[name] = torch.from_numpy(padded.reshape(predicts.shape))
        made = {"predicts": predicts, "positions": positions, "attention_mask": predicts.astype(np.int64)}
        return batch | {name: torch.from_numpy(each) for name, each in (examples.numbers | made).items()}
