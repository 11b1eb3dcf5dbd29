"""The rows of `losses.rows` as one Triton kernel for CUDA: a program a row, two passes over it, nothing in between.

The first pass finds maxima and normalizers of both models online, the second writes the gradient over the student's
product in its own dtype; all else stays in float32 registers. So many rows as are worked on at a time stay in the L2
cache from the first pass to the second up to 50,000 tokens, and three passes over memory remain, which is the least. Of
a row's numbers the instructions are what is scarce: exponentials are to the base of 2 of one fused multiplication,
normalizers are multiplied by, and only the last block of a row asks which of its words exist. Eager torch reads and
writes the same numbers a dozen times. Importing this imports triton.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmd.losses.rows import FUSED, LossSpec

BLOCK, NUM_WARPS = 2048, 4  # words of two bytes at a time, of four half as many; more would spill registers


class TritonRows:
    """`Rows` for products in bfloat16, float16 or float32 of a loss among FUSED."""

    def __init__(self, spec: LossSpec) -> None:
        assert spec.loss in FUSED and spec.merged_into is None, spec.loss
        # A generalized divergence of one model alone is 0, and by convention the KL of that name.
        ends: dict[Any, str] = {0: "kl_divergence", 1: "reverse_kl"} if spec.loss == "generalized_js" else {}
        self.spec = spec._replace(loss=ends.get(spec.options.get("beta"), spec.loss))

    def __call__(self, student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        assert student.stride(1) == 1 and teacher.stride(-1) == 1, "buffers of rows"
        spec, values = self.spec, student.new_empty(len(student), dtype=torch.float32)
        factor = spec.factor if isinstance(spec.factor, Tensor) else None
        # A pointer that is not read must be given all the same. What lies between one row and the next is read and
        # written too: a width that 16 divides is loaded in vectors, whatever the number of tokens (`linear._rows_of`).
        _rows_kernel[(len(student),)](
            student,
            teacher,
            values if weights is None else weights,
            values if factor is None else factor,
            student if spec.student_bias is None else spec.student_bias,
            student if spec.teacher_bias is None else spec.teacher_bias,
            values,
            student.shape[1],
            student.stride(0),
            teacher.stride(0),
            spec.temperature,
            1.0 if factor is not None else spec.factor,
            spec.student_softcap or 1.0,
            spec.teacher_softcap or 1.0,
            spec.options.get("beta", 0.5),
            LOSS=spec.loss,
            HAS_WEIGHTS=weights is not None,
            HAS_FACTOR=factor is not None,
            HAS_STUDENT_BIAS=spec.student_bias is not None,
            HAS_TEACHER_BIAS=spec.teacher_bias is not None,
            HAS_STUDENT_SOFTCAP=spec.student_softcap is not None,
            HAS_TEACHER_SOFTCAP=spec.teacher_softcap is not None,
            BLOCK=BLOCK * 2 // student.element_size(),
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,  # the default, which triton 3.9 warns of
        )
        return values


def multiply_unless_one(tensor: Tensor, factor: Tensor) -> Tensor:
    """`tensor.mul_(factor)`, which reads and writes nothing where the factor, a number on the device, is 1."""
    assert tensor.is_contiguous(), "one row of numbers"
    if tensor.numel():
        programs = min(1024, triton.cdiv(tensor.numel(), 1024))
        _multiply_kernel[(programs,)](tensor, factor, tensor.numel(), BLOCK=1024, num_warps=4)
    return tensor


@triton.jit
def _multiply_kernel(tensor, factor, count, BLOCK: tl.constexpr):
    times = tl.load(factor).to(tl.float32)
    if times != 1:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(first, count, step):
            places = start + tl.arange(0, BLOCK)
            values = tl.load(tensor + places, mask=places < count).to(tl.float32)
            tl.store(tensor + places, (values * times).to(tensor.dtype.element_ty), mask=places < count)


@triton.jit
def _logits(
    row, bias, words, width, exists, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """A block of a row in float32, as the model gives them; 0 for words that do not exist, of which LAST may have."""
    if LAST:
        logits = tl.load(row + words, mask=words < width, other=0.0).to(tl.float32)
    else:
        logits = tl.load(row + words).to(tl.float32)
    if HAS_BIAS:
        if LAST:
            logits += tl.load(bias + words, mask=exists, other=0.0).to(tl.float32)
        else:
            logits += tl.load(bias + words).to(tl.float32)
    if HAS_SOFTCAP:
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)  # tanh
    return tl.where(exists, logits, 0.0) if LAST else logits


@triton.jit
def _both_logits(
    student, teacher, student_bias, teacher_bias, words, student_stride, teacher_stride, exists,
    student_softcap, teacher_softcap, HAS_STUDENT_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    HAS_STUDENT_SOFTCAP: tl.constexpr, HAS_TEACHER_SOFTCAP: tl.constexpr, IS_HARD: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """A block of both models; against labels the student's twice."""
    s = _logits(
        student, student_bias, words, student_stride, exists, student_softcap, HAS_STUDENT_BIAS,
        HAS_STUDENT_SOFTCAP, LAST,
    )  # fmt: skip
    if IS_HARD:
        t = s
    else:
        t = _logits(
            teacher, teacher_bias, words, teacher_stride, exists, teacher_softcap, HAS_TEACHER_BIAS,
            HAS_TEACHER_SOFTCAP, LAST,
        )  # fmt: skip
    return s, t


