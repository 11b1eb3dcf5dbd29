"""From stored tokens and task examples to batches, as pure functions of (seed, epoch, example id).

Nothing depends on how often something was called before: a resumed run, another number of loader workers and a
cached teacher all see the same batches.

    loader = batch_loader(BlockDataset(store, tokenizer, ...), steps=StepPlan(...), start_step=120)
    for micro_batches in loader: ...   # one list of micro-batches for each optimiser step
"""

import hashlib
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from glmd.data.blanks import (
    IGNORED,
    block_frame,
    candidate_ids,
    continuations,
    place,
    refuse_masks,
    with_masks,
)
from glmd.data.corpus import TokenStore
from glmd.data.tasks import BLANK, TaskExample
from glmd.errors import DataError
from glmd.signals import begin_worker, held_back

WINDOW = 50  # global batches that are sorted by length together, as in transformers
CHUNK = 1000  # texts that are tokenized at once: their ids are Python numbers for a moment, ten times the size
Key = tuple[int, int]  # (epoch, example id)
Batch = dict[str, Tensor]


def random_generator(*counters: int) -> np.random.Generator:
    """A generator that is a function of its counters alone, each in [0, 2**64)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(counters)))


def example_order(num_examples: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in an epoch: a permutation given by (seed, epoch)."""
    return random_generator(0, seed, epoch).permutation(num_examples)


def order_by_length(
    order: np.ndarray, lengths: np.ndarray, *, batch_size: int, start: int, window: int, generator: np.random.Generator
) -> np.ndarray:
    """An epoch's order, sorted so that batches hold examples of like length.

    order: (n,) example ids. lengths: of all examples. start: where the epoch's first whole batch begins. window: so
    many batches are sorted together, longest first, and come in a drawn order; 1 leaves each batch its examples. The
    examples before the first and behind the last whole batch, which share theirs with another epoch, stay.
    """
    whole = max(0, len(order) - start) // batch_size * batch_size
    result = order.copy()
    for first in range(start, start + whole, window * batch_size):
        part = order[first : min(first + window * batch_size, start + whole)]
        batches = part[np.argsort(-lengths[part], kind="stable")].reshape(-1, batch_size)
        result[first : first + len(part)] = generator.permutation(batches).ravel()
    return result


@dataclass(frozen=True)
class Corruption:
    """BERT's corruption of inputs (arXiv:1810.04805, section 3.1): 80 % mask, 10 % random, 10 % as it was.

    num_maskings: how many corrupted copies of a text there are; epochs take them in turn. None: a new one each epoch.
    """

    probability: float
    mask_id: int
    special_ids: np.ndarray  # never chosen
    ordinary_ids: np.ndarray  # what a random replacement is drawn from
    seed: int
    num_maskings: int | None = None

    def __call__(self, input_ids: np.ndarray, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(S,) ids -> (S,) corrupted ids, (S,) labels: the original id where a token was chosen, else -100."""
        epoch, *example = key
        generator = random_generator(1, self.seed, epoch % self.num_maskings if self.num_maskings else epoch, *example)
        chosen = generator.random(len(input_ids)) < self.probability
        chosen &= ~np.isin(input_ids, self.special_ids)
        action = generator.random(len(input_ids))
        random_ids = self.ordinary_ids[generator.integers(0, len(self.ordinary_ids), len(input_ids))]
        corrupted = np.where(chosen & (action < 0.8), self.mask_id, input_ids)
        corrupted = np.where(chosen & (action >= 0.9), random_ids, corrupted)
        return corrupted, np.where(chosen, input_ids, IGNORED)


def corruption_for(tokenizer: Any, probability: float, seed: int, num_maskings: int | None = None) -> Corruption | None:
    """The corruption of a tokenizer's ids; None at probability 0."""
    if probability == 0:
        return None
    special = np.unique(np.array(tokenizer.all_special_ids, dtype=np.int64))
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), special)
    return Corruption(probability, tokenizer.mask_token_id, special, ordinary, seed, num_maskings)


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
        corruption: Corruption | None,
    ) -> None:
        self.store, self.blocks, self.corruption = store, blocks, corruption
        self.start, self.end = block_frame(tokenizer)
        self.max_length = max_length
        self.block_length = max_length - len(self.start) - len(self.end)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def num_tokens(self) -> int:
        """Ids of all blocks, with those of their frames."""
        ends = (self.blocks.start * self.block_length, self.blocks.stop * self.block_length)
        first, last = (min(each, self.store.num_tokens) for each in ends)
        return last - first + len(self) * (self.max_length - self.block_length)

    @property
    def longest(self) -> int:
        """Tokens of an example at most."""
        return self.max_length

    def __getitem__(self, key: Key) -> dict[str, Any]:
        tokens = self.store.block(self.blocks[key[1]], self.block_length).astype(np.int64)
        example = {"input_ids": np.concatenate([self.start, tokens, self.end]), "example_id": key[1]}
        return _corrupted(example, key, self.corruption)


