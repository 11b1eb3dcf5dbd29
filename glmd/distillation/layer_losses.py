"""The sum of a term that compares layers: which tokens, which layers at a time, and what is done with pads.

projections = make_projections(term, student=384, teacher=768, pairs=pairs, like=weight, seed=0)
total = layer_sum(term, pairs, student_layers, teacher_layers, batch, projections, progress)
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from glmd.distillation.objective import Term, positions_of
from glmd.distillation.signals import feature_loss
from glmd.errors import ConfigError
from glmd.losses.feature_loss import FeatureLoss
from glmd.losses.positions import rows_at
from glmd.models.layers import Place

Pairs = Sequence[tuple[Place, Place]]  # (student layer, teacher layer)


class Projections(nn.Module):
    """Maps of each layer to a common width, of its own: the student's and the teacher's, in the layers' order."""

    def __init__(self, student: Sequence[nn.Module], teacher: Sequence[nn.Module]) -> None:
        super().__init__()
        self.student, self.teacher = nn.ModuleList(student), nn.ModuleList(teacher)


def make_projections(
    term: Term, *, student: int, teacher: int, pairs: Pairs, like: Tensor, seed: int
) -> nn.Linear | Projections | None:
    """What a term projects with; None for nothing.

    student, teacher: widths. like: a weight, for device and dtype. seed: of the first weights, which all ranks draw
    alike.
    """
    generator = torch.Generator().manual_seed(seed)
    if term.projection == "none":
        return None
    if term.projection == "linear":
        return _linear(student, teacher, like, generator)
    size, (ours, theirs) = term.projection_size or teacher, _numbers(pairs)
    if term.projection == "teacher":
        return Projections([nn.Identity() for _ in ours], [_linear(teacher, student, like, generator) for _ in theirs])
    return Projections(
        [_linear(student, size, like, generator) for _ in ours],
        [_linear(teacher, size, like, generator) for _ in theirs],
    )


def _linear(width: int, wanted: int, like: Tensor, generator: torch.Generator) -> nn.Linear:
    linear, bound = nn.Linear(width, wanted, bias=False, device="meta"), width**-0.5
    drawn = torch.empty(wanted, width, device="cpu").uniform_(-bound, bound, generator=generator)
    linear.weight = nn.Parameter(drawn.to(like.device, like.dtype))
    return linear


def layer_sum(
    term: Term,
    pairs: Pairs,
    student: Mapping[Place, Tensor],
    teacher: Mapping[Place, Tensor],
    batch: Mapping[str, Tensor],
    projections: nn.Module | None,
    progress: float,
) -> Tensor:
    """Scalar: the sum over tokens, or rows, of the mean or sum over layers of a term's loss.

    student, teacher: layer -> (R, S, ...), pads included. progress: of the stage.
    """
    loss, choose = feature_loss(term), _chooser(term, batch)
    ours, theirs = ({layer: choose(of[layer]) for layer in numbers} for of, numbers in _both(student, teacher, pairs))
    if isinstance(projections, Projections):
        ours = {layer: each(ours[layer]) for layer, each in zip(ours, projections.student, strict=True)}
        theirs = {layer: each(theirs[layer]) for layer, each in zip(theirs, projections.teacher, strict=True)}
    elif projections is not None:
        ours = {layer: projections(each) for layer, each in ours.items()}
    compared, places = [(ours[a], theirs[b]) for a, b in pairs], [*map(_shown, pairs)]
    if loss.takes_all_layers:
        places = [("layers", "layers")]
    if loss.is_paired:
        inorder = sorted(pairs) if isinstance(pairs[0][0], int) else pairs
        compared = [(torch.stack([ours[a] for a, _ in inorder]), torch.stack([theirs[b] for _, b in inorder]))]
    elif loss.takes_all_layers:
        compared = [(torch.stack([*ours.values()]), torch.stack([*theirs.values()]))]
    more = () if loss.unit == "token" else (batch["predicts"],)
    with torch.autocast(compared[0][0].device.type, enabled=False):
        values = [_values(term, loss, *each, more, progress) for each in zip(compared, places, strict=True)]
    weights = turn_weights(term, len(values), progress)
    total = torch.stack([each if weight == 1 else each * weight for each, weight in zip(values, weights, strict=True)])
    of_layers = total.sum(0) if term.over_layers == "sum" else total.mean(0)
    if loss.unit == "row" and term.tokens == "masked":
        of_layers = rows_at(of_layers, positions_of(term, batch))
    return of_layers.sum()


def _values(
    term: Term,
    loss: FeatureLoss,
    pair: tuple[Tensor, Tensor],
    places: tuple[str, str],
    more: tuple[Tensor, ...],
    progress: float,
) -> Tensor:
    """Of each token, row or text. Raises ConfigError where tensors do not fit, or a loss of the user's own fails."""
    rows = pair[0].shape[loss.takes_all_layers :]
    try:
        values = loss(*pair, *more, **term.options_at(progress))
    except Exception as error:
        if not (term.source or term.signal == "modules" or isinstance(error, ValueError | ConfigError)):
            raise
        ours, theirs = (f"{place}, {tuple(each.shape)}," for place, each in zip(places, pair, strict=True))
        reason = " ".join(str(error).split())
        remedy = "; compare what has one width, or by a loss of your own" if term.signal == "modules" else ""
        raise ConfigError(
            f"{term.name} cannot compare the student's {ours} with the teacher's {theirs[:-1]}: {reason}{remedy}"
        ) from error
    if values.shape != rows[: 2 if loss.unit == "row" else 1]:
        raise ConfigError(f"{term.name} gives {tuple(values.shape)} for {tuple(pair[0].shape)}; one for each is needed")
    return values


def turn(progress: float, layers: int) -> int:
    """Whose turn it is: 0 to layers - 1, or that of what comes after them."""
    return min(int(progress * (layers + 1)), layers)


def turn_weights(term: Term, layers: int, progress: float) -> list[float]:
    """How much each pair of layers counts: its place in turn decides, where the term is in turn."""
    now = turn(progress, layers)
    if not term.in_turn:
        return [1.0] * layers
    return [0.0 if now == layers or i > now else 1.0 if i == now else term.older_weight for i in range(layers)]


def _shown(pair: tuple[Place, Place]) -> tuple[str, str]:
    ours, theirs = (place if isinstance(place, str) else f"layer {place}" for place in pair)
    return ours, theirs


def _numbers(pairs: Pairs) -> tuple[list[Place], list[Place]]:
    """The layers of each model among pairs, in their order; modules as they are given."""
    sides = [[*dict.fromkeys(pair[side] for pair in pairs)] for side in (0, 1)]
    ours, theirs = (sorted(each) if isinstance(each[0], int) else each for each in sides)
    return ours, theirs


def _both(
    student: Mapping[Place, Tensor], teacher: Mapping[Place, Tensor], pairs: Pairs
) -> list[tuple[Mapping[Place, Tensor], list[Place]]]:
    return [*zip((student, teacher), _numbers(pairs), strict=True)]


def _chooser(term: Term, batch: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """What of (R, S, ...) a term's loss is given: rows as they are, (N, ...) of tokens, or (R, ...) one for each."""
    if feature_loss(term).unit != "token":
        return lambda layer: layer
    if term.tokens == "first":
        return lambda layer: layer[:, 0]
    if term.tokens == "mean":
        valid = batch["predicts"]
        return lambda layer: layer.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1)[:, None]
    positions = positions_of(term, batch)
    return lambda layer: rows_at(layer, positions)
