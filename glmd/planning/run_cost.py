"""What a run will cost: memory of a device, disk, FLOPs, tokens, time, and the largest batch, before a weight is read.

    cost = run_cost(make_plan(config), Layout(devices=8, device_memory=80e9))
    print(table(cost))

Bytes at the peaks and FLOPs are counted on a rehearsal of each stage's step; the rest is arithmetic.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from glmd.data.infilling import Infilling, corruption_for
from glmd.data.token_store import TokenStore, open_token_store
from glmd.distillation.teacher_cache import TeacherCache
from glmd.errors import ConfigError, ModelError, RunError
from glmd.planning.plan import Plan, head_width
from glmd.planning.rules import cached_stages
from glmd.planning.stages import Stage, learner_config, lines, teacher_config
from glmd.planning.step_cost import Cast, Count, chunk_bytes, counted, timed
from glmd.runtime.memory import USABLE, memory_of_this_machine
from glmd.tasks.forms import task_form

Sharding = Literal["none", "fsdp"]


@dataclass(frozen=True)
class Layout:
    """What a run is to train on. device_memory: bytes of a GPU; None for what this machine has."""

    devices: int = 1
    device_memory: float | None = None
    sharding: Sharding = "none"

    def __post_init__(self) -> None:
        if self.sharding == "fsdp" and self.devices == 1:
            raise ConfigError("--sharding fsdp has no effect on one device; give --devices")

    @property
    def usable(self) -> float:
        """Bytes that the parts of a step may fill."""
        # Processes on CPUs share what one GPU has for itself.
        shared_by = 1 if torch.cuda.is_available() else self.devices
        return USABLE * (self.device_memory or memory_of_this_machine() / shared_by)

    @property
    def is_gpu(self) -> bool:
        return self.device_memory is not None or torch.accelerator.is_available()


@dataclass(frozen=True)
class StageCost:
    """One stage, in all of its seeds. memory: bytes of one device by part; `in all` is their sum at the fullest."""

    name: str
    steps: int
    runs: int  # how often the stage is trained
    texts: int  # of an optimizer step, over all devices
    tokens: int  # of all runs, at most: every text as long as may be
    memory: dict[str, float]
    largest_batch: int  # per_device_train_batch_size that fits; 0 where not one text does
    fits: bool
    step_flops: float  # over all devices
    step_seconds: float | None  # as measured on one
    checkpoints: float  # bytes on disk while it is trained
    exported: float  # and afterwards

    @property
    def flops(self) -> float:
        return self.runs * self.steps * self.step_flops

    @property
    def seconds(self) -> float:
        return self.runs * self.steps * (self.step_seconds or 0.0)


@dataclass(frozen=True)
class RunCost:
    """A whole run. disk: bytes, None for what is not known before the corpus is tokenized."""

    parameters: dict[str, int]
    layout: Layout
    corpus_tokens: int | None
    stages: list[StageCost]
    disk: dict[str, float | None]
    left_out: list[str]


def run_cost(plan: Plan, layout: Layout, *, measure: bool = False) -> RunCost:
    """Count every stage of the plan. measure: also time its step on this machine, where it must fit.

    Raises ConfigError for one that does not, ModelError for an architecture that cannot be counted without weights.
    """
    count, clock = each_once(counted), each_once(timed) if measure else None
    stages = [_stage_cost(plan, layout, line, count, clock) for line in lines(plan, layout.devices)]
    store = _store(plan)
    disk = _disk(plan, store)
    disk["checkpoints, at most"] = max(stage.checkpoints for stage in stages)
    disk["exported models"] = sum(stage.exported for stage in stages)
    return RunCost(
        parameters={name: each["total"] for name, each in plan.parameters.items()},
        layout=layout,
        corpus_tokens=store.num_tokens if store is not None else None,
        stages=stages,
        disk=disk,
        left_out=_left_out(plan),
    )


def _stage_cost(
    plan: Plan,
    layout: Layout,
    line: list[Stage],
    count: Callable[..., Count],
    clock: Callable[..., tuple[float, float]] | None,
) -> StageCost:
    stage, runs = line[0], len(line)
    settings, cast, seconds = stage.training, _cast(plan, stage), None
    batch, accumulated = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    choices = [len(each.texts) for each in stage.examples] or [1]
    share = sum(choices) / len(choices) / max(choices)  # the fullest micro-batch fills the memory, the mean takes time
    shape = {"length": stage.length, "choices": max(choices)}
    once, twice = (count(cast, examples=n, **shape, fused_attention=layout.is_gpu) for n in (batch, 2 * batch))
    memory = _memory(once, layout)
    if clock is not None:
        needed, there = _memory(once, Layout())["in all"], memory_of_this_machine()
        if needed > USABLE * there:
            found = f"{stage.name} needs {needed / 1e9:.2f} GB, this machine has {there / 1e9:.2f}"
            raise ConfigError(f"--measure: {found}; give a smaller per_device_train_batch_size, or leave --measure out")
        micro_batch, update = clock(cast, examples=batch, **shape)
        seconds = accumulated * share * micro_batch + update
    steps, texts = settings.steps(len(stage.examples), layout.devices), settings.global_batch_size(layout.devices)
    kept = settings.save_total_limit + 1 + (plan.config.selection != "last")  # one more while it is written
    return StageCost(
        name=" ".join(filter(None, (stage.name, stage.swept))),
        steps=steps,
        runs=runs,
        texts=texts,
        tokens=round(runs * steps * texts * max(choices) * share * stage.length),
        memory=memory,
        largest_batch=_fitting(cast, once, twice, batch, max(choices) * stage.length, layout),
        fits=memory["in all"] <= layout.usable,
        step_flops=(once.teacher_flops + once.student_flops) * accumulated * layout.devices * share,
        step_seconds=seconds,
        checkpoints=float(kept * (once.student + once.optimizer)),
        exported=float(runs * once.student),
    )


def fitting_batch(plan: Plan, stage: Stage, layout: Layout, count: Callable[..., Count]) -> int:
    """The largest per_device_train_batch_size of a stage that fits, counted on batches of one and two texts."""
    cast, choices = _cast(plan, stage), max((len(each.texts) for each in stage.examples), default=1)
    shape = {"length": stage.length, "choices": choices, "fused_attention": layout.is_gpu}
    once, twice = (count(cast, examples=n, **shape) for n in (1, 2))
    return _fitting(cast, once, twice, 1, choices * stage.length, layout)


def _fitting(cast: Cast, once: Count, twice: Count, batch: int, tokens: int, layout: Layout) -> int:
    """The largest batch by the counts of `batch` texts, of so many tokens each, and of twice as many."""

    def chunk(texts: int) -> int:
        """Does not grow with the texts forever, as all else does."""
        return chunk_bytes(cast, texts * tokens, cast.student.vocab_size, layout.is_gpu) if once.chunk else 0

    memory = _memory(once, layout)
    room = layout.usable - memory["in all"] + max(memory["teacher forward"], memory["student step"])
    gathered = memory["teacher forward"] - once.teacher_forward  # does not grow with the texts either
    return _largest_batch(once, twice, batch, room, chunk, gathered)


def each_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Stages of equal shape are not rehearsed again. Configs are no keys, but their texts are."""
    known: dict[str, Any] = {}

    def call(cast: Cast, **shape: Any) -> Any:
        key = repr((cast, shape))
        if key not in known:
            try:
                known[key] = function(cast, **shape)
            except RuntimeError as error:  # code that looks at values where there are none
                reason = " ".join(str(error).split())[:200]
                name = cast.student.model_type
                raise ModelError(f"{name}: its step cannot be tried with random weights ({reason})") from error
        return known[key]

    return call


