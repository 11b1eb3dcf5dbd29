"""What a command says and how it ends: on terminals of any encoding, on full disks, and where it breaks.

    return ended(lambda: say("done"))

A refusal is one line on stderr and the error's exit code. What was not foreseen is one line too, and its traceback lies
in a file that the line names; with GLMD_TRACEBACK=1 it is printed. The exit code is then 1 for a fault of glmd's own
code, 2 where a library refused what it was given.
"""

import codecs
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from glmd.errors import DiskError, GlmdError, RankError
from glmd.runtime.interrupts import EndedAtOnce, code_of_signal, ends_at_once

# What texts of glmd hold beyond ASCII, for terminals that cannot show it.
ASCII = {"–": "-", "—": "-", "±": "+/-", "→": "->", "…": "...", "×": "x", "≤": "<=", "≥": ">="}
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def prepare_streams() -> None:
    """Never fail on what a terminal's encoding does not have."""
    codecs.register_error("glmd.ascii", _replaced)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="glmd.ascii")


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(ASCII.get(c, "?") for c in error.object[error.start : error.end]), error.end


def say(text: str, *, end: str = "\n") -> None:
    """Print to stdout, now. Raises DiskError where it cannot be written; BrokenPipeError is `ended`'s."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _silence_stdout()
        raise DiskError(f"the output cannot be written ({error.strerror}); what was done before stays so") from None


def ended(command: Callable[[], Any]) -> int:
    """Run a command and return its exit code; a refusal or a signal is one line."""
    with ends_at_once():
        return _obeyed(command)


def _obeyed(command: Callable[[], Any]) -> int:
    try:
        try:
            command()
        finally:
            say("", end="")  # what argparse or a library has left in the buffer
    except GlmdError as error:
        if isinstance(error, RankError) and code_of_signal() is not None:
            return code_of_signal() or 0  # the other rank has ended by the same signal
        _complain(f"{type(error).__name__}: {error}")
        return error.exit_code
    except EndedAtOnce as end:  # in training a signal is an Interrupted, after the step was saved
        if os.environ.get("RANK", "0") == "0":
            _complain("interrupted" if end.code == 130 else "terminated")
        return int(end.code or 0)
    except BrokenPipeError:  # `glmd report | head`
        _silence_stdout()
    except Exception as error:
        # What fails after a signal is what it broke: another rank has gone, or a process that was asked.
        return code_of_signal() or _unforeseen(error)
    return code_of_signal() or 0  # a library may have swallowed it


def _unforeseen(error: Exception) -> int:
    """One line for an error that is not one of glmd's, and its exit code."""
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, MemoryError) or any(each in reason for each in OUT_OF_MEMORY):
        cure = "of a run give a smaller per_device_train_batch_size or max_length, by `glmd plan`"
        _complain(f"{type(error).__name__}: the memory does not suffice ({reason[:120]}); {cure}")
        return 2
    if isinstance(error, OSError) and error.filename is not None:
        _complain(f"{type(error).__name__}: {error.filename}: {error.strerror}")
        return 2
    text = "".join(traceback.format_exception(error))
    if os.environ.get("GLMD_TRACEBACK") == "1":
        place = "above"
        with suppress(OSError):
            print(text, end="", file=sys.stderr)
    else:
        place = _kept(text)
    _complain(f"{type(error).__name__}: {reason or 'no message'}; this was not foreseen, its traceback is {place}")
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    return 1 if Path(innermost).is_relative_to(Path(__file__).parents[1]) else 2


def _kept(text: str) -> str:
    """Where a traceback was written."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="glmd-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write(text)
        return f"in {file.name}"
    except OSError:
        return "printed with GLMD_TRACEBACK=1"


def _complain(text: str) -> None:
    with suppress(OSError):
        print(f"glmd: {text}", file=sys.stderr, flush=True)


def _silence_stdout() -> None:
    """What is left in the buffer would fail again when Python ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
