"""A plan for a person to read, as `glmd check` prints it: models, stages, steps.

print(describe(make_plan(config), world_size=1))
"""

from collections.abc import Iterator
from dataclasses import dataclass

from glmd.config import StageConfig, grid_point_name
from glmd.planning.plan import Plan, TaskPlan
from glmd.planning.rules import task_stages


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a run as it is planned. examples: None on a corpus, which is not counted yet."""

    kind: str  # teacher, task_teacher, pretraining, task_lm, task_soft_labels
    settings: StageConfig
    length: int  # tokens of a text, at most
    task: TaskPlan | None = None
    examples: int | None = None
    swept: str = ""  # what the grid point of a sweep changes

    @property
    def name(self) -> str:
        return self.kind if self.task is None else f"{self.task.task.name} {self.kind}"


def planned_stages(plan: Plan) -> Iterator[PlannedStage]:
    """Every stage in order, but for seeds and controls."""
    config = plan.config
    if config.teacher.pretraining is not None:
        yield PlannedStage("teacher", config.teacher.pretraining, config.teacher.pretraining.max_length or 0)
    stages = {name: task_stages(config, plan.method, name) for name in plan.tasks}
    for name, task in plan.tasks.items():
        stage = stages[name].pop("task_teacher")
        if name not in config.teacher.tasks:
            length = stage.max_length or task.task.max_length
            yield PlannedStage("task_teacher", stage, length, task, len(task.train))
    if "pretraining" in plan.method:
        yield PlannedStage("pretraining", config.pretraining, config.pretraining.max_length or 0)
    for name, task in plan.tasks.items():
        for each in stages[name]:
            # A first pass is shared by the grid points that differ in the second alone.
            grid_points = [
                {key: value for key, value in grid_point.items() if key.startswith(f"{each}.")}
                for grid_point in config.grid_points
            ]
            for number, grid_point in enumerate(grid_points):
                if grid_point not in grid_points[:number]:
                    stage = config.stage(each, name, grid_point)
                    length = stage.max_length or task.task.max_length
                    swept = grid_point_name(grid_point).replace(f"{each}.", "")
                    yield PlannedStage(each, stage, length, task, len(task.inputs), swept)