def _cast(plan: Plan, stage: Stage) -> Cast:
    config, task, objective = plan.config, stage.task, stage.objective
    assert objective is not None, "the stage trains"
    form = task_form(task.task, kind=plan.kind) if task is not None else None
    corruption, targets = None, stage.length
    if task is None and plan.tokenizer is not None:
        corruption = corruption_for(plan.tokenizer, plan.kind, stage.masking[0], stage.seed)
    if isinstance(corruption, Infilling):
        targets = corruption.num_targets(stage.length)
    return Cast(
        objective,
        learner_config(plan, stage),
        plan.source_size,
        teacher_config(plan, stage, 0) if objective.teacher_needs else None,
        config.teacher.dtype,
        config.teacher.quantization,
        config.teacher.sharded is not False,
        merge_dropped=config.vocabulary.teacher_mass == "merge",
        is_cached=stage.cached,
        form=form,
        masked=stage.masking[0],
        mixed_precision=config.mixed_precision,
        gradient_checkpointing=stage.training.gradient_checkpointing,
        attention=config.attn_implementation,
        target_length=targets,
        own_matrices=plan.own_matrices if config.student.architecture is None else (),
        further=tuple(teacher_config(plan, stage, number) for number in range(1, len(stage.teachers))),
    )


def _memory(count: Count, layout: Layout) -> dict[str, float]:
    """Bytes of one device by part. Sharded, the student's weights, gradients and moments are split over all devices.

    DDP sends gradients from buckets, which are a copy of them. FSDP holds some weights and their gradients whole at a
    time, and of the teacher's some weights in its forward, which is over when the student's begins.
    """
    shards = layout.devices if layout.sharding == "fsdp" else 1
    fixed = {
        "teacher": count.teacher - count.teacher_shared * (1 - 1 / shards),
        "head": float(count.head),
        "student": count.student / shards,
        "gradients": count.student / shards,
        "AdamW": count.optimizer / shards,
        "buckets": float(count.student if layout.devices > 1 and shards == 1 else 0),
        "gathered": 2.0 * count.student_gathered if shards > 1 else 0.0,
    }
    forward = count.teacher_forward + (count.teacher_gathered if shards > 1 else 0)
    moving = {"teacher forward": float(forward), "student step": float(count.student_step)}
    in_all = sum(fixed.values()) + max(moving.values())
    return fixed | moving | {"of it loss": float(count.loss), "in all": in_all}


