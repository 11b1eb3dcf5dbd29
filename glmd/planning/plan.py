"""What a run will do, found out before it does anything: every refusal that can be made is made here.

    plan = make_plan(load_config("configs/runs/base.yaml"))

Reads configs, tokenizer, tasks and file headers; loads no weights and trains nothing.
"""

import copy
import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from glmd.config import RunConfig, StudentConfig, VocabularyConfig
from glmd.data.conversations import ConversationReader
from glmd.data.corpus import corpus_fingerprint, require_corpus
from glmd.data.infilling import infilling_for
from glmd.distillation.objective import Objective
from glmd.errors import ConfigError, ModelError
from glmd.models.heads import LMKind, lm_kind, split_parameters, task_class
from glmd.models.module_outputs import require_modules
from glmd.models.quantization import quantized_linears
from glmd.planning.checks import (
    model_on_meta,
    require_attention,
    require_blanks,
    require_checkpointing,
    require_decoder,
    require_ensemble,
    require_lengths,
    require_named_teachers,
    require_task_losses,
    require_text_model,
    require_vocabulary_effects,
    require_weight_files,
    stage_lengths,
)
from glmd.planning.rules import cached_stages, for_teacher, kept_words, resolve
from glmd.planning.task_plan import TaskPlan, plan_task
from glmd.planning.teacher_rules import fine_tunes_teacher, task_of, teachers_of_task, with_task_model
from glmd.tasks.cloze import verbalizer_ids
from glmd.tasks.forms import task_form
from glmd.tasks.tasks import SENTENCES
from glmd.vocabulary.selection import choose_kept_ids, must_keep_ids, parts_to_keep, source_size_of
from glmd.vocabulary.slicing import ids_to_keep, tie_weights, vocabulary_axes
from glmd.vocabulary.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


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
    untrained: dict[str, TaskPlan] = field(default_factory=dict)  # tasks that count for the vocabulary alone
    ensemble_configs: tuple[Any, ...] = ()  # of the further language models
    assistant_configs: tuple[Any, ...] = ()
    conversations: ConversationReader | None = None  # what reads the corpus, where it is not of texts
    own_matrices: tuple[str, ...] = ()  # weights that the class ties to others, and of which the teacher's file has two

    @property
    def packs(self) -> bool:
        """Whether conversations share rows, which models must keep apart."""
        return self.conversations is not None and self.config.data.packing

    @property
    def kind(self) -> LMKind:
        """How its language models predict tokens."""
        return lm_kind(self.teacher_config)

    @property
    def teaches_task_alone(self) -> bool:
        """Whether its teacher is a model of its task and no language model."""
        return task_class(self.teacher_config) is not None

    def teacher_config_at(self, number: int, task: TaskPlan | None) -> Any:
        """Of one of several teachers, from 0; of a task's where no language models are named beside them."""
        from glmd.models.loading import load_model_config

        if number == 0:
            return self.teacher_config
        if self.ensemble_configs:
            return self.ensemble_configs[number - 1]
        assert task is not None, "teachers of the corpus are named"
        return load_model_config(self.config.teacher.of_task(task.task.name)[number])


