"""Learning rate, weights and temperatures as pure functions of progress: a resumed run has no scheduler to restore.

    learning_rate_factor(step / max_steps, kind="cosine", warmup_ratio=0.05, min_ratio=0.1)
    scheduled({"from": 1.0, "to": 0.0}, step / max_steps)

Progress is the share of a stage's optimizer steps that is done, in [0, 1].
"""

import math
from collections.abc import Mapping
from typing import Any

from glmd.errors import ConfigError

KINDS = ("linear", "cosine", "constant")
Schedule = float | Mapping[str, float] | tuple[tuple[float, float], ...]


def learning_rate_factor(
    progress: float, *, kind: str = "linear", warmup_ratio: float = 0.0, min_ratio: float = 0.0
) -> float:
    """Multiplier of the learning rate: up from 0 to 1 over `warmup_ratio`, then down to `min_ratio`.

    "constant" stays at 1 after the warm-up.
    """
    if kind not in KINDS:
        raise ConfigError(f"lr_scheduler_type must be one of {', '.join(KINDS)}, got {kind!r}")
    for name, value in (("warmup_ratio", warmup_ratio), ("min_ratio", min_ratio), ("progress", progress)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} must be in [0, 1], got {value}")
    if progress < warmup_ratio:
        return progress / warmup_ratio
    if kind == "constant" or warmup_ratio == 1:
        return 1.0
    done = (progress - warmup_ratio) / (1 - warmup_ratio)
    left = 1 - done if kind == "linear" else (1 + math.cos(math.pi * done)) / 2
    return min_ratio + (1 - min_ratio) * left


def is_scheduled(value: Any) -> bool:
    """Whether a weight or a temperature is another one as a stage goes on."""
    return isinstance(value, Mapping | tuple)


def scheduled(value: Schedule, progress: float) -> float:
    """A term's weight or temperature at `progress`: a number stays; {"from": a, "to": b} is a straight line.

    Points (progress, value) are joined by straight lines, and level before the first and behind the last; of two at
    one place the second holds from there on.
    """
    if isinstance(value, tuple):
        before = [point for point in value if point[0] <= progress]
        after = [point for point in value if point[0] > progress]
        if not before or not after:
            return float((before or after)[-1 if before else 0][1])
        (left, low), (right, high) = before[-1], after[0]
        return low + (high - low) * (progress - left) / (right - left)
    if not isinstance(value, Mapping):
        return float(value)
    if set(value) != {"from", "to"}:
        raise ConfigError(f'a schedule must be a number or {{"from": a, "to": b}}, got {dict(value)}')
    return (1 - progress) * value["from"] + progress * value["to"]
