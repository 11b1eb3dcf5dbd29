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
    """Let `sdpa` attention of all models take a batch's word for whether a row has padding.

    is_full: none has. Then there is no mask but for a window that is shorter than the text, or a model's own pattern.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = _of_full_rows if is_full else _of_padded_rows
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]  # the one of transformers shows again


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
