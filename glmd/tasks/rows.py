"""A task's examples as rows of tokens: one for each text, or pair of texts, that a model reads.

rows = pair_rows(examples, tokenizer, max_length=256)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from glmd.data.batches import CHUNK
from glmd.losses.labels import IGNORED_LABEL
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


def word_rows(examples: Sequence[TaskExample], tokenizer: Any, *, max_length: int) -> Rows:
    """Texts whose words have labels: at the first token of each `tagged` is its number, from 1, and `tags` its label.

    Elsewhere they are 0 and -100.
    A word that no token begins in, as one beyond max_length, has no place; a token that begins two is the first one's.
    """
    rows, truncated = [], []
    for first in range(0, len(examples), CHUNK):
        part = examples[first : first + CHUNK]
        found = tokenizer([each.texts[0][0] for each in part], truncation=True, max_length=max_length)
        columns = [name for name in ("input_ids", "token_type_ids") if name in found]
        for i, (example, encoding) in enumerate(zip(part, found.encodings, strict=True)):
            row = {name: np.array(found[name][i], dtype=np.int32) for name in columns}
            places = word_places(example.words, encoding.offsets)
            row["tagged"] = np.zeros(len(row["input_ids"]), dtype=np.int32)
            row["tags"] = np.full(len(row["input_ids"]), IGNORED_LABEL, dtype=np.int32)
            labels = example.label if isinstance(example.label, tuple) else (IGNORED_LABEL,) * len(places)
            for number, (place, label) in enumerate(zip(places, labels, strict=True), start=1):
                if place is not None:
                    row["tagged"][place], row["tags"][place] = number, label
            rows.append(row)
            truncated.append(bool(encoding.overflowing))
    return Rows(rows, truncated, {})


def word_places(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """The number of the first token of each word in a text of them with a space between; None where it has none.

    offsets: of each token the letters that it stands for, which may include the space before a word.
    """
    places: list[int | None] = []
    start, token, taken = 0, 0, -1
    for word in words:
        while token < len(offsets) and (offsets[token][1] <= start or offsets[token][0] == offsets[token][1]):
            token += 1
        is_there = token < len(offsets) and offsets[token][0] < start + len(word) and token != taken
        places.append(token if is_there else None)
        taken = token if is_there else taken
        start += len(word) + 1
    return places


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
