"""Losses on logits and labels against their formulas in float64."""

import math
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from logit_cases import LEAST_CHOICES, OF_PROBABILITIES, TEMPERED, ZERO_FOR_EQUALS, formula, options_of
from torch import Tensor
from torch.nn import functional

from glmd.errors import ConfigError
from glmd.losses.labels import LABEL_LOSSES, hard_cross_entropy
from glmd.losses.logits import LOGIT_LOSSES, centered_mse, cross_entropy, js_divergence, kl_divergence, mse, reverse_kl


def logits(seed: int, *shape: int, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("name", LOGIT_LOSSES)
@settings(max_examples=8, deadline=None)
@given(temperature=st.floats(1.0, 20.0), n=st.integers(0, 5), k=st.integers(1, 40), seed=st.integers(0, 999))
@example(temperature=2.0, n=4, k=12, seed=0)
def test_a_loss_and_its_gradient_equal_the_formula(name: str, temperature: float, n: int, k: int, seed: int) -> None:
    k = max(k, LEAST_CHOICES.get(name, 1))
    student, teacher = logits(seed, n, k).requires_grad_(), logits(seed + 1, n, k)
    twin = student.detach().clone().requires_grad_()
    ours = LOGIT_LOSSES[name](student, teacher, **options_of(name, temperature))
    expected = formula(name, twin, teacher, **options_of(name, temperature))
    factors = torch.arange(1.0, n + 1, dtype=torch.float64)
    (ours * factors).sum().backward()
    (expected * factors).sum().backward()
    assert ours.shape == (n,)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(student.grad, twin.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in LOGIT_LOSSES if name != "bild"])  # of equal ones any may lead
def test_float32_is_kept_and_bfloat16_is_widened_before_the_softmax(name: str) -> None:
    student, teacher = logits(0, 8, 5000, dtype=torch.bfloat16), logits(1, 8, 5000, dtype=torch.bfloat16)
    ours = LOGIT_LOSSES[name](student, teacher, **options_of(name, 15.0))
    expected = formula(name, student.double(), teacher.double(), **options_of(name, 15.0))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ZERO_FOR_EQUALS)
def test_a_student_equal_to_the_teacher_has_zero_loss_and_gradient(name: str) -> None:
    student = logits(0, 6, 50, dtype=torch.float32).requires_grad_()
    values = LOGIT_LOSSES[name](student, student.detach().clone(), **options_of(name, 4.0))
    values.sum().backward()
    assert student.grad is not None
    assert values.abs().max() == 0 or (name == "negative_log_acceptance" and values.abs().max() < 1e-6)
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", [name for name in OF_PROBABILITIES if name != "taid"])
def test_adding_a_constant_to_a_row_changes_nothing(name: str) -> None:
    loss = partial(LOGIT_LOSSES[name], **options_of(name, 3.0))
    student, teacher = logits(0, 6, 50), logits(1, 6, 50)
    shift = logits(2, 6, 1, scale=20.0)
    torch.testing.assert_close(loss(student + shift, teacher), loss(student, teacher))
    torch.testing.assert_close(loss(student, teacher + shift), loss(student, teacher))


