"""One micro-batch of a stage with random weights: counted without any memory, or timed on this machine.

    count = counted(cast, examples=8, length=512)          # bytes at the peaks and FLOPs, on weights that hold nothing
    micro_batch, update = timed(cast, examples=8, length=512)     # seconds, with weights

Both run the distiller and the teacher of training, on texts as long as may be, which is the most that a batch costs.
"""

import copy
import logging
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, sdpa_backward_flop, sdpa_flop

from glmd.data.batches import Batch, with_positions
from glmd.distillation.distiller import Distiller
from glmd.distillation.objective import Objective
from glmd.distillation.teacher import AllOutputs, Ensemble, OnlineTeacher, TeacherOutputs
from glmd.errors import GlmdError
from glmd.losses.labels import IGNORED_LABEL
from glmd.losses.linear import chunk_tokens
from glmd.losses.rows import BLOCK_ROWS
from glmd.models.attention import set_attention
from glmd.models.heads import backbone, backbone_prefix, final_linear, lm_kind
from glmd.models.loading import language_model_class
from glmd.models.quantization import Quantization, quantized_linears, quantized_savings
from glmd.tasks.forms import TaskForm, class_logits
from glmd.vocabulary.slicing import tie_weights
from glmd.vocabulary.vocabulary import Vocabulary

