"""The stages of a task: its teacher, the two passes of a student, the control on hard labels.

    stages = TaskStages(bench, task, teacher, rows)
    stages.fine_tune_teacher()
    stages.distil(arm, seed, grid point)      # for each arm and seed, and each grid point of a sweep

A stage that is complete is not run again; its row of the results is there all the same.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glmd.config import GridPoint, StageConfig, TeacherConfig
from glmd.distillation.objective import HARD_LABELS, Objective
from glmd.distillation.teacher import OnlineTeacher
from glmd.distillation.teacher_cache import TeacherCache
from glmd.errors import DataError
from glmd.evaluation.metrics import score
from glmd.models.card import BY_PLAIN
from glmd.models.heads import is_causal
from glmd.models.loading import load_language_model
from glmd.pipeline.workbench import Arm, Workbench
from glmd.planning.caches import task_cache_folder
from glmd.planning.places import control_budget, control_grid_point, grid_point_place, lm_grid_point
from glmd.planning.plan import TaskPlan
from glmd.reporting.report import NEAREST, concerns
from glmd.tasks.forms import task_form
from glmd.tasks.loading import load_classifier
from glmd.training.trainer import Teacher

logger = logging.getLogger(__name__)


class TaskStages:
    """One task of a run, on every rank.

    teacher: the pretrained one. rows: where the rows of the results go.
    """

    def __init__(self, bench: Workbench, task: TaskPlan, teacher: TeacherConfig, rows: list[dict[str, Any]]) -> None:
        self.bench, self.config, self.run_folder = bench, bench.config, bench.run_folder
        self.task, self.name, self.teacher, self.rows = task, task.task.name, teacher, rows
        self.form = task_form(task.task, causal=is_causal(bench.plan.teacher_config))
        self.is_cloze = not self.form.has_own_head
        place = self.run_folder.path / "tasks" / self.name / "task_teacher"
        self.named = self.config.teacher.tasks.get(self.name)
        self.classifier = self.named or str(place / "model")  # the fine-tuned teacher
        self.teacher_place = place
        self.theirs: np.ndarray | None = None

    def fine_tune_teacher(self) -> None:
        """The teacher as a classifier: as named, or fine-tuned here on the task's labels."""
        seed, stage, place = self.config.seeds[0], self.config.stage("task_teacher", self.name), self.teacher_place

        def work() -> dict[str, Any]:
            if self.named is not None:
                return self.bench.score_task(self._loaded_teacher(), self.task, stage, None)
            torch.manual_seed(seed)
            options: dict[str, Any] = {
                "revision": self.teacher.revision,
                "trust_remote_code": self.teacher.trust_remote_code,
            }
            model = load_classifier(str(self.teacher.model), self.task.task, new_head=True, **options)
            training = self.bench.train(
                place,
                stage,
                seed,
                HARD_LABELS,
                self.bench.train_data(self.task, self.task.train, stage, seed),
                self.bench.identity_map,
                classifier=model,
                logits=self.form.logits,
                evaluate=self._chooser(by_labels=lambda: self._main_metric(model, stage, None)),
            )
            scores = self.bench.score_task(model, self.task, stage, None)
            self.bench.export(
                model,
                self.bench.tokenizer,
                place / "model",
                title=f"Teacher fine-tuned on {self.name}",
                summary=f"the labels of {self.name}",
                facts={"seed": str(seed), "max_length": str(stage.max_length or self.task.task.max_length)},
                metrics=scores.get("metrics"),
            )
            if self.teacher.dtype != "float32":  # the folder's own scores are on its card, those of the table teach
                scores = self.bench.score_task(self._loaded_teacher(), self.task, stage, None)
            return {"training": training, **scores}

        if self.named is not None:
            inputs = self.bench.inputs(
                None, seed, HARD_LABELS, start=self.run_folder.fingerprint(self.named), task=self.task
            )
        else:
            inputs = self.bench.inputs(stage, seed, HARD_LABELS, start=self.bench.teacher_hash, task=self.task)
        self._add_row("teacher", "task_teacher", seed, {}, self.run_folder.stage(place, inputs, work))
        for each in concerns([self.rows[-1]]):
            logger.warning("%s", each)

    def distil(self, arm: Arm, seed: int, grid_point: GridPoint) -> None:
        """The two passes from the pretrained student, and the hard-label control from the same start."""
        root, start = arm.folder / "tasks" / self.name, arm.folder / "pretraining" / "student"
        labels, words = self.config.stage("task_soft_labels", self.name, grid_point), None
        after_words = start
        if "task_lm" in self.bench.plan.method:
            words = self.config.stage("task_lm", self.name, grid_point)
            place = self._place("task_lm", arm, seed, grid_point)
            after_words = place / "student"
            if place not in self.run_folder.left:
                self._distil_words(arm, place, seed, words, lm_grid_point(grid_point), start)
        place, objective = (
            self._place("task_soft_labels", arm, seed, grid_point),
            self.bench.plan.method["task_soft_labels"],
        )
        self._distil_labels(arm, place, seed, labels, grid_point, objective, after_words)
        if self.config.controls.hard_labels and arm.name == "student":
            budget = control_budget(labels, words, len(self.task.inputs), self.bench.processes)
            place = grid_point_place(root, control_grid_point(grid_point), seed) / "hard_labels"
            if place not in self.run_folder.left:
                self._distil_labels(arm, place, seed, budget, control_grid_point(grid_point), HARD_LABELS, start)

    def caches(self, classifier: str | None, arms: Sequence[Arm] | None = None) -> list[TeacherCache]:
        """What the task's stages read from `teacher.cache`, of each folder once; only those of arms still to train.

        classifier: the fine-tuned teacher; None before there is one, for sizes, which do not depend on it.
        """
        found: dict[Path, TeacherCache] = {}
        for name, seed in itertools.product(self.bench.cached_stages, self.config.seeds):
            if name == "pretraining" or task_cache_folder(self.bench.plan, name, self.name, seed) in found:
                continue
            places = [
                self._place(name, arm, seed, grid_point) for arm in arms or () for grid_point in self.config.grid_points
            ]
            if arms is None or not all(map(self.run_folder.is_complete, places)):
                cache = self.bench.task_cache(name, self.name, seed, classifier)
                found[cache.folder] = cache
        return list(found.values())

    def make_caches(self) -> None:
        """All of them, ahead of the stages."""
        for cache in self.caches(self.classifier):
            self.bench.complete_cache(cache, partial(self._live, None, words=cache.width is not None))

    def _distil_words(
        self, arm: Arm, place: Path, seed: int, stage: StageConfig, grid_point: GridPoint, start: Path
    ) -> None:
        """First pass: word-prediction logits of the fine-tuned teacher on the task's inputs."""
        objective = self.bench.plan.method["task_lm"]

        def work() -> dict[str, Any]:
            live = self._teacher("task_lm", arm, seed, words=True)
            student = load_language_model(TeacherConfig(str(start)))
            torch.manual_seed(seed)
            head = None
            if "task_head" in objective.needs:
                head = student if self.is_cloze else load_classifier(str(start), self.task.task, new_head=True)
            val = self.bench.val_data(self.task, stage)
            before = self.bench.score_lm(student, live, val, arm, stage)

            def nearness() -> float:
                return -self.bench.score_lm(student, live, val, arm, stage)["kl_divergence"]

            training = self.bench.train(
                place,
                stage,
                seed,
                objective,
                self.bench.train_data(self.task, self.task.inputs, stage, seed),
                arm.vocabulary.token_map,
                language_model=student,
                classifier=head,
                logits=self.form.logits,
                teacher=live,
                evaluate=self._chooser(by_labels=nearness, by_teacher=nearness),
            )
            words = self.bench.score_lm(student, live, val, arm, stage)
            self.bench.export(
                student,
                arm.tokenizer,
                place / "student",
                title="Student",
                summary=f"the fine-tuned teacher's word prediction on {self.name}",
                facts={"seed": str(seed)},
                metrics=words,
            )
            return {"training": training, "lm_scores_before": before, "lm_scores": words}

        inputs = self._inputs("task_lm", arm, seed, stage, objective, start)
        self._add_row(arm.name, "task_lm", seed, grid_point, self.run_folder.stage(place, inputs, work))

    def _distil_labels(
        self,
        arm: Arm,
        place: Path,
        seed: int,
        stage: StageConfig,
        grid_point: GridPoint,
        objective: Objective,
        start: Path,
    ) -> None:
        """Second pass: the fine-tuned teacher's soft labels. With HARD_LABELS: the control."""
        is_control = objective is HARD_LABELS

        def work() -> dict[str, Any]:
            live = None
            if objective.teacher_needs:
                live = self._teacher("task_soft_labels", arm, seed, words="head" in objective.teacher_needs)
            torch.manual_seed(seed)
            student = load_classifier(str(start), self.task.task, new_head=True)
            language_model = None
            if "head" in objective.needs:
                language_model = student if self.is_cloze else load_language_model(TeacherConfig(str(start)))
            theirs = self._answers(stage)

            def agreement() -> float:
                share: float = self.bench.score_task(student, self.task, stage, arm, theirs)["agreement"]
                return share

            examples = self.task.train if is_control else self.task.inputs
            # Inputs are masked for terms that compare words, and for no others.
            is_clean = not objective.reads_tokens
            given = replace(stage, mlm_probability=0.0, num_maskings=None) if is_clean else stage
            training = self.bench.train(
                place,
                stage,
                seed,
                objective,
                self.bench.train_data(self.task, examples, given, seed),
                arm.vocabulary.token_map,
                language_model=language_model,
                classifier=student,
                logits=self.form.logits,
                teacher=live,
                evaluate=self._chooser(
                    by_labels=lambda: self._main_metric(student, stage, arm),
                    by_teacher=None if is_control else agreement,
                ),
            )
            result = {"training": training, "parameters": self.bench.parameters(student)}
            result |= self.bench.score_task(student, self.task, stage, arm, theirs)
            scores = result.get("metrics", {}) | {"agreement with the teacher": result["agreement"]}
            if not arm.vocabulary.is_identity:
                result |= self._read_without_glmd(student, stage, arm, theirs)
                ordinary = result.get("stock", {})
                named = {**ordinary.get("metrics", {}), "agreement with the teacher": ordinary.get("agreement")}
                scores |= {name + BY_PLAIN: value for name, value in named.items() if value is not None}
            summary = f"the labels of {self.name}, as a control"
            self.bench.export(
                student,
                arm.tokenizer,
                place / "student",
                title=f"Student for {self.name}",
                summary=summary if is_control else f"the fine-tuned teacher's answers on {self.name}",
                facts={
                    "seed": str(seed),
                    "max_length": str(stage.max_length or self.task.task.max_length),
                    "checkpoint": self._selection(is_student=not is_control),
                    "scored on": f"{self.name} val",
                },
                metrics=scores,
            )
            return result

        inputs = self._inputs(None if is_control else "task_soft_labels", arm, seed, stage, objective, start)
        result = self.run_folder.stage(place, inputs, work)
        self._add_row("hard labels" if is_control else arm.name, place.name, seed, grid_point, result)

    def _read_without_glmd(self, student: Any, stage: StageConfig, arm: Arm, theirs: np.ndarray) -> dict[str, Any]:
        """The student's scores where text is read by plain AutoTokenizer; none where that is too long to be asked."""
        try:
            scores = self.bench.score_task(student, self.task, stage, arm, theirs, stock=True)
        except DataError as error:  # a figure more or less; the student itself is whole
            logger.warning("%s: not scored by plain AutoTokenizer, which cuts text smaller: %s", self.name, error)
            return {}
        return {"stock": {key: value for key, value in scores.items() if key != "examples"}}

    # The fine-tuned teacher, live and from disk

    def _loaded_teacher(self) -> Any:
        """The fine-tuned model in the precision that it teaches in, and is scored in."""
        return load_classifier(self.classifier, self.task.task, dtype=getattr(torch, self.teacher.dtype))

    def _live(self, arm: Arm | None, *, words: bool) -> OnlineTeacher:
        """The fine-tuned teacher; for words, with its LM head, as pretrained where the task has a head of its own."""
        model = self._loaded_teacher()
        language_model = None
        if words:  # in a blank the fine-tuned model has predicted words itself
            language_model = model if self.is_cloze else load_language_model(self.teacher)
        return self.bench.teacher(language_model, model, arm, self.form.logits)

    def _teacher(self, name: str, arm: Arm, seed: int, *, words: bool) -> Teacher:
        """The fine-tuned teacher of a stage, from `teacher.cache` where the stage reads it."""
        if name not in self.bench.cached_stages:
            return self._live(arm, words=words)
        outputs = self.bench.outputs(
            task_cache_folder(self.bench.plan, name, self.name, seed),
            lambda: self.bench.task_cache(name, self.name, seed, self.classifier),
            lambda: self._live(None, words=words),
        )
        # The head's rows are those of the fine-tuned embeddings where they are tied.
        language_model = self._live(arm, words=True).language_model if words else None
        return self.bench.cached_teacher(outputs, language_model, arm)

    def _answers(self, stage: StageConfig) -> np.ndarray:
        """(examples,) the fine-tuned teacher's answers on val: the same for all seeds, grid points and the control."""
        if self.theirs is None:
            self.theirs = self.bench.answers(self._loaded_teacher(), self.task, stage, None)
        return self.theirs

    # What stages are compared and reported by

    def _inputs(
        self, name: str | None, arm: Arm, seed: int, stage: StageConfig, objective: Objective, start: Path
    ) -> dict[str, Any]:
        return self.bench.inputs(
            stage,
            seed,
            objective,
            start=self.run_folder.fingerprint(str(start)),
            task=self.task,
            arm=arm,
            classifier=self.classifier,
            kept_in=self.bench.kept_in(name) if name is not None else None,
        )

    def _main_metric(self, model: Any, stage: StageConfig, arm: Arm | None) -> float:
        """What selection by validation looks at: the task's first metric."""
        scores: dict[str, float] = self.bench.score_task(model, self.task, stage, arm)["metrics"]
        return scores[self.task.task.metrics[0]]

    def _place(self, name: str, arm: Arm, seed: int, grid_point: GridPoint) -> Path:
        """The folder of a stage; grid points that differ in the second pass alone share the first."""
        root = arm.folder / "tasks" / self.name
        return grid_point_place(root, lm_grid_point(grid_point) if name == "task_lm" else grid_point, seed) / name

    def _chooser(
        self, *, by_labels: Callable[[], float], by_teacher: Callable[[], float] | None = None
    ) -> Callable[[], float] | None:
        """What ranks the checkpoints of a stage; None keeps the last one."""
        return {"last": None, "best": by_labels, "agreement": by_teacher}[self.config.selection]

    def _selection(self, *, is_student: bool) -> str:
        """How the checkpoint of a row was chosen, in words."""
        if self.config.selection == "agreement" and is_student:
            return NEAREST
        return "best on val" if self.config.selection == "best" else "last"

    def _add_row(self, system: str, stage: str, seed: int, grid_point: GridPoint, result: dict[str, Any]) -> None:
        is_student, task = stage != "task_teacher" and system != "hard labels", self.task.task
        row = {"system": system, "task": self.name, "stage": stage, "seed": seed, "split": "val"}
        row |= {"casting": task.casting, "selection": self._selection(is_student=is_student)}
        row |= {"grid_point": grid_point} | result if grid_point else result
        if self.task.is_scored:
            # What one answer to everything scores; with choices, one position.
            answers = range(len(task.labels) or min(len(example.choices) for example in self.task.val))
            constants = [score(task, np.full(len(self.task.val), answer), self.task.val) for answer in answers]
            row["constant"] = {name: max(each[name] for each in constants) for name in task.metrics}
        if is_student and self.task.has_own_inputs:
            labeled = sum(example.label is not None for example in self.task.inputs)
            row["inputs"] = {"examples": len(self.task.inputs), "labeled": labeled}
        self.rows.append(row)
