"""What a loss on layers is given, and what these losses share.

loss = FeatureLoss(relation_kl, "row", same_width=False)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureLoss:
    """A loss on layers, and what it is given.

    function: of the student's and the teacher's tensors, by its unit. "token": (N, ...) each -> (N,). "row":
        (R, S, ...) each and (R, S) which tokens are valid -> (R, S), 0 at pads. "text": the same -> (R,).
    takes_all_layers: it is given those of all layers at once, with the layers as a first axis. is_paired: of as many of
        both models, each beside its partner.
    same_width: both must have one width. least_layers: how many of each model it needs. needs_both: a projection of
        both models, without which it has no sense. least_texts: how many texts of a batch it needs; where these are
        more than one, the value of each depends on the others.
    """

    function: Callable[..., Tensor]
    unit: Literal["token", "row", "text"] = "token"
    takes_all_layers: bool = False
    is_paired: bool = False
    same_width: bool = True
    least_layers: int = 1
    needs_both: bool = False
    least_texts: int = 1

    def __call__(self, *tensors: Tensor, **options: Any) -> Tensor:
        return self.function(*tensors, **options)


def same_dtype(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.to(dtype)


def widened(student: Tensor, teacher: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    if student.ndim != ndim or student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"student and teacher must have one shape of {ndim} axes, got {shapes}")
    return same_dtype(student, teacher)


def directions(differences: Tensor) -> Tensor:
    """Vectors (..., H) brought to length 1; one of length 0 stays, and gives no gradient."""
    length = torch.linalg.vector_norm(differences, dim=-1, keepdim=True)
    is_none = length == 0
    return (differences / length.masked_fill(is_none, 1.0)).masked_fill(is_none, 0.0)
