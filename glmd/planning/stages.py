"""The stages of a run, in the order in which they are run: the one place where they are enumerated.

    for stage in stages(plan, processes=1): ...     # check prints them, plan costs them, run completes them

A stage is known by its path, that of its folder in the run folder. Nothing is loaded here.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from glmd.config import GridPoint, RunConfig, TeacherConfig, grid_point_name
from glmd.distillation.methods import load_method
from glmd.distillation.objective import HARD_LABELS, MASKED_LM, Objective
from glmd.distillation.signals import Need
from glmd.planning.plan import Plan
from glmd.planning.rules import cached_stages, is_clean, is_scored_by_words
from glmd.planning.task_plan import TaskPlan
from glmd.planning.teacher_rules import passes, teachers_of_task
from glmd.stage_config import StageConfig
from glmd.tasks.examples import TaskExample

Variant = Literal["teacher", "student", "full vocabulary"]
ASSISTANTS = "assistants"  # the folder of all of them
CONTROL = "hard_labels"  # the kind of the stage in which a student learns labels alone
# And of those that leave a model of the task with fewer tokens, and train nothing: the fine-tuned teacher, or the
# student with the full vocabulary.
TRIMMED = ("trim_only", "trim_after")
TEACHER = "teacher"  # path of the pretrained teacher: a stage where it is trained here, else the model that is named
# Settings that say how many updates a stage has.
LENGTH_KEYS = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Stage:
    """A unit of work of a run.

    kind: "teacher", "vocabulary", "task_teacher", "hard_labels", one of TRIMMED, or a stage of the method by its name.
    settings: None where nothing is trained: for the vocabulary, a named teacher of a task, a student without
        pretraining, a teacher that is trimmed. objective: None for the vocabulary and a student without pretraining.
    variant: whose vocabulary its model has. "full vocabulary" is the control with the teacher's.
    grid_point: what of the sweep's it depends on. cached: it reads the teacher's outputs from `teacher.cache`.
    start: path of the stage whose model it begins from; None where it makes its own, of the teacher's layers.
    teacher: path of the stage whose model it learns from; None where it learns from labels alone. further: paths of
        the other teachers, where it learns from several. A teacher that is named has a path without a stage.
    named: the model that stands in the place of what it would train. assistant: number of the assistant whose stage it
        is, from 1; 0 for the student. number: of one of several teachers that are trained, from 0.
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
    assistant: int = 0
    number: int = 0

    @property
    def name(self) -> str:
        """For people: RTE task_lm."""
        whose = f"assistant {self.assistant} " if self.assistant else ""
        number = f" {self.number + 1}" if self.number else ""
        return whose + (self.kind if self.task is None else f"{self.task.task.name} {self.kind}") + number

    @property
    def system(self) -> str:
        """What the results call it."""
        if self.is_control:
            return self.kind.replace("_", " ")
        if self.assistant:
            return f"assistant {self.assistant}"
        return f"{self.variant} {self.number + 1}" if self.number else self.variant

    @property
    def teachers(self) -> tuple[str, ...]:
        """Paths of all that it learns from, the first one first: by that students are scored."""
        return () if self.teacher is None else (self.teacher, *self.further)

    @property
    def is_control(self) -> bool:
        """Whether it is a model beside the student's stages, which learns labels alone or nothing."""
        return self.kind in (CONTROL, *TRIMMED)

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
    config, seed = plan.config, plan.config.seeds[0]
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
            more: dict[str, Any] = {"start": start, "named": model, "number": number}
            yield Stage("task_teacher", path, trained, HARD_LABELS, seed, "teacher", task, **more)
        if config.controls.trim_only:
            yield _trimmed("trim_only", f"controls/trim_only/tasks/{name}", task, seed, teacher_path(0, name))
    for number, assistant in enumerate(config.assistants, start=1):
        whose: Variant = "student" if assistant.vocabulary == "student" else "full vocabulary"
        yield _pretraining(plan, whose, number)
        for task in plan.tasks.values():
            yield from _passes(plan, task, whose, seed, {}, processes, number)
    variants: list[Variant] = ["student"]
    if config.controls.full_vocabulary:
        variants.append("full vocabulary")
    for variant in variants:
        yield _pretraining(plan, variant)
    for task, variant in itertools.product(plan.tasks.values(), variants):
        seen = set()
        for each_seed, grid_point in itertools.product(config.seeds, config.grid_points):
            for stage in _passes(plan, task, variant, each_seed, grid_point, processes):
                if stage.path not in seen:
                    seen.add(stage.path)
                    yield stage


