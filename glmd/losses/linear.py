"""A logit loss straight from hidden states and final linear maps, never holding tokens x vocabulary.

    loss = linear_distillation_loss(
        student_hidden, head.weight, teacher_hidden, teacher_weight, temperature=15.0
    )

Over chunks of tokens it makes both logits, the loss and at once the gradient with respect to the student's
logits, which goes into the gradients of hidden states and weight before the chunk is forgotten: four matrix
products in all, and memory that does not grow with the tokens. Recomputing the logits in backward, as
checkpointing does, would take six.
"""

import difflib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glmd.errors import ConfigError
from glmd.losses.logits import check_temperature, merge_words

# Smaller chunks read and write the weight's gradient more often; larger ones gained nothing on a CPU.
CHUNK_TOKENS = 512


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    merged_into: Tensor | None = None,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    loss: str = "kl_divergence",
) -> Tensor:
    """Sum over tokens of weight times `LOGIT_LOSSES[loss]` between the logits `hidden @ weight.T + bias`.

    student_hidden: (N, H), teacher_hidden: (N, H of the teacher) states before the final linear map.
    student_weight: (K, H), teacher_weight: (K, H of the teacher). student_bias, teacher_bias: (K,).
    merged_into: (D,) for a teacher of K + D words, whose last D each give their probability to one of the first K
        (`merge_words`).
    token_weights: (N,); tokens of weight 0 are dropped before anything is computed.

    Returns a scalar, differentiable once in the student's three tensors; the teacher is a constant.
    Matrix products run in bfloat16 where both factors are bfloat16 or autocast says so; everything between
    them, and the sum of the weight's gradient, in float32 (float64 where an input is). Float16 is widened to
    float32: the gradient of one logit lies near or below the smallest number it can hold. Without tokens the
    result is 0 and still reaches every gradient, so that no rank of a data-parallel run waits for another.
    """
    rows = _checked_rows(loss, temperature)
    student = _Head(student_hidden, student_weight, student_bias)
    teacher = _Head(teacher_hidden, teacher_weight, teacher_bias, merged_into)
    _check_shapes(student, teacher)
    if token_weights is not None:
        if token_weights.shape != student_hidden.shape[:1] or token_weights.requires_grad:
            raise ValueError(
                f"token_weights must be a constant per token ({len(student_hidden)},), got "
                f"{tuple(token_weights.shape)} with requires_grad={token_weights.requires_grad}"
            )
        kept = token_weights.nonzero().squeeze(-1)
        student, teacher = _at_tokens(student, kept), _at_tokens(teacher, kept)
        token_weights = token_weights[kept]
    apply: Callable[..., Tensor] = _LinearLoss.apply
    return apply(
        student.hidden,
        student.weight,
        student.bias,
        teacher,
        _Task(rows, temperature, token_weights, torch.is_grad_enabled()),
    )


