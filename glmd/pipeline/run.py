"""The stages of a run, in order: each is skipped when it is complete, and continued when it was interrupted.

    results = run("configs/runs/minilm-superglue.yaml", teacher="MODEL")

run folder: config.yaml, log.jsonl, corpus/, vocabulary/, teacher/, pretraining/, tasks/TASK/..., results.json
"""

import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from glmd.config import FLOAT16_HEADS, GROWING, RunConfig, TeacherConfig
from glmd.config_file import differences, load_config, to_dict
from glmd.data.blocks import BlockDataset
from glmd.data.corpus import corpus_fingerprint
from glmd.data.token_store import TokenStore, build_token_store, open_token_store
from glmd.distillation.objective import MASKED_LM
from glmd.errors import ConfigError, RunError
from glmd.losses.linear import allow_triton, triton_problem
from glmd.models.heads import is_causal
from glmd.models.loading import compared_embeddings, load_language_model
from glmd.models.student import build_student
from glmd.pipeline.run_folder import RunFolder, require_free_folder
from glmd.pipeline.task_stages import TaskStages
from glmd.pipeline.workbench import Arm, Workbench
from glmd.planning.caches import require_own_cache
from glmd.planning.limits import require_sizes_and_room
from glmd.planning.plan import Plan, corpus_sources, make_plan
from glmd.reporting.report import best_grid_points
from glmd.runtime.determinism import NO_EFFECT, NOT_PROMISED, cublas_workspace, same_bits
from glmd.runtime.processes import TRAINING_PATIENCE, gathered, is_main, number_of_ranks, on_main, together, wait
from glmd.storage import full_disk_refused, write_atomically
from glmd.tasks.examples import TaskExample
from glmd.tasks.tasks import BLANK
from glmd.training.fsdp import end_sharding, require_sound_launch, take_up_sharding
from glmd.training.trainer import Teacher
from glmd.version import __version__
from glmd.vocabulary.build import build_vocabulary
from glmd.vocabulary.renumbering import named_ids
from glmd.vocabulary.tokenizer import compress_tokenizer
from glmd.vocabulary.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


def run(
    config: RunConfig | str | Path | Mapping[str, Any] | None = None, *overrides: str, **changes: Any
) -> dict[str, Any]:
    """Run every stage that is not complete, and return the results (also in results.json).

        run("minilm-superglue", "pretraining.max_steps=100", teacher="MODEL", output_dir="runs/mine")

    config: what `load_config` returns, or takes: a file, the name of one in configs/runs, a mapping. overrides and
        changes: as `load_config` takes them.
    Raises GlmdError with one line for whatever cannot be done; SystemExit 143 or 130 after a signal.
    """
    if not isinstance(config, RunConfig) or overrides or changes:
        config = load_config(config, overrides, **changes)
    with _pipeline(config) as pipeline:
        return pipeline.run()


def make_cache(config: RunConfig) -> None:
    """Do what a run does up to its `teacher.cache`, and make that. Raises GlmdError, one line."""
    if config.teacher.cache is None:
        raise ConfigError("teacher.cache is missing; give teacher.cache=FOLDER")
    with _pipeline(config) as pipeline:
        pipeline.make_cache()


@contextmanager
def _pipeline(config: RunConfig) -> Iterator["Pipeline"]:
    """The checked pipeline of a run, in its folder, which is held as long."""
    folder = require_free_folder(config)
    with full_disk_refused(folder), cublas_workspace(config.deterministic), _accelerator(config) as accelerator:
        if config.mixed_precision == "fp16":
            logger.info("mixed_precision fp16: %s", FLOAT16_HEADS)
        if not config.deterministic:
            logger.info(NOT_PROMISED if accelerator.device.type == "cuda" else NO_EFFECT)
        _require_one_config(config)
        run_folder = RunFolder(folder)
        with run_folder.lock():
            synthetic = _build_synthetic(folder) if config.data.synthetic else None
            plan = together(lambda: make_plan(config, synthetic=synthetic, hash_corpus=False, try_out=is_main()))
            on_main(lambda: require_sizes_and_room(plan, synthetic, number_of_ranks()))
            sources = corpus_sources(config, synthetic)
            if sources:  # of which one process reads all
                plan = replace(plan, corpus=on_main(lambda: corpus_fingerprint(sources)))
            run_folder.record_config(config)
            if config.report_to:  # not before: a tracker's files would make the folder of a refused run a foreign one
                accelerator.init_trackers("glmd")
            yield Pipeline(plan, run_folder, accelerator, synthetic)