def _pretraining(plan: Plan, variant: Variant, assistant: int = 0) -> Stage:
    objective, settings = plan.method.get("pretraining"), plan.config.pretraining
    return Stage(
        "pretraining",
        f"{_root(variant, assistant)}pretraining",
        settings if objective is not None else None,
        objective,
        plan.config.seeds[0],
        variant,
        assistant=assistant,
        **_learning(plan, "pretraining", objective, None, assistant),
    )


def _passes(
    plan: Plan,
    task: TaskPlan,
    variant: Variant,
    seed: int,
    grid_point: GridPoint,
    processes: int,
    assistant: int = 0,
) -> Iterator[Stage]:
    """The passes of a student, or an assistant, over a task, and the control on hard labels from the same start."""
    config, method, name = plan.config, plan.method, task.task.name
    pretrained, kinds = f"{_root(variant, assistant)}pretraining", passes(method)
    settings = {kind: config.stage(kind, name, grid_point) for kind in kinds}
    if config.updates_of is not None:
        total = _updates(config, passes(load_method(config.updates_of)), task, grid_point, kinds[-1], processes)
        settings = _shared_out(total, settings, len(task.inputs), processes)
    last, start = kinds[-1], pretrained
    for i, kind in enumerate(kinds):
        # Grid points that differ in later passes alone share the earlier ones, unless their updates are shared out.
        point = {
            key: value
            for key, value in grid_point.items()
            if key.partition(".")[0] in kinds[: i + 1] or (config.updates_of and key.partition(".")[2] in LENGTH_KEYS)
        }
        path = pass_path(kind, name, seed, point, variant, assistant)
        learning = _learning(plan, kind, method[kind], name, assistant)
        more: dict[str, Any] = {"start": start, "last": last, "assistant": assistant, **learning}
        yield Stage(kind, path, settings[kind], method[kind], seed, variant, task, point, **more)
        start = path
    if config.controls.trim_after and variant == "full vocabulary" and not assistant:
        trimmed = start.replace("full_vocabulary", "trim_after").rpartition("/")[0]
        yield _trimmed("trim_after", trimmed, task, seed, start, grid_point)
    if config.controls.hard_labels and variant == "student" and not assistant:
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


def _trimmed(kind: str, path: str, task: TaskPlan, seed: int, start: str, grid_point: GridPoint | None = None) -> Stage:
    """A control whose model is that of another stage with the student's tokens, and not trained."""
    teacher = teacher_path(0, task.task.name)
    point = grid_point or {}
    return Stage(kind, path, None, None, seed, "student", task, point, start, teacher, last=kind)


def _updates(
    config: RunConfig, kinds: Sequence[str], task: TaskPlan, grid_point: GridPoint, last: str, processes: int
) -> int:
    """How many the passes of another method have. What is swept of `last` is meant for the last of those."""
    swept = {key.removeprefix(f"{last}."): value for key, value in grid_point.items() if key.startswith(f"{last}.")}
    point = {f"{kinds[-1]}.{key}": value for key, value in swept.items()}
    settings = [config.stage(kind, task.task.name, point) for kind in kinds]
    return sum(each.steps(len(task.inputs), processes) for each in settings)


def _shared_out(total: int, settings: dict[str, StageConfig], examples: int, processes: int) -> dict[str, StageConfig]:
    """The settings with so many updates together, in the proportion of their own; each has one at least."""
    own = [each.steps(examples, processes) for each in settings.values()]
    shared, done = {}, 0
    for i, (kind, each) in enumerate(settings.items()):
        until = round(total * sum(own[: i + 1]) / sum(own))
        until = min(max(until, done + 1), max(done + 1, total - (len(own) - 1 - i)))
        shared[kind] = replace(each, max_steps=until - done, num_train_epochs=None)
        done = until
    return shared


