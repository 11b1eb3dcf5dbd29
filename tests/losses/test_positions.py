"""Rows of a padded batch by their positions."""

import pytest
import torch
from torch import Tensor

from glmd.losses.positions import rows_at


def batch(*tail: int) -> tuple[Tensor, Tensor]:
    """(3, 5, ...) values that ask for a gradient, and where they are valid."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, *tail, generator=generator, dtype=torch.float64, requires_grad=True)
    return values, torch.arange(5) < torch.tensor([[5], [0], [3]])


@pytest.mark.parametrize("tail", [(), (4,), (2, 3)])
def test_rows_and_their_gradient_are_those_of_a_boolean_mask(tail: tuple[int, ...]) -> None:
    values, valid = batch(*tail)
    positions = valid.flatten().nonzero()[:, 0]
    ours, expected = rows_at(values, positions), values[valid]
    assert torch.equal(ours, expected)
    weights = torch.randn_like(expected)
    found = [torch.autograd.grad((rows * weights).sum(), values)[0] for rows in (ours, expected)]
    assert torch.equal(*found) and not found[0][~valid].any()


def test_of_no_position_there_are_no_rows_and_the_gradient_is_zero() -> None:
    values, _ = batch(4)
    rows = rows_at(values, torch.zeros(0, dtype=torch.int64))
    assert rows.shape == (0, 4)
    assert torch.equal(torch.autograd.grad(rows.sum(), values)[0], torch.zeros_like(values))


def test_all_positions_are_no_copy() -> None:
    values, _ = batch(4)
    assert rows_at(values, torch.arange(15)).data_ptr() == values.data_ptr()