class Pipeline:
    """A checked plan on its way through the stages."""

    def __init__(self, plan: Plan, run_folder: RunFolder, accelerator: Accelerator, synthetic: Path | None) -> None:
        self.plan, self.config, self.run_folder, self.accelerator = plan, plan.config, run_folder, accelerator
        self.folder, self.synthetic = run_folder.path, synthetic
        self.bench = Workbench(plan, run_folder, accelerator)
        self.first_seed = self.config.seeds[0]
        self.rows: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """All stages, then the reload check of every exported folder, then results.json."""
        teacher = self._begin()
        arms = self._arms(teacher)
        # Before the long stage, so that a teacher that cannot serve or has learned nothing is seen in time.
        tasks = [TaskStages(self.bench, task, teacher, self.rows) for task in self.plan.tasks.values()]
        self._require_room(tasks, arms)
        for task in tasks:
            task.fine_tune_teacher()
            self.bench.refuse_stale(task.caches(task.classifier, arms))
        for arm in arms:
            self._pretrain(arm, teacher)
        for task, arm in itertools.product(tasks, arms):
            self.bench.warn_of_equal_candidates(task.task, arm)
            for seed, grid_point in itertools.product(self.config.seeds, self.config.grid_points):
                task.distil(arm, seed, grid_point)
        results = {"glmd": __version__, "parameters": self.plan.parameters, "rows": self.rows}
        results["of"] = {key: to_dict(self.config)[key] for key in GROWING}
        if self.config.sweep:
            results["best_grid_points"] = best_grid_points(results)
        # First the results: a week of training is not lost to a folder that does not load.
        self._write_results(results | {"exports_verified": False})
        on_main(self.bench.check_exports)
        return self._write_results(results | {"exports_verified": True})

    def _write_results(self, results: dict[str, Any]) -> dict[str, Any]:
        on_main(lambda: write_atomically(self.folder / "results.json", json.dumps(results, indent=1)))
        return results

    def make_cache(self) -> None:
        """The run up to what the teacher says of the corpus."""
        teacher = self._begin()
        stage, seed = self.config.pretraining, self.first_seed
        tasks = [TaskStages(self.bench, task, teacher, self.rows) for task in self.plan.tasks.values()]
        self._require_room(tasks, None)
        if "pretraining" in self.bench.cached_stages:
            self.bench.complete_cache(
                self.bench.corpus_cache(stage, seed),
                lambda: self.bench.teacher(load_language_model(teacher), None, None),
            )
        if set(self.bench.cached_stages) - {"pretraining"}:
            for task in tasks:
                task.fine_tune_teacher()
                task.make_caches()

    # Stages, in order

    def _begin(self) -> TeacherConfig:
        """The corpus as ids, and the teacher. Refuses what is known only now."""
        if self._reads_corpus_cache():
            model, revision = self.config.teacher.model, self.config.teacher.revision
            teacher_hash = self.run_folder.fingerprint(model, revision) if model is not None else None
            on_main(lambda: require_own_cache(self.plan, teacher_hash))
        self.bench.store = self._token_store()
        if "pretraining" in self.plan.method:
            self.bench.blocks(self.config.pretraining, self.first_seed)  # refuses a corpus that is too short for it
        teacher = self._teacher()
        self.bench.teacher_hash = self.run_folder.fingerprint(str(teacher.model), teacher.revision)
        if self._reads_corpus_cache():
            self.bench.refuse_stale([self.bench.corpus_cache(self.config.pretraining, self.first_seed)])
        return teacher

    def _reads_corpus_cache(self) -> bool:
        is_complete = self.run_folder.is_complete(self.folder / "pretraining")
        return "pretraining" in self.bench.cached_stages and not is_complete

    def _require_room(self, tasks: list[TaskStages], arms: list[Arm] | None) -> None:
        """Refuse a disk that cannot take the caches of corpus and tasks together."""
        caches = [cache for task in tasks for cache in task.caches(None, arms)]
        if caches and self._reads_corpus_cache():
            caches.append(self.bench.corpus_cache(self.config.pretraining, self.first_seed))
        on_main(lambda: self.bench.require_room(caches) if caches else None)

    def _token_store(self) -> TokenStore | None:
        sources = corpus_sources(self.config, self.synthetic)
        if not sources:
            return None
        place = self.folder / "corpus"
        teacher = self.config.teacher
        if teacher.model is not None and not (place / "manifest.json").is_file():
            # A teacher that cannot serve is refused before hours of reading text.
            on_main(lambda: load_language_model(teacher) and None)
        tokenizer, field, known = self.plan.tokenizer, self.config.data.text_field, self.plan.corpus
        on_main(lambda: build_token_store(place, sources, tokenizer, text_field=field, fingerprint=known).manifest)
        return together(lambda: open_token_store(place))

    def _teacher(self) -> TeacherConfig:
        """The teacher as named, or one trained on the corpus with plain masked-word prediction."""
        teacher = self.config.teacher
        if teacher.pretraining is None:
            return teacher
        place, seed = self.folder / "teacher", self.first_seed
        stage = replace(teacher.pretraining, mlm_probability=teacher.pretraining.mlm_probability or 0.15)

        def work() -> dict[str, Any]:
            from transformers import BertForMaskedLM

            torch.manual_seed(seed)
            model = BertForMaskedLM(self.plan.teacher_config)
            data = self.bench.blocks(stage, seed)
            training = self.bench.train(
                place, stage, seed, MASKED_LM, data, self.bench.identity_map, language_model=model
            )
            self.bench.export(
                model,
                self.plan.tokenizer,
                place / "model",
                title="Teacher trained from scratch",
                summary="masked words of the corpus",
                facts={"seed": str(seed)},
            )
            return {"training": training}

        inputs = self.bench.inputs(stage, seed, MASKED_LM, start=teacher.scratch)
        result = self.run_folder.stage(place, inputs, work)
        self.rows.append({"system": "teacher", "stage": "pretraining", "task": None, "seed": seed, **result})
        return replace(teacher, model=str(place / "model"), scratch=None, pretraining=None)

    def _arms(self, teacher: TeacherConfig) -> list[Arm]:
        """The student with its vocabulary and, as a control, the one with the teacher's."""
        place, settings = self.folder / "vocabulary", self.config.vocabulary
        source = self.plan.tokenizer

        def build() -> None:
            model = load_language_model(replace(teacher, dtype="float32"))
            embeddings = compared_embeddings(model, settings.similarity)
            ids = named_ids(model.config, getattr(model, "generation_config", None))
            build_vocabulary(source, embeddings, self._counts(), keep_ids=ids, **settings.choice).save(place)

        def work() -> dict[str, Any]:
            on_main(build)
            return {}

        tasks = {name: task.fingerprint() for name, task in self.plan.tasks.items()}
        inputs = {
            "vocabulary": asdict(replace(settings, teacher_mass="renormalize")),  # of which it does not depend
            "teacher": self.bench.teacher_hash,
            "corpus": self.plan.corpus,
            "tokens": self.bench.tokens(),
            "tasks": tasks,
        }
        self.run_folder.stage(place, inputs, work)
        vocabulary = Vocabulary.load(place)
        arms = [Arm("student", self.folder, vocabulary, compress_tokenizer(source, vocabulary))]
        if self.config.controls.full_vocabulary:
            identity = Vocabulary.identity(len(source))
            arms.append(Arm("full vocabulary", self.folder / "controls" / "full_vocabulary", identity, source))
        return arms

    def _counts(self) -> np.ndarray:
        """(V,) how often each source token stands in the corpus and in the tasks' training inputs.

        Validation inputs are not counted: that would fit the vocabulary to the test.
        """
        tokenizer, store = self.plan.tokenizer, self.bench.store
        size = len(tokenizer)
        counts = (
            store.counts(size, weights=self.config.vocabulary.corpus_weights)
            if store is not None
            else np.zeros(size, dtype=np.int64)
        )
        for task in self.plan.tasks.values():
            # Each text once: a passage stands in many rows.
            texts = [*dict.fromkeys(text for e in [*task.train, *task.inputs] for text in _words_of(e))]
            for first in range(0, len(texts), 1000):
                for ids in tokenizer(texts[first : first + 1000], add_special_tokens=False, verbose=False)["input_ids"]:
                    counts += np.bincount(ids, minlength=size) if ids else 0
        return counts

    def _pretrain(self, arm: Arm, teacher: TeacherConfig) -> None:
        """Student start, then word-prediction distillation on the corpus where the method has it."""
        place, stage, seed = arm.folder / "pretraining", self.config.pretraining, self.first_seed
        objective = self.plan.method.get("pretraining")

        def work() -> dict[str, Any]:
            # Read in float32 whatever the teacher will run in, so that copied weights are not rounded.
            source = load_language_model(replace(teacher, dtype="float32"))
            student = build_student(source, arm.vocabulary, self.config.student, seed=seed)
            if teacher.dtype != "float32":
                # Read anew: a cast would also round what from_pretrained keeps, the frequencies of rotary positions.
                source = load_language_model(teacher)
            result: dict[str, Any] = {"parameters": self.bench.parameters(student)}
            if objective is not None:
                words = self.bench.lm_teacher(source, stage, seed, arm)
                held_out, theirs = self.bench.blocks(stage, seed, held_out=True), {}
                if is_causal(self.plan.teacher_config):
                    bits = self.bench.score_text(source, self.plan.tokenizer, held_out)["bits_per_byte"]
                    theirs = {"teacher_bits_per_byte": bits}
                del source  # of a cached teacher only the head is kept
                result["lm_scores_before"] = self._score_words(student, words, held_out, arm)
                data, token_map = self.bench.blocks(stage, seed), arm.vocabulary.token_map
                result["training"] = self.bench.train(
                    place, stage, seed, objective, data, token_map, language_model=student, teacher=words
                )
                result["lm_scores"] = self._score_words(student, words, held_out, arm) | theirs
            self.bench.export(
                student,
                arm.tokenizer,
                place / "student",
                title="Student",
                summary="the teacher's word prediction on the corpus",
                facts={"seed": str(seed)},
                metrics=result.get("lm_scores"),
            )
            return result

        start = asdict(self.config.student)
        inputs = self.bench.inputs(
            stage if objective else None,
            seed,
            objective,
            start=start,
            arm=arm,
            kept_in=self.bench.kept_in("pretraining"),
        )
        inputs["ensemble"] = [self.run_folder.fingerprint(each) for each in teacher.ensemble] or None
        result = self.run_folder.stage(place, inputs, work)
        self.rows.append({"system": arm.name, "stage": "pretraining", "task": None, "seed": seed, **result})

    def _score_words(self, student: Any, teacher: Teacher, held_out: BlockDataset, arm: Arm) -> dict[str, float]:
        """Nearness to the teacher's words, and of a decoder also bits per byte."""
        scores = self.bench.score_lm(student, teacher, held_out, arm, self.config.pretraining)
        if is_causal(self.plan.teacher_config):
            scores |= self.bench.score_text(student, arm.tokenizer, held_out)
        return scores


