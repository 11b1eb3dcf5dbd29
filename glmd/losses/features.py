"""Losses on what lies inside of two models: hidden states and attention probabilities, one value per token.

    per_token = hidden_mse(student_hidden, teacher_hidden)     # (N,)

All compute in float32 or better. Nothing here maps layers, projects or masks.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the hidden size of the squared difference, eq. (8) of TinyBERT (arXiv:1909.10351).

    student, teacher: (N, H) hidden states. Returns (N,). Raises ValueError unless both have one shape.
    """
    student, teacher = _widened(student, teacher, 2)
    return (student - teacher).square().mean(-1)


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 minus the cosine of the angle between both, in [0, 2], as in DistilBERT (arXiv:1910.01108).

    student, teacher: (N, H) hidden states. Returns (N,). Raises ValueError unless both have one shape.
    """
    return 1 - cosine_similarity(*_widened(student, teacher, 2), dim=-1)


def attention_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over heads and keys of the squared difference of probabilities; TinyBERT (arXiv:1909.10351, eq. 7) has it of
    scores before the softmax.

    student, teacher: (N, A, S) attention of each of N tokens by A heads to S keys. Returns (N,). A key to which both
    give exactly 0 does not exist: it is padding, or comes later. Raises ValueError unless both have one shape.
    """
    student, teacher = _widened(student, teacher, 3)
    exists = (student != 0) | (teacher != 0)
    return ((student - teacher).square().sum(-1) / exists.sum(-1).clamp(min=1)).mean(-1)


def attention_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over heads of KL(teacher || student) over keys, eq. (1) of MiniLM (arXiv:2002.10957).

    student, teacher: (N, A, S) attention probabilities. Returns (N,). Raises ValueError unless both have one shape.
    """
    student, teacher = _widened(student, teacher, 3)
    least = torch.finfo(student.dtype).tiny
    log_ratio = teacher.clamp(min=least).log() - student.clamp(min=least).log()
    return (teacher * log_ratio).sum(-1).mean(-1)


def _widened(student: Tensor, teacher: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    if student.ndim != ndim or student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"student and teacher must have one shape of {ndim} axes, got {shapes}")
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.to(dtype)


# What a term's `loss` may name. An option is a keyword-only parameter of the function.
HIDDEN_LOSSES: dict[str, Callable[..., Tensor]] = {"mse": hidden_mse, "cosine": hidden_cosine}
ATTENTION_LOSSES: dict[str, Callable[..., Tensor]] = {"mse": attention_mse, "kl_divergence": attention_kl}