class _Head(NamedTuple):
    """What a model's logits are made of."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (K, H)
    bias: Tensor | None  # (K,)
    merged_into: Tensor | None = None  # (D,) of a head of K + D words


def _at_tokens(head: _Head, tokens: Tensor) -> _Head:
    # Not index_select: its backward starts the threads anew for every row, 100 times slower on a busy CPU.
    return head._replace(hidden=head.hidden[tokens])


class _Task(NamedTuple):
    """What to compute from the two logits."""

    rows: "RowLoss"
    temperature: float
    token_weights: Tensor | None  # (N,)
    needs_gradient: bool


class _LinearLoss(torch.autograd.Function):
    """The sum, with the gradients made in the forward; backward only multiplies them by its scalar."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: _Head, task: _Task) -> Tensor:
        # needs_input_grad looks at the tensors alone; it stays true under no_grad.
        needed = [needed and task.needs_gradient for needed in ctx.needs_input_grad[:3]]
        total, gradients = _sum_and_gradients(_Head(hidden, weight, bias), teacher, task, needed)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: the graph may be retained and walked again with another factor.
        gradients = [
            None if gradient is None else (gradient * grad_output).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None


def _sum_and_gradients(
    student: _Head, teacher: _Head, task: _Task, needed: list[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss sum, and its gradients for the student's three tensors, None where not `needed`."""
    num_tokens, vocabulary_size = len(student.hidden), len(student.weight)
    hidden_dtype = student.hidden.dtype
    student, teacher = _in_product_dtype(student), _in_product_dtype(teacher)
    dtype = torch.promote_types(torch.promote_types(student.weight.dtype, teacher.weight.dtype), torch.float32)
    new = student.hidden.new_empty(0, dtype=dtype)
    total = new.new_zeros(())
    grad_hidden = torch.empty_like(student.hidden, dtype=hidden_dtype) if needed[0] else None
    grad_weight = new.new_zeros(student.weight.shape) if needed[1] else None
    grad_bias = new.new_zeros(vocabulary_size) if needed[2] else None
    # Three buffers serve all chunks: in fresh memory the elementwise work takes four times as long.
    buffers = new.new_empty(3, min(CHUNK_TOKENS, num_tokens), vocabulary_size)
    wide = new.new_empty(2 if teacher.merged_into is not None else 0, buffers.shape[1], len(teacher.weight))
    product = torch.empty_like(student.weight) if needed[1] and student.weight.dtype != dtype else None
    with torch.autocast(new.device.type, enabled=False):
        for start in range(0, num_tokens, CHUNK_TOKENS):
            chunk = slice(start, min(start + CHUNK_TOKENS, num_tokens))
            student_logits, teacher_logits, gradient = buffers[:, : chunk.stop - start]
            _write_logits(student, chunk, student_logits, scratch=gradient)
            if teacher.merged_into is None:
                _write_logits(teacher, chunk, teacher_logits, scratch=gradient)
            else:
                every_word, scratch = wide[:, : chunk.stop - start]
                _write_logits(teacher, chunk, every_word, scratch=scratch)
                teacher_logits.copy_(merge_words(every_word, teacher.merged_into))
            values = task.rows(student_logits, teacher_logits, gradient, task.temperature)
            if task.token_weights is not None:
                weights = task.token_weights[chunk].to(dtype)
                values = values * weights
                gradient.mul_(weights[:, None])
            total += values.sum()
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
            if gradient.dtype != student.weight.dtype:
                gradient = _narrow_view(student_logits, student.weight.dtype).copy_(gradient)
            if grad_hidden is not None:
                grad_hidden[chunk] = gradient @ student.weight
            if grad_weight is not None and product is None:
                grad_weight.addmm_(gradient.t(), student.hidden[chunk])
            elif grad_weight is not None:
                grad_weight += torch.mm(gradient.t(), student.hidden[chunk], out=product)
    return total, [grad_hidden, grad_weight, grad_bias]


def _in_product_dtype(head: _Head) -> _Head:
    """Hidden states and weight in the dtype of their matrix products."""
    dtype, device = torch.promote_types(head.hidden.dtype, head.weight.dtype), head.hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if dtype == torch.float16:
        dtype = torch.float32
    return head._replace(hidden=head.hidden.to(dtype), weight=head.weight.to(dtype))


def _write_logits(head: _Head, chunk: slice, out: Tensor, *, scratch: Tensor) -> None:
    """Writes the chunk's (n, K) logits to `out`; `scratch`, alike, holds the product if that is narrower."""
    if head.weight.dtype == out.dtype:
        torch.mm(head.hidden[chunk], head.weight.t(), out=out)
    else:
        narrow = _narrow_view(scratch, head.weight.dtype)
        out.copy_(torch.mm(head.hidden[chunk], head.weight.t(), out=narrow))
    if head.bias is not None:
        out.add_(head.bias)


def _narrow_view(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of `buffer`'s shape and a narrower dtype in the first part of its memory."""
    return buffer.view(dtype).flatten()[: buffer.numel()].view(buffer.shape)


# A row loss gets the two logits and a third buffer, all (n, K) in float32 or better, and the temperature. It
# returns the loss of each row (n,) and leaves the gradient with respect to the student's logits in the third
# buffer; the logits are its scratch space. A compiled or fused one has the same signature and takes its place
# in ROW_LOSSES.
RowLoss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _kl_divergence_rows(student: Tensor, teacher: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p || q), gradient T (q - p), for the teacher's softmax p and the student's q."""
    _divide(temperature, student, teacher)
    teacher_normalizer = _write_softmax(teacher, out=gradient)
    gap = teacher.sub_(student).mul_(gradient).sum(-1)
    student_normalizer = _write_softmax(student, out=teacher)
    torch.sub(teacher, gradient, out=gradient)
    # sum(q - p) is 0 but for rounding. With it, what rounding did to the two normalisations cancels to first
    # order; without it a row errs by 1e-4 at temperature 15, where the KL is 1e-3 and the normalisers are 10.
    values = student_normalizer - teacher_normalizer + gap + gradient.sum(-1)
    gradient.mul_(temperature)
    return (temperature**2 * values).to(student.dtype)


def _reverse_kl_rows(student: Tensor, teacher: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    """T^2 KL(q || p), gradient T q (log(q / p) - KL), for the teacher's softmax p and the student's q."""
    _divide(temperature, student, teacher)
    teacher_normalizer = _write_softmax(teacher, out=gradient)
    torch.sub(student, teacher, out=teacher)
    student_normalizer = _write_softmax(student, out=gradient)
    log_ratio = teacher.add_((teacher_normalizer - student_normalizer).to(teacher.dtype)[:, None])
    values = torch.mul(log_ratio, gradient, out=student).sum(-1)
    gradient.mul_(log_ratio.sub_(values[:, None])).mul_(temperature)
    return temperature**2 * values


def _js_divergence_rows(student: Tensor, teacher: Tensor, gradient: Tensor, temperature: float) -> Tensor:
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
    gap.add_((student_normalizer - teacher_normalizer).to(gap.dtype)[:, None])
    t = torch.div(gap, 2, out=student).tanh_()
    mixture = gradient.add_(q).div_(2)
    size, is_near = gap.abs(), gap.abs() < 1
    far = 2 * math.log(2) - size - 2 * torch.log1p(torch.exp(-size))
    values = (gap * t).add_(torch.where(is_near, torch.log1p(-t.square()), far)).mul_(mixture).sum(-1) / 2
    log_ratio = torch.where(is_near, torch.log1p(-t), math.log(2) - torch.nn.functional.softplus(gap))
    torch.mul(q, log_ratio, out=gradient)
    gradient.sub_(q.mul_(gradient.sum(-1, keepdim=True))).mul_(temperature / 2)
    return temperature**2 * values


def _cross_entropy_rows(student: Tensor, teacher: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    """-T^2 sum(p log q), gradient T (q - p), for the teacher's softmax p and the student's q."""
    _divide(temperature, student, teacher)
    _write_softmax(teacher, out=gradient)
    expected = torch.mul(student, gradient, out=teacher).sum(-1)
    student_normalizer = _write_softmax(student, out=teacher)
    torch.sub(teacher, gradient, out=gradient).mul_(temperature)
    return (temperature**2 * (student_normalizer - expected)).to(student.dtype)


def _mse_rows(student: Tensor, teacher: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    """Mean squared difference, gradient 2 / K times the difference. The temperature is 1."""
    torch.sub(student, teacher, out=gradient)
    values = torch.mul(gradient, gradient, out=student).mean(-1)
    gradient.mul_(2 / gradient.shape[-1])
    return values


def _centred_mse_rows(student: Tensor, teacher: Tensor, gradient: Tensor, temperature: float) -> Tensor:
    """Mean squared difference of logits less their means, gradient 2 / K times it. The temperature is 1."""
    torch.sub(student, teacher, out=gradient)
    gradient.sub_(gradient.mean(-1, keepdim=True))
    values = torch.mul(gradient, gradient, out=student).mean(-1)
    gradient.mul_(2 / gradient.shape[-1])
    return values


# The row form of each function in LOGIT_LOSSES.
ROW_LOSSES: dict[str, RowLoss] = {
    "kl_divergence": _kl_divergence_rows,
    "reverse_kl": _reverse_kl_rows,
    "js_divergence": _js_divergence_rows,
    "cross_entropy": _cross_entropy_rows,
    "mse": _mse_rows,
    "centred_mse": _centred_mse_rows,
}


def _divide(temperature: float, *logits: Tensor) -> None:
    if temperature != 1:
        for each in logits:
            each.div_(temperature)


def _write_softmax(logits: Tensor, *, out: Tensor) -> Tensor:
    """Writes the softmax of (n, K) to `out`; returns the log-sum-exp (n,) in float64.

    That is read back from the largest entry, whose exponential is exactly 1, not by exponentiating again.
    """
    torch.softmax(logits, -1, out=out)
    return logits.amax(-1).double() - out.amax(-1).double().log()


def _checked_rows(loss: str, temperature: float) -> RowLoss:
    if loss not in ROW_LOSSES:
        close = difflib.get_close_matches(loss, ROW_LOSSES, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(ROW_LOSSES)}"
        raise ConfigError(f"loss {loss!r} is unknown{hint}")
    check_temperature(temperature)
    if loss in ("mse", "centred_mse") and temperature != 1:
        raise ConfigError(f"temperature has no effect on {loss}, got {temperature}")
    return ROW_LOSSES[loss]


def _check_shapes(student: _Head, teacher: _Head) -> None:
    """Raises ValueError unless both make (N, K) logits of one shape."""
    for name, head in (("student", student), ("teacher", teacher)):
        hidden, weight = tuple(head.hidden.shape), tuple(head.weight.shape)
        if len(hidden) != 2 or len(weight) != 2 or hidden[1] != weight[1]:
            raise ValueError(f"{name}_hidden and {name}_weight must be (N, H) and (K, H), got {hidden} and {weight}")
        if head.bias is not None and head.bias.shape != weight[:1]:
            raise ValueError(f"{name}_bias must be ({weight[0]},), got {tuple(head.bias.shape)}")
    if len(student.hidden) != len(teacher.hidden):
        raise ValueError(
            f"student_hidden has {len(student.hidden)} tokens and teacher_hidden {len(teacher.hidden)}; "
            "they must be the same"
        )
    merged = 0 if teacher.merged_into is None else len(teacher.merged_into)
    if len(student.weight) + merged != len(teacher.weight):
        raise ValueError(
            f"student_weight has {len(student.weight)} words and teacher_weight {len(teacher.weight)}"
            f"{f', of which {merged} are merged' if merged else ''}; slice the teacher's to the kept words first"
        )
