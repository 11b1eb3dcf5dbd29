"""What a config means beside its method: open choices filled in, and what is missing or has no effect there refused.

    method, config, asked = resolve(config)
    config = for_teacher(config, method, asked, kind="masked")

From names and numbers alone: no model, tokenizer or text is read.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from glmd.config import STAGES, RunConfig
from glmd.distillation.methods import load_method
from glmd.distillation.objective import Objective
from glmd.distillation.teacher_cache import folder_problem, read_manifest
from glmd.errors import ConfigError, suggestion
from glmd.models.heads import LMKind
from glmd.models.quantization import require_library
from glmd.planning.teacher_rules import (
    check_assistants,
    check_ensemble,
    learns_from_train,
    passes,
    task_of,
)
from glmd.stage_config import StageConfig
from glmd.tasks.forms import CASTINGS, task_form


def resolve(config: RunConfig) -> tuple[dict[str, Objective], RunConfig, float | None]:
    """The method, the config with its choices made, and the pretraining's mlm_probability as it was given.

    Raises ConfigError naming the key.
    """
    method = load_method(config.method)
    asked, config = config.pretraining.mlm_probability, _resolved(with_dtype(config), method)
    _check_methods_needs(config, method)
    _check_cache(config, method)
    check_ensemble(config, method)
    check_assistants(config, method)
    _check_steps(config, method)
    _check_attention(config, method)
    _check_analysis(config, method)
    return method, config, asked


def with_dtype(config: RunConfig, found: Any = None) -> RunConfig:
    """The config with `teacher.dtype: auto` decided: as found, else for the device that a run here would have."""
    if config.teacher.dtype != "auto":
        return config
    return replace(config, teacher=replace(config.teacher, dtype=found or _dtype_here()))


def _dtype_here() -> Literal["float32", "bfloat16"]:
    import torch

    is_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    has_gpu = torch.cuda.is_available() and not is_on_cpu
    return "bfloat16" if has_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


def for_teacher(config: RunConfig, method: dict[str, Objective], asked: float | None, *, kind: LMKind) -> RunConfig:
    """The resolved config for a teacher of this kind. asked: the pretraining's mlm_probability as it was given."""
    if config.data.messages_field is not None and kind != "causal":
        raise ConfigError(
            f"data.messages_field: conversations are of causal LMs, and {config.teacher.model} is none; give text, or "
            "an instruct model as teacher"
        )
    if kind == "causal":
        config = _for_decoder(config, method, asked)
    elif kind != "masked":
        config = _for_infilling(config, method, asked, kind)
    _check_cached_maskings(config, method)
    return config


def task_stages(config: RunConfig, method: dict[str, Objective], task: str) -> dict[str, StageConfig]:
    """The stages of a task that read its examples; a named teacher is scored by the settings of its own."""
    return {name: config.stage(name, task) for name in ["task_teacher", *passes(method)]}


def cached_stages(config: RunConfig, method: dict[str, Objective]) -> list[str]:
    """The stages that read the teacher's outputs from `teacher.cache`."""
    if config.teacher.cache is None:
        return []
    given, live = config.teacher.cached_stages, live_stages(config, method)
    return [
        stage
        for stage, objective in method.items()
        if objective.teacher_needs
        and (stage == "pretraining" or config.tasks)
        and (stage not in live if given is None else stage in given)
    ]


def live_stages(config: RunConfig, method: dict[str, Objective]) -> dict[str, str]:
    """The stages that ask a teacher for what a cache does not keep, with what that is: the live teacher serves them."""
    found = {name: "compares layers" for name, objective in method.items() if objective.reads_layers}
    if config.analysis != "none" and "pretraining" in method:
        found.setdefault("pretraining", f"has analysis {config.analysis}")
    return found


def kept_words(cached: Sequence[str], method: dict[str, Objective]) -> list[str]:
    """Cached stages of which hidden states are kept: those that LM logits are compared in, or scored by."""
    return [stage for stage in cached if is_scored_by_words(stage, method[stage])]