def _largest_batch(
    once: Count, twice: Count, batch: int, room: float, chunk: Callable[[int], int], gathered: float
) -> int:
    """Texts of a micro-batch whose two peaks stay in `room` bytes; but for the loss's chunk both grow in proportion."""

    def needed(texts: int) -> float:
        forward = gathered + _at(texts, batch, once.teacher_forward, twice.teacher_forward)
        step = _at(texts, batch, once.student_step - once.chunk, twice.student_step - twice.chunk)
        return max(forward, step + chunk(texts))

    fits, does_not = 0, 1
    while needed(does_not) <= room:
        fits, does_not = does_not, 2 * does_not
    while does_not - fits > 1:
        middle = (fits + does_not) // 2
        fits, does_not = (middle, does_not) if needed(middle) <= room else (fits, middle)
    return fits


def _at(texts: int, batch: int, once: float, twice: float) -> float:
    """What grows in proportion, at so many texts, from its size at `batch` and at twice that."""
    return once + (texts - batch) * (twice - once) / batch


def _store(plan: Plan) -> TokenStore | None:
    """The corpus as an earlier start of this run has tokenized it."""
    try:
        return open_token_store(Path(plan.config.output_dir) / "corpus")
    except RunError:
        return None


def _left_out(plan: Plan) -> list[str]:
    cached = cached_stages(plan.config, plan.method)
    return [
        "scoring",
        *(["the time of quantized products"] if plan.config.teacher.quantization else []),
        *(["controls.full_vocabulary"] if plan.config.controls.full_vocabulary else []),
        *(["making teacher.cache, an epoch of the teacher for each masking"] if cached else []),
        *(["its part of tasks on disk, which `glmd check` says"] if set(cached) - {"pretraining"} else []),
    ]


