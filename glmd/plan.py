"""What a run will do, found out before it does anything: every refusal that can be made is made here.

    plan = make_plan(load_config("configs/runs/base.yaml"))

Reads configs, tokenizer, tasks and file headers; loads no weights and trains nothing.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from glmd.cache import read_manifest
from glmd.checkpoint import write_problem
from glmd.config import RunConfig, StageConfig, VocabularyConfig
from glmd.data.batches import TaskDataset
from glmd.data.blanks import verbaliser_ids
from glmd.data.corpus import corpus_fingerprint, require_text_field
from glmd.data.tasks import Task, TaskExample, load_task, read_split
from glmd.errors import ConfigError, DataError, ModelError
from glmd.heads import is_causal
from glmd.metrics import require_metrics, score
from glmd.objective import WORD_SIGNALS, Objective, load_method
from glmd.selection import choose_kept_ids, must_keep_ids, parts_to_keep, source_size_of
from glmd.vocabulary import Vocabulary


@dataclass(frozen=True)
class TaskPlan:
    """A task with its examples.

    train: what the teacher and the control learn from; empty where nothing does. inputs: what the student learns
        from, the training examples unless others are named. val: what all are scored on, with all labels or none.
    """

    task: Task
    train: list[TaskExample]
    inputs: list[TaskExample]
    val: list[TaskExample]
    verbalisers: tuple[int, ...] = ()  # ids of the words for the labels, where the task is asked as words in a blank

    @property
    def is_scored(self) -> bool:
        return self.val[0].label is not None

    @property
    def has_own_inputs(self) -> bool:
        return self.inputs is not self.train

    def fingerprint(self) -> str:
        splits = [self.train, self.val, *([self.inputs] if self.has_own_inputs else [])]
        rows = [[(e.texts, e.label, e.group, e.choices, e.answers) for e in split] for split in splits]
        return hashlib.sha256(json.dumps([asdict(self.task), self.verbalisers, rows]).encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """A config that was checked, with what it names read in. `config` has its open choices filled in."""

    config: RunConfig
    method: dict[str, Objective]
    tokenizer: Any
    teacher_config: Any
    student_config: Any
    source_size: int
    kept_size: int
    tasks: dict[str, TaskPlan]
    corpus: dict[str, Any] | None
    parameters: dict[str, dict[str, int]] = field(default_factory=dict)


def make_plan(config: RunConfig, *, world: Path | None = None) -> Plan:
    """Check everything and read the small things. Raises GlmdError, one line.

    world: where the embedded world lies, for `data.world`.
    """
    method = load_method(config.method, count_positions=config.gkd_compat)
    asked, config = config.pretraining.mlm_probability, _resolved(config, method)
    _check_methods_needs(config, method)
    _check_cache(config, method)
    tokenizer, teacher_config = _load_teacher_side(config, world)
    if (config.data.corpus or world) and tokenizer.sep_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"teacher.model {config.teacher.model}: its tokenizer has neither sep_token nor eos_token to put between "
            "documents; set one and save it"
        )
    if is_causal(teacher_config):
        config = _for_decoder(config, method, asked)
    _check_cached_maskings(config, method)
    verbalisers = {name: verbaliser_ids(_task(config, name), tokenizer) for name in config.tasks}
    words = [word for name in config.tasks for word in _task(config, name).verbalisers]
    keep_words = [*dict.fromkeys([*config.vocabulary.keep_words, *words])]  # a blank must say each of them by itself
    config = replace(config, vocabulary=replace(config.vocabulary, keep_words=keep_words))
    source = str(world / "superglue") if world else config.data.superglue
    corpus = [str(world / "corpus.txt")] if world else config.data.corpus
    require_text_field(corpus, config.data.text_field)
    tasks = {name: _plan_task(config, name, method, source, verbalisers[name]) for name in config.tasks}
    _check_lengths(config, method, tasks, "the teacher", teacher_config)
    _check_named_teachers(config, method, tasks, tokenizer)
    _check_blanks(config, method, tasks, tokenizer, causal=is_causal(teacher_config))
    plan = Plan(
        config,
        method,
        tokenizer,
        teacher_config,
        student_config=None,
        source_size=len(tokenizer),
        kept_size=kept_size(config.vocabulary, tokenizer),
        tasks=tasks,
        corpus=corpus_fingerprint(corpus) if corpus else None,
    )
    plan = _with_parameters(plan)
    if kept_words(cached_stages(config, method), method):
        word_width(plan)  # refuses a teacher whose head is not one linear map
    _check_weight_files(config)
    return plan


def make_sketch(config: RunConfig) -> Plan:
    """The plan of a run whose teacher is a config.json alone: sizes, without tokenizer and texts. Raises GlmdError."""
    from glmd.loading import load_model_config

    method = load_method(config.method, count_positions=config.gkd_compat)
    asked, config = config.pretraining.mlm_probability, _resolved(config, method)
    _check_methods_needs(config, method)
    _check_cache(config, method)
    if config.tasks:
        raise ConfigError(
            f"tasks: {', '.join(config.tasks)}: {config.teacher.model} holds no tokenizer to count their texts by; "
            "save the teacher's there, or give tasks={}"
        )
    teacher_config = load_model_config(str(config.teacher.model))
    if is_causal(teacher_config):
        config = _for_decoder(config, method, asked)
    _check_cached_maskings(config, method)
    _check_lengths(config, method, {}, "the teacher", teacher_config)
    total, settings = teacher_config.vocab_size, config.vocabulary
    kept = choose_kept_ids(np.zeros(total, dtype=np.int64), (), **_budget(settings))
    plan = Plan(config, method, None, teacher_config, None, total, len(kept), tasks={}, corpus=None)
    return _with_parameters(plan)


def is_config_alone(model: str | None) -> bool:
    """Whether a teacher is a local folder with a config.json and neither tokenizer nor weights."""
    from glmd.loading import TOKENIZER_FILES, looks_local, require_model

    if model is None or not looks_local(model):
        return False
    require_model(model)
    return not any(path.name in TOKENIZER_FILES or path.suffix == ".safetensors" for path in Path(model).iterdir())


def needs_pretraining(method: dict[str, Objective]) -> bool:
    return "pretraining" in method


def _resolved(config: RunConfig, method: dict[str, Objective]) -> RunConfig:
    """Choices that depend on the method, filled in: mlm_probability and the spelling of task names."""
    tasks = {_task(config, name).name: changes for name, changes in config.tasks.items()}
    if len(tasks) < len(config.tasks):
        raise ConfigError(f"tasks: {', '.join(config.tasks)} names a task twice")
    teachers = {_task(config, name).name: model for name, model in config.teacher.tasks.items()}
    stages: dict[str, Any] = {}
    for name in ("pretraining", "task_words", "task_labels"):
        stage: StageConfig = getattr(config, name)
        needed = name in method and method[name].needs_corruption
        if stage.mlm_probability is None:
            default = 0.15 if needed or name == "pretraining" else 0.0
            stages[name] = replace(stage, mlm_probability=default)
        elif stage.mlm_probability == 0 and needed:
            raise ConfigError(
                f"{name}.mlm_probability is 0, but method {config.method} speaks of corrupted tokens; give 0.15"
            )
        elif (
            name == "task_labels"
            and stage.mlm_probability
            and not method["task_labels"].uses("word_logits", "word_labels")
        ):
            raise ConfigError("task_labels.mlm_probability has no effect: its terms compare no words; remove it")
    config = replace(config, tasks=tasks, teacher=replace(config.teacher, tasks=teachers), **stages)
    _check_maskings(config)
    return config


def _check_maskings(config: RunConfig) -> None:
    """Refuse a number of maskings where nothing is masked."""
    for name in ("pretraining", "task_words", "task_labels"):
        stage: StageConfig = getattr(config, name)
        if stage.num_maskings and not stage.mlm_probability:
            raise ConfigError(f"{name}.num_maskings has no effect: nothing is masked there; remove it")
    for task, changes in config.tasks.items():
        stages = [config.stage(name, task) for name in ("task_words", "task_labels")]
        if changes.get("num_maskings") and not any(stage.mlm_probability for stage in stages):
            raise ConfigError(f"tasks.{task}.num_maskings has no effect: nothing is masked there; remove it")


def _for_decoder(config: RunConfig, method: dict[str, Objective], mlm_probability: float | None) -> RunConfig:
    """The config for a causal teacher, which predicts the next word of whole text: nothing is masked."""
    if config.tasks and config.casting != "cloze":
        raise ConfigError(
            f"tasks: {', '.join(config.tasks)}: a causal teacher is asked to go on; give casting=cloze, or tasks={{}}"
        )
    if any(objective.needs_corruption for objective in method.values()):
        raise ConfigError(f"method {config.method} speaks of corrupted tokens; a causal teacher has none: give glmd")
    given = {"pretraining": mlm_probability} | {
        name: getattr(config, name).mlm_probability for name in ("task_words", "task_labels")
    }
    given |= {f"tasks.{task}": changes.get("mlm_probability") for task, changes in config.tasks.items()}
    for name, probability in given.items():
        if probability:
            raise ConfigError(f"{name}.mlm_probability is {probability}; a causal teacher reads whole text: remove it")
    config = replace(config, pretraining=replace(config.pretraining, mlm_probability=0.0))
    _check_maskings(config)
    return config


def cached_stages(config: RunConfig, method: dict[str, Objective]) -> list[str]:
    """The stages that read what the teacher says from `teacher.cache`."""
    if config.teacher.cache is None:
        return []
    asking = [
        stage
        for stage, objective in method.items()
        if objective.uses("word_logits", "task_logits") and (stage == "pretraining" or config.tasks)
    ]
    return [stage for stage in asking if stage in (config.teacher.cached_stages or asking)]


def _check_cache(config: RunConfig, method: dict[str, Objective]) -> None:
    """Refuse a cache that no stage would read, or that has no place."""
    if config.teacher.cache is None:
        return
    cached = cached_stages(config, method)
    silent = [stage for stage in config.teacher.cached_stages or () if stage not in cached]
    if silent:
        raise ConfigError(
            f"teacher.cached_stages: {silent[0]} asks the teacher nothing in method {config.method} with tasks "
            f"{', '.join(config.tasks) or '{}'}; remove it"
        )
    if not cached:
        raise ConfigError(f"teacher.cache has no effect: method {config.method} asks the teacher nothing; remove it")
    if config.teacher.cache_bits != 16 and not kept_words(cached, method):
        raise ConfigError("teacher.cache_bits has no effect: only task logits are kept, in 32 bits; remove it")
    folder = Path(config.teacher.cache)
    problem = None if read_manifest(folder) else write_problem(folder)  # a complete one is only read
    if problem is None and folder.resolve().is_relative_to(Path(config.output_dir).resolve()):
        problem = f"lies in output_dir {config.output_dir}"
    if problem is not None:
        raise ConfigError(f"teacher.cache {folder} {problem}; give a folder of its own, which other runs can share")


def kept_words(cached: Sequence[str], method: dict[str, Objective]) -> list[str]:
    """Cached stages of which hidden states are kept; task_words compares words at least to be scored."""
    return [stage for stage in cached if stage == "task_words" or method[stage].uses("word_logits")]


def _check_cached_maskings(config: RunConfig, method: dict[str, Objective]) -> None:
    """Refuse to keep a teacher's answers to texts that are masked anew in each epoch."""
    # The inputs of task_labels are corrupted for terms that compare words, and for no others.
    names = [name for name in cached_stages(config, method) if name == "task_words" or method[name].uses(*WORD_SIGNALS)]
    stages = [(name, config.pretraining) for name in names if name == "pretraining"]
    stages += [(name, config.stage(name, task)) for name in names if name != "pretraining" for task in config.tasks]
    for name, stage in stages:
        if stage.mlm_probability and not stage.num_maskings:
            raise ConfigError(
                f"{name}.num_maskings is missing; with teacher.cache the texts are masked so many times and no more, "
                "for example 4, which pays from the fifth epoch; or leave the stage out of teacher.cached_stages"
            )


