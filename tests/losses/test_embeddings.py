"""Losses on vectors of sentences against plain loops in float64."""

import pytest
import torch
from torch import Tensor

from glmd.distillation.methods import load_method
from glmd.errors import ConfigError
from glmd.losses.embeddings import EMBEDDING_LOSSES


def vectors(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cos(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def plain(name: str, ours: Tensor, theirs: Tensor) -> list[Tensor]:
    """The formula, one number after another."""
    count = len(ours)
    if name == "cosine":
        return [1 - cos(ours[i], theirs[i]) for i in range(count)]
    if name == "mse":
        return [sum((a - b) ** 2 for a, b in zip(ours[i], theirs[i], strict=True)) / len(ours[i]) for i in range(count)]
    found = []
    for i in range(count):
        others = [j for j in range(count) if j != i]
        p, q = ([(cos(each[i], each[j]) / 0.05).exp() for j in others] for each in (theirs, ours))
        found.append(sum(a / sum(p) * ((a / sum(p)) / (b / sum(q))).log() for a, b in zip(p, q, strict=True)))
    return found


@pytest.mark.parametrize("name", EMBEDDING_LOSSES)
def test_a_loss_and_its_gradient_equal_the_formula(name):
    ours, theirs = vectors(0, 5, 7).requires_grad_(), vectors(1, 5, 7)
    twin = ours.detach().clone().requires_grad_()
    found, expected = EMBEDDING_LOSSES[name](ours, theirs), torch.stack(plain(name, twin, theirs))
    factors = torch.arange(1.0, 6.0, dtype=torch.float64)
    (found * factors).sum().backward()
    (expected * factors).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.grad, twin.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", EMBEDDING_LOSSES)
def test_a_student_equal_to_the_teacher_has_zero_loss_and_gradient(name):
    ours = vectors(0, 5, 7).float().requires_grad_()
    found = EMBEDDING_LOSSES[name](ours, ours.detach().clone())
    found.sum().backward()
    assert found.abs().max() < 1e-6 and ours.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", EMBEDDING_LOSSES)
def test_bfloat16_is_widened_also_under_autocast(name):
    ours, theirs = vectors(0, 5, 7).bfloat16(), vectors(1, 5, 7).bfloat16()
    expected = EMBEDDING_LOSSES[name](ours.double(), theirs.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = EMBEDDING_LOSSES[name](ours, theirs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_similarities_in_a_batch_are_blind_to_rotations_and_take_any_width():
    theirs = vectors(0, 6, 4)
    turned = theirs @ torch.linalg.qr(vectors(1, 9, 4)).Q.T
    assert EMBEDDING_LOSSES["in_batch_similarity"](turned, theirs).abs().max() < 1e-12
    assert EMBEDDING_LOSSES["in_batch_similarity"](theirs[:1], theirs[:1]).tolist() == [0.0]


def test_a_method_of_similarities_couples_the_texts_of_a_batch(write):
    assert load_method("embeddings")["task_soft_labels"].couples
    alone = write("own.yaml", "task_soft_labels: [{signal: sentence_embeddings, loss: cosine}]\n")
    assert not load_method(str(alone))["task_soft_labels"].couples
    wrong = write("wrong.yaml", "pretraining: [{signal: sentence_embeddings, loss: cosine}]\n")
    with pytest.raises(ConfigError, match="signal 'sentence_embeddings' is not possible here"):
        load_method(str(wrong))
