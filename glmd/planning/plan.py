"""What a run will do, found out before it does anything: every refusal that can be made is made here.

    plan = make_plan(load_config("configs/runs/base.yaml"))

Reads configs, tokenizer, tasks and file headers; loads no weights and trains nothing.
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from glmd.config import RunConfig, VocabularyConfig
from glmd.data.corpus import corpus_fingerprint, require_corpus
from glmd.distillation.objective import Objective
from glmd.errors import ConfigError, DataError, ModelError
from glmd.evaluation.metrics import require_metrics, score
from glmd.models.heads import is_causal, split_parameters
from glmd.planning.rules import cached_stages, for_teacher, kept_words, learns_from_train, resolve, task_of, task_stages
from glmd.tasks.cloze import verbalizer_ids
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.tasks import Task, TaskExample, read_split
from glmd.vocabulary.renumbering import named_ids
from glmd.vocabulary.selection import choose_kept_ids, must_keep_ids, parts_to_keep, source_size_of
from glmd.vocabulary.vocabulary import Vocabulary


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
    verbalizers: tuple[int, ...] = ()  # ids of the words for the labels, where the task is asked as words in a blank

    @property
    def is_scored(self) -> bool:
        return self.val[0].is_labeled

    @property
    def has_own_inputs(self) -> bool:
        return self.inputs is not self.train

    def fingerprint(self) -> str:
        splits = [self.train, self.val, *([self.inputs] if self.has_own_inputs else [])]
        rows = [[(e.texts, e.label, e.group, e.choices, e.answers) for e in split] for split in splits]
        return hashlib.sha256(json.dumps([asdict(self.task), self.verbalizers, rows]).encode()).hexdigest()


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


def make_plan(
    config: RunConfig, *, synthetic: Path | None = None, hash_corpus: bool = True, try_out: bool = True
) -> Plan:
    """Check everything and read the small things. Raises GlmdError, one line.

    synthetic: where the embedded world lies, for `data.synthetic`. hash_corpus: read the corpus for `Plan.corpus`.
    try_out: make a small student and try it. Of many processes one need do each of the two.
    """
    method, config, asked = resolve(config)
    tokenizer, teacher_config = _load_teacher_side(config, synthetic)
    if (config.data.corpus or synthetic) and tokenizer.sep_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"teacher.model {config.teacher.model}: its tokenizer has neither sep_token nor eos_token to put between "
            "documents; set one and save it"
        )
    config = for_teacher(config, method, asked, causal=is_causal(teacher_config))
    verbalizers = {name: verbalizer_ids(task_of(config, name), tokenizer) for name in config.tasks}
    words = [word for name in config.tasks for word in task_of(config, name).verbalizers]
    keep_words = [*dict.fromkeys([*config.vocabulary.keep_words, *words])]  # a blank must say each of them by itself
    config = replace(config, vocabulary=replace(config.vocabulary, keep_words=keep_words))
    source = str(synthetic / "superglue") if synthetic else config.data.superglue
    corpus = corpus_sources(config, synthetic)
    require_corpus(corpus, config.data.text_field, store=Path(config.output_dir) / "corpus")
    tasks = {name: _plan_task(config, name, method, source, verbalizers[name]) for name in config.tasks}
    _check_lengths(config, method, tasks, "the teacher", teacher_config)
    _check_named_teachers(config, method, tasks, tokenizer)
    _check_ensemble(config, tokenizer, teacher_config)
    _check_blanks(config, method, tasks, tokenizer, causal=is_causal(teacher_config))
    plan = Plan(
        config,
        method,
        tokenizer,
        teacher_config,
        student_config=None,
        source_size=len(tokenizer),
        kept_size=kept_size(config.vocabulary, tokenizer, ids=named_ids(teacher_config)),
        tasks=tasks,
        corpus=None,
    )
    plan = _with_parameters(plan)
    if kept_words(cached_stages(config, method), method):
        head_width(plan)  # refuses a teacher whose head is not one linear map
    _check_weight_files(config)
    if try_out:
        _try_student(plan)
    return replace(plan, corpus=corpus_fingerprint(corpus)) if corpus and hash_corpus else plan


def _try_student(plan: Plan) -> None:
    from glmd.models.student import chosen_layers
    from glmd.models.trial import try_student

    student, total = plan.config.student, plan.teacher_config.num_hidden_layers
    count = student.num_hidden_layers or total
    heads = [task.task for task in plan.tasks.values() if task.task.casting == "head"]
    try_student(
        student,
        plan.teacher_config,
        chosen_layers(student, count, total),
        num_layers=count,
        length=max(_lengths(plan.config, plan.method, plan.tasks).values()),
        task_heads={"MultipleChoice" if task.is_choice else "SequenceClassification" for task in heads},
        is_whole=plan.kept_size == plan.teacher_config.vocab_size,
    )


def corpus_sources(config: RunConfig, synthetic: Path | None) -> list[str]:
    """Where the run's corpus lies; nowhere for a run without one."""
    return [str(synthetic / "corpus.txt")] if synthetic else config.data.corpus


