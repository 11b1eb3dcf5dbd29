"""By which code a model computes attention: transformers' choice, or what `attn_implementation` names.

    with attention_of(model, implementation="flex_attention"):
        ...                                     # and afterwards what it had before

Models train and teach by it. They are scored, proved and exported by transformers' choice, which every device and
precision has, so that scores of two runs compare. What a model takes is asked of transformers, and then tried.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from glmd.errors import ConfigError, ModelError
from glmd.models.probes import differ, difference, logits_of, predicting, probe_inputs, refused


def set_attention(model: Any, implementation: str) -> None:
    """Let a model compute attention so from now on. Raises ConfigError for what it or this machine has not."""
    try:
        model.set_attn_implementation(implementation)
    except (
        Exception
    ) as error:  # ValueError and ImportError of transformers, and what a package raises as it is imported
        reason = " ".join(str(error).split())[:400].removesuffix(".")
        raise ConfigError(f"attn_implementation {implementation}: {reason}; give another, or remove it") from None
    found = model.config._attn_implementation
    if found != implementation:
        raise ConfigError(
            f"attn_implementation {implementation}: {type(model).__name__} computes attention by {found}, which cannot "
            "be exchanged; remove it"
        )


@contextmanager
def attention_of(*models: Any, implementation: str | None) -> Iterator[None]:
    """Let models compute attention so for a while; None changes nothing. Raises ConfigError as `set_attention` does."""
    before = [] if implementation is None else [model.config._attn_implementation for model in models]
    try:
        for model in models:
            if implementation is not None:
                set_attention(model, implementation)
        yield
    finally:
        for model, own in zip(models, before, strict=False):
            model.set_attn_implementation(own)


def chosen_by_transformers(model: Any) -> str:
    """What a model has that is asked for none: `sdpa` where its class knows it, else `eager`."""
    return str(model.get_correct_attn_implementation(None))


@torch.no_grad()
def prove_implementation(model: Any, implementation: str, *, half: torch.dtype | None, trains: bool) -> None:
    """Prove that a language model gives by this attention what it gives by transformers' choice, padded rows included.

    On the device that a run here would have. half: the precision of its products, None: float32. trains: a step is
    made too, which attention that knows no dropout, or no backward, refuses. Raises ConfigError or ModelError.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model.to(device).eval()
    inputs = probe_inputs(model)
    valid, own = predicting(inputs), logits_of(model, inputs)
    what, remedy = f"it does not run by attn_implementation {implementation}", "give another, or remove it"
    with (
        attention_of(model, implementation=implementation),
        refused(model, what, remedy),
        torch.autocast(device.type, dtype=half, enabled=half is not None),
    ):
        found, expected = model(**inputs).logits[valid], own[valid].to(half or own.dtype)
        if differ(found, expected):
            raise ModelError(
                f"{type(model).__name__}: attn_implementation {implementation} changes its output (relative difference "
                f"{difference(found, expected):.1e}); {remedy}"
            )
        if trains:
            with torch.enable_grad():
                model.train()(**inputs).logits[valid].square().mean().backward()
    model.to("cpu").zero_grad()