def make_plan(
    config: RunConfig, *, synthetic: Path | None = None, hash_corpus: bool = True, try_out: bool = True
) -> Plan:
    """Check everything and read the small things. Raises GlmdError, one line.

    synthetic: where the embedded world lies, for `data.synthetic`. hash_corpus: read the corpus for `Plan.corpus`.
    try_out: make a small student and try it. Of many processes one need do each of the two.
    """
    config = with_task_model(config)
    whole, config = config, _trained(config)
    method, config, asked = resolve(config)
    tokenizer, teacher_config = _load_teacher_side(config, synthetic)
    if (config.data.corpus or synthetic) and tokenizer.sep_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"teacher.model {config.teacher.model}: its tokenizer has neither sep_token nor eos_token to put between "
            "documents; set one and save it"
        )
    kind = lm_kind(teacher_config)
    config = for_teacher(config, method, asked, kind=kind)
    if kind == "encoder-decoder" and "pretraining" in method:
        infilling = infilling_for(tokenizer, asked, 0)
        infilling.require_length(config.pretraining.max_length or 0, "pretraining.max_length")
        config = config.with_stage("pretraining", mlm_probability=infilling.probability)
    if kind == "blank-infilling" and "pretraining" in method and (config.pretraining.mlm_probability or 0) > 0.5:
        found = f"pretraining.mlm_probability is {config.pretraining.mlm_probability}"
        raise ConfigError(f"{found}, but blanks that do not touch need room between them; give at most 0.5")
    verbalizers = {name: verbalizer_ids(task_of(config, name), tokenizer) for name in config.tasks}
    words = [word for name in whole.tasks for word in task_of(whole, name).verbalizers]
    words += _words_of_prompts(config)
    keep_words = [*dict.fromkeys([*config.vocabulary.keep_words, *words])]  # a blank must say each of them by itself
    config = replace(config, vocabulary=replace(config.vocabulary, keep_words=keep_words))
    source = str(synthetic / "superglue") if synthetic else config.data.superglue
    corpus, store, reader = corpus_sources(config, synthetic), Path(config.output_dir) / "corpus", None
    if config.data.messages_field is None:
        require_corpus(corpus, config.data.text_field, store=store)
    else:
        loss_on, name = config.data.loss_on or "assistant", f"teacher.model {config.teacher.model}"
        reader = ConversationReader(tokenizer, config.data.messages_field, loss_on=loss_on, name=name)
        reader.require(corpus, store=store)
    tasks = {name: plan_task(config, name, method, source, verbalizers[name]) for name in config.tasks}
    untrained = {
        task.name: plan_task(whole, name, method, source, verbalizer_ids(task, tokenizer))
        for name, task in ((name, task_of(whole, name)) for name in whole.untrained_tasks)
    }
    require_lengths(config, method, tasks, "the teacher", teacher_config)
    require_named_teachers(config, method, tasks, tokenizer)
    require_task_losses(config, method, tasks)
    ensemble_configs = require_ensemble(config, tokenizer, teacher_config)
    require_blanks(config, method, tasks, tokenizer, kind=kind)
    if kind == "encoder-decoder":
        require_decoder(config, tokenizer, teacher_config)
    plan = Plan(
        config,
        method,
        tokenizer,
        teacher_config,
        student_config=None,
        source_size=len(tokenizer),
        kept_size=kept_size(config.vocabulary, tokenizer, ids=ids_to_keep(teacher_config)),
        tasks=tasks,
        corpus=None,
        ensemble_configs=ensemble_configs,
        untrained=untrained,
        conversations=reader,
    )
    plan = _with_parameters(plan)
    if kept_words(cached_stages(config, method), method):
        head_width(plan)  # refuses a teacher whose head is not one linear map
    require_weight_files(config)
    if try_out:
        _try_student(plan)
        _try_layers(plan)
    return replace(plan, corpus=corpus_fingerprint(corpus)) if corpus and hash_corpus else plan


def _words_of_prompts(config: RunConfig) -> list[str]:
    """The words of what a sentence encoder, and the config, put before texts."""
    from glmd.models.companions import encoder_pooling

    found: list[str] = []
    for name in config.tasks:
        if task_of(config, name).problem_type == SENTENCES:
            pooling = encoder_pooling(str(config.teacher.model), config.tasks[name].get("pooling"))
            assert pooling is not None, "the task was made by it"
            found += [task_of(config, name).prompt, *pooling.prompts]
            if pooling.prompts and pooling.prompt is None and config.tasks[name].get("prompt") is None:
                logger.warning(
                    "%s: %s names the prompts %s and none of them as default_prompt_name, so texts are read as they "
                    "stand; tasks.%s.prompt puts one before each",
                    *(name, config.teacher.model, ", ".join(map(repr, pooling.prompts)), name),
                )
    return [word for prompt in found for word in prompt.split()]


def _trained(config: RunConfig) -> RunConfig:
    """The config of a run that has no other tasks than those that are trained."""
    tasks = config.trained_tasks
    named = {task: models for task, models in config.teacher.tasks.items() if task in tasks}
    return replace(config, tasks=tasks, untrained_tasks=[], teacher=replace(config.teacher, tasks=named))


def _try_student(plan: Plan) -> None:
    from glmd.models.trial import try_attention, try_student

    config, student = plan.config, plan.config.student
    heads = [task.task for task in plan.tasks.values() if task.task.casting == "head"]
    try_student(
        student,
        plan.teacher_config,
        length=max(stage_lengths(plan.config, plan.method, plan.tasks).values()),
        task_heads={head for task in heads if (head := task_form(task, kind=plan.kind).head)},
        is_whole=plan.kept_size == plan.teacher_config.vocab_size,
        needs=frozenset().union(*(objective.needs for objective in plan.method.values())),
        attention=plan.config.attn_implementation,
        packs=plan.packs,
    )
    if config.attn_implementation is not None:
        trains_teacher = config.teacher.scratch is not None or any(
            fine_tunes_teacher(config, plan.method, task) for task in plan.tasks
        )
        try_attention(
            config.attn_implementation,
            {"student": student, "teacher": replace(student, config={}, architecture=None)},
            plan.teacher_config,
            mixed_precision=config.mixed_precision,
            trained={"student", "teacher"} if trains_teacher else {"student"},
        )


