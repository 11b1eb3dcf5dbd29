"""The chunked loss against full logits in float64: values and gradients."""

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_cases import (
    LEAST_CHOICES,
    OF_PROBABILITIES,
    OPTIONS,
    WITH_CONSTANTS,
    WITH_JUMPS,
    ZERO_FOR_EQUALS,
    options_of,
    temperature_of,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glmd.errors import ConfigError
from glmd.losses import linear, rows
from glmd.losses.head import Head
from glmd.losses.labels import LABEL_LOSSES, hard_cross_entropy
from glmd.losses.linear import chunk_tokens, linear_cross_entropy, linear_distillation_loss
from glmd.losses.logits import LOGIT_LOSSES, NOT_SCALED, LogitScaling, merge_words
from glmd.losses.rows import ROW_LOSSES, LossSpec


@dataclass(frozen=True)
class Case:
    """Inputs of one call, student first."""

    student_hidden: Tensor  # (N, H)
    student_weight: Tensor  # (K, H)
    teacher_hidden: Tensor  # (N, H of the teacher)
    teacher_weight: Tensor  # (K, H of the teacher)
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    token_weights: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Case":
        """Fresh leaves in another dtype; the student's require a gradient."""
        fresh: dict[str, Any] = {name: x.detach().to(dtype, copy=True) for name, x in self.tensors.items()}
        for name in fresh:
            fresh[name].requires_grad_(name.startswith("student"))
        return replace(self, **fresh)

    def sides(self, student: LogitScaling = NOT_SCALED, **teacher: Any) -> tuple[Tensor, Head, Tensor, Head]:
        """The positional arguments of the loss. teacher: `scaling` and `merged_into` of its head."""
        student_head = Head(self.student_weight, self.student_bias, student)
        return (
            self.student_hidden,
            student_head,
            self.teacher_hidden,
            Head(self.teacher_weight, self.teacher_bias, **teacher),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if x is not None}

    @property
    def gradients(self) -> list[Tensor]:
        leaves = [self.student_hidden, self.student_weight, self.student_bias]
        return [x.grad for x in leaves if x is not None and x.grad is not None]


def make(
    n: int = 23,
    k: int = 37,
    student_size: int = 5,
    teacher_size: int = 7,
    *,
    seed: int = 0,
    biases: str = "",
    weights: bool = True,
    scale: float = 2.0,
) -> Case:
    """Random inputs with logits of standard deviation `scale`; `biases` names the models that have one."""
    source = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    token_weights = (randn(n) > -0.5) * randn(n).abs() if weights else None
    return Case(
        randn(n, student_size),
        randn(k, student_size) * scale / math.sqrt(student_size),
        randn(n, teacher_size),
        randn(k, teacher_size) * scale / math.sqrt(teacher_size),
        randn(k) if "student" in biases else None,
        randn(k) if "teacher" in biases else None,
        token_weights,
    )


def chunked(case: Case, loss: str = "kl_divergence", temperature: float = 1.0) -> Tensor:
    return linear_distillation_loss(
        *case.sides(),
        temperature=temperature,
        loss=loss,
        options=OPTIONS.get(loss, {}),
        token_weights=case.token_weights,
    )


def plain(case: Case, loss: str = "kl_divergence", temperature: float = 1.0) -> Tensor:
    """Full logits in the inputs' dtype."""
    student = torch.nn.functional.linear(case.student_hidden, case.student_weight, case.student_bias)
    teacher = torch.nn.functional.linear(case.teacher_hidden, case.teacher_weight, case.teacher_bias)
    values = LOGIT_LOSSES[loss](student, teacher, **options_of(loss, temperature))
    return values.sum() if case.token_weights is None else (values * case.token_weights).sum()


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


def assert_equal_to_plain(case: Case, loss: str, temperature: float) -> None:
    ours, exact = case.to(torch.float64), case.to(torch.float64)
    value, expected = chunked(ours, loss, temperature), plain(exact, loss, temperature)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-11)
    assert len(ours.gradients) == len(exact.gradients)
    for gradient, twin in zip(ours.gradients, exact.gradients, strict=True):
        torch.testing.assert_close(gradient, twin, rtol=1e-9, atol=1e-11)


@contextlib.contextmanager
def chunks_of(tokens: int) -> Iterator[None]:
    """As a context and not a fixture: hypothesis runs many examples inside one test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "chunk_tokens", lambda *_: tokens)
        yield


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
@pytest.mark.parametrize("words", [37, 64, 150])
def test_rows_that_fill_up_a_head_and_biases_within_the_products_change_nothing(
    loss: str, words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where matrices of another number of rows are slow."""
    monkeypatch.setattr(linear, "ALIGNED", {"cpu"})
    with chunks_of(8):
        assert_equal_to_plain(make(k=words, biases="student teacher"), loss, 1.0)
    case = make(k=words, biases="student").to(torch.float64)
    labels = torch.arange(23) % words
    logits = torch.nn.functional.linear(case.student_hidden, case.student_weight, case.student_bias)
    exact = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(*case.sides()[:2], labels), exact)


