"""The teacher of a stage, live: models that a stage has left, or that were named, as one callable."""

from typing import Any

import numpy as np
import torch

from glmd.config import TeacherConfig
from glmd.distillation.teacher import Ensemble, OnlineTeacher
from glmd.models.attention import set_attention
from glmd.models.heads import share_backbone
from glmd.models.loading import load_language_model
from glmd.models.probes import prove_texts_apart
from glmd.pipeline.context import Context
from glmd.planning.stages import Stage
from glmd.runtime.phases import phase
from glmd.tasks.forms import class_logits
from glmd.tasks.loading import load_classifier
from glmd.training.fsdp import shard_backbones
from glmd.vocabulary.vocabulary import Vocabulary


@phase("loading")
def live_teacher(context: Context, stage: Stage, vocabulary: Vocabulary) -> OnlineTeacher | Ensemble:
    """What a stage learns from, for students of a vocabulary."""
    found = [teacher_at(context, stage, number, vocabulary) for number in range(len(stage.teachers))]
    return Ensemble(found) if len(found) > 1 else found[0]


@phase("loading")
def teacher_at(
    context: Context, stage: Stage, number: int, vocabulary: Vocabulary, *, is_asked: bool = True
) -> OnlineTeacher:
    """One of a stage's teachers, from 0; to fill a cache, for all source tokens.

    is_asked: else its head alone is wanted.
    """
    path, classifier, language_model = stage.teachers[number], None, None
    token_map = None
    if path not in context.language_models and context.stage(path).variant == "student":
        # An assistant of the student's tokens reads them as it does, and has no others in its head.
        assert stage.variant == "student", "checked by plan"
        token_map, vocabulary = vocabulary.token_map, Vocabulary.identity(len(vocabulary.kept_ids))
    if stage.task is not None:
        classifier = _classifier(context, stage, path)
    if stage.asks_lm_logits_of(number):
        # In a blank the fine-tuned model has predicted tokens itself; else it gets the LM head that it began with.
        predicts_itself = stage.task is not None and not context.form(stage).has_own_head
        language_model = classifier if predicts_itself else _language_model(context, path)
    elif classifier is None:  # whose layers are read
        language_model = _language_model(context, path)
    if language_model is not None and stage.task is None and context.plan.packs:
        prove_texts_apart(language_model)
    logits = context.form(stage).logits if stage.task is not None else class_logits
    # Layers that are lent are called by each rank as it likes, which those that are shared out cannot be.
    whole = number == 0 and "layers" in stage.teacher_needs
    options: dict[str, Any] = {"is_asked": is_asked, "whole": whole, "token_map": token_map}
    return _online(context, language_model, classifier, vocabulary, logits, **options)


@phase("loading")
def load_fine_tuned(context: Context, stage: Stage) -> Any:
    """The fine-tuned teacher of a stage in the precision that it teaches in, and is scored in, on its device."""
    return _placed(context, [_classifier(context, stage, context.classifier(stage))])[0]


@phase("loading")
def placed_language_model(context: Context, path: str) -> Any:
    """The language model of a stage as it teaches, on its device."""
    return _placed(context, [_language_model(context, path)])[0]


def _classifier(context: Context, stage: Stage, path: str) -> Any:
    assert stage.task is not None, "a stage of a task"
    teacher = context.config.teacher
    return load_classifier(
        context.model(path),
        stage.task.task,
        dtype=getattr(torch, teacher.dtype),
        quantization=teacher.quantization,
        device=context.accelerator.device,
    )


def _language_model(context: Context, path: str) -> Any:
    """That of a stage, loaded unless it is at hand."""
    wanted = context.language_model(path)
    if context.at_hand is not None and context.at_hand[0] == wanted:
        return context.at_hand[1]
    return _loaded(context, wanted)


def _loaded(context: Context, teacher: TeacherConfig) -> Any:
    return load_language_model(teacher, device=context.accelerator.device)


def _placed(context: Context, models: list[Any], *, whole: bool = False) -> list[Any]:
    """Models that share a backbone, if there are two, on the device: its part of them where they are shared out."""
    if context.shards_teachers and not whole:
        shard_backbones(models, context.accelerator.device)
    return [model.to(context.accelerator.device) for model in models]


def _online(
    context: Context,
    language_model: Any,
    classifier: Any,
    vocabulary: Vocabulary,
    logits: Any = class_logits,
    *,
    is_asked: bool = True,
    whole: bool = False,
    token_map: np.ndarray | None = None,
) -> OnlineTeacher:
    models = [model for model in (classifier, language_model) if model is not None]
    if language_model is not None and classifier not in (None, language_model):
        share_backbone(classifier, language_model)
    if is_asked:
        _placed(context, models, whole=whole)
    if context.config.attn_implementation is not None:
        for model in models:
            set_attention(model, context.config.attn_implementation)
    settings = context.config.vocabulary
    return OnlineTeacher(
        language_model,
        classifier,
        vocabulary,
        merge_dropped=settings.teacher_mass == "merge",
        reads_mapped=settings.teacher_reads == "mapped",
        task_logits=logits,
        token_map=token_map,
    )