def test_the_kl_is_zero_for_a_student_off_by_a_constant_but_the_mse_is_not() -> None:
    teacher = logits(0, 4, 30)
    assert kl_divergence(teacher + 2.0, teacher, temperature=15.0).abs().max() < 1e-10
    torch.testing.assert_close(mse(teacher + 2.0, teacher), torch.full((4,), 4.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kl_at_temperature_15_is_half_the_variance_of_the_difference(dtype: torch.dtype) -> None:
    teacher = logits(0, 16, 30592, scale=3.0)
    student = teacher + logits(1, 16, 30592, scale=1.0)
    half_variance = (student - teacher).var(-1, correction=0) / 2
    ours = kl_divergence(student.to(dtype), teacher.to(dtype), temperature=15.0).double()
    assert ((ours / half_variance - 1).abs() < 0.01).all()


def test_the_kl_at_a_high_temperature_is_half_the_centered_mse() -> None:
    student, teacher = logits(0, 4, 50), logits(1, 4, 50)
    expected = centered_mse(student, teacher) / 2
    torch.testing.assert_close(kl_divergence(student, teacher, temperature=3000.0), expected, rtol=0.01, atol=0)
    torch.testing.assert_close(centered_mse(student + 7, teacher), centered_mse(student, teacher))


def test_the_jensen_shannon_divergence_is_symmetric_and_below_log_2() -> None:
    student, teacher = logits(0, 6, 50, scale=30.0), logits(1, 6, 50, scale=30.0)
    ours = js_divergence(student, teacher)
    torch.testing.assert_close(ours, js_divergence(teacher, student))
    assert ((ours > 0.1) & (ours < math.log(2) + 1e-12)).all()


def test_soft_cross_entropy_has_the_gradient_of_the_kl() -> None:
    student, teacher = logits(0, 5, 20).requires_grad_(), logits(1, 5, 20)
    (first,) = torch.autograd.grad(kl_divergence(student, teacher, temperature=3.0).sum(), student)
    (second,) = torch.autograd.grad(cross_entropy(student, teacher, temperature=3.0).sum(), student)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_choices_padded_with_minus_infinity_do_not_exist(name: str) -> None:
    student, teacher = logits(0, 4, 3), logits(1, 4, 3)
    padding = torch.full((4, 2), -math.inf, dtype=torch.float64)
    padded = torch.cat([student, padding], dim=1).requires_grad_()
    student.requires_grad_()
    expected = LOGIT_LOSSES[name](student, teacher, **options_of(name, 2.0))
    ours = LOGIT_LOSSES[name](padded, torch.cat([teacher, padding], dim=1), **options_of(name, 2.0))
    torch.testing.assert_close(ours, expected)
    expected.sum().backward()
    ours.sum().backward()
    assert padded.grad is not None
    torch.testing.assert_close(padded.grad[:, :3], student.grad)
    assert padded.grad[:, 3:].abs().max() == 0


def test_a_choice_the_student_rules_out_but_the_teacher_does_not_costs_infinity() -> None:
    student, teacher = torch.tensor([[0.0, -math.inf]]), torch.zeros(1, 2)
    assert kl_divergence(student, teacher).item() == math.inf
    assert reverse_kl(student, teacher).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", LOGIT_LOSSES)
@pytest.mark.parametrize("shape", [(4, 1), (1, 5), (5,), (4, 6)])
def test_shapes_that_differ_are_refused_even_if_they_broadcast(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"one shape \(N, K\), got \(4, 5\) and"):
        LOGIT_LOSSES[name](torch.zeros(4, 5), torch.zeros(shape), **options_of(name))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", TEMPERED)
def test_a_temperature_that_is_no_temperature_is_refused(name: str, temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature must be above 0"):
        LOGIT_LOSSES[name](torch.zeros(1, 3), torch.zeros(1, 3), **options_of(name, temperature))


def test_hard_cross_entropy_is_minus_the_log_probability_of_the_label() -> None:
    scores, labels = logits(0, 6, 9), torch.tensor([0, 8, 3, 3, 1, 2])
    expected = -scores.softmax(-1)[torch.arange(6), labels].log()
    torch.testing.assert_close(hard_cross_entropy(scores, labels), expected)
    torch.testing.assert_close(
        LABEL_LOSSES["hard_cross_entropy"](scores.bfloat16(), labels).double(), expected, rtol=0.02, atol=0.02
    )
    assert hard_cross_entropy(scores.bfloat16(), labels).dtype == torch.float32


def test_an_ignored_label_gives_zero_and_no_gradient() -> None:
    scores = logits(0, 3, 5).requires_grad_()
    values = hard_cross_entropy(scores, torch.tensor([2, -100, 4]))
    values.sum().backward()
    assert scores.grad is not None
    assert values[1] == 0
    assert scores.grad[1].abs().max() == 0
    assert scores.grad[0].abs().max() > 0


def test_hard_cross_entropy_ignores_padded_choices() -> None:
    scores, labels = logits(0, 3, 4), torch.tensor([0, 1, 3])
    padded = functional.pad(scores, (0, 2), value=-math.inf).requires_grad_()
    values = hard_cross_entropy(padded, labels)
    values.sum().backward()
    assert padded.grad is not None
    torch.testing.assert_close(values, hard_cross_entropy(scores, labels))
    assert padded.grad[:, 4:].abs().max() == 0


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(N, C\) and \(N,\), got \(3, 5\) and \(2,\)"):
        hard_cross_entropy(torch.zeros(3, 5), torch.zeros(2, dtype=torch.int64))
