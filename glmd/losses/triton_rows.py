"""The rows of `losses.rows` as one Triton kernel for CUDA: a program a row, two passes over it, nothing in between.

The first pass finds maxima and normalizers of both models online, the second writes the gradient over the student's
product in its own dtype; all else stays in float32 registers. Eager torch reads and writes the same numbers a dozen
times. Importing this imports triton.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmd.losses.rows import FUSED, LossSpec

BLOCK = 4096  # words at a time: a multiple of what the warps load at once; 32,000 would spill the registers
NUM_WARPS = 8


class TritonRows:
    """`Rows` for products in bfloat16, float16 or float32 of a loss among FUSED."""

    def __init__(self, spec: LossSpec) -> None:
        assert spec.loss in FUSED and spec.merged_into is None, spec.loss
        self.spec = spec

    def __call__(self, student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        assert student.stride(1) == 1 and teacher.stride(-1) == 1, "buffers of rows"
        spec, values = self.spec, student.new_empty(len(student), dtype=torch.float32)
        # A pointer that is not read must be given all the same. What lies between one row and the next is read and
        # written too: a width that 16 divides is loaded in vectors, whatever the number of tokens (`linear._rows_of`).
        _rows_kernel[(len(student),)](
            student,
            teacher,
            values if weights is None else weights,
            student if spec.student_bias is None else spec.student_bias,
            student if spec.teacher_bias is None else spec.teacher_bias,
            values,
            student.shape[1],
            student.stride(0),
            teacher.stride(0),
            spec.temperature,
            spec.student_softcap or 1.0,
            spec.teacher_softcap or 1.0,
            LOSS=spec.loss,
            HAS_WEIGHTS=weights is not None,
            HAS_STUDENT_BIAS=spec.student_bias is not None,
            HAS_TEACHER_BIAS=spec.teacher_bias is not None,
            HAS_STUDENT_SOFTCAP=spec.student_softcap is not None,
            HAS_TEACHER_SOFTCAP=spec.teacher_softcap is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,  # the default, which triton 3.9 warns of
        )
        return values


@triton.jit
def _logits(row, bias, words, width, exists, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    logits = tl.load(row + words, mask=words < width, other=0.0).to(tl.float32)
    if HAS_BIAS:
        logits += tl.load(bias + words, mask=exists, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)  # tanh
    return logits


@triton.jit
def _rows_kernel(
    student,
    teacher,  # or labels
    weights,
    student_bias,
    teacher_bias,
    values,
    num_words,
    student_stride,
    teacher_stride,
    temperature,
    student_softcap,
    teacher_softcap,
    LOSS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_STUDENT_SOFTCAP: tl.constexpr,
    HAS_TEACHER_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    columns = tl.arange(0, BLOCK)
    scale = 1.0 / temperature
    if LOSS == "hard_cross_entropy":
        label = tl.load(teacher)
    # Largest, sum of exponentials less the largest, and sum of those times student minus teacher.
    s_max = -float("inf")
    t_max = -float("inf")
    s_sum = 0.0
    t_sum = 0.0
    gap = 0.0
    for start in range(0, num_words, BLOCK):
        words = start + columns
        exists = words < num_words
        s = _logits(
            student, student_bias, words, student_stride, exists, student_softcap, HAS_STUDENT_BIAS, HAS_STUDENT_SOFTCAP
        )
        s *= scale
        new_max = tl.maximum(s_max, tl.max(tl.where(exists, s, -float("inf")), 0))
        s_exp = tl.where(exists, tl.exp(s - new_max), 0.0)
        shrunk = tl.exp(s_max - new_max)
        s_sum = s_sum * shrunk + tl.sum(s_exp, 0)
        s_max = new_max
        if LOSS != "hard_cross_entropy":
            t = _logits(
                teacher,
                teacher_bias,
                words,
                teacher_stride,
                exists,
                teacher_softcap,
                HAS_TEACHER_BIAS,
                HAS_TEACHER_SOFTCAP,
            )
            t *= scale
            if LOSS == "reverse_kl":
                gap = gap * shrunk + tl.sum(tl.where(exists, s_exp * (s - t), 0.0), 0)
            new_max = tl.maximum(t_max, tl.max(tl.where(exists, t, -float("inf")), 0))
            t_sum = t_sum * tl.exp(t_max - new_max) + tl.sum(tl.where(exists, tl.exp(t - new_max), 0.0), 0)
            t_max = new_max
    # What is added to teacher minus student to give log p - log q. Both sums are near exp(10) at temperature 15, and
    # their ratio is near 1: log1p of the difference keeps the digits of a KL of 1e-3 (Kahan's form of it).
    shift = 0.0
    if LOSS != "hard_cross_entropy":
        excess = (s_sum - t_sum) / t_sum
        near = 1 + excess
        log1p = tl.where(near == 1, excess, tl.log(near) * excess / tl.where(near == 1, 1.0, near - 1))
        shift = (s_max - t_max) + tl.where(tl.abs(excess) < 0.5, log1p, tl.log(s_sum / t_sum))
    mean_gap = gap / s_sum - shift
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights + row).to(tl.float32)
    value = 0.0
    for start in range(0, num_words, BLOCK):
        words = start + columns
        exists = words < num_words
        capped = _logits(
            student, student_bias, words, student_stride, exists, student_softcap, HAS_STUDENT_BIAS, HAS_STUDENT_SOFTCAP
        )
        s = capped * scale
        q = tl.where(exists, tl.exp(s - s_max) / s_sum, 0.0)
        if LOSS == "hard_cross_entropy":
            p = tl.where(words == label, 1.0, 0.0)
            gradient = q - p
            value += tl.sum(tl.where(words == label, s_max + tl.log(s_sum) - s, 0.0), 0)
        else:
            t = _logits(
                teacher,
                teacher_bias,
                words,
                teacher_stride,
                exists,
                teacher_softcap,
                HAS_TEACHER_BIAS,
                HAS_TEACHER_SOFTCAP,
            )
            t = t * scale
            p = tl.where(exists, tl.exp(t - t_max) / t_sum, 0.0)
            ratio = tl.where(exists, t - s + shift, 0.0)
            gradient = q - p
            # The sum of q - p is 0 but for rounding; with it the rounding of the normalizers cancels to first order.
            if LOSS == "kl_divergence":
                value += tl.sum(p * ratio + gradient, 0)
            elif LOSS == "reverse_kl":
                value += tl.sum(-q * ratio - gradient, 0)
                gradient = -q * (ratio + mean_gap)
            else:
                value += tl.sum(tl.where(exists, p * (s_max + tl.log(s_sum) - s), 0.0), 0)
        gradient *= temperature * weight
        if HAS_STUDENT_SOFTCAP:
            gradient *= 1 - (capped / student_softcap) * (capped / student_softcap)
        tl.store(student + words, gradient.to(student.dtype.element_ty), mask=words < student_stride)
    tl.store(values + row, value * temperature * temperature * weight)
