"""A task's examples, tokenized in memory, from which batches are taken."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from glmd.data.batches import TARGET_COLUMNS, Examples, Grid, Key, key_columns, positions_in_rows
from glmd.data.blocks import BlockDataset
from glmd.data.chats import ConversationDataset
from glmd.data.masking import Corruption
from glmd.tasks.examples import TaskExample
from glmd.tasks.forms import TaskForm


class TaskDataset(Dataset[dict[str, Any]]):
    """A task's examples as their form puts them, tokenized once in memory; with choices, a row for each choice.

    `truncated` counts the examples of which a row lost tokens at max_length. Raises DataError as the form does.
    """

    def __init__(
        self,
        examples: Sequence[TaskExample],
        form: TaskForm,
        tokenizer: Any,
        *,
        max_length: int,
        masking: Corruption | None = None,
    ) -> None:
        self.examples, self.form, self.masking = examples, form, masking
        rows, truncated, self.columns = form.rows(examples, tokenizer, max_length=max_length)
        said = TARGET_COLUMNS if "target_ids" in rows[0] else ()
        self.read = Grid.of([{name: each for name, each in row.items() if name not in said} for row in rows])
        self.said = Grid.of([{name: row[name] for name in said if name in row} for row in rows]) if said else None
        # Example i has the rows from first_row[i] up to first_row[i + 1].
        self.first_row = np.cumsum([0, *(len(example.texts) for example in examples)])
        self.labels = form.label_column(examples)
        self.truncated = int(np.logical_or.reduceat(truncated, self.first_row[:-1]).sum())

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(examples,) tokens of each one's longest row."""
        return np.maximum.reduceat(self.read.lengths, self.first_row[:-1])

    @property
    def rows(self) -> list[dict[str, np.ndarray]]:
        """Of each row its token columns, views of what is held."""
        if self.said is None:
            return self.read.rows()
        return [ours | theirs for ours, theirs in zip(self.read.rows(), self.said.rows(), strict=True)]

    @property
    def num_decisions(self) -> int:
        """Rows of task logits of all examples: one of each, unless it has several labels or labels of words."""
        tagged = self.read.tokens.get("tagged")
        if tagged is not None:
            return int((tagged > 0).sum())
        return len(self) if self.labels is None else len(self.labels) * (self.labels.shape[1:] or (1,))[0]

    def tagged_words(self) -> list[np.ndarray]:
        """Of each example, whose words have labels, the numbers of those that have a token, from 0."""
        rows = np.split(self.read.tokens["tagged"], np.cumsum(self.read.lengths)[:-1])
        return [row[row > 0] - 1 for row in rows]

    @property
    def num_tokens(self) -> int:
        """Ids of all rows at which tokens are predicted."""
        return int((self.said or self.read).lengths.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest example, all its choices together."""
        grids = [self.read, *([self.said] if self.said is not None else [])]
        return max(int(np.add.reduceat(each.lengths, self.first_row[:-1]).max()) for each in grids)

    def fingerprint(self) -> str:
        """sha256 of all that a teacher reads of the examples, unmasked; not of their labels."""
        verbalizers = np.array(self.columns.get("verbalizers", ())).tolist()
        digest = hashlib.sha256(repr((len(self), "mean_over_tokens" in self.columns, verbalizers)).encode())
        digest.update(self.first_row.tobytes())
        for row in self.rows:
            for name, values in row.items():
                digest.update(f"{name} {values.dtype} {len(values)}".encode() + values.tobytes())
        return digest.hexdigest()

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """One example, as `Examples.of` takes it."""
        return self.__getitems__([key]).alone()

    def __getitems__(self, keys: Sequence[Key]) -> Examples:
        """Examples gathered at once. Raises IndexError for one that is not there."""
        epochs, ids = key_columns(keys, len(self))
        counts = self.first_row[ids + 1] - self.first_row[ids]
        choices = positions_in_rows(counts)
        rows = np.repeat(self.first_row[ids], counts) + choices
        read, said = self.read.chosen(rows), self.said.chosen(rows) if self.said is not None else None
        numbers = {"example_id": ids}
        if self.labels is not None:
            numbers["labels"] = self.labels[ids]
        numbers |= {name: np.tile(value, (len(ids), *[1] * np.ndim(value))) for name, value in self.columns.items()}
        if self.examples[0].choices:
            numbers["num_choices"] = counts
        examples = Examples(read.lengths, read.tokens, numbers, said)
        if self.masking is None:
            return examples
        of_rows = np.stack([np.repeat(epochs, counts), np.repeat(ids, counts), choices], axis=1)
        return self.masking.corrupt(examples, of_rows)


TrainingData = BlockDataset | ConversationDataset | TaskDataset  # what a stage may learn from
