"""What one rank does for all, and how ranks wait for one another.

    found = on_main(lambda: read(path))     # the main rank works; its answer, or its refusal, is that of all
    mine = together(lambda: load(path))     # each rank works; the refusal of any is that of all
    wait()                                  # until all are here

The main rank tokenizes or writes alone for hours, so that these wait long, in a gloo group of their own, and hear a
signal at once. The collectives of training give up within minutes: there, a rank that is late is one that hangs.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from glmd.errors import GlmdError, RankError, RunError
from glmd.runtime.interrupts import EndedAtOnce

PATIENCE = timedelta(days=2)  # with the main rank, which tokenizes a corpus alone
TRAINING_PATIENCE = timedelta(minutes=15)  # with one another in training and scoring
LOST = "another process of this run has ended; what it said last is why"

T = TypeVar("T")
_kept: list[bool] = []  # whether the ranks' group outlives a run
_group_of: list[tuple[Any, Any]] = []  # torch's default group, and ours beside it


def number_of_ranks() -> int:
    """How many processes there are; 1 where none were launched."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def ranks_kept() -> Iterator[None]:
    """Several runs of the same ranks in turn: they part after the last one, and not after each."""
    _kept.append(True)
    try:
        yield
    finally:
        _kept.pop()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def are_ranks_kept() -> bool:
    """Whether the group of ranks is for runs to come, too."""
    return bool(_kept)


def is_main() -> bool:
    return number_of_ranks() == 1 or dist.get_rank() == 0


def wait() -> None:
    """Until all ranks are here. Raises RankError when one has ended instead."""
    if number_of_ranks() == 1:
        return
    pause = 1e-3
    with lost_ranks():
        arrival = dist.barrier(group=_group(), async_op=True)
        while not arrival.is_completed():  # not wait(), in which no signal is heard
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        arrival.wait()


def on_main(function: Callable[[], T]) -> T:
    """What the main rank finds, known to all ranks; its refusal, and its end by a signal, are those of all."""
    if number_of_ranks() == 1:
        return function()
    told: list[Any] = [None, None]
    mine: BaseException | None = None
    if is_main():
        try:
            told[0] = function()
        except BaseException as error:
            told[1], mine = _for_others(error), error
    if mine is not None:
        with contextlib.suppress(GlmdError):  # they may have ended too
            _tell(told)
        raise mine
    _tell(told)
    if told[1] is not None:
        raise told[1]
    found: T = told[0]
    return found


def together(function: Callable[[], T]) -> T:
    """What each rank finds by itself; the refusal of any is that of all."""
    if number_of_ranks() == 1:
        return function()
    problem, found = None, None
    try:
        found = function()
    except GlmdError as error:
        problem = error
    for each in gathered(problem):
        if each is not None:
            raise each
    return found  # type: ignore[return-value]


def gathered(mine: T) -> list[T]:
    """What each rank has, in their order, on all of them."""
    if number_of_ranks() == 1:
        return [mine]
    wait()
    found: list[Any] = [None] * number_of_ranks()
    with lost_ranks():
        dist.all_gather_object(found, mine, group=_group())
    return found


def _tell(told: list[Any]) -> None:
    wait()
    with lost_ranks():
        dist.broadcast_object_list(told, src=0, group=_group())


def _for_others(error: BaseException) -> BaseException:
    """What ends the other ranks where the main one ended so."""
    if isinstance(error, GlmdError):
        return error
    if isinstance(error, SystemExit):
        return EndedAtOnce(error.code)
    return RankError(f"the main process ended with {type(error).__name__}: {error}")


@contextlib.contextmanager
def lost_ranks() -> Iterator[None]:
    """Say in one line that another rank has ended, where gloo or NCCL notice. Raises RankError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search(r"gloo|NCCL|Connection (closed|reset)", str(error)):
            raise
        raise RankError(LOST) from error


def _group() -> Any:
    """The gloo group of this run, made when all ranks first ask for it."""
    world = dist.group.WORLD
    if not _group_of or _group_of[0][0] is not world:
        try:
            _group_of[:] = [(world, dist.new_group(backend="gloo", timeout=PATIENCE))]
        except RuntimeError as error:
            raise RunError(
                f"the processes cannot reach one another by gloo ({error}); set GLOO_SOCKET_IFNAME to the interface of "
                "the network between the machines"
            ) from error
    return _group_of[0][1]
