"""What every stage of a run does with its models and data: take batches, train, score, export.

    bench = Workbench(plan, run_folder, accelerator)
    result = bench.train(place, settings, seed, objective, bench.blocks(settings, seed), token_map, ...)

The pipeline says which stages there are and in which order; this is how one works.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from glmd import __version__
from glmd.bits_per_byte import score_text
from glmd.cache import STORED, CachedTeacher, TeacherCache
from glmd.checkpoint import write_atomically
from glmd.config import StageConfig, TeacherConfig
from glmd.data.batches import BlockDataset, Collate, Corruption, TaskDataset, block_texts, corruption_for
from glmd.data.blanks import block_frame, candidate_ids, verbaliser_ids
from glmd.data.corpus import TokenStore
from glmd.data.tasks import TaskExample
from glmd.distiller import Distiller
from glmd.errors import DataError, GlmdError
from glmd.evaluation import answers_of, predict, score_words
from glmd.export import PROBE, ModelCard, check_exports, export_model
from glmd.heads import is_causal
from glmd.loading import load_classifier, load_language_model
from glmd.metrics import score
from glmd.objective import Objective
from glmd.places import require_shareable
from glmd.plan import Plan, TaskPlan, split_parameters, word_width
from glmd.run_folder import RunFolder, begun_with
from glmd.runlog import RunLog
from glmd.sharding import is_sharded
from glmd.slicing import vocabulary_axes
from glmd.teacher import OnlineTeacher, TeacherOutputs
from glmd.tokenizer import ordinary_tokenizer, tokenizer_fingerprint
from glmd.trainer import Teacher, Trainer, TrainingResult
from glmd.vocabulary import Vocabulary

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
        # Batch sizes and accumulation speak of so many processes, and the last bits of sums depend on who shares what.
        self.is_sharded = is_sharded(accelerator)
        self.processes, self.sharding = accelerator.num_processes, "FSDP2" if self.is_sharded else None
        if self.config.elastic:
            begun = run_folder.on_main(lambda: begun_with(run_folder.path))
            self.processes, self.sharding = begun or (self.processes, self.sharding)
            run_folder.on_main(lambda: require_shareable(plan, self.processes, accelerator.num_processes))

    # Data

    def blocks(self, stage: StageConfig, seed: int, *, held_out: bool = False) -> BlockDataset:
        """The corpus in blocks of the stage's length; the last ones are held out."""
        assert self.store is not None and stage.max_length is not None, "checked by config and plan"
        length = stage.max_length
        frame = sum(map(len, block_frame(self.tokenizer)))
        total = self.store.num_blocks(length - frame)
        wanted = self.config.data.eval_blocks
        reserved = min(wanted, total // 5)
        if reserved < 1:
            found = f"{self.store.num_tokens} tokens are {total} blocks of {length}"
            raise DataError(f"data.corpus: {found}; at least 5 are needed: give more text, or a smaller max_length")
        if held_out and reserved < wanted:
            logger.info("data.eval_blocks: %d of %d blocks are held out, a fifth of the corpus", reserved, total)
        blocks = range(total - reserved, total) if held_out else range(total - reserved)
        corruption = corruption_for(self.tokenizer, stage.mlm_probability or 0.0, seed, stage.num_maskings)
        return BlockDataset(self.store, self.tokenizer, max_length=length, blocks=blocks, corruption=corruption)

    def train_data(self, task: TaskPlan, examples: Sequence[TaskExample], stage: StageConfig, seed: int) -> TaskDataset:
        """Examples of a task to train on, corrupted where the stage says so."""
        length = stage.max_length or task.task.max_length
        corruption = corruption_for(self.tokenizer, stage.mlm_probability or 0.0, seed, stage.num_maskings)
        data = self._task_data(task, examples, length, corruption)
        if data.truncated:
            logger.info("%s: %d of %d inputs are cut to %d tokens", task.task.name, data.truncated, len(data), length)
        return data

    def val_data(self, task: TaskPlan, stage: StageConfig, tokenizer: Any = None) -> TaskDataset:
        """A task's validation inputs, as they are; in a student's own ids with a tokenizer that gives them."""
        return self._task_data(task, task.val, stage.max_length or task.task.max_length, None, tokenizer)

    def _task_data(
        self,
        task: TaskPlan,
        examples: Sequence[TaskExample],
        length: int,
        corruption: Corruption | None,
        tokenizer: Any = None,
    ) -> TaskDataset:
        return TaskDataset(
            examples,
            tokenizer or self.tokenizer,
            max_length=length,
            corruption=corruption,
            verbalisers=task.verbalisers if tokenizer is None else verbaliser_ids(task.task, tokenizer),
            mean_over_tokens=task.task.mean_over_tokens,
            is_causal=is_causal(self.plan.teacher_config),
        )

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
    ) -> dict[str, Any]:
        """Everything a stage's result depends on. classifier: the fine-tuned teacher of stages that learn from it."""
        return {
            "stage": asdict(stage) if stage is not None else None,
            "seed": seed,
            "terms": [asdict(term) for term in objective.terms] if objective is not None else [],
            "gkd_compat": self.config.gkd_compat,
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
            "teacher.cache": self._kept_in() if objective is not None and task is None and arm is not None else None,
            "start": start,
            "processes": self.processes,
            "sharding": self.sharding,
        }

    def tokens(self) -> str | None:
        """sha256 of the corpus as tokenized: a data set of the hub may be another one when it is read again."""
        return self.store.manifest["sha256"] if self.store is not None else None

    # Models

    def task_teacher(
        self, teacher: TeacherConfig, classifier: str, task: TaskPlan, arm: Arm, *, words: bool
    ) -> OnlineTeacher:
        """The fine-tuned teacher; for words, with its LM head, as pretrained where the task has a head of its own."""
        model = load_classifier(classifier, task.task, dtype=getattr(torch, teacher.dtype))
        model.to(self.accelerator.device)
        language_model = None
        if words:  # in a blank the fine-tuned model has predicted words itself
            language_model = model if task.task.casting == "cloze" else load_language_model(teacher)
            language_model.to(self.accelerator.device)
        return self.teacher(language_model, model, arm)

    def teacher(self, language_model: Any, classifier: Any, arm: Arm) -> OnlineTeacher:
        """A live teacher for students with the arm's vocabulary."""
        merges = self.config.vocabulary.teacher_mass == "merge"
        return OnlineTeacher(language_model, classifier, arm.vocabulary, merge_dropped=merges)

    def cache(self, stage: StageConfig, seed: int) -> TeacherCache:
        """What `teacher.cache` is to hold: the corpus in every masking that training sees, and the held-out blocks."""
        assert self.store is not None and self.config.teacher.cache is not None, "asked for by the config"
        training, held_out = self.blocks(stage, seed), self.blocks(stage, seed, held_out=True)
        maskings = stage.num_maskings or 1
        return TeacherCache(
            Path(self.config.teacher.cache),
            ((training, maskings), (held_out, 1)),
            width=word_width(self.plan),
            dtype=self.config.teacher.dtype,
            made_from={
                "teacher": self.teacher_hash,
                "tokenizer": tokenizer_fingerprint(self.tokenizer),
                "corpus": self.tokens(),
                "blocks": {"training": len(training), "held_out": len(held_out), "max_length": stage.max_length},
                "masking": {
                    "mlm_probability": stage.mlm_probability or 0.0,
                    "num_maskings": maskings,
                    "seed": seed if stage.mlm_probability else None,
                },
            },
        )

    def complete_cache(self, cache: TeacherCache, load: Callable[[], Any]) -> None:
        """Make what is missing of a cache, shared out over the ranks. load: the teacher; not called for nothing."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        with cache.lock() if self.accelerator.is_main_process else nullcontext():
            # Half a cache has shards of the size that it was begun with.
            missing, cache.rows_per_shard = self.run_folder.on_main(lambda: (cache.missing(), cache.rows_per_shard))
            if not missing:
                return
            self.run_folder.on_main(cache.begin)
            self._say_how_often_read(cache)
            problems: list[GlmdError | None] = [None]
            try:
                self._write_shards(cache, missing[rank::world_size], load)
            except GlmdError as error:  # of one rank, that the others would wait for
                problems = [error]
            for problem in gather_object(problems):
                if problem is not None:
                    raise problem
            self.run_folder.on_main(cache.finish)

    def _say_how_often_read(self, cache: TeacherCache) -> None:
        (training, maskings), stage = cache.parts[0], self.config.pretraining
        assert stage.max_steps is not None, "checked by config"
        epochs = stage.max_steps * stage.global_batch_size(self.processes) / len(training)
        if epochs <= maskings:
            found = f"{epochs:.2g} epochs of {maskings} maskings are less than what is asked of the teacher for it"
            logger.info("teacher.cache: %s; it pays with further students, or more steps", found)

    def _write_shards(self, cache: TeacherCache, numbers: Sequence[int], load: Callable[[], Any]) -> None:
        model = load().to(self.accelerator.device)
        batch_size = self.config.pretraining.per_device_eval_batch_size
        for number in tqdm(numbers, desc="teacher.cache", unit="shard", disable=None):
            cache.write_shard(number, model, self.collate, batch_size=batch_size)

    def word_teacher(self, language_model: Any, stage: StageConfig, seed: int, arm: Arm) -> Teacher:
        """The teacher on the corpus for students with the arm's vocabulary, from the cache where there is to be one."""
        if self.config.teacher.cache is None:
            return self.teacher(language_model.to(self.accelerator.device), None, arm)
        cache, merges = self.cache(stage, seed), self.config.vocabulary.teacher_mass == "merge"
        self.complete_cache(cache, lambda: language_model)
        return CachedTeacher(
            cache.open(), language_model, arm.vocabulary, merge_dropped=merges, device=self.accelerator.device
        )

    def _kept_in(self) -> str | None:
        """The precision of hidden states that come from a cache."""
        teacher = self.config.teacher
        return str(STORED[teacher.dtype]).removeprefix("torch.") if teacher.cache is not None else None

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
        teacher: Teacher | None = None,
        evaluate: Callable[[], float] | None = None,
    ) -> dict[str, Any]:
        """Train the given student in place, from the stage's newest checkpoint if there is one."""
        assert is_sharded(self.accelerator) == self.is_sharded, "Accelerate has lost its state"
        distiller = Distiller(objective, token_map, language_model=language_model, classifier=classifier)
        name = self.run_folder.name(place)
        workers = self.config.dataloader_num_workers
        stage = stage.spread(self.processes, self.accelerator.num_processes)
        trainer = Trainer(self.accelerator, place, name, stage, seed, self.log, workers, evaluate)
        result: TrainingResult = trainer.run(distiller, teacher or _silent, data, self.collate)
        self.accelerator.free_memory()
        return asdict(result)

    def score_words(
        self, student: Any, teacher: Teacher, data: BlockDataset | TaskDataset, arm: Arm
    ) -> dict[str, float]:
        """How near the student's word prediction is to the teacher's."""
        return score_words(
            student.to(self.accelerator.device),
            teacher,
            data,
            self.collate,
            token_map=arm.vocabulary.token_map,
            accelerator=self.accelerator,
            batch_size=self.config.pretraining.per_device_eval_batch_size,
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
        ordinary: bool = False,
    ) -> dict[str, Any]:
        """Metrics on the validation split, if it has labels; with the teacher's answers also the share of equal ones.

        arm: whose vocabulary the model has; None for a teacher. ordinary: read text as without glmd.
        """
        answers = self.answers(model, task, stage, arm, ordinary=ordinary)
        result: dict[str, Any] = {"examples": len(answers)}
        if task.is_scored:
            result["metrics"] = score(task.task, answers, task.val)
        if theirs is not None:
            result["agreement"] = float((answers == theirs).mean())
        return result

    def answers(
        self, model: Any, task: TaskPlan, stage: StageConfig, arm: Arm | None, *, ordinary: bool = False
    ) -> np.ndarray:
        """(examples,) class ids, or positions of choices, on the validation split."""
        model.to(self.accelerator.device)
        data, collate = self.val_data(task, stage), self.collate
        token_map = arm.vocabulary.token_map if arm is not None else None
        if ordinary:
            assert arm is not None and not arm.vocabulary.is_identity, "else there is nothing to compare"
            tokenizer, token_map = ordinary_tokenizer(arm.tokenizer), None
            data, collate = self.val_data(task, stage, tokenizer), Collate(tokenizer.pad_token_id or 0)
        logits = predict(
            model,
            data,
            collate,
            token_map=token_map,
            accelerator=self.accelerator,
            batch_size=stage.per_device_eval_batch_size,
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
        name = type(model).__name__.replace("LMHeadModel", "ForCausalLM")
        heads = ("SequenceClassification", "MultipleChoice", "MaskedLM", "CausalLM")
        card = ModelCard(
            title,
            base or "",
            f"Made by glmd from {summary}.",
            known | facts,
            metrics or {},
            exact_tokenizer=tokenizer is not self.tokenizer,
            auto_class="AutoModelFor" + next(head for head in heads if head in name),
        )
        if self.accelerator.is_main_process:
            export_model(model, tokenizer, folder, card=card)
        self.accelerator.wait_for_everyone()

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


def control_budget(labels: StageConfig, words: StageConfig | None, num_examples: int, world_size: int) -> StageConfig:
    """The label stage with as many updates as both passes take on `num_examples`."""
    steps = sum(stage.steps(num_examples, world_size) for stage in (labels, words) if stage is not None)
    return replace(labels, max_steps=steps, num_train_epochs=None)


def _silent(_: Any) -> TeacherOutputs:
    """The teacher of stages that have none."""
    return TeacherOutputs()
