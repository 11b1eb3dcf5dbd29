"""The stages of a run, in order: each is skipped when it is complete, and continued when it was interrupted.

    results = run(load_config("configs/runs/minilm-superglue.yaml", ["teacher=PATH"]))

run folder: config.yaml, log.jsonl, corpus/, vocabulary/, teacher/, pretraining/, tasks/TASK/..., results.json
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from glmd import __version__
from glmd.checkpoint import write_atomically
from glmd.config import RunConfig, StageConfig, TeacherConfig
from glmd.data.corpus import TokenStore, build_token_store, open_token_store
from glmd.data.tasks import BLANK, TaskExample
from glmd.errors import ConfigError, RunError
from glmd.loading import load_classifier, load_language_model
from glmd.metrics import score
from glmd.objective import WORD_SIGNALS, Objective, Term
from glmd.plan import Plan, TaskPlan, make_plan
from glmd.run_folder import RunFolder, require_free_folder
from glmd.student import build_student
from glmd.teacher import OnlineTeacher
from glmd.tokenizer import compress_tokenizer, tokenizer_fingerprint
from glmd.vocabulary import Vocabulary, build_vocabulary
from glmd.workbench import Arm, Workbench, control_budget

HARD_LABELS = Objective((Term("task_labels", "hard_cross_entropy"),))
MASKED_WORDS = Objective((Term("word_labels", "hard_cross_entropy", tokens="masked"),))
# How long ranks wait for one another: the main one tokenizes a corpus alone, for hours; torch would wait 10 minutes.
PATIENCE = timedelta(days=2)


def run(config: RunConfig) -> dict[str, Any]:
    """Run every stage of `config` that is not complete, and return the results (also in results.json).

    Raises GlmdError with one line for whatever cannot be done; SystemExit 143 or 130 after a signal.
    """
    folder = require_free_folder(config)
    with _accelerator(config) as accelerator:
        run_folder = RunFolder(folder, accelerator)
        with run_folder.lock():
            world = _build_world(folder, accelerator) if config.data.world else None
            plan = make_plan(config, world=world)
            run_folder.record_config(config)
            if config.report_to:  # not before: a tracker's files would make the folder of a refused run a foreign one
                accelerator.init_trackers("glmd")
            return Pipeline(plan, run_folder, accelerator, world).run()


class Pipeline:
    """A checked plan on its way through the stages."""

    def __init__(self, plan: Plan, run_folder: RunFolder, accelerator: Accelerator, world: Path | None) -> None:
        self.plan, self.config, self.run_folder, self.accelerator = plan, plan.config, run_folder, accelerator
        self.folder, self.world = run_folder.path, world
        self.bench = Workbench(plan, run_folder, accelerator)
        self.first_seed = self.config.seeds[0]
        self.teacher_hash = ""
        self.rows: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """All stages, then the reload check of every exported folder, then results.json."""
        self.bench.store = self._token_store()
        if "pretraining" in self.plan.method:
            self.bench.blocks(self.config.pretraining, self.first_seed)  # refuses a corpus that is too short for it
        teacher = self._teacher()
        self.teacher_hash = self.run_folder.fingerprint(str(teacher.model), teacher.revision)
        arms = self._arms(teacher)
        # Before the long stage, so that a teacher that cannot serve or has learnt nothing is seen in time.
        classifiers = {name: self._fine_tune_teacher(task, teacher) for name, task in self.plan.tasks.items()}
        for arm in arms:
            self._pretrain(arm, teacher)
        for name, task in self.plan.tasks.items():
            for seed in self.config.seeds:
                for arm in arms:
                    self._distil_task(arm, task, seed, teacher, classifiers[name])
        results = {"glmd": __version__, "parameters": self.plan.parameters, "rows": self.rows}
        if self.accelerator.is_main_process:
            self.bench.check_exports()
            write_atomically(self.folder / "results.json", json.dumps(results, indent=1))
        self.accelerator.wait_for_everyone()
        return results

    # Stages, in order

    def _token_store(self) -> TokenStore | None:
        sources = [str(self.world / "corpus.txt")] if self.world else self.config.data.corpus
        if not sources:
            return None
        place = self.folder / "corpus"
        if self.accelerator.is_main_process:
            build_token_store(place, sources, self.plan.tokenizer, text_field=self.config.data.text_field)
        self.accelerator.wait_for_everyone()
        return open_token_store(place)

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
                place, stage, seed, MASKED_WORDS, data, self.bench.identity_map, language_model=model
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

        result = self.run_folder.stage(place, self._inputs(stage, seed, MASKED_WORDS, start=teacher.scratch), work)
        self.rows.append({"system": "teacher", "stage": "pretraining", "task": None, "seed": seed, **result})
        return replace(teacher, model=str(place / "model"), scratch=None, pretraining=None)

    def _arms(self, teacher: TeacherConfig) -> list[Arm]:
        """The student with its vocabulary and, as a control, the one with the teacher's."""
        place, settings = self.folder / "vocabulary", self.config.vocabulary
        source = self.plan.tokenizer

        def work() -> dict[str, Any]:
            if self.accelerator.is_main_process:
                embeddings = (
                    load_language_model(replace(teacher, dtype="float32")).get_input_embeddings().weight.detach()
                )
                build_vocabulary(source, embeddings, self._counts(), **asdict(settings)).save(place)
            self.accelerator.wait_for_everyone()
            return {}

        tasks = {name: task.fingerprint() for name, task in self.plan.tasks.items()}
        inputs = {
            "vocabulary": asdict(settings),
            "teacher": self.teacher_hash,
            "corpus": self.plan.corpus,
            "tokens": self._tokens(),
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
        counts = store.counts(size) if store is not None else np.zeros(size, dtype=np.int64)
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
            source.to(getattr(torch, teacher.dtype))
            result: dict[str, Any] = {"parameters": self.bench.parameters(student)}
            if objective is not None:
                live = OnlineTeacher(source.to(self.accelerator.device), None, arm.vocabulary.kept_ids)
                held_out = self.bench.blocks(stage, seed, held_out=True)
                result["words_before"] = self.bench.score_words(student, live, held_out, arm)
                data, token_map = self.bench.blocks(stage, seed), arm.vocabulary.token_map
                result["training"] = self.bench.train(
                    place, stage, seed, objective, data, token_map, language_model=student, teacher=live
                )
                result["words"] = self.bench.score_words(student, live, held_out, arm)
            self.bench.export(
                student,
                arm.tokenizer,
                place / "student",
                title="Student",
                summary="the teacher's word prediction on the corpus",
                facts={"seed": str(seed)},
                metrics=result.get("words"),
            )
            return result

        start = asdict(self.config.student)
        inputs = self._inputs(stage if objective else None, seed, objective, start=start, arm=arm)
        result = self.run_folder.stage(place, inputs, work)
        self.rows.append({"system": arm.name, "stage": "pretraining", "task": None, "seed": seed, **result})

    def _fine_tune_teacher(self, task: TaskPlan, teacher: TeacherConfig) -> str:
        """The teacher as a classifier: as named, or fine-tuned here on the task's labels. Returns its folder."""
        name, seed = task.task.name, self.first_seed
        place, stage = self.folder / "tasks" / name / "teacher", self.config.stage("task_teacher", name)
        named = self.config.teacher.tasks.get(name)

        def work() -> dict[str, Any]:
            if named is not None:
                return self.bench.score_task(load_classifier(named, task.task), task, stage, None)
            torch.manual_seed(seed)
            options = {"revision": teacher.revision, "trust_remote_code": teacher.trust_remote_code}
            model = load_classifier(str(teacher.model), task.task, new_head=True, **options)
            training = self.bench.train(
                place,
                stage,
                seed,
                HARD_LABELS,
                self.bench.train_data(task, task.train, stage, seed),
                self.bench.identity_map,
                classifier=model,
                evaluate=self._chooser(by_labels=lambda: self._main_metric(model, task, stage, None)),
            )
            result = {"training": training, **self.bench.score_task(model, task, stage, None)}
            self.bench.export(
                model,
                self.plan.tokenizer,
                place / "model",
                title=f"Teacher fine-tuned on {name}",
                summary=f"the labels of {name}",
                facts={"seed": str(seed)},
                metrics=result.get("metrics"),
            )
            return result

        start = self.run_folder.fingerprint(named) if named is not None else self.teacher_hash
        inputs = self._inputs(None if named else stage, seed, HARD_LABELS, start=start, task=task)
        result = self.run_folder.stage(place, inputs, work)
        self._add_task_row("teacher", task, "task_teacher", seed, result)
        return named or str(place / "model")

    def _distil_task(self, arm: Arm, task: TaskPlan, seed: int, teacher: TeacherConfig, classifier: str) -> None:
        """The two passes on one task from the pretrained student, and the hard-label control from the same start."""
        name = task.task.name
        place, start = arm.folder / "tasks" / name / f"seed-{seed}", arm.folder / "pretraining" / "student"
        self.bench.warn_of_equal_candidates(task, arm)
        labels, words = self.config.stage("task_labels", name), None
        after_words = start
        if "task_words" in self.plan.method:
            words = self.config.stage("task_words", name)
            after_words = self._distil_words(arm, place / "words", task, seed, teacher, classifier, start)
        objective = self.plan.method["task_labels"]
        self._distil_labels(arm, place / "labels", task, seed, labels, objective, teacher, classifier, after_words)
        if self.config.controls.hard_labels and arm.name == "student":
            budget = control_budget(labels, words, len(task.inputs), self.accelerator.num_processes)
            self._distil_labels(arm, place / "hard_labels", task, seed, budget, HARD_LABELS, teacher, classifier, start)

    def _distil_words(
        self, arm: Arm, place: Path, task: TaskPlan, seed: int, teacher: TeacherConfig, classifier: str, start: Path
    ) -> Path:
        """First pass: word-prediction logits of the fine-tuned teacher on the task's inputs. Returns the student."""
        name = task.task.name
        stage, objective = self.config.stage("task_words", name), self.plan.method["task_words"]

        def work() -> dict[str, Any]:
            live = self.bench.task_teacher(teacher, classifier, task, arm, words=True)
            student = load_language_model(TeacherConfig(str(start)))
            torch.manual_seed(seed)
            head = None
            if objective.uses("task_logits", "task_labels"):
                is_cloze = task.task.casting == "cloze"
                head = student if is_cloze else load_classifier(str(start), task.task, new_head=True)
            val = self.bench.val_data(task, stage)
            before = self.bench.score_words(student, live, val, arm)

            def nearness() -> float:
                return -self.bench.score_words(student, live, val, arm)["kl_divergence"]

            training = self.bench.train(
                place,
                stage,
                seed,
                objective,
                self.bench.train_data(task, task.inputs, stage, seed),
                arm.vocabulary.token_map,
                language_model=student,
                classifier=head,
                teacher=live,
                evaluate=self._chooser(by_labels=nearness, by_teacher=nearness),
            )
            words = self.bench.score_words(student, live, val, arm)
            self.bench.export(
                student,
                arm.tokenizer,
                place / "student",
                title="Student",
                summary=f"the fine-tuned teacher's word prediction on {name}",
                facts={"seed": str(seed)},
                metrics=words,
            )
            return {"training": training, "words_before": before, "words": words}

        origin = self.run_folder.fingerprint(str(start))
        inputs = self._inputs(stage, seed, objective, start=origin, task=task, arm=arm, classifier=classifier)
        result = self.run_folder.stage(place, inputs, work)
        self._add_task_row(arm.name, task, "task_words", seed, result)
        return place / "student"

    def _distil_labels(
        self,
        arm: Arm,
        place: Path,
        task: TaskPlan,
        seed: int,
        stage: StageConfig,
        objective: Objective,
        teacher: TeacherConfig,
        classifier: str,
        start: Path,
    ) -> None:
        """Second pass: the fine-tuned teacher's soft labels. With HARD_LABELS: the control."""
        name, is_control = task.task.name, objective is HARD_LABELS

        def work() -> dict[str, Any]:
            uses_teacher, words = objective.uses("task_logits", "word_logits"), objective.uses("word_logits")
            live = self.bench.task_teacher(teacher, classifier, task, arm, words=words) if uses_teacher else None
            torch.manual_seed(seed)
            student = load_classifier(str(start), task.task, new_head=True)
            language_model = None
            if objective.uses(*WORD_SIGNALS):
                is_cloze = task.task.casting == "cloze"
                language_model = student if is_cloze else load_language_model(TeacherConfig(str(start)))
            theirs = self.bench.answers(load_classifier(classifier, task.task), task, stage, None)

            def agreement() -> float:
                share: float = self.bench.score_task(student, task, stage, arm, theirs)["agreement"]
                return share

            training = self.bench.train(
                place,
                stage,
                seed,
                objective,
                self.bench.train_data(task, task.train if is_control else task.inputs, stage, seed),
                arm.vocabulary.token_map,
                language_model=language_model,
                classifier=student,
                teacher=live,
                evaluate=self._chooser(
                    by_labels=lambda: self._main_metric(student, task, stage, arm),
                    by_teacher=None if is_control else agreement,
                ),
            )
            result = {"training": training, "parameters": self.bench.parameters(student)}
            result |= self.bench.score_task(student, task, stage, arm, theirs)
            self.bench.export(
                student,
                arm.tokenizer,
                place / "student",
                title=f"Student for {name}",
                summary=f"the labels of {name}, as a control"
                if is_control
                else f"the fine-tuned teacher's answers on {name}",
                facts={
                    "seed": str(seed),
                    "checkpoint": self._selection(is_student=not is_control),
                    "scored on": f"{name} val",
                },
                metrics=result.get("metrics", {}) | {"agreement with the teacher": result["agreement"]},
            )
            return result

        origin = self.run_folder.fingerprint(str(start))
        inputs = self._inputs(stage, seed, objective, start=origin, task=task, arm=arm, classifier=classifier)
        result = self.run_folder.stage(place, inputs, work)
        self._add_task_row("hard labels" if is_control else arm.name, task, place.name, seed, result)

    # What stages are compared and reported by

    def _inputs(
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
            "tokenizer": tokenizer_fingerprint(self.plan.tokenizer),
            "vocabulary": arm.vocabulary.fingerprint() if arm is not None else None,
            "data": task.fingerprint() if task is not None else self.plan.corpus,
            "tokens": self._tokens() if task is None else None,
            "classifier": self.run_folder.fingerprint(classifier) if classifier is not None else None,
            "eval_blocks": self.config.data.eval_blocks if task is None else None,
            "start": start,
            "processes": self.accelerator.num_processes,
        }

    def _tokens(self) -> str | None:
        """sha256 of the corpus as tokenized: a data set of the hub may be another one when it is read again."""
        return self.bench.store.manifest["sha256"] if self.bench.store is not None else None

    def _main_metric(self, model: Any, task: TaskPlan, stage: StageConfig, arm: Arm | None) -> float:
        """What selection by validation looks at: the task's first metric."""
        scores: dict[str, float] = self.bench.score_task(model, task, stage, arm)["metrics"]
        return scores[task.task.metrics[0]]

    def _add_task_row(self, system: str, task: TaskPlan, stage: str, seed: int, result: dict[str, Any]) -> None:
        is_student = stage != "task_teacher" and system != "hard labels"
        row = {"system": system, "task": task.task.name, "stage": stage, "seed": seed, "split": "val"}
        row |= {"casting": task.task.casting, "selection": self._selection(is_student=is_student)} | result
        if task.is_scored:
            # What one answer to everything scores; with choices, one position.
            answers = range(min(len(example.choices) for example in task.val) or len(task.task.labels))
            constants = [score(task.task, np.full(len(task.val), answer), task.val) for answer in answers]
            row["constant"] = {name: max(each[name] for each in constants) for name in task.task.metrics}
        if is_student and task.has_own_inputs:
            labelled = sum(example.label is not None for example in task.inputs)
            row["inputs"] = {"examples": len(task.inputs), "labelled": labelled}
        self.rows.append(row)

    def _chooser(
        self, *, by_labels: Callable[[], float], by_teacher: Callable[[], float] | None = None
    ) -> Callable[[], float] | None:
        """What ranks the checkpoints of a stage; None keeps the last one."""
        return {"last": None, "best": by_labels, "agreement": by_teacher}[self.config.selection]

    def _selection(self, *, is_student: bool) -> str:
        """How the checkpoint of a row was chosen, in words."""
        if self.config.selection == "agreement" and is_student:
            return "nearest to the teacher on val inputs"
        return "best on val" if self.config.selection == "best" else "last"


def _words_of(example: TaskExample) -> Iterator[str]:
    """All texts of an example, the candidates that fill a blank among them."""
    for text in (text for pair in example.texts for text in pair if text):
        yield text.replace(BLANK, " ")
    yield from example.choices


@contextmanager
def _accelerator(config: RunConfig) -> Iterator[Accelerator]:
    """Accelerate's state for this run. Refuses N launched processes that did not become N ranks."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=config.mixed_precision,
            log_with=list(config.report_to) or None,
            project_dir=config.output_dir,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:  # a precision or tracker that this machine has not
        raise ConfigError(f"mixed_precision {config.mixed_precision}, report_to {config.report_to}: {error}") from None
    if accelerator.num_processes != launched:
        found = f"{launched} processes were launched, but they are {accelerator.num_processes} ranks"
        raise RunError(f"{found}; launch as in docs/multi-gpu.md")
    try:
        yield accelerator
    finally:
        accelerator.end_training()
        AcceleratorState._reset_state()  # else the next run of this process could have no other mixed_precision


def _build_world(folder: Path, accelerator: Accelerator) -> Path:
    from glmd.data.world import build_world

    place = folder / "world"
    if accelerator.is_main_process:
        build_world(place)
    accelerator.wait_for_everyone()
    return place
