"""How a stage's model is scored: by the teacher's predictions, by the answers to a task."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from glmd.data.blocks import BlockDataset, block_texts
from glmd.distillation.teacher import Ensemble
from glmd.evaluation.bits_per_byte import score_text
from glmd.evaluation.metrics import score
from glmd.evaluation.scoring import answers_of, predict, score_lm
from glmd.models.attention import attention_of, chosen_by_transformers
from glmd.models.heads import is_causal
from glmd.models.loading import load_language_model
from glmd.pipeline.context import Context
from glmd.pipeline.data import corpus_blocks, val_data
from glmd.pipeline.teachers import load_fine_tuned
from glmd.planning.stages import Stage
from glmd.runtime.phases import phase
from glmd.training.trainer import Teacher


@phase("scoring")
def score_language_model(context: Context, stage: Stage, student: Any, teacher: Teacher) -> dict[str, float]:
    """Nearness to the teacher, on held-out blocks or val; of a decoder on the corpus also bits per byte."""
    data = corpus_blocks(context, stage, held_out=True) if stage.task is None else val_data(context, stage)
    with _plain_attention(context, student):
        scores = score_lm(
            student.to(context.accelerator.device),
            teacher,
            data,
            context.collate,
            token_map=context.vocabulary(stage).token_map,
            accelerator=context.accelerator,
            batch_size=stage.training.per_device_eval_batch_size,
        )
    if isinstance(data, BlockDataset) and is_causal(context.plan.teacher_config):
        scores |= _bits(context, student, context.tokenizer(stage), data)
    return scores


@phase("scoring")
def teacher_bits(context: Context, stage: Stage, teacher: Teacher) -> dict[str, float]:
    """Bits per byte of a causal teacher on the held-out text; one that is read from a cache is loaded for it."""
    if stage.task is not None or not is_causal(context.plan.teacher_config):
        return {}
    assert stage.teacher is not None, "the stage learns from a teacher"
    first = teacher.teachers[0] if isinstance(teacher, Ensemble) else teacher
    model = getattr(first, "language_model", None) or load_language_model(context.language_model(stage.teacher))
    held_out = corpus_blocks(context, stage, held_out=True)
    return {"teacher_bits_per_byte": _bits(context, model, context.plan.tokenizer, held_out)["bits_per_byte"]}


def _bits(context: Context, model: Any, tokenizer: Any, data: BlockDataset) -> dict[str, float]:
    """Bits per byte of a causal LM on the text of held-out blocks, with the model's own tokenizer."""
    with _plain_attention(context, model):
        return score_text(
            model.to(context.accelerator.device),
            tokenizer,
            block_texts(data, context.plan.tokenizer),
            max_length=len(data.start) + data.block_length + len(data.end),
            accelerator=context.accelerator,
        )


def _plain_attention(context: Context, model: Any) -> AbstractContextManager[None]:
    """Transformers' choice in place of `attn_implementation`, for a model that may be in training."""
    if context.config.attn_implementation is None:
        return nullcontext()
    return attention_of(model, implementation=chosen_by_transformers(model))


@phase("scoring")
def score_task(context: Context, stage: Stage, model: Any) -> dict[str, Any]:
    """Metrics on the validation split, if it has labels; of a student also the share of the teacher's answers."""
    assert stage.task is not None, "a stage of a task"
    answers = _answers(context, stage, model, is_teacher=stage.trains_teacher)
    result: dict[str, Any] = {"examples": len(answers)}
    if stage.task.is_scored:
        result["metrics"] = score(stage.task.task, answers, stage.task.val)
    if not stage.trains_teacher:
        result["agreement"] = float((answers == teacher_answers(context, stage)).mean())
    return result


@phase("scoring")
def teacher_answers(context: Context, stage: Stage) -> np.ndarray:
    """(examples,) the fine-tuned teacher's answers on val: the same for all seeds, grid points and the control."""
    path = context.classifier(stage)
    if path not in context.answers:
        context.answers[path] = _answers(context, stage, load_fine_tuned(context, stage), is_teacher=True)
    return context.answers[path]


def _answers(context: Context, stage: Stage, model: Any, *, is_teacher: bool) -> np.ndarray:
    """(examples,) class ids, or positions of choices, on the validation split."""
    assert stage.task is not None, "a stage of a task"
    with _plain_attention(context, model):
        logits = predict(
            model.to(context.accelerator.device),
            val_data(context, stage),
            context.collate,
            token_map=None if is_teacher else context.vocabulary(stage).token_map,
            accelerator=context.accelerator,
            batch_size=stage.training.per_device_eval_batch_size,
            name=f"{stage.task.task.name}: the {'teacher' if is_teacher else 'student'}",
        )
    return answers_of(stage.task.task, logits)
