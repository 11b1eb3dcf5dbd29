"""The errors a user is meant to read: one line that names the place, what was given and what would work."""

import difflib
import errno
import re
from collections.abc import Iterable


class GlmdError(Exception):
    """Base of every refusal. `exit_code` is what the command line exits with."""

    exit_code = 2


class ConfigError(GlmdError):
    """A setting that is unknown, out of range, contradictory or without effect."""


class DataError(GlmdError):
    """An input file that is missing, empty or malformed; names file and line."""


class ModelError(GlmdError):
    """A teacher, student or tokenizer that cannot serve, named with the reason."""


class RunError(GlmdError):
    """A run folder that cannot be used or continued as asked."""


class DiskError(RunError):
    """A disk that is full or refuses to be written. What was whole stays so; the same command goes on from there."""

    exit_code = 4


class RankError(GlmdError):
    """Another process of the run has ended. What that one said is why; from a checkpoint the same command goes on."""

    exit_code = 1


class NumericsError(GlmdError):
    """A loss, gradient, score or answer that is not finite. The last good checkpoint is kept."""

    exit_code = 3


_OF_A_DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO)


def disk_error(error: Exception) -> int | None:
    """The number of the error where a disk took no more; safetensors and tokenizers only write it into their text."""
    inner = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(inner[1]) if inner else None
    return number if number in _OF_A_DISK else None


def counted(number: int, noun: str) -> str:
    """`1 block`, `2 blocks`, `1,000 examples`."""
    return f"{number:,} {noun if number == 1 else noun + 's'}"


# Names of 0.1.0, of keys, stages, signals and losses, and what they are called now.
RENAMED = {
    "initialisation": "initialization",
    "task_words": "task_lm",
    "task_labels": "task_soft_labels",
    "word_logits": "lm_logits",
    "word_labels": "lm_labels",
    "centred_mse": "centered_mse",
    "words": "verbalizers",
    "world": "synthetic",
}
# Keys of 0.1.0 that are gone, each with one that it stood beside, and what is said of it.
GONE = {
    "cache_bits": ("cached_stages", "a cache keeps 16 bits of each number"),
    "gkd_compat": ("method", "it is an option of a term, gkd_compat: true beside signal: lm_logits in a method's YAML"),
}


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean x?` where a known name is close, else the list of known names. Names of 0.1.0 lead to today's."""
    known = sorted(known)
    if RENAMED.get(name) in known:
        return f"; it is called {RENAMED[name]} since 0.2"
    beside, instead = GONE.get(name, ("", ""))
    if beside in known:
        return f"; it is gone since 0.2: {instead}"
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]}?" if close else f"; known: {', '.join(known)}"
