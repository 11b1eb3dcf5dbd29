"""Losses on how the tokens of a text relate to each other in a layer: one value per token.

    per_token = relation_kl(student_values, teacher_values, valid)          # (R, S)

Widths may differ: what is compared are relations, not states.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from glmd.errors import ConfigError
from glmd.losses.feature_loss import directions, same_dtype


def relation_kl(student: Tensor, teacher: Tensor, valid: Tensor, *, relation_heads: int | None = None) -> Tensor:
    """Mean over heads of KL(teacher || student) of how each token of a row relates to the others.

    The relation of two tokens is the scaled inner product of their queries, keys or values, softmax over the row: the
    value relation of MiniLM (arXiv:2002.10957), the self-attention relations of MiniLMv2 (arXiv:2012.15828).
    student, teacher: (R, S, A, D). valid: (R, S) bool. relation_heads: into how many heads the A * D numbers are
        divided anew, so that both models may have their own; None keeps A, which then must be the same.
    Returns (R, S). Raises ValueError where the numbers cannot be divided so.
    """
    student, teacher = same_dtype(student, teacher)
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


def energy_mse(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Squared difference of where both have their energy, attention transfer (arXiv:1612.03928) with p = 2.

    A token's energy is the mean square of its hidden state; those of a row are brought to length 1. Widths may differ.
    student, teacher: (R, S, H) hidden states. valid: (R, S) bool. Returns (R, S).
    """
    student, teacher = same_dtype(student, teacher)
    maps = [normalize(each.square().mean(-1) * valid, dim=-1) for each in (student, teacher)]
    return (maps[0] - maps[1]).square()


def token_similarity_kl(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """KL(teacher || student) of how near each token's state is to the others, the pairs of CKD (arXiv:2109.08359).

    Nearness is the cosine, softmax over the other tokens of the row; the mean over them, as in its published code.
    student, teacher: (R, S, H) hidden states. valid: (R, S) bool. Returns (R, S).
    """
    ours, theirs = (_log_similarities(each, valid) for each in same_dtype(student, teacher))
    others = _others(valid)
    summed = (theirs.exp() * (theirs - ours)).masked_fill(~others, 0.0).sum(-1)
    return summed / valid.sum(-1, keepdim=True).clamp(min=1) * valid


def token_angle_mse(student: Tensor, teacher: Tensor, valid: Tensor, *, window: int = 21) -> Tensor:
    """Squared difference of the angles at each token between two of its neighbors, the triples of CKD
    (arXiv:2109.08359).

    An angle is the cosine between the differences to both neighbors; the mean over pairs of them.
    student, teacher: (R, S, H) hidden states. valid: (R, S) bool. window: how many tokens, with the one in the middle,
        are neighbors; odd. Returns (R, S).
    """
    if window < 3 or window % 2 == 0:
        raise ConfigError(f"window must be odd and at least 3, got {window}")
    length = valid.shape[1]
    offsets = torch.arange(-(window // 2), window // 2 + 1, device=valid.device)
    places = torch.arange(length, device=valid.device)[:, None] + offsets  # (S, W)
    inside = (places >= 0) & (places < length) & (offsets != 0)
    near = places.clamp(0, length - 1)
    there = valid[:, near] & inside  # (R, S, W)
    angles = []
    for states in same_dtype(student, teacher):
        toward = directions(states[:, near] - states[:, :, None])
        angles.append(toward @ toward.transpose(-1, -2))
    both = there[..., None] & there[..., None, :]
    squares = (angles[0] - angles[1]).square().masked_fill(~both, 0.0)
    return squares.sum((-1, -2)) / both.sum((-1, -2)).clamp(min=1) * valid


def _others(valid: Tensor) -> Tensor:
    """(R, S, S) bool: for each token which are the other valid ones."""
    return valid[:, None, :] & ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)


def _log_similarities(states: Tensor, valid: Tensor) -> Tensor:
    unit = normalize(states, dim=-1)
    near = unit @ unit.transpose(-1, -2)
    return near.masked_fill(~_others(valid), torch.finfo(near.dtype).min).log_softmax(-1)