def make_sketch(config: RunConfig) -> Plan:
    """The plan of a run whose teacher is a config.json alone: sizes, without tokenizer and texts. Raises GlmdError."""
    from glmd.models.loading import load_model_config

    method, config, asked = resolve(config)
    if config.tasks:
        raise ConfigError(
            f"tasks: {', '.join(config.tasks)}: {config.teacher.model} holds no tokenizer to count their texts by; "
            "save the teacher's there, or give tasks={}"
        )
    teacher_config = load_model_config(str(config.teacher.model))
    config = for_teacher(config, method, asked, causal=is_causal(teacher_config))
    _check_lengths(config, method, {}, "the teacher", teacher_config)
    total, settings = teacher_config.vocab_size, config.vocabulary
    kept = choose_kept_ids(np.zeros(total, dtype=np.int64), (), **_budget(settings))
    plan = Plan(config, method, None, teacher_config, None, total, len(kept), tasks={}, corpus=None)
    return _with_parameters(plan)


def is_config_alone(model: str | None) -> bool:
    """Whether a teacher is a local folder with a config.json and neither tokenizer nor weights."""
    from glmd.models.loading import TOKENIZER_FILES, looks_local, require_model

    if model is None or not looks_local(model):
        return False
    require_model(model)
    return not any(path.name in TOKENIZER_FILES or path.suffix == ".safetensors" for path in Path(model).iterdir())


def head_width(plan: Plan) -> int:
    """H, what the teacher's final linear map sees of a token. Raises ModelError where there is no such map."""
    from glmd.models.heads import final_linear

    width: int = final_linear(_on_meta("teacher", plan.teacher_config)).weight.shape[1]
    return width


def _load_teacher_side(config: RunConfig, synthetic: Path | None) -> tuple[Any, Any]:
    """The source tokenizer and the teacher's config, without weights."""
    from transformers import BertConfig

    from glmd.models.loading import load_model_config, load_source_tokenizer, require_model

    teacher = config.teacher
    options: dict[str, Any] = {"revision": teacher.revision, "trust_remote_code": teacher.trust_remote_code}
    if teacher.model is None:
        assert synthetic is not None and teacher.scratch is not None, "checked before"
        tokenizer = load_source_tokenizer(str(synthetic / "tokenizer"))
        unknown = set(teacher.scratch) - set(BertConfig().to_dict())
        if unknown:
            raise ConfigError(f"teacher.scratch.{min(unknown)} is no field of BertConfig")
        model_config = BertConfig(vocab_size=len(tokenizer), **teacher.scratch)
    else:
        require_model(teacher.model)
        model_config = load_model_config(teacher.model, **options)
        tokenizer = load_source_tokenizer(teacher.model, **options, words=not is_causal(model_config))
    _require_text_model(model_config, str(teacher.model))
    if len(tokenizer) > model_config.vocab_size:
        raise ConfigError(
            f"teacher: its tokenizer has {len(tokenizer)} tokens, its embeddings {model_config.vocab_size} rows; "
            "they do not belong together"
        )
    return tokenizer, model_config


def _require_text_model(config: Any, name: str) -> None:
    """Refuse an encoder-decoder, and a model of several parts, whose layers and vocabulary are those of a part."""
    if getattr(config, "is_encoder_decoder", False) and not is_causal(config):
        raise ConfigError(f"teacher.model {name}: holds an encoder-decoder; these are not distilled yet")
    for name_of in ("vocab_size", "num_hidden_layers"):
        if not isinstance(getattr(config, name_of, None), int):
            raise ConfigError(
                f"teacher.model {name}: {type(config).__name__} has no {name_of} of its own; a model of text alone "
                "is needed"
            )


def _check_named_teachers(
    config: RunConfig, method: dict[str, Objective], tasks: dict[str, TaskPlan], tokenizer: Any
) -> None:
    """Refuse a fine-tuned teacher that is not one of its task, or not one of this teacher."""
    from glmd.models.loading import load_model_config, load_source_tokenizer, require_model
    from glmd.tasks.loading import require_task_head, warn_of_unnamed_classes

    on_tasks = {name: objective for name, objective in method.items() if name != "pretraining"}
    for name, model in config.teacher.tasks.items():
        field = f"teacher.tasks.{name}"
        require_model(model, field=field)
        model_config = load_model_config(model)
        require_task_head(model_config, task_of(config, name), model)
        warn_of_unnamed_classes(model_config, task_of(config, name), f"{field}: {model}")
        theirs = load_source_tokenizer(model, words=not is_causal(model_config))
        _require_same_tokenizer(tokenizer, theirs, f"{field}: {model}")
        _check_lengths(config, on_tasks, {name: tasks[name]}, field, model_config)


