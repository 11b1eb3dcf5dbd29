"""Where a model's layers are, and which teacher layer stands behind each student layer.

    layer_lists(model)                  # {"bert.encoder.layer": ModuleList(...)}
    layer_indices("uniform", 6, 12)     # [1, 3, 5, 7, 9, 11], zero-based

The same mapping starts a student from a teacher's layers and aligns hidden states.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from glmd.errors import ConfigError, ModelError
from glmd.models.heads import HALVES, lm_kind

LAYER_CHOICES = ("first", "last", "uniform", "even")
EMBEDDINGS = -1  # the number of what goes into the first layer
Place = int | str  # a layer by its number, or a module by its name


@dataclass(frozen=True)
class LayerChoice:
    """Some of the pairs that a map gives: the whole list, with the embeddings before it if asked, from start to stop.

    start, stop: as Python slices a list. {map: uniform, start: -1} is the last layer of both, {map: uniform, stop: -1}
        all but that. redraws: of map random, how many times in a stage teacher layers are drawn anew.
    """

    map: Literal["uniform", "last", "first", "all", "every", "random"] = "uniform"
    embeddings: bool = False
    start: int | None = None
    stop: int | None = None
    redraws: int = 1

    def __post_init__(self) -> None:
        if self.redraws < 1 or (self.redraws > 1 and self.map != "random"):
            raise ConfigError(f"redraws must be at least 1, and have map: random; got {self.redraws} with {self.map}")


Layers = str | tuple[tuple[int, ...], ...] | LayerChoice


def depths(config: Any) -> tuple[int, ...]:
    """How many layers a model of this config has; of an encoder-decoder those of either half.

    Raises ModelError for an encoder-decoder whose config does not say so.
    """
    if lm_kind(config) != "encoder-decoder":
        return (config.num_hidden_layers,)
    return config.num_hidden_layers, getattr(config, decoder_depth_name(config))


def decoder_depth_name(config: Any) -> str:
    """The field with the number of an encoder-decoder's decoder layers. Raises ModelError where there is none."""
    found = [name for name, value in vars(config).items() if re.fullmatch("(num_)?decoder_layers", name) and value]
    if len(found) != 1:
        raise ModelError(f"{type(config).__name__} has no one field of the number of decoder layers; not supported")
    return found[0]


def layer_stacks(model: Any) -> list[dict[str, Any]]:
    """By name the outermost module lists as long as the model has layers; of an encoder-decoder those of each half.

    Most models have one list; XLM has one for each part of a layer, and one that repeats a layer has none.
    """
    from torch import nn

    found: list[dict[str, Any]] = [{} for _ in depths(model.config)]
    halves = HALVES if len(found) > 1 else ("",)
    for name, module in model.named_modules():
        for stack, half, depth in zip(found, halves, depths(model.config), strict=True):
            is_inside = not half or half in name.split(".")
            is_list = is_inside and isinstance(module, nn.ModuleList) and len(module) == depth
            if is_list and not any(name.startswith(f"{outer}.") for outer in stack):
                stack[name] = module
    return found


def layer_lists(model: Any) -> dict[str, Any]:
    """All of `layer_stacks`."""
    return {name: layers for stack in layer_stacks(model) for name, layers in stack.items()}


def layers_in_order(model: Any) -> list[Any]:
    """The layers of a model, one behind the other. Raises ModelError where they cannot be told."""
    found = layer_lists(model)
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise ModelError(f"{type(model).__name__}: one list of layers is needed to change them in, found {names}")
    return [*next(iter(found.values()))]


