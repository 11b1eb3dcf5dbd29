"""Where the stages of a run lie in its folder, and which of them are still to come.

for place, settings in stage_places(plan): ...     # runs/NAME/tasks/RTE/seed-0/task_lm, ...
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from glmd.config import GridPoint, StageConfig, grid_point_name
from glmd.planning.plan import Plan

# Settings that say how many updates a stage has.
LENGTH_KEYS = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")


def stage_places(plan: Plan) -> Iterator[tuple[Path, StageConfig]]:
    """The folder of every stage that trains, with its settings."""
    config, root = plan.config, Path(plan.config.output_dir)
    arms = [root, *([root / "controls" / "full_vocabulary"] if config.controls.full_vocabulary else [])]
    if config.teacher.pretraining is not None:
        yield root / "teacher", config.teacher.pretraining
    for name in plan.tasks:
        if name not in config.teacher.tasks:
            yield root / "tasks" / name / "task_teacher", config.stage("task_teacher", name)
    for arm in arms:
        if "pretraining" in plan.method:
            yield arm / "pretraining", config.pretraining
        for name, seed, grid_point in itertools.product(plan.tasks, config.seeds, config.grid_points):
            place, labels = arm / "tasks" / name, config.stage("task_soft_labels", name, grid_point)
            if "task_lm" in plan.method:
                yield (
                    grid_point_place(place, lm_grid_point(grid_point), seed) / "task_lm",
                    config.stage("task_lm", name, grid_point),
                )
            yield grid_point_place(place, grid_point, seed) / "task_soft_labels", labels
            if config.controls.hard_labels and arm is root:
                yield grid_point_place(place, control_grid_point(grid_point), seed) / "hard_labels", labels


def grid_point_place(root: Path, grid_point: GridPoint, seed: int) -> Path:
    """The folder of a grid point and seed; without a sweep of the seed alone."""
    return root / grid_point_name(grid_point) / f"seed-{seed}"


def lm_grid_point(grid_point: GridPoint) -> GridPoint:
    """What the first pass has of a grid_point: grid points that differ in the second pass alone share the first."""
    return {key: value for key, value in grid_point.items() if key.startswith("task_lm.")}


def control_grid_point(grid_point: GridPoint) -> GridPoint:
    """What the control has of a grid_point: of the first pass but the number of updates."""
    return {
        key: value
        for key, value in grid_point.items()
        if key.startswith("task_soft_labels.") or key.partition(".")[2] in LENGTH_KEYS
    }


def control_budget(labels: StageConfig, words: StageConfig | None, num_examples: int, world_size: int) -> StageConfig:
    """The label stage with as many updates as both passes take on `num_examples`."""
    steps = sum(stage.steps(num_examples, world_size) for stage in (labels, words) if stage is not None)
    return replace(labels, max_steps=steps, num_train_epochs=None)