def _check_ensemble(config: RunConfig, tokenizer: Any, teacher_config: Any) -> None:
    """Refuse a further teacher that does not predict the same words from the same ids."""
    from glmd.models.heads import final_linear
    from glmd.models.loading import load_model_config, load_source_tokenizer, require_model

    for model in config.teacher.ensemble:
        field = f"teacher.ensemble: {model}"
        require_model(model, field="teacher.ensemble")
        model_config = load_model_config(model)
        if is_causal(model_config) != is_causal(teacher_config):
            raise ConfigError(f"{field}: one of it and teacher.model predicts the next word, the other masked ones")
        theirs = load_source_tokenizer(model, words=not is_causal(model_config))
        _require_same_tokenizer(tokenizer, theirs, field)
        _check_lengths(config, {"pretraining": Objective(())}, {}, field, model_config)
        final_linear(_on_meta(field, model_config))


def _require_same_tokenizer(ours: Any, theirs: Any, where: str) -> None:
    from glmd.vocabulary.tokenizer import tokenizer_fingerprint

    if tokenizer_fingerprint(ours) != tokenizer_fingerprint(theirs):
        raise ConfigError(
            f"{where}: its tokenizer ({len(theirs)} tokens) differs from the teacher's ({len(ours)} tokens); "
            "both must give the same ids for the same text"
        )


def _plan_task(
    config: RunConfig, name: str, method: dict[str, Objective], source: str | None, verbalizers: tuple[int, ...]
) -> TaskPlan:
    task, files = task_of(config, name), config.tasks[name]
    require_metrics(task)
    own_inputs, uses_labels = files.get("inputs"), method["task_soft_labels"].reads("labels")
    train: list[TaskExample] = []
    if learns_from_train(config, name):
        needs_labels = name not in config.teacher.tasks or config.controls.hard_labels or uses_labels
        train = read_split(task, _source(files, source, "train"), "train", require_labels=needs_labels, training=True)
    elif files.get("train"):
        raise ConfigError(f"tasks.{name}.train has no effect beside inputs and a named teacher; remove it")
    inputs = train
    if own_inputs:
        inputs = read_split(task, own_inputs, "train", require_labels=uses_labels, training=True)
    val_source = _source(files, source, "val")
    val = read_split(task, val_source, "val", require_labels=config.selection == "best")
    unlabeled = [not example.is_labeled for example in val]
    if any(unlabeled) and not all(unlabeled):
        found = f"{sum(unlabeled)} of {len(val)} rows of {name} val have no label"
        raise DataError(f"{val_source}: {found}; give all or none")
    if not all(unlabeled):
        score(task, np.zeros(len(val), dtype=np.int64), val)  # what cannot be scored is refused now, not after training
    return TaskPlan(task, train, inputs, val, verbalizers)


def _source(files: dict[str, Any], source: str | None, split: str) -> str:
    found = files.get(split) or source
    assert found is not None, "checked before"
    return str(found)


def _check_weight_files(config: RunConfig) -> None:
    """Refuse weights that are absent, cut short or another model's, by the heads of their files."""
    from glmd.models.weight_headers import require_language_model
    from glmd.tasks.loading import require_task_model

    teacher = config.teacher
    if teacher.model is not None:
        options: dict[str, Any] = {"revision": teacher.revision, "trust_remote_code": teacher.trust_remote_code}
        require_language_model(teacher.model, field="teacher.model", tasks=list(config.tasks), **options)
    for name, model in teacher.tasks.items():
        require_task_model(model, task_of(config, name))
    for model in teacher.ensemble:
        require_language_model(model, field="teacher.ensemble")


def _check_lengths(
    config: RunConfig, method: dict[str, Objective], tasks: dict[str, TaskPlan], name: str, model_config: Any
) -> None:
    """Refuse sequences longer than the positions of a model that reads the corpus, if the method has one, and tasks."""
    from glmd.models.loading import model_positions

    positions = model_positions(model_config)
    if positions is None:
        return
    for key, length in _lengths(config, method, tasks).items():
        if length > positions:
            raise ConfigError(f"{key} is {length}, {name} has {positions} positions; give at most {positions}")


def _lengths(config: RunConfig, method: dict[str, Objective], tasks: dict[str, TaskPlan]) -> dict[str, int]:
    """The key of each stage's length, and how many tokens it reads at once."""
    lengths = {"pretraining.max_length": config.pretraining.max_length or 0} if "pretraining" in method else {}
    for task, plan in tasks.items():
        stages = task_stages(config, method, task).items()
        lengths |= {f"{key}.max_length of {task}": stage.max_length or plan.task.max_length for key, stage in stages}
    return lengths


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