def word_width(plan: Plan) -> int:
    """H, what the teacher's final linear map sees of a token. Raises ModelError where there is no such map."""
    from glmd.heads import final_linear

    width: int = final_linear(_on_meta("teacher", plan.teacher_config)).weight.shape[1]
    return width


def _check_methods_needs(config: RunConfig, method: dict[str, Objective]) -> None:
    import torch

    teacher, data, vocabulary = config.teacher, config.data, config.vocabulary
    if config.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ConfigError("mixed_precision fp16 has no effect without a GPU; give bf16 or no")
    _require_trackers(config.report_to)
    if teacher.revision is not None and teacher.model is not None and Path(teacher.model).is_dir():
        raise ConfigError(f"teacher.revision has no effect on the folder {teacher.model}; remove it")
    if teacher.model is None and teacher.scratch is None:
        raise ConfigError("teacher is missing; give teacher=FOLDER or a hub id")
    if teacher.scratch is not None and not data.world:
        raise ConfigError("teacher.scratch needs data.world, whose tokenizer it uses; give teacher=FOLDER instead")
    if not (data.corpus or data.world) and needs_pretraining(method):
        raise ConfigError(f"data.corpus is missing; method {config.method} pretrains on it")
    for name, changes in config.tasks.items():
        own = changes.get("val") and (changes.get("train") or not _learns_from_train(config, name))
        if not (data.superglue or data.world or own):
            raise ConfigError(f"data.superglue is missing; {name} is read from it (a folder, or aps/super_glue)")
    if not config.tasks and not needs_pretraining(method):
        raise ConfigError(f"tasks is empty and method {config.method} has no pretraining; name a task")
    if vocabulary.keep_ratio is None and vocabulary.size is None:
        raise ConfigError("vocabulary.keep_ratio is missing; 0.5 is the paper's, 1.0 keeps the whole vocabulary")
    if config.tasks and "task_labels" not in method:
        raise ConfigError(f"method {config.method} has no task_labels stage, but tasks are given")
    for stage in config.sweep:
        if stage not in method:
            raise ConfigError(f"sweep.{stage} has no effect: method {config.method} has no such stage; remove it")
    if config.controls.full_vocabulary and vocabulary.keep_ratio == 1:
        raise ConfigError("controls.full_vocabulary has no effect: vocabulary.keep_ratio is 1")


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