@triton.jit
def _log1p(x):
    """Kahan's, which keeps the digits of a small x."""
    near = 1 + x
    return tl.where(near == 1, x, tl.log(near) * x / tl.where(near == 1, 1.0, near - 1))


@triton.jit
def _js_logs(d):
    """For d = log(p / q) and the mixture m: log(p / m) + log(q / m) weighted as in the divergence, and log(q / m).

    With t = tanh(d / 2): p = m (1 + t), q = m (1 - t). Both parts are of second order in d, so that nothing cancels
    where the models nearly agree; where d is large, t rounds to 1, and the logarithms are taken from d itself.
    """
    size = tl.abs(d)
    small = tl.exp2(-1.4426950408889634 * size)
    t = (1 - small) / (1 + small)
    t = tl.where(d < 0, -t, t)
    far = 0.6931471805599453 - _log1p(small)
    both = d * t + tl.where(size < 1, _log1p(-t * t), 2 * far - size)
    of_q = tl.where(size < 1, _log1p(-t), far - tl.where(d > 0, d, 0.0))
    return both, of_q


@triton.jit
def _mixture_logs(d, beta):
    """For d = log(p / q) and the mixture m = beta p + (1 - beta) q: log(p / m) and log(q / m).

    Each by itself while nothing overflows: one is beta or 1 - beta times d, and may be far smaller than d.
    """
    size = tl.abs(d)
    small = tl.exp2(-1.4426950408889634 * size)
    share = tl.where(d > 0, beta, 1 - beta)  # of the larger of p and q in m
    rest = tl.where(d > 0, 1 - beta, beta)
    less = rest * (small - 1)
    larger = -tl.where(less > -0.5, _log1p(less), tl.log(share + rest * small))
    smaller = tl.where(size < 20, -_log1p(share * (1 / tl.maximum(small, 1e-9) - 1)), larger - size)
    return tl.where(d > 0, larger, smaller), tl.where(d > 0, smaller, larger)