def kept_size(settings: VocabularyConfig, tokenizer: Any, *, texts: Sequence[str] = (), ids: Iterable[int] = ()) -> int:
    """How many tokens a student keeps. Refuses what `build_vocabulary` and `compress_tokenizer` would refuse, and a
    tokenizer that does not come back from its own folder.

    texts, ids: of which every piece is kept, and which are kept.
    """
    from glmd.vocabulary.tokenizer import compress_tokenizer, require_reloadable

    try:
        uncounted = np.zeros(source_size_of(tokenizer), dtype=np.int64)
        must_keep = must_keep_ids(tokenizer, words=settings.keep_words, texts=texts, ids=ids)
        parts = parts_to_keep(tokenizer, settings.selection)
        kept_ids = choose_kept_ids(uncounted, must_keep, parts=parts, **_budget(settings))
    except ModelError as error:
        raise ConfigError(f"vocabulary: {error}") from None
    if len(kept_ids) < len(tokenizer):
        # A trial: which tokens are kept and where the others go is not known yet, whether it can be done is.
        token_map = np.full(len(tokenizer), len(kept_ids) - 1)
        token_map[kept_ids] = np.arange(len(kept_ids))
        tokenizer = compress_tokenizer(tokenizer, Vocabulary(kept_ids, token_map))
    require_reloadable(tokenizer)
    return len(kept_ids)


def _budget(settings: VocabularyConfig) -> dict[str, Any]:
    return {"keep_ratio": settings.keep_ratio, "size": settings.size, "multiple_of": settings.multiple_of}


def _with_parameters(plan: Plan) -> Plan:
    """Student config and parameter counts, on the meta device: shapes without weights."""
    from glmd.distillation.signals import require_layers
    from glmd.models.student import chosen_layers, saved_and_reopened, student_model_config, weight_origins
    from glmd.vocabulary.slicing import vocabulary_axes

    student = plan.config.student
    total = plan.teacher_config.num_hidden_layers
    count = student.num_hidden_layers or total
    try:
        chosen = chosen_layers(student, count, total)
    except ConfigError as error:
        raise ConfigError(f"student.initialization and num_hidden_layers: {error}") from None
    teacher = _on_meta("teacher", plan.teacher_config)
    _check_vocabulary_effects(plan, teacher)
    cut_config = copy.deepcopy(plan.teacher_config)
    cut_config.vocab_size = plan.kept_size
    if (getattr(cut_config, "pad_token_id", None) or 0) >= plan.kept_size:
        cut_config.pad_token_id = 0  # its number among the kept tokens is not known yet, and no shape depends on it
    student_config = student_model_config(cut_config, student, count, chosen)
    _check_lengths(plan.config, plan.method, plan.tasks, "the student", student_config)
    for objective in plan.method.values():
        require_layers(objective.terms, student_config, plan.teacher_config)
    small = _on_meta("student", saved_and_reopened(student_config))
    _check_checkpointing(plan, teacher, small)
    if chosen is not None:
        weight_origins(small, _on_meta("teacher", cut_config), chosen, student.config)
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
        model = teacher if name.startswith(("teacher", "task_teacher")) else student
        if stage.gradient_checkpointing and not model.supports_gradient_checkpointing:
            raise ConfigError(
                f"gradient_checkpointing of {name} has no effect: {type(model).__name__} cannot run its layers again; "
                "remove it"
            )


def _check_vocabulary_effects(plan: Plan, teacher: Any) -> None:
    """Refuse settings of the vocabulary that this teacher or method makes nothing of."""
    from glmd.models.loading import compared_embeddings

    settings = plan.config.vocabulary
    try:
        compared_embeddings(teacher, settings.similarity)
    except ModelError as error:
        raise ConfigError(str(error)) from None
    is_whole = plan.kept_size == plan.source_size
    if settings.teacher_mass == "merge" and (
        is_whole or not any("head" in objective.teacher_needs for objective in plan.method.values())
    ):
        why = "every token is kept" if is_whole else f"method {plan.config.method} distils no words"
        raise ConfigError(f"vocabulary.teacher_mass merge has no effect: {why}; remove it")
    for name, default in (("within_class", False), ("similarity", "input"), ("corpus_weights", [])):
        if is_whole and getattr(settings, name) != default:
            raise ConfigError(f"vocabulary.{name} has no effect: every token is kept; remove it")


def _on_meta(name: str, model_config: Any) -> Any:
    """A language model of this config, without memory for its weights."""
    import torch

    from glmd.models.loading import language_model_class

    try:
        with torch.device("meta"):
            return language_model_class(model_config).from_config(model_config)
    except Exception as error:  # whatever the code of an architecture makes of a config that it does not fit
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name}: no language model can be made of its config ({reason})") from None
