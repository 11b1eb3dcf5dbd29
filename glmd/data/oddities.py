"""What is odd in rows and read all the same: counted, and said in one warning for a whole file.

oddities = Oddities()
oddities.note("a span stands at another token than its index says", "WSC/val.jsonl:43")
oddities.warn("superglue/")
"""

import logging
from collections import Counter

logger = logging.getLogger(__name__)


class Oddities:
    """How often each kind was met, and where first."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def note(self, kind: str, where: str) -> None:
        """Count one more of a kind; `kind` is a sentence of its own, without a full stop."""
        self.counts[kind] += 1
        self._first.setdefault(kind, where)

    def warn(self, source: str) -> None:
        """Say all of them in one warning, if there are any."""
        if self.counts:
            listed = "; ".join(f"{kind} ({count}, first {self._first[kind]})" for kind, count in self.counts.items())
            logger.warning("%s: some rows are odd and are read all the same: %s", source, listed)