def _words_of(example: TaskExample) -> Iterator[str]:
    """All texts of an example, the candidates that fill a blank among them."""
    for text in (text for pair in example.texts for text in pair if text):
        yield text.replace(BLANK, " ")
    yield from example.choices


@contextmanager
def _accelerator(config: RunConfig) -> Iterator[Accelerator]:
    """Accelerate's state for this run. Refuses N launched processes that did not become N ranks."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        # Its launcher for one process is given a port only where more were asked for.
        raise RunError(
            "accelerate launch was asked for several processes and started one, as it does with --cpu; "
            "launch as in docs/multi-gpu.md"
        )
    require_sound_launch(os.environ, config.mixed_precision)
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=config.mixed_precision,
            log_with=list(config.report_to) or None,
            project_dir=config.output_dir,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TRAINING_PATIENCE)],
        )
    except ValueError as error:  # ranks that cannot meet, or a precision or tracker that this machine has not
        _require_ranks(launched, 1 if "MASTER_ADDR" in str(error) else launched)
        raise ConfigError(f"mixed_precision {config.mixed_precision}, report_to {config.report_to}: {error}") from None
    _require_ranks(launched, accelerator.num_processes)
    wait()
    _agree_on_kernels(accelerator.device)
    take_up_sharding(accelerator, os.environ)
    try:
        with same_bits(accelerator.device, config.deterministic):
            yield accelerator
    finally:
        accelerator.end_training()
        end_sharding(accelerator)
        AcceleratorState._reset_state()  # else the next run of this process could have no other mixed_precision


def _require_one_config(config: RunConfig) -> None:
    """Refuse ranks that were launched with different configs, which would wait for one another."""
    first, *others = gathered(to_dict(config))
    for rank, theirs in enumerate(others, start=1):
        changed = differences(first, theirs)
        if changed:
            raise RunError(
                f"rank {rank} was given another config than rank 0 ({'; '.join(changed)}); give all the same"
            )


def _agree_on_kernels(device: torch.device) -> None:
    """Run the loss in one way on all ranks: one that has only the slow one would have the others wait."""
    allow_triton(True)
    if device.type != "cuda" or number_of_ranks() == 1:
        return
    mine = [triton_problem(device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for rank, problems in enumerate(gathered(mine)):
        for problem in filter(None, problems):
            allow_triton(False)
            logger.warning("Triton does not work on rank %d (%s): the loss runs in plain torch on all", rank, problem)


def _require_ranks(launched: int, ranks: int) -> None:
    if ranks != launched:
        found = f"{launched} processes were launched, but they are {ranks} ranks"
        raise RunError(f"{found}; launch as in docs/multi-gpu.md") from None


def _build_synthetic(folder: Path) -> Path:
    from glmd.data.synthetic import build_synthetic

    place = folder / "synthetic"

    def build() -> None:
        for leftover in folder.glob(".synthetic-*"):  # of a start that was killed; the folder is locked for this one
            shutil.rmtree(leftover)
        build_synthetic(place)

    on_main(build)
    return place
