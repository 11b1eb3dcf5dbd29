"""The stages of a run, in the order in which they are run: the one place where they are enumerated.

    for stage in stages(plan, processes=1): ...     # check prints them, plan costs them, run completes them

A stage is known by its path, that of its folder in the run folder. Nothing is loaded here.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from glmd.config import GridPoint, TeacherConfig, grid_point_name
from glmd.distillation.objective import HARD_LABELS, MASKED_LM, Objective
from glmd.distillation.signals import Need
from glmd.planning.plan import Plan
from glmd.planning.rules import cached_stages, is_clean, is_scored_by_words, passes, teachers_of_task
from glmd.planning.task_plan import TaskPlan
from glmd.stage_config import StageConfig
from glmd.tasks.examples import TaskExample

Variant = Literal["teacher", "student", "full vocabulary"]
CONTROL = "hard_labels"  # the kind of the stage in which a student learns labels alone
TEACHER = "teacher"  # path of the pretrained teacher: a stage where it is trained here, else the model that is named
# Settings that say how many updates a stage has.
LENGTH_KEYS = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Stage:
    """A unit of work of a run.

    kind: "teacher", "vocabulary", "task_teacher", "hard_labels", or a stage of the method by its name.
    settings: None where nothing is trained: for the vocabulary, a named teacher of a task, a student without
        pretraining. objective: None for the vocabulary and a student without pretraining.
    variant: whose vocabulary its model has. "full vocabulary" is the control with the teacher's.
    grid_point: what of the sweep's it depends on. cached: it reads the teacher's outputs from `teacher.cache`.
    start: path of the stage whose model it begins from; None where it makes its own, of the teacher's layers.
    teacher: path of the stage whose model it learns from; None where it learns from labels alone. further: paths of
        the other teachers, where it learns from several. A teacher that is named has a path without a stage.
    named: the model that stands in the place of what it would train.
    last: the method's last stage over a task, which leaves the model of the task, and whose settings the control has.
    """

    kind: str
    path: str
    settings: StageConfig | None
    objective: Objective | None
    seed: int
    variant: Variant = "student"
    task: TaskPlan | None = None
    grid_point: GridPoint = field(default_factory=dict)
    start: str | None = None
    teacher: str | None = None
    cached: bool = False
    last: str = ""
    further: tuple[str, ...] = ()
    named: str | None = None

    @property
    def name(self) -> str:
        """For people: RTE task_lm."""
        return self.kind if self.task is None else f"{self.task.task.name} {self.kind}"

    @property
    def system(self) -> str:
        """What the results call it."""
        if self.is_control:
            return "hard labels"
        number = self.path.partition("task_teacher_")[2]  # of one of several teachers
        return f"{self.variant} {number}" if number else self.variant

    @property
    def teachers(self) -> tuple[str, ...]:
        """Paths of all that it learns from, the first one first: by that students are scored."""
        return () if self.teacher is None else (self.teacher, *self.further)

    @property
    def is_control(self) -> bool:
        """Whether it is the student that learns the labels alone."""
        return self.kind == CONTROL

    @property
    def trains_teacher(self) -> bool:
        return self.variant == "teacher"

    @property
    def leaves_language_model(self) -> bool:
        """Else it leaves a model of its task; before the last pass only one whose task head was trained is that."""
        if self.task is None:
            return True
        on_its_way = self.variant != "teacher" and not self.is_control and self.kind != self.last
        return on_its_way and ("head" in self.needs or "task_head" not in self.needs)

    @property
    def own_grid_point(self) -> GridPoint:
        """What of the grid point changes its settings; the control follows the last pass."""
        own = f"{self.last if self.is_control else self.kind}."
        return {key.removeprefix(own): value for key, value in self.grid_point.items() if key.startswith(own)}

    @property
    def swept(self) -> str:
        """The same for people."""
        return grid_point_name(self.own_grid_point)

    @property
    def examples(self) -> list[TaskExample]:
        """What is trained on; empty on a corpus, which is not counted yet."""
        if self.task is None:
            return []
        return self.task.train if self.trains_teacher or self.is_control else self.task.inputs

    @property
    def asks_lm_logits(self) -> bool:
        """Whether the teacher's predictions are asked for, to be compared or to score the student by."""
        return self.objective is not None and is_scored_by_words(self.kind, self.objective)

    @property
    def needs(self) -> frozenset[Need]:
        """Which parts of the student its objective reads."""
        return self.objective.needs if self.objective is not None else frozenset()

    @property
    def teacher_needs(self) -> frozenset[Need]:
        """And of the teacher."""
        return self.objective.teacher_needs if self.objective is not None else frozenset()

    def asks_lm_logits_of(self, number: int) -> bool:
        """Whether one of the teachers, from 0, is asked for its predictions. The first one's also score the student."""
        assert self.objective is not None, "the stage trains"
        return self.asks_lm_logits if number == 0 else "head" in self.objective.further_needs

    def teacher_needs_of(self, number: int) -> frozenset[Need]:
        """Which parts of one of the teachers, from 0, its objective reads."""
        assert self.objective is not None, "the stage trains"
        return self.teacher_needs if number == 0 else self.objective.further_needs

    @property
    def training(self) -> StageConfig:
        """The settings of a stage that trains."""
        assert self.settings is not None, f"{self.path} trains nothing"
        return self.settings

    @property
    def masking(self) -> tuple[float, int | None]:
        """Share of masked tokens, and the number of maskings, which no grid point of a sweep changes."""
        clean = self.task is not None and self.objective is not None and is_clean(self.kind, self.objective)
        return (0.0, None) if clean else (self.training.mlm_probability or 0.0, self.training.num_maskings)

    @property
    def length(self) -> int:
        """Tokens of a text, at most."""
        length = self.training.max_length
        return length or (self.task.task.max_length if self.task is not None else 0)


