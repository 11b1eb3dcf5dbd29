"""Backbones by torch.compile, for as long as a stage trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from glmd.distillation.distiller import Distiller
from glmd.distillation.teacher import Ensemble, OnlineTeacher


@contextmanager
def compiled(models: list[Any], is_dynamic: bool) -> Iterator[None]:
    """Run backbones of distillers and live teachers by torch.compile. is_dynamic: for batches of any form at once."""
    import torch._inductor.config as inductor

    if hasattr(inductor, "deterministic"):  # no choice of kernels by their speed where it would show in sums
        inductor.deterministic = torch.are_deterministic_algorithms_enabled()
    models = [one for each in models for one in (each.teachers if isinstance(each, Ensemble) else (each,))]
    splits = [each.splits[0] for each in models if isinstance(each, Distiller | OnlineTeacher)]
    for split in splits:
        split.compile(dynamic=is_dynamic)
    try:
        yield
    finally:
        for split in splits:
            split.compiled = None
