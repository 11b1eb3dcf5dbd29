"""Weights in the form that they are multiplied in, and sums of products in more digits than their factors have.

weight = converted(head.weight, torch.bfloat16, filled=True)
add_product = product_adder(weight)
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# The weights of frozen heads in the forms that are multiplied, each with the version that was converted.
_constants: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def converted(weight: Tensor, dtype: torch.dtype, *, filled: bool = False) -> Tensor:
    """`weight.to(dtype)`; of a teacher, which is the same in every micro-batch, made once while it lives.

    filled: with zeros up to a multiple of 64 rows. cuBLAS multiplies by another number of them three to six times
    slower, with kernels of an old generation.
    """
    surplus = -len(weight) % 64 if filled else 0
    if weight.dtype == dtype and not surplus:
        return weight
    if weight.requires_grad or weight.grad_fn is not None or weight.is_inference():
        return _copied(weight, dtype, surplus)
    # Each form for itself: a CUDA graph goes on reading the one that it was recorded with.
    known = _constants.setdefault(weight, {})
    form = dtype, surplus
    if form not in known or known[form][0] != weight._version:
        known[form] = (weight._version, _copied(weight, dtype, surplus))
    return known[form][1]


@torch.no_grad()
def _copied(weight: Tensor, dtype: torch.dtype, surplus: int) -> Tensor:
    if not surplus:
        return weight.to(dtype)
    copy = weight.new_empty(len(weight) + surplus, *weight.shape[1:], dtype=dtype)
    copy[: len(weight)] = weight
    copy[len(weight) :] = 0
    return copy


def product_adder(weight: Tensor) -> Callable[..., None]:
    """A function that adds to `total`, in its precision, the product of two matrices of the weight's dtype.

    One of both factors has as many columns as the weight.
    """
    device, dtype = weight.device, weight.dtype
    # In blocks of tokens: a product of the whole size, and its copy in float32, would each be fresh memory.
    scratch: list[Tensor] = []

    def add(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
        if is_first and total.dtype == dtype:
            torch.mm(a, b, out=total)
            return
        if total.dtype == dtype or _adds_wide_products(device, dtype):
            wide: dict[str, Any] = {} if total.dtype == dtype else {"out_dtype": total.dtype}
            torch.addmm(total, a, b, beta=0 if is_first else 1, out=total, **wide)  # with 0 `total` is not read
            return
        if not scratch:
            scratch.append(total.new_empty(min(len(weight), 4096), total.shape[1], dtype=dtype))
        for rows, part in zip(total.split(len(scratch[0])), a.split(len(scratch[0])), strict=True):
            block = torch.mm(part, b, out=scratch[0][: len(part)])
            rows.copy_(block) if is_first else rows.add_(block)

    return add


@lru_cache
def _adds_wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `addmm` adds a product of narrow matrices to a float32 one there: CUDA, from torch 2.8 on."""
    if device.type != "cuda":
        return False
    narrow, wide = torch.zeros(16, 16, device=device, dtype=dtype), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(wide, narrow, narrow, out_dtype=wide.dtype, out=wide)
    except (RuntimeError, TypeError):
        return False
    return True
