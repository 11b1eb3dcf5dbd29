"""Losses on what lies inside of two models, one value per token: hidden states, attention, and how tokens relate.

    per_token = hidden_mse(student_hidden, teacher_hidden)                  # (N,)
    per_token = relation_kl(student_values, teacher_values, valid)          # (R, S)

All compute in float32 or better. Nothing here maps layers, projects or chooses tokens. N tokens of R rows of S.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize


@dataclass(frozen=True)
class FeatureLoss:
    """A loss on layers, and what it is given.

    function: of the student's and the teacher's tensors. `token`: (N, ...) each -> (N,). `row`: (R, S, ...) each and
        (R, S) which tokens are valid -> (R, S) of tokens, where pads give 0. `layers` of either: it is given those of
        all layers at once, with the layers as a first axis.
    same_width: both must have one width. least_layers: how many of each model it needs.
    """

    function: Callable[..., Tensor]
    unit: Literal["token", "row"] = "token"
    takes_all_layers: bool = False
    same_width: bool = True
    least_layers: int = 1

    def __call__(self, *tensors: Tensor, **options: Any) -> Tensor:
        return self.function(*tensors, **options)


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


def normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the hidden size of the squared difference of both at length 1, eq. (7) of PKD (arXiv:1908.09355), whose
    code has the mean where the paper has the sum.

    student, teacher: (N, H) hidden states. Returns (N,). Raises ValueError unless both have one shape.
    """
    student, teacher = _widened(student, teacher, 2)
    return (normalize(student, dim=-1) - normalize(teacher, dim=-1)).square().mean(-1)


def attended_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over student layers of the MSE to a mixture of all teacher layers, eq. (3) of ALP-KD (arXiv:2012.14022).

    The mixture's weights are a softmax over the teacher's layers of their inner products with the student's.
    student: (L, N, H). teacher: (M, N, H). Returns (N,). Raises ValueError unless N and H are the same.
    """
    student, teacher = _same_dtype(student, teacher)
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[1:] != teacher.shape[1:]:
        raise ValueError(f"(L, N, H) and (M, N, H) are needed, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    weights = torch.einsum("lnh,mnh->nlm", student, teacher).softmax(-1)
    mixtures = torch.einsum("nlm,mnh->lnh", weights, teacher)
    return (student - mixtures).square().mean((0, 2))


def energy_mse(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Squared difference of where both have their energy, eq. (2) of attention transfer (arXiv:1612.03928), p = 2.

    A token's energy is the mean square of its hidden state; those of a row are brought to length 1. Widths may differ.
    student, teacher: (R, S, H) hidden states. valid: (R, S) bool. Returns (R, S).
    """
    student, teacher = _same_dtype(student, teacher)
    maps = [normalize(each.square().mean(-1) * valid, dim=-1) for each in (student, teacher)]
    return (maps[0] - maps[1]).square()