@pytest.mark.parametrize("loss", [*LOGIT_LOSSES, "hard_cross_entropy"])
@pytest.mark.parametrize("is_tensor", [True, False])
def test_a_factor_multiplies_the_loss_and_its_gradients(loss: str, is_tensor: bool) -> None:
    factor = torch.tensor(0.375, dtype=torch.float64) if is_tensor else 0.375

    def value_of(case: Case, **options: Any) -> Tensor:
        student, head, *teacher = case.sides()
        if loss == "hard_cross_entropy":
            return linear_cross_entropy(student, head, torch.arange(23) % 37, **options)
        return linear_distillation_loss(student, head, *teacher, loss=loss, options=OPTIONS.get(loss, {}), **options)

    ours, plain_one = (make(biases="student", weights=False).to(torch.float64) for _ in range(2))
    value, expected = value_of(ours, factor=factor), 0.375 * value_of(plain_one)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected)
    for gradient, twin in zip(ours.gradients, plain_one.gradients, strict=True):
        torch.testing.assert_close(gradient, twin)


def test_a_gradient_that_is_written_down_is_that_of_a_loss() -> None:
    assert ROW_LOSSES.keys() <= {*LOGIT_LOSSES, *LABEL_LOSSES}


@settings(max_examples=60, deadline=None)
@given(
    loss=st.sampled_from(list(LOGIT_LOSSES)),
    temperature=st.sampled_from([1.0, 1.5, 4.0, 15.0, 20.0]),
    n=st.integers(0, 20),
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 6), st.integers(1, 6)),
    biases=st.sampled_from(["", "student", "teacher", "student teacher"]),
    weights=st.booleans(),
    chunk=st.integers(1, 24),
    seed=st.integers(0, 999),
)
def test_it_equals_full_logits_in_values_and_gradients(
    loss: str,
    temperature: float,
    n: int,
    sizes: tuple[int, int, int],
    biases: str,
    weights: bool,
    chunk: int,
    seed: int,
) -> None:
    case = make(n, max(sizes[0], LEAST_CHOICES.get(loss, 1)), *sizes[1:], seed=seed, biases=biases, weights=weights)
    with chunks_of(chunk):
        assert_equal_to_plain(case, loss, temperature_of(loss, temperature))


@settings(max_examples=60, deadline=None)
@given(
    loss=st.sampled_from(list(LOGIT_LOSSES)),
    temperature=st.sampled_from([1.0, 4.0, 15.0]),
    n=st.integers(0, 20),
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 6), st.integers(1, 6)),
    dropped=st.integers(0, 40),
    seed=st.integers(0, 999),
)
def test_merged_words_equal_the_logarithm_of_each_groups_sum(
    loss: str, temperature: float, n: int, sizes: tuple[int, int, int], dropped: int, seed: int
) -> None:
    temperature, sizes = temperature_of(loss, temperature), (max(sizes[0], LEAST_CHOICES.get(loss, 1)), *sizes[1:])
    case, more = (make(n, *sizes, seed=seed, biases="student teacher") for seed in (seed, seed + 1000))
    generator = torch.Generator().manual_seed(seed)
    words = sizes[0]
    merged_into = torch.randint(words, (dropped,), generator=generator)
    spare = torch.randint(words, (dropped,), generator=generator)
    weight = torch.cat([case.teacher_weight, more.teacher_weight[spare]])
    bias = torch.cat([case.teacher_bias, more.teacher_bias[spare]])
    probabilities = torch.nn.functional.linear(case.teacher_hidden, weight, bias).exp()
    groups = torch.cat([torch.arange(words), merged_into])
    logits = torch.stack([probabilities[:, groups == word].sum(-1) for word in range(words)], dim=-1).log()
    # A teacher of these very logits: its hidden states are they, and its map the identity.
    exact = replace(case, teacher_hidden=logits, teacher_weight=torch.eye(words).double(), teacher_bias=None)
    ours, exact = replace(case, teacher_weight=weight, teacher_bias=bias).to(torch.float64), exact.to(torch.float64)
    with chunks_of(8):
        value = linear_distillation_loss(
            *ours.sides(merged_into=merged_into),
            temperature=temperature,
            loss=loss,
            options=OPTIONS.get(loss, {}),
            token_weights=ours.token_weights,
        )
    expected = plain(exact, loss, temperature)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    for gradient, twin in zip(ours.gradients, exact.gradients, strict=True):
        torch.testing.assert_close(gradient, twin, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", OF_PROBABILITIES)
@pytest.mark.parametrize("gap", [0.01, 0.9, 1.1, 12.0, 17.0, 19.0, 60.0])
def test_models_that_disagree_wholly_have_a_right_and_finite_loss_in_float32(loss: str, gap: float) -> None:
    """One token, two words each of which one model is sure of."""
    student, teacher = torch.zeros(1, 50), torch.zeros(1, 50)
    student[0, 3], teacher[0, 7] = gap, gap
    one = torch.ones(1, 1)
    case = Case(one, student.t(), one, teacher.t())
    ours, exact = case.to(torch.float32), case.to(torch.float64)
    value, expected = chunked(ours, loss), plain(exact, loss)
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=2e-5, abs=2e-7)
    assert all(gradient.isfinite().all() for gradient in ours.gradients)
    if loss in WITH_JUMPS:  # of words on which both agree but for rounding
        return
    for gradient, twin in zip(ours.gradients, exact.gradients, strict=True):
        # Where both are sure the gradient all but vanishes: what is left of it is measured by the loss.
        torch.testing.assert_close(gradient.double(), twin, rtol=2e-4, atol=1e-5 * max(1.0, expected.item()))


