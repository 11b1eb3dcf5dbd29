"""The texts of a stage: blocks of the corpus, examples of a task, masked as the stage says."""

import logging
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

from glmd.data.blocks import BlockDataset, block_frame
from glmd.data.chats import ConversationDataset
from glmd.data.conversations import LossOn
from glmd.data.infilling import corruption_for
from glmd.data.token_store import build_token_store, open_token_store, take_over_store
from glmd.errors import DataError, counted
from glmd.models.loading import load_language_model
from glmd.pipeline.context import Context
from glmd.planning.caches import conversation_packing, held_out_blocks, task_dataset
from glmd.planning.plan import corpus_sources
from glmd.planning.stages import Stage
from glmd.runtime.phases import phase
from glmd.runtime.processes import on_main, together
from glmd.tasks.cloze import candidate_ids
from glmd.tasks.dataset import TaskDataset, TrainingData
from glmd.tasks.examples import TaskExample
from glmd.tasks.tasks import BLANK

logger = logging.getLogger(__name__)


@phase("tokenizing")
def open_corpus(context: Context, synthetic: Path | None) -> None:
    """The corpus as ids, tokenized where it is not yet. Refuses one that is too short for the stages that read it."""
    sources = corpus_sources(context.config, synthetic)
    if not sources:
        return
    place, plan, teacher = context.run_folder.path / "corpus", context.plan, context.config.teacher
    if teacher.model is not None and not plan.teaches_task_alone and not (place / "manifest.json").is_file():
        # A teacher that cannot serve is refused before hours of reading text.
        with phase("loading"):
            on_main(lambda: load_language_model(teacher, device=context.accelerator.device) and None)
    options: dict[str, Any] = {"text_field": context.config.data.text_field, "conversations": plan.conversations}
    others = [each / "corpus" for each in context.run_folder.siblings]
    on_main(lambda: take_over_store(place, others, plan.corpus or {}, plan.tokenizer, **options))
    on_main(lambda: build_token_store(place, sources, plan.tokenizer, fingerprint=plan.corpus, **options).manifest)
    context.store = together(lambda: open_token_store(place))
    for stage in context.stages:
        if stage.task is None and stage.settings is not None:
            training_data(context, stage)


@phase("tokenizing")
def training_data(context: Context, stage: Stage) -> TrainingData:
    """What a stage is trained on."""
    if stage.task is None:
        blocks = corpus_blocks(context, stage)
        if isinstance(blocks, ConversationDataset):
            _say_truncated(context, stage, blocks)
        return blocks
    name, length, (probability, maskings) = stage.task.task.name, stage.length, stage.masking
    data = copy(_task_data(context, name, stage.examples, length))
    data.masking = corruption_for(context.plan.tokenizer, context.plan.kind, probability, stage.seed, maskings)
    # Once for the same inputs of a task: passes, seeds and controls read them again.
    found = f"{name}: {data.truncated:,} of {counted(len(data), 'input')} truncated to {length} tokens"
    if data.truncated and found not in context.said:
        context.said.add(found)
        logger.info("%s", found)
    return data


def _say_truncated(context: Context, stage: Stage, data: ConversationDataset) -> None:
    number, shared = data.num_conversations, counted(len(data), "block")
    found = f"{stage.name}: {counted(number, 'conversation')} in {shared} of {stage.length} tokens, "
    found += f"{data.truncated():,} of them truncated at the end"
    silent = data.silent()
    if silent == number:
        raise DataError(
            f"{stage.name}: no conversation has a token of the assistant's among its first {stage.length}; give a "
            "larger max_length, or data.loss_on=all"
        )
    found += f", {silent:,} so that nothing of the assistant's is left" if silent else ""
    if found not in context.said:
        context.said.add(found)
        logger.info("%s", found)


@phase("tokenizing")
def val_data(context: Context, stage: Stage) -> TaskDataset:
    """The validation inputs of a stage of a task, as they are."""
    assert stage.task is not None, "a stage of a task"
    return _task_data(context, stage.task.task.name, stage.task.val, stage.length)


