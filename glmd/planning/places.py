"""Where the stages of a run lie in its folder, and which of them are still to come.

for place, settings in stage_places(plan): ...     # runs/NAME/tasks/RTE/seed-0/task_lm, ...
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from glmd.config import Cell, StageConfig, cell_name
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
            yield root / "tasks" / name / "teacher", config.stage("task_teacher", name)
    for arm in arms:
        if "pretraining" in plan.method:
            yield arm / "pretraining", config.pretraining
        for name, seed, cell in itertools.product(plan.tasks, config.seeds, config.cells):
            place, labels = arm / "tasks" / name, config.stage("task_soft_labels", name, cell)
            if "task_lm" in plan.method:
                yield cell_place(place, words_cell(cell), seed) / "words", config.stage("task_lm", name, cell)
            yield cell_place(place, cell, seed) / "labels", labels
            if config.controls.hard_labels and arm is root:
                yield cell_place(place, control_cell(cell), seed) / "hard_labels", labels


def cell_place(root: Path, cell: Cell, seed: int) -> Path:
    """The folder of a cell and seed; without a sweep of the seed alone."""
    return root / cell_name(cell) / f"seed-{seed}"


def words_cell(cell: Cell) -> Cell:
    """What the first pass has of a cell: cells that differ in the second pass alone share the first."""
    return {key: value for key, value in cell.items() if key.startswith("task_lm.")}


def control_cell(cell: Cell) -> Cell:
    """What the control has of a cell: of the first pass but the number of updates."""
    return {
        key: value
        for key, value in cell.items()
        if key.startswith("task_soft_labels.") or key.partition(".")[2] in LENGTH_KEYS
    }


def control_budget(labels: StageConfig, words: StageConfig | None, num_examples: int, world_size: int) -> StageConfig:
    """The label stage with as many updates as both passes take on `num_examples`."""
    steps = sum(stage.steps(num_examples, world_size) for stage in (labels, words) if stage is not None)
    return replace(labels, max_steps=steps, num_train_epochs=None)