def _load_teacher_side(config: RunConfig, world: Path | None) -> tuple[Any, Any]:
    """The source tokenizer and the teacher's config, without weights."""
    from transformers import BertConfig

    from glmd.loading import load_model_config, load_source_tokenizer, require_model

    teacher = config.teacher
    options: dict[str, Any] = {"revision": teacher.revision, "trust_remote_code": teacher.trust_remote_code}
    if teacher.model is None:
        assert world is not None and teacher.scratch is not None, "checked before"
        tokenizer = load_source_tokenizer(str(world / "tokenizer"))
        unknown = set(teacher.scratch) - set(BertConfig().to_dict())
        if unknown:
            raise ConfigError(f"teacher.scratch.{min(unknown)} is no field of BertConfig")
        model_config = BertConfig(vocab_size=len(tokenizer), **teacher.scratch)
    else:
        require_model(teacher.model)
        model_config = load_model_config(teacher.model, **options)
        tokenizer = load_source_tokenizer(teacher.model, **options, words=not is_causal(model_config))
    if len(tokenizer) > model_config.vocab_size:
        raise ConfigError(
            f"teacher: its tokenizer has {len(tokenizer)} tokens, its embeddings {model_config.vocab_size} rows; "
            "they do not belong together"
        )
    return tokenizer, model_config