def stages(plan: Plan, processes: int) -> Iterator[Stage]:
    """Every stage once, each after those that it begins from and learns from.

    processes: that the batch sizes speak of; the control has as many updates as they make of the passes.
    """
    config, cached, seed = plan.config, cached_stages(plan.config, plan.method), plan.config.seeds[0]
    if config.teacher.pretraining is not None:
        settings = config.teacher.pretraining
        settings = replace(settings, mlm_probability=settings.mlm_probability or 0.15)
        yield Stage("teacher", TEACHER, settings, MASKED_LM, seed, "teacher")
    yield Stage("vocabulary", "vocabulary", None, None, seed, teacher=TEACHER)
    for name, task in plan.tasks.items():
        models = dict(enumerate(config.teacher.of_task(name)))
        for number in range(teachers_of_task(config, plan.method, name)):
            path, start, model = teacher_path(number, name), teacher_path(number), models.get(number)
            trained = None if model is not None else config.stage("task_teacher", name)
            yield Stage("task_teacher", path, trained, HARD_LABELS, seed, "teacher", task, start=start, named=model)
    variants: list[Variant] = ["student"]
    if config.controls.full_vocabulary:
        variants.append("full vocabulary")
    for variant in variants:
        objective = plan.method.get("pretraining")
        yield Stage(
            "pretraining",
            f"{_root(variant)}pretraining",
            config.pretraining if objective is not None else None,
            objective,
            seed,
            variant,
            teacher=TEACHER,
            cached="pretraining" in cached,
            further=_further(objective, len(config.teacher.ensemble) + 1, None),
        )
    for task, variant in itertools.product(plan.tasks.values(), variants):
        seen = set()
        for each_seed, grid_point in itertools.product(config.seeds, config.grid_points):
            for stage in _passes(plan, task, variant, each_seed, grid_point, processes):
                if stage.path not in seen:
                    seen.add(stage.path)
                    yield stage


