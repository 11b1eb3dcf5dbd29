"""What stands between the matrix products of `losses.linear`: from chunks of two logits to loss and gradient.

    rows = EagerRows(LossSpec("kl_divergence", 15.0), student, teacher)
    values = rows(student, teacher, token_weights)      # and `student` holds the gradient

In plain torch; `losses.triton_rows` is the same for CUDA. Compiling was tried on a CPU: docs/performance.md says why it
is not done.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glmd.errors import ConfigError
from glmd.losses.logits import LOGIT_LOSSES, merge_words
from glmd.losses.targets import taid_share

# What the Triton kernel computes. The others run in plain torch on every device.
FUSED = ("kl_divergence", "cross_entropy", "reverse_kl", "js_divergence", "generalized_js", "hard_cross_entropy")


# On a CPU the buffers of a block stay near the core; a GPU is better served by few large steps.
BLOCK_ROWS = {"cpu": 64, "cuda": 512}
# A graph keeps two dozen tensors of a block. Of so many numbers, or of four rows, they take no more memory than the
# buffers of a whole block do where the vocabulary is large; on a CPU they stay near the core.
GRAPH_NUMBERS = {"cpu": 2**17, "cuda": 2**22}
BEYOND_BUFFERS = ("js_divergence",)  # row forms that make as many tensors as a graph has


Factor = float | Tensor  # a tensor () on a device that is not to be waited for


class LossSpec(NamedTuple):
    """What to compute from the products of hidden states and weights, row by row."""

    loss: str  # a key of LOGIT_LOSSES, or hard_cross_entropy
    temperature: float = 1.0
    student_bias: Tensor | None = None  # (K,)
    teacher_bias: Tensor | None = None  # (K,)
    student_softcap: float | None = None
    teacher_softcap: float | None = None
    merged_into: Tensor | None = None  # (D,) of a teacher of K + D tokens
    factor: Factor = 1.0  # of all values and gradients
    options: Mapping[str, Any] = MappingProxyType({})  # of the loss, beside the temperature


# Rows get the products (n, K) of student and teacher, or the labels (n,) in the teacher's place, and the weights of
# the rows (n,). They return weight times loss of each (n,) and leave its gradient in the student's product.
Rows = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class EagerRows:
    """Plain torch, in blocks of rows over the same three buffers of float32 or better.

    In fresh memory the same work would take four times as long on a CPU.
    """

    def __init__(self, spec: LossSpec, student: Tensor, teacher: Tensor) -> None:
        self.spec = spec
        dtype = torch.promote_types(student.dtype, torch.float32)
        if teacher.is_floating_point():
            dtype = torch.promote_types(dtype, teacher.dtype)
        device = student.device.type if student.device.type in BLOCK_ROWS else "cuda"
        rows = min(len(student), BLOCK_ROWS[device])
        self.loss = ROW_LOSSES.get(spec.loss) or rows_by_autograd(LOGIT_LOSSES[spec.loss], spec.loss)
        if spec.loss not in ROW_LOSSES or spec.loss in BEYOND_BUFFERS:
            rows = min(rows, max(4, GRAPH_NUMBERS[device] // student.shape[1]))
        capped = spec.student_softcap is not None
        self.buffers = student.new_empty(4 if capped else 3, rows, student.shape[1], dtype=dtype)
        merged = () if spec.merged_into is None else teacher.shape[1:]
        self.every_token = student.new_empty(rows, *merged, dtype=dtype)

    def __call__(self, student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        values, size = self.buffers.new_empty(len(student)), self.buffers.shape[1]
        starts = range(0, len(student), size)
        if hasattr(student, "fake_mode"):  # a rehearsal counts what is held at once: one block says it
            starts = starts[:1]
        for start in starts:
            block = slice(start, start + size)
            values[block] = self._block(student[block], teacher[block], None if weights is None else weights[block])
        return values

    def _block(self, student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        spec = self.spec
        logits, theirs, gradient, *capped = self.buffers[:, : len(student)]
        _write_logits(student, spec.student_bias, spec.student_softcap, out=logits)
        for copy in capped:
            copy.copy_(logits)
        if not teacher.is_floating_point():
            theirs = teacher
        elif spec.merged_into is None:
            _write_logits(teacher, spec.teacher_bias, spec.teacher_softcap, out=theirs)
        else:
            every_token = self.every_token[: len(teacher)]
            _write_logits(teacher, spec.teacher_bias, spec.teacher_softcap, out=every_token)
            theirs.copy_(merge_words(every_token, spec.merged_into))
        values = self.loss(logits, theirs, gradient, spec.temperature, spec.factor, **spec.options) * spec.factor
        for copy in capped:  # d softcap tanh(x / softcap) / dx = 1 - tanh(x / softcap)^2
            gradient.mul_(copy.div_(spec.student_softcap).square_().neg_().add_(1))
        if weights is not None:
            weights = weights.to(values.dtype)
            values = values * weights
            gradient.mul_(weights[:, None])
        student.copy_(gradient)
        return values


def _write_logits(product: Tensor, bias: Tensor | None, softcap: float | None, *, out: Tensor) -> None:
    out.copy_(product)
    if bias is not None:
        out.add_(bias)
    if softcap is not None:
        out.div_(softcap).tanh_().mul_(softcap)


# A row loss gets the two logits and a third buffer, all (n, K) in float32 or better, the temperature, a factor, and the
# options of the loss by their names. It returns the loss of each row (n,), and leaves the factor times its gradient
# with respect to the student's logits in the third buffer; the logits are its scratch space.
RowLoss = Callable[..., Tensor]


def _kl_divergence_rows(
    student: Tensor, teacher: Tensor, gradient: Tensor, temperature: float, factor: Factor
) -> Tensor:
    """T^2 KL(p || q), gradient T (q - p), for the teacher's softmax p and the student's q."""
    _divide(temperature, student, teacher)
    teacher_normalizer = _write_softmax(teacher, out=gradient)
    gap = teacher.sub_(student).mul_(gradient).sum(-1)
    student_normalizer = _write_softmax(student, out=teacher)
    torch.sub(teacher, gradient, out=gradient)
    # sum(q - p) is 0 but for rounding. With it, what rounding did to the two normalizations cancels to first
    # order; without it a row errs by 1e-4 at temperature 15, where the KL is 1e-3 and the normalizers are 10.
    values = student_normalizer.less(teacher_normalizer) + gap + gradient.sum(-1)
    gradient.mul_(temperature * factor)
    return (temperature**2 * values).to(student.dtype)


def _reverse_kl_rows(student: Tensor, teacher: Tensor, gradient: Tensor, temperature: float, factor: Factor) -> Tensor:
    """T^2 KL(q || p), gradient T q (log(q / p) - KL), for the teacher's softmax p and the student's q."""
    _divide(temperature, student, teacher)
    teacher_normalizer = _write_softmax(teacher, out=gradient)
    torch.sub(student, teacher, out=teacher)
    student_normalizer = _write_softmax(student, out=gradient)
    log_ratio = teacher.add_(teacher_normalizer.less(student_normalizer).to(teacher.dtype)[:, None])
    values = torch.mul(log_ratio, gradient, out=student).sum(-1)
    gradient.mul_(log_ratio.sub_(values[:, None])).mul_(temperature * factor)
    return temperature**2 * values


def _js_divergence_rows(
    student: Tensor, teacher: Tensor, gradient: Tensor, temperature: float, factor: Factor
) -> Tensor:
    """T^2 (KL(p || m) + KL(q || m)) / 2 for m = (p + q) / 2, gradient T/2 q (log(q / m) - KL(q || m)).

    With t = tanh(d / 2) for d = log(p / q): p = m (1 + t), q = m (1 - t), and the two logarithms sum to
    t d + log(1 - t^2). Both parts are of second order in d, so that nothing cancels where the models nearly agree.
    Where d is large, t rounds to 1, and the logarithms are taken from d itself.
    """
    _divide(temperature, student, teacher)
    teacher_normalizer = _write_softmax(teacher, out=gradient)
    gap = teacher.sub_(student)
    q = torch.empty_like(student)
    student_normalizer = _write_softmax(student, out=q)
    gap.add_(student_normalizer.less(teacher_normalizer).to(gap.dtype)[:, None])
    t = torch.div(gap, 2, out=student).tanh_()
    mixture = gradient.add_(q).div_(2)
    size, is_near = gap.abs(), gap.abs() < 1
    far = 2 * math.log(2) - size - 2 * torch.log1p(torch.exp(-size))
    values = (gap * t).add_(torch.where(is_near, torch.log1p(-t.square()), far)).mul_(mixture).sum(-1) / 2
    log_ratio = torch.where(is_near, torch.log1p(-t), math.log(2) - torch.nn.functional.softplus(gap))
    torch.mul(q, log_ratio, out=gradient)
    gradient.sub_(q.mul_(gradient.sum(-1, keepdim=True))).mul_(temperature / 2 * factor)
    return temperature**2 * values


def _cross_entropy_rows(
    student: Tensor, teacher: Tensor, gradient: Tensor, temperature: float, factor: Factor
) -> Tensor:
    """-T^2 sum(p log q), gradient T (q - p), for the teacher's softmax p and the student's q."""
    _divide(temperature, student, teacher)
    _write_softmax(teacher, out=gradient)
    expected = torch.mul(student, gradient, out=teacher).sum(-1)
    student_normalizer = _write_softmax(student, out=teacher)
    torch.sub(teacher, gradient, out=gradient).mul_(temperature * factor)
    return (temperature**2 * (student_normalizer.value - expected)).to(student.dtype)


def _mse_rows(student: Tensor, teacher: Tensor, gradient: Tensor, temperature: float, factor: Factor) -> Tensor:
    """Mean squared difference, gradient 2 / K times the difference. The temperature is 1."""
    torch.sub(student, teacher, out=gradient)
    values = torch.mul(gradient, gradient, out=student).mean(-1)
    gradient.mul_(2 / gradient.shape[-1] * factor)
    return values


def _centered_mse_rows(
    student: Tensor, teacher: Tensor, gradient: Tensor, temperature: float, factor: Factor
) -> Tensor:
    """Mean squared difference of logits less their means, gradient 2 / K times it. The temperature is 1."""
    torch.sub(student, teacher, out=gradient)
    gradient.sub_(gradient.mean(-1, keepdim=True))
    values = torch.mul(gradient, gradient, out=student).mean(-1)
    gradient.mul_(2 / gradient.shape[-1] * factor)
    return values


def _hard_cross_entropy_rows(
    student: Tensor, labels: Tensor, gradient: Tensor, temperature: float, factor: Factor
) -> Tensor:
    """-log q of the label, gradient q less 1 at the label. The labels are (n,) int64, the temperature is 1."""
    places = labels[:, None]
    normalizer = _write_softmax(student, out=gradient)
    gradient.scatter_(1, places, gradient.gather(1, places) - 1).mul_(factor)
    return (normalizer.value - student.gather(1, places)[:, 0]).to(student.dtype)


def _taid_rows(
    student: Tensor,
    teacher: Tensor,
    gradient: Tensor,
    temperature: float,
    factor: Factor,
    *,
    progress: float,
    start: float = 0.4,
    end: float = 1.0,
) -> Tensor:
    """The KL to the mixture of both logits, which is a constant."""
    share = taid_share(progress, start, end)
    teacher.mul_(share).add_(student, alpha=1 - share)
    return _kl_divergence_rows(student, teacher, gradient, temperature, factor)


def rows_by_autograd(function: Callable[..., Tensor], name: str) -> RowLoss:
    """The row form of a function of two (n, K) logits that has no gradient written down: it costs their graph.

    name: its key, of which refusals say what stands before an @. Raises ConfigError where it fails, or gives no value
    for each row.
    """
    name, takes_temperature = name.partition("@")[0], "temperature" in inspect.signature(function).parameters

    def rows(
        student: Tensor, teacher: Tensor, gradient: Tensor, temperature: float, factor: Factor, /, **options: Any
    ) -> Tensor:
        options |= {"temperature": temperature} if takes_temperature else {}
        with torch.enable_grad():
            leaf = student.detach().requires_grad_()
            try:
                values = function(leaf, teacher, **options)
                (found,) = torch.autograd.grad(values.sum(), leaf)
            except Exception as error:  # whatever a user's code raises
                raise ConfigError(f"loss {name} fails on {tuple(student.shape)} logits ({error})") from error
        if values.shape != student.shape[:1]:
            raise ConfigError(f"loss {name} gives {tuple(values.shape)} for {tuple(student.shape)} logits")
        gradient.copy_(found).mul_(factor)
        return values.detach().to(student.dtype)

    return rows


# The losses whose gradient is written down, and the one on labels. Those of LOGIT_LOSSES that are not among them go
# through autograd.
ROW_LOSSES: dict[str, RowLoss] = {
    "kl_divergence": _kl_divergence_rows,
    "reverse_kl": _reverse_kl_rows,
    "js_divergence": _js_divergence_rows,
    "cross_entropy": _cross_entropy_rows,
    "mse": _mse_rows,
    "centered_mse": _centered_mse_rows,
    "taid": _taid_rows,
    "hard_cross_entropy": _hard_cross_entropy_rows,
}


def _divide(temperature: float, *logits: Tensor) -> None:
    if temperature != 1:
        for each in logits:
            each.div_(temperature)


class _Normalizer(NamedTuple):
    """The log-sum-exp of rows as what it is read back from: the largest entry, and its share of the softmax.

    The exponential of the largest is exactly 1, so that nothing is exponentiated again. In float64 where there is one:
    at temperature 15 two normalizers near 10 differ by 1e-3.
    """

    largest: Tensor  # (n,)
    share: Tensor  # (n,)

    @property
    def value(self) -> Tensor:
        """(n,) in float64, or in float32 on a device that has none."""
        if _has_float64(self.largest.device):
            return self.largest.double() - self.share.double().log()
        return self.largest - self.share.log()

    def less(self, other: "_Normalizer") -> Tensor:
        """(n,) the difference; without float64 that of each part, which are small numbers where the rows are alike."""
        if _has_float64(self.largest.device):
            return self.value - other.value
        excess = (other.share - self.share) / self.share  # of a ratio near 1, of which log1p keeps the digits
        far = (other.share / self.share).log()
        return (self.largest - other.largest) + torch.where(excess.abs() < 0.5, excess.log1p(), far)


@lru_cache
def _has_float64(device: torch.device) -> bool:
    """Apple's GPUs have none."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return False
    return True


def _write_softmax(logits: Tensor, *, out: Tensor) -> _Normalizer:
    """Writes the softmax of (n, K) to `out`."""
    torch.softmax(logits, -1, out=out)
    return _Normalizer(logits.amax(-1), out.amax(-1))