def gram_mse(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Squared difference of how each layer flows into the next, eq. (3) of FSP (Yim et al., CVPR 2017).

    The flow between two layers is the (H, H) mean over a row's tokens of the outer product of their states. Means over
    its entries and over the L - 1 flows; every token of a row has the row's value.
    student, teacher: (L, R, S, H) hidden states, L at least 2. valid: (R, S) bool. Returns (R, S).
    """
    student, teacher = _widened(student, teacher, 4)
    if len(student) < 2:
        raise ValueError("a flow needs two layers at least, got one")
    counts = valid.sum(-1).clamp(min=1)[:, None, None]
    flows = [
        torch.einsum("lrsh,lrsk->lrhk", each[:-1] * valid[..., None], each[1:]) / counts for each in (student, teacher)
    ]
    return (flows[0] - flows[1]).square().mean((0, 2, 3))[:, None] * valid


def attention_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over heads and keys of the squared difference of probabilities; TinyBERT has it of scores (`score_mse`).

    student, teacher: (N, A, S) attention of each of N tokens by A heads to S keys. Returns (N,). A key to which both
    give exactly 0 does not exist: it is padding, or comes later. Raises ValueError unless both have one shape.
    """
    student, teacher = _widened(student, teacher, 3)
    exists = (student != 0) | (teacher != 0)
    return ((student - teacher).square().sum(-1) / exists.sum(-1).clamp(min=1)).mean(-1)


def score_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over heads and keys of the squared difference before the softmax, eq. (7) of TinyBERT (arXiv:1909.10351).

    student, teacher: (N, A, S) scores of each of N tokens by A heads for S keys. Returns (N,). A key of -inf does not
    exist: it is padding, or comes later. Raises ValueError unless both have one shape.
    """
    student, teacher = _widened(student, teacher, 3)
    exists = teacher.isfinite() & student.isfinite()
    difference = (student - teacher).masked_fill(~exists, 0.0)
    return (difference.square().sum(-1) / exists.sum(-1).clamp(min=1)).mean(-1)


def attention_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over heads of KL(teacher || student) over keys, eq. (1) of MiniLM (arXiv:2002.10957).

    student, teacher: (N, A, S) attention probabilities. Returns (N,). Raises ValueError unless both have one shape.
    """
    student, teacher = _widened(student, teacher, 3)
    least = torch.finfo(student.dtype).tiny
    log_ratio = teacher.clamp(min=least).log() - student.clamp(min=least).log()
    return (teacher * log_ratio).sum(-1).mean(-1)


def relation_kl(student: Tensor, teacher: Tensor, valid: Tensor, *, relation_heads: int | None = None) -> Tensor:
    """Mean over heads of KL(teacher || student) of how each token of a row relates to the others.

    The relation of two tokens is the scaled inner product of their queries, keys or values, softmax over the row: eq.
    (3) and (4) of MiniLM (arXiv:2002.10957), eq. (5) to (7) of MiniLMv2 (arXiv:2012.15828).
    student, teacher: (R, S, A, D). valid: (R, S) bool. relation_heads: into how many heads the A * D numbers are
        divided anew, so that both models may have their own; None keeps A, which then must be the same.
    Returns (R, S). Raises ValueError where the numbers cannot be divided so.
    """
    student, teacher = _same_dtype(student, teacher)
    ours, theirs = (_log_relations(each, valid, relation_heads) for each in (student, teacher))
    if ours.shape != theirs.shape:
        raise ValueError(f"{ours.shape[1]} and {theirs.shape[1]} heads; give relation_heads, which divides both widths")
    kept = valid[:, None, None, :]
    summed = (theirs.exp() * (theirs - ours)).masked_fill(~kept, 0.0).sum(-1)
    return summed.mean(1) * valid


def _log_relations(states: Tensor, valid: Tensor, heads: int | None) -> Tensor:
    """(R, A, S, S) log-probabilities; of pads what does not matter, but finite."""
    rows, length, given, width = states.shape
    if heads is not None and (given * width) % heads:
        raise ValueError(f"a width of {given * width} cannot be divided into {heads} relation_heads")
    split = states.reshape(rows, length, heads or given, -1).transpose(1, 2)
    relations = split @ split.transpose(-1, -2) * split.shape[-1] ** -0.5
    return relations.masked_fill(~valid[:, None, None, :], torch.finfo(relations.dtype).min).log_softmax(-1)


def _same_dtype(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.to(dtype)


def _widened(student: Tensor, teacher: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    if student.ndim != ndim or student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"student and teacher must have one shape of {ndim} axes, got {shapes}")
    return _same_dtype(student, teacher)


# What a term's `loss` may name. An option is a keyword-only parameter of the function.
HIDDEN_LOSSES: dict[str, FeatureLoss] = {
    "mse": FeatureLoss(hidden_mse),
    "cosine": FeatureLoss(hidden_cosine),
    "normalized_mse": FeatureLoss(normalized_mse),
    "attended_mse": FeatureLoss(attended_mse, takes_all_layers=True),
    "energy_mse": FeatureLoss(energy_mse, "row", same_width=False),
    "gram_mse": FeatureLoss(gram_mse, "row", takes_all_layers=True, least_layers=2),
}
ATTENTION_LOSSES: dict[str, FeatureLoss] = {
    "mse": FeatureLoss(attention_mse),
    "kl_divergence": FeatureLoss(attention_kl),
}
SCORE_LOSSES: dict[str, FeatureLoss] = {"mse": FeatureLoss(score_mse)}
RELATION_LOSSES: dict[str, FeatureLoss] = {"relation_kl": FeatureLoss(relation_kl, "row", same_width=False)}
