"""Losses on logits that compare something made of the two models' logits, one value per row (a token or an example).

    per_token = taid(student_logits, teacher_logits, progress=0.5, temperature=2.0)     # (N,)

As those of `losses.logits`: student_logits and teacher_logits are (N, K) scores, (N,) is returned, all is computed in
float32 or better, and a choice that is -inf in both models does not exist.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from glmd.errors import ConfigError
from glmd.losses.probabilities import (
    check_alpha_beta,
    check_temperature,
    kl_of,
    log_probabilities,
    probabilities,
    widened,
)


def decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 1.0,
) -> Tensor:
    """alpha TCKD + beta NCKD times temperature squared, decoupled distillation (arXiv:2203.08679).

    TCKD is the KL between two choices, the target and the rest, NCKD that among the rest, renormalized; for alpha = 1
    and beta = the teacher's probability of the rest it is `kl_divergence`. labels: (N,) int64 targets, which a task
    has; of a token, and where a label is negative, the target is the teacher's likeliest choice. alpha, beta: at least
    0, not both 0.
    """
    check_alpha_beta(alpha, beta)
    student, teacher = widened(student_logits, teacher_logits)
    target = teacher.argmax(-1)
    if labels is not None:
        target = torch.where(labels >= 0, labels, target)
    is_target = torch.zeros_like(teacher, dtype=torch.bool).scatter_(1, target[:, None], True)
    # A target without a rest is its own rest, so that both parts are 0.
    is_target &= (teacher.masked_fill(is_target, -math.inf) > -math.inf).any(-1, keepdim=True)
    check_temperature(temperature)

    def pair(logits: Tensor) -> Tensor:
        rest = temperature * (logits.masked_fill(is_target, -math.inf) / temperature).logsumexp(-1)
        return torch.stack([logits.gather(1, target[:, None])[:, 0], rest], dim=-1)

    rests = student.masked_fill(is_target, -math.inf), teacher.masked_fill(is_target, -math.inf)
    return alpha * _kl(pair(student), pair(teacher), temperature) + beta * _kl(rests[0], rests[1], temperature)


def standardized_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`kl_divergence` of logits less their mean, divided by their standard deviation (arXiv:2403.01427).

    So that the student need not match how far the teacher's logits lie apart. Of two choices nothing would be left:
    raises ConfigError for fewer than three.
    """
    _require_three("standardized_kl", student_logits)
    student, teacher = widened(student_logits, teacher_logits)
    return _kl(_standardized(student), _standardized(teacher), temperature)


def _standardized(logits: Tensor) -> Tensor:
    is_missing = logits == -math.inf
    count = (~is_missing).sum(-1, keepdim=True)
    mean = logits.masked_fill(is_missing, 0.0).sum(-1, keepdim=True) / count
    centered = (logits - mean).masked_fill(is_missing, 0.0)
    variance = centered.square().sum(-1, keepdim=True) / count
    return (centered / variance.masked_fill(variance == 0, 1.0).sqrt()).masked_fill(is_missing, -math.inf)


def bild(student_logits: Tensor, teacher_logits: Tensor, *, k: int = 8, temperature: float = 1.0) -> Tensor:
    """KL between the softmaxes of all differences of a row's top logits, times temperature squared (arXiv:2406.13555).

    Once over the teacher's k largest logits and once over the student's, added. k: at least 3, all logits where there
    are fewer. Raises ConfigError for fewer than three: they have one difference, whose softmax is 1.
    """
    if k < 3:
        raise ConfigError(f"k must be at least 3, got {k}")
    _require_three("bild", student_logits)
    student, teacher = widened(student_logits, teacher_logits)
    k = min(k, student.shape[1])
    first, second = torch.triu_indices(k, k, offset=1, device=student.device)
    total = student.new_zeros(len(student))
    for leading in (teacher, student):
        places = leading.detach().topk(k).indices
        chosen = student.gather(1, places), teacher.gather(1, places)
        exists = (chosen[0] > -math.inf) & (chosen[1] > -math.inf)
        is_missing = ~(exists[:, first] & exists[:, second])
        nothing = torch.where(is_missing.all(-1, keepdim=True), 0.0, -math.inf).to(student)
        ours, theirs = (torch.where(is_missing, nothing, each[:, first] - each[:, second]) for each in chosen)
        total = total + _kl(ours, theirs, temperature)
    return total


def taid(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    progress: float,
    start: float = 0.4,
    end: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """`kl_divergence` to softmax((1 - t) student's logits + t teacher's logits) (arXiv:2501.16937).

    t goes from start to end with the progress of the stage, in a straight line; the paper's also depends on how fast
    the loss falls. The student's logits in the mixture are constants. 0 <= start <= end <= 1, and end is not 0.
    """
    share = taid_share(progress, start, end)
    student, teacher = widened(student_logits, teacher_logits)
    parts = ((1 - share, student.detach()), (share, teacher))
    mixture = torch.stack([weight * logits for weight, logits in parts if weight]).sum(0)
    is_padding = (student == -math.inf) & (teacher == -math.inf)
    return _kl(student, mixture.masked_fill(is_padding, -math.inf), temperature)


def taid_share(progress: float, start: float, end: float) -> float:
    """The teacher's share t in the mixture of `taid`."""
    if not 0 <= start <= end <= 1 or end == 0:
        raise ConfigError(f"start and end must be 0 <= start <= end <= 1 and end above 0, got {start} and {end}")
    return start + (end - start) * progress


def modified_targets(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    labels: Tensor,
    threshold: float = 0.2,
    temperature: float = 1.0,
) -> Tensor:
    """KL to the teacher's probabilities mixed with so much of the label that it leads, times temperature squared.

    As in minifinetuning (arXiv:2506.15702): the label's probability comes to lie `threshold` above every other; where
    it does so already nothing is changed, while NVIDIA ModelOpt adds the threshold there too. labels: (N,) int64; a row
    with a negative one has none, and its targets are the teacher's. threshold: at least 0 and below 1.
    """
    if not 0 <= threshold < 1:
        raise ConfigError(f"threshold must be at least 0 and below 1, got {threshold}")
    q, p, log_ratio = probabilities(student_logits, teacher_logits, temperature)
    label = labels.clamp(min=0)[:, None]
    is_label = torch.zeros_like(p, dtype=torch.bool).scatter_(1, label, True)
    lead = p.masked_fill(is_label, 0.0).amax(-1, keepdim=True) - p.gather(1, label)  # of another choice
    share = ((lead + threshold) / (1 + lead).clamp(min=torch.finfo(p.dtype).tiny)).clamp(0, 1)
    share = share * (labels >= 0)[:, None]
    targets = (1 - share) * p + share * is_label
    # The teacher may have given the label a probability of 0.
    of_label = targets.log() - log_probabilities(student_logits, teacher_logits, temperature)[0]
    return temperature**2 * kl_of(targets, q, torch.where(is_label, of_label, log_ratio + torch.log1p(-share)))


def _kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    q, p, log_ratio = probabilities(student, teacher, temperature)
    return temperature**2 * kl_of(p, q, log_ratio)


def _require_three(loss: str, logits: Tensor) -> None:
    if logits.shape[-1] < 3:
        raise ConfigError(f"loss {loss} needs at least 3 choices, got {logits.shape[-1]}")


TARGETS: dict[str, Callable[..., Tensor]] = {
    "decoupled_kd": decoupled_kd,
    "standardized_kl": standardized_kl,
    "bild": bild,
    "taid": taid,
}
