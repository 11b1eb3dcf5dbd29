"""Every loss on logits by its name: options to try it with, its properties, and its formula written out."""

import inspect
import itertools
from typing import Any

import torch
from torch import Tensor

from glmd.losses.logits import LOGIT_LOSSES, TASK_LOGIT_LOSSES

# What a loss is tried with beside the temperature. One of its defaults is not among them.
OPTIONS: dict[str, dict[str, Any]] = {
    "generalized_js": {"beta": 0.3},
    "skew_kl": {"mixing": 0.2},
    "skew_reverse_kl": {"mixing": 0.2},
    "alpha_beta": {"alpha": 0.3, "beta": 0.6},
    "decoupled_kd": {"alpha": 0.5, "beta": 2.0},
    "bild": {"k": 4},
    "taid": {"progress": 0.5, "start": 0.2, "end": 0.8},
}
LEAST_CHOICES = {"bild": 3, "standardized_kl": 3, "decoupled_kd": 2}  # decoupled_kd: of its formula
# Parts of these are constants for the gradient.
WITH_CONSTANTS = {"adaptive_kl", "todi", "lk_hybrid", "taid"}
# Their gradients jump where p = q.
WITH_JUMPS = {"total_variation", "negative_log_acceptance", "lk_hybrid"}


def takes(loss: str, option: str) -> bool:
    return option in inspect.signature(TASK_LOGIT_LOSSES[loss]).parameters


TEMPERED = [loss for loss in LOGIT_LOSSES if takes(loss, "temperature")]
OF_PROBABILITIES = [loss for loss in LOGIT_LOSSES if loss != "mse"]
ZERO_FOR_EQUALS = [loss for loss in LOGIT_LOSSES if loss != "cross_entropy"]


def temperature_of(loss: str, temperature: float) -> float:
    """The temperature, or 1 where the loss takes none."""
    return temperature if loss in TEMPERED else 1.0


def options_of(loss: str, temperature: float = 1.0) -> dict[str, Any]:
    """The keyword arguments of the plain function."""
    return OPTIONS.get(loss, {}) | ({"temperature": temperature} if takes(loss, "temperature") else {})


def formula(loss: str, student: Tensor, teacher: Tensor, temperature: float = 1.0, **options: Any) -> Tensor:
    """(N,) from (N, K) float64 logits of moderate size, without care for rounding."""
    if loss in ("mse", "centered_mse"):
        shift = [each.mean(-1, keepdim=True) if loss == "centered_mse" else 0 for each in (student, teacher)]
        return ((student - shift[0] - teacher + shift[1]) ** 2).mean(-1)
    if loss == "standardized_kl":
        student, teacher = (
            (each - each.mean(-1, keepdim=True)) / each.std(-1, correction=0, keepdim=True)
            for each in (student, teacher)
        )
    if loss == "taid":
        share = options["start"] + (options["end"] - options["start"]) * options["progress"]
        teacher = (1 - share) * student.detach() + share * teacher
    q, p = (each.div(temperature).exp() for each in (student, teacher))
    q, p = q / q.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True)
    return (temperature**2 if temperature != 1 else 1) * torch.stack(
        [_of_row(loss, *row, temperature, options) for row in zip(p, q, student, teacher, strict=True)]
        or [student.sum()]
    )[: len(student)]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def _of_row(loss: str, p: Tensor, q: Tensor, student: Tensor, teacher: Tensor, temperature: float, more: Any) -> Tensor:
    if loss in ("kl_divergence", "standardized_kl", "taid"):
        return kl(p, q)
    if loss == "reverse_kl":
        return kl(q, p)
    if loss == "cross_entropy":
        return -(p * q.log()).sum()
    if loss in ("js_divergence", "generalized_js"):
        beta = more.get("beta", 0.5)
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if loss == "skew_kl":
        return kl(p, more["mixing"] * p + (1 - more["mixing"]) * q)
    if loss == "skew_reverse_kl":
        return kl(q, more["mixing"] * q + (1 - more["mixing"]) * p)
    if loss == "adaptive_kl":
        order = p.argsort(descending=True).tolist()
        mass = itertools.accumulate(p[order].tolist())
        head = [word for i, (word, so_far) in enumerate(zip(order, mass, strict=True)) if i == 0 or so_far <= 0.5]
        gaps = (p - q).detach().abs()
        share = gaps[head].sum() / gaps.sum() if gaps.sum() > 0 else 0.5
        return share * kl(p, q) + (1 - share) * kl(q, p)
    if loss == "todi":
        weight = (p / (p + q)).detach()
        return (weight * p * (p / q).log() + (1 - weight) * q * (q / p).log()).sum()
    overlap = torch.minimum(p, q).sum()
    if loss == "total_variation":
        return 1 - overlap
    if loss == "negative_log_acceptance":
        return -overlap.log()
    if loss == "lk_hybrid":
        weight = (-3 * overlap.detach()).exp()
        return weight * kl(p, q) + (1 - weight) * (1 - overlap)
    if loss == "alpha_beta":
        a, b = more["alpha"], more["beta"]
        return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum() / (a * b)
    if loss == "decoupled_kd":
        target = int(more.get("label", p.argmax()))
        rest = [word for word in range(len(p)) if word != target]
        pairs = [torch.stack([each[target], each[rest].sum()]) for each in (p, q)]
        return more["alpha"] * kl(*pairs) + more["beta"] * kl(p[rest] / p[rest].sum(), q[rest] / q[rest].sum())
    if loss == "bild":
        total = student.sum() * 0
        for leading in (student, teacher):
            places = leading.argsort(descending=True)[: more["k"]].tolist()
            pairs = list(itertools.combinations(places, 2))
            ours, theirs = (
                torch.stack([each[i] - each[j] for i, j in pairs]).div(temperature).softmax(0)
                for each in (student, teacher)
            )
            total = total + kl(theirs, ours)
        return total
    raise KeyError(f"{loss} has no formula here")
