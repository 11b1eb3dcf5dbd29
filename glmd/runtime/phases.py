"""Where the time of a start of a run goes: training, and all that stands around it.

    with phase("exports"):          # or @phase("exports") on a function
        ...
    seconds()                       # {"training": 8.1, "imports": 4.2, ...}

A phase within another counts for itself alone, so that the phases add up to the whole. The clock is this process's.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

_taken: dict[str, float] = {}  # seconds by phase, of this start
_open: list[str] = []  # the phases that we are in, the innermost last
_changed: list[float] = [0.0]  # when the innermost became another


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the time in here for `name`, but for what phases within count for themselves."""
    _credit()
    _open.append(name)
    try:
        yield
    finally:
        _credit()
        _open.pop()


def seconds() -> dict[str, float]:
    """The seconds of each phase so far, to a tenth, the longest first; those that took less are left out."""
    _credit()
    rounded = {name: round(taken, 1) for name, taken in sorted(_taken.items(), key=lambda item: -item[1])}
    return {name: taken for name, taken in rounded.items() if taken}


def forget() -> None:
    """Begin to count anew, as for the next run of this process."""
    _taken.clear()


def _credit() -> None:
    """Give the time since the last change to the phase that is innermost."""
    now = time.monotonic()
    if _open:
        _taken[_open[-1]] = _taken.get(_open[-1], 0.0) + now - _changed[0]
    _changed[0] = now


@contextmanager
def imports() -> Iterator[None]:
    """The phase "imports" of a process that has begun with it.

    Garbage is not looked for meanwhile, nor among what was imported later: nothing of it is any.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with phase("imports"):
            yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


@contextmanager
def known_objects_set_aside() -> Iterator[None]:
    """Look for garbage among new objects alone, for as long as a run takes.

    What was imported is a million objects, over which each of a dozen collections would go for a fifth of a second.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
