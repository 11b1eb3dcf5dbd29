"""How a stage's model is scored: by the teacher's predictions, by the answers to a task."""

import json
import logging
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from glmd.data.batches import Batch
from glmd.data.blocks import BlockDataset, block_texts
from glmd.data.chats import ConversationDataset, conversation_texts
from glmd.distillation.teacher import of_each
from glmd.evaluation.bits_per_byte import score_conversations, score_text
from glmd.evaluation.metrics import score
from glmd.evaluation.resampling import resampled_scores
from glmd.evaluation.scoring import agreement, answers_of, predict, score_lm
from glmd.evaluation.sentences import nearness, similarities
from glmd.losses.logits import kl_divergence
from glmd.models.attention import attention_of, chosen_by_transformers
from glmd.models.heads import Split
from glmd.pipeline.context import Context
from glmd.pipeline.data import corpus_blocks, val_data
from glmd.pipeline.teachers import load_fine_tuned, placed_language_model
from glmd.planning.stages import Stage
from glmd.reporting.joined import ANSWERS
from glmd.runtime.phases import phase
from glmd.runtime.processes import is_main, on_main
from glmd.storage import write_atomically
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.tasks import SENTENCES
from glmd.training.trainer import Teacher

logger = logging.getLogger(__name__)
FEW = 4  # held-out blocks on which a quantized teacher is compared with the whole one, which is on the CPU


@phase("scoring")
def score_language_model(context: Context, stage: Stage, student: Any, teacher: Teacher) -> dict[str, float]:
    """Nearness to the teacher, on held-out blocks or val; of a decoder on the corpus also bits per byte.

    Of conversations also by role, as `score_lm` and `score_conversations` name it.
    """
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
    if not isinstance(data, TaskDataset) and context.plan.kind == "causal":
        scores |= _bits(context, student, context.tokenizer(stage), data)
    return scores


@phase("scoring")
def teacher_bits(context: Context, stage: Stage, teacher: Teacher) -> dict[str, float]:
    """Bits per byte of a causal teacher on the held-out text; one that is read from a cache is loaded for it."""
    if stage.task is not None or context.plan.kind != "causal":
        return {}
    assert stage.teacher is not None, "the stage learns from a teacher"
    model = getattr(teacher, "language_model", None) or placed_language_model(context, stage.teacher)
    held_out, tokenizer = corpus_blocks(context, stage, held_out=True), context.plan.tokenizer
    if stage.teacher not in context.language_models:
        tokenizer = context.tokenizer(context.stage(stage.teacher))
    bits, ours = _bits(context, InParts(model), tokenizer, held_out), "bits_per_byte"
    return {f"{role}teacher_{ours}": bits[role + ours] for role in ("", "assistant_", "others_") if role + ours in bits}


class InParts(nn.Module):
    """A language model that runs its backbone by a call: OPT's own forward calls a part of it alone, whose weights
    other ranks may hold."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.split = model, Split(model)

    def forward(self, *, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        """As of the model. No keys are kept whatever `use_cache` says."""
        inputs = {"input_ids": input_ids}
        return SimpleNamespace(logits=self.split.run_head(self.split.run_backbone(inputs), inputs=inputs))


def _bits(context: Context, model: Any, tokenizer: Any, data: BlockDataset | ConversationDataset) -> dict[str, float]:
    """Bits per byte of a causal LM on the text of held-out blocks, with the model's own tokenizer."""
    model.to(context.accelerator.device)
    with _plain_attention(context, model):
        if isinstance(data, ConversationDataset):
            texts = conversation_texts(data, context.plan.tokenizer)
            options: dict[str, Any] = {"max_length": data.max_length, "accelerator": context.accelerator}
            return score_conversations(model, tokenizer, texts, **options)
        return score_text(
            model,
            tokenizer,
            block_texts(data, context.plan.tokenizer),
            max_length=len(data.start) + data.block_length + len(data.end),
            accelerator=context.accelerator,
        )


def _plain_attention(context: Context, model: Any) -> AbstractContextManager[None]:
    """Transformers' choice in place of `attn_implementation`, for a model that may be in training."""
    if context.config.attn_implementation is None:
        return nullcontext()
    model = model.model if isinstance(model, InParts) else model
    return attention_of(model, implementation=chosen_by_transformers(model))


