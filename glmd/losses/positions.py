"""What stands at some positions of a padded batch, in backward too without a search on the device.

states = rows_at(hidden, batch["positions"])      # (B, S, H) -> (N, H)
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rows_at(values: Tensor, positions: Tensor) -> Tensor:
    """(N, ...) of (B, S, ...) at (N,) flat positions, row * S + column, in increasing order, each once.

    Without a copy where these are all positions. Boolean indexing gives the same, but a device has to count first,
    and adds up gradients as if a position could come twice.
    """
    flat = values.flatten(0, 1)
    if len(positions) == len(flat):
        return flat
    rows: Tensor = _RowsAt.apply(flat, positions)
    return rows


class _RowsAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.size = len(flat)
        return flat[positions]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        if not len(positions):
            return gradient.new_zeros(ctx.size, *gradient.shape[1:]), None
        every = torch.arange(ctx.size, device=positions.device)
        nearest = torch.searchsorted(positions, every).clamp_(max=len(positions) - 1)
        absent = (positions[nearest] != every).view(-1, *[1] * (gradient.ndim - 1))
        return gradient[nearest].masked_fill_(absent, 0), None