def is_scored_by_words(stage: str, objective: Objective) -> bool:
    """Whether a stage asks a teacher for LM logits: it compares them, or its student is scored by them."""
    return stage in ("pretraining", "task_lm") or "head" in objective.teacher_needs


def is_clean(stage: str, objective: Objective) -> bool:
    """Whether nothing is masked in a stage: labels are learned from clean inputs, unless tokens are compared too."""
    return stage not in ("pretraining", "task_lm") and not objective.reads_tokens


def _resolved(config: RunConfig, method: dict[str, Objective]) -> RunConfig:
    """Choices that depend on the method, filled in: mlm_probability and the spelling of task names."""
    tasks = {task_of(config, name).name: changes for name, changes in config.tasks.items()}
    if len(tasks) < len(config.tasks):
        raise ConfigError(f"tasks: {', '.join(config.tasks)} names a task twice")
    teachers = {task_of(config, name).name: model for name, model in config.teacher.tasks.items()}
    config = replace(config, tasks=tasks, teacher=replace(config.teacher, tasks=teachers))
    for name in dict.fromkeys([*STAGES, *method]):
        probability, key = config.stage(name).mlm_probability, config.key_of(name)
        needed = name in method and method[name].needs_masking
        if probability is None:
            config = config.with_stage(name, mlm_probability=0.15 if needed or name == "pretraining" else 0.0)
        elif probability == 0 and needed:
            raise ConfigError(
                f"{key}.mlm_probability is 0, but method {config.method} speaks of masked tokens; give 0.15"
            )
        elif probability and name in method and is_clean(name, method[name]):
            raise ConfigError(f"{key}.mlm_probability has no effect: its terms compare no tokens; remove it")
    _check_maskings(config)
    return config


def _check_maskings(config: RunConfig) -> None:
    """Refuse a number of maskings where nothing is masked."""
    for name in (*STAGES, *config.stages):
        stage = config.stage(name)
        if stage.num_maskings and not stage.mlm_probability:
            raise ConfigError(f"{config.key_of(name)}.num_maskings has no effect: nothing is masked there; remove it")
    for task, changes in config.tasks.items():
        stages = [config.stage(name, task) for name in (*STAGES[1:], *config.stages)]
        if changes.get("num_maskings") and not any(stage.mlm_probability for stage in stages):
            raise ConfigError(f"tasks.{task}.num_maskings has no effect: nothing is masked there; remove it")


def _for_decoder(config: RunConfig, method: dict[str, Objective], mlm_probability: float | None) -> RunConfig:
    """The config for a causal teacher, which predicts the next token of whole text: nothing is masked."""
    if any(task_form(task_of(config, name), kind="causal").has_own_head for name in config.tasks):
        raise ConfigError(
            f"tasks: {', '.join(config.tasks)}: a causal teacher is asked to go on; give casting=cloze, or tasks={{}}"
        )
    if any(objective.needs_masking for objective in method.values()):
        raise ConfigError(f"method {config.method} speaks of masked tokens; a causal teacher has none: give glmd")
    for name, probability in ({"pretraining": mlm_probability} | _masked_on_tasks(config)).items():
        if probability:
            raise ConfigError(f"{name}.mlm_probability is {probability}; a causal teacher reads whole text: remove it")
    config = replace(config, pretraining=replace(config.pretraining, mlm_probability=0.0))
    _check_maskings(config)
    return config