def _task_data(context: Context, name: str, examples: Sequence[TaskExample], length: int) -> TaskDataset:
    """A task's examples in ids, made once for its stages, seeds and scorings; those of another task are let go."""
    known = context.task_data
    if any(task != name for task, *_ in known):
        known.clear()
    key = (name, id(examples), length)  # which stay where they are: a data set holds them
    if key not in known:
        known[key] = task_dataset(context.plan, name, examples, length)
    return known[key]


def corpus_blocks(context: Context, stage: Stage, *, held_out: bool = False) -> BlockDataset | ConversationDataset:
    """The corpus in blocks of the stage's length; the last ones are held out. Raises DataError for too few.

    Of held-out conversations the tokens of all roles are read, and told apart where that can be done.
    """
    store, tokenizer, length = context.store, context.plan.tokenizer, stage.length
    assert store is not None and length, "checked by config and plan"
    packing = conversation_packing(context.plan, store, length)
    total = len(packing.ends) if packing else store.num_blocks(length - sum(map(len, block_frame(tokenizer))))
    wanted = context.config.data.eval_blocks
    reserved = held_out_blocks(store.num_tokens, total, length, wanted)
    if held_out and reserved < wanted:
        held = "is" if reserved == 1 else "are"
        logger.info("data.eval_blocks: %d of %s %s held out, a fifth of them", reserved, counted(total, "block"), held)
    blocks = range(total - reserved, total) if held_out else range(total - reserved)
    if packing is not None:
        loss_on: LossOn = "all" if held_out else context.config.data.loss_on or "assistant"
        by_role = held_out and store.has_roles
        return ConversationDataset(
            store, max_length=length, blocks=blocks, packing=packing, loss_on=loss_on, by_role=by_role
        )
    probability, maskings = stage.masking
    masking = corruption_for(tokenizer, context.plan.kind, probability, stage.seed, maskings)
    return BlockDataset(store, tokenizer, max_length=length, blocks=blocks, masking=masking)


@phase("tokenizing")
def token_counts(context: Context) -> np.ndarray:
    """(V,) how often each source token stands in the corpus and in the tasks' training inputs.

    Validation inputs are not counted: that would fit the vocabulary to the test.
    """
    tokenizer, store = context.plan.tokenizer, context.store
    size = len(tokenizer)
    counts = np.zeros(size, dtype=np.int64)
    if store is not None:
        counts = store.counts(size, weights=context.config.vocabulary.corpus_weights)
    for task in [*context.plan.tasks.values(), *context.plan.untrained.values()]:
        # Each text once: a passage stands in many rows.
        texts = [*dict.fromkeys(text for each in [*task.train, *task.inputs] for text in _texts_of(each))]
        for first in range(0, len(texts), 1000):
            for ids in tokenizer(texts[first : first + 1000], add_special_tokens=False, verbose=False)["input_ids"]:
                counts += np.bincount(ids, minlength=size) if ids else 0
    return counts


def _texts_of(example: TaskExample) -> Iterator[str]:
    """All texts of an example, the candidates that fill a blank among them."""
    for text in (text for pair in example.texts for text in pair if text):
        yield text.replace(BLANK, " ")
    yield from example.choices


def warn_of_equal_candidates(context: Context, stage: Stage) -> None:
    """Say once of a task where candidates for a blank differ for the teacher and not for the student."""
    if stage.task is None or stage.trains_teacher or f"{stage.task.task.name}, {stage.variant}" in context.said:
        return
    task, val = stage.task.task, stage.task.val
    context.said.add(f"{task.name}, {stage.variant}")
    if task.casting == "head" or not task.is_choice:
        return
    ids, token_map, equal = iter(candidate_ids(val, context.plan.tokenizer)), context.vocabulary(stage).token_map, 0
    for example in val:
        theirs = {tuple(next(ids)) for _ in example.choices}
        ours = {tuple(token_map[list(each)]) for each in theirs}
        equal += len(ours) < len(theirs)
    if equal:
        found = "candidates that the teacher tells apart are equal in the student's vocabulary"
        remedy = "name their words in vocabulary.keep_words, or keep more"
        logger.warning("%s: in %d of %d val examples %s; %s", task.name, equal, len(val), found, remedy)