logger = logging.getLogger(__name__)
aten = torch.ops.aten
# What code meets that looks at numbers where there are none.
LOOKED_AT = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
# What torch's counter leaves out: products in place, and a CPU's fused attention.
MORE_FLOPS: dict[Any, Callable[..., int]] = {
    aten.addmm_: addmm_flop,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


@dataclass(frozen=True)
class Cast:
    """Who is on stage: the models of a step, by their configs, and what it compares.

    teacher: None where nothing is asked of one. further: configs of others that the objective asks. is_cached: its
        hidden states are read from disk. source_size: V. form: how a task is asked; None on a corpus. masked: share of
        tokens with a label. attention: `attn_implementation`; those that keep no probabilities are counted as sdpa is.
        shares_teacher: under FSDP the ranks share out its backbone. target_length: tokens that an encoder-decoder says
        of a text of the corpus, or that a GLM reads of it with its blanks; 0: as many as there are.
        own_matrices: as of a plan.
    """

    objective: Objective
    student: Any
    source_size: int
    teacher: Any | None = None
    teacher_dtype: str = "float32"
    quantization: Quantization | None = None
    shares_teacher: bool = True
    merge_dropped: bool = False
    is_cached: bool = False
    form: TaskForm | None = None
    masked: float = 0.0
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    attention: str | None = None
    further: tuple[Any, ...] = ()
    target_length: int = 0
    own_matrices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Count:
    """Bytes and floating-point operations of one micro-batch on one device."""

    teacher: int  # weights, quantized where they will be
    teacher_shared: int  # of them, what FSDP shares out
    teacher_gathered: int  # of them, what a sharded teacher holds whole at a time
    head: int  # the teacher's, sliced
    student: int
    student_gathered: int  # of them, what a sharded student holds whole at a time
    optimizer: int
    teacher_forward: int  # at its peak, beside the weights
    student_step: int  # forward, loss and backward at their peak, beside weights and gradients
    chunk: int  # of it, the logits of both models that the linear loss holds at a time
    loss: int  # of it, all that the linear loss holds: also a block in float32, and the weight's gradient
    teacher_flops: int
    student_flops: int


class Step:
    """The models of a step, with the run's own distiller and teacher."""

    def __init__(self, cast: Cast) -> None:
        self.cast, objective = cast, cast.objective
        logits = cast.form.logits if cast.form is not None else class_logits
        words, task = _models(cast, cast.student, torch.float32, objective.needs)
        kept = np.arange(cast.student.vocab_size)
        source_size = max(
            cast.source_size, len(kept)
        )  # a teacher that is fine-tuned may have rows beyond its tokenizer
        vocabulary = Vocabulary(kept, np.minimum(np.arange(source_size), len(kept) - 1))
        self.distiller = Distiller(
            objective,
            vocabulary.token_map,
            language_model=words,
            classifier=task,
            task_logits=logits,
            num_classes=0 if cast.form is None else cast.form.task.num_classes,
        )
        self.distiller.train()
        if cast.gradient_checkpointing:
            self.distiller.recompute_activations()
        self.teachers: list[OnlineTeacher] = []
        for number, config in enumerate(filter(None, (cast.teacher, *cast.further))):
            needs = objective.further_needs if number else objective.teacher_needs
            words, task = _models(cast, config, getattr(torch, cast.teacher_dtype), needs)
            words = words if "head" in needs or task is None else None
            options: dict[str, Any] = {"merge_dropped": cast.merge_dropped, "task_logits": logits}
            self.teachers.append(OnlineTeacher(words, task, vocabulary, **options))
        if self.teachers:
            self.distiller.learn_from(Ensemble(self.teachers), is_proved=True)
        for split in {*self.distiller.splits, *chain.from_iterable(each.splits for each in self.teachers)}:
            if cast.attention is not None:
                set_attention(split.model, cast.attention)
        self.parameters = list(self.distiller.parameters())

    def teach(self, batch: Batch) -> AllOutputs:
        """What the teachers say, or what caches of them give."""
        return tuple(self._ask(each, batch) for each in self.teachers) or TeacherOutputs()

    def _ask(self, teacher: OnlineTeacher, batch: Batch) -> TeacherOutputs:
        if not self.cast.is_cached:
            return teacher(batch)
        hidden, head, device = None, teacher.head, batch["input_ids"].device
        if head is not None:
            hidden = head.weight.new_empty(int(batch["predicts"].sum()), head.weight.shape[1])
        answers = None
        if self.cast.form is not None:
            own = self.cast.form.num_outputs(self.cast.teacher)
            classes = int(batch["num_choices"][0]) if "num_choices" in batch else own
            decisions = int(batch["num_decisions"].sum()) if "num_decisions" in batch else len(batch["example_id"])
            answers = torch.zeros(decisions, classes, device=device)
        return TeacherOutputs(hidden, head, answers)

    def learn(self, batch: Batch, outputs: AllOutputs) -> None:
        """The student's forward, the loss and the backward."""
        dtype = torch.float16 if self.cast.mixed_precision == "fp16" else torch.bfloat16
        device = batch["input_ids"].device.type
        with torch.autocast(device, dtype=dtype, enabled=self.cast.mixed_precision != "no"):
            total = self.distiller(batch, outputs).sum()
        total.backward()


def _models(cast: Cast, config: Any, dtype: torch.dtype, needs: frozenset[str]) -> tuple[Any, Any]:
    """(language model, task model), None for one that is not needed; a cloze is put to the first.

    Where only layers are compared it is a language model that has them.
    """
    task, own_head, language_model = "task_head" in needs, cast.form is not None and cast.form.has_own_head, None
    if "head" in needs or not task or not own_head:
        language_model = language_model_class(config).from_config(config, dtype=dtype)
        tie_weights(language_model, cast.own_matrices)  # which is left out with the drawing of weights
    if not task or not own_head:
        return language_model, language_model if task else None
    assert cast.form is not None, "a task has a form"
    config = copy.deepcopy(config)
    config.num_labels = cast.form.task.num_outputs
    return language_model, cast.form.model_class(config).from_config(config, dtype=dtype)


def _batch(cast: Cast, examples: int, choices: int, length: int) -> Batch:
    """Texts of one word, `choices` for each example; one token is padding, so that models make their masks."""
    if cast.target_length and lm_kind(cast.student) == "blank-infilling":
        length = cast.target_length
    ids = torch.ones((examples * choices, length), dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "example_id": torch.arange(examples)}
    batch["attention_mask"][-1, -1] = 0
    if cast.form is not None:
        batch["labels"] = torch.zeros_like(batch["example_id"])
        batch |= cast.form.dummy(examples, choices, length)
    elif lm_kind(cast.student) == "encoder-decoder":
        batch["target_ids"] = torch.ones((examples * choices, cast.target_length or length), dtype=torch.long)
    batch["predicts"] = torch.ones_like(batch.get("target_ids", ids), dtype=torch.bool)
    batch["predicts"][-1, -1] = False
    if cast.masked:
        batch["lm_labels"] = torch.full_like(batch.get("target_ids", ids), IGNORED_LABEL)
        batch["lm_labels"][:, : math.ceil(cast.masked * length)] = 1
    return with_positions(batch)


def counted(cast: Cast, *, examples: int, length: int, choices: int = 1, fused_attention: bool = True) -> Count:
    """What one micro-batch takes. Nothing is computed: weights have shapes and no memory.

    fused_attention: as on a GPU, where attention never keeps its (S, S) probabilities; a CPU does where it has dropout.
    Gradients are there from the beginning, as in every micro-batch of a step but the first.
    """
    flops = FlopCounterMode(display=False)
    flops.flop_registry |= MORE_FLOPS
    with _fake_weights():
        step = Step(cast if cast.attention == "eager" else replace(cast, attention=None))
        for parameter in step.parameters:
            parameter.grad = torch.zeros_like(parameter)
    # Outside of the mode ids and masks stay real, so that code may look at them; weights stay what they are.
    batch = _batch(cast, examples, choices, length)
    with torch.compiler.set_stance("force_eager"), _OnFakes(fused_attention), Allocated() as allocated, flops:
        outputs = step.teach(batch)
        teacher_forward, teacher_flops = allocated.peak, flops.get_total_flops()
        allocated.peak = allocated.now
        step.learn(batch, outputs)
    student, language_model = sum(p.nbytes for p in step.parameters), step.distiller.language_model
    chunk = loss = wider = 0
    if "head" in cast.objective.teacher_needs:
        assert language_model is not None, "predicts the words"
        words, width = final_linear(language_model).weight.shape
        theirs = cast.source_size if cast.merge_dropped else words
        tokens = batch["predicts"].numel()
        chunk = chunk_bytes(cast, tokens, words, fused_attention)
        wider = chunk - chunk_bytes(cast, tokens, words, False)  # the fake tensors are of a CPU
        loss = chunk + 4 * words * width + 4 * (2 * words + theirs) * BLOCK_ROWS["cpu"]
    heads = [each.head for each in step.teachers if each.head is not None]
    live = [] if cast.is_cached else step.teachers
    weights = sum(_bytes([each.base, each.language_model]) for each in live)
    if live and cast.quantization is not None:
        weights -= sum(quantized_savings(each.base, cast.quantization) for each in live)
        if cast.quantization == "4bit":  # a matrix is whole again for its product
            matrices = chain.from_iterable(quantized_linears(each.base).values() for each in live)
            teacher_forward += max(each.weight.nbytes for each in matrices)
    shared = live if cast.shares_teacher and not cast.quantization else []
    return Count(
        teacher=weights,
        teacher_shared=sum(_bytes([backbone(each.base)]) - _tied_bytes(each) for each in shared),
        teacher_gathered=max((_gathered(backbone(each.base)) for each in shared), default=0),
        head=sum(each.nbytes for head in heads for each in (head.weight, head.bias) if each is not None),
        student=student,
        student_gathered=_gathered(step.distiller),
        optimizer=2 * student + 4 * len(step.parameters),  # AdamW's two moments and its count of steps
        teacher_forward=teacher_forward,
        student_step=allocated.peak + wider,
        chunk=chunk,
        loss=loss,
        teacher_flops=teacher_flops,
        student_flops=flops.get_total_flops() - teacher_flops,
    )


def require_fitting_layers(cast: Cast) -> None:
    """Let a cast's terms on layers compare what has the shapes of a step, and no numbers.

    Raises ConfigError or ModelError, one line, where they do not fit. Of a model or a loss whose code looks at numbers
    nothing can be said; the first step of a stage refuses the same.
    """
    batch, of_torch = _batch(cast, 2, 1, 8), logging.getLogger(FakeTensor.__module__)
    of_torch.disabled = True  # which would say in many lines what is said here in one
    try:
        with _fake_weights():
            step = Step(replace(cast, attention=None))
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), _OnFakes(True):
            step.distiller(batch, step.teach(batch))
    except GlmdError as error:
        if not isinstance(error.__cause__, LOOKED_AT):
            raise
    except Exception:  # of transformers' code, which has no numbers to look at
        logger.debug("%s: no step can be made without numbers", type(cast.student).__name__, exc_info=True)
    finally:
        of_torch.disabled = False