def _for_infilling(config: RunConfig, method: dict[str, Objective], asked: float | None, kind: LMKind) -> RunConfig:
    """The config for an encoder-decoder or a GLM: spans are left out of the corpus, and tasks are read whole."""
    is_pair, whose = kind == "encoder-decoder", "an encoder-decoder" if kind == "encoder-decoder" else "a GLM"
    if not is_pair and any(task_form(task_of(config, name), kind=kind).has_own_head for name in config.tasks):
        raise ConfigError(f"tasks: {', '.join(config.tasks)}: a GLM fills blanks; give casting=cloze, or tasks={{}}")
    for name, objective in method.items():
        if is_pair and (objective.layer_terms or objective.intervention is not None):
            raise ConfigError(
                f"method {config.method} compares or changes layers in {name}, which is not supported for "
                "encoder-decoders; give a method of predictions, as glmd or kd"
            )
        if objective.needs_masking and name != "pretraining":
            raise ConfigError(
                f"method {config.method} speaks of masked tokens in {name}; {whose} reads tasks whole: give glmd"
            )
    if is_pair and config.analysis != "none":
        raise ConfigError(f"analysis {config.analysis} is not supported for encoder-decoders; remove it")
    for name, probability in _masked_on_tasks(config).items():
        if probability:
            raise ConfigError(f"{name}.mlm_probability is {probability}; {whose} reads tasks whole: remove it")
    if asked == 0 and "pretraining" in method:
        raise ConfigError(f"pretraining.mlm_probability is 0, but {whose} learns from what is left out; give 0.15")
    return config


def _masked_on_tasks(config: RunConfig) -> dict[str, float | None]:
    """Where stages on tasks say what share of tokens is masked."""
    stages = {config.key_of(name): config.stage(name) for name in (*STAGES[1:], *config.stages)}
    given = {name: stage.mlm_probability for name, stage in stages.items()}
    return given | {f"tasks.{task}": changes.get("mlm_probability") for task, changes in config.tasks.items()}


def _check_methods_needs(config: RunConfig, method: dict[str, Objective]) -> None:
    import torch

    teacher, data, vocabulary = config.teacher, config.data, config.vocabulary
    if config.casting not in CASTINGS:
        raise ConfigError(f"casting must be one of {', '.join(CASTINGS)}; got {config.casting!r}")
    if config.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ConfigError("mixed_precision fp16 has no effect without a GPU; give bf16 or no")
    _require_trackers(config.report_to)
    if teacher.quantization is not None:
        require_library()
    if teacher.revision is not None and teacher.model is not None and Path(teacher.model).is_dir():
        raise ConfigError(f"teacher.revision has no effect on the folder {teacher.model}; remove it")
    if teacher.model is None and teacher.scratch is None:
        raise ConfigError("teacher is missing; give teacher=FOLDER or a hub id")
    if teacher.scratch is not None and not data.synthetic:
        raise ConfigError("teacher.scratch needs data.synthetic, whose tokenizer it uses; give teacher=FOLDER instead")
    if not (data.corpus or data.synthetic) and "pretraining" in method:
        raise ConfigError(f"data.corpus is missing; method {config.method} pretrains on it")
    for name, changes in config.tasks.items():
        own = changes.get("val") and (changes.get("train") or not learns_from_train(config, method, name))
        if not (data.superglue or data.synthetic or own):
            raise ConfigError(f"data.superglue is missing; {name} is read from it (a folder, or aps/super_glue)")
    if not config.tasks and "pretraining" not in method:
        raise ConfigError(f"tasks is empty and method {config.method} has no pretraining; name a task")
    if vocabulary.keep_ratio is None and vocabulary.size is None:
        raise ConfigError("vocabulary.keep_ratio is missing; 0.5 is the paper's, 1.0 keeps the whole vocabulary")
    if config.tasks and not passes(method):
        raise ConfigError(f"method {config.method} has no stage on a task, but tasks are given; give tasks={{}}")
    if config.tasks and config.casting == "head":
        _check_order(config, method)
    ruler = load_method(config.updates_of) if config.updates_of is not None else {}
    if config.updates_of is not None and not (config.tasks and passes(ruler)):
        raise ConfigError(
            f"updates_of {config.updates_of} has no effect: "
            + (f"method {config.updates_of} has no stage on a task" if config.tasks else "there are no tasks")
            + "; remove it"
        )
    if config.updates_of == config.method:
        raise ConfigError(f"updates_of {config.updates_of} has no effect: it is the method itself; remove it")
    for name in config.stages:
        if name not in (method.keys() | ruler.keys()) - {*STAGES}:
            instead = f"give {name} itself" if name in STAGES else f"remove it{suggestion(name, method)}"
            raise ConfigError(f"stages.{name} has no effect: it is no stage of method {config.method}'s own; {instead}")
    for stage in config.sweep:
        if stage not in method:
            raise ConfigError(
                f"sweep.{stage} has no effect: method {config.method} has no such stage; remove it"
                f"{suggestion(stage, passes(method))}"
            )
    for name in ("full_vocabulary", "trim_only", "trim_after"):
        if getattr(config.controls, name) and vocabulary.keep_ratio == 1:
            raise ConfigError(f"controls.{name} has no effect: vocabulary.keep_ratio is 1")
    for name in ("trim_only", "trim_after"):
        if getattr(config.controls, name) and not config.tasks:
            raise ConfigError(f"controls.{name} has no effect without tasks; remove it")
    if config.controls.trim_after and not config.controls.full_vocabulary:
        raise ConfigError("controls.trim_after trims the student of controls.full_vocabulary; give that too")


