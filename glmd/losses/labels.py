"""Losses of a student's logits against hard labels, one value per row.

    per_example = hard_cross_entropy(student_logits, labels)     # (N,)

Distillation needs no labels; these are for methods that mix both.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

IGNORED_LABEL = -100  # of a position or example that a loss or a score leaves out


def hard_cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-probability of the label, in float32 or better.

    student_logits: (N, C) scores. labels: (N,) int64; -100 gives 0 and no gradient. Returns (N,).
    """
    if student_logits.ndim != 2 or labels.shape != student_logits.shape[:1]:
        shapes = f"{tuple(student_logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"student_logits and labels must be (N, C) and (N,), got {shapes}")
    wide = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    return functional.cross_entropy(wide, labels, reduction="none", ignore_index=IGNORED_LABEL)


# What a term's `loss` may name. An option is a keyword-only parameter of the function.
LABEL_LOSSES: dict[str, Callable[..., Tensor]] = {"hard_cross_entropy": hard_cross_entropy}
