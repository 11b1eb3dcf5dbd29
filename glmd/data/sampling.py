"""Which examples each step sees, in which order, on which rank: pure functions of (seed, epoch)."""

import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from glmd.data.batches import Batch, Collate, Key
from glmd.data.masking import random_generator
from glmd.runtime.interrupts import begin_worker, held_back

AHEAD = 4  # micro-batches that each worker of a loader makes ahead
MOST_WORKERS = 4  # that are chosen; a worker makes batches faster than a GPU takes them
WINDOW = 50  # global batches that are sorted by length together, as in transformers


def example_order(num_examples: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in an epoch: a permutation given by (seed, epoch)."""
    return random_generator(0, seed, epoch).permutation(num_examples)


def order_by_length(
    order: np.ndarray, lengths: np.ndarray, *, batch_size: int, start: int, window: int, generator: np.random.Generator
) -> np.ndarray:
    """An epoch's order, sorted so that batches hold examples of like length.

    order: (n,) example ids. lengths: of all examples. start: where the epoch's first whole batch begins. window: so
    many batches are sorted together, longest first, and come in a drawn order. The examples before the
    first and behind the last whole batch, which share theirs with another epoch, stay.
    """
    whole = max(0, len(order) - start) // batch_size * batch_size
    result = order.copy()
    for first in range(start, start + whole, window * batch_size):
        part = order[first : min(first + window * batch_size, start + whole)]
        batches = part[np.argsort(-lengths[part], kind="stable")].reshape(-1, batch_size)
        result[first : first + len(part)] = generator.permutation(batches).ravel()
    return result


@dataclass(frozen=True)
class StepPlan:
    """Which examples each optimizer step sees, on each rank: the examples stream by in epoch after epoch.

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
        window = min(WINDOW, max(1, self.num_examples // (4 * size)))
        start, generator = -epoch * self.num_examples % size, random_generator(2, self.seed, epoch)
        return order_by_length(order, self.lengths, batch_size=size, start=start, window=window, generator=generator)


def loader_workers(given: int | None, device: torch.device) -> int:
    """How many processes make batches for a rank that trains on `device`: so many as given, or as it has cores for.

    On a CPU training itself needs the cores. Else one of a rank's share of them stays for the rank.
    """
    if given is not None:
        return given
    if device.type == "cpu":
        return 0
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(0, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


@dataclass(frozen=True)
class _Shipped:
    """A batch on its way from a worker: arrays go through its pipe together, tensors each by a file and a handshake."""

    arrays: dict[str, np.ndarray]

    def tensors(self) -> Batch:
        return {name: torch.from_numpy(each) for name, each in self.arrays.items()}

    def pin_memory(self) -> Batch:
        """What the loader's own thread makes of it for CUDA."""
        return {name: each.pin_memory() for name, each in self.tensors().items()}


def _ship(examples: Any, *, collate: Collate) -> _Shipped:
    return _Shipped({name: each.numpy() for name, each in collate(examples).items()})


def step_batches(
    dataset: Dataset[dict[str, Any]],
    plan: StepPlan,
    collate: Collate,
    *,
    start_step: int,
    stop_step: int,
    num_workers: int = 0,
) -> Generator[list[Batch], None, None]:
    """For each optimizer step the list of its micro-batches on this rank."""
    if num_workers:
        # Tokenizing is over; a fork after it would only draw a warning from the tokenizers library.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(
        dataset,
        batch_sampler=plan.micro_batches(start_step, stop_step),
        collate_fn=partial(_ship, collate=collate) if num_workers else collate,
        num_workers=num_workers,
        prefetch_factor=AHEAD if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader draws from the global one, which seeds dropout
        worker_init_fn=begin_worker if num_workers else None,
    )
    with held_back():
        batches = iter(loader)
    for _ in range(start_step, stop_step):
        micro_batches = [next(batches) for _ in range(plan.accumulation)]
        yield [each.tensors() if isinstance(each, _Shipped) else each for each in micro_batches]


def evaluation_batches(
    dataset: Any,
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
    lengths = getattr(dataset, "lengths", None)
    if lengths is not None:
        order = np.argsort(-lengths, kind="stable")
    mine = order[rank::world_size]
    for first in range(0, len(mine), batch_size):
        yield collate(dataset.__getitems__([(0, i) for i in mine[first : first + batch_size]]))
