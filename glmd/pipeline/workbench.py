"""What every stage of a run does with its models and data: take batches, train, score, export.

    bench = Workbench(plan, run_folder, accelerator)
    result = bench.train(place, settings, seed, objective, bench.blocks(settings, seed), token_map, ...)

The pipeline says which stages there are and in which order; this is how one works.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from glmd.config import StageConfig
from glmd.data.batches import Collate
from glmd.data.blocks import BlockDataset, block_frame, block_texts
from glmd.data.masking import Masking, masking_for
from glmd.data.token_store import TokenStore
from glmd.distillation.cached_teacher import CachedOutputs, CachedTeacher
from glmd.distillation.distiller import Distiller
from glmd.distillation.objective import Objective
from glmd.distillation.teacher import Ensemble, OnlineTeacher, TeacherOutputs
from glmd.distillation.teacher_cache import LESS, STORED, TeacherCache, free_bytes, gigabytes
from glmd.errors import RunError, counted
from glmd.evaluation.bits_per_byte import score_text
from glmd.evaluation.metrics import score
from glmd.evaluation.scoring import answers_of, predict, score_lm
from glmd.models.card import PROBE, ModelCard
from glmd.models.export import check_exports, export_model
from glmd.models.heads import split_parameters
from glmd.models.loading import auto_class_name, load_language_model
from glmd.pipeline.elastic import require_shareable
from glmd.pipeline.run_folder import RunFolder, begun_with
from glmd.planning.caches import cache_folder, cached_stages_of, corpus_cache, held_out_blocks, task_cache, task_dataset
from glmd.planning.plan import Plan, TaskPlan
from glmd.planning.rules import kept_words
from glmd.runtime.processes import on_main, together
from glmd.storage import write_atomically
from glmd.tasks.cloze import candidate_ids
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.examples import TaskExample
from glmd.tasks.forms import class_logits
from glmd.training.fsdp import is_sharded
from glmd.training.log import RunLog
from glmd.training.trainer import Teacher, Trainer, TrainingResult
from glmd.version import __version__
from glmd.vocabulary.slicing import vocabulary_axes
from glmd.vocabulary.tokenizer import stock_tokenizer, tokenizer_fingerprint
from glmd.vocabulary.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arm:
    """One student: its vocabulary and where its stages lie. A control with another vocabulary is another arm."""

    name: str
    folder: Path
    vocabulary: Vocabulary
    tokenizer: Any


class Workbench:
    """The means of a run's stages, on every rank."""

    def __init__(self, plan: Plan, run_folder: RunFolder, accelerator: Accelerator) -> None:
        self.plan, self.config, self.run_folder, self.accelerator = plan, plan.config, run_folder, accelerator
        self.tokenizer = plan.tokenizer
        self.identity_map = np.arange(len(plan.tokenizer))
        # Pads are masked out; a decoder's tokenizer may have no id for them.
        self.collate = Collate(plan.tokenizer.pad_token_id or 0)
        self.log = RunLog(run_folder.path / "log.jsonl", accelerator)
        self.store: TokenStore | None = None
        self.teacher_hash = ""  # of the pretrained teacher's weights
        self.opened: dict[Path, CachedOutputs] = {}
        self.said: set[str] = set()  # what is said once
        # Batch sizes and accumulation speak of so many processes, and the last bits of sums depend on who shares what.
        self.is_sharded = is_sharded(accelerator)
        self.processes, self.sharding = accelerator.num_processes, "FSDP2" if self.is_sharded else None
        if self.config.elastic:
            begun = on_main(lambda: begun_with(run_folder.path))
            self.processes, self.sharding = begun or (self.processes, self.sharding)
        on_main(lambda: require_shareable(plan, self.processes, accelerator.num_processes))

    # Data

    def blocks(self, stage: StageConfig, seed: int, *, held_out: bool = False) -> BlockDataset:
        """The corpus in blocks of the stage's length; the last ones are held out."""
        assert self.store is not None and stage.max_length is not None, "checked by config and plan"
        length = stage.max_length
        frame = sum(map(len, block_frame(self.tokenizer)))
        total = self.store.num_blocks(length - frame)
        wanted = self.config.data.eval_blocks
        reserved = held_out_blocks(self.store.num_tokens, total, length, wanted)
        if held_out and reserved < wanted:
            held = "is" if reserved == 1 else "are"
            logger.info(
                "data.eval_blocks: %d of %s %s held out, a fifth of them", reserved, counted(total, "block"), held
            )
        blocks = range(total - reserved, total) if held_out else range(total - reserved)
        masking = masking_for(self.tokenizer, stage.mlm_probability or 0.0, seed, stage.num_maskings)
        return BlockDataset(self.store, self.tokenizer, max_length=length, blocks=blocks, masking=masking)

    def train_data(self, task: TaskPlan, examples: Sequence[TaskExample], stage: StageConfig, seed: int) -> TaskDataset:
        """Examples of a task to train on, masked where the stage says so."""
        length = stage.max_length or task.task.max_length
        masking = masking_for(self.tokenizer, stage.mlm_probability or 0.0, seed, stage.num_maskings)
        data = self._task_data(task, examples, length, masking)
        self._say_truncated(task.task.name, data, length)
        return data

    def _say_truncated(self, task: str, data: TaskDataset, length: int) -> None:
        """Once for the same inputs of a task: passes, seeds and controls read them again."""
        found = f"{task}: {data.truncated:,} of {counted(len(data), 'input')} truncated to {length} tokens"
        if data.truncated and found not in self.said:
            self.said.add(found)
            logger.info("%s", found)

    def val_data(self, task: TaskPlan, stage: StageConfig, tokenizer: Any = None) -> TaskDataset:
        """A task's validation inputs, as they are; in a student's own ids with a tokenizer that gives them."""
        return self._task_data(task, task.val, stage.max_length or task.task.max_length, None, tokenizer)

    def _task_data(
        self,
        task: TaskPlan,
        examples: Sequence[TaskExample],
        length: int,
        masking: Masking | None,
        tokenizer: Any = None,
    ) -> TaskDataset:
        data = task_dataset(self.plan, task.task.name, examples, length, tokenizer)
        data.masking = masking
        return data

    def warn_of_equal_candidates(self, task: TaskPlan, arm: Arm) -> None:
        """Say where candidates for a blank differ for the teacher and not for the student, whatever it learns."""
        if task.task.casting == "head" or not task.task.is_choice:
            return
        ids, equal = iter(candidate_ids(task.val, self.tokenizer)), 0
        for example in task.val:
            theirs = {tuple(next(ids)) for _ in example.choices}
            ours = {tuple(arm.vocabulary.token_map[list(each)]) for each in theirs}
            equal += len(ours) < len(theirs)
        if equal:
            found = "candidates that the teacher tells apart are equal in the student's vocabulary"
            remedy = "name their words in vocabulary.keep_words, or keep more"
            logger.warning("%s: in %d of %d val examples %s; %s", task.task.name, equal, len(task.val), found, remedy)

    # What a stage is made from

    def inputs(
        self,
        stage: StageConfig | None,
        seed: int,
        objective: Objective | None,
        *,
        start: Any,
        task: TaskPlan | None = None,
        arm: Arm | None = None,
        classifier: str | None = None,
        kept_in: str | None = None,
    ) -> dict[str, Any]:
        """Everything a stage's result depends on.

        classifier: the fine-tuned teacher of stages that learn from it. kept_in: the precision of a cached teacher.
        """
        how = {} if self.config.deterministic else {"deterministic": False}
        return how | {
            "stage": asdict(stage) if stage is not None else None,
            "seed": seed,
            "terms": [asdict(term) for term in objective.terms] if objective is not None else [],
            "intervention": asdict(objective.intervention) if objective and objective.intervention else None,
            "mixed_precision": self.config.mixed_precision,
            "selection": self.config.selection if task is not None else "last",
            "teacher": self.teacher_hash,
            "teacher_dtype": self.config.teacher.dtype,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "vocabulary": arm.vocabulary.fingerprint() if arm is not None else None,
            "teacher_mass": self.config.vocabulary.teacher_mass if arm is not None else None,
            "data": task.fingerprint() if task is not None else self.plan.corpus,
            "tokens": self.tokens() if task is None else None,
            "classifier": self.run_folder.fingerprint(classifier) if classifier is not None else None,
            "eval_blocks": self.config.data.eval_blocks if task is None else None,
            "teacher.cache": kept_in,
            "start": start,
            "processes": self.processes,
            "sharding": self.sharding,
        }

    def tokens(self) -> str | None:
        """sha256 of the corpus as tokenized: a data set of the hub may be another one when it is read again."""
        return self.store.manifest["sha256"] if self.store is not None else None

    # Models

    def teacher(
        self, language_model: Any, classifier: Any, arm: Arm | None, logits: Any = class_logits
    ) -> OnlineTeacher:
        """A live teacher for students with the arm's vocabulary; without an arm with its own."""
        for model in (language_model, classifier):
            if model is not None:
                model.to(self.accelerator.device)
        vocabulary = arm.vocabulary if arm is not None else Vocabulary.identity(len(self.tokenizer))
        merges = self.config.vocabulary.teacher_mass == "merge"
        return OnlineTeacher(language_model, classifier, vocabulary, merge_dropped=merges, task_logits=logits)

    def cached_teacher(self, outputs: CachedOutputs, language_model: Any, arm: Arm) -> CachedTeacher:
        """The same from disk. language_model: None where no words are compared."""
        merges, device = self.config.vocabulary.teacher_mass == "merge", self.accelerator.device
        return CachedTeacher(outputs, language_model, arm.vocabulary, merge_dropped=merges, device=device)

    def lm_teacher(self, language_model: Any, stage: StageConfig, seed: int, arm: Arm) -> Teacher:
        """The teacher on the corpus for students with the arm's vocabulary, from the cache where there is to be one."""
        if "pretraining" not in self.cached_stages:
            teacher = self.config.teacher
            configs = [replace(teacher, model=each, revision=None, ensemble=[]) for each in teacher.ensemble]
            others = [load_language_model(each) for each in configs]
            teachers = [self.teacher(each, None, arm) for each in (language_model, *others)]
            return Ensemble(teachers) if others else teachers[0]
        outputs = self.outputs(
            cache_folder(self.config),
            lambda: self.corpus_cache(stage, seed),
            lambda: self.teacher(language_model, None, None),
        )
        return self.cached_teacher(outputs, language_model, arm)

    # What teachers said, on disk

    @property
    def cached_stages(self) -> list[str]:
        """The stages that read from `teacher.cache`."""
        return cached_stages_of(self.plan)

    def corpus_cache(self, stage: StageConfig, seed: int) -> TeacherCache:
        """What `teacher.cache` is to hold of the corpus."""
        training, held_out = self.blocks(stage, seed), self.blocks(stage, seed, held_out=True)
        return corpus_cache(self.plan, training, held_out, teacher_hash=self.teacher_hash, tokens=self.tokens())

    def task_cache(self, name: str, task: str, seed: int, classifier: str | None) -> TeacherCache:
        """What it is to hold for a stage of a task. classifier: None before there is one, for sizes alone."""
        classifier_hash = self.run_folder.fingerprint(classifier) if classifier is not None else None
        hashes = {"teacher_hash": self.teacher_hash, "classifier_hash": classifier_hash}
        return task_cache(self.plan, name, task, seed, **hashes)

    def outputs(self, folder: Path, make: Callable[[], TeacherCache], load: Callable[[], Teacher]) -> CachedOutputs:
        """What is kept in a folder, whole: made where it is not, and compared with its sums once in a run.

        load: the live teacher; not called for nothing. Arms, seeds and grid points share what was opened.
        """
        if folder not in self.opened:
            cache = make()
            self.complete_cache(cache, load)
            self.opened[folder] = cache.open()
        return self.opened[folder]

    def complete_cache(self, cache: TeacherCache, load: Callable[[], Teacher]) -> None:
        """Make what is missing of a cache, whole shards shared out over the ranks."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes

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
            self._say_how_often_read(cache)
            together(lambda: self._write_shards(cache, wanted[rank::world_size], load))
            on_main(cache.finish)

    def refuse_stale(self, caches: Sequence[TeacherCache]) -> None:
        """Refuse caches of something else, and a disk too small for one, before anything is trained."""
        on_main(lambda: [cache.missing(whole=False) for cache in caches])

    def require_room(self, caches: Sequence[TeacherCache]) -> None:
        """Refuse a disk that cannot take all caches of the run, before the first is made."""
        needed = {str(cache.folder): cache.bytes_to_come for cache in caches}
        if sum(needed.values()) > free_bytes(cache_folder(self.config)):
            parts = ", ".join(f"{gigabytes(size)} for {folder}" for folder, size in needed.items() if size)
            free = gigabytes(free_bytes(cache_folder(self.config)))
            raise RunError(f"teacher.cache: {parts} are needed and {free} free; {LESS}")

    def kept_in(self, name: str) -> str | None:
        """The precision of what a stage reads from the cache; None where it asks the live teacher."""
        if name not in self.cached_stages:
            return None
        teacher, has_words = self.config.teacher, name in kept_words(self.cached_stages, self.plan.method)
        return str(STORED[teacher.dtype] if has_words else torch.float32).removeprefix("torch.")

    def _say_how_often_read(self, cache: TeacherCache) -> None:
        (data, maskings), stage = cache.parts[0], self.config.pretraining
        if not isinstance(data, BlockDataset):  # seeds and grid points share those of tasks
            return
        assert stage.max_steps is not None, "checked by config"
        epochs = stage.max_steps * stage.global_batch_size(self.processes) / len(data)
        if epochs <= maskings:
            found = f"{epochs:.2g} epochs of {maskings} maskings are less than what is asked of the teacher for it"
            logger.info("teacher.cache: %s; it pays with further students, or more steps", found)

    def _write_shards(self, cache: TeacherCache, numbers: Sequence[int], load: Callable[[], Teacher]) -> None:
        teacher, is_corpus = load() if numbers else _silent, isinstance(cache.parts[0][0], BlockDataset)
        stage = self.config.pretraining if is_corpus else self.config.task_soft_labels
        batch_size = stage.per_device_eval_batch_size
        for number in tqdm(numbers, desc="teacher.cache", unit="shard", disable=None):
            cache.write_shard(number, teacher, self.collate, batch_size=batch_size)

    def parameters(self, model: Any) -> dict[str, int]:
        return split_parameters(model, set(vocabulary_axes(model.config, type(model))))

    # Training and scores

    def train(
        self,
        place: Path,
        stage: StageConfig,
        seed: int,
        objective: Objective,
        data: BlockDataset | TaskDataset,
        token_map: np.ndarray,
        *,
        language_model: Any = None,
        classifier: Any = None,
        logits: Any = class_logits,
        teacher: Teacher | None = None,
        evaluate: Callable[[], float] | None = None,
    ) -> dict[str, Any]:
        """Train the given student in place, from the stage's newest checkpoint if there is one."""
        assert is_sharded(self.accelerator) == self.is_sharded, "Accelerate has lost its state"
        distiller = Distiller(
            objective, token_map, language_model=language_model, classifier=classifier, task_logits=logits
        )
        name = self.run_folder.name(place)
        workers = self.config.dataloader_num_workers
        stage = stage.spread(self.processes, self.accelerator.num_processes)
        trainer = Trainer(self.accelerator, place, name, stage, seed, self.log, workers, evaluate)
        result: TrainingResult = trainer.run(distiller, teacher or _silent, data, self.collate)
        self.accelerator.free_memory()
        return asdict(result)

    def score_lm(
        self, student: Any, teacher: Teacher, data: BlockDataset | TaskDataset, arm: Arm, stage: StageConfig
    ) -> dict[str, float]:
        """How near the student's word prediction is to the teacher's."""
        return score_lm(
            student.to(self.accelerator.device),
            teacher,
            data,
            self.collate,
            token_map=arm.vocabulary.token_map,
            accelerator=self.accelerator,
            batch_size=stage.per_device_eval_batch_size,
        )

    def score_text(self, model: Any, tokenizer: Any, data: BlockDataset) -> dict[str, float]:
        """Bits per byte of a causal LM on the text of held-out blocks, with the model's own tokenizer."""
        return score_text(
            model.to(self.accelerator.device),
            tokenizer,
            block_texts(data, self.tokenizer),
            max_length=len(data.start) + data.block_length + len(data.end),
            accelerator=self.accelerator,
        )

    def score_task(
        self,
        model: Any,
        task: TaskPlan,
        stage: StageConfig,
        arm: Arm | None,
        theirs: np.ndarray | None = None,
        *,
        stock: bool = False,
    ) -> dict[str, Any]:
        """Metrics on the validation split, if it has labels; with the teacher's answers also the share of equal ones.

        arm: whose vocabulary the model has; None for a teacher. stock: read text as without glmd.
        """
        answers = self.answers(model, task, stage, arm, stock=stock)
        result: dict[str, Any] = {"examples": len(answers)}
        if task.is_scored:
            result["metrics"] = score(task.task, answers, task.val)
        if theirs is not None:
            result["agreement"] = float((answers == theirs).mean())
        return result

    def answers(
        self, model: Any, task: TaskPlan, stage: StageConfig, arm: Arm | None, *, stock: bool = False
    ) -> np.ndarray:
        """(examples,) class ids, or positions of choices, on the validation split."""
        model.to(self.accelerator.device)
        data, collate = self.val_data(task, stage), self.collate
        token_map = arm.vocabulary.token_map if arm is not None else None
        if stock:
            assert arm is not None and not arm.vocabulary.is_identity, "else there is nothing to compare"
            tokenizer, token_map = stock_tokenizer(arm.tokenizer), None
            data, collate = self.val_data(task, stage, tokenizer), Collate(tokenizer.pad_token_id or 0)
        logits = predict(
            model,
            data,
            collate,
            token_map=token_map,
            accelerator=self.accelerator,
            batch_size=stage.per_device_eval_batch_size,
            name=f"{task.task.name}: the {'teacher' if arm is None else 'student'}",
        )
        return answers_of(task.task, logits)

    # Exports

    def export(
        self,
        model: Any,
        tokenizer: Any,
        folder: Path,
        *,
        title: str,
        summary: str,
        facts: dict[str, str],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Write a model folder with its card."""
        base = self.config.teacher.model
        sources = [Path(each).name if Path(each).exists() else each for each in self.config.data.corpus]
        known = {
            "teacher": "trained from scratch" if base is None else Path(base).name if Path(base).exists() else base,
            "method": self.config.method,
            "data": ", ".join(sources) or "a generated world of facts",
            "glmd": __version__,
        }
        card = ModelCard(
            title,
            base or "",
            f"Made by glmd from {summary}.",
            known | facts,
            metrics or {},
            exact_tokenizer=tokenizer is not self.tokenizer,
            auto_class=auto_class_name(model),
        )
        on_main(lambda: export_model(model, tokenizer, folder, card=card))

    def check_exports(self) -> None:
        """Prove every exported folder of the run in a fresh process, each once."""
        root = self.run_folder.path
        record = root / "exports_checked.json"
        try:
            proved = dict(json.loads(record.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # none yet, or damaged: then all are proved again
            proved = {}
        stamps = {}
        for place, files in self.run_folder.left.items():
            for probe in [place / name for name in files if Path(name).name == PROBE]:
                stamp = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
                stamps[probe.parent.relative_to(root).as_posix()] = stamp
        check_exports([root / name for name, stamp in sorted(stamps.items()) if proved.get(name) != stamp])
        write_atomically(record, json.dumps(proved | stamps, indent=1))


def _silent(_: Any) -> TeacherOutputs:
    """The teacher of stages that have none."""
    return TeacherOutputs()
