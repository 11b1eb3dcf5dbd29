"""The caches of teachers' outputs that a run reads: refused, made, opened.

refuse_stale(context, path)               # once the teacher at this path is known, before anything else is trained
teacher = cached_teacher(context, stage)
"""

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial

from tqdm import tqdm

from glmd.data.batches import Batch
from glmd.distillation.cached_teacher import CachedTeacher
from glmd.distillation.teacher import Ensemble, TeacherOutputs
from glmd.distillation.teacher_cache import LESS, TeacherCache, free_bytes, gigabytes
from glmd.errors import GlmdError, RunError
from glmd.pipeline.context import Context
from glmd.pipeline.data import corpus_blocks
from glmd.pipeline.teachers import teacher_at
from glmd.planning.caches import (
    cache_folder,
    corpus_cache,
    read_caches,
    require_own_cache,
    stage_cache_folder,
    task_cache,
)
from glmd.planning.stages import TEACHER, Stage, teacher_path
from glmd.runtime.phases import phase
from glmd.runtime.processes import on_main, together
from glmd.vocabulary.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


def refuse_foreign(context: Context) -> None:
    """Refuse a cache of the corpus that is of something else, by what is known before the corpus is read."""
    if any(stage.task is None for stage in to_come(context)):
        for number in range(len(context.config.teacher.ensemble) + 1):
            path = teacher_path(number)
            teacher_hash = context.fingerprint(path) if path in context.language_models else None
            on_main(partial(require_own_cache, context.plan, teacher_hash, number))


def refuse_stale(context: Context, teacher: str) -> None:
    """Refuse what is kept of this teacher and is of something else, and a disk too small for one of its caches."""
    found = read_caches(context.plan, to_come(context)).values()
    caches = [_cache(context, stage, number) for stage, number in found if stage.teachers[number] == teacher]
    on_main(lambda: [cache.missing(whole=False) for cache in caches])


def require_room(context: Context, reading: Iterable[Stage]) -> None:
    """Refuse a disk that cannot take the caches of corpus and tasks together, before the first is made."""
    found = read_caches(context.plan, reading).values()
    if len(found) < 2 and all(stage.task is None for stage, _ in found):  # that of the corpus is weighed when begun
        return
    caches = [_cache(context, stage, number, sizes_alone=True) for stage, number in found]

    def require() -> None:
        needed = {str(cache.folder): cache.bytes_to_come for cache in caches}
        free = free_bytes(cache_folder(context.config))
        if sum(needed.values()) > free:
            parts = ", ".join(f"{gigabytes(size)} for {folder}" for folder, size in needed.items() if size)
            raise RunError(f"teacher.cache: {parts} are needed and {gigabytes(free)} free; {LESS}")

    on_main(require)


def make_caches(context: Context, teacher: str) -> None:
    """All that stages will read of this teacher, ahead of them."""
    for stage, number in read_caches(context.plan, context.stages).values():
        if stage.teachers[number] == teacher:
            _complete(context, stage, number, _cache(context, stage, number))


def cached_teacher(context: Context, stage: Stage) -> CachedTeacher | Ensemble:
    """The teachers of a stage from disk; a cache is made where it is not there, and compared with its sums once."""
    found = [_cached_teacher(context, stage, number) for number in range(len(stage.teachers))]
    return Ensemble(found) if len(found) > 1 else found[0]


def _cached_teacher(context: Context, stage: Stage, number: int) -> CachedTeacher:
    folder, vocabulary = stage_cache_folder(context.plan, stage, number), context.vocabulary(stage)
    language_model = None
    if folder not in context.opened:
        cache = _cache(context, stage, number)
        _complete(context, stage, number, cache)
        context.opened[folder] = cache.open()
    if stage.asks_lm_logits_of(number):
        # The head's rows are those of the fine-tuned embeddings where they are tied. The model itself is not kept.
        language_model = teacher_at(context, stage, number, vocabulary, is_asked=False).language_model
    merges, device = context.config.vocabulary.teacher_mass == "merge", context.accelerator.device
    return CachedTeacher(context.opened[folder], language_model, vocabulary, merge_dropped=merges, device=device)