def _check_named_teachers(
    config: RunConfig, method: dict[str, Objective], tasks: dict[str, TaskPlan], tokenizer: Any
) -> None:
    """Refuse a fine-tuned teacher that is not one of its task, or not one of this teacher."""
    from glmd.loading import load_model_config, load_source_tokenizer, require_model, require_task_head

    on_tasks = {name: objective for name, objective in method.items() if name != "pretraining"}
    for name, model in config.teacher.tasks.items():
        field = f"teacher.tasks.{name}"
        require_model(model, field=field)
        model_config = load_model_config(model)
        require_task_head(model_config, _task(config, name), model)
        theirs = load_source_tokenizer(model, words=not is_causal(model_config))
        _require_same_tokenizer(tokenizer, theirs, f"{field}: {model}")
        _check_lengths(config, on_tasks, {name: tasks[name]}, field, model_config)


def _task(config: RunConfig, name: str) -> Task:
    """The task under a key of `tasks`: from its own YAML if it names one, else one that comes with glmd."""
    return load_task(config.tasks[name].get("definition") or name, config.casting)


def _require_same_tokenizer(ours: Any, theirs: Any, where: str) -> None:
    from glmd.tokenizer import tokenizer_fingerprint

    if tokenizer_fingerprint(ours) != tokenizer_fingerprint(theirs):
        raise ConfigError(
            f"{where}: its tokenizer ({len(theirs)} tokens) differs from the teacher's ({len(ours)} tokens); "
            "both must give the same ids for the same text"
        )


