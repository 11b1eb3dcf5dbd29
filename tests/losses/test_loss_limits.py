"""Limits, bounds and extremes of the losses on logits, their options, and those that look at labels."""

import inspect
import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from logit_cases import LEAST_CHOICES, OPTIONS, TEMPERED, formula, options_of, temperature_of
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from glmd.distillation.methods import parse_term
from glmd.errors import ConfigError
from glmd.losses import linear, rows
from glmd.losses.divergences import (
    adaptive_kl,
    alpha_beta,
    generalized_js,
    lk_hybrid,
    negative_log_acceptance,
    skew_kl,
    skew_reverse_kl,
    todi,
    total_variation,
)
from glmd.losses.head import Head
from glmd.losses.linear import linear_distillation_loss
from glmd.losses.logits import LOGIT_LOSSES, js_divergence, kl_divergence, reverse_kl
from glmd.losses.targets import bild, decoupled_kd, modified_targets, standardized_kl, taid

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def logits(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER = logits(0, 6, 20), logits(1, 6, 20)


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_every_option_of_a_loss_is_tried(loss: str) -> None:
    parameters = inspect.signature(LOGIT_LOSSES[loss]).parameters.values()
    options = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
    tried = OPTIONS.get(loss, {})
    assert options.keys() - {"temperature", "labels"} == tried.keys()
    assert all(tried[name] != options[name] for name in tried), "a default shows nothing"


# Limits


def test_the_generalized_divergence_ends_in_both_kls_and_is_the_jensen_shannon_divergence_between() -> None:
    js, of = partial(generalized_js, STUDENT, TEACHER, temperature=2.0), (STUDENT, TEACHER)
    close(js(beta=0.5), js_divergence(*of, temperature=2.0))
    for beta, end, share in ((0.0, kl_divergence, 1e-7), (1.0, reverse_kl, 1e-7)):
        close(js(beta=beta), end(*of, temperature=2.0))
        near = js(beta=abs(beta - share)) / share
        torch.testing.assert_close(near, end(*of, temperature=2.0), rtol=1e-3, atol=0)


def test_a_skewed_kl_ends_in_the_kl_and_is_bounded() -> None:
    for skewed, end in ((skew_kl, kl_divergence), (skew_reverse_kl, reverse_kl)):
        close(skewed(STUDENT, TEACHER, mixing=0.0), end(STUDENT, TEACHER))
        torch.testing.assert_close(skewed(STUDENT, TEACHER, mixing=1e-9), end(STUDENT, TEACHER), rtol=1e-3, atol=0)
        assert (skewed(1000 * STUDENT, 1000 * TEACHER, mixing=0.1) <= -math.log(0.1) + 1e-12).all()
    close(skew_kl(STUDENT, TEACHER), skew_reverse_kl(TEACHER, STUDENT))


def test_the_alpha_beta_divergence_holds_both_kls_and_the_hellinger_distance() -> None:
    of = (STUDENT, TEACHER)
    close(alpha_beta(*of, alpha=1.0, beta=0.0), kl_divergence(*of))
    close(alpha_beta(*of, alpha=0.0, beta=1.0), reverse_kl(*of))
    near = alpha_beta(*of, alpha=1.0, beta=1e-8)
    torch.testing.assert_close(near, kl_divergence(*of), rtol=1e-5, atol=0)
    p, q = TEACHER.softmax(-1), STUDENT.softmax(-1)
    close(alpha_beta(*of, alpha=0.5, beta=0.5), 2 * (p.sqrt() - q.sqrt()).square().sum(-1))
    for alpha, beta in ((0.2, 0.7), (2.0, 0.5), (0.0, 0.5), (0.3, 0.0)):
        close(alpha_beta(*of, alpha=alpha, beta=beta), alpha_beta(*of[::-1], alpha=beta, beta=alpha))
        assert (alpha_beta(*of, alpha=alpha, beta=beta) > 0).all()


def test_decoupled_parts_with_their_own_weights_are_the_kl() -> None:
    of = (STUDENT, TEACHER)
    rest = 1 - (TEACHER / 3).softmax(-1).amax(-1)
    target_part = decoupled_kd(*of, alpha=1.0, beta=0.0, temperature=3.0)
    rest_part = decoupled_kd(*of, alpha=0.0, beta=1.0, temperature=3.0)
    close(target_part + rest * rest_part, kl_divergence(*of, temperature=3.0))
    close(decoupled_kd(*of, temperature=3.0), target_part + 8 * rest_part)


def test_mixed_kls_lie_between_both() -> None:
    first, second = kl_divergence(STUDENT, TEACHER), reverse_kl(STUDENT, TEACHER)
    mixed = adaptive_kl(STUDENT, TEACHER)
    assert ((torch.minimum(first, second) <= mixed) & (mixed <= torch.maximum(first, second))).all()
    near = TEACHER + 1e-4 * STUDENT  # the weights of a token differ by half its log ratio, which is worth as much again
    both = kl_divergence(near, TEACHER) + reverse_kl(near, TEACHER)
    torch.testing.assert_close(todi(near, TEACHER), both, rtol=1e-3, atol=0)


def test_the_head_is_up_to_half_of_the_teachers_probability_and_at_least_its_likeliest_token() -> None:
    def share(teacher: list[float], student: list[float]) -> float:
        """Of the forward KL, from what is computed."""
        s, t = (torch.tensor([each], dtype=torch.float64).log() for each in (student, teacher))
        first, second = kl_divergence(s, t).item(), reverse_kl(s, t).item()
        return (adaptive_kl(s, t).item() - second) / (first - second)

    assert share([0.7, 0.2, 0.1], [0.5, 0.3, 0.2]) == pytest.approx(0.5)  # 0.2 of 0.4
    assert share([0.3, 0.15, 0.25, 0.3], [0.25, 0.2, 0.3, 0.25]) == pytest.approx(0.5)  # two are equally likely
    assert share([0.1, 0.1, 0.3, 0.5], [0.2, 0.1, 0.3, 0.4]) == pytest.approx(0.5)  # 0.5 is the head
    assert share([0.2, 0.29, 0.31, 0.2], [0.3, 0.2, 0.1, 0.4]) == pytest.approx(0.21 / 0.6)


def test_total_variation_is_what_acceptance_leaves_and_the_hybrid_begins_with_the_kl() -> None:
    rejected = total_variation(STUDENT, TEACHER)
    close(rejected, 1 - torch.exp(-negative_log_acceptance(STUDENT, TEACHER)))
    apart = 40 * torch.eye(20, dtype=torch.float64)[:2]
    close(lk_hybrid(apart[:1], apart[1:]), kl_divergence(apart[:1], apart[1:]))
    weight = torch.exp(-3 * (1 - rejected))
    close(lk_hybrid(STUDENT, TEACHER), weight * kl_divergence(STUDENT, TEACHER) + (1 - weight) * rejected)


def test_standardized_logits_have_no_level_and_no_scale() -> None:
    close(standardized_kl(5 * STUDENT + 3, TEACHER / 4 - 1), standardized_kl(STUDENT, TEACHER))
    flat = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    values = standardized_kl(flat, TEACHER[:2, :4])
    values.sum().backward()
    assert values.isfinite().all() and flat.grad is not None and flat.grad.isfinite().all()


def test_only_the_top_logits_of_either_model_are_compared() -> None:
    teacher = torch.tensor([[9.0, 8.0, 7.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    student = torch.tensor([[9.0, 8.5, 7.0, 1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    bild(student, teacher, k=3).sum().backward()
    assert student.grad is not None and student.grad[0, :3].all() and not student.grad[0, 3:].any()
    close(bild(student, teacher, k=50), bild(student, teacher, k=6))


def test_taid_begins_near_the_student_and_ends_at_the_teacher() -> None:
    of = (STUDENT, TEACHER)
    close(taid(*of, progress=1.0, temperature=2.0), kl_divergence(*of, temperature=2.0))
    assert taid(*of, progress=0.0, start=0.0).abs().max() < 1e-12
    found = [taid(*of, progress=at).sum() for at in (0.0, 0.3, 0.6, 1.0)]
    assert found == sorted(found)
    student = STUDENT.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(taid(student, TEACHER, progress=0.5, temperature=2.0).sum(), student)
    target = ((0.3 * STUDENT + 0.7 * TEACHER) / 2).softmax(-1)
    close(gradient, 2 * ((STUDENT / 2).softmax(-1) - target))


# Labels


def test_decoupled_kd_takes_the_label_where_there_is_one_and_else_the_teachers_choice() -> None:
    labels = torch.tensor([3, -100, 0, 19, -100, 7])
    found = decoupled_kd(STUDENT, TEACHER, labels=labels, alpha=0.5, beta=2.0)
    for i, label in enumerate(labels.tolist()):
        target = {} if label < 0 else {"label": label}
        row = formula("decoupled_kd", STUDENT[i : i + 1], TEACHER[i : i + 1], alpha=0.5, beta=2.0, **target)
        close(found[i : i + 1], row)


def test_modified_targets_mix_in_the_least_of_the_label_that_lets_it_lead() -> None:
    said = [[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.45, 0.4, 0.15], [0.2, 0.7, 0.1]]
    teacher = torch.tensor(said, dtype=torch.float64).log()
    labels, student = torch.tensor([1, 0, 0, -100]), logits(3, 4, 3).requires_grad_()
    share = (0.7 - 0.2 + 0.25) / (1 + 0.7 - 0.2), (0.4 - 0.45 + 0.25) / (1 + 0.4 - 0.45)
    targets = torch.tensor(
        [
            [0.7 * (1 - share[0]), 0.2 * (1 - share[0]) + share[0], 0.1 * (1 - share[0])],
            [0.7, 0.2, 0.1],  # leads by more than that already
            [0.45 * (1 - share[1]) + share[1], 0.4 * (1 - share[1]), 0.15 * (1 - share[1])],
            [0.2, 0.7, 0.1],  # no label
        ],
        dtype=torch.float64,
    )
    assert targets[0, 1] - targets[0, 0] == pytest.approx(0.25) and targets[2, 0] - targets[2, 1] == pytest.approx(0.25)
    found = modified_targets(student, teacher, labels=labels, threshold=0.25)
    close(found, kl_divergence(student, targets.log()), atol=1e-10)
    ours, exact = (
        torch.autograd.grad(each.sum(), student)[0] for each in (found, kl_divergence(student, targets.log()))
    )
    close(ours, exact)


@pytest.mark.parametrize("far", [1e2, 1e4])
def test_a_label_that_the_teacher_rules_out_has_a_finite_loss(far: float) -> None:
    student, teacher = torch.tensor([[0.0, far, 0.0]], requires_grad=True), torch.tensor([[0.0, 0.0, far]])
    values = modified_targets(student, teacher, labels=torch.tensor([0]))
    values.sum().backward()
    assert student.grad is not None and values.isfinite().all() and student.grad.isfinite().all()


@pytest.mark.parametrize("loss", [decoupled_kd, modified_targets])
def test_choices_that_are_padding_have_no_part_where_labels_are_looked_at(loss: Any) -> None:
    labels, padding = torch.tensor([0, 2, -100, 1, 1, 0]), torch.full((6, 2), -math.inf, dtype=torch.float64)
    student = torch.cat([STUDENT[:, :3], padding], dim=1).requires_grad_()
    values = loss(student, torch.cat([TEACHER[:, :3], padding], dim=1), labels=labels)
    close(values, loss(STUDENT[:, :3], TEACHER[:, :3], labels=labels))
    values.sum().backward()
    assert student.grad is not None and student.grad.isfinite().all() and not student.grad[:, 3:].any()


# Extremes


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_ten_thousand_apart_give_finite_losses_and_gradients(loss: str, dtype: torch.dtype) -> None:
    """Of functions on whole logits, and of the chunked loss on hidden states that are these logits."""
    student, teacher = torch.zeros(5, 12), torch.zeros(5, 12)
    student[0, 3] = teacher[0, 7] = 1e4  # each is sure of another one
    student[1, 3] = -1e4
    teacher[2, :6], student[2, 6:] = 1e4, 1e4  # no token in common
    student[3], teacher[3] = torch.linspace(-1e4, 1e4, 12), torch.linspace(1e4, -1e4, 12)
    student[4], teacher[4] = torch.linspace(-1e4, 1e4, 12), torch.linspace(-1e4, 1e4, 12)
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    values = LOGIT_LOSSES[loss](student, teacher, **options_of(loss))
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert values.isfinite().all() and gradient.isfinite().all()
    exact = LOGIT_LOSSES[loss](student.detach().double(), teacher.double(), **options_of(loss))
    torch.testing.assert_close(values.double(), exact, rtol=1e-4, atol=1e-5)
    sides = student, Head(torch.eye(12, dtype=dtype)), teacher, Head(torch.eye(12, dtype=dtype))
    total = linear_distillation_loss(*sides, loss=loss, options=OPTIONS.get(loss, {}))
    (of_rows,) = torch.autograd.grad(total, student)
    rtol = 1e-3 if loss == "js_divergence" else 1e-4
    torch.testing.assert_close(total, values.sum(), rtol=rtol, atol=1e-5)
    assert of_rows.isfinite().all()


BOUNDED = ("js_divergence", "generalized_js", "skew_kl", "total_variation", "negative_log_acceptance", "alpha_beta")


@pytest.mark.parametrize("loss", BOUNDED)
def test_a_choice_that_one_model_alone_rules_out_costs_no_more_than_the_bound(loss: str) -> None:
    apart = STUDENT.clone(), TEACHER.clone()
    apart[0][:3, 4], apart[1][3:, 5] = -math.inf, -math.inf
    student = apart[0].requires_grad_()
    values = LOGIT_LOSSES[loss](student, apart[1], **options_of(loss))
    values.sum().backward()
    assert values.isfinite().all() and student.grad is not None
    if loss != "js_divergence":
        assert student.grad.isfinite().all()


def test_a_choice_that_the_teacher_alone_rules_out_is_nothing_to_the_kl() -> None:
    teacher = TEACHER.clone()
    teacher[:, 5] = -math.inf
    for loss in (partial(alpha_beta, alpha=1.0, beta=0.0), partial(generalized_js, beta=0.0), skew_kl, taid):
        more = {"progress": 1.0} if loss is taid else {"mixing": 0.0} if loss is skew_kl else {}
        student = STUDENT.clone().requires_grad_()
        values = loss(student, teacher, **more)
        close(values, kl_divergence(STUDENT, teacher))
        (gradient,) = torch.autograd.grad(values.sum(), student)
        close(gradient, STUDENT.softmax(-1) - teacher.softmax(-1))


@pytest.mark.parametrize("loss", [loss for loss in LOGIT_LOSSES if loss != "cross_entropy"])
def test_an_example_of_a_single_choice_has_no_loss(loss: str) -> None:
    padding = torch.full((2, 3), -math.inf)
    student = torch.cat([torch.tensor([[1.0], [5.0]]), padding], dim=1).requires_grad_()
    teacher = torch.cat([torch.tensor([[1.0], [5.0]]), padding], dim=1)
    values = LOGIT_LOSSES[loss](student, teacher, **options_of(loss))
    values.sum().backward()
    assert student.grad is not None and values.abs().max() == 0 and student.grad.abs().max() == 0


# Options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": "generalized_js", "beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        ({"loss": "generalized_js", "beta": math.nan}, r"beta must be in \[0, 1\], got nan"),
        ({"loss": "generalized_js", "gamma": 0.5}, "gamma has no effect on lm_logits generalized_js; known: beta"),
        ({"loss": "skew_kl", "mixing": 1}, "mixing must be at least 0 and below 1, got 1.0"),
        ({"loss": "skew_reverse_kl", "mixing": -0.1}, "mixing must be at least 0 and below 1, got -0.1"),
        ({"loss": "alpha_beta", "alpha": -1}, "alpha must be at least 0 and finite, got -1.0"),
        ({"loss": "alpha_beta", "alpha": 0, "beta": 0}, "alpha and beta must not both be 0"),
        ({"loss": "decoupled_kd", "beta": math.inf}, "beta must be at least 0 and finite, got inf"),
        ({"loss": "decoupled_kd", "labels": [1]}, "labels has no effect on lm_logits decoupled_kd"),
        ({"loss": "bild", "k": 2}, "k must be at least 3, got 2"),
        ({"loss": "bild", "k": 3.5}, "k must be a whole number, got 3.5"),
        ({"loss": "taid", "start": 0.9, "end": 0.5}, "0 <= start <= end <= 1 and end above 0, got 0.9 and 0.5"),
        ({"loss": "taid", "start": 0, "end": 0}, "end above 0"),
        ({"loss": "taid", "progress": 0.5}, "progress has no effect on lm_logits taid"),
        ({"loss": "total_variation", "temperature": 2}, "temperature has no effect on lm_logits total_variation"),
        ({"loss": "lk_hybrid", "temperature": 1}, "temperature has no effect on lm_logits lk_hybrid"),
        ({"loss": "modified_targets"}, "'modified_targets' does not fit lm_logits"),
        (
            {"loss": "modified_targets", "signal": "task_logits", "threshold": 1},
            "threshold must be at least 0 and below 1",
        ),
    ],
)
def test_an_option_without_sense_is_refused_in_one_line_before_anything_runs(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        parse_term({"signal": "lm_logits", **given}, "my.yaml: task_lm[0]", "task_lm", Path("my.yaml"))
    assert str(refused.value).startswith("my.yaml: task_lm[0].") and "\n" not in str(refused.value)


@pytest.mark.parametrize("loss", ["bild", "standardized_kl"])
def test_of_two_choices_nothing_would_be_learned(loss: str) -> None:
    assert LEAST_CHOICES[loss] == 3
    with pytest.raises(ConfigError, match=f"loss {loss} needs at least 3 choices, got 2"):
        LOGIT_LOSSES[loss](torch.zeros(4, 2), torch.zeros(4, 2))


# Memory


@cache
def peak_bytes(loss: str, tokens: int, words: int = 1000) -> int:
    """The most that a call holds at once beside its inputs and their gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, theirs, their_weight = (
        torch.randn(size, 4, generator=generator) for size in (tokens, words, tokens, words)
    )
    leaves = hidden.requires_grad_(), Head(weight.requires_grad_())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        linear_distillation_loss(*leaves, theirs, Head(their_weight), loss=loss, options=OPTIONS.get(loss, {}))
    events: list[Any] = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most - 4 * 4 * (tokens + words)


@pytest.mark.parametrize("loss", [loss for loss in LOGIT_LOSSES if loss != "js_divergence"])
def test_no_loss_takes_more_memory_than_the_kl_or_more_for_more_tokens(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a few numbers of each token. `js_divergence` takes 400 rows more, as before."""
    monkeypatch.setattr(linear, "chunk_tokens", lambda *_: 64)
    monkeypatch.setitem(rows.GRAPH_NUMBERS, "cpu", 1)  # blocks of four rows, as of a vocabulary of more than 32,768
    few, many = peak_bytes(loss, 64), peak_bytes(loss, 256)
    assert many - few <= 192 * 64
    assert many <= peak_bytes("kl_divergence", 256) + 64 * 64


def test_the_temperature_is_an_option_of_all_losses_but_those_of_acceptance_and_squares() -> None:
    without = {"mse", "centered_mse", "total_variation", "negative_log_acceptance", "lk_hybrid"}
    assert set(LOGIT_LOSSES) - set(TEMPERED) == without
    assert temperature_of("mse", 3.0) == 1.0
