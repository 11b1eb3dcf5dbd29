"""The sum of a term that compares layers: which tokens, which layers at a time, and what is done with pads.

total = layer_sum(term, [(0, 1), (1, 3)], student_layers, teacher_layers, batch)
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from glmd.distillation.objective import Term, positions_of
from glmd.distillation.signals import feature_loss
from glmd.losses.positions import rows_at


def layer_sum(
    term: Term,
    pairs: Sequence[tuple[int, int]],
    student: Mapping[int, Tensor],
    teacher: Mapping[int, Tensor],
    batch: Mapping[str, Tensor],
    project: Callable[[Tensor], Tensor],
) -> Tensor:
    """Scalar: the sum over tokens, or rows, of the mean or sum over layers of a term's loss.

    pairs: (student layer, teacher layer). student, teacher: layer -> (R, S, ...), pads included. project: from the
        student's width to the teacher's.
    """
    loss, choose = feature_loss(term), _chooser(term, batch)
    ours = {layer: project(choose(student[layer])) for layer in sorted({layer for layer, _ in pairs})}
    theirs = {layer: choose(teacher[layer]) for layer in sorted({layer for _, layer in pairs})}
    compared = [(ours[a], theirs[b]) for a, b in pairs]
    if loss.takes_all_layers:
        compared = [(torch.stack([*ours.values()]), torch.stack([*theirs.values()]))]
    more = (batch["predicts"],) if loss.unit == "row" else ()
    with torch.autocast(compared[0][0].device.type, enabled=False):
        values = torch.stack([loss(*pair, *more, **term.options) for pair in compared])
    of_layers = values.sum(0) if term.over_layers == "sum" else values.mean(0)
    if loss.unit == "row" and term.tokens == "masked":
        of_layers = rows_at(of_layers, positions_of(term, batch))
    return of_layers.sum()


def _chooser(term: Term, batch: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """What of (R, S, ...) a term's loss is given: rows as they are, (N, ...) of tokens, or (R, ...) one for each."""
    if feature_loss(term).unit == "row":
        return lambda layer: layer
    if term.tokens == "first":
        return lambda layer: layer[:, 0]
    if term.tokens == "mean":
        valid = batch["predicts"]
        return lambda layer: layer.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1)[:, None]
    positions = positions_of(term, batch)
    return lambda layer: rows_at(layer, positions)