def _plan_task(
    config: RunConfig, name: str, method: dict[str, Objective], source: str | None, verbalisers: tuple[int, ...]
) -> TaskPlan:
    task, files = _task(config, name), config.tasks[name]
    require_metrics(task)
    own_inputs, uses_labels = files.get("inputs"), method["task_labels"].uses("task_labels")
    train: list[TaskExample] = []
    if _learns_from_train(config, name):
        needs_labels = name not in config.teacher.tasks or config.controls.hard_labels or uses_labels
        train = read_split(task, _source(files, source, "train"), "train", require_labels=needs_labels, training=True)
    elif files.get("train"):
        raise ConfigError(f"tasks.{name}.train has no effect beside inputs and a named teacher; remove it")
    inputs = train
    if own_inputs:
        inputs = read_split(task, own_inputs, "train", require_labels=uses_labels, training=True)
    val_source = _source(files, source, "val")
    val = read_split(task, val_source, "val", require_labels=config.selection == "best")
    unlabelled = [example.label is None for example in val]
    if any(unlabelled) and not all(unlabelled):
        found = f"{sum(unlabelled)} of {len(val)} rows of {name} val have no label"
        raise DataError(f"{val_source}: {found}; give all or none")
    if not all(unlabelled):
        score(task, np.zeros(len(val), dtype=np.int64), val)  # what cannot be scored is refused now, not after training
    return TaskPlan(task, train, inputs, val, verbalisers)


def _learns_from_train(config: RunConfig, name: str) -> bool:
    """Whether any model of the run is trained on the task's training examples."""
    return not config.tasks[name].get("inputs") or name not in config.teacher.tasks or config.controls.hard_labels


def _source(files: dict[str, Any], source: str | None, split: str) -> str:
    found = files.get(split) or source
    assert found is not None, "checked before"
    return str(found)


def _check_weight_files(config: RunConfig) -> None:
    """Refuse weights that are absent or cut short, by the heads of their files."""
    from glmd.loading import require_weight_files

    for model in (config.teacher.model, *config.teacher.tasks.values()):
        if model is not None:
            require_weight_files(model)


def _check_lengths(
    config: RunConfig, method: dict[str, Objective], tasks: dict[str, TaskPlan], name: str, model_config: Any
) -> None:
    """Refuse sequences longer than the positions of a model that reads the corpus, if the method has one, and tasks."""
    from glmd.loading import model_positions

    positions = model_positions(model_config)
    if positions is None:
        return
    lengths = {"pretraining.max_length": config.pretraining.max_length or 0} if "pretraining" in method else {}
    for task, plan in tasks.items():
        stages = task_stages(config, method, task).items()
        lengths |= {f"{key}.max_length of {task}": stage.max_length or plan.task.max_length for key, stage in stages}
    for key, length in lengths.items():
        if length > positions:
            raise ConfigError(f"{key} is {length}, {name} has {positions} positions; give at most {positions}")


def task_stages(config: RunConfig, method: dict[str, Objective], task: str) -> dict[str, StageConfig]:
    """The stages of a task that read its examples; a named teacher is scored by the settings of its own."""
    names = ["task_teacher", *(name for name in ("task_words", "task_labels") if name in method)]
    return {name: config.stage(name, task) for name in names}


def _check_blanks(
    config: RunConfig, method: dict[str, Objective], tasks: dict[str, TaskPlan], tokenizer: Any, *, causal: bool
) -> None:
    """Refuse examples whose blank does not fit into a stage's length."""
    if config.casting == "head":
        return
    for name, plan in tasks.items():
        stages = task_stages(config, method, name).values()
        shortest = min(stage.max_length or plan.task.max_length for stage in stages)
        for examples in (plan.train, plan.inputs, plan.val):
            if examples:
                TaskDataset(examples, tokenizer, max_length=shortest, is_causal=causal)


def kept_size(settings: VocabularyConfig, tokenizer: Any) -> int:
    """How many tokens a student keeps. Refuses what `build_vocabulary` and `compress_tokenizer` would refuse."""
    from glmd.tokenizer import compress_tokenizer

    try:
        uncounted = np.zeros(source_size_of(tokenizer), dtype=np.int64)
        must_keep = must_keep_ids(tokenizer, words=settings.keep_words)
        parts = parts_to_keep(tokenizer, settings.selection)
        kept_ids = choose_kept_ids(uncounted, must_keep, parts=parts, **_budget(settings))
    except ModelError as error:
        raise ConfigError(f"vocabulary: {error}") from None
    if len(kept_ids) < len(tokenizer):
        # A trial: which tokens are kept and where the others go is not known yet, whether it can be done is.
        token_map = np.full(len(tokenizer), len(kept_ids) - 1)
        token_map[kept_ids] = np.arange(len(kept_ids))
        compress_tokenizer(tokenizer, Vocabulary(kept_ids, token_map))
    return len(kept_ids)


