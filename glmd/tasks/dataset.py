"""The examples of a task as rows of tokens."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from glmd.data.batches import CHUNK, Key
from glmd.data.masking import Masking, apply_masking
from glmd.errors import DataError
from glmd.losses.labels import IGNORED_LABEL
from glmd.tasks.cloze import candidate_ids, continuations, place, refuse_masks, with_masks
from glmd.tasks.tasks import BLANK, TaskExample


class TaskDataset(Dataset[dict[str, Any]]):
    """A task's examples as (pairs of) sentences, tokenized once; with choices, a row for each choice.

    `truncated` counts the examples of which a row was longer than max_length and lost tokens of the longer sentence,
    or, where the other one has a blank, of that without. A blank becomes mask tokens, one for each token that fills it.

    is_causal: ask for what fills a blank as a continuation (`continuations`), as a causal LM must be.
    verbalizers: ids of the words that fill the blank for each label. mean_over_tokens: a candidate in a blank scores
    the mean over its tokens. Raises DataError where a blank is cut off.
    """

    def __init__(
        self,
        examples: Sequence[TaskExample],
        tokenizer: Any,
        *,
        max_length: int,
        masking: Masking | None = None,
        verbalizers: Sequence[int] = (),
        mean_over_tokens: bool = False,
        is_causal: bool = False,
    ) -> None:
        self.examples, self.masking, self.mean_over_tokens = examples, masking, mean_over_tokens
        self.verbalizers = np.array(verbalizers, dtype=np.int64)
        # Example i has the rows from first_row[i] up to first_row[i + 1].
        self.first_row = np.cumsum([0, *(len(example.texts) for example in examples)])
        self.rows: list[dict[str, np.ndarray]]
        if is_causal:
            self.rows, cut = continuations(examples, tokenizer, max_length=max_length)
            self.truncated = self._owners_of(cut)
            return
        texts = [text for example in examples for text, _ in example.texts]
        pairs = [pair or "" for example in examples for _, pair in example.texts]
        second = pairs if examples[0].texts[0][1] is not None else None
        truncation, fillings = "longest_first", None
        keeps_first = BLANK in texts[0]
        if BLANK in texts[0] + pairs[0]:
            refuse_masks(examples, tokenizer)
            fillings = candidate_ids(examples, tokenizer)
            texts, pairs = (
                [with_masks(*each, tokenizer) for each in zip(part, fillings, strict=True)] for part in (texts, pairs)
            )
            if second is not None:
                second, truncation = pairs, "only_second" if keeps_first else "only_first"
        self.rows, cut = [], []
        for first in range(0, len(texts), CHUNK):
            part = (texts[first : first + CHUNK], second[first : first + CHUNK] if second is not None else None)
            try:
                encoded = tokenizer(*part, truncation=truncation, max_length=max_length)
            except Exception as error:  # the tokenizers library has no class of its own for it
                kept = (texts if keeps_first else pairs)[first : first + CHUNK]
                lengths = [len(ids) for ids in tokenizer(kept, add_special_tokens=False, verbose=False)["input_ids"]]
                where = place(self._owner(first + int(np.argmax(lengths)))[0])
                found = f"the text around the blank has {max(lengths)} tokens"
                raise DataError(f"{where}: {found}, too many for max_length {max_length}; give a larger one") from error
            cut += [bool(encoding.overflowing) for encoding in encoded.encodings]
            columns = [name for name in ("input_ids", "token_type_ids") if name in encoded]
            self.rows += [
                {name: np.array(encoded[name][i], dtype=np.int32) for name in columns} for i in range(len(part[0]))
            ]
        self.truncated = self._owners_of(cut)
        if fillings is not None:
            self._mark_blanks(fillings, tokenizer.mask_token_id, max_length)

    def _owners_of(self, chosen: list[bool]) -> int:
        """How many examples have a chosen row."""
        return int(np.logical_or.reduceat(chosen, self.first_row[:-1]).sum())

    def _mark_blanks(self, fillings: list[list[int]], mask_id: int, max_length: int) -> None:
        """Give every row `blank_ids`: in its blank the ids that fill it (0 for a verbalizer), elsewhere -100."""
        for i, (row, filling) in enumerate(zip(self.rows, fillings, strict=True)):
            places = row["input_ids"] == mask_id
            example, choice = self._owner(i)
            parts = example.texts[choice]
            expected = filling * sum((part or "").count(BLANK) for part in parts)
            if places.sum() != len(expected):
                found = f"{places.sum()} of the {len(expected)} tokens of the blank are left at max_length {max_length}"
                raise DataError(f"{place(example)}: {found}; give a larger max_length")
            row["blank_ids"] = np.full(len(places), IGNORED_LABEL, dtype=np.int32)
            row["blank_ids"][places] = expected

    def _owner(self, row: int) -> tuple[TaskExample, int]:
        """The example of a row, and which of its choices the row is."""
        i = int(np.searchsorted(self.first_row, row, side="right")) - 1
        return self.examples[i], row - int(self.first_row[i])

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
        digest = hashlib.sha256(repr((len(self), self.mean_over_tokens, self.verbalizers.tolist())).encode())
        digest.update(self.first_row.tobytes())
        for row in self.rows:
            for name, values in row.items():
                digest.update(f"{name} {values.dtype} {len(values)}".encode() + values.tobytes())
        return digest.hexdigest()

    def __getitem__(self, key: Key) -> dict[str, Any]:
        example = self.examples[key[1]]
        rows = self.rows[self.first_row[key[1]] : self.first_row[key[1] + 1]]
        numbers = {"labels": IGNORED_LABEL if example.label is None else example.label, "example_id": key[1]}
        if self.mean_over_tokens:
            numbers["mean_over_tokens"] = 1
        if not example.choices:
            words = {"verbalizers": self.verbalizers} if len(self.verbalizers) else {}
            return apply_masking({**rows[0], **numbers, **words}, key, self.masking)
        parts = [apply_masking(dict(row), (*key, choice), self.masking) for choice, row in enumerate(rows)]
        columns = {name: [part[name] for part in parts] for name in parts[0]}
        return {**columns, **numbers, "num_choices": len(rows)}
