"""Divergences between a teacher's probabilities p and a student's q, one value per row (a token or an example).

    per_token = generalized_js(student_logits, teacher_logits, beta=0.3, temperature=2.0)     # (N,)

As those of `losses.logits`: student_logits and teacher_logits are (N, K) scores, (N,) is returned, all is computed in
float32 or better, and a choice that is -inf in both models does not exist. Each is 0 for equal models, and so is its
gradient. Weights that are made of p and q are constants: no gradient flows through them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from glmd.errors import ConfigError
from glmd.losses.probabilities import check_alpha_beta, expectation, kl_of, log_probabilities, probabilities


def generalized_js(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) for m = beta p + (1 - beta) q, times temperature squared, as in GKD.

    arXiv:2306.13649. beta: in [0, 1]; it tends to beta times the KL, and to 1 - beta times the reverse KL, and by
    convention is the KL itself at 0 and the reverse KL at 1. At 1/2 it is `js_divergence`.
    """
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta must be in [0, 1], got {beta}")
    q, p, log_ratio = probabilities(student_logits, teacher_logits, temperature)
    if beta in (0, 1):
        return temperature**2 * (kl_of(p, q, log_ratio) if beta == 0 else kl_of(q, p, -log_ratio))
    of_teacher, of_student = kl_of(p, q, log_ratio, beta), kl_of(q, p, -log_ratio, 1 - beta)
    return temperature**2 * (beta * of_teacher + (1 - beta) * of_student)


def skew_kl(student_logits: Tensor, teacher_logits: Tensor, *, mixing: float = 0.1, temperature: float = 1.0) -> Tensor:
    """KL(p || mixing p + (1 - mixing) q) times temperature squared, as in DistiLLM (arXiv:2402.03898).

    mixing: in [0, 1); 0 is `kl_divergence`. It is at most -log(mixing), so that no single token can outweigh the rest.
    """
    q, p, log_ratio = probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * kl_of(p, q, log_ratio, _checked_mixing(mixing))


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, mixing: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """KL(q || mixing q + (1 - mixing) p) times temperature squared, as in DistiLLM (arXiv:2402.03898).

    mixing: in [0, 1); 0 is `reverse_kl`.
    """
    q, p, log_ratio = probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * kl_of(q, p, -log_ratio, _checked_mixing(mixing))


def _checked_mixing(mixing: float) -> float:
    if not 0 <= mixing < 1:
        raise ConfigError(f"mixing must be at least 0 and below 1, got {mixing}")
    return mixing


def adaptive_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p) times temperature squared, as in AKL (arXiv:2404.02657).

    w is the share of the sum of abs(p - q) that lies in the teacher's head: its likeliest tokens up to a probability of
    1/2 together, one at least; tokens that are as likely as the last of them belong to it too.
    """
    q, p, log_ratio = probabilities(student_logits, teacher_logits, temperature)
    share = _share_of_head(p, q.detach())
    return temperature**2 * (share * kl_of(p, q, log_ratio) + (1 - share) * kl_of(q, p, -log_ratio))


def _share_of_head(p: Tensor, q: Tensor) -> Tensor:
    ranked = p.sort(-1, descending=True).values
    size = (ranked.cumsum(-1) <= 0.5).sum(-1, keepdim=True).clamp(min=1)
    is_tail, differences = p < ranked.gather(-1, size - 1), (p - q).abs()
    total = differences.sum(-1)
    of_head = differences.masked_fill(is_tail, 0.0).sum(-1) / total.masked_fill(total == 0, 1.0)
    return of_head.masked_fill(total == 0, 0.5)


def todi(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Sum of w p log(p / q) + (1 - w) q log(q / p) times temperature squared, as in ToDi (arXiv:2505.16297).

    w = sigmoid(log(p / q)) of each token: the forward KL pushes up what the student thinks too unlikely, the reverse
    one pushes down the rest.
    """
    q, p, log_ratio = probabilities(student_logits, teacher_logits, temperature)
    weights = log_ratio.detach().sigmoid()
    return temperature**2 * (expectation(p, weights * log_ratio) - expectation(q, (1 - weights) * log_ratio))


def total_variation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Half the sum of abs(p - q), at temperature 1: the share of tokens that speculative decoding rejects."""
    q, p, _ = probabilities(student_logits, teacher_logits)
    return (p - q).abs().sum(-1) / 2


def negative_log_acceptance(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """-log sum min(p, q), at temperature 1, of the share that speculative decoding accepts (arXiv:2602.23881).

    Where the two hardly overlap its gradient does not vanish, as that of `total_variation` does.
    """
    student, teacher = log_probabilities(student_logits, teacher_logits, 1.0)
    return -torch.minimum(student, teacher).logsumexp(-1)


def lk_hybrid(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """w KL(p || q) + (1 - w) `total_variation`, at temperature 1, for w = exp(-3 sum min(p, q)) (arXiv:2602.23881)."""
    q, p, log_ratio = probabilities(student_logits, teacher_logits)
    weight = torch.exp(-3 * torch.minimum(p, q.detach()).sum(-1))
    return weight * kl_of(p, q, log_ratio) + (1 - weight) * (p - q).abs().sum(-1) / 2


def alpha_beta(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.2, beta: float = 0.7, temperature: float = 1.0
) -> Tensor:
    """The alpha-beta divergence times temperature squared, as in ABKD (arXiv:2505.04560).

    -1 / (alpha beta) sum (p^alpha q^beta - (alpha p^(alpha+beta) + beta q^(alpha+beta)) / (alpha+beta)).
    alpha, beta: at least 0, not both 0; where one is 0 it is the limit. (1, 0) is the KL, (0, 1) the reverse KL. A
    larger alpha looks at where the two differ most, a larger beta at what the student is sure of.
    """
    check_alpha_beta(alpha, beta)
    _, _, log_ratio = probabilities(student_logits, teacher_logits, temperature)
    log_q, log_p = log_probabilities(student_logits, teacher_logits, temperature)
    is_above = log_ratio > 0
    if alpha < beta:  # the larger one is divided by; p and q change places with alpha and beta
        alpha, beta, is_above = beta, alpha, ~is_above
    gap, total = log_ratio.abs().clamp(max=torch.finfo(log_ratio.dtype).max), alpha + beta
    # With a gap of a: (e^(-ca) - 1) / c for c of beta and of alpha + beta, times the larger of p and q to alpha + beta.
    of_total, of_beta = _shrunk(gap, total), _shrunk(gap, beta)
    parts = torch.where(is_above, of_total - of_beta, torch.exp(-alpha * gap) * of_beta - of_total)
    return temperature**2 / alpha * (torch.exp(total * torch.maximum(log_q, log_p)) * parts).sum(-1)


def _shrunk(gap: Tensor, rate: float) -> Tensor:
    return torch.expm1(-rate * gap) / rate if rate else -gap


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "generalized_js": generalized_js,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "todi": todi,
    "total_variation": total_variation,
    "negative_log_acceptance": negative_log_acceptance,
    "lk_hybrid": lk_hybrid,
    "alpha_beta": alpha_beta,
}
