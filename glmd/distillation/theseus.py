"""BERT-of-Theseus (arXiv:2002.02925): a teacher whose blocks are replaced by a student's layers, one by one.

intervention: {name: theseus, replacing_rate: 0.3, until: 0.66}
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from glmd.errors import ConfigError
from glmd.models.layers import layers_in_order, with_states


@contextmanager
def theseus(
    student: Any,
    teacher: Sequence[Any],
    batch: Mapping[str, Tensor],
    progress: float,
    generator: torch.Generator,
    *,
    replacing_rate: float = 0.3,
    until: float = 0.66,
) -> Iterator[None]:
    """Run in place of a student's layer the teacher's block behind it, drawn anew in each micro-batch.

    replacing_rate: how probably a layer is the student's in the beginning; it rises in a line to 1 at progress
        `until`, and from there on the student runs alone.
    A student's layer that does not count runs all the same, and has a gradient of zero: data-parallel ranks draw
    differently and have to meet in all weights.
    """
    rate = min(1.0, replacing_rate + (1 - replacing_rate) * progress / until)
    ours, theirs = (layers_in_order(model) for model in (student.model, teacher[0].model))
    blocks = [theirs[start:stop] for start, stop in block_bounds(len(ours), len(theirs))]
    stays = torch.rand(len(ours), generator=generator) < rate
    with ExitStack() as hooks:
        for layer, block, is_own in zip(ours, blocks, stays.tolist(), strict=True):
            if not is_own:
                handle = layer.register_forward_hook(_replaced_by(block), with_kwargs=True)
                hooks.callback(handle.remove)
        yield


def require_rates(*, replacing_rate: float = 0.3, until: float = 0.66) -> None:
    """Raises ConfigError for options out of their ranges."""
    if not (0 <= replacing_rate <= 1 and 0 < until <= 1):
        raise ConfigError(f"replacing_rate must be in [0, 1] and until in (0, 1], got {replacing_rate} and {until}")


def block_bounds(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """From which to before which teacher layer the block behind each student layer reaches."""
    ends = [math.ceil(i * teacher_layers / student_layers) for i in range(student_layers + 1)]
    return [*pairwise(ends)]


def _replaced_by(block: Sequence[nn.Module]) -> Callable[..., Any]:
    def hook(layer: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> Any:
        hidden, more = (given[0], given[1:]) if given else (named["hidden_states"], ())
        named = {name: each for name, each in named.items() if name != "hidden_states"}
        for each in block:
            found = each(hidden, *more, **named)
            hidden = found[0] if isinstance(found, tuple) else found
        own = output[0] if isinstance(output, tuple) else output
        mixed = torch.where(torch.tensor(True), hidden.to(own.dtype), own)
        return with_states(output, mixed)

    return hook


def require_alike(student: Any, teacher: Any) -> None:
    """Layers of one kind and width. Raises ConfigError."""
    depths = [config.get_text_config().num_hidden_layers for config in (student, teacher)]
    if depths[0] > depths[1]:
        raise ConfigError(
            f"theseus puts a block of the teacher's layers in the place of each of the student's: it has {depths[0]}, "
            f"the teacher {depths[1]}; give a student of fewer"
        )
    for name in ("model_type", "hidden_size"):
        ours, theirs = (getattr(config.get_text_config(), name) for config in (student, teacher))
        if ours != theirs:
            raise ConfigError(
                f"theseus puts the teacher's layers in the place of the student's: its {name} is {ours}, the teacher's "
                f"{theirs}; give a student as the teacher is"
            )
