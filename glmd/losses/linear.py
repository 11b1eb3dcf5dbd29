"""A loss on logits straight from hidden states and final linear maps, never holding tokens x vocabulary.

    loss = linear_distillation_loss(student_hidden, student_head, teacher_hidden, teacher_head, temperature=15.0)

Over chunks of tokens it makes both logits, the loss and at once the gradient with respect to the student's
logits, which goes into the gradients of hidden states and weight before the chunk is forgotten: four matrix
products in all, and memory that does not grow with the tokens. Recomputing the logits in backward, as
checkpointing does, would take six. `linear_cross_entropy` is the same for labels, with three.
"""

import importlib.util
import inspect
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glmd.errors import ConfigError, suggestion
from glmd.losses.head import Head
from glmd.losses.labels import IGNORED_LABEL
from glmd.losses.logits import LOGIT_LOSSES, LogitScaling
from glmd.losses.probabilities import check_temperature
from glmd.losses.products import converted, product_adder
from glmd.losses.rows import FUSED, EagerRows, Factor, LossSpec, Rows

logger = logging.getLogger(__name__)
ALIGNED = {"cuda"}  # kinds of device whose products want a multiple of 64 rows, and can end with a bias


def linear_distillation_loss(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    *,
    loss: str = "kl_divergence",
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    factor: Factor = 1.0,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Tensor:
    """Factor times the sum over tokens of weight times `LOGIT_LOSSES[loss]` between both models' `head.logits(hidden)`.

    student_hidden: (N, H), teacher_hidden: (N, H of the teacher) states before the final linear map.
    student_head: of K tokens, teacher_head: of K, or of K + D of which D are merged into them.
    token_weights: (N,); tokens of weight 0 are dropped before anything is computed.
    factor: a number, or a constant tensor () which the host does not read. A mean over N tokens costs nothing with a
        factor of 1 / N, and with a division of the result one more pass over the weight's gradient.
    options: of the loss, its keyword-only parameters beside the temperature.

    Returns a scalar, differentiable once in the student's hidden states, weight and bias; the teacher is a constant.
    Matrix products run in bfloat16 where both factors are bfloat16 or autocast says so; everything between
    them, and the sum of the weight's gradient, in float32 (float64 where an input is). On CUDA a bias is added by the
    product, in its dtype. Float16 is widened to
    float32: the gradient of one logit lies near or below the smallest number it can hold. Without tokens the
    result is 0 and still reaches every gradient, so that no rank of a data-parallel run waits for another.
    """
    _check_loss(loss, temperature, options)
    student, teacher = _Side(student_hidden, student_head), _Side(teacher_hidden, teacher_head)
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
    return _apply(student, _Comparison(teacher, loss, temperature, token_weights, factor, options))


def linear_cross_entropy(hidden: Tensor, head: Head, labels: Tensor, *, factor: Factor = 1.0) -> Tensor:
    """Factor times the sum over tokens of `hard_cross_entropy` of the logits `head.logits(hidden)`.

    hidden: (N, H), head: of K tokens. labels: (N,) int64; a token of label -100 counts nothing, and is dropped where
        that does not mean to wait for a device.
    factor: as of `linear_distillation_loss`.
    Returns a scalar; precision and gradients are those of `linear_distillation_loss`.
    """
    student = _Side(hidden, head)
    _check_side("student", student)
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be ({len(hidden)},) int64, got {tuple(labels.shape)} {labels.dtype}")
    is_labeled, weights = labels != IGNORED_LABEL, None
    if labels.device.type == "cpu":
        kept = is_labeled.nonzero().squeeze(-1)
        student, labels = _at_tokens(student, kept), labels[kept]
    else:
        weights, labels = is_labeled.float(), labels.clamp(min=0)
    return _apply(student, _Comparison(labels, "hard_cross_entropy", 1.0, weights, factor))


def chunk_tokens(num_tokens: int, vocabulary_size: int, device_type: str, logit_bytes: int = 2) -> int:
    """How many tokens to take at once: chunks of about one size, as large as pays.

    On a CPU up to 512: smaller ones read and write the weight's gradient more often, larger ones gained nothing. On
    CUDA 256 MiB of logits of one model, within 2048 and 8192 tokens, but no more than 512 MiB: 2048 at 128,000 tokens
    of vocabulary, 4096 at 30,000.
    """
    quarter_gib = 2**28 // (vocabulary_size * logit_bytes)
    most = 512 if device_type == "cpu" else max(64, min(max(quarter_gib, 2048), 2 * quarter_gib, 8192))
    chunks = max(1, -(-num_tokens // most))
    return min(most, -(-num_tokens // (64 * chunks)) * 64) or 1


class _Side(NamedTuple):
    """What a model's logits are made of."""

    hidden: Tensor  # (N, H)
    head: Head


def _at_tokens(side: _Side, tokens: Tensor) -> _Side:
    # Not index_select: its backward starts the threads again for every row, 100 times slower on a busy CPU.
    return side._replace(hidden=side.hidden[tokens])


class _Comparison(NamedTuple):
    """What the student's logits are compared with, and how."""

    teacher: _Side | Tensor  # or labels (N,)
    loss: str
    temperature: float
    token_weights: Tensor | None  # (N,)
    factor: Factor
    options: Mapping[str, Any] = MappingProxyType({})
    needs_gradient: bool = False


def _apply(student: _Side, compared: _Comparison) -> Tensor:
    apply: Callable[..., Tensor] = _LinearLoss.apply
    head, factor = student.head, compared.factor
    if isinstance(factor, Tensor) and factor.device.type == "cpu":
        factor = float(factor)
    compared = compared._replace(factor=factor, needs_gradient=torch.is_grad_enabled())
    return apply(student.hidden, head.weight, head.bias, head.scaling, compared)


class _LinearLoss(torch.autograd.Function):
    """The sum, with the gradients made in the forward; backward only multiplies them by its scalar."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, scaling: LogitScaling, compared: _Comparison
    ) -> Tensor:
        # needs_input_grad looks at the tensors alone; it stays true under no_grad.
        needed = [needed and compared.needs_gradient for needed in ctx.needs_input_grad[:3]]
        total, gradients = _sum_and_gradients(_Side(hidden, Head(weight, bias, scaling)), compared, needed)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place if the graph is retained: it may be walked again with another factor.
        multiply = torch.mul if _graph_is_kept() else _multiply
        gradients = [
            None if gradient is None else multiply(gradient, grad_output).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None


def _multiply(gradient: Tensor, factor: Tensor) -> Tensor:
    """In place, and without a pass over the gradient where the factor is 1, as where the loss was given its own."""
    if factor.device.type == "cpu":
        has_value = not hasattr(factor, "fake_mode")  # as one of a rehearsal has not
        return gradient if has_value and factor == 1 else gradient.mul_(factor)
    if gradient.dtype == torch.float64 or not _may_use_triton(gradient.device, torch.float32):
        return gradient.mul_(factor)
    from glmd.losses.triton_rows import multiply_unless_one

    return multiply_unless_one(gradient, factor)


def _graph_is_kept() -> bool:
    """Whether the backward that is running was called with `retain_graph`; torch tells it to itself alone."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return tell is None or bool(tell())


def _sum_and_gradients(student: _Side, compared: _Comparison, needed: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """The loss sum, and its gradients for the student's three tensors, None where not `needed`."""
    num_tokens, hidden_dtype = len(student.hidden), student.hidden.dtype
    num_words, factor = len(student.head.weight), student.head.scaling.factor
    labels = compared.teacher if isinstance(compared.teacher, Tensor) else None
    student = _for_products(student)
    teacher = None if isinstance(compared.teacher, Tensor) else _for_products(compared.teacher)
    size = chunk_tokens(num_tokens, num_words, student.hidden.device.type, student.hidden.element_size())
    num_rows = max(_rows_of_products(each.hidden) for each in (student, teacher) if each is not None)
    student, teacher = _filled_up(student, num_rows), teacher and _filled_up(teacher, num_rows)
    weight, bias = student.head.weight, student.head.bias
    # Two buffers serve all chunks: in fresh memory the work on them would take several times as long. Rows of weights
    # that only fill up a size give columns of zeros, which the rows never see.
    products = weight.new_empty(min(size, num_rows), len(weight))
    logits = products[:, :num_words]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    spec = LossSpec(
        compared.loss,
        compared.temperature,
        bias,
        student_softcap=student.head.scaling.softcap,
        factor=compared.factor,
        options=compared.options,
    )
    if teacher is None:
        assert labels is not None
        theirs = labels
    else:
        head, own = teacher.head, compared.teacher
        assert isinstance(own, _Side)
        their_products = head.weight.new_empty(len(products), len(head.weight))
        theirs = their_products[:, : len(own.head.weight)]
        dtype = torch.promote_types(dtype, theirs.dtype)
        spec = spec._replace(teacher_bias=head.bias, teacher_softcap=head.scaling.softcap, merged_into=head.merged_into)
    student_bias, teacher_bias, spec = _biases_of_products(spec, products, theirs)
    rows = choose_rows(spec, logits, theirs)
    total = logits.new_zeros((), dtype=dtype)
    # In float16 small gradients would be gone before a loss scale is applied to them.
    hidden_dtype = torch.float32 if hidden_dtype == torch.float16 else hidden_dtype
    grad_hidden = student.hidden.new_empty(student.hidden.shape, dtype=hidden_dtype) if needed[0] else None
    # The first chunk writes it: zeros to add to would be one more pass over a large fresh tensor.
    grad_weight = torch.empty_like(weight, dtype=dtype) if needed[1] else None
    if grad_weight is not None and num_tokens == 0:
        grad_weight.zero_()
    grad_bias = logits.new_zeros(num_words, dtype=dtype) if needed[2] else None
    add_product = product_adder(weight)
    with torch.autocast(logits.device.type, enabled=False):
        for start in range(0, num_rows, size):
            filled, chunk = slice(start, min(start + size, num_rows)), slice(start, min(start + size, num_tokens))
            hidden, gradient = student.hidden[filled], products[: filled.stop - start]
            num = max(0, chunk.stop - start)
            _multiply_into(gradient, hidden, weight, student_bias)
            if teacher is not None:
                _multiply_into(their_products[: len(hidden)], teacher.hidden[filled], teacher.head.weight, teacher_bias)
            weights = None if compared.token_weights is None else compared.token_weights[chunk]
            total += rows(logits[:num], theirs[:num] if teacher is not None else theirs[chunk], weights).sum()
            # From here on the buffer holds the gradient of what stood in it; rows of zeros stay zeros.
            if grad_bias is not None:
                grad_bias += gradient[:, :num_words].sum(0, dtype=dtype)
            if grad_hidden is not None:
                add_product(grad_hidden[filled], gradient, weight, is_first=True)
            if grad_weight is not None:
                add_product(grad_weight, gradient.t(), hidden, is_first=start == 0)
    if factor != 1:  # the hidden states in the weight's gradient had it already
        for each in (grad_hidden, grad_bias):
            if each is not None:
                each.mul_(factor)
    if grad_hidden is not None:
        grad_hidden = grad_hidden[:num_tokens]
    return total, [grad_hidden, None if grad_weight is None else grad_weight[:num_words], grad_bias]


def _biases_of_products(
    spec: LossSpec, student: Tensor, teacher: Tensor
) -> tuple[Tensor | None, Tensor | None, LossSpec]:
    """The biases that products are made with, where that costs nothing, and the spec without them.

    On CUDA the product of narrow matrices ends with it, in their dtype, as under autocast everywhere; a bias in float32
    beside the rows would be more to read than the rows.
    """
    if student.device.type not in ALIGNED:
        return None, None, spec
    student_bias, teacher_bias = (
        None if bias is None else converted(bias, dtype, filled=True)
        for bias, dtype in ((spec.student_bias, student.dtype), (spec.teacher_bias, teacher.dtype))
    )
    return student_bias, teacher_bias, spec._replace(student_bias=None, teacher_bias=None)


def _multiply_into(product: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(hidden, weight.t(), out=product)
    else:
        torch.addmm(bias, hidden, weight.t(), out=product)


def _rows_of_products(hidden: Tensor) -> int:
    """N, or the next multiple of 64 where narrow matrices are multiplied on a CPU.

    OneDNN, which does that, keeps what it has prepared, megabytes, for each number of rows that it ever met: texts of
    any length filled gigabytes.
    """
    is_prepared = hidden.device.type == "cpu" and hidden.dtype in (torch.bfloat16, torch.float16)
    return -(-len(hidden) // 64) * 64 if is_prepared else len(hidden)


def _filled_up(side: _Side, num_rows: int) -> _Side:
    """With rows of zeros behind its hidden states."""
    surplus = num_rows - len(side.hidden)
    return side._replace(hidden=torch.nn.functional.pad(side.hidden, (0, 0, 0, surplus))) if surplus else side


def choose_rows(spec: LossSpec, student: Tensor, teacher: Tensor) -> Rows:
    """The rows for such products. A function of device, dtypes and spec alone, so that a resumed run has the same."""
    dtypes = {student.dtype, teacher.dtype} - {torch.int64}
    can_be_fused = spec.loss in FUSED and spec.merged_into is None and torch.float64 not in dtypes
    if can_be_fused and _may_use_triton(student.device, student.dtype):
        from glmd.losses.triton_rows import TritonRows

        return TritonRows(spec)
    return EagerRows(spec, student, teacher)


def _may_use_triton(device: torch.device, dtype: torch.dtype) -> bool:
    return _triton_is_allowed[0] and device.type == "cuda" and _triton_works(device, dtype)


_triton_is_allowed = [True]


def allow_triton(allowed: bool) -> None:
    """Whether the kernel may be used where it works; it may not where it works on some ranks alone."""
    _triton_is_allowed[:] = [allowed]


@lru_cache
def _triton_works(device: torch.device, dtype: torch.dtype) -> bool:
    problem = triton_problem(device, dtype)
    if problem is not None:
        logger.warning("Triton does not work on %s in %s, the loss runs in plain torch: %s", device, dtype, problem)
    return problem is None


@lru_cache
def triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel does not compile or run there; None where it does. It needs a C compiler and a known device."""
    if importlib.util.find_spec("triton") is None:
        return "it is not installed"
    try:
        from glmd.losses.triton_rows import TritonRows

        zeros = torch.zeros(1, 16, device=device, dtype=dtype)
        TritonRows(LossSpec("kl_divergence"))(zeros, zeros.clone(), None)
    except Exception as error:  # of a compiler, a driver, or memory that is full
        return str(error) or type(error).__name__
    return None


def _for_products(side: _Side) -> _Side:
    """Hidden states and weight in the dtype of their matrix products, hidden states and bias times the factor."""
    hidden, head = side
    dtype, device = torch.promote_types(hidden.dtype, head.weight.dtype), hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if dtype == torch.float16:
        dtype = torch.float32
    bias, factor = head.bias, head.scaling.factor
    if factor != 1:
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32)) * factor
        bias = None if bias is None else bias * factor
    return _Side(
        hidden.to(dtype), head._replace(weight=converted(head.weight, dtype, filled=device in ALIGNED), bias=bias)
    )


def _check_loss(loss: str, temperature: float, options: Mapping[str, Any]) -> None:
    if loss not in LOGIT_LOSSES:
        raise ConfigError(f"loss {loss!r} is unknown{suggestion(loss, LOGIT_LOSSES)}")
    check_temperature(temperature)
    parameters = inspect.signature(LOGIT_LOSSES[loss]).parameters
    given = options if temperature == 1 else {**options, "temperature": temperature}
    for name, value in given.items():
        if name not in parameters:
            raise ConfigError(f"{name} has no effect on {loss}, got {value}")


def _check_side(name: str, side: _Side) -> None:
    hidden, weight, bias = tuple(side.hidden.shape), tuple(side.head.weight.shape), side.head.bias
    if len(hidden) != 2 or len(weight) != 2 or hidden[1] != weight[1]:
        raise ValueError(f"{name}_hidden and the {name}'s weight must be (N, H) and (K, H), got {hidden} and {weight}")
    if bias is not None and bias.shape != weight[:1]:
        raise ValueError(f"the {name}'s bias must be ({weight[0]},), got {tuple(bias.shape)}")


def _check_shapes(student: _Side, teacher: _Side) -> None:
    """Raises ValueError unless both make (N, K) logits of one shape."""
    _check_side("student", student)
    _check_side("teacher", teacher)
    if len(student.hidden) != len(teacher.hidden):
        raise ValueError(
            f"student_hidden has {len(student.hidden)} tokens and teacher_hidden {len(teacher.hidden)}; "
            "they must be the same"
        )
    if student.head.merged_into is not None or student.head.size != teacher.head.size:
        merged = len(teacher.head.weight) - teacher.head.size
        raise ValueError(
            f"the student's head has {len(student.head.weight)} tokens and the teacher's {len(teacher.head.weight)}"
            f"{f', of which {merged} are merged' if merged else ''}; slice the teacher's to the kept tokens first"
        )
