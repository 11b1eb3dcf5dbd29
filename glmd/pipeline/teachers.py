"""The teacher of a stage, live: models that a stage has left, or that were named, as one callable."""

from dataclasses import replace
from typing import Any

import torch

from glmd.distillation.teacher import Ensemble, OnlineTeacher
from glmd.models.attention import set_attention
from glmd.models.loading import load_language_model
from glmd.pipeline.context import Context
from glmd.planning.stages import TEACHER, Stage
from glmd.runtime.phases import phase
from glmd.tasks.forms import class_logits
from glmd.tasks.loading import load_classifier
from glmd.vocabulary.vocabulary import Vocabulary


@phase("loading")
def live_teacher(context: Context, stage: Stage, vocabulary: Vocabulary) -> OnlineTeacher | Ensemble:
    """What a stage learns from, for students of a vocabulary; to fill a cache, of all source tokens."""
    first, config = first_teacher(context, stage, vocabulary), context.config.teacher
    if stage.task is not None or stage.teacher != TEACHER or not config.ensemble:
        return first
    configs = [replace(config, model=each, revision=None, ensemble=[]) for each in config.ensemble]
    return Ensemble([first, *(_online(context, load_language_model(each), None, vocabulary) for each in configs)])


@phase("loading")
def first_teacher(context: Context, stage: Stage, vocabulary: Vocabulary) -> OnlineTeacher:
    """The same without the further ones of `teacher.ensemble`."""
    teacher, classifier, language_model = stage.teacher, None, None
    assert teacher is not None, "the stage learns from a teacher"
    if teacher != TEACHER:
        assert context.stage(teacher).variant != "student", "a teacher reads and predicts all source tokens"
    if stage.task is not None:
        classifier = load_fine_tuned(context, stage)
    if stage.asks_lm_logits:
        # In a blank the fine-tuned model has predicted tokens itself; else it gets the LM head that it began with.
        predicts_itself = stage.task is not None and not context.form(stage).has_own_head
        language_model = classifier if predicts_itself else _language_model(context, teacher)
    logits = context.form(stage).logits if stage.task is not None else class_logits
    return _online(context, language_model, classifier, vocabulary, logits)


@phase("loading")
def load_fine_tuned(context: Context, stage: Stage) -> Any:
    """The fine-tuned teacher of a stage in the precision that it teaches in, and is scored in."""
    assert stage.task is not None, "a stage of a task"
    dtype = getattr(torch, context.config.teacher.dtype)
    return load_classifier(context.model(context.classifier(stage)), stage.task.task, dtype=dtype)


def _language_model(context: Context, path: str) -> Any:
    """That of a stage, loaded unless it is at hand."""
    wanted = context.language_model(path)
    if context.at_hand is not None and context.at_hand[0] == wanted:
        return context.at_hand[1]
    return load_language_model(wanted)


def _online(
    context: Context, language_model: Any, classifier: Any, vocabulary: Vocabulary, logits: Any = class_logits
) -> OnlineTeacher:
    implementation = context.config.attn_implementation
    for model in (language_model, classifier):
        if model is not None:
            model.to(context.accelerator.device)
            if implementation is not None:
                set_attention(model, implementation)
    merges = context.config.vocabulary.teacher_mass == "merge"
    return OnlineTeacher(language_model, classifier, vocabulary, merge_dropped=merges, task_logits=logits)