def block_texts(data: BlockDataset, tokenizer: Any) -> list[str]:
    """The documents in the blocks of a data set, as the tokenizer decodes them; the first and last may be cut."""
    length, separator = data.block_length, data.store.manifest["separator_id"]
    ids = data.store.tokens[data.blocks.start * length : data.blocks.stop * length].astype(np.int64)
    documents = np.split(ids, np.flatnonzero(ids == separator))
    decoded = [tokenizer.decode(each[each != separator], clean_up_tokenization_spaces=False) for each in documents]
    return [text for text in decoded if text.strip()]


class TaskDataset(Dataset[dict[str, Any]]):
    """A task's examples as (pairs of) sentences, tokenized once; with choices, a row for each choice.

    `truncated` counts the examples of which a row was longer than max_length and lost tokens of the longer sentence,
    or, where the other one has a blank, of that without. A blank becomes mask tokens, one for each token that fills it.

    is_causal: ask for what fills a blank as a continuation (`continuations`), as a causal LM must be.
    verbalisers: ids of the words that fill the blank for each label. mean_over_tokens: a candidate in a blank scores
    the mean over its tokens. Raises DataError where a blank is cut off.
    """

    def __init__(
        self,
        examples: Sequence[TaskExample],
        tokenizer: Any,
        *,
        max_length: int,
        corruption: Corruption | None = None,
        verbalisers: Sequence[int] = (),
        mean_over_tokens: bool = False,
        is_causal: bool = False,
    ) -> None:
        self.examples, self.corruption, self.mean_over_tokens = examples, corruption, mean_over_tokens
        self.verbalisers = np.array(verbalisers, dtype=np.int64)
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
        """Give every row `blank_ids`: in its blank the ids that fill it (0 for a verbaliser), elsewhere -100."""
        for i, (row, filling) in enumerate(zip(self.rows, fillings, strict=True)):
            places = row["input_ids"] == mask_id
            example, choice = self._owner(i)
            parts = example.texts[choice]
            expected = filling * sum((part or "").count(BLANK) for part in parts)
            if places.sum() != len(expected):
                found = f"{places.sum()} of the {len(expected)} tokens of the blank are left at max_length {max_length}"
                raise DataError(f"{place(example)}: {found}; give a larger max_length")
            row["blank_ids"] = np.full(len(places), IGNORED, dtype=np.int32)
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
        """sha256 of all that a teacher reads of the examples, uncorrupted; not of their labels."""
        digest = hashlib.sha256(repr((len(self), self.mean_over_tokens, self.verbalisers.tolist())).encode())
        digest.update(self.first_row.tobytes())
        for row in self.rows:
            for name, values in row.items():
                digest.update(f"{name} {values.dtype} {len(values)}".encode() + values.tobytes())
        return digest.hexdigest()

    def __getitem__(self, key: Key) -> dict[str, Any]:
        example = self.examples[key[1]]
        rows = self.rows[self.first_row[key[1]] : self.first_row[key[1] + 1]]
        numbers = {"labels": IGNORED if example.label is None else example.label, "example_id": key[1]}
        if self.mean_over_tokens:
            numbers["mean_over_tokens"] = 1
        if not example.choices:
            words = {"verbalisers": self.verbalisers} if len(self.verbalisers) else {}
            return _corrupted({**rows[0], **numbers, **words}, key, self.corruption)
        parts = [_corrupted(dict(row), (*key, choice), self.corruption) for choice, row in enumerate(rows)]
        columns = {name: [part[name] for part in parts] for name in parts[0]}
        return {**columns, **numbers, "num_choices": len(rows)}


def _corrupted(example: dict[str, Any], key: tuple[int, ...], corruption: Corruption | None) -> dict[str, Any]:
    if corruption is not None:
        example["input_ids"], example["word_labels"] = corruption(example["input_ids"], key)
    return example