def _passes(
    plan: Plan, task: TaskPlan, variant: Variant, seed: int, grid_point: GridPoint, processes: int
) -> Iterator[Stage]:
    """The passes of a student over a task, and the control on hard labels from the same start."""
    config, method, name = plan.config, plan.method, task.task.name
    cached, teacher, pretrained = cached_stages(config, method), teacher_path(0, name), f"{_root(variant)}pretraining"
    kinds, count = passes(method), teachers_of_task(config, method, name)
    settings = {kind: config.stage(kind, name, grid_point) for kind in kinds}
    last, start = kinds[-1], pretrained
    for i, kind in enumerate(kinds):
        # Grid points that differ in later passes alone share the earlier ones.
        point = {key: value for key, value in grid_point.items() if key.partition(".")[0] in kinds[: i + 1]}
        path = pass_path(kind, name, seed, point, variant)
        further = _further(method[kind], count, name)
        place = (start, teacher, kind in cached, last, further)
        yield Stage(kind, path, settings[kind], method[kind], seed, variant, task, point, *place)
        start = path
    if config.controls.hard_labels and variant == "student":
        # Of the passes before the last one the control has but the number of updates.
        point = {
            key: value
            for key, value in grid_point.items()
            if key.startswith(f"{last}.") or key.partition(".")[2] in LENGTH_KEYS
        }
        path = pass_path(CONTROL, name, seed, point, variant)
        steps = sum(each.steps(len(task.inputs), processes) for each in settings.values())
        longer = replace(settings[last], max_steps=steps, num_train_epochs=None)
        yield Stage(CONTROL, path, longer, HARD_LABELS, seed, variant, task, point, pretrained, last=last)


def _root(variant: Variant) -> str:
    return "controls/full_vocabulary/" if variant == "full vocabulary" else ""


def teacher_path(number: int, task: str | None = None) -> str:
    """Of one of several teachers, from 0: teacher, teacher_2, tasks/RTE/task_teacher, tasks/RTE/task_teacher_2."""
    path = TEACHER if task is None else f"tasks/{task}/task_teacher"
    return path if number == 0 else f"{path}_{number + 1}"


def named_language_models(config: TeacherConfig) -> dict[str, str]:
    """The pretrained teachers that the config names, by their paths."""
    models = [config.model, *config.ensemble]
    return {teacher_path(number): model for number, model in enumerate(models) if model is not None}


def _further(objective: Objective | None, count: int, task: str | None) -> tuple[str, ...]:
    """Paths of the teachers but the first, where an objective asks them."""
    if objective is None or not objective.further_needs:
        return ()
    return tuple(teacher_path(number, task) for number in range(1, count))


def pass_path(kind: str, task: str, seed: int, grid_point: GridPoint, variant: Variant = "student") -> str:
    """tasks/RTE/seed-0/task_lm; of a sweep the grid point stands before the seed."""
    name = grid_point_name(grid_point)
    return f"{_root(variant)}tasks/{task}/{f'{name}/' if name else ''}seed-{seed}/{kind}"


def lines(plan: Plan, processes: int) -> list[list[Stage]]:
    """What a table of the plan has a line for: the stages that train alike, but for seed and start, in order.

    The control with the full vocabulary has none: it is the same stages again.
    """
    found: dict[tuple[str, StageConfig], list[Stage]] = {}
    for stage in stages(plan, processes):
        if stage.settings is not None and stage.variant != "full vocabulary":
            found.setdefault((stage.name, stage.settings), []).append(stage)
    tasks, kinds = list(plan.tasks), [*passes(plan.method), CONTROL]

    def place(line: list[Stage]) -> tuple[int, int]:
        """Passes in order of their task and kind, behind all else as it comes."""
        stage = line[0]
        if stage.task is None or stage.kind not in kinds:
            return -1, -1
        return tasks.index(stage.task.task.name), kinds.index(stage.kind)

    return sorted(found.values(), key=place)
