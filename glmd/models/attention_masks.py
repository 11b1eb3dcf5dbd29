"""Masks of attention that are made without a look at the device, and not at all where there is nothing to mask.

    with masks_of(is_full=True):
        outputs = backbone(input_ids=ids, attention_mask=ones)

transformers leaves out a mask that hides nothing, so that attention may use its fastest kernels. For that it looks at
the mask, which the host has to wait for; and while it is traced it makes one all the same, with which attention keeps
all its probabilities, in float32, and a step takes three times as long. A batch's sizes say whether it has padding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def masks_of(*, is_full: bool) -> Iterator[None]:
    """Let attention of all models take a batch's word for whether a row has padding.

    is_full: none has. Then `sdpa` has no mask but for a window that is shorter than the text, or a model's own pattern;
    and flash-attention, whose mask is of padding alone, has none. Other implementations have that of transformers.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as FUNCTIONS

    ours = {"sdpa": _of_full_rows if is_full else _of_padded_rows}
    if is_full:
        ours |= {name: _no_mask for name in FUNCTIONS.valid_keys() if is_flash(name)}
    FUNCTIONS.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del FUNCTIONS[name]  # the one of transformers shows again


def is_flash(implementation: str | None) -> bool:
    """Whether it is one of the flash-attention packages, which run on GPUs alone, and in half precision."""
    from transformers.utils.generic import is_flash_attention_requested

    return bool(is_flash_attention_requested(requested_attention_implementation=implementation))


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _of_full_rows(*args: Any, **given: Any) -> Any:
    length, local = given.get("kv_length"), given.get("local_size")
    is_whole = local is None or (length is not None and length < local)
    # Who adds a pattern of its own, as for packed texts, allows neither.
    is_causal = given.get("allow_is_causal_skip", True) and length is not None and given.get("q_length") == length
    if not args and is_whole and (given.get("allow_is_bidirectional_skip", False) or is_causal):
        return None
    return _of_padded_rows(*args, **given)


def _of_padded_rows(*args: Any, **given: Any) -> Any:
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **given | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
