"""Conversations of a corpus in blocks: several share one where they fit, and none is cut to fill it.

    data = ConversationDataset(store, max_length=512, blocks=range(90), loss_on="assistant", packing=True)

A conversation that is longer than a block has one of its own and loses its end. In a block each token has its place in
its own conversation (`text_positions`), by which a model keeps them apart.
"""

from bisect import insort
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from glmd.data.batches import Examples, Key, key_columns, positions_in_rows
from glmd.data.conversations import LossOn
from glmd.data.token_store import ASSISTANT, TokenStore

OPEN = 16  # blocks that are filled at once; more would fill them little better, and each conversation looks at all


class Packing(NamedTuple):
    """Which conversations share a block. order: (C,) their numbers, block by block. ends: (blocks,) in that order."""

    order: np.ndarray
    ends: np.ndarray

    def members(self, block: int) -> np.ndarray:
        """The conversations of a block, in the order of the corpus."""
        return self.order[self.ends[block - 1] if block else 0 : self.ends[block]]


def pack(lengths: np.ndarray, max_length: int, *, packing: bool = True) -> Packing:
    """Conversations in blocks of at most `max_length` tokens: each in the fullest one that has room, of the last OPEN.

    lengths: (C,) tokens of each; one that is longer takes a block. packing: else each has a block of its own. Blocks
    are in the order of their first conversations, and a function of the lengths alone.
    """
    if not packing:
        return Packing(np.arange(len(lengths)), np.arange(1, len(lengths) + 1))
    blocks: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens that fit, block) of each that is open, the fullest first
    for number, length in enumerate(np.minimum(lengths, max_length).tolist()):
        place = next((i for i, (room, _) in enumerate(rooms) if room >= length), None)
        if place is None:
            room, block = max_length, len(blocks)
            blocks.append([])
            if len(rooms) == OPEN:
                del rooms[0]
        else:
            room, block = rooms.pop(place)
        blocks[block].append(number)
        insort(rooms, (room - length, block))
    sizes = [len(each) for each in blocks]
    return Packing(np.array([number for each in blocks for number in each], dtype=np.int64), np.cumsum(sizes))


@lru_cache(maxsize=4)
def packing_of(store: TokenStore, max_length: int, packing: bool) -> Packing:
    """How the conversations of a store share blocks; made once for each length."""
    return pack(np.diff(store.first_tokens), max_length, packing=packing)


class ConversationDataset(Dataset[dict[str, Any]]):
    """Blocks of conversations from the memory-mapped store, with the positions at which the loss is taken.

    loss_on: of `assistant` those whose next token an assistant says, of `all` every one with a next token in its
    conversation. by_role: a column `by_assistant` of every position, whether its next token is an assistant's.
    packing: as `pack` gives it for the store and this length.
    """

    def __init__(
        self, store: TokenStore, *, max_length: int, blocks: range, packing: Packing, loss_on: LossOn, by_role: bool
    ) -> None:
        self.store, self.max_length, self.blocks, self.packing = store, max_length, blocks, packing
        self.loss_on, self.by_role = loss_on, by_role
        self.keeps_apart = len(packing.ends) < len(packing.order)  # else a row is one conversation

    def __len__(self) -> int:
        return len(self.blocks)

    @cached_property
    def _lengths(self) -> np.ndarray:
        """(C,) tokens of each conversation of the store, as far as they fit."""
        return np.minimum(np.diff(self.store.first_tokens), self.max_length)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(blocks,) tokens of each."""
        ends = np.append(0, self.packing.ends)
        sums = np.append(0, np.cumsum(self._lengths[self.packing.order]))
        return np.diff(sums[ends])[self.blocks.start : self.blocks.stop]

    @cached_property
    def num_tokens(self) -> int:
        """Positions at which the loss is taken."""
        numbers = self.numbers
        if self.loss_on == "all":
            return int((self._lengths[numbers] - 1).sum())
        return sum(int(self.conversation(each)[1][1:].sum()) for each in numbers.tolist())

    @property
    def numbers(self) -> np.ndarray:
        """The conversations of these blocks."""
        return np.concatenate([self.packing.members(block) for block in self.blocks])

    @property
    def longest(self) -> int:
        """Tokens of an example at most."""
        return int(self.lengths.max())

    @property
    def num_conversations(self) -> int:
        """In these blocks."""
        return len(self.numbers)

    def truncated(self) -> int:
        """Conversations of these blocks that lose their end."""
        return int((np.diff(self.store.first_tokens)[self.numbers] > self.max_length).sum())

    def silent(self) -> int:
        """Conversations of these blocks that lose every token at which the loss would be taken."""
        cut = self.numbers[np.diff(self.store.first_tokens)[self.numbers] > self.max_length]
        if self.loss_on == "all":
            return 0
        return sum(not self.conversation(each)[1][1:].any() for each in cut.tolist())

    def conversation(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(S,) ids and (S,) bool, whether an assistant says them, of one conversation as far as it fits."""
        start = int(self.store.first_tokens[number])
        span = slice(start, start + int(self._lengths[number]))
        ids = np.asarray(self.store.tokens[span]).astype(np.int64)
        return ids, (np.asarray(self.store.marks[span]) & ASSISTANT).astype(bool)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """One example, as `Examples.of` takes it."""
        return self.__getitems__([key]).alone()

    def __getitems__(self, keys: Sequence[Key]) -> Examples:
        """Examples read at once. Raises IndexError for one that is not there."""
        _, ids = key_columns(keys, len(self))
        numbers = np.concatenate([self.packing.members(self.blocks.start + each) for each in ids.tolist()])
        read = [self.conversation(each) for each in numbers.tolist()]
        by_assistant = np.concatenate([_is_next(said) for _, said in read])
        places = positions_in_rows(self._lengths[numbers])
        # The last token of a conversation has no next one.
        has_next = np.append(places[1:] > 0, False)
        predicts = by_assistant if self.loss_on == "assistant" else has_next
        tokens = {"input_ids": np.concatenate([each for each, _ in read]), "predicts": predicts.astype(np.int64)}
        if self.keeps_apart:
            tokens["text_positions"] = places
        if self.by_role:
            tokens["by_assistant"] = by_assistant.astype(np.int64)
        return Examples(self.lengths[ids], tokens, {"example_id": ids})


def conversation_texts(data: ConversationDataset, tokenizer: Any) -> list[tuple[str, list[tuple[int, int]]]]:
    """The text of each conversation, as far as it fits, and from where to where in it an assistant speaks."""
    found = []
    for number in data.numbers.tolist():
        ids, said = data.conversation(number)
        text, borders = _decoded(tokenizer, ids), np.flatnonzero(np.diff(said, prepend=False, append=False))
        # A character that ends behind the border is of what comes after it.
        places = [len(_decoded(tokenizer, ids[:border]).rstrip("\ufffd")) for border in borders.tolist()]
        found.append((text, [*zip(places[::2], places[1::2], strict=True)]))
    return found


def _decoded(tokenizer: Any, ids: np.ndarray) -> str:
    text: str = tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
    return text


def _is_next(is_assistant: np.ndarray) -> np.ndarray:
    """(S,) bool, of each token of a conversation whether an assistant says the next one."""
    return np.append(is_assistant[1:], False)
