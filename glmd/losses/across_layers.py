"""Losses on all layers of both models at once: one value per token.

per_token = attended_mse(torch.stack(student_layers), torch.stack(teacher_layers))   # (L, N, H), (M, N, H) -> (N,)
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from glmd.losses.feature_loss import directions, same_dtype, widened


def attended_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over student layers of the MSE to a mixture of all teacher layers, as in ALP-KD (arXiv:2012.14022).

    The mixture's weights are a softmax over the teacher's layers of their inner products with the student's.
    student: (L, N, H). teacher: (M, N, H). Returns (N,). Raises ValueError unless N and H are the same.
    """
    student, mixtures = _attended(student, teacher)
    return (student - mixtures).square().mean((0, 2))


def attended_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over student layers of KL(mixture || student), both a softmax over the width, the loss on layers of
    Universal-KD (Wu et al., EMNLP 2021); the mixture is that of `attended_mse`.

    student: (L, N, H). teacher: (M, N, H). Returns (N,). Raises ValueError unless N and H are the same.
    """
    student, mixtures = _attended(student, teacher)
    ours, theirs = student.log_softmax(-1), mixtures.log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum((0, 2))


def concatenated_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of all layers of both, projected together and brought to length 1, as in RAIL-KD
    (arXiv:2109.10164), section 3.2.

    student: (L, N, U). teacher: (M, N, U), each layer projected by a matrix of its own: their sum is one projection of
    the layers side by side. Returns (N,). Raises ValueError unless N and U are the same.
    """
    student, teacher = (normalize(each.sum(0), dim=-1) for each in _of_one_width(student, teacher))
    return (student - teacher).square().sum(-1)


def layer_similarity_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of how near each layer's state of a token is to the other layers', the pairs across layers
    of CKD (arXiv:2109.08359); the mean over them, as in its published code.

    student, teacher: (L, N, H), L at least 2, widths may differ. Returns (N,).
    """
    student, teacher = _of_as_many(student, teacher)
    same = torch.eye(len(student), dtype=torch.bool, device=student.device)
    logs = []
    for layers in (student, teacher):
        unit = normalize(layers, dim=-1)
        near = torch.einsum("lnh,mnh->nlm", unit, unit)
        logs.append(near.masked_fill(same, torch.finfo(near.dtype).min).log_softmax(-1))
    ours, theirs = logs
    return (theirs.exp() * (theirs - ours)).masked_fill(same, 0.0).sum((1, 2)) / len(student) ** 2


def layer_angle_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the angles at each layer's state of a token between those of two others, the triples
    across layers of CKD (arXiv:2109.08359); the mean over all triples of layers, as in its published code.

    student, teacher: (L, N, H), L at least 2, widths may differ. Returns (N,).
    """
    student, teacher = _of_as_many(student, teacher)
    angles = []
    for layers in (student, teacher):
        toward = directions(layers[:, None] - layers[None])  # (L, L, N, H)
        angles.append(torch.einsum("abnh,acnh->nabc", toward, toward))
    return (angles[0] - angles[1]).square().mean((1, 2, 3))


def gram_mse(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Squared difference of how each layer flows into the next, the FSP matrices of (Yim et al., CVPR 2017).

    The flow between two layers is the (H, H) mean over a row's tokens of the outer product of their states. Means over
    its entries and over the L - 1 flows.
    student, teacher: (L, R, S, H) hidden states, L at least 2. valid: (R, S) bool. Returns (R,).
    """
    student, teacher = widened(student, teacher, 4)
    counts = valid.sum(-1).clamp(min=1)[:, None, None]
    flows = [
        torch.einsum("lrsh,lrsk->lrhk", each[:-1] * valid[..., None], each[1:]) / counts for each in (student, teacher)
    ]
    return (flows[0] - flows[1]).square().mean((0, 2, 3))


def batch_contrast(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """How near a text's states are to the teacher's of the same text, against those of others: COS-NCE of LRC-BERT
    (arXiv:2012.07335).

    With g of a student's and a teacher's text, 1 less the mean cosine over layers and the places that are valid in
    both, it is L times (1 + g to the same text - half of the mean over other texts of how much larger theirs is).
    student, teacher: (L, R, S, H) hidden states. valid: (R, S) bool. Returns (R,).
    """
    ours, theirs = (normalize(each, dim=-1) * valid[..., None] for each in widened(student, teacher, 4))
    near = torch.einsum("lrsh,ltsh->rt", ours, theirs)
    places = torch.einsum("rs,ts->rt", valid.to(near), valid.to(near)) * len(student)
    g = 1 - near / places.clamp(min=1)
    same, texts = g.diagonal(), len(g)
    others = (g.sum(1) - same * texts) / max(texts - 1, 1)
    return len(student) * (1 + same - others / 2)


def _attended(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(L, N, H) student layers, and for each the mixture of the teacher's that its states attend to."""
    student, teacher = _of_one_width(student, teacher)
    weights = torch.einsum("lnh,mnh->nlm", student, teacher).softmax(-1)
    return student, torch.einsum("nlm,mnh->lnh", weights, teacher)


def _of_one_width(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[1:] != teacher.shape[1:]:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"student and teacher must have one shape of tokens and width, got {shapes}")
    return same_dtype(student, teacher)


def _of_as_many(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"student and teacher must have one shape of layers and tokens, got {shapes}")
    return same_dtype(student, teacher)
