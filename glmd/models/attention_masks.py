"""No mask where there is nothing to mask, also while a graph is recorded or a model is compiled.

    with no_needless_masks():
        outputs = backbone(input_ids=ids)        # without an attention_mask

transformers leaves out a mask that hides nothing, so that attention may use its fastest kernels. While it is traced it
makes one all the same, though without padding nothing has to be looked at; attention then keeps all its probabilities,
in float32, which takes three times as long as the whole step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_needless_masks() -> Iterator[None]:
    """Let `sdpa` attention of all models have no mask where that is what it means to have none."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = _mask
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]  # the one of transformers shows again


def _mask(*args: Any, **given: Any) -> Any:
    from transformers.masking_utils import sdpa_mask

    length, local = given.get("kv_length"), given.get("local_size")
    is_whole = given.get("attention_mask") is None and (local is None or (length is not None and length < local))
    # Who adds a pattern of its own, as for packed texts, allows neither.
    is_causal = given.get("allow_is_causal_skip", True) and length is not None and given.get("q_length") == length
    if not args and is_whole and (given.get("allow_is_bidirectional_skip", False) or is_causal):
        return None
    return sdpa_mask(*args, **given)
