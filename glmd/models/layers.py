"""Where a model's layers are, and which teacher layer stands behind each student layer.

    layer_lists(model)                  # {"bert.encoder.layer": ModuleList(...)}
    layer_indices("uniform", 6, 12)     # [1, 3, 5, 7, 9, 11], zero-based

The same mapping starts a student from a teacher's layers and aligns hidden states.
"""

from collections.abc import Sequence
from typing import Any

from glmd.errors import ConfigError

LAYER_CHOICES = ("first", "last", "uniform", "even")


def layer_lists(model: Any) -> dict[str, Any]:
    """The outermost module lists that are as long as the model has layers; none where one layer is repeated."""
    from torch import nn

    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers
        if is_list and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


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
    how: str | Sequence[Sequence[int]], num_student_layers: int, num_teacher_layers: int
) -> list[tuple[int, int]]:
    """Zero-based (student layer, teacher layer) pairs that a term compares.

    how: "uniform", "first" and "last" give each student layer one of the teacher's (`layer_indices`); "all" the layer
        of its own number; or the pairs themselves. Raises ConfigError for layers that are not there.
    """
    n, total = num_student_layers, num_teacher_layers
    if not isinstance(how, str):
        for student, teacher in how:
            if not (0 <= student < n and 0 <= teacher < total):
                counts = f"the student's layers count 0 to {n - 1}, the teacher's 0 to {total - 1}"
                raise ConfigError(f"layers [{student}, {teacher}]: {counts}")
        return [(student, teacher) for student, teacher in how]
    if how == "all" and n != total:
        raise ConfigError(f"layers all: the student has {n} layers and the teacher {total}; give uniform, or pairs")
    return list(enumerate(range(n) if how == "all" else layer_indices(how, n, total)))
