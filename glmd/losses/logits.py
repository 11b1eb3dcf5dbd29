"""Losses on a pair of logits, one value per row (a token or an example).

    per_token = kl_divergence(student_logits, teacher_logits, temperature=15.0)     # (N,)

All compute in float32 or better: at temperature 15 the log-probabilities of a 30,000-token vocabulary lie near
-10 and differ by 0.07 between the models, while bfloat16 steps by 0.06 there. A choice that is -inf in both
models (padding) does not exist: it adds nothing to value or gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from glmd.errors import ConfigError
from glmd.losses.divergences import DIVERGENCES
from glmd.losses.probabilities import expectation, log_probabilities, widened
from glmd.losses.targets import TARGETS, modified_targets


@dataclass(frozen=True)
class LogitScaling:
    """What some models do to the product of hidden states and final map: softcap * tanh(factor * x / softcap)."""

    factor: float = 1.0  # Cohere multiplies, Granite divides
    softcap: float | None = None  # Gemma 2; None: no cap

    def __call__(self, logits: Tensor) -> Tensor:
        """The scaled logits, any shape."""
        scaled = logits if self.factor == 1 else logits * self.factor
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


NOT_SCALED = LogitScaling()


def merge_words(logits: Tensor, merged_into: Tensor) -> Tensor:
    """(N, K + D) logits of kept and dropped tokens -> (N, K): each dropped one's probability joins a kept one's.

    merged_into: (D,) which kept token (0 to K - 1). The log-sum-exp of each group, so that no probability is lost;
    slicing to the first K would renormalize instead.
    """
    kept, dropped = logits.split([logits.shape[1] - len(merged_into), len(merged_into)], dim=1)
    places = merged_into.expand(len(logits), -1)
    largest = kept.scatter_reduce(1, places, dropped, "amax")
    sums = (kept - largest).exp_().scatter_add_(1, places, (dropped - largest.gather(1, places)).exp_())
    return sums.log_().add_(largest)


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Forward KL(teacher || student) times temperature squared, eq. (3) of arXiv:2306.06625.

    student_logits, teacher_logits: (N, K) scores. Returns (N,).
    At high temperature it tends to half the variance of the logits' difference (arXiv:1503.02531), so it is
    of order one; use `mse` when the absolute level of the logits matters too.
    """
    student, teacher = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * expectation(teacher.exp(), teacher - student)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Reverse KL(student || teacher) times temperature squared, as in MiniLLM (arXiv:2306.08543).

    student_logits, teacher_logits: (N, K) scores. Returns (N,).
    It lets the student leave out what it cannot model; `kl_divergence` makes it cover all the teacher says.
    """
    student, teacher = log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * expectation(student.exp(), student - teacher)


def js_divergence(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Jensen-Shannon divergence times temperature squared, as in GKD with beta 1/2 (arXiv:2306.13649).

    student_logits, teacher_logits: (N, K) scores. Returns (N,).
    The mean of both models' KL to their mixture, at most log 2: between `kl_divergence`, which makes the student cover
    all the teacher says, and `reverse_kl`, which lets it leave out the rest.
    """
    student, teacher = log_probabilities(student_logits, teacher_logits, temperature)
    padding = (student == -math.inf) & (teacher == -math.inf)
    logs = [each.masked_fill(padding, 0.0) for each in (student, teacher)]
    mixture = torch.logaddexp(*logs) - math.log(2)
    of_each = [expectation(each.exp(), log - mixture) for each, log in zip((student, teacher), logs, strict=True)]
    return temperature**2 * (of_each[0] + of_each[1]) / 2


def cross_entropy(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy against the teacher's probabilities times temperature squared (arXiv:1503.02531).

    student_logits, teacher_logits: (N, K) scores. Returns (N,).
    Same gradient as `kl_divergence`, which is the better one to log: it is zero when the two agree.
    """
    student, teacher = log_probabilities(student_logits, teacher_logits, temperature)
    return -(temperature**2) * expectation(teacher.exp(), student)


def mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over the choices of the squared difference, GLMD's ablation of the KL (arXiv:2306.06625).

    student_logits, teacher_logits: (N, K) scores. Returns (N,).
    Unlike the KL it also asks for the teacher's absolute level, which no probability depends on.
    """
    student, teacher = widened(student_logits, teacher_logits)
    padding = (student == -math.inf) & (teacher == -math.inf)
    return (student - teacher).masked_fill(padding, 0.0).square().sum(-1) / (~padding).sum(-1)


def centered_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """`mse` of logits less their mean, so that the level does not count, which no probability depends on.

    student_logits, teacher_logits: (N, K) scores. Returns (N,).
    Half of it is the limit of `kl_divergence` at high temperature (arXiv:1503.02531, section 2.1).
    """
    student, teacher = widened(student_logits, teacher_logits)
    padding = (student == -math.inf) & (teacher == -math.inf)
    count = (~padding).sum(-1, keepdim=True)
    difference = (student - teacher).masked_fill(padding, 0.0)
    centered = (difference - difference.sum(-1, keepdim=True) / count).masked_fill(padding, 0.0)
    return centered.square().sum(-1) / count[:, 0]


def annealed_mse(
    student_logits: Tensor, teacher_logits: Tensor, *, progress: float, max_temperature: float = 7.0
) -> Tensor:
    """`mse` to the teacher's logits times a factor that rises to 1, as in Annealing-KD (arXiv:2104.07163).

    student_logits, teacher_logits: (N, K) scores. progress: of the stage; the temperature falls from max_temperature to
        1 in whole steps, and the factor is 1 - (temperature - 1) / max_temperature. Returns (N,).
    """
    return mse(student_logits, teacher_logits * _annealing(progress, max_temperature))


def margin_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    progress: float,
    max_temperature: float = 10.0,
    margin: float = 1.0,
) -> Tensor:
    """`annealed_mse` where it is above the margin times the factor, else 0, as in Continuation-KD (arXiv:2212.05998).

    student_logits, teacher_logits: (N, K) scores. Returns (N,).
    """
    if not 0 <= margin < math.inf:
        raise ConfigError(f"margin must be at least 0 and finite, got {margin}")
    values = annealed_mse(student_logits, teacher_logits, progress=progress, max_temperature=max_temperature)
    return values * (values > margin * _annealing(progress, max_temperature))


def _annealing(progress: float, max_temperature: float) -> float:
    if not 1 <= max_temperature < math.inf:
        raise ConfigError(f"max_temperature must be at least 1 and finite, got {max_temperature}")
    return 1 - (max(1, math.ceil((1 - progress) * max_temperature)) - 1) / max_temperature


# What a term's `loss` may name. An option is a keyword-only parameter of the function.
LOGIT_LOSSES: dict[str, Callable[..., Tensor]] = {
    "kl_divergence": kl_divergence,
    "reverse_kl": reverse_kl,
    "js_divergence": js_divergence,
    "cross_entropy": cross_entropy,
    "mse": mse,
    "centered_mse": centered_mse,
    **DIVERGENCES,
    **TARGETS,
}
# And one of a task's logits.
TASK_LOGIT_LOSSES = LOGIT_LOSSES | {
    "modified_targets": modified_targets,
    "annealed_mse": annealed_mse,
    "margin_mse": margin_mse,
}