def with_states(output: Any, states: Any) -> Any:
    """What a layer gave, with other hidden states (R, S, H) in the place of its own."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


def layer_indices(how: str | Sequence[int], num_student_layers: int, num_teacher_layers: int) -> list[int]:
    """Zero-based teacher layer for each student layer, in increasing order.

    how: "first" and "last" take neighbors from that end; "uniform" takes the last of each of equal groups
        (12 -> 6: 1, 3, ..., 11, as TinyBERT and PKD map layers); "even" the first of each
        (12 -> 6: 0, 2, ..., 10); or the layers themselves.
    """
    n, total = num_student_layers, num_teacher_layers
    if not isinstance(how, str):
        return _checked_layers(list(how), n, total)
    if not 1 <= n <= total:
        raise ConfigError(f"layers {how!r}: the student must have 1 to {total} layers (the teacher's), got {n}")
    if how == "first":
        return list(range(n))
    if how == "last":
        return list(range(total - n, total))
    if how == "uniform":
        return [-(-(i + 1) * total // n) - 1 for i in range(n)]  # ceil((i + 1) * total / n) - 1 in integers
    if how == "even":
        return [i * total // n for i in range(n)]
    raise ConfigError(f"layers must be one of {', '.join(LAYER_CHOICES)} or a list of numbers, got {how!r}")


def _checked_layers(layers: list[int], num_student_layers: int, num_teacher_layers: int) -> list[int]:
    """Raises ConfigError unless these are existing teacher layers in order, one per student layer."""
    if len(layers) != num_student_layers:
        raise ConfigError(
            f"layers {layers}: {len(layers)} given, but the student has {num_student_layers}; one for each"
        )
    for layer in layers:
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < num_teacher_layers:
            raise ConfigError(
                f"layers {layers}: {layer!r} is no teacher layer; they count 0 to {num_teacher_layers - 1}"
            )
    if sorted(set(layers)) != layers:
        raise ConfigError(f"layers {layers} must be {len(layers)} different layers in increasing order")
    return layers


def layer_pairs(
    how: Layers | Sequence[Sequence[int]], num_student_layers: int, num_teacher_layers: int, draw: str = ""
) -> list[tuple[int, int]]:
    """Zero-based (student layer, teacher layer) pairs that a term compares; EMBEDDINGS are what goes into the first.

    how: "uniform", "first" and "last" give each student layer one of the teacher's (`layer_indices`); "all" the layer
        of its own number; "every" each of the teacher's; "random" the last one for the last, and for the others as many
        drawn ones in their order; "middle" is the middle one of the student and its uniform partner, "embeddings" what
        goes into the first of both; some of these (LayerChoice); or the pairs themselves.
    draw: of "random", what the drawn layers are a function of.
    Raises ConfigError for layers that are not there.
    """
    n, total = num_student_layers, num_teacher_layers
    if isinstance(how, LayerChoice):
        pairs = [(EMBEDDINGS, EMBEDDINGS)] * how.embeddings + layer_pairs(how.map, n, total, draw)
        if not pairs[how.start : how.stop]:
            raise ConfigError(
                f"layers from start {how.start} to stop {how.stop}: none of {len(pairs)} pairs of {how.map} is left"
            )
        return pairs[how.start : how.stop]
    if how == "embeddings":
        return [(EMBEDDINGS, EMBEDDINGS)]
    if how == "middle":
        return [layer_pairs("uniform", n, total)[(n - 1) // 2]]
    if how == "random":
        layer_indices("uniform", n, total)  # refuses a student with more layers
        drawn = sorted(random.Random(draw).sample(range(total - 1), n - 1))
        return list(enumerate([*drawn, total - 1]))
    if how == "every":
        return [(student, teacher) for student in range(n) for teacher in range(total)]
    if not isinstance(how, str):
        for student, teacher in how:
            if not (0 <= student < n and 0 <= teacher < total):
                counts = f"the student's layers count 0 to {n - 1}, the teacher's 0 to {total - 1}"
                raise ConfigError(f"layers [{student}, {teacher}]: {counts}")
        return [(student, teacher) for student, teacher in how]
    if how == "all" and n != total:
        raise ConfigError(f"layers all: the student has {n} layers and the teacher {total}; give uniform, or pairs")
    return list(enumerate(range(n) if how == "all" else layer_indices(how, n, total)))
