"""What a plan refuses of models and lengths: teachers that are not one another's, weights, positions, settings."""

import copy
import itertools
from collections.abc import Mapping
from typing import Any

from glmd.config import RunConfig
from glmd.distillation.objective import Objective
from glmd.distillation.signals import SIGNALS
from glmd.errors import ConfigError, ModelError
from glmd.losses.numbers import DIFFERENCES, NUMBER_LOSSES
from glmd.models.heads import LMKind, lm_kind
from glmd.models.quantization import quantized_linears
from glmd.planning.rules import task_stages
from glmd.planning.task_plan import TaskPlan
from glmd.planning.teacher_rules import task_of
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.forms import task_form
from glmd.tasks.tasks import SENTENCES, Task

WITH_ARTICLE = {
    "masked": "a masked LM",
    "causal": "a causal LM",
    "encoder-decoder": "an encoder-decoder",
    "blank-infilling": "a GLM",
}


def require_text_model(config: Any, name: str) -> None:
    """Refuse a model of several parts, whose layers and vocabulary are those of a part."""
    for name_of in ("vocab_size", "num_hidden_layers"):
        if not isinstance(getattr(config, name_of, None), int):
            raise ConfigError(
                f"teacher.model {name}: {type(config).__name__} has no {name_of} of its own; a model of text alone "
                "is needed"
            )


def require_named_teachers(
    config: RunConfig, method: dict[str, Objective], tasks: Mapping[str, TaskPlan], tokenizer: Any
) -> None:
    """Refuse a fine-tuned teacher that is not one of its task, or not one of this teacher."""
    from glmd.models.loading import load_model_config, require_model
    from glmd.models.source_tokenizer import load_source_tokenizer
    from glmd.tasks.forms import warn_of_unnamed_classes

    on_tasks = {name: objective for name, objective in method.items() if name != "pretraining"}
    for name, model in _classifiers(config):
        field = f"teacher.tasks.{name}"
        require_model(model, field=field)
        model_config = load_model_config(model)
        form = task_form(task_of(config, name), kind=lm_kind(model_config))
        form.require(model_config, model)
        warn_of_unnamed_classes(model_config, form, f"{field}: {model}")
        theirs = load_source_tokenizer(model, kind=None if form.has_own_head else lm_kind(model_config))
        _require_same_tokenizer(tokenizer, theirs, f"{field}: {model}")
        require_lengths(config, on_tasks, {name: tasks[name]}, field, model_config)


def _classifiers(config: RunConfig) -> list[tuple[str, str]]:
    """Each fine-tuned teacher that is named, after its task."""
    return [(name, model) for name in config.teacher.tasks for model in config.teacher.of_task(name)]


def require_ensemble(config: RunConfig, tokenizer: Any, teacher_config: Any) -> tuple[Any, ...]:
    """The configs of further teachers. Refuses one that does not predict the same tokens from the same ids."""
    from glmd.models.heads import final_linear
    from glmd.models.loading import load_model_config, require_model
    from glmd.models.source_tokenizer import load_source_tokenizer

    found = []
    for model in config.teacher.ensemble:
        field = f"teacher.ensemble: {model}"
        require_model(model, field="teacher.ensemble")
        model_config = load_model_config(model)
        kinds = lm_kind(model_config), lm_kind(teacher_config)
        if kinds[0] != kinds[1]:
            raise ConfigError(f"{field}: is {WITH_ARTICLE[kinds[0]]}, and teacher.model {WITH_ARTICLE[kinds[1]]}")
        theirs = load_source_tokenizer(model, kind=lm_kind(model_config))
        _require_same_tokenizer(tokenizer, theirs, field)
        require_lengths(config, {"pretraining": Objective(())}, {}, field, model_config)
        on_meta = model_on_meta(field, model_config)
        final_linear(on_meta)
        if config.teacher.quantization is not None:
            quantized_linears(on_meta)
        found.append(model_config)
    return tuple(found)


def _require_same_tokenizer(ours: Any, theirs: Any, where: str) -> None:
    from glmd.vocabulary.tokenizer import tokenizer_fingerprint

    if tokenizer_fingerprint(ours) != tokenizer_fingerprint(theirs):
        raise ConfigError(
            f"{where}: its tokenizer ({len(theirs)} tokens) differs from the teacher's ({len(ours)} tokens); "
            "both must give the same ids for the same text"
        )


