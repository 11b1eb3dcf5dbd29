"""Which caches of a teacher's answers a plan has, what they are made from, and what they take on disk.

    print(describe_cache(plan, sources))       # for `glmd check`: refuses another's cache and a disk too small
    cache = task_cache(plan, stage, teacher_hash=..., classifier_hash=...)     # of a stage that is cached

The corpus has one cache in the folder `teacher.cache`, each stage of a task one below it; so have further teachers, in
folders of their own.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glmd.config import RunConfig
from glmd.config_file import differences
from glmd.data import blank_infilling, infilling, masking
from glmd.data.blocks import BlockDataset, block_frame
from glmd.data.chats import ConversationDataset, Packing, packing_of
from glmd.data.encoding import encode_texts
from glmd.data.infilling import Infilling, corruption_for
from glmd.data.token_store import TextReader, TokenStore, open_token_store
from glmd.distillation.teacher_cache import LESS, TASKS, TeacherCache, free_bytes, gigabytes, read_manifest, stale
from glmd.errors import DataError, RunError, counted
from glmd.models.heads import LMKind
from glmd.models.loading import model_fingerprint
from glmd.planning.plan import Plan, head_width
from glmd.planning.rules import cached_stages, live_stages
from glmd.planning.stages import TEACHER, Stage, named_language_models, stages, teacher_path
from glmd.tasks.dataset import TaskDataset, TrainingData
from glmd.tasks.examples import TaskExample
from glmd.tasks.forms import task_form
from glmd.vocabulary.tokenizer import tokenizer_fingerprint

SAMPLE = 4 << 20  # characters of a corpus that are cut into tokens to estimate the rest by
# What is known of a corpus only when it was cut into tokens.
LATER = ("corpus.tokens", "blocks.training", "blocks.held_out")


def corpus_cache(
    plan: Plan,
    training: BlockDataset | ConversationDataset,
    held_out: BlockDataset | ConversationDataset,
    *,
    teacher_hash: str | None,
    tokens: str | None,
    number: int = 0,
) -> TeacherCache:
    """The corpus in every masking that training sees, and of the first of several teachers the held-out blocks."""
    made_from = _corpus_made_from(plan) | {"teacher": teacher_hash}
    made_from["corpus"]["tokens"] = tokens
    made_from["blocks"] |= {"training": len(training), "held_out": len(held_out)}
    parts = ((training, _maskings(plan)), (held_out, 1))[: 1 if number else 2]
    return _cache(plan, corpus_cache_folder(plan.config, number), parts, made_from, words=True, number=number)


def require_own_cache(plan: Plan, teacher_hash: str | None, number: int = 0) -> None:
    """Refuse a cache of the corpus that is of something else, by what is known before the corpus is read.

    teacher_hash: None where the teacher is yet to be trained. number: of one of several teachers, from 0. Raises
    RunError naming what differs.
    """
    folder = corpus_cache_folder(plan.config, number)
    manifest = read_manifest(folder) if "pretraining" in cached_stages_of(plan) else None
    if manifest is None:
        return
    made_from = _corpus_made_from(plan) | {"teacher": teacher_hash}
    expected = _cache(plan, folder, (), made_from, words=True, number=number)
    unknown = LATER if teacher_hash else (*LATER, "teacher")
    changed = differences(manifest["made_from"], expected.made_from, ignore=unknown)
    if changed:
        raise RunError(stale(expected.folder, changed))


def task_cache(
    plan: Plan, stage: Stage, *, teacher_hash: str | None, classifier_hash: str | None, number: int = 0
) -> TeacherCache:
    """A task's inputs in every masking, and val where the stage compares LM logits there.

    number: of one of several teachers, from 0. Hashes are those of the pretrained and the fine-tuned teacher, None
    where they are yet to be trained: sizes do not depend on them.
    """
    planned = stage.task
    assert planned is not None, "a pass over a task"
    task, (probability, maskings) = planned.task, stage.masking
    data = task_dataset(plan, task.name, planned.inputs, stage.length)
    data.masking = corruption_for(plan.tokenizer, plan.kind, probability, stage.seed, maskings)
    parts = [(data, maskings or 1)]
    asks_words = stage.asks_lm_logits_of(number)
    if stage.leaves_language_model and asks_words and number == 0:  # by whom the student is scored
        parts.append((task_dataset(plan, task.name, planned.val, stage.length), 1))
    made_from = {
        # In a blank the fine-tuned model predicts tokens by a head of its own.
        "teacher": teacher_hash if asks_words and task.casting == "head" else None,
        "classifier": classifier_hash,
        "tokenizer": tokenizer_fingerprint(plan.tokenizer),
        "inputs": [each.fingerprint() for each, _ in parts],
        "max_length": stage.length,
        "masking": _masking(plan.kind, probability, maskings, stage.seed),
    }
    answers = task_form(task, kind=plan.kind).num_outputs(plan.teacher_config_at(number, planned))
    num_classes = answers if "task_head" in stage.teacher_needs_of(number) else None
    folder = stage_cache_folder(plan, stage, number)
    return _cache(plan, folder, parts, made_from, words=asks_words, num_classes=num_classes, number=number)


def task_dataset(plan: Plan, task: str, examples: Sequence[TaskExample], length: int) -> TaskDataset:
    """A task's examples as they are, in the teacher's ids."""
    planned = plan.tasks[task]
    return TaskDataset(
        examples,
        task_form(planned.task, kind=plan.kind),
        plan.tokenizer,
        max_length=length,
    )


def held_out_blocks(tokens: int, blocks: int, length: int, wanted: int) -> int:
    """How many of a corpus' blocks are held out: as many as wanted, at most a fifth. Raises DataError for too few."""
    if blocks < 5:
        found = f"{counted(tokens, 'token')} are {counted(blocks, 'block')} of {length}"
        raise DataError(f"data.corpus: {found}; at least 5 are needed: give more text, or a smaller max_length")
    return min(wanted, blocks // 5)


def cache_folder(config: RunConfig) -> Path:
    assert config.teacher.cache is not None, "asked for by the config"
    return Path(config.teacher.cache)


def corpus_cache_folder(config: RunConfig, number: int) -> Path:
    """That of one of several teachers of the corpus, from 0."""
    return cache_folder(config) / teacher_path(number) if number else cache_folder(config)


def stage_cache_folder(plan: Plan, stage: Stage, number: int = 0) -> Path:
    """Of a task one for all seeds, unless each has maskings of its own. number: of one of several teachers, from 0."""
    folder = corpus_cache_folder(plan.config, number)
    if stage.task is None:
        return folder
    return folder / TASKS / stage.task.task.name / stage.kind / (f"seed-{stage.seed}" if stage.masking[0] else "")


def read_caches(plan: Plan, found: Iterable[Stage]) -> dict[Path, tuple[Stage, int]]:
    """The folder of each cache that the stages read, with the first of them: seeds and grid points share it.

    Beside it the number of the teacher whose it is, of those that the stage learns from.
    """
    folders: dict[Path, tuple[Stage, int]] = {}
    for stage in found:
        for number in range(len(stage.teachers) if stage.cached else 0):
            folders.setdefault(stage_cache_folder(plan, stage, number), (stage, number))
    return folders


def cached_stages_of(plan: Plan) -> list[str]:
    return cached_stages(plan.config, plan.method)


def describe_cache(plan: Plan, sources: Sequence[str]) -> str:
    """What `teacher.cache` will take, for a person.

    Raises RunError for a cache of something else, naming what differs, and for a disk too small for all of it.
    """
    teacher, folder = plan.config.teacher, cache_folder(plan.config)
    # Of many gigabytes, and for nothing where there is no cache to compare it with.
    language_models, known = named_language_models(teacher), {}
    if folder.is_dir():
        known = {
            path: model_fingerprint(model, teacher.revision if path == TEACHER else None)
            for path, model in language_models.items()
        }
    lines, to_come = [], 0.0
    for number in range(len(teacher.ensemble) + 1):
        require_own_cache(plan, known.get(teacher_path(number)), number)
    for place, (stage, number) in read_caches(plan, stages(plan, 1)).items():
        if stage.task is None:
            text, size = _corpus_size(plan, sources, number)
            lines.append(f"corpus, {text}" + (f", of {language_models[teacher_path(number)]}" if number else ""))
            there = sum(path.stat().st_size for path in place.glob("shard-*.safetensors"))
            to_come += max(0.0, size - there)
            continue
        models = dict(enumerate(teacher.of_task(stage.task.task.name)))
        named = models.get(number)
        hashes = {"classifier_hash": model_fingerprint(named) if named else None}
        hashes["teacher_hash"] = known.get(teacher_path(number))
        cache = task_cache(plan, stage, **hashes, number=number)
        _require_own(cache, unknown=[key.removesuffix("_hash") for key, value in hashes.items() if value is None])
        tokens = f"{cache.num_tokens:,} tokens of {cache.token_bytes} bytes, " if cache.width else ""
        lines.append(f"{cache.folder.relative_to(folder)}, {tokens}{gigabytes(cache.num_bytes)}")
        to_come += cache.bytes_to_come
    live = {
        name: why for name, why in live_stages(plan.config, plan.method).items() if name not in cached_stages_of(plan)
    }
    lines += [f"the live teacher serves {name}, which {why}" for name, why in live.items()]
    if plan.config.assistants:
        lines.append("the live assistants serve those who learn from them, whose answers are not kept")
    free = free_bytes(folder)
    lines.append(f"{gigabytes(to_come)} to come, {gigabytes(free)} free")
    if to_come > free:
        raise RunError(f"teacher.cache {folder}: {'; '.join(lines)}; {LESS}")
    return "\n".join(f"{'cache' if not i else '':<10}{line}" for i, line in enumerate([str(folder), *lines]))


def _corpus_made_from(plan: Plan) -> dict[str, Any]:
    """What a cache of the corpus depends on, as far as a plan knows it."""
    stage, files = plan.config.pretraining, (plan.corpus or {}).get("sources", [])
    contents, data = json.dumps([each.get("sha256") or each for each in files]), plan.config.data
    of_conversations = {"conversations": {"loss_on": data.loss_on, "packing": data.packing}}
    return (of_conversations if plan.conversations is not None else {}) | {
        "tokenizer": tokenizer_fingerprint(plan.tokenizer),
        # A corpus may move; of a data set of the hub the tokens tell whether it is the same.
        "corpus": {"files": hashlib.sha256(contents.encode()).hexdigest()},
        "blocks": {"max_length": stage.max_length},
        "masking": _masking(plan.kind, stage.mlm_probability or 0.0, stage.num_maskings, plan.config.seeds[0]),
    }


# Raised whenever other tokens are drawn.
SCHEMES: dict[LMKind, int | str] = {
    "masked": masking.SCHEME,
    "encoder-decoder": f"spans {infilling.SCHEME}",
    "blank-infilling": f"blanks {blank_infilling.SCHEME}",
}


def _masking(kind: LMKind, probability: float, maskings: int | None, seed: int) -> dict[str, Any]:
    return {
        "mlm_probability": probability,
        "num_maskings": maskings or 1,
        "seed": seed if probability else None,
        "scheme": SCHEMES[kind] if probability else None,
    }


def _maskings(plan: Plan) -> int:
    return plan.config.pretraining.num_maskings or 1


def _cache(
    plan: Plan,
    folder: Path,
    parts: Sequence[tuple[TrainingData, int]],
    made_from: dict[str, Any],
    *,
    words: bool,
    num_classes: int | None = None,
    number: int = 0,
) -> TeacherCache:
    if plan.config.teacher.quantization:
        made_from = made_from | {"quantization": plan.config.teacher.quantization}
    return TeacherCache(
        folder,
        parts,
        width=head_width(plan, number) if words else None,
        num_classes=num_classes,
        dtype=plan.config.teacher.dtype,
        made_from=made_from,
    )


def _require_own(cache: TeacherCache, *, unknown: Sequence[str]) -> None:
    manifest = read_manifest(cache.folder)
    changed = differences(manifest["made_from"], cache.made_from, ignore=unknown) if manifest is not None else []
    if changed:
        raise RunError(stale(cache.folder, changed))


def _corpus_size(plan: Plan, sources: Sequence[str], number: int) -> tuple[str, float]:
    """In words, and in bytes: by the run's own tokens where they are there, else by a sample of the text."""
    length, maskings = plan.config.pretraining.max_length, _maskings(plan)
    assert length is not None, "checked by config"
    store = store_of(plan)
    tokens = store.num_tokens if store is not None else estimated_tokens(plan, sources)
    if tokens is None:
        return "of unknown length until it is read", 0.0
    frame = sum(map(len, block_frame(plan.tokenizer))) if plan.conversations is None else 0
    packing = conversation_packing(plan, store, length) if store is not None else None
    blocks = -(-tokens // (length - frame)) if packing is None else len(packing.ends)
    token_bytes = _cache(plan, cache_folder(plan.config), (), {}, words=True, number=number).token_bytes
    held_out = min(plan.config.data.eval_blocks, blocks // 5)
    texts = (blocks - held_out) * maskings + held_out
    kept = round((tokens + blocks * frame) * texts / blocks)
    corruption = corruption_for(plan.tokenizer, plan.kind, plan.config.pretraining.mlm_probability or 0.0, 0)
    if isinstance(corruption, Infilling):
        kept = texts * corruption.num_targets(length)
    size = kept * token_bytes + texts * 24
    about = "" if store is not None else "about "
    found = f"{about}{counted(kept, 'token')} of {token_bytes} bytes in {counted(maskings, 'masking')}"
    return f"{found}, {gigabytes(size)}", size


def store_of(plan: Plan) -> TokenStore | None:
    """The corpus as tokens, where an earlier start of this run has left it."""
    try:
        store = open_token_store(Path(plan.config.output_dir) / "corpus")
    except RunError:
        return None
    return store if store.manifest["fingerprint"]["corpus"] == plan.corpus else None


def conversation_packing(plan: Plan, store: TokenStore, length: int) -> Packing | None:
    """How the conversations of a corpus share blocks of a length; None for a corpus of texts."""
    return None if plan.conversations is None else packing_of(store, length, plan.config.data.packing)


def file_sizes(plan: Plan) -> list[int] | None:
    """Bytes of each file of the corpus. None where a source is of the hub, or compressed as Parquet is: such bytes say
    nothing of the tokens.
    """
    files = (plan.corpus or {}).get("sources", [])
    if not files or any("size" not in each or each["name"].lower().endswith(".parquet") for each in files):
        return None
    return [each["size"] for each in files]


class Sample(NamedTuple):
    """A corpus' first documents. lengths: tokens of each. size: bytes of their text. is_whole: there are no more."""

    lengths: np.ndarray
    size: int
    is_whole: bool


def read_sample(plan: Plan, sources: Sequence[str]) -> Sample:
    """As many documents as hold SAMPLE characters, in the teacher's tokens."""
    reader = plan.conversations or TextReader(plan.tokenizer, plan.config.data.text_field)
    documents: list[Any] = []
    characters = 0
    for each in reader.read(sources):
        documents.append(each)
        characters += len(each)
        if characters > SAMPLE:
            break
    if isinstance(reader, TextReader):  # with a separator after each
        lengths = [len(ids) + 1 for ids in encode_texts(plan.tokenizer, documents)]
        size = sum(len(text.encode()) for text in documents)
    else:
        lengths = [len(each.ids) for each in reader.encode(documents)]
        size = sum(each.num_bytes for each in documents)
    return Sample(np.array(lengths, dtype=np.int64), size, characters <= SAMPLE)


def estimated_tokens(plan: Plan, sources: Sequence[str]) -> int | None:
    """By the tokens a byte of its first megabytes; of jsonl too many, by what is not text. None: files do not tell."""
    sizes = file_sizes(plan)
    if sizes is None:
        return None
    sample = read_sample(plan, sources)
    tokens = int(sample.lengths.sum())
    return tokens if sample.is_whole else round(tokens / sample.size * sum(sizes))
