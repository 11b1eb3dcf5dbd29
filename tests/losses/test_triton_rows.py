"""The Triton kernel against the plain rows in float64, run by Triton's interpreter on a CPU.

pip install -e '.[test,triton]' && TRITON_INTERPRET=1 pytest tests/losses/test_triton_rows.py
"""

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from logit_cases import OPTIONS
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton: pip install 'glmd[triton]'", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in the environment, before triton is imported", allow_module_level=True)

from glmd.losses import linear, triton_rows
from glmd.losses.head import Head
from glmd.losses.linear import choose_rows, linear_cross_entropy, linear_distillation_loss
from glmd.losses.logits import LogitScaling
from glmd.losses.rows import FUSED, EagerRows, LossSpec
from glmd.losses.triton_rows import TritonRows, multiply_unless_one

N, K = 5, 150


# What a GPU would be given: registers that spill, or a load word by word, cost more than the kernel saves.
COMPILE = """
import re, subprocess, sys, tempfile, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from glmd.losses.triton_rows import BLOCK, NUM_WARPS, _rows_kernel as kernel

def compiled(loss, dtype):
    hard = loss == "hard_cross_entropy"
    flags = {f"HAS_{name}": True for name in ("WEIGHTS", "FACTOR", "STUDENT_BIAS", "STUDENT_SOFTCAP")}
    flags |= {f"HAS_{name}": not hard for name in ("TEACHER_BIAS", "TEACHER_SOFTCAP")}
    flags |= {"LOSS": loss, "BLOCK": BLOCK if dtype == "bf16" else BLOCK // 2}
    types = dict.fromkeys(("weights", "factor", "student_bias", "teacher_bias", "values"), "*fp32")
    types |= {"student": f"*{dtype}", "teacher": "*i64" if hard else f"*{dtype}"}
    types |= dict.fromkeys(("num_words", "student_stride", "teacher_stride"), "i32")
    names = kernel.arg_names
    signature = {name: "constexpr" if name in flags else types.get(name, "fp32") for name in names}
    aligned = ("student", "teacher", "student_stride", "teacher_stride")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    constants = {(names.index(name),): value for name, value in flags.items()}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)

tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for loss in sys.argv[2:]:
    for dtype in ("bf16", "fp32"):
        asm = compiled(loss, dtype).asm
        assert re.search(r"ld\\.global\\S*\\.v4", asm["ptx"]), (loss, dtype)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
        stack = int(re.search(r"STACK:(\\d+)", usage)[1])  # a few words may be there that no loop reads
        assert stack <= 32 and "LOCAL:0" in usage, (loss, dtype, usage)
"""


@pytest.mark.parametrize("capability", ["80", "90"])
def test_it_compiles_for_a_gpu_with_vector_loads_and_no_spilled_register(capability: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, capability, *FUSED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True)
def several_blocks_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "BLOCK", 64)