def require_weight_files(config: RunConfig) -> None:
    """Refuse weights that are absent, cut short or another model's, by the heads of their files."""
    from glmd.models.weight_headers import require_language_model
    from glmd.tasks.loading import require_task_model

    teacher = config.teacher
    if teacher.model is not None and teacher.model not in [model for _, model in _classifiers(config)]:
        options: dict[str, Any] = {"revision": teacher.revision, "trust_remote_code": teacher.trust_remote_code}
        require_language_model(teacher.model, field="teacher.model", tasks=list(config.tasks), **options)
    for name, model in _classifiers(config):
        require_task_model(model, task_of(config, name))
    for model in teacher.ensemble:
        require_language_model(model, field="teacher.ensemble")


def require_lengths(
    config: RunConfig, method: dict[str, Objective], tasks: Mapping[str, TaskPlan], name: str, model_config: Any
) -> None:
    """Refuse sequences longer than the positions of a model that reads the corpus, if the method has one, and tasks."""
    from glmd.models.loading import model_positions

    positions = model_positions(model_config)
    if positions is None:
        return
    for key, length in stage_lengths(config, method, tasks).items():
        if length > positions:
            raise ConfigError(f"{key} is {length}, {name} has {positions} positions; give at most {positions}")


def stage_lengths(config: RunConfig, method: dict[str, Objective], tasks: Mapping[str, TaskPlan]) -> dict[str, int]:
    """The key of each stage's length, and how many tokens it reads at once."""
    lengths = {"pretraining.max_length": config.pretraining.max_length or 0} if "pretraining" in method else {}
    for task, plan in tasks.items():
        stages = task_stages(config, method, task).items()
        lengths |= {f"{key}.max_length of {task}": stage.max_length or plan.task.max_length for key, stage in stages}
    return lengths


def require_blanks(
    config: RunConfig, method: dict[str, Objective], tasks: Mapping[str, TaskPlan], tokenizer: Any, *, kind: LMKind
) -> None:
    """Refuse examples whose blank does not fit into a stage's length."""
    for name, plan in tasks.items():
        form = task_form(plan.task, kind=kind)
        if form.has_own_head:
            continue
        stages = task_stages(config, method, name).values()
        shortest = min(stage.max_length or plan.task.max_length for stage in stages)
        for examples in (plan.train, plan.inputs, plan.val):
            if examples:
                TaskDataset(examples, form, tokenizer, max_length=shortest)


def require_decoder(config: RunConfig, tokenizer: Any, model_config: Any) -> None:
    """Refuse an encoder-decoder whose tokenizer is another one's, or that would be told the answers of its tasks."""
    from glmd.models.probes import prove_answers_unseen

    for role in ("pad_token_id", "eos_token_id"):
        ours, theirs = getattr(model_config, role, None), getattr(tokenizer, role)
        if isinstance(ours, int) and theirs is not None and ours != theirs:
            raise ConfigError(
                f"teacher.model {config.teacher.model}: {role} is {ours} in its config and {theirs} in its tokenizer; "
                "they do not belong together"
            )
    if config.tasks and config.casting == "cloze":
        try:
            prove_answers_unseen(model_on_meta("teacher", model_config))
        except ModelError as error:
            raise ConfigError(str(error)) from None


