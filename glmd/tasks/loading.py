"""Models of tasks, loaded and proved: stock classifiers, multiple-choice models, and language models for a cloze."""

from collections.abc import Collection
from typing import Any

import torch

from glmd.models.heads import lm_kind
from glmd.models.loading import (
    WEIGHTS,
    from_pretrained,
    load_model_config,
    looks_local,
    proved,
    require_complete,
    require_keys,
    require_weight_files,
)
from glmd.models.quantization import Quantization, quantized_loading
from glmd.models.weight_headers import require_one_matrix, without_memory
from glmd.tasks.forms import TaskForm, task_form
from glmd.tasks.tasks import Task

# Parts of a task's head that a language model lacks.
HEADS = ("classifier", "classification_head", "pooler", "score", "sequence_summary")


def form_of(task: Task, name: str, **options: Any) -> TaskForm:
    """The form in which the model at `name` reads a task. options: revision and trust_remote_code."""
    return task_form(task, kind=lm_kind(load_model_config(name, **options)))


def load_classifier(
    name: str,
    task: Task,
    *,
    new_head: bool = False,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Any:
    """A stock model for `task`, in evaluation mode: a classifier, a multiple-choice model, or a language model.

    new_head: begin a task head on a language model (drawn from torch's generator: seed it); otherwise the
        checkpoint must hold one with the task's labels in the task's order.
    dtype: of the weights, whatever the file holds: float32 for what is trained, and for what is scored by itself.
    quantization: of a backbone that only teaches, which is then made on `device`.
    """
    remote = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    config = load_model_config(name, **remote)
    form = task_form(task, kind=lm_kind(config))
    if new_head:
        options |= form.new_head()
    else:
        form.require(config, name)
    if quantization is not None:
        options |= quantized_loading(quantization, config, form.model_class(config), dtype=dtype, device=device)
    model, info = from_pretrained(form.model_class(config), name, dtype=dtype, **WEIGHTS, **options)
    allowed = form.unread + (HEADS if new_head and form.has_own_head else ())
    require_complete(model, info, name, allowed_missing=allowed)
    _set_aside(model, form.unread, info["missing_keys"])
    # Of a new head's weights no folder tells.
    proved(model.eval(), form.prove, None if new_head else name)
    return model


def _set_aside(model: Any, unread: tuple[str, ...], missing: Collection[str]) -> None:
    """Parts that nothing reads stay as they are in training; of those that no file holds each run has the same."""
    for name, parameter in model.named_parameters():
        if name.startswith(unread) and unread:
            parameter.requires_grad_(False)
            if name in missing:
                parameter.data.zero_()


def require_task_model(name: str, task: Task) -> None:
    """Refuse a local folder that holds no whole model for the task. A hub id passes. Raises ModelError."""
    require_weight_files(name)
    if not looks_local(name):
        return
    form = form_of(task, name)
    model, info = without_memory(form.model_class(load_model_config(name)), name)
    require_keys(model, info, name, allowed_missing=form.unread)
    if not form.has_own_head:
        require_one_matrix(model, name)