@dataclass(frozen=True)
class Collate:
    """Pad a list of examples to the longest of them. `pad_id` fills input_ids, 0 the masks, -100 the labels.

    Token columns are (B, S), or (R, S) with R rows for the choices of B examples one after another; `num_choices` (B,)
    then says how many are whose.
    """

    pad_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> Batch:
        fill = {"input_ids": self.pad_id, "word_labels": IGNORED, "blank_ids": IGNORED}
        batch: Batch = {}
        for name, first in examples[0].items():
            if isinstance(first, int):
                batch[name] = torch.tensor([example[name] for example in examples])
            else:
                rows = [row for e in examples for row in (e[name] if isinstance(e[name], list) else [e[name]])]
                batch[name] = _padded(rows, fill.get(name, 0))
                if name == "input_ids":
                    lengths = torch.tensor([len(row) for row in rows])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        return batch


def _padded(rows: list[np.ndarray], fill: int) -> Tensor:
    """(R, S) from R rows of at most S ids."""
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(padded)


@dataclass(frozen=True)
class StepPlan:
    """Which examples each optimiser step sees, on each rank: the examples stream by in epoch after epoch.

    One step takes world_size * accumulation * batch_size consecutive examples of the stream, so that the global
    batch is the same set for every layout with the same product.

    lengths: of all examples, for a strategy that looks at them (`train_sampling_strategy`).
    """

    num_examples: int
    batch_size: int
    accumulation: int
    rank: int
    world_size: int
    seed: int
    strategy: str = "random"
    lengths: np.ndarray | None = None

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.accumulation * self.world_size

    def micro_batches(self, start_step: int, stop_step: int) -> Iterator[list[Key]]:
        """The keys of each micro-batch of this rank, from `start_step` up to `stop_step`."""
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(start_step, stop_step):
            for micro in range(self.accumulation):
                first = step * self.global_batch_size + (micro * self.world_size + self.rank) * self.batch_size
                keys = []
                for position in range(first, first + self.batch_size):
                    if position // self.num_examples != epoch:
                        epoch = position // self.num_examples
                        order = self._order(epoch)
                    keys.append((epoch, int(order[position % self.num_examples])))
                yield keys

    def _order(self, epoch: int) -> np.ndarray:
        """The order of an epoch: a function of its number, the seed and the global batch, as all of the stream is."""
        order = example_order(self.num_examples, seed=self.seed, epoch=epoch)
        if self.strategy == "random":
            return order
        assert self.lengths is not None, "only a task's examples differ in length"
        size = self.global_batch_size
        # At least four windows an epoch, else one would run through the lengths.
        window = 1 if self.strategy == "batch_rebalance" else min(WINDOW, max(1, self.num_examples // (4 * size)))
        start, generator = -epoch * self.num_examples % size, random_generator(2, self.seed, epoch)
        return order_by_length(order, self.lengths, batch_size=size, start=start, window=window, generator=generator)


def step_batches(
    dataset: Dataset[dict[str, Any]],
    plan: StepPlan,
    collate: Collate,
    *,
    start_step: int,
    stop_step: int,
    num_workers: int = 0,
) -> Generator[list[Batch], None, None]:
    """For each optimiser step the list of its micro-batches on this rank."""
    if num_workers:
        # Tokenizing is over; a fork after it would only draw a warning from the tokenizers library.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(
        dataset,
        batch_sampler=plan.micro_batches(start_step, stop_step),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader draws from the global one, which seeds dropout
        worker_init_fn=begin_worker if num_workers else None,
    )
    with held_back():
        batches = iter(loader)
    for _ in range(start_step, stop_step):
        yield [next(batches) for _ in range(plan.accumulation)]


def evaluation_batches(
    dataset: BlockDataset | TaskDataset,
    collate: Collate,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """This rank's share of the dataset once, each example on exactly one rank, as in epoch 0.

    Examples of a task come longest first, so that the rows of a batch have few pads. `example_id` says which are which.
    """
    order = np.arange(len(dataset))
    if isinstance(dataset, TaskDataset):
        order = np.argsort(-dataset.lengths, kind="stable")
    mine = order[rank::world_size]
    for first in range(0, len(mine), batch_size):
        yield collate([dataset[0, int(i)] for i in mine[first : first + batch_size]])