def products(loss: str, k: int = K, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    student = spread * torch.randn(N, k, generator=source, dtype=torch.float64)
    if loss == "hard_cross_entropy":
        return student, torch.tensor([0, k - 1, 7, 7, 64])
    return student, student + torch.randn(N, k, generator=source, dtype=torch.float64)


def both(task: LossSpec, student: Tensor, teacher: Tensor, weights: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """(kernel, plain rows in float64) of values and gradients."""
    exact, theirs = student.double(), teacher.double() if teacher.is_floating_point() else teacher
    expected = EagerRows(task, exact, theirs)(exact, theirs, weights)
    ours = student.clone()
    values = TritonRows(task)(ours, teacher, weights)
    assert values.dtype == torch.float32
    yield values, expected
    yield ours, exact


def spec_of(loss: str, temperature: float = 1.0, **more: Any) -> LossSpec:
    return LossSpec(loss, temperature, options=OPTIONS.get(loss, {}), **more)


def error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("loss", FUSED)
@pytest.mark.parametrize("options", ["", "weights", "biases", "softcaps", "weights biases softcaps"])
def test_values_and_gradients_are_those_of_the_plain_rows(loss: str, options: str) -> None:
    source = torch.Generator().manual_seed(1)
    weights = torch.rand(N, generator=source) if "weights" in options else None
    extra: dict[str, Any] = {}
    if "biases" in options:
        extra |= {name: torch.randn(K, generator=source) for name in ("student_bias", "teacher_bias")}
    if "softcaps" in options:
        extra |= {"student_softcap": 5.0, "teacher_softcap": 4.0}
    temperature = 1.0 if loss == "hard_cross_entropy" else 4.0
    student, teacher = products(loss)
    teacher = teacher.float() if teacher.is_floating_point() else teacher
    for ours, exact in both(spec_of(loss, temperature, **extra), student.float(), teacher, weights):
        assert error(ours, exact) < 1e-5


@pytest.mark.parametrize("loss", [loss for loss in FUSED if loss != "hard_cross_entropy"])
def test_at_temperature_15_and_a_whole_vocabulary_float32_is_exact_to_a_hundred_thousandth(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_rows, "BLOCK", 4096)
    student, teacher = products(loss, 15000)
    for ours, exact in both(spec_of(loss, 15.0), student.float(), teacher.float(), None):
        assert error(ours, exact) < 1e-5


@pytest.mark.parametrize("loss", FUSED)
def test_bfloat16_products_give_a_gradient_in_bfloat16_that_was_rounded_once(loss: str) -> None:
    """By cutting it off, in the interpreter; a GPU rounds to the nearest, with half the error."""
    student, teacher = (x.bfloat16() if x.is_floating_point() else x for x in products(loss))
    temperature = 1.0 if loss == "hard_cross_entropy" else 15.0
    (values, expected), (gradient, exact) = both(spec_of(loss, temperature), student, teacher, None)
    assert gradient.dtype == torch.bfloat16
    assert error(values, expected) < 1e-5
    assert error(gradient, exact) < 2**-7


@pytest.mark.parametrize("loss", FUSED)
@pytest.mark.parametrize("is_tensor", [True, False])
def test_a_factor_multiplies_values_and_gradients(loss: str, is_tensor: bool) -> None:
    student, teacher = (x.float() if x.is_floating_point() else x for x in products(loss))
    factor = torch.tensor(0.375) if is_tensor else 0.375
    once, scaled = student.clone(), student.clone()
    values = TritonRows(spec_of(loss))(once, teacher, None)
    torch.testing.assert_close(TritonRows(spec_of(loss, factor=factor))(scaled, teacher, None), 0.375 * values)
    torch.testing.assert_close(scaled, 0.375 * once)


@pytest.mark.parametrize("factor", [1.0, -0.5])
@pytest.mark.parametrize("size", [1, 1024, 3000])
def test_a_gradient_is_multiplied_unless_the_factor_is_one(factor: float, size: int) -> None:
    tensor = torch.arange(size) + 1.0
    assert torch.equal(multiply_unless_one(tensor.clone(), torch.tensor(factor)), factor * tensor)


@pytest.mark.parametrize("far", [1.0, 60.0, 1e4])
@pytest.mark.parametrize("loss", ["kl_divergence", "generalized_js"])
def test_models_that_disagree_wholly_overflow_nowhere(loss: str, far: float) -> None:
    student, teacher = torch.zeros(1, K), torch.zeros(1, K)
    student[0, 3], teacher[0, 7] = far, far
    for ours, exact in both(spec_of(loss), student, teacher, None):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1e-4, 0.05, 0.5, 0.9, 1 - 1e-4, 1.0])
def test_the_generalized_divergence_is_that_of_any_beta(beta: float) -> None:
    student, teacher = products("generalized_js")
    for ours, exact in both(
        LossSpec("generalized_js", 2.0, options={"beta": beta}), student.float(), teacher.float(), None
    ):
        assert error(ours, exact) < 1e-5


@pytest.mark.parametrize("loss", FUSED)
def test_what_lies_between_the_rows_is_nothing_to_them_and_other_rows_are_not_touched(loss: str) -> None:
    student, teacher = products(loss)
    wide, expected = torch.full((N + 2, K + 10), math.nan), student.float()
    wide[:N, :K] = student
    theirs = teacher
    if teacher.is_floating_point():
        theirs = torch.full((N, K + 10), math.inf)[:, :K].copy_(teacher)
        teacher = teacher.float()
    values = TritonRows(spec_of(loss))(wide[:N, :K], theirs, None)
    assert torch.equal(values, TritonRows(spec_of(loss))(expected, teacher, None))
    assert torch.equal(wide[:N, :K], expected)
    assert wide[N:].isnan().all()


def test_the_chunked_loss_through_the_kernel_equals_that_through_plain_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(20, 6, generator=source), torch.randn(K, 6, generator=source)
    theirs, head, labels = hidden + 0.1, weight + 0.1, torch.arange(20) % K
    found = []
    for rows in (choose_rows, lambda task, *_: TritonRows(task)):
        monkeypatch.setattr(linear, "choose_rows", rows)
        monkeypatch.setattr(linear, "chunk_tokens", lambda *_: 8)
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        scaling = LogitScaling(0.5, 6.0)
        student = leaves[0], Head(leaves[1], scaling=scaling)
        value = linear_distillation_loss(*student, theirs, Head(head), temperature=3.0)
        value = value + linear_cross_entropy(*student, labels)
        found.append([value, *torch.autograd.grad(value, leaves)])
    for ours, exact in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)