def _budget(settings: VocabularyConfig) -> dict[str, Any]:
    return {"keep_ratio": settings.keep_ratio, "size": settings.size, "multiple_of": settings.multiple_of}


def _with_parameters(plan: Plan) -> Plan:
    """Student config and parameter counts, on the meta device: shapes without weights."""
    from glmd.slicing import vocabulary_axes
    from glmd.student import chosen_layers, student_model_config, weight_origins

    student = plan.config.student
    total = plan.teacher_config.num_hidden_layers
    count = student.num_hidden_layers or total
    try:
        chosen = chosen_layers(student, count, total)
    except ConfigError as error:
        raise ConfigError(f"student.initialisation and num_hidden_layers: {error}") from None
    teacher = _on_meta("teacher", plan.teacher_config)
    _check_vocabulary_effects(plan, teacher)
    cut_config = copy.deepcopy(plan.teacher_config)
    cut_config.vocab_size = plan.kept_size
    if (getattr(cut_config, "pad_token_id", None) or 0) >= plan.kept_size:
        cut_config.pad_token_id = 0  # its number among the kept tokens is not known yet, and no shape depends on it
    student_config = student_model_config(cut_config, student, count, chosen)
    _check_lengths(plan.config, plan.method, plan.tasks, "the student", student_config)
    small = _on_meta("student", student_config)
    _check_checkpointing(plan, teacher, small)
    if chosen is not None:
        weight_origins(small, _on_meta("teacher", cut_config), chosen)
    parameters = {
        name: split_parameters(model, set(vocabulary_axes(model.config, type(model))))
        for name, model in (("teacher", teacher), ("student", small))
    }
    return replace(plan, student_config=student_config, parameters=parameters)


def _check_checkpointing(plan: Plan, teacher: Any, student: Any) -> None:
    """Refuse `gradient_checkpointing` for an architecture whose layers cannot be run again."""
    config = plan.config
    stages = {"pretraining": config.pretraining}
    if config.teacher.pretraining is not None:
        stages["teacher.pretraining"] = config.teacher.pretraining
    for task in plan.tasks:
        stages |= {f"{name} of {task}": stage for name, stage in task_stages(config, plan.method, task).items()}
    for name, stage in stages.items():
        model = teacher if "teacher" in name else student
        if stage.gradient_checkpointing and not model.supports_gradient_checkpointing:
            raise ConfigError(
                f"gradient_checkpointing of {name} has no effect: {type(model).__name__} cannot run its layers again; "
                "remove it"
            )


def _check_vocabulary_effects(plan: Plan, teacher: Any) -> None:
    """Refuse settings of the vocabulary that this teacher or method makes nothing of."""
    from glmd.loading import compared_embeddings

    settings = plan.config.vocabulary
    try:
        compared_embeddings(teacher, settings.similarity)
    except ModelError as error:
        raise ConfigError(str(error)) from None
    is_whole = plan.kept_size == plan.source_size
    if settings.teacher_mass == "merge" and (
        is_whole or not any(objective.uses("word_logits") for objective in plan.method.values())
    ):
        why = "every token is kept" if is_whole else f"method {plan.config.method} distils no words"
        raise ConfigError(f"vocabulary.teacher_mass merge has no effect: {why}; remove it")
    for name, default in (("within_class", False), ("similarity", "input"), ("corpus_weights", [])):
        if is_whole and getattr(settings, name) != default:
            raise ConfigError(f"vocabulary.{name} has no effect: every token is kept; remove it")


def _on_meta(name: str, model_config: Any) -> Any:
    """A language model of this config, without memory for its weights."""
    import torch

    from glmd.loading import language_model_class

    try:
        with torch.device("meta"):
            return language_model_class(model_config).from_config(model_config)
    except (ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name}: no language model can be made of its config ({reason})") from None


def split_parameters(model: Any, vocabulary_names: set[str]) -> dict[str, int]:
    """Parameters in all, in tensors with a vocabulary axis, and in the body; the width of a word's vector.

    Tied ones count once.
    """
    total = sum(p.numel() for p in model.parameters())
    vocabulary = sum(p.numel() for name, p in model.named_parameters() if name in vocabulary_names)
    width = model.get_input_embeddings().weight.shape[1]
    return {"total": total, "vocabulary": vocabulary, "body": total - vocabulary, "embedding_size": width}
