"""SIGTERM and SIGINT, to one process or to all of a group: a step is finished and saved, anything else ends at once.

    with ends_at_once():                  # a command: Interrupted is raised wherever it is
        with finishes_step() as received:       # the loop of a stage looks at `received` after each step
            ...

`timeout`, Slurm, Kubernetes and a terminal tell every process of the group, and a launcher tells its ranks once more:
what comes within a moment of the first signal is that signal. A later one ends the process without more ado.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
TOGETHER = 2.0  # seconds in which signals are one
GRACE = 20.0  # seconds to unwind in, where nothing is saved: a C call may wait for ever, and a library swallow the end

_told: list[tuple[float, int]] = []  # when and which, of this process; empty again after the outermost `with`
_handling: list[int] = []  # one entry for each `with` that is open


class Interrupted(SystemExit):
    """SIGTERM or SIGINT arrived: the step was finished and saved. Exit code 143 or 130."""


class EndedAtOnce(Interrupted):
    """SIGTERM or SIGINT arrived where there was no step to finish. Exit code 143 or 130."""


def code_of_signal() -> int | None:
    """The exit code of a process that was told to end; None while it was not."""
    return 128 + _told[0][1] if _told else None


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Raise EndedAtOnce on a signal, so that what is half done is cleared away."""

    last: list[threading.Timer] = []

    def end(number: int) -> None:
        last.append(threading.Timer(GRACE, os._exit, (128 + number,)))
        last[0].daemon = True
        last[0].start()
        raise EndedAtOnce(128 + number)

    try:
        with _handler(end):
            yield
    finally:
        for timer in last:
            timer.cancel()


@contextmanager
def finishes_step() -> Iterator[list[int]]:
    """Collect signals instead of dying; a second one ends the process."""
    received: list[int] = []

    def note(number: int) -> None:
        received.append(number)
        logger.warning("signal %d: the step is being finished and saved; a second signal ends at once", number)

    with _handler(note):
        yield received


@contextmanager
def _handler(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` on the first signal. Outside the main thread signals are not ours to take."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def receive(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # a process that was forked from this one, and has not yet handlers of its own
            return
        now = time.monotonic()
        if not _told:
            _told.append((now, number))
            act(number)
        elif now - _told[0][0] > TOGETHER:
            os._exit(128 + number)

    _handling.append(owner)
    previous = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _handling.pop()
        if not _handling:
            _told.clear()


@contextmanager
def held_back() -> Iterator[None]:
    """Let signals wait while processes are forked, which have them held back from then on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker(_: int) -> None:
    """How a loader's worker begins: deaf to both signals, as its batches are wanted for the last step, and mortal.

    What ends it is its parent: by saying so, or by dying, of which Linux tells it at once and torch within seconds.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
