"""A task's examples, tokenized in memory, from which batches are taken."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from glmd.data.batches import Key
from glmd.data.masking import Masking, apply_masking
from glmd.losses.labels import IGNORED_LABEL
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
        masking: Masking | None = None,
    ) -> None:
        self.examples, self.form, self.masking = examples, form, masking
        self.rows, truncated, self.columns = form.rows(examples, tokenizer, max_length=max_length)
        # Example i has the rows from first_row[i] up to first_row[i + 1].
        self.first_row = np.cumsum([0, *(len(example.texts) for example in examples)])
        self.truncated = int(np.logical_or.reduceat(truncated, self.first_row[:-1]).sum())

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(examples,) tokens of each one's longest row."""
        return np.maximum.reduceat([len(row["input_ids"]) for row in self.rows], self.first_row[:-1])

    @property
    def num_tokens(self) -> int:
        """Ids of all rows."""
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest example, all its choices together."""
        lengths = [len(row["input_ids"]) for row in self.rows]
        return int(np.add.reduceat(lengths, self.first_row[:-1]).max())

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
        example = self.examples[key[1]]
        rows = self.rows[self.first_row[key[1]] : self.first_row[key[1] + 1]]
        label = IGNORED_LABEL if example.label is None else example.label
        numbers = {"labels": label, "example_id": key[1], **self.columns}
        if not example.choices:
            return apply_masking({**rows[0], **numbers}, key, self.masking)
        parts = [apply_masking(dict(row), (*key, choice), self.masking) for choice, row in enumerate(rows)]
        columns = {name: [part[name] for part in parts] for name in parts[0]}
        return {**columns, **numbers, "num_choices": len(rows)}
