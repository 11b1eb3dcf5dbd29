"""What the steps of a logging interval came to: the terms' means and the speed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Meter:
    """Means of the terms over a logging interval, and its speed. Tensors stay on the device until they are read."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.last = names, dict.fromkeys(names, float("nan"))
        self.tokens_per_second = 0.0
        self._reset()

    def _reset(self) -> None:
        self._means: list[Tensor] = []
        self.tokens, self._since = 0, time.monotonic()

    def add(self, means: Tensor, tokens: int) -> None:
        self._means.append(means)
        self.tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count no time: what is done is no training."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def read(self, tokens: float) -> dict[str, float]:
        """The means. tokens: of all ranks."""
        if not self._means:  # every step of the interval was left out
            self._reset()
            return dict.fromkeys(self.names, float("nan"))
        mean = torch.stack(self._means).mean(dim=0).tolist()
        self.tokens_per_second = tokens / max(1e-9, time.monotonic() - self._since)
        self.last = dict(zip(self.names, mean, strict=True))
        self._reset()
        return self.last
