"""A task's examples as rows of tokens: one for each text, or pair of texts, that a model reads.

rows = pair_rows(examples, tokenizer, max_length=256)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from glmd.data.batches import CHUNK
from glmd.tasks.examples import TaskExample


class Rows(NamedTuple):
    """What a model reads of some examples.

    tokens: for each row its columns of ids (S,), one row for each text of each example, in order.
    truncated: (rows,) whether a row lost tokens at max_length.
    columns: what every example has beside, the same for all (`verbalizers` (C,), `mean_over_tokens` 1).
    """

    tokens: list[dict[str, np.ndarray]]
    truncated: list[bool]
    columns: dict[str, Any]


def pair_rows(examples: Sequence[TaskExample], tokenizer: Any, *, max_length: int) -> Rows:
    """Texts, or pairs of which the longer one loses its end at max_length."""
    firsts = [text for example in examples for text, _ in example.texts]
    seconds = [pair or "" for example in examples for _, pair in example.texts]
    return encoded(firsts, seconds if has_pairs(examples) else None, tokenizer, max_length, "longest_first")


def has_pairs(examples: Sequence[TaskExample]) -> bool:
    """Whether the model reads two texts at once."""
    return examples[0].texts[0][1] is not None


def encoded(
    firsts: Sequence[str], seconds: Sequence[str] | None, tokenizer: Any, max_length: int, truncation: str
) -> Rows:
    """The tokenizer's rows, a part at a time. Raises what the tokenizer raises where too little may be truncated."""
    rows, truncated = [], []
    for first in range(0, len(firsts), CHUNK):
        part = (firsts[first : first + CHUNK], None if seconds is None else seconds[first : first + CHUNK])
        found = tokenizer(*part, truncation=truncation, max_length=max_length)
        truncated += [bool(encoding.overflowing) for encoding in found.encodings]
        columns = [name for name in ("input_ids", "token_type_ids") if name in found]
        rows += [{name: np.array(found[name][i], dtype=np.int32) for name in columns} for i in range(len(part[0]))]
    return Rows(rows, truncated, {})