@contextmanager
def _fake_weights() -> Iterator[None]:
    """Models that are made here have shapes and no memory."""
    from transformers.initialization import no_init_weights

    with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():  # whose draws may look at what they drew
        yield


def chunk_bytes(cast: Cast, tokens: int, words: int, is_gpu: bool) -> int:
    """What the logits of both models take that the linear loss holds at a time, of a micro-batch of so many tokens."""
    number = 2 if cast.mixed_precision == "bf16" else 4
    theirs = cast.source_size if cast.merge_dropped else words
    return number * (words + theirs) * chunk_tokens(tokens, words, "cuda" if is_gpu else "cpu", number)


def timed(cast: Cast, *, examples: int, length: int, choices: int = 1) -> tuple[float, float]:
    """Seconds of a micro-batch and of an update of the weights, medians of three after one that is not counted."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    with device:
        step, batch = Step(cast), _batch(cast, examples, choices, length)
        step.distiller.to(device)
        optimizer = torch.optim.AdamW(step.parameters, fused=True)
        found = []
        for _ in range(4):
            moments = [_now()]
            step.learn(batch, step.teach(batch))
            moments.append(_now())
            nn.utils.clip_grad_norm_(step.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            moments.append(_now())
            found.append((moments[1] - moments[0], moments[2] - moments[1]))
    return statistics.median(each[0] for each in found[1:]), statistics.median(each[1] for each in found[1:])


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class Allocated(TorchDispatchMode):
    """Bytes of tensors that were made within and are still alive, and the most that there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        given = {id(each.untyped_storage()) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(returned):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                if id(storage) not in self.alive | given:
                    self.alive.add(id(storage))
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._forget, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return returned

    def _forget(self, name: int, size: int) -> None:
        self.alive.discard(name)
        self.now -= size


class _OnFakes(TorchFunctionMode):
    """What fake tensors cannot do by themselves: be indexed by a mask, and choose a GPU's attention."""

    def __init__(self, fused_attention: bool) -> None:
        super().__init__()
        self.fused_attention = fused_attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and isinstance(args[0], FakeTensor) and _is_mask(args[1]):
            return args[0][args[1].nonzero(as_tuple=True)]
        if func is Tensor.nonzero and isinstance(args[0], FakeTensor):
            return torch.ones(args[0].shape).nonzero()  # which labels are none nobody knows: all are kept, the most
        return func(*args, **kwargs)

    def __enter__(self) -> Any:
        # Not by the mode, which is off where the backward runs layers again.
        self.attend = attend = nn.functional.scaled_dot_product_attention
        if self.fused_attention:  # with dropout only a GPU has a kernel that keeps nothing for it
            nn.functional.scaled_dot_product_attention = lambda *args, **given: attend(
                *args, **given | {"dropout_p": 0.0}
            )
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        nn.functional.scaled_dot_product_attention = self.attend
        super().__exit__(*raised)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _bytes(models: list[Any]) -> int:
    tensors: Iterator[Tensor] = chain.from_iterable(chain(m.parameters(), m.buffers()) for m in models if m is not None)
    return sum({id(each): each.nbytes for each in tensors}.values())


def _tied_bytes(teacher: OnlineTeacher) -> int:
    """What a backbone shares with the heads over it, which stay whole."""
    inside = {id(each): each.nbytes for each in backbone(teacher.base).parameters()}
    outside: set[int] = set()
    for split in teacher.splits:
        prefix, named = backbone_prefix(split.model), split.model.named_parameters(remove_duplicate=False)
        outside |= {id(each) for name, each in named if not name.startswith(prefix)}
    return sum(size for name, size in inside.items() if name in outside)


def _gathered(student: nn.Module) -> int:
    """What stands outside the layers, and two layers: the one that is run, and the next, which is being fetched."""
    lists = [list(part) for part in student.modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        return _bytes([student])
    layers = max(lists, key=_bytes)
    return _bytes([student]) - _bytes(layers) + 2 * max(_bytes([layer]) for layer in layers)