def _try_layers(plan: Plan) -> None:
    """Refuse terms whose layers, as the models have them, cannot be compared."""
    from glmd.planning.step_cost import Cast, require_fitting_layers

    chain = [plan.teacher_config, *plan.assistant_configs, plan.student_config]
    for (stage, objective), number in itertools.product(plan.method.items(), range(1, len(chain))):
        if objective.layer_terms:
            further = further_configs(plan, stage) + (chain[: number - 1] if objective.asks_assistants else [])
            models = (chain[number], plan.source_size, chain[number - 1])
            cast = Cast(Objective(objective.layer_terms), *models, further=tuple(further))
            try:
                require_fitting_layers(cast)
            except (ConfigError, ModelError) as error:
                raise ConfigError(f"method {plan.config.method}: {stage}: {error}") from None


def corpus_sources(config: RunConfig, synthetic: Path | None) -> list[str]:
    """Where the run's corpus lies; nowhere for a run without one."""
    return [str(synthetic / "corpus.txt")] if synthetic else config.data.corpus


def make_sketch(config: RunConfig) -> Plan:
    """The plan of a run whose teacher is a config.json alone: sizes, without tokenizer and texts. Raises GlmdError."""
    from glmd.models.loading import load_model_config

    config = with_task_model(config)
    method, config, asked = resolve(config)
    if config.tasks:
        raise ConfigError(
            f"tasks: {', '.join(config.tasks)}: {config.teacher.model} holds no tokenizer to count their texts by; "
            "save the teacher's there, or give tasks={}"
        )
    teacher_config = load_model_config(str(config.teacher.model))
    config = for_teacher(config, method, asked, kind=lm_kind(teacher_config))
    require_lengths(config, method, {}, "the teacher", teacher_config)
    total, settings = teacher_config.vocab_size, config.vocabulary
    kept = choose_kept_ids(np.zeros(total, dtype=np.int64), (), **_budget(settings))
    plan = Plan(config, method, None, teacher_config, None, total, len(kept), tasks={}, corpus=None)
    return _with_parameters(plan)


def is_config_alone(model: str | None) -> bool:
    """Whether a teacher is a local folder with a config.json and neither tokenizer nor weights."""
    from glmd.models.loading import looks_local, require_model
    from glmd.models.source_tokenizer import holds_tokenizer

    if model is None or not looks_local(model):
        return False
    require_model(model)
    return not holds_tokenizer(Path(model)) and not any(Path(model).glob("*.safetensors"))


def further_configs(plan: Plan, stage: str) -> list[Any]:
    """Of the teachers but the first that a stage of the method may learn from."""
    if not plan.method[stage].further_needs:
        return []
    if stage == "pretraining" or plan.ensemble_configs:
        return list(plan.ensemble_configs)
    counts = {name: teachers_of_task(plan.config, plan.method, name) for name in plan.tasks}
    return [
        plan.teacher_config_at(number, plan.tasks[name]) for name, count in counts.items() for number in range(1, count)
    ]


def head_width(plan: Plan, number: int = 0) -> int:
    """H, what the final linear map of one of the teachers sees of a token. Raises ModelError where there is no such."""
    from glmd.models.heads import final_linear

    config = (plan.teacher_config, *plan.ensemble_configs)[number]
    width: int = final_linear(model_on_meta("teacher", config)).weight.shape[1]
    return width


def _load_teacher_side(config: RunConfig, synthetic: Path | None) -> tuple[Any, Any]:
    """The source tokenizer and the teacher's config, without weights."""
    from transformers import BertConfig

    from glmd.models.loading import load_model_config, require_model
    from glmd.models.source_tokenizer import load_source_tokenizer

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
        kind = None if task_class(model_config) else lm_kind(model_config)
        tokenizer = load_source_tokenizer(teacher.model, **options, kind=kind)
    require_text_model(model_config, str(teacher.model))
    if len(tokenizer) > model_config.vocab_size:
        raise ConfigError(
            f"teacher: its tokenizer has {len(tokenizer)} tokens, its embeddings {model_config.vocab_size} rows; "
            "they do not belong together"
        )
    return tokenizer, model_config


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
        tokenizer = compress_tokenizer(tokenizer, Vocabulary.unmapped(kept_ids, len(tokenizer)))
    require_reloadable(tokenizer)
    return len(kept_ids)


