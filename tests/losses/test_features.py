"""Losses on hidden states and attentions: values by hand, what does not exist, and what is refused."""

import pytest
import torch
from torch import Tensor

from glmd.losses.features import ATTENTION_LOSSES, HIDDEN_LOSSES, attention_kl, attention_mse, hidden_cosine, hidden_mse

OF_STATES = [each for each in HIDDEN_LOSSES.values() if each.unit == "token" and not each.takes_all_layers]

N, A, S, H = 5, 2, 6, 4


def hidden(seed: int) -> Tensor:
    return torch.randn(N, H, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attentions(seed: int, keys: int = S) -> Tensor:
    """(N, A, S) probabilities, 0 for the keys from `keys` on."""
    scores = torch.randn(N, A, S, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores[..., keys:] = -torch.inf
    return scores.softmax(-1)


def test_hidden_losses_are_what_is_written_down_by_loops() -> None:
    ours, theirs = hidden(0), hidden(1)
    for n in range(N):
        x, y = ours[n].tolist(), theirs[n].tolist()
        squares = sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / H
        product = sum(a * b for a, b in zip(x, y, strict=True))
        lengths = sum(a * a for a in x) ** 0.5 * sum(b * b for b in y) ** 0.5
        assert hidden_mse(ours, theirs)[n].item() == pytest.approx(squares, abs=1e-12)
        assert hidden_cosine(ours, theirs)[n].item() == pytest.approx(1 - product / lengths, abs=1e-12)


def test_attention_losses_are_what_is_written_down_by_loops() -> None:
    ours, theirs = attentions(0), attentions(1)
    for n in range(N):
        cells = [(ours[n, a, s].item(), theirs[n, a, s].item()) for a in range(A) for s in range(S)]
        assert attention_mse(ours, theirs)[n].item() == pytest.approx(sum((q - p) ** 2 for q, p in cells) / (A * S))
        kl = sum(p * (torch.tensor(p).log() - torch.tensor(q).log()).item() for q, p in cells) / A
        assert attention_kl(ours, theirs)[n].item() == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize("loss", list(ATTENTION_LOSSES.values()))
def test_keys_that_do_not_exist_change_neither_value_nor_gradient(loss) -> None:
    ours, theirs = (attentions(seed, keys=4) for seed in (0, 1))
    whole, part = ours.clone().requires_grad_(), ours[..., :4].clone().requires_grad_()
    values, expected = loss(whole, theirs), loss(part, theirs[..., :4])
    torch.testing.assert_close(values, expected)
    values.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(whole.grad[..., :4], part.grad)
    assert whole.grad.isfinite().all()


@pytest.mark.parametrize("loss", [*OF_STATES, *ATTENTION_LOSSES.values()])
def test_a_student_equal_to_its_teacher_loses_nothing(loss) -> None:
    same = hidden(0) if loss in OF_STATES else attentions(0, keys=3)
    assert loss(same, same).shape == (N,) and loss(same, same).abs().max() < 1e-12


@pytest.mark.parametrize("loss", [*OF_STATES, *ATTENTION_LOSSES.values()])
def test_bfloat16_is_computed_in_float32_and_other_shapes_are_refused(loss) -> None:
    ours, theirs = (hidden(0), hidden(1)) if loss in OF_STATES else (attentions(0), attentions(1))
    narrow = [each.bfloat16() for each in (ours, theirs)]
    assert loss(*narrow).dtype == torch.float32
    torch.testing.assert_close(loss(*narrow), loss(*(each.float() for each in narrow)))
    with pytest.raises(ValueError, match="one shape"):
        loss(ours, theirs[..., :2])