@phase("scoring")
@torch.no_grad()
def whole_answers(context: Context, stage: Stage, source: nn.Module) -> Tensor | None:
    """(N, H) what a teacher's head sees of a few held-out blocks before it is quantized. None where it will not be."""
    is_compared = stage.task is None and not context.plan.teaches_task_alone
    if context.config.teacher.quantization is None or not is_compared or not is_main():
        return None
    batch, split = _few_blocks(context, stage), Split(source.eval())
    return split.hidden_before_final(split.run_backbone(split.inputs(batch)))[batch["predicts"]]


@phase("scoring")
@torch.no_grad()
def quantization_error(context: Context, stage: Stage, whole: Tensor | None, teacher: Teacher) -> dict[str, float]:
    """How far a quantized teacher is from what it was, over the tokens that its student keeps; the same on every rank.

    kl_divergence: nats a token at temperature 1 from the whole one in float32. agreement: share of tokens whose
    likeliest token is the same. whole: what `whole_answers` gave.
    """

    def find() -> dict[str, float]:
        assert whole is not None, "the main rank has asked it"
        outputs = of_each(teacher(_few_blocks(context, stage)))[0]
        assert outputs.hidden_states is not None and outputs.head is not None, "the teacher has an LM head"
        bias, weight = outputs.head.bias, outputs.head.weight.float()
        head = outputs.head._replace(weight=weight, bias=None if bias is None else bias.float())
        ours, theirs = head.logits(outputs.hidden_states.float()), head.logits(whole.to(weight.device))
        agreement = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
        return {"kl_divergence": kl_divergence(ours, theirs).mean().item(), "agreement": agreement.item()}

    found = on_main(find)
    shown = f"KL {found['kl_divergence']:.4f} nats a token, same top token {found['agreement']:.1%}"
    logger.info("teacher.quantization %s: %s, from the whole teacher", context.config.teacher.quantization, shown)
    return found


def _few_blocks(context: Context, stage: Stage) -> Batch:
    data = corpus_blocks(context, stage, held_out=True)
    return context.collate(data.__getitems__([(0, i) for i in range(min(FEW, len(data)))]))


@phase("scoring")
def score_task(context: Context, stage: Stage, model: Any, *, keeps: bool = False) -> dict[str, Any]:
    """Metrics on the validation split, if it has labels; of a student also the share of the teacher's answers.

    keeps: write ANSWERS into the stage's folder.
    """
    assert stage.task is not None, "a stage of a task"
    answers = _answers(context, stage, model, is_teacher=stage.trains_teacher)
    result: dict[str, Any] = {"examples": len(answers)}
    is_of_sentences = stage.task.task.problem_type == SENTENCES
    told = similarities(answers) if is_of_sentences else answers
    if stage.task.is_scored:
        result["metrics"] = score(stage.task.task, told, stage.task.val)
    if keeps:
        kept: dict[str, Any] = {"answers": told.tolist()}
        if stage.task.is_scored:
            kept["val"] = stage.task.val_fingerprint()
            kept["resampled"] = resampled_scores(stage.task.task, told, stage.task.val)
        on_main(lambda: write_atomically(context.folder(stage) / ANSWERS, json.dumps(kept)))
    theirs = answers if stage.trains_teacher else teacher_answers(context, stage)
    if is_of_sentences:
        result["metrics"] = result.get("metrics", {}) | nearness(answers, theirs)
    if not stage.trains_teacher:
        result["agreement"] = agreement(stage.task.task, answers, theirs)
    return result


@phase("scoring")
def teacher_answers(context: Context, stage: Stage) -> np.ndarray:
    """(examples,) the fine-tuned teacher's answers on val: the same for all seeds, grid points and the control."""
    path = context.classifier(stage)
    if path not in context.answers:
        context.answers[path] = _answers(context, stage, load_fine_tuned(context, stage), is_teacher=True)
    return context.answers[path]


def _answers(context: Context, stage: Stage, model: Any, *, is_teacher: bool) -> np.ndarray:
    """What the model answers on the validation split, as `answers_of` has it."""
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
    return answers_of(stage.task.task, logits, texts=len(stage.task.val[0].texts))
