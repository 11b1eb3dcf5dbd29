"""The rows of results.json: what a stage found, with what it is called in the table."""

from typing import Any

from glmd.config import RunConfig
from glmd.evaluation.metrics import constant_answers, score
from glmd.planning.stages import Stage
from glmd.reporting.report import NEAREST


def row_of(config: RunConfig, stage: Stage, result: dict[str, Any], processes: int) -> dict[str, Any]:
    """The row of a stage that leaves a model. processes: that its batch size speaks of."""
    planned = stage.task
    of: dict[str, Any] = {"method": config.method, "path": stage.path}
    if stage.settings is not None:
        steps = stage.settings.steps(len(stage.examples), processes)
        tokens = steps * stage.settings.global_batch_size(processes) * stage.length
        of["budget"] = {"updates": steps, "tokens_at_most": tokens}
    if planned is None:
        return {"system": stage.system, "stage": "pretraining", "task": None, "seed": stage.seed, **of, **result}
    task = planned.task
    row = {"system": stage.system, "task": task.name, "stage": stage.kind, "seed": stage.seed, "split": "val", **of}
    row |= {"casting": task.casting, "selection": selection_of(config, stage)}
    row |= {"grid_point": stage.grid_point} | result if stage.grid_point else result
    if planned.is_scored:
        constants = [score(task, answers, planned.val) for answers in constant_answers(task, planned.val)]
        row["constant"] = {name: max(each[name] for each in constants) for name in task.metrics}
    if _learns_from_teacher(stage) and planned.has_own_inputs:
        labeled = sum(example.label is not None for example in planned.inputs)
        row["inputs"] = {"examples": len(planned.inputs), "labeled": labeled}
    return row


def selection_of(config: RunConfig, stage: Stage) -> str:
    """How the checkpoint of a stage was chosen, in words."""
    if config.selection == "agreement" and _learns_from_teacher(stage):
        return NEAREST
    return "best on val" if config.selection == "best" else "last"


def _learns_from_teacher(stage: Stage) -> bool:
    return not stage.trains_teacher and not stage.is_control
