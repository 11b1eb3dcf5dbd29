"""Where the stages of a run lie in its folder, and which of them are still to come.

for place, settings in stage_places(plan): ...     # runs/NAME/tasks/RTE/seed-0/words, ...
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

from glmd.config import Cell, StageConfig, cell_name
from glmd.errors import RunError
from glmd.plan import Plan
from glmd.run_folder import begun_with, is_complete

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
            place, labels = arm / "tasks" / name, config.stage("task_labels", name, cell)
            if "task_words" in plan.method:
                yield cell_place(place, words_cell(cell), seed) / "words", config.stage("task_words", name, cell)
            yield cell_place(place, cell, seed) / "labels", labels
            if config.controls.hard_labels and arm is root:
                yield cell_place(place, control_cell(cell), seed) / "hard_labels", labels


def cell_place(root: Path, cell: Cell, seed: int) -> Path:
    """The folder of a cell and seed; without a sweep of the seed alone."""
    return root / cell_name(cell) / f"seed-{seed}"


def words_cell(cell: Cell) -> Cell:
    """What the first pass has of a cell: cells that differ in the second pass alone share the first."""
    return {key: value for key, value in cell.items() if key.startswith("task_words.")}


def control_cell(cell: Cell) -> Cell:
    """What the control has of a cell: of the first pass but the number of updates."""
    return {
        key: value
        for key, value in cell.items()
        if key.startswith("task_labels.") or key.partition(".")[2] in LENGTH_KEYS
    }


def require_shareable(plan: Plan, begun: int, processes: int) -> None:
    """Refuse a number of processes that cannot share the steps which `begun` of them would have made.

    Stages that are complete are not asked. Raises ConfigError.
    """
    for stage in _to_come(plan):
        stage.spread(begun, processes)


def processes_of(plan: Plan, launched: int | None) -> tuple[int, list[str]]:
    """The number of processes that the plan's batch sizes speak of, and what to say of others.

    launched: by whom this was asked; None where it was not launched. Raises GlmdError where a run so launched would.
    """
    config = plan.config
    begun = begun_with(Path(config.output_dir))
    if begun is None:
        require_shareable(plan, launched or 1, launched or 1)
        return launched or 1, []
    number, sharding = begun
    how = f"processes the run was begun with {number}" + (f", by {sharding}" if sharding else "")
    if not config.elastic:
        if launched not in (None, number):
            found = f"output_dir {config.output_dir} was begun with {number} processes, not {launched}"
            raise RunError(f"{found}; launch {number}, or give elastic: true")
        return number, [f"{how}, and goes on with as many"]
    require_shareable(plan, number, launched or number)
    # Every step of every stage has to be shared out evenly.
    steps = [stage.gradient_accumulation_steps * number for stage in _to_come(plan)]
    others = [str(each) for each in range(1, math.gcd(*steps) + 1) if math.gcd(*steps) % each == 0]
    return number, [f"{how}, and goes on with {', '.join(others)}" if steps else f"{how}, and is complete"]


def _to_come(plan: Plan) -> list[StageConfig]:
    return [stage for place, stage in stage_places(plan) if not is_complete(place)]
