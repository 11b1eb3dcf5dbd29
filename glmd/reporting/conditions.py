"""Under which conditions a run's students were made: what a comparison needs to be the same for all.

    differing({"glmd": conditions(run, results), "kd": conditions(other, theirs)})
    # {"RTE: fine-tuned teacher": {"glmd": "0a1b2c3d", "kd": "4e5f6071"}}

Read from the records of its stages, which hold fingerprints of all that a stage was made from.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glmd.errors import RunError

# Of the records of stages: what is meant by an entry, by the kind of stage.
_OF_ALL = {
    "tokenizer": "tokenizer",
    "processes": "number of processes",
    "mixed_precision": "mixed_precision",
    "teacher_dtype": "teacher.dtype",
    "teacher.quantization": "teacher.quantization",
    "teacher_mass": "vocabulary.teacher_mass",
    "vocabulary": "vocabulary",
    "selection": "selection",
}
_OF_TASK = {"data": "data", "classifier": "fine-tuned teacher"}
Conditions = dict[str, Any]


def conditions(run: Path, results: Mapping[str, Any]) -> Conditions:
    """Name -> what it was: hashes, numbers, words. results: of the run. Raises RunError for a damaged record."""
    found: Conditions = {"glmd": results.get("glmd", "")}
    for row in results["rows"]:
        if row["system"] != "student" or "path" not in row:
            continue
        inputs = _inputs(run / row["path"])
        task = row["task"]
        found |= {what: inputs[key] for key, what in _OF_ALL.items() if inputs.get(key) is not None and task}
        if task is None:
            found |= {"corpus": inputs.get("tokens"), "teacher": inputs.get("teacher")}
            found["updates on the corpus"] = row.get("budget", {}).get("updates", 0)
            continue
        found |= {f"{task}: {what}": inputs[key] for key, what in _OF_TASK.items() if inputs.get(key) is not None}
        found["teacher"] = inputs.get("teacher")
    for task, updates in task_updates(results).items():
        found[f"{task}: updates"] = updates
    return found


def task_updates(results: Mapping[str, Any]) -> dict[str, list[int]]:
    """Task -> how many updates a student had on it, of all its stages; several numbers where they differ by seed."""
    sums: dict[tuple[str, int, str], dict[str, int]] = {}
    for row in results["rows"]:
        if row["system"] == "student" and row["task"] is not None and "budget" in row:
            point = json.dumps(row.get("grid_point", {}))
            sums.setdefault((row["task"], row["seed"], point), {})[row["stage"]] = row["budget"]["updates"]
    found: dict[str, set[int]] = {}
    for (task, _, _), stages in sums.items():
        found.setdefault(task, set()).add(sum(stages.values()))
    return {task: sorted(each) for task, each in found.items()}


def differing(by_run: Mapping[str, Conditions]) -> dict[str, dict[str, str]]:
    """Condition -> name of the run -> what it was, shortened; of those that not all runs have alike.

    A run without one, as of a method that has no pretraining, differs only in what all others have otherwise.
    """
    names: Sequence[str] = list(dict.fromkeys(key for each in by_run.values() for key in each))
    found = {}
    for name in names:
        values = {run: each[name] for run, each in by_run.items() if each.get(name) is not None}
        if len({json.dumps(value) for value in values.values()}) > 1:
            found[name] = {run: _short(value) for run, value in values.items()}
    return found


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " or ".join(map(str, value))
    return value[:8] if isinstance(value, str) and len(value) == 64 else str(value)


def _inputs(place: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((place / "stage.json").read_text(encoding="utf-8"))["inputs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"cannot be read ({type(error).__name__}: {error})"
        raise RunError(f"{place / 'stage.json'}: {reason}; delete {place}, and the run makes it again") from None
