"""What of a config is beyond the data, the memory or reason, refused with the largest that fits.

    require_sizes(plan, sources)        # data: the same on every machine
    require_room(plan, Layout())        # memory: of this one

A step is rehearsed, as for `glmd plan`, only where its batch might be large for the machine.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glmd.data.blocks import block_frame
from glmd.data.chats import pack
from glmd.errors import ConfigError, ModelError, counted
from glmd.planning.caches import estimated_tokens, file_sizes, held_out_blocks, read_sample, store_of
from glmd.planning.plan import Plan, corpus_sources
from glmd.planning.run_cost import Layout, each_once, fitting_batch
from glmd.planning.stages import Stage, learner_config, lines
from glmd.planning.step_cost import counted as rehearsed
from glmd.runtime.memory import USABLE, forward_bytes

READ_WHOLE = (
    1_000_000  # bytes of a corpus that are cut into tokens to count its blocks; of a larger one they bound them
)
# So many are refused for no data: they are what a stage has by default, and harmless.
SMALL_BATCH, SMALL_STEP, SMALL_EVAL, SMALL_HELD_OUT = 16, 64, 64, 64
SUSPICIOUS = 0.01  # of the memory, by hidden states alone: beyond it the step is rehearsed


def require_sizes_and_room(plan: Plan, synthetic: Path | None, processes: int) -> None:
    """Both, for a run on this machine. synthetic: where the embedded world lies, for `data.synthetic`."""
    require_sizes(plan, corpus_sources(plan.config, synthetic), processes=processes)
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") and processes > 1
    require_room(plan, Layout(processes, sharding="fsdp" if sharded else "none"))


def require_sizes(plan: Plan, sources: Sequence[str], *, processes: int = 1) -> None:
    """Refuse batches, steps and held-out blocks beyond the data, and workers beyond reason. Raises GlmdError.

    sources: the corpus. processes: that share a step.
    """
    _require_workers(plan.config.dataloader_num_workers)
    for stage, *_ in lines(plan, processes):
        if stage.is_control:  # has the batches of the pass that it is compared with
            continue
        if stage.task is None:
            _require_corpus_sizes(plan, stage, sources, processes)
            continue
        number = len(stage.examples)
        _require_texts(plan, stage, number)
        name = f"{stage.task.task.name} has {counted(number, 'training example')}"
        _require_batches(stage, number, name, processes)
        scored = max(len(stage.task.val), len(stage.task.inputs))
        _require_eval_batch(stage, scored, f"{stage.task.task.name} has {counted(scored, 'example')} to score")


def _require_workers(number: int | None) -> None:
    """A login node has few CPUs: what a larger machine may have is not refused there."""
    most = max(32, 4 * (os.cpu_count() or 1))
    if number is not None and number > most:
        found = f"{number:,} processes for each rank are more than 4 for each of the {os.cpu_count()} CPUs here"
        raise ConfigError(f"dataloader_num_workers: {found}; give at most {most}")


def _require_corpus_sizes(plan: Plan, stage: Stage, sources: Sequence[str], processes: int) -> None:
    known = _corpus_blocks(plan, sources, stage.length)
    if known is None:
        _require_texts(plan, stage, None)
        return
    tokens, blocks, about = known
    wanted = plan.config.data.eval_blocks
    held_out = held_out_blocks(tokens, blocks, stage.length, wanted)
    corpus = f"the corpus is {about}{counted(blocks, 'block')} of {stage.length} tokens"
    if wanted > max(SMALL_HELD_OUT, held_out):
        raise ConfigError(f"data.eval_blocks is {wanted:,}, but {corpus}; give at most {held_out:,}, a fifth of them")
    _require_texts(plan, stage, blocks - held_out)
    _require_batches(stage, blocks - held_out, corpus, processes)
    _require_eval_batch(stage, blocks, corpus)


def _require_batches(stage: Stage, examples: int, there: str, processes: int) -> None:
    """Refuse a micro-batch that holds an example twice, and a step that does so beyond a small one."""
    settings = stage.training
    batch, accumulated = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    if batch > max(SMALL_BATCH, examples):
        found = f"per_device_train_batch_size of {stage.name} is {batch:,}"
        raise ConfigError(f"{found}, but {there}; give at most {examples:,}")
    most = max(SMALL_STEP, examples) // (batch * processes)
    if accumulated > max(1, most):
        step = f"makes steps of {settings.global_batch_size(processes):,} examples"
        found = f"gradient_accumulation_steps of {stage.name} is {accumulated:,} and {step}"
        raise ConfigError(f"{found}, but {there}; give at most {max(1, most):,}")


def _require_texts(plan: Plan, stage: Stage, examples: int | None) -> None:
    """Refuse batches, and data, of fewer texts than are compared with each other. examples: None, not known."""
    assert stage.objective is not None, "the stage trains"
    least, batch = stage.objective.least_texts, stage.training.per_device_train_batch_size
    choices = min((len(each.texts) for each in stage.examples), default=1)
    found = f"method {plan.config.method} compares at least {least} texts of a batch with each other in {stage.name}"
    if batch * choices < least:
        wanted = f"per_device_train_batch_size is {batch}; give at least {-(-least // choices)}"
        raise ConfigError(f"{found}, whose {wanted}")
    if examples is not None and examples * choices < least:
        raise ConfigError(f"{found}, whose data are {counted(examples, 'example')}; give more")


def _require_eval_batch(stage: Stage, examples: int, there: str) -> None:
    batch = stage.training.per_device_eval_batch_size
    if batch > max(SMALL_EVAL, examples):
        found = f"per_device_eval_batch_size of {stage.name} is {batch:,}"
        raise ConfigError(f"{found}, but {there}; give at most {max(SMALL_EVAL, examples):,}")


def _corpus_blocks(plan: Plan, sources: Sequence[str], length: int) -> tuple[int, int, str] | None:
    """Tokens and blocks of the corpus, and "at most " where they are bounds. None where nothing is known of it.

    A token is at least a byte of its text.
    """
    sizes = file_sizes(plan)
    store, about = store_of(plan), ""
    if plan.conversations is not None:
        return _conversation_blocks(plan, sources, length)
    if store is not None:
        tokens = store.num_tokens
    elif sizes is None:
        return None
    elif sum(sizes) <= READ_WHOLE:
        tokens = max(0, (estimated_tokens(plan, sources) or 0) - 1)  # a separator stands between two documents
    else:
        tokens, about = sum(sizes), "at most "
    frame = sum(map(len, block_frame(plan.tokenizer)))
    return tokens, -(-tokens // (length - frame)), about


def _conversation_blocks(plan: Plan, sources: Sequence[str], length: int) -> tuple[int, int, str] | None:
    """The same of a corpus of conversations, which is known where it was read, or is small."""
    store, sizes = store_of(plan), file_sizes(plan)
    if store is not None:
        lengths = np.diff(store.first_tokens)
    elif sizes is not None and sum(sizes) <= READ_WHOLE:
        lengths = read_sample(plan, sources).lengths
    else:
        return None
    packing = pack(lengths, length, packing=plan.config.data.packing)
    return int(lengths.sum()), len(packing.ends), ""


def require_room(plan: Plan, layout: Layout) -> None:
    """Refuse batches that the memory of this machine cannot take. Raises ConfigError with the largest that fits."""
    count = each_once(rehearsed)
    for stage, *_ in lines(plan, layout.devices):
        settings, choices = stage.training, _choices(stage)
        shown = f"of {stage.name} is"
        remedy = f"this machine has {layout.usable / USABLE / 1e9:.3g} GB; `glmd plan` counts for another"
        evaluated = int(layout.usable // (forward_bytes(plan.teacher_config, stage.length) * choices))
        if _largest_scored(stage) > max(1, evaluated):
            found = f"per_device_eval_batch_size {shown} {settings.per_device_eval_batch_size:,}"
            raise ConfigError(
                f"{found}, of which about {evaluated:,} fit: {remedy}; give at most {max(1, evaluated):,}"
            )
        batch = settings.per_device_train_batch_size
        if batch * choices * _kept_bytes(plan, stage) < SUSPICIOUS * layout.usable:
            continue
        try:
            fits = fitting_batch(plan, stage, layout, count)
        except ModelError:  # of an architecture that cannot be rehearsed the hidden states are all that is known
            fits = int(layout.usable // (choices * _kept_bytes(plan, stage)))
        if batch > fits:
            found = f"per_device_train_batch_size {shown} {batch:,}, of which about {fits:,} fit: {remedy}"
            raise ConfigError(f"{found}; give at most {fits:,}" if fits else f"{found}; shorten max_length")


def _choices(stage: Stage) -> int:
    return max((len(each.texts) for each in stage.task.inputs), default=1) if stage.task is not None else 1


def _largest_scored(stage: Stage) -> int:
    """Texts of the largest batch that is scored: no larger than the data."""
    batch = stage.training.per_device_eval_batch_size
    return batch if stage.task is None else min(batch, max(len(stage.task.val), len(stage.task.inputs)))


def _kept_bytes(plan: Plan, stage: Stage) -> int:
    """What the backward of a text needs at least: what each layer was given, in half precision."""
    config = learner_config(plan, stage).get_text_config()
    width = getattr(config, "hidden_size", 1)
    return 2 * stage.length * (width if isinstance(width, int) else 1) * (int(config.num_hidden_layers) + 1)
