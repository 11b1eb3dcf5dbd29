"""Texts of a corpus as blocks of one length."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from glmd.data.batches import Examples, Key, key_columns
from glmd.data.masking import Corruption
from glmd.data.token_store import TokenStore
from glmd.errors import ModelError


def block_frame(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The ids that the tokenizer puts before and after a text. Raises ModelError where that cannot be told."""
    special = {*tokenizer.all_special_ids, tokenizer.unk_token_id}
    # Found around a token of the vocabulary: of a text that it does not know, a tokenizer makes nothing or anything.
    for token_id in range(len(tokenizer)):
        text = "" if token_id in special else tokenizer.decode([token_id])
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids or special & set(ids):
            continue
        framed = tokenizer(text, verbose=False)["input_ids"]
        for first in range(len(framed) - len(ids) + 1):
            if framed[first : first + len(ids)] == ids:
                end = framed[first + len(ids) :]
                return np.array(framed[:first], dtype=np.int64), np.array(end, dtype=np.int64)
    raise ModelError(
        f"{type(tokenizer).__name__}: no token of its vocabulary stands in a text as itself, so what it puts before "
        "and after a text cannot be told; it is not supported"
    )


class BlockDataset(Dataset[dict[str, Any]]):
    """Corpus blocks of at most `max_length` ids, from the memory-mapped store, framed as the tokenizer frames a text.

    That is `[CLS] tokens [SEP]` for BERT, a token at the beginning or nothing for a decoder.
    """

    def __init__(
        self,
        store: TokenStore,
        tokenizer: Any,
        *,
        max_length: int,
        blocks: range,
        masking: Corruption | None,
    ) -> None:
        self.store, self.blocks, self.masking = store, blocks, masking
        self.start, self.end = block_frame(tokenizer)
        self.max_length = max_length
        self.block_length = max_length - len(self.start) - len(self.end)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def num_tokens(self) -> int:
        """Ids of all blocks, with those of their frames; of blocks with targets how many these have, at most."""
        of_targets = getattr(self.masking, "num_targets", None)
        if of_targets is not None:
            return len(self) * int(of_targets(self.max_length))
        ends = (self.blocks.start * self.block_length, self.blocks.stop * self.block_length)
        first, last = (min(each, self.store.num_tokens) for each in ends)
        return last - first + len(self) * (self.max_length - self.block_length)

    @property
    def longest(self) -> int:
        """Tokens of an example at most."""
        return self.max_length

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """One example, as `Examples.of` takes it."""
        return self.__getitems__([key]).alone()

    def __getitems__(self, keys: Sequence[Key]) -> Examples:
        """Examples read at once. Raises IndexError for one that is not there."""
        epochs, ids = key_columns(keys, len(self))
        first = (self.blocks.start + ids) * self.block_length
        lengths = np.minimum(self.block_length, self.store.num_tokens - first)  # the last block may be shorter
        stored = np.asarray(self.store.tokens)  # a slice of a memory map would be one too, which takes a while to make
        blocks = (stored[start : start + self.block_length] for start in first.tolist())
        parts = [part for block in blocks for part in (self.start, block, self.end)]
        input_ids = np.concatenate(parts, dtype=np.int64)
        rows = lengths + len(self.start) + len(self.end)
        examples = Examples(rows, {"input_ids": input_ids}, {"example_id": ids})
        if self.masking is None:
            return examples
        return self.masking.corrupt(examples, np.stack([epochs, ids, np.zeros_like(ids)], axis=1))


def block_texts(data: BlockDataset, tokenizer: Any) -> list[str]:
    """The documents in the blocks of a data set, as the tokenizer decodes them; the first and last may be cut."""
    length, separator = data.block_length, data.store.manifest["separator_id"]
    ids = data.store.tokens[data.blocks.start * length : data.blocks.stop * length].astype(np.int64)
    documents = np.split(ids, np.flatnonzero(ids == separator))
    decoded = [tokenizer.decode(each[each != separator], clean_up_tokenization_spaces=False) for each in documents]
    return [text for text in decoded if text.strip()]