def require_task_losses(config: RunConfig, method: dict[str, Objective], tasks: Mapping[str, TaskPlan]) -> None:
    """Refuse a loss on a task's logits that takes not so many classes, or is 0 whatever two models say of them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for (name, plan), (stage, objective) in itertools.product(tasks.items(), method.items()):
        choices = {len(each.choices) for each in plan.inputs} if plan.task.is_choice else {plan.task.num_classes}
        _require_answers(f"method {config.method}: {stage}", objective, plan.task)
        for count, term in itertools.product(sorted(choices), objective.terms):
            if term.signal != "task_logits" or term.source or stage == "pretraining":
                continue
            student, teacher = 8 * torch.randn(2, 8, count, generator=generator)
            where = f"method {config.method}: {stage}: {term.name} of {name}"
            if plan.task.problem_type == "regression":
                known = sorted({*NUMBER_LOSSES, *DIFFERENCES} & set(SIGNALS["task_logits"].losses))
                if term.loss not in known:
                    raise ConfigError(f"{where} compares classes, and its answer is a number; give {', '.join(known)}")
                continue
            labels = torch.arange(8) % count
            try:
                values = term.function(student, teacher, **term.options_at(1.0, labels=labels))
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
            if not values.any():
                raise ConfigError(
                    f"{where} is 0 for {count} classes, whatever the models say; give other options or loss"
                )


def _require_answers(where: str, objective: Objective, task: Task) -> None:
    """Refuse terms on vectors of a task of labels, and terms on labels of one of sentences."""
    for term in objective.terms:
        if "task_head" not in SIGNALS[term.signal].needs:
            continue
        is_of_vectors, is_of_sentences = term.signal == "sentence_embeddings", task.problem_type == SENTENCES
        if is_of_vectors and not is_of_sentences:
            raise ConfigError(
                f"{where}: {term.name} compares vectors of sentences, and {task.name} has labels; give "
                "another method, or a sentence encoder as teacher"
            )
        if is_of_sentences and not is_of_vectors:
            raise ConfigError(
                f"{where}: {term.name} compares answers, and {task.name} is of sentences; give "
                "method=embeddings, or terms of sentence_embeddings"
            )


def require_checkpointing(config: RunConfig, method: dict[str, Objective], teacher: Any, student: Any) -> None:
    """Refuse `gradient_checkpointing` for an architecture whose layers cannot be run again."""
    stages = {"pretraining": config.pretraining}
    if config.teacher.pretraining is not None:
        stages["teacher.pretraining"] = config.teacher.pretraining
    for task in config.tasks:
        stages |= {f"{name} of {task}": stage for name, stage in task_stages(config, method, task).items()}
    for name, stage in stages.items():
        model = teacher if name.startswith(("teacher", "task_teacher")) else student
        if stage.gradient_checkpointing and not model.supports_gradient_checkpointing:
            raise ConfigError(
                f"gradient_checkpointing of {name} has no effect: {type(model).__name__} cannot run its layers again; "
                "remove it"
            )


def require_vocabulary_effects(
    config: RunConfig, method: dict[str, Objective], teacher: Any, *, is_whole: bool
) -> None:
    """Refuse settings of the vocabulary that this teacher or method makes nothing of."""
    from glmd.models.loading import compared_embeddings

    settings = config.vocabulary
    for i, assistant in enumerate(config.assistants):
        if is_whole and assistant.vocabulary == "student":
            raise ConfigError(f"assistants[{i}].vocabulary has no effect: every token is kept; remove it")
    try:
        compared_embeddings(teacher, settings.similarity)
    except ModelError as error:
        raise ConfigError(str(error)) from None
    if settings.teacher_mass == "merge" and (
        is_whole or not any("head" in objective.teacher_needs for objective in method.values())
    ):
        why = "every token is kept" if is_whole else f"method {config.method} distills no LM logits"
        raise ConfigError(f"vocabulary.teacher_mass merge has no effect: {why}; remove it")
    if settings.teacher_reads == "mapped" and (
        is_whole or not any(objective.teacher_needs - {"layers"} for objective in method.values())
    ):
        why = "every token is kept" if is_whole else f"method {config.method} asks nothing of a teacher"
        raise ConfigError(f"vocabulary.teacher_reads mapped has no effect: {why}; remove it")
    for name, default in (("within_class", False), ("similarity", "input"), ("corpus_weights", [])):
        if is_whole and getattr(settings, name) != default:
            raise ConfigError(f"vocabulary.{name} has no effect: every token is kept; remove it")


def require_attention(config: RunConfig, student_config: Any, teacher_config: Any) -> None:
    """Refuse an `attn_implementation` that this machine, or a class of the student or of a teacher, has not."""
    from glmd.models.attention import set_attention
    from glmd.models.loading import load_model_config

    name, teacher = config.attn_implementation, config.teacher
    if name is None:
        return
    others = {f"teacher.tasks.{task}: {model}": model for task, model in _classifiers(config)}
    others |= {f"teacher.ensemble: {model}": model for model in teacher.ensemble}
    configs = {"teacher": teacher_config, "student": student_config}
    configs |= {field: load_model_config(model) for field, model in others.items()}
    for field, model_config in configs.items():
        set_attention(model_on_meta(field, copy.deepcopy(model_config)), name)  # which is said in the config


def model_on_meta(name: str, model_config: Any) -> Any:
    """A language model of this config, or a task model where it names one, without memory for its weights."""
    import torch

    from glmd.models.loading import base_class

    try:
        with torch.device("meta"):
            return base_class(model_config).from_config(model_config)
    except Exception as error:  # whatever the code of an architecture makes of a config that it does not fit
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name}: no model can be made of its config ({reason})") from None