@triton.jit
def _sums(s, t, s_max, t_max, s_sums, t_sums, gaps, exists, scale, LOSS: tl.constexpr, LAST: tl.constexpr):
    """A block's part in maxima and sums, whose lanes are added up behind the last block."""
    s_most = tl.where(exists, s, -float("inf")) if LAST else s
    t_most = tl.where(exists, t, -float("inf")) if LAST else t
    s_new = tl.maximum(s_max, tl.max(s_most, 0))
    t_new = t_max if LOSS == "hard_cross_entropy" else tl.maximum(t_max, tl.max(t_most, 0))
    s_exp = tl.exp2(s * scale - s_new * scale)
    s_exp = tl.where(exists, s_exp, 0.0) if LAST else s_exp
    s_shrunk = tl.exp2((s_max - s_new) * scale)
    s_sums = s_sums * s_shrunk + s_exp
    if LOSS != "hard_cross_entropy":
        t_exp = tl.exp2(t * scale - t_new * scale)
        t_exp = tl.where(exists, t_exp, 0.0) if LAST else t_exp
        t_sums = t_sums * tl.exp2((t_max - t_new) * scale) + t_exp
    if LOSS == "reverse_kl":
        gaps = gaps * s_shrunk + s_exp * (s - t)
    return s_new, t_new, s_sums, t_sums, gaps