def _budget(settings: VocabularyConfig) -> dict[str, Any]:
    return {"keep_ratio": settings.keep_ratio, "size": settings.size, "multiple_of": settings.multiple_of}


def _with_parameters(plan: Plan) -> Plan:
    """Configs of student and assistants, and parameter counts, on the meta device: shapes without weights."""
    from glmd.models.weight_headers import own_matrices_of

    teacher = model_on_meta("teacher", plan.teacher_config)
    if plan.config.teacher.model is not None:
        plan = replace(plan, own_matrices=own_matrices_of(plan.config.teacher.model, teacher))
    tie_weights(teacher, plan.own_matrices)
    if plan.config.teacher.quantization is not None:
        quantized_linears(teacher)
    require_vocabulary_effects(plan.config, plan.method, teacher, is_whole=plan.kept_size == plan.source_size)
    models: dict[str, Any] = {"teacher": teacher}
    for number, each in enumerate(plan.ensemble_configs, start=2):
        models[f"teacher {number}"] = model_on_meta(f"teacher {number}", each)
    above = [plan.teacher_config]  # and then each assistant's
    for i, assistant in enumerate(plan.config.assistants):
        size, name = plan.kept_size if assistant.vocabulary == "student" else plan.source_size, f"assistant {i + 1}"
        model_config, models[name] = _learner(plan, name, f"assistants[{i}]", assistant, size, above)
        above.append(model_config)
    learner = plan.config.student
    student_config, models["student"] = _learner(plan, "student", "student", learner, plan.kept_size, above)
    require_attention(plan.config, student_config, plan.teacher_config)
    parameters = {
        name: split_parameters(model, set(vocabulary_axes(model.config, type(model)))) for name, model in models.items()
    }
    return replace(plan, student_config=student_config, assistant_configs=tuple(above[1:]), parameters=parameters)


def _learner(plan: Plan, name: str, key: str, shape: StudentConfig, size: int, above: Sequence[Any]) -> tuple[Any, Any]:
    """Config and model, without weights, of the student or of an assistant with so many tokens.

    key: where the config has it. above: configs of teacher and assistants that it may learn from. Raises ConfigError
    for what does not fit.
    """
    from glmd.models.student import chosen_layers, saved_and_reopened, student_model_config, weight_origins

    try:
        chosen = chosen_layers(shape, plan.teacher_config)
    except ConfigError as error:
        raise ConfigError(str(error).replace("student.", f"{key}.", 1)) from None
    cut_config = copy.deepcopy(plan.teacher_config)
    cut_config.vocab_size = size
    if (getattr(cut_config, "pad_token_id", None) or 0) >= size:
        cut_config.pad_token_id = 0  # its number among the kept tokens is not known yet, and no shape depends on it
    model_config = student_model_config(cut_config, shape)
    require_lengths(plan.config, plan.method, plan.tasks, f"the {name}", model_config)
    small = model_on_meta(name, saved_and_reopened(model_config))
    tie_weights(small, plan.own_matrices if shape.architecture is None else ())
    for stage, objective in plan.method.items():
        try:
            _require_layers(plan, stage, objective, model_config, small, above)
        except ConfigError as error:
            whose = "" if name == "student" else f"{name}: "
            raise ConfigError(f"method {plan.config.method}: {stage}: {whose}{error}") from None
    require_checkpointing(plan.config, plan.method, model_on_meta("teacher", plan.teacher_config), small)
    if chosen is not None:
        weight_origins(small, model_on_meta("teacher", cut_config), chosen, shape.config)
    return model_config, small


def _require_layers(
    plan: Plan, stage: str, objective: Objective, student_config: Any, student: Any, above: Sequence[Any]
) -> None:
    """Refuse terms of a stage whose layers or modules one of the models has not."""
    from glmd.distillation.signals import require_layers

    first, *others = above if objective.asks_assistants else above[-1:]
    require_layers(objective.terms, student_config, first)
    for number, config in enumerate([*others, *further_configs(plan, stage)], start=2):
        try:
            require_layers([term for term in objective.terms if term.asks_all_teachers], student_config, config)
        except ConfigError as error:
            raise ConfigError(f"teacher {number}: {error}") from None
    if objective.intervention is not None:
        objective.intervention.check(student_config, first)
    for term in objective.layer_terms:
        try:
            for i, (whose, model) in enumerate((("student", student), ("teacher", model_on_meta("teacher", first)))):
                require_modules(model, [pair[i] for pair in term.modules], whose=whose)
        except ConfigError as error:
            raise ConfigError(f"{term.name}: {error}") from None
