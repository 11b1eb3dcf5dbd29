"""Losses of MGSKD (Liu et al., ACL 2022) on how tokens, phrases and texts relate to each other: one value per text.

    per_text = relation_mse(student_states, teacher_states, valid, relation_heads=64)       # (R,)

Widths may differ. `span` takes the means of runs of so many tokens, in the place of phrases, which nobody has parsed.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, smooth_l1_loss

from glmd.errors import ConfigError
from glmd.losses.feature_loss import directions, same_dtype


def relation_mse(
    student: Tensor, teacher: Tensor, valid: Tensor, *, relation_heads: int | None = None, span: int = 1
) -> Tensor:
    """Mean over heads and pairs of tokens of the squared difference of their scaled inner products.

    student, teacher: (R, S, H) hidden states. valid: (R, S) bool. relation_heads: into how many the widths are divided;
        None for one. Returns (R,). Raises ConfigError where they cannot be divided so.
    """
    student, teacher = same_dtype(student, teacher)
    runs = [_runs(each, valid, span) for each in (student, teacher)]
    ours, theirs = (_scores(states, relation_heads) for states, _ in runs)
    valid = runs[0][1]
    pairs = valid[:, :, None] & valid[:, None, :]
    squares = (ours - theirs).square().mean(1).masked_fill(~pairs, 0.0)
    return squares.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def triplet_smooth_l1(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    *,
    relation_heads: int | None = None,
    span: int = 1,
    vertices: int = 20,
    neighbors: int = 20,
) -> Tensor:
    """Mean smooth L1 difference of the angles at the tokens that matter most, between those that matter to them.

    What matters is the teacher's: a softmax of its scaled inner products, by heads. The `vertices` tokens are those
    that most attention goes to, the `neighbors` of each those that most of its own goes to. An angle is a cosine.
    student, teacher: (R, S, H) hidden states. valid: (R, S) bool. Returns (R,). Raises ConfigError as `relation_mse`,
    and for fewer than two neighbors.
    """
    if neighbors < 2:
        raise ConfigError(f"neighbors must be at least 2, got {neighbors}")
    student, teacher = same_dtype(student, teacher)
    (student, _), (teacher, valid) = (_runs(each, valid, span) for each in (student, teacher))
    length = valid.shape[1]
    pairs = (valid[:, :, None] & valid[:, None, :])[:, None]
    scores = _scores(teacher, relation_heads).masked_fill(~pairs, torch.finfo(teacher.dtype).min)
    attention = (scores.softmax(-1) * pairs).sum(1)  # (R, S, S)
    chosen = attention.sum(1).topk(min(vertices, length), 1).indices  # (R, P)
    is_self = torch.eye(length, dtype=torch.bool, device=valid.device)
    local = attention.masked_fill(is_self, 0.0).topk(min(neighbors, length), 2).indices
    around = local.gather(1, chosen[..., None].expand(-1, -1, local.shape[2]))  # (R, P, Q)
    angles = []
    for states in (student, teacher):
        rows = torch.arange(len(states), device=states.device)
        toward = directions(states[rows[:, None, None], around] - states[rows[:, None], chosen][:, :, None])
        angles.append(toward @ toward.transpose(-1, -2))
    there = valid.gather(1, chosen)[..., None] & valid[:, None].expand(-1, chosen.shape[1], -1).gather(2, around)
    there = there & (around != chosen[..., None])
    two = ~torch.eye(around.shape[2], dtype=torch.bool, device=valid.device)
    triples = there[..., None] & there[..., None, :] & two
    found = smooth_l1_loss(angles[0], angles[1], reduction="none").masked_fill(~triples, 0.0)
    return found.sum((1, 2, 3)) / triples.sum((1, 2, 3)).clamp(min=1)


def text_angle_smooth_l1(
    student: Tensor, teacher: Tensor, valid: Tensor, *, relation_heads: int | None = None
) -> Tensor:
    """Mean smooth L1 difference of the angles at each text between all two texts of the batch, of each head.

    A text is the mean of its tokens. Angles of a text with itself are 0 in both models and count.
    student, teacher: (R, S, H) hidden states. valid: (R, S) bool. Returns (R,). Raises ConfigError as `relation_mse`.
    """
    angles = []
    for states in same_dtype(student, teacher):
        texts = states.masked_fill(~valid[..., None], 0.0).sum(1) / valid.sum(1).clamp(min=1)[:, None]
        heads = _divided(texts[None], relation_heads)[0]  # (A, R, D)
        toward = directions(heads[:, None] - heads[:, :, None])
        angles.append(toward @ toward.transpose(-1, -2))
    return smooth_l1_loss(angles[0], angles[1], reduction="none").mean((0, 2, 3))


def _divided(states: Tensor, heads: int | None) -> Tensor:
    """(R, S, H) -> (R, A, S, D)"""
    rows, length, width = states.shape
    if width % (heads or 1):
        raise ConfigError(f"a width of {width} cannot be divided into {heads} relation_heads")
    return states.reshape(rows, length, heads or 1, -1).transpose(1, 2)


def _scores(states: Tensor, heads: int | None) -> Tensor:
    split = _divided(states, heads)
    return split @ split.transpose(-1, -2) * split.shape[-1] ** -0.5


def _runs(states: Tensor, valid: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """The means of runs of `span` valid tokens, (R, S / span, H), and which of them have any."""
    if span == 1:
        return states, valid
    surplus = -valid.shape[1] % span
    there = pad(valid, (0, surplus)).unflatten(1, (-1, span))
    grouped = pad(states, (0, 0, 0, surplus)).unflatten(1, (-1, span)).masked_fill(~there[..., None], 0.0)
    return grouped.sum(2) / there.sum(2).clamp(min=1)[..., None], there.any(2)
