"""Losses of a task whose answer is a number, one value per example.

    per_example = NUMBER_LOSSES["kl_divergence"](student_outputs, teacher_outputs)     # (N,)

A model's output is taken as the mean of a normal distribution of variance 1, as least squares do. Between two of these
the KL divergence, in either direction, is half of the squared difference, and so is the cross-entropy to a label but
for a constant. A temperature, by which outputs are divided and by whose square the loss is multiplied, changes nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def half_squared_error(student_outputs: Tensor, targets: Tensor, **_: Any) -> Tensor:
    """(outputs - targets)^2 / 2, in float32 or better.

    student_outputs: (N, 1). targets: (N, 1) of a teacher, or (N,) labels, of which nan gives 0 and no gradient; a
    teacher's nan stays one. Options of a loss on classes change nothing here. Returns (N,).
    """
    wide = student_outputs.to(torch.promote_types(student_outputs.dtype, torch.float32))[:, 0]
    if targets.ndim == 2:
        return 0.5 * (wide - targets[:, 0].to(wide)).square()
    missing = targets.isnan()
    difference = (wide - targets.to(wide)).masked_fill(missing, 0.0)
    return 0.5 * difference.square()


# What stands in the place of losses on classes. Others on task logits are differences already (mse and its kin), or
# mean nothing of a number.
NUMBER_LOSSES: dict[str, Callable[..., Tensor]] = dict.fromkeys(
    ("kl_divergence", "reverse_kl", "cross_entropy", "hard_cross_entropy"), half_squared_error
)
DIFFERENCES = ("mse", "annealed_mse", "margin_mse")
