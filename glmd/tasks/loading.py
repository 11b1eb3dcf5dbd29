"""Models of tasks, loaded: stock classifiers, multiple-choice models, and language models that fill a blank."""

import logging
from typing import Any

import torch

from glmd.errors import ModelError
from glmd.models.heads import is_causal
from glmd.models.loading import (
    WEIGHTS,
    _from_pretrained,
    _prove,
    _require_complete,
    language_model_class,
    load_model_config,
    looks_local,
    require_keys,
    require_weight_files,
)
from glmd.models.probes import prove_language_model, prove_task_model
from glmd.models.weight_headers import _require_one_matrix, _without_memory
from glmd.tasks.tasks import Task

logger = logging.getLogger(__name__)


def load_classifier(
    name: str, task: Task, *, new_head: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """A stock task model for `task`, in evaluation mode: a classifier, a multiple-choice model, or a language model.

    new_head: begin a task head on a language model (drawn from torch's generator: seed it); otherwise the
        checkpoint must hold one with the task's labels in the task's order.
    dtype: of the weights, whatever the file holds: float32 for what is trained, and for what is scored by itself.
    """
    remote = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    if not new_head:
        require_task_head(load_model_config(name, **remote), task, name)
    elif task.casting == "head" and not task.is_choice:
        labels = [label_name(label) for label in task.labels]
        options |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    auto_class = task_model_class(load_model_config(name, **remote), task)
    model, info = _from_pretrained(auto_class, name, dtype=dtype, **WEIGHTS, **options)
    # Words in a blank need no head but the one that every masked LM has.
    may_begin = new_head and task.casting == "head"
    _require_complete(model, info, name, allowed_missing=_HEADS if may_begin else ())
    _prove(model.eval(), prove_task_model if task.casting == "head" else prove_language_model)
    return model


def task_model_class(config: Any, task: Task) -> Any:
    """The auto class of a model for this task."""
    from transformers import AutoModelForMultipleChoice, AutoModelForSequenceClassification

    if task.casting == "cloze":
        return language_model_class(config)
    return AutoModelForMultipleChoice if task.is_choice else AutoModelForSequenceClassification


# Parts of a task's head that a language model has not.
_HEADS = ("classifier", "pooler", "score", "sequence_summary")


def require_task_head(config: Any, task: Task, name: str) -> None:
    """Refuse a model with another kind of head, or whose classes are not the task's, in the task's order."""
    needed = "MultipleChoice" if task.is_choice else "SequenceClassification"
    if task.casting == "cloze":
        if is_causal(config):
            return
        needed = "MaskedLM"
    for architecture in config.architectures or ():
        if needed not in architecture:
            raise ModelError(f"{name}: holds a {architecture}; {task.name} needs a model for {needed}")
    if task.is_choice or task.casting == "cloze":
        return
    expected = [label_name(label) for label in task.labels]
    got = [str(config.id2label[i]) for i in sorted(config.id2label)]
    if not _is_unnamed(got) and [each.lower() for each in got] != [each.lower() for each in expected]:
        raise ModelError(f"{name}: its classes {got} are not those of {task.name} in this order: {expected}")


def warn_of_unnamed_classes(config: Any, task: Task, name: str) -> None:
    """Say where a classifier's classes have no names, and are therefore taken to be in the task's order."""
    got = [str(config.id2label[i]) for i in sorted(config.id2label)]
    if task.labels and task.casting == "head" and _is_unnamed(got):
        logger.warning(
            "%s: its config names no classes (LABEL_0, ...); they are taken to be those of %s in this order: %s. If "
            "they stand in another, name them in its id2label",
            name,
            task.name,
            ", ".join(map(label_name, task.labels)),
        )


def _is_unnamed(classes: list[str]) -> bool:
    return classes == [f"LABEL_{i}" for i in range(len(classes))]


def label_name(label: str | bool | int) -> str:
    """A label as text: entailment, True, 0."""
    return str(label)


def require_task_model(name: str, task: Task) -> None:
    """Refuse a local folder that holds no whole model for the task. A hub id passes. Raises ModelError."""
    require_weight_files(name)
    if not looks_local(name):
        return
    model, info = _without_memory(task_model_class(load_model_config(name), task), name)
    require_keys(model, info, name, allowed_missing=())
    if task.casting == "cloze":
        _require_one_matrix(model, name)
