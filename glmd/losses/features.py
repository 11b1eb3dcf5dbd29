"""Losses on what lies inside of two models, layer by layer, one value per token: hidden states and attention.

    per_token = hidden_mse(student_hidden, teacher_hidden)                  # (N,)

All compute in float32 or better. Nothing here maps layers, projects or chooses tokens. The tables at the end name these
losses, those on relations of tokens and those across layers. N tokens of R rows of S.
"""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from glmd.losses.across_layers import (
    attended_kl,
    attended_mse,
    batch_contrast,
    concatenated_mse,
    gram_mse,
    layer_angle_mse,
    layer_similarity_kl,
)
from glmd.losses.feature_loss import FeatureLoss, widened
from glmd.losses.granularities import relation_mse, text_angle_smooth_l1, triplet_smooth_l1
from glmd.losses.relations import energy_mse, relation_kl, token_angle_mse, token_similarity_kl


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the hidden size of the squared difference, eq. (8) of TinyBERT (arXiv:1909.10351).

    student, teacher: (N, H) hidden states. Returns (N,). Raises ValueError unless both have one shape.
    """
    student, teacher = widened(student, teacher, 2)
    return (student - teacher).square().mean(-1)


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 minus the cosine of the angle between both, in [0, 2], as in DistilBERT (arXiv:1910.01108).

    student, teacher: (N, H) hidden states. Returns (N,). Raises ValueError unless both have one shape.
    """
    return 1 - cosine_similarity(*widened(student, teacher, 2), dim=-1)


def normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the hidden size of the squared difference of both at length 1, as in PKD (arXiv:1908.09355), whose
    code has the mean where the paper has the sum.

    student, teacher: (N, H) hidden states. Returns (N,). Raises ValueError unless both have one shape.
    """
    student, teacher = widened(student, teacher, 2)
    return (normalize(student, dim=-1) - normalize(teacher, dim=-1)).square().mean(-1)


def attention_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over heads and keys of the squared difference of probabilities; TinyBERT has it of scores (`score_mse`).

    student, teacher: (N, A, S) attention of each of N tokens by A heads to S keys. Returns (N,). A key to which both
    give exactly 0 does not exist: it is padding, or comes later. Raises ValueError unless both have one shape.
    """
    student, teacher = widened(student, teacher, 3)
    exists = (student != 0) | (teacher != 0)
    return ((student - teacher).square().sum(-1) / exists.sum(-1).clamp(min=1)).mean(-1)


def score_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over heads and keys of the squared difference before the softmax, eq. (7) of TinyBERT (arXiv:1909.10351).

    student, teacher: (N, A, S) scores of each of N tokens by A heads for S keys. Returns (N,). A key of -inf does not
    exist: it is padding, or comes later. Raises ValueError unless both have one shape.
    """
    student, teacher = widened(student, teacher, 3)
    exists = teacher.isfinite() & student.isfinite()
    difference = (student - teacher).masked_fill(~exists, 0.0)
    return (difference.square().sum(-1) / exists.sum(-1).clamp(min=1)).mean(-1)


def attention_kl(student: Tensor, teacher: Tensor, *, double_softmax: bool = False) -> Tensor:
    """Mean over heads of KL(teacher || student) over keys, eq. (1) of MiniLM (arXiv:2002.10957).

    student, teacher: (N, A, S) attention probabilities. double_softmax: take another softmax of them first, as GLMD's
        published code does by mistake, after which hardly any attention differs from another. Returns (N,).
    Raises ValueError unless both have one shape.
    """
    student, teacher = widened(student, teacher, 3)
    if double_softmax:
        exists = (student != 0) | (teacher != 0)  # padding has 0 in both, and what comes later
        student, teacher = (each.masked_fill(~exists, -torch.inf).softmax(-1) for each in (student, teacher))
    least = torch.finfo(student.dtype).tiny
    log_ratio = teacher.clamp(min=least).log() - student.clamp(min=least).log()
    return (teacher * log_ratio).sum(-1).mean(-1)


# What a term's `loss` may name. An option is a keyword-only parameter of the function.
HIDDEN_LOSSES: dict[str, FeatureLoss] = {
    "mse": FeatureLoss(hidden_mse),
    "cosine": FeatureLoss(hidden_cosine),
    "normalized_mse": FeatureLoss(normalized_mse),
    "energy_mse": FeatureLoss(energy_mse, "row", same_width=False),
    "token_similarity_kl": FeatureLoss(token_similarity_kl, "row", same_width=False),
    "token_angle_mse": FeatureLoss(token_angle_mse, "row", same_width=False),
    "attended_mse": FeatureLoss(attended_mse, takes_all_layers=True),
    "attended_kl": FeatureLoss(attended_kl, takes_all_layers=True),
    "concatenated_mse": FeatureLoss(concatenated_mse, takes_all_layers=True, needs_both=True),
    "layer_similarity_kl": FeatureLoss(
        layer_similarity_kl, takes_all_layers=True, is_paired=True, same_width=False, least_layers=2
    ),
    "layer_angle_mse": FeatureLoss(
        layer_angle_mse, takes_all_layers=True, is_paired=True, same_width=False, least_layers=2
    ),
    "gram_mse": FeatureLoss(gram_mse, "text", takes_all_layers=True, is_paired=True, least_layers=2),
    "batch_contrast": FeatureLoss(batch_contrast, "text", takes_all_layers=True, is_paired=True, least_texts=2),
    "relation_mse": FeatureLoss(relation_mse, "text", same_width=False),
    "triplet_smooth_l1": FeatureLoss(triplet_smooth_l1, "text", same_width=False),
    "text_angle_smooth_l1": FeatureLoss(text_angle_smooth_l1, "text", same_width=False, least_texts=3),
}
ATTENTION_LOSSES: dict[str, FeatureLoss] = {
    "mse": FeatureLoss(attention_mse),
    "kl_divergence": FeatureLoss(attention_kl),
}
SCORE_LOSSES: dict[str, FeatureLoss] = {"mse": FeatureLoss(score_mse)}
RELATION_LOSSES: dict[str, FeatureLoss] = {"relation_kl": FeatureLoss(relation_kl, "row", same_width=False)}
