"""Gradient perturbation of LRC-BERT (arXiv:2012.07335): a student learns beside where its loss rises fastest.

intervention: {name: embedding_gradient, size: 1}
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from glmd.errors import ConfigError
from glmd.models.layers import layers_in_order


@contextmanager
def embedding_gradient(
    student: Any,
    teacher: Any,
    batch: Mapping[str, Tensor],
    progress: float,
    generator: torch.Generator,
    gradient: Tensor,
    *,
    size: float = 1.0,
) -> Iterator[None]:
    """Add to each token's embedding the gradient that the loss of a pass before had there, brought to one length.

    gradient: (R, S, H). size: the length. What is added is a constant: no gradient goes through it.
    """
    added = size * normalize(gradient, dim=-1)
    with first_layer(student.model, lambda states: states + added.to(states)):
        yield


@contextmanager
def first_layer(model: Any, change: Any) -> Iterator[None]:
    """Let a function change, or see, what goes into the first layer of a model: (R, S, H) -> (R, S, H)."""

    def hook(layer: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if given:
            return (change(given[0]), *given[1:]), named
        return given, named | {"hidden_states": change(named["hidden_states"])}

    handle = layers_in_order(model)[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def require_size(*, size: float = 1.0) -> None:
    """Raises ConfigError for an option out of its range."""
    if not 0 < size < float("inf"):
        raise ConfigError(f"size must be above 0 and finite, got {size}")