def _learning(plan: Plan, kind: str, objective: Objective | None, task: str | None, assistant: int) -> dict[str, Any]:
    """From whom a stage of the student, or of an assistant, learns, and whether from a cache.

    The teachers, or in their place the last of the assistants above it, whom no cache holds. All of these where the
    objective asks several, the teacher first.
    """
    config, seed = plan.config, plan.config.seeds[0]
    above = range(1, assistant or len(config.assistants) + 1)
    if not above:
        count = len(config.teacher.ensemble) + 1 if task is None else teachers_of_task(config, plan.method, task)
        is_cached = kind in cached_stages(config, plan.method)
        further = tuple(teacher_path(number, task) for number in range(1, count))
        is_asked = objective is not None and bool(objective.further_needs)
        return {"teacher": teacher_path(0, task), "further": further if is_asked else (), "cached": is_cached}
    paths, last = [teacher_path(0, task)], passes(plan.method)[-1:]
    for number in above:
        whose: Variant = "student" if config.assistants[number - 1].vocabulary == "student" else "full vocabulary"
        own = f"{_root(whose, number)}pretraining"
        paths.append(own if task is None else pass_path(last[0], task, seed, {}, whose, number))
    chosen = paths if objective is not None and objective.asks_assistants else paths[-1:]
    return {"teacher": chosen[0], "further": tuple(chosen[1:])}


def _root(variant: Variant, assistant: int) -> str:
    if assistant:
        return f"{ASSISTANTS}/{assistant}/"
    return "controls/full_vocabulary/" if variant == "full vocabulary" else ""


def teacher_path(number: int, task: str | None = None) -> str:
    """Of one of several teachers, from 0: teacher, teacher_2, tasks/RTE/task_teacher, tasks/RTE/task_teacher_2."""
    path = TEACHER if task is None else f"tasks/{task}/task_teacher"
    return path if number == 0 else f"{path}_{number + 1}"


def named_language_models(config: TeacherConfig) -> dict[str, str]:
    """The pretrained teachers that the config names, by their paths."""
    models = [config.model, *config.ensemble]
    return {teacher_path(number): model for number, model in enumerate(models) if model is not None}


def pass_path(
    kind: str, task: str, seed: int, grid_point: GridPoint, variant: Variant = "student", assistant: int = 0
) -> str:
    """tasks/RTE/seed-0/task_lm; of a sweep the grid point stands before the seed."""
    name = grid_point_name(grid_point)
    return f"{_root(variant, assistant)}tasks/{task}/{f'{name}/' if name else ''}seed-{seed}/{kind}"


def learner_config(plan: Plan, stage: Stage) -> Any:
    """The config of the model that a stage trains."""
    if stage.assistant:
        return plan.assistant_configs[stage.assistant - 1]
    return plan.teacher_config_at(stage.number, stage.task) if stage.trains_teacher else plan.student_config


def teacher_config(plan: Plan, stage: Stage, number: int) -> Any:
    """The config of one of those that a stage learns from, from 0."""
    folder, _, rest = stage.teachers[number].partition("/")
    if folder == ASSISTANTS:
        return plan.assistant_configs[int(rest.partition("/")[0]) - 1]
    return plan.teacher_config_at(number, stage.task)


def lines(plan: Plan, processes: int) -> list[list[Stage]]:
    """What a table of the plan has a line for: the stages that train alike, but for seed and start, in order.

    The control with the full vocabulary has none: it is the same stages again.
    """
    found: dict[tuple[str, StageConfig], list[Stage]] = {}
    for stage in stages(plan, processes):
        if stage.settings is not None and (stage.variant != "full vocabulary" or stage.assistant):
            found.setdefault((stage.name, stage.settings), []).append(stage)
    tasks, kinds = list(plan.tasks), [*passes(plan.method), CONTROL]

    def place(line: list[Stage]) -> tuple[int, int]:
        """Passes in order of their task and kind, behind all else as it comes."""
        stage = line[0]
        if stage.task is None or stage.kind not in kinds:
            return -1, -1
        return (-1, -1) if stage.assistant else (tasks.index(stage.task.task.name), kinds.index(stage.kind))

    return sorted(found.values(), key=place)