def to_come(context: Context) -> list[Stage]:
    """The stages that will read a cache."""
    return [stage for stage in context.stages if stage.cached and not context.is_complete(stage)]


def _cache(context: Context, stage: Stage, number: int, *, sizes_alone: bool = False) -> TeacherCache:
    """What the cache of one of a stage's teachers is to hold. sizes_alone: they may be yet to be trained."""
    path = teacher_path(number)
    is_known = not sizes_alone and (path == TEACHER or path in context.language_models)
    teacher_hash = context.fingerprint(path) if is_known else None
    if stage.task is not None:
        hashes = {"teacher_hash": teacher_hash, "classifier_hash": None}
        if not sizes_alone:
            hashes["classifier_hash"] = context.fingerprint(stage.teachers[number])
        return task_cache(context.plan, stage, **hashes, number=number)
    parts = corpus_blocks(context, stage), corpus_blocks(context, stage, held_out=True)
    return corpus_cache(context.plan, *parts, teacher_hash=teacher_hash, tokens=context.tokens, number=number)


@phase("teacher.cache")
def _complete(context: Context, stage: Stage, number: int, cache: TeacherCache) -> None:
    """Make what is missing of a cache, whole shards shared out over the ranks."""

    def missing(*, whole: bool) -> list[int]:
        # Half a cache has shards of the size that it was begun with.
        found, cache.rows_per_shard = on_main(lambda: (cache.missing(whole=whole), cache.rows_per_shard))
        return list(found)

    # A complete one is not locked: its disk may be read-only, and other runs read it too.
    if not missing(whole=False) and not missing(whole=True):
        return
    with ExitStack() as held:
        on_main(lambda: held.enter_context(cache.lock()))
        wanted = missing(whole=True)
        if not wanted:
            return
        on_main(cache.begin)
        _say_how_often_read(context, stage, cache)
        together(lambda: _write_shards(context, stage, number, cache, wanted))
        on_main(cache.finish)


def _write_shards(context: Context, stage: Stage, number: int, cache: TeacherCache, wanted: Sequence[int]) -> None:
    """This rank's part of the shards."""
    rank, world_size = context.accelerator.process_index, context.accelerator.num_processes
    mine, batch_size, asked = wanted[rank::world_size], stage.training.per_device_eval_batch_size, 0
    if not mine and not context.shards_teachers:
        return
    teacher = teacher_at(context, stage, number, Vocabulary.identity(len(context.plan.tokenizer)))

    def ask(batch: Batch) -> TeacherOutputs:
        nonlocal asked
        asked += 1
        return teacher(batch)

    def keep_up() -> None:
        """A sharded teacher waits for all ranks at each call: ask as often as the rank with most to ask."""
        calls = [sum(cache.batches(each, batch_size) for each in wanted[i::world_size]) for i in range(world_size)]
        for _ in range(max(calls) - asked if context.shards_teachers else 0):
            ask(cache.batch(0, 1, context.collate))

    try:
        for number in tqdm(mine, desc="teacher.cache", unit="shard", disable=None):
            cache.write_shard(number, ask, context.collate, batch_size=batch_size, name=teacher.name)
    except GlmdError:  # of which the others hear after their shards
        keep_up()
        raise
    keep_up()


def _say_how_often_read(context: Context, stage: Stage, cache: TeacherCache) -> None:
    if stage.task is not None:  # seeds and grid points share those of tasks
        return
    (data, maskings), settings = cache.parts[0], stage.training
    assert settings.max_steps is not None, "checked by config"
    epochs = settings.max_steps * settings.global_batch_size(context.processes) / len(data)
    if epochs <= maskings:
        found = f"{epochs:.2g} epochs of {maskings} maskings are less than what is needed of the teacher for it"
        logger.info("teacher.cache: %s; it pays with further students, or more steps", found)