def test_merging_overflows_nowhere() -> None:
    logits = torch.tensor([[500.0, -500.0, 400.0, 501.0], [-3e38, 0.0, 3e38, -3e38]])
    merged = merge_words(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(merged, torch.tensor([[501.3133, 400.0], [-3e38, 3e38]]), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("n", [7, 8, 9, 15, 16, 17])
@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_chunk_boundaries_do_not_show(loss: str, n: int) -> None:
    with chunks_of(8):
        assert_equal_to_plain(make(n, biases="student teacher"), loss, 1.0)


@pytest.mark.parametrize("n", [64, 65, 150])
@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_blocks_of_rows_within_a_chunk_do_not_show(loss: str, n: int) -> None:
    assert_equal_to_plain(make(n, biases="student teacher"), loss, 1.0)


SCALINGS = [LogitScaling(0.25), LogitScaling(3.0, 5.0), LogitScaling(1.0, 2.0)]


@settings(max_examples=60, deadline=None)
@given(
    loss=st.sampled_from(list(LOGIT_LOSSES)),
    scalings=st.tuples(*[st.sampled_from([NOT_SCALED, *SCALINGS])] * 2),
    n=st.integers(0, 20),
    biases=st.sampled_from(["", "student teacher"]),
    chunk=st.integers(1, 24),
    seed=st.integers(0, 999),
)
def test_scaled_and_capped_logits_equal_full_ones_in_values_and_gradients(
    loss: str, scalings: tuple[LogitScaling, LogitScaling], n: int, biases: str, chunk: int, seed: int
) -> None:
    case = make(n, seed=seed, biases=biases)
    ours, exact = case.to(torch.float64), case.to(torch.float64)
    temperature = temperature_of(loss, 3.0)
    with chunks_of(chunk):
        value = linear_distillation_loss(
            *ours.sides(scalings[0], scaling=scalings[1]),
            temperature=temperature,
            loss=loss,
            options=OPTIONS.get(loss, {}),
            token_weights=ours.token_weights,
        )
    logits = [
        scaling(torch.nn.functional.linear(hidden, weight, bias))
        for scaling, hidden, weight, bias in (
            (scalings[0], exact.student_hidden, exact.student_weight, exact.student_bias),
            (scalings[1], exact.teacher_hidden, exact.teacher_weight, exact.teacher_bias),
        )
    ]
    values = LOGIT_LOSSES[loss](*logits, **options_of(loss, temperature))
    expected = (values * exact.token_weights).sum()
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-11)
    for gradient, twin in zip(ours.gradients, exact.gradients, strict=True):
        torch.testing.assert_close(gradient, twin, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_scaled_and_capped_logits_are_as_exact_as_others(
    scaling: LogitScaling, dtype: torch.dtype, most: float
) -> None:
    case = make(40, 4000, 64, 64, scale=2.0 / scaling.factor).to(dtype)
    exact = case.to(torch.float64)
    for each in (case, exact):
        sides, weights = each.sides(scaling, scaling=scaling), each.token_weights
        linear_distillation_loss(*sides, temperature=15.0, token_weights=weights).backward()
    assert all(relative_error(*pair) < most for pair in zip(case.gradients, exact.gradients, strict=True))


def test_a_triton_that_does_not_work_is_warned_of_once_and_then_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(task: LossSpec) -> Any:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(linear.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "glmd.losses.triton_rows", SimpleNamespace(TritonRows=no_compiler))
    linear._triton_works.cache_clear()
    found = [linear._triton_works(torch.device("cpu"), torch.float32) for _ in range(3)]
    linear._triton_works.cache_clear()
    assert found == [False] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "Triton does not work on cpu in torch.float32, the loss runs in plain torch: no C compiler"
    ]


@pytest.mark.cuda
@pytest.mark.parametrize("loss", LOGIT_LOSSES)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_gpu_is_as_exact(loss: str, dtype: torch.dtype, most: float) -> None:
    temperature = temperature_of(loss, 15.0)
    case = make(600, 30523, 64, 64, biases="student teacher", scale=0.7).to(dtype)
    exact = case.to(torch.float64)
    on_gpu = replace(case, **{name: x.detach().cuda() for name, x in case.tensors.items()})
    for name in ("student_hidden", "student_weight", "student_bias"):
        getattr(on_gpu, name).requires_grad_()
    for each in (on_gpu, exact):
        chunked(each, loss, temperature).backward()
    assert all(relative_error(x.cpu(), twin) < most for x, twin in zip(on_gpu.gradients, exact.gradients, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 80),
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 6)),
    bias=st.booleans(),
    scaling=st.sampled_from([NOT_SCALED, *SCALINGS]),
    chunk=st.integers(1, 90),
    seed=st.integers(0, 999),
)
def test_the_loss_on_labels_equals_that_on_full_logits(
    n: int, sizes: tuple[int, int], bias: bool, scaling: LogitScaling, chunk: int, seed: int
) -> None:
    """A label of -100 has no part."""
    case = make(n, *sizes, seed=seed, biases="student" if bias else "")
    labels = torch.randint(-1, sizes[0], (n,), generator=torch.Generator().manual_seed(seed))
    labels[labels < 0] = -100
    ours, exact = case.to(torch.float64), case.to(torch.float64)
    with chunks_of(chunk):
        value = linear_cross_entropy(*ours.sides(scaling)[:2], labels)
    logits = scaling(torch.nn.functional.linear(exact.student_hidden, exact.student_weight, exact.student_bias))
    expected = hard_cross_entropy(logits, labels).sum()
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-11)
    for gradient, twin in zip(ours.gradients, exact.gradients, strict=True):
        torch.testing.assert_close(gradient, twin, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_loss_on_labels_is_as_exact_as_the_others(dtype: torch.dtype, most: float) -> None:
    case = make(40, 4000, 64, 64).to(dtype)
    exact = case.to(torch.float64)
    for each in (case, exact):
        linear_cross_entropy(*each.sides()[:2], torch.arange(40) * 99).backward()
    assert all(relative_error(*pair) < most for pair in zip(case.gradients, exact.gradients, strict=True))


@pytest.mark.parametrize("labels", [torch.zeros(22, dtype=torch.int64), torch.zeros(23), torch.zeros(23, 1).long()])
def test_labels_that_do_not_fit_are_refused(labels: Tensor) -> None:
    case = make()
    with pytest.raises(ValueError, match=r"labels must be \(23,\) int64, got"):
        linear_cross_entropy(*case.sides()[:2], labels)


def test_a_chunk_is_as_large_as_pays_on_its_device() -> None:
    chunks = {words: chunk_tokens(10**6, words, "cuda") for words in (1000, 15296, 30528, 128256, 10**6)}
    assert max(chunks.values()) == chunks[1000] == 8192
    buffers = {words: 2 * tokens * words for words, tokens in chunks.items()}
    assert max(buffers.values()) <= 2**29 and buffers[10**6] > 0.8 * 2**29
    assert all(0.7 * 2**28 < buffers[words] < 1.1 * 2**28 for words in (15296, 30528)) and chunks[128256] > 2000
    assert chunk_tokens(10**6, 128256, "cuda", 4) < 1100
    assert chunk_tokens(10**6, 128256, "cpu") == 512
    # The last chunk is no small remainder.
    assert [chunk_tokens(n, 1000, "cpu") for n in (0, 1, 512, 513, 715)] == [1, 64, 512, 320, 384]


@pytest.mark.parametrize("loss", [loss for loss in OF_PROBABILITIES if loss not in WITH_CONSTANTS])
def test_gradcheck_passes_in_float64(loss: str) -> None:
    case = make(5, 7, 3, 4, biases="student teacher").to(torch.float64)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked(
            replace(case, student_hidden=hidden, student_weight=weight, student_bias=bias),
            loss,
            temperature_of(loss, 3.0),
        )

    leaves = [x for name, x in case.tensors.items() if name.startswith("student")]
    with chunks_of(2):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_float32_is_exact_to_a_hundred_thousandth(loss: str) -> None:
    temperature = temperature_of(loss, 15.0)
    case = make(40, 4000, 24, 32, biases="student teacher")
    ours, exact = case.to(torch.float32), case.to(torch.float64)
    value, expected = chunked(ours, loss, temperature), plain(exact, loss, temperature)
    value.backward()
    expected.backward()
    assert value.dtype == torch.float32
    assert relative_error(value, expected) < 1e-5
    assert all(relative_error(*pair) < 1e-5 for pair in zip(ours.gradients, exact.gradients, strict=True))


def test_each_float32_value_at_temperature_15_is_exact_to_a_hundred_thousandth() -> None:
    """Where the rounding of the two normalizations does not cancel, single values err by 1e-4 here."""
    case = make(40, 15000, 64, 64, weights=False, scale=0.7)
    for i in range(40):
        token = slice(i, i + 1)
        one = replace(case, student_hidden=case.student_hidden[token], teacher_hidden=case.teacher_hidden[token])
        assert relative_error(chunked(one.to(torch.float32), temperature=15.0), plain(one, temperature=15.0)) < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_products_keep_the_gradient_at_temperature_15_where_a_bfloat16_softmax_loses_it(
    autocast: bool,
) -> None:
    # As in training: logits that differ by about 1 between the models, embeddings with a common component.
    case = make(64, 15000, 96, 96, scale=0.7)
    case = replace(case, student_weight=case.student_weight + 0.7 / math.sqrt(96)).to(torch.bfloat16)
    exact, ours, naive = case.to(torch.float64), case, case.to(torch.bfloat16)
    if autocast:
        ours, naive = case.to(torch.float32), case.to(torch.float32)
    plain(exact, temperature=15.0).backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = chunked(ours, temperature=15.0)
        logits = [
            naive.student_hidden @ naive.student_weight.t(),
            naive.teacher_hidden @ naive.teacher_weight.t(),
        ]
        assert {x.dtype for x in logits} == {torch.bfloat16}
        log_q, log_p = [(x / 15.0).log_softmax(-1) for x in logits]
        kl = 225 * torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        assert naive.token_weights is not None
        (kl * naive.token_weights).sum().backward()
    value.backward()
    assert value.dtype == torch.float32
    assert all(relative_error(*pair) < 2e-2 for pair in zip(ours.gradients, exact.gradients, strict=True))
    assert all(relative_error(*pair) > 0.2 for pair in zip(naive.gradients, exact.gradients, strict=True))
    assert [x.dtype for x in ours.gradients] == [torch.float32 if autocast else torch.bfloat16] * 2


def test_the_weight_gradient_of_many_bfloat16_chunks_is_summed_in_float32() -> None:
    case = make(512, 100, 16, 16, weights=False).to(torch.bfloat16)
    exact = case.to(torch.float64)
    with chunks_of(2):
        chunked(case, temperature=15.0).backward()
    plain(exact, temperature=15.0).backward()
    assert relative_error(case.gradients[1], exact.gradients[1]) < 1e-2


def test_products_stay_in_float32_under_autocast_if_an_input_is_float64() -> None:
    case = make(6, biases="student teacher")
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal_to_plain(case, "kl_divergence", 4.0)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_widened_because_a_logit_gradient_vanishes_in_it(autocast: bool) -> None:
    case = make(32, 15000, 16, 16)
    assert case.token_weights is not None
    case = replace(case, token_weights=case.token_weights * 1e-4).to(torch.float16)
    exact, ours = case.to(torch.float64), case.to(torch.float32) if autocast else case
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        value = chunked(ours, temperature=15.0)
    (value * 1e4).backward()
    (plain(exact, temperature=15.0) * 1e4).backward()
    assert all(relative_error(*pair) < 1e-3 for pair in zip(ours.gradients, exact.gradients, strict=True))


def test_a_float16_gradient_too_small_for_float16_survives_until_the_loss_scale() -> None:
    case = make(32, 500, 16, 16, weights=False).to(torch.float16)
    near = case.student_hidden.detach() + 2**-10 * torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    case = replace(case, teacher_hidden=near.half(), teacher_weight=case.student_weight.detach().clone())
    ours, exact = case.to(torch.float16), case.to(torch.float64)
    (chunked(ours, temperature=15.0) * 2.0**14).backward()
    (plain(exact, temperature=15.0) * 2.0**14).backward()
    assert relative_error(ours.gradients[0], exact.gradients[0]) < 1e-3


def test_a_cached_float16_teacher_serves_a_float32_student() -> None:
    case = make(9, 50, weights=False)
    mixed = replace(case.to(torch.float32), teacher_hidden=case.teacher_hidden.half())
    exact = replace(case.to(torch.float64), teacher_hidden=case.teacher_hidden.half().double())
    assert relative_error(chunked(mixed), plain(exact)) < 1e-5


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_a_token_of_weight_zero_has_no_part_whatever_it_holds(loss: str) -> None:
    case = make(12, biases="student teacher", weights=False)
    weights = torch.ones(12, dtype=torch.float64)
    weights[4:] = 0.0
    dirty = replace(case, token_weights=weights).to(torch.float64)
    with torch.no_grad():
        dirty.student_hidden[7], dirty.teacher_hidden[8] = math.nan, math.inf
    clean = replace(case, student_hidden=case.student_hidden[:4], teacher_hidden=case.teacher_hidden[:4]).to(
        torch.float64
    )
    with chunks_of(4):  # the padding fills whole chunks
        value, expected = chunked(dirty, loss), chunked(clean, loss)
        value.backward()
        expected.backward()
    assert torch.equal(value, expected)
    assert dirty.student_hidden.grad is not None
    assert clean.student_hidden.grad is not None
    assert torch.equal(dirty.student_hidden.grad[:4], clean.student_hidden.grad)
    assert torch.equal(dirty.student_hidden.grad[4:], torch.zeros(8, 5, dtype=torch.float64))
    assert torch.equal(dirty.gradients[1], clean.gradients[1])


@pytest.mark.parametrize("weights", [torch.zeros(6), torch.zeros(6, dtype=torch.bool), None])
def test_without_tokens_the_loss_is_zero_and_every_gradient_still_arrives(weights: Tensor | None) -> None:
    case = make(6 if weights is not None else 0, biases="student", weights=False).to(torch.float32)
    value = chunked(replace(case, token_weights=weights))
    value.backward()
    assert value.item() == 0
    assert [x.shape for x in case.gradients] == [case.student_hidden.shape, (37, 5), (37,)]
    assert all(torch.equal(x, torch.zeros_like(x)) for x in case.gradients)


def test_boolean_weights_select_tokens() -> None:
    case = make(10, weights=False)
    chosen = torch.arange(10) % 3 == 0
    selected = replace(case, student_hidden=case.student_hidden[chosen], teacher_hidden=case.teacher_hidden[chosen])
    torch.testing.assert_close(chunked(replace(case, token_weights=chosen)), plain(selected))


@pytest.mark.parametrize("loss", ZERO_FOR_EQUALS)
def test_a_student_equal_to_the_teacher_has_zero_loss_and_gradient(loss: str) -> None:
    same = make(9, 50, weights=False).to(torch.float32)
    same = replace(same, teacher_hidden=same.student_hidden, teacher_weight=same.student_weight)
    value = chunked(same, loss, temperature_of(loss, 15.0))
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert all(x.abs().max() < 1e-5 for x in same.gradients)


@pytest.mark.parametrize("loss", OF_PROBABILITIES)
def test_a_constant_added_to_a_model_s_logits_changes_nothing(loss: str) -> None:
    case = make(8, biases="student teacher")
    assert case.student_bias is not None
    assert case.teacher_bias is not None
    shifted = replace(case, student_bias=case.student_bias + 9.0, teacher_bias=case.teacher_bias - 4.0)
    temperature = temperature_of(loss, 4.0)
    torch.testing.assert_close(chunked(shifted, loss, temperature), chunked(case, loss, temperature))


def test_the_kl_at_temperature_15_is_half_the_variance_of_the_difference() -> None:
    case = make(4, 30592, 64, 64, weights=False)
    difference = case.student_hidden @ case.student_weight.t() - case.teacher_hidden @ case.teacher_weight.t()
    half_variance = difference.var(-1, correction=0).sum() / 2
    assert chunked(case.to(torch.float32), temperature=15.0).item() == pytest.approx(half_variance.item(), rel=0.01)


def test_splitting_the_tokens_changes_the_sum_by_less_than_a_millionth() -> None:
    case = make(96, 8000, 24, 24).to(torch.float32)
    whole = chunked(case, temperature=15.0).double()
    assert case.token_weights is not None
    parts = [
        replace(
            case,
            student_hidden=case.student_hidden[part],
            teacher_hidden=case.teacher_hidden[part],
            token_weights=case.token_weights[part],
        )
        for part in (slice(0, 17), slice(17, 60), slice(60, 96))
    ]
    split = sum(chunked(part, temperature=15.0).double() for part in parts)
    assert abs(split / whole - 1) < 1e-6


def test_a_later_factor_scales_the_gradient_each_time_backward_is_called() -> None:
    case, exact = make(biases="student").to(torch.float64), make(biases="student").to(torch.float64)
    factor = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    value = chunked(case)
    (value * factor).backward(retain_graph=True)
    (value * 0.5).backward()
    (plain(exact) * 3.5).backward()
    assert factor.grad is not None
    assert torch.equal(factor.grad, value.detach())
    for gradient, twin in zip(case.gradients, exact.gradients, strict=True):
        torch.testing.assert_close(gradient, twin)


def test_a_graph_that_is_not_kept_hands_out_its_gradient_without_a_copy() -> None:
    """At 128,000 tokens and 4,096 features the copy would be 2 GB."""
    case = make(4, 3000, 16, 16, weights=False).to(torch.float32)
    value = chunked(case)
    with torch.profiler.profile(profile_memory=True) as profile:
        (value / 3).backward()
    assert max(event.cpu_memory_usage for event in profile.events()) < 3000 * 16
    kept = replace(case).to(torch.float32)
    chunked(kept).backward(torch.tensor(1 / 3), retain_graph=True)
    for gradient, twin in zip(case.gradients, kept.gradients, strict=True):
        torch.testing.assert_close(gradient, twin)


def test_a_second_derivative_is_refused() -> None:
    case = make(3).to(torch.float64)
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(factor * chunked(case), case.student_hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_tied_weights_receive_both_gradients() -> None:
    case = make(10, 37, 5, 7).to(torch.float64)
    ids = torch.arange(10) % 4
    gradients = []
    for loss in (chunked, plain):
        table = case.student_weight.detach().clone().requires_grad_()
        loss(replace(case, student_hidden=table[ids], student_weight=table)).backward()
        gradients.append(table.grad)
    torch.testing.assert_close(*gradients)


def test_non_contiguous_inputs_are_served() -> None:
    case = make(12, biases="student")
    strided = replace(
        case,
        student_hidden=case.student_hidden.t().contiguous().t(),
        student_weight=case.student_weight.repeat_interleave(2, dim=0)[::2],
        teacher_hidden=case.teacher_hidden.repeat(1, 2)[:, :7],
        teacher_weight=case.teacher_weight.t().contiguous().t(),
    )
    assert not any(x.is_contiguous() for x in (strided.student_hidden, strided.student_weight, strided.teacher_hidden))
    torch.testing.assert_close(chunked(strided), plain(case))
    leaf = strided.student_hidden.detach().requires_grad_()
    (ours,) = torch.autograd.grad(chunked(replace(strided, student_hidden=leaf)), leaf)
    exact = case.to(torch.float64)
    plain(exact).backward()
    torch.testing.assert_close(ours, exact.student_hidden.grad)


@pytest.mark.parametrize("frozen", ["student_hidden", "student_weight", "student_bias"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    case = make(biases="student").to(torch.float64)
    getattr(case, frozen).requires_grad_(False)
    chunked(case).backward()
    assert getattr(case, frozen).grad is None
    assert len(case.gradients) == 2


def test_gradients_are_made_only_where_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = linear._sum_and_gradients

    def recorded(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(linear, "_sum_and_gradients", recorded)
    case = make(biases="student").to(torch.float64)
    expected = chunked(case)
    with torch.no_grad():
        value = chunked(case)
    with torch.inference_mode():
        chunked(case)
    case.student_weight.requires_grad_(False)
    chunked(case)
    assert not value.requires_grad
    assert torch.equal(value, expected)
    assert asked == [[True] * 3, [False] * 3, [False] * 3, [True, False, True]]


def test_the_teacher_is_a_constant() -> None:
    case = make().to(torch.float64)
    head = case.teacher_weight.requires_grad_()
    chunked(case).backward()
    assert head.grad is None


def test_inputs_are_left_as_they_were() -> None:
    case = make(biases="student teacher").to(torch.float64)
    before = {name: x.detach().clone() for name, x in case.tensors.items()}
    chunked(case, temperature=15.0).backward()
    assert all(torch.equal(x, before[name]) for name, x in case.tensors.items())


@pytest.mark.parametrize("n", [1, 64, 65, 150, 513, 1000])
def test_bfloat16_products_on_a_cpu_have_multiples_of_64_rows_and_those_added_do_not_show(n: int) -> None:
    case = make(n, 37, 8, 8, biases="student teacher", weights=False).to(torch.bfloat16)
    labels = torch.arange(n) % 37
    with torch.profiler.profile(record_shapes=True) as profile:
        chunked(case, temperature=4.0).backward()
        linear_cross_entropy(*case.sides()[:2], labels).backward()
    products = [event.input_shapes for event in profile.events() if event.name == "aten::mm"]
    tokens = {shape[at] for first, second, *_ in products for shape, at in ((first, 0), (first, 1))} - {8, 37}
    assert len(products) >= 7 and tokens
    assert all(each % 64 == 0 for each in tokens)
    ours, exact = case.to(torch.bfloat16), case.to(torch.float64)
    value, expected = chunked(ours, temperature=4.0), plain(exact, temperature=4.0)
    value.backward()
    expected.backward()
    assert relative_error(value, expected) < 2e-2
    assert all(relative_error(*pair) < 3e-2 for pair in zip(ours.gradients, exact.gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_tokens_by_vocabulary_is_made(dtype: torch.dtype) -> None:
    """Logits of a chunk in the dtype of the products, of both models, and float32 for a block of rows."""
    case = make(256, 2000, 8, 8, weights=False).to(dtype)
    labels = torch.arange(256)
    with chunks_of(128), torch.profiler.profile(profile_memory=True) as profile:
        chunked(case, temperature=15.0).backward()
        linear_cross_entropy(*case.sides()[:2], labels).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= max(3 * 64 * 4, 128 * dtype.itemsize) * 2000 < 256 * 2000 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"student_weight": torch.zeros(37, 6)},
            r"student_hidden and the student's weight must be .*\(23, 5\) and \(37, 6\)",
        ),
        ({"teacher_hidden": torch.zeros(2, 3, 7)}, "teacher_hidden and the teacher's weight must be"),
        ({"teacher_hidden": torch.zeros(22, 7)}, "student_hidden has 23 tokens and teacher_hidden 22"),
        ({"teacher_weight": torch.zeros(40, 7)}, "student's head has 37 tokens and the teacher's 40; slice"),
        ({"student_bias": torch.zeros(1)}, r"student's bias must be \(37,\), got \(1,\)"),
        ({"token_weights": torch.ones(1)}, r"constant per token \(23,\), got \(1,\)"),
        ({"token_weights": torch.ones(23, requires_grad=True)}, "requires_grad=True"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chunked(replace(make(), **change))


@pytest.mark.parametrize(
    ("loss", "temperature", "message"),
    [
        ("kl_divergance", 1.0, "did you mean kl_divergence"),
        ("hinge", 1.0, "known: adaptive_kl, alpha_beta"),
        ("kl_divergence", 0.0, "temperature must be above 0 and finite, got 0.0"),
        ("mse", 2.0, "temperature has no effect on mse, got 2.0"),
        ("total_variation", 2.0, "temperature has no effect on total_variation, got 2.0"),
    ],
)
def test_a_wrong_loss_or_temperature_is_refused_by_name(loss: str, temperature: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chunked(make(), loss, temperature)


def test_ranks_run_the_loss_in_one_way_or_all_in_the_slow_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from glmd.pipeline import run as pipeline

    monkeypatch.setattr(pipeline, "number_of_ranks", lambda: 2)
    monkeypatch.setattr(pipeline, "triton_problem", lambda device, dtype: None)
    for others, allowed in (([None, None], True), (["no C compiler", None], False)):
        monkeypatch.setattr(pipeline, "gathered", lambda mine, others=others: [mine, others])
        pipeline._agree_on_kernels(torch.device("cuda"))
        assert linear._triton_is_allowed == [allowed]
    assert [record.getMessage() for record in caplog.records] == [
        "Triton does not work on rank 1 (no C compiler): the loss runs in plain torch on all"
    ]
    linear.allow_triton(True)


class NoFloat64(TorchDispatchMode):
    """A device like Apple's GPUs: no operation may give a float64 tensor."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor) and each.dtype == torch.float64:
                raise TypeError("Cannot convert a tensor to float64, which this device has not")
        return found


@pytest.fixture
def no_float64() -> Iterator[NoFloat64]:
    rows._has_float64.cache_clear()
    yield NoFloat64()
    rows._has_float64.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [*LOGIT_LOSSES, "hard_cross_entropy"])
def test_the_loss_needs_no_float64_and_errs_no_more_without(
    no_float64: NoFloat64, loss: str, dtype: torch.dtype
) -> None:
    """Against the float64 twin of the same numbers: values and gradients, at the temperature of the paper."""
    temperature = temperature_of(loss, 15.0)
    case = make(64, 5000, 16, 16, biases="student teacher", scale=3.0).to(dtype)
    # Nearly the teacher: the KL is far smaller than the normalizers that it is the difference of.
    assert case.student_bias is not None
    fixed = [each.detach() for each in (case.student_hidden * 1.02, case.student_weight, case.student_bias)]
    near = replace(case, teacher_hidden=fixed[0], teacher_weight=fixed[1], teacher_bias=fixed[2])
    ours, exact = near.to(dtype), near.to(torch.float64)
    labels = torch.arange(64)

    def value(case: Case) -> Tensor:
        if loss == "hard_cross_entropy":
            return linear_cross_entropy(*case.sides()[:2], labels)
        return chunked(case, loss, temperature)

    with no_float64:
        assert not rows._has_float64(torch.device("cpu")), "what is tried here has float64"
        got = value(ours)
        got.backward()
    rows._has_float64.cache_clear()
    usual, expected = value(near.to(dtype)), value(exact)
    expected.backward()
    error, allowed = (abs(each.item() - expected.item()) for each in (got, usual))
    assert error <= 2 * allowed + 1e-5 * abs(expected.item()), (error, allowed, expected)
    close = 1e-3 if dtype == torch.float32 else 1.0  # of nearly equal models bf16 leaves little
    for mine, theirs in zip(ours.gradients, exact.gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=close * theirs.abs().max().item())