def _disk(plan: Plan, store: TokenStore | None) -> dict[str, float | None]:
    disk: dict[str, float | None] = {}
    if plan.config.data.corpus or plan.config.data.synthetic:
        token_bytes = float(store.tokens.itemsize + (plan.conversations is not None)) if store is not None else 0.0
        disk["corpus as ids"] = store.num_tokens * token_bytes if store is not None else None
    if "pretraining" in cached_stages(plan.config, plan.method):
        teacher = plan.config.teacher
        assert teacher.cache is not None, "a stage is cached somewhere"
        count = len(teacher.ensemble) + 1 if plan.method["pretraining"].further_needs else 1
        widths = [head_width(plan, number) for number in range(count)]
        caches = [TeacherCache(Path(teacher.cache), (), width=w, dtype=teacher.dtype, made_from={}) for w in widths]
        a_token = sum(float(each.token_bytes * (plan.config.pretraining.num_maskings or 1)) for each in caches)
        disk["teacher.cache, corpus"] = store.num_tokens * a_token if store is not None else None
        disk["teacher.cache, a token"] = a_token
    return disk


def to_json(cost: RunCost) -> str:
    """All figures, in bytes and seconds, for programs."""
    return json.dumps(asdict(cost), indent=1)


def table(cost: RunCost) -> str:
    """All figures for a person."""
    layout, is_timed = cost.layout, cost.stages[0].step_seconds is not None
    how = {"none": "each with all weights", "fsdp": "the weights sharded"}[layout.sharding]
    number = "1 device" if layout.devices == 1 else f"{layout.devices} devices, {how},"
    unit, scale = ("GB", 1e9) if max(each.memory["in all"] for each in cost.stages) >= 1e9 else ("MB", 1e6)
    width = max(22, *(len(each.name) for each in cost.stages))
    columns = [key for key in cost.stages[0].memory if any(each.memory[key] for each in cost.stages)]
    lines = [
        f"parameters  teacher {cost.parameters['teacher']:,}, student {cost.parameters['student']:,}",
        f"layout      {number} of which {layout.usable / 1e9:.3g} GB may be used, {USABLE:.0%}",
        f"corpus      {'not tokenized yet' if cost.corpus_tokens is None else f'{cost.corpus_tokens:,} tokens'}",
        "",
        f"{f'{unit} of a device':<{width}}" + "".join(f"  {key:>7}" for key in columns) + "  largest batch",
    ]
    for stage in cost.stages:
        figures = "".join(f"  {stage.memory[key] / scale:>{max(7, len(key))}.2f}" for key in columns)
        lines.append(f"{stage.name:<{width}}{figures}  {stage.largest_batch:>13}{'' if stage.fits else '  too large'}")
    head = f"{'steps':>9}{'runs':>6}{'texts':>7}{'tokens':>17}{'TFLOP/step':>13}{'PFLOP':>12}"
    lines += ["", f"{'work':<{width}}{head}" + (f"{'s/step':>9}{'time':>12}" if is_timed else "")]
    for stage in cost.stages:
        work = f"{stage.steps:>9,}{stage.runs:>6}{stage.texts:>7}{stage.tokens:>17,}"
        work += f"{stage.step_flops / 1e12:>13.4g}{stage.flops / 1e15:>12.4g}"
        taken = f"{stage.step_seconds:>9.3g}{_duration(stage.seconds):>12}" if stage.step_seconds is not None else ""
        lines.append(f"{stage.name:<{width}}{work}{taken}")
    total = f"{sum(each.tokens for each in cost.stages):>39,}{sum(each.flops for each in cost.stages) / 1e15:>25.4g}"
    taken = f"{_duration(sum(each.seconds for each in cost.stages)):>21}" if is_timed else ""
    lines += [f"{'in all':<{width}}{total}{taken}", "", f"{'disk':<{width}}{unit:>9}"]
    for name, size in cost.disk.items():
        shown = "unknown before the corpus is tokenized" if size is None else f"{size / scale:>9.4g}"
        lines.append(f"{name:<{width}}{shown}")
    return "\n".join([*lines, "", f"not counted: {', '.join(cost.left_out)}"])


def _duration(seconds: float) -> str:
    for name, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.1f} s"