@triton.jit
def _ends(
    s, t, s_top, t_top, s_share, t_share, s_log, log_ratio, mean_gap, label, words, exists, scale, beta,
    LOSS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """What each word adds to the value of a row, to the base of 2 and of e, and its gradient before all factors.

    The logarithm of p / q is made of the exponents of p and q, so that their rounding is the same in both.
    """
    s = s * scale - s_top
    q = tl.exp2(s) * s_share
    q = tl.where(exists, q, 0.0) if LAST else q
    natural = tl.zeros_like(q)
    if LOSS == "hard_cross_entropy":
        gradient = tl.where(words == label, q - 1, q)
        binary = tl.where(words == label, s_log - s, 0.0)
    else:
        t = t * scale - t_top
        p = tl.exp2(t) * t_share
        p = tl.where(exists, p, 0.0) if LAST else p
        ratio = t - s + log_ratio
        gradient = q - p
        binary = p * ratio
        # The sum of q - p is 0 but for rounding; with it the rounding of the normalizers cancels to first order.
        if LOSS == "kl_divergence":
            natural = gradient
        elif LOSS == "reverse_kl":
            binary = -q * ratio
            natural = -gradient
            gradient = -q * (ratio + mean_gap)
        elif LOSS == "js_divergence":
            both, of_q = _js_logs(0.6931471805599453 * ratio)
            binary = natural
            natural = 0.25 * (p + q) * both
            gradient = 0.5 * q * (of_q - mean_gap)
        elif LOSS == "generalized_js":
            of_p, of_q = _mixture_logs(0.6931471805599453 * ratio, beta)
            binary = natural
            natural = beta * p * of_p + (1 - beta) * q * of_q
            gradient = (1 - beta) * q * (of_q - mean_gap)
        else:
            binary = p * (s_log - s)
    return binary, natural, gradient


@triton.jit
def _rows_kernel(
    student,
    teacher,  # or labels
    weights,
    factor,
    student_bias,
    teacher_bias,
    values,
    num_words,
    student_stride,
    teacher_stride,
    temperature,
    constant_factor,
    student_softcap,
    teacher_softcap,
    beta,
    LOSS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_STUDENT_SOFTCAP: tl.constexpr,
    HAS_TEACHER_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    IS_HARD: tl.constexpr = LOSS == "hard_cross_entropy"
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    columns = tl.arange(0, BLOCK)
    whole = num_words // BLOCK * BLOCK  # words of blocks that are full
    scale = 1.4426950408889634 / temperature  # of exponents to the base of 2
    label = 0
    if IS_HARD:
        label = tl.load(teacher)
    # Largest logit, sum of exponentials less it, and sum of those times student minus teacher.
    s_max = -float("inf")
    t_max = -float("inf")
    s_sums = tl.zeros([BLOCK], tl.float32)
    t_sums = tl.zeros([BLOCK], tl.float32)
    gaps = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(2):
        first = whole if part == 1 else 0
        stop = num_words if part == 1 else whole
        for start in range(first, stop, BLOCK):
            words = start + columns
            exists = words < num_words
            s, t = _both_logits(
                student, teacher, student_bias, teacher_bias, words, student_stride, teacher_stride, exists,
                student_softcap, teacher_softcap, HAS_STUDENT_BIAS, HAS_TEACHER_BIAS, HAS_STUDENT_SOFTCAP,
                HAS_TEACHER_SOFTCAP, IS_HARD, part == 1,
            )  # fmt: skip
            s_max, t_max, s_sums, t_sums, gaps = _sums(
                s, t, s_max, t_max, s_sums, t_sums, gaps, exists, scale, LOSS, part == 1
            )
    s_top = s_max * scale
    t_top = t_max * scale
    s_sum = tl.sum(s_sums, 0)
    s_log = tl.log2(s_sum)
    s_share = 1.0 / s_sum
    t_share = 0.0
    # The logarithm of the ratio by which both are normalized, as rounded. It is near 1 at temperature 15: log1p of the
    # difference keeps the digits of a KL of 1e-3.
    log_ratio = 0.0
    mean_gap = 0.0
    if not IS_HARD:
        t_sum = tl.sum(t_sums, 0)
        t_share = 1.0 / t_sum
        excess = (t_share - s_share) / s_share
        log_ratio = tl.where(tl.abs(excess) < 0.5, 1.4426950408889634 * _log1p(excess), tl.log2(t_share / s_share))
    if LOSS == "reverse_kl":
        mean_gap = tl.sum(gaps, 0) * scale / s_sum - (s_top - t_top) - log_ratio
    if (
        LOSS == "js_divergence" or LOSS == "generalized_js"
    ):  # the mean of log(q / m) under q, which no sum of the first pass gives
        for start in range(0, num_words, BLOCK):
            words = start + columns
            exists = words < num_words
            s, t = _both_logits(
                student, teacher, student_bias, teacher_bias, words, student_stride, teacher_stride, exists,
                student_softcap, teacher_softcap, HAS_STUDENT_BIAS, HAS_TEACHER_BIAS, HAS_STUDENT_SOFTCAP,
                HAS_TEACHER_SOFTCAP, IS_HARD, True,
            )  # fmt: skip
            s = s * scale - s_top
            d = 0.6931471805599453 * (t * scale - t_top - s + log_ratio)
            if LOSS == "js_divergence":
                _, of_q = _js_logs(d)
            else:
                _, of_q = _mixture_logs(d, beta)
            gaps += tl.where(exists, tl.exp2(s) * of_q, 0.0)
        mean_gap = tl.sum(gaps, 0) / s_sum
    weight = constant_factor
    if HAS_FACTOR:
        weight = tl.load(factor).to(tl.float32)
    if HAS_WEIGHTS:
        weight *= tl.load(weights + row).to(tl.float32)
    times = temperature * weight
    if LOSS == "reverse_kl":
        times *= 0.6931471805599453  # its gradient is to the base of 2
    binaries = tl.zeros([BLOCK], tl.float32)
    naturals = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(2):
        first = whole if part == 1 else 0
        stop = num_words if part == 1 else whole
        for start in range(first, stop, BLOCK):
            words = start + columns
            exists = words < num_words
            s, t = _both_logits(
                student, teacher, student_bias, teacher_bias, words, student_stride, teacher_stride, exists,
                student_softcap, teacher_softcap, HAS_STUDENT_BIAS, HAS_TEACHER_BIAS, HAS_STUDENT_SOFTCAP,
                HAS_TEACHER_SOFTCAP, IS_HARD, part == 1,
            )  # fmt: skip
            binary, natural, gradient = _ends(
                s, t, s_top, t_top, s_share, t_share, s_log, log_ratio, mean_gap, label, words, exists, scale, beta,
                LOSS, part == 1,
            )  # fmt: skip
            binaries += binary
            naturals += natural
            gradient *= times
            if HAS_STUDENT_SOFTCAP:
                gradient *= 1 - (s / student_softcap) * (s / student_softcap)
            if part == 1:
                tl.store(student + words, gradient.to(student.dtype.element_ty), mask=words < student_stride)
            else:
                tl.store(student + words, gradient.to(student.dtype.element_ty))
    value = 0.6931471805599453 * tl.sum(binaries, 0) + tl.sum(naturals, 0)
    tl.store(values + row, value * temperature * temperature * weight)
