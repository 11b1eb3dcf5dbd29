"""What losses on a pair of logits are made of: both softmaxes and the logarithm of their ratio, in float32 or better.

    q, p, log_ratio = probabilities(student_logits, teacher_logits, temperature=15.0)
    kl = kl_of(p, q, log_ratio)     # (N,), without the temperature squared

A choice that is -inf in both models (padding) has probability 0 in both, and a ratio of 1.
"""

import math

import torch
from torch import Tensor

from glmd.errors import ConfigError


def check_temperature(temperature: float) -> None:
    """Raises ConfigError unless the temperature is a positive finite number."""
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature must be above 0 and finite, got {temperature}")


def check_alpha_beta(alpha: float, beta: float) -> None:
    """Raises ConfigError unless both are finite and at least 0, and one is above it."""
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name} must be at least 0 and finite, got {value}")
    if alpha == beta == 0:
        raise ConfigError("alpha and beta must not both be 0")


def widened(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype of at least float32. Raises ValueError if shapes differ, even if they broadcast."""
    if student.ndim != 2 or student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"student_logits and teacher_logits must have one shape (N, K), got {shapes}")
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.to(dtype)


def log_probabilities(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both log-softmaxes at a temperature: (N, K) each."""
    check_temperature(temperature)
    student, teacher = widened(student, teacher)
    return (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)


def expectation(probabilities: Tensor, values: Tensor) -> Tensor:
    """Sum of probability times value per row: (N, K), (N, K) -> (N,), where 0 times anything is 0."""
    return (probabilities * values.masked_fill(probabilities == 0, 0.0)).sum(-1)


def probabilities(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The student's softmax q, the teacher's p, and log(p / q), from (N, K) logits: (N, K) each.

    The ratio is not the difference of two log-softmaxes, of which each rounds a number near -10: at temperature 15 it
    is 0.07. What is left of rounding is the same for a whole row, and no gradient depends on that.
    """
    check_temperature(temperature)
    student, teacher = widened(student, teacher)
    is_padding = (student == -math.inf) & (teacher == -math.inf)
    student, teacher = _from_the_largest(student, temperature), _from_the_largest(teacher, temperature)
    normalizers = [each.logsumexp(-1, keepdim=True) for each in (student, teacher)]
    log_ratio = (teacher - student - (normalizers[1] - normalizers[0])).masked_fill(is_padding, 0.0)
    return student.softmax(-1), teacher.softmax(-1), log_ratio


def _from_the_largest(logits: Tensor, temperature: float) -> Tensor:
    logits = logits if temperature == 1 else logits / temperature
    return logits - logits.amax(-1, keepdim=True).detach()


def kl_of(p: Tensor, q: Tensor, log_ratio: Tensor, share: float = 0.0) -> Tensor:
    """KL(p || m) of rows for m = share p + (1 - share) q, from log_ratio = log(p / q): (N, K) each -> (N,).

    share: in [0, 1). With each p log(p / m) stands m - p, of which the sum is 0: where p and q are near each other that
    leaves what is of second order in their difference, and nothing of the rounding of what they were divided by.
    """
    change = (1 - share) * torch.expm1(-log_ratio.clamp(-1, 1))  # m / p - 1
    near = p * (change - change.log1p())
    log_m = -log_ratio.masked_fill(p == 0, 0.0)  # less log(p)
    if share:
        log_m = torch.logaddexp(log_m + math.log1p(-share), log_m.new_full((), math.log(share)))
    far = (1 - share) * (q - p) - p * log_m
    return torch.where(log_ratio.abs() < 1, near, far).sum(-1)