def _check_order(config: RunConfig, method: dict[str, Objective]) -> None:
    """Refuse stages on a task of which one leaves no model that the next, or the user, could take up."""
    names, left = passes(method), ""
    if "task_head" not in method[names[-1]].needs:
        raise ConfigError(
            f"method {config.method}: {names[-1]}, its last stage on a task, trains no task head; give it a term of "
            "task_logits or task_labels"
        )
    for name in names:
        needs = method[name].needs
        if left and ("head" in needs or "task_head" not in needs):
            raise ConfigError(
                f"method {config.method}: {name} needs a language model, but {left} before it leaves a model of the "
                "task; put it before, or compare LM logits in both"
            )
        if "task_head" in needs and "head" not in needs:
            left = name


def _require_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not there: Accelerate would only warn and track nothing."""
    from accelerate.utils import is_tensorboard_available, is_trackio_available, is_wandb_available

    installed = {
        "tensorboard": is_tensorboard_available,
        "wandb": is_wandb_available,
        "trackio": is_trackio_available,
    }
    for name in names:
        if not installed[name]():
            raise ConfigError(f"report_to: {name} is not installed; pip install {name}, or remove it")


def _check_cache(config: RunConfig, method: dict[str, Objective]) -> None:
    """Refuse a cache that no stage would read, or that has no place."""
    if config.teacher.cache is None:
        return
    if config.vocabulary.teacher_reads == "mapped":
        raise ConfigError(
            "vocabulary.teacher_reads mapped: teacher.cache keeps answers to all tokens, which serve any vocabulary; "
            "remove one of the two"
        )
    cached = cached_stages(config, method)
    silent = [stage for stage in config.teacher.cached_stages or () if stage not in cached]
    if silent:
        raise ConfigError(
            f"teacher.cached_stages: {silent[0]} needs no teacher in method {config.method} with tasks "
            f"{', '.join(config.tasks) or '{}'}; remove it"
        )
    live = live_stages(config, method)
    for stage in cached:
        if stage in live:
            served = cached_stages(replace(config, teacher=replace(config.teacher, cached_stages=None)), method)
            remedy = f"it can serve {', '.join(served)}" if served else "it can serve no stage: remove teacher.cache"
            raise ConfigError(
                f"teacher.cached_stages: {stage} of method {config.method} {live[stage]}, which the cache does not "
                f"keep; {remedy}"
            )
    if not cached and live:
        raise ConfigError(
            f"teacher.cache has no effect: it does not keep what {', '.join(live)} of method {config.method} asks of a "
            "teacher, which is of layers; remove it"
        )
    if not cached:
        raise ConfigError(f"teacher.cache has no effect: method {config.method} needs no teacher; remove it")
    folder = Path(config.teacher.cache)
    problem = None if read_manifest(folder) else folder_problem(folder)  # a complete one is only read
    if problem is None and folder.resolve().is_relative_to(Path(config.output_dir).resolve()):
        problem = f"lies in output_dir {config.output_dir}"
    if problem is not None:
        raise ConfigError(f"teacher.cache {folder} {problem}; give a folder of its own, which other runs can share")


def _check_steps(config: RunConfig, method: dict[str, Objective]) -> None:
    """Refuse steps in parts where the examples of a batch are coupled, and layers run twice under an intervention."""
    for name, objective in method.items():
        stages = [config.pretraining] if name == "pretraining" else [config.stage(name, task) for task in config.tasks]
        for stage in stages:
            if objective.couples and stage.gradient_accumulation_steps > 1:
                raise ConfigError(
                    f"{name}.gradient_accumulation_steps is {stage.gradient_accumulation_steps}, but method "
                    f"{config.method} compares the examples of a batch with each other there; give 1"
                )
            if objective.intervention is not None and stage.gradient_checkpointing:
                raise ConfigError(
                    f"{name}.gradient_checkpointing would run layers again without the intervention "
                    f"{objective.intervention.name} of method {config.method}; give false"
                )
        _check_intervention(config, name, objective)
        if objective.couples and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                f"method {config.method} compares the examples of a batch with each other in {name}, which several "
                "processes would divide; launch one"
            )


def _check_analysis(config: RunConfig, method: dict[str, Objective]) -> None:
    """Refuse an analysis of layers that nobody has."""
    if config.analysis == "none":
        return
    if "pretraining" not in method:
        raise ConfigError(f"analysis has no effect: method {config.method} has no pretraining; remove it")


def _check_attention(config: RunConfig, method: dict[str, Objective]) -> None:
    """Refuse attention that does not show what a method compares of it, or that has not the precision it needs."""
    from glmd.models.attention_masks import is_flash

    name = config.attn_implementation
    if is_flash(name) and config.data.messages_field is not None and config.data.packing:
        raise ConfigError(
            f"attn_implementation {name}: with several rows it does not keep the conversations of a row apart; "
            "give data.packing=false, or sdpa"
        )
    for stage, objective in method.items():
        inside = {"attentions", "attention_inputs", "modules"} & objective.needs
        if config.torch_compile and inside:
            raise ConfigError(
                f"torch_compile: {stage} of method {config.method} compares {', '.join(sorted(inside))}, which "
                "compiled code does not show; remove it"
            )
        showing = ("sdpa",) if "attention_inputs" in objective.needs else ("sdpa", "eager")
        if name not in (None, *showing) and {"attentions", "attention_inputs"} & objective.needs:
            raise ConfigError(
                f"attn_implementation {name}: {stage} of method {config.method} compares attention, which "
                f"{' and '.join(showing)} alone can show; remove it"
            )
    if is_flash(name):
        for key, given, other in (
            ("mixed_precision", config.mixed_precision, "no"),
            ("teacher.dtype", config.teacher.dtype, "float32"),
        ):
            if given == other:
                wanted = "bf16" if key == "mixed_precision" else "bfloat16"
                raise ConfigError(f"attn_implementation {name} runs in half precision alone; give {key}={wanted}")


def _check_intervention(config: RunConfig, stage: str, objective: Objective) -> None:
    """Refuse an intervention beside what would not see it, or what its gradient does not fit to."""
    if objective.intervention is None:
        return
    what = f"the intervention {objective.intervention.name} of method {config.method} in {stage}"
    if config.torch_compile:
        raise ConfigError(f"torch_compile: a compiled student does not see {what}, another in each step; remove it")
    if not objective.intervention.kind.takes_gradient:
        return
    if config.mixed_precision == "fp16":
        raise ConfigError(f"mixed_precision fp16 has no range for the gradient of {what}; give bf16 or no")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{what} takes a gradient that several processes do not wait for; launch one")


def _check_cached_maskings(config: RunConfig, method: dict[str, Objective]) -> None:
    """Refuse to keep a teacher's answers to texts that are masked again in each epoch."""
    names = [name for name in cached_stages(config, method) if not is_clean(name, method[name])]
    stages = [(name, config.pretraining) for name in names if name == "pretraining"]
    stages += [(name, config.stage(name, task)) for name in names if name != "pretraining" for task in config.tasks]
    for name, stage in stages:
        if stage.mlm_probability and not stage.num_maskings:
            raise ConfigError(
                f"{name}.num_maskings is missing; with teacher.cache the texts are masked so many times and no more, "
                "for example 4, which pays from the fifth epoch; or leave the stage out of teacher.cached_stages"
            )
