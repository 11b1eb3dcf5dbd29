"""Runs as rows of one table: their students, controls and teachers, with what each cost.

systems = systems_of(load_results(run), run, "kd")
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from glmd.errors import RunError
from glmd.reporting.comparison import Scored, System
from glmd.reporting.report import best_rows, final_rows

Kind = Literal["teacher", "method", "control", "constant"]
# In the folder of a stage: class ids on val, or positions of choices; what val was; and the metrics of resampled ones.
ANSWERS = "answers.json"
# Systems of a run that are not its students, and how a table calls them.
CONTROLS = {
    "hard labels": "hard labels from the same start",
    "full vocabulary": "full vocabulary",
    "trim only": "teacher trimmed, not trained",
    "trim after": "full vocabulary, trimmed after training",
}


def systems_of(
    results: Mapping[str, Any],
    run: Path,
    name: str,
    *,
    kind: Literal["method", "control"] = "method",
    with_teacher: bool = True,
    problems: Mapping[str, str] | None = None,
) -> list[System]:
    """The systems of a run: the student under `name`, its controls, and its teachers where they are wanted.

    problems: task -> why the student has no score on it.
    """
    rows = best_rows(results["rows"])
    scored = [row for row in final_rows(rows) if "metrics" in row]
    found = []
    called: str
    its_kind: Kind
    for system in dict.fromkeys(row["system"] for row in scored):
        called, its_kind = f"{name}: {CONTROLS.get(system, system)}", "control"
        if system == "student":
            called, its_kind = name, kind
        elif system.startswith("teacher"):
            if not with_teacher:
                continue
            called, its_kind = system, "teacher"
        found.append(
            System(
                called,
                its_kind,
                [each for row in scored if row["system"] == system for each in _scores(row, run)],
                method=next((str(row["method"]) for row in scored if row.get("method")), ""),
                examples={row["task"]: row["examples"] for row in scored if row["system"] == system},
                **_sizes(results, scored, system),
                **_budget(rows, system),
                glmd=str(results.get("glmd", "")),
                commit=next((str(row["commit"]) for row in scored if row.get("commit")), ""),
                folder=_folder(run, scored, system),
                problems=dict(problems or {}) if system == "student" else {},
            )
        )
    if with_teacher:
        found += _constant(scored)
    return found


def _scores(row: Mapping[str, Any], run: Path) -> list[Scored]:
    resampled = answers_of(run, row).get("resampled", {})
    return [
        Scored(row["task"], metric, row["seed"], value, tuple(resampled.get(metric, ())), row["stage"])
        for metric, value in row["metrics"].items()
    ]


def answers_of(run: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """ANSWERS of the stage of a row; empty where its run is older. Raises RunError where it is not what was written."""
    if "path" not in row:
        return {}
    place = run / row["path"]
    try:
        files = json.loads((place / "stage.json").read_text(encoding="utf-8"))["files"]
        if ANSWERS not in files:
            return {}
        raw = (place / ANSWERS).read_bytes()
        if hashlib.sha256(raw).hexdigest() != files[ANSWERS]["sha256"]:
            raise RunError(f"{place / ANSWERS} has changed; delete {place}, and the run makes it again")
        return dict(json.loads(raw))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"cannot be read ({type(error).__name__}: {error})"
        raise RunError(f"{place}: stage.json or {ANSWERS} {reason}; delete it, and the run makes it again") from None


def _folder(run: Path, scored: list[dict[str, Any]], system: str) -> Path | None:
    own = [row["path"] for row in scored if row["system"] == system and "path" in row]
    places = [run / path / name for path in own for name in ("student", "model")]
    return next((each for each in places if each.is_dir()), None)


def _constant(scored: list[dict[str, Any]]) -> list[System]:
    """The best answer to everything."""
    constants = {row["task"]: row for row in scored if "constant" in row}
    scores = [
        Scored(task, metric, 0, value) for task, row in constants.items() for metric, value in row["constant"].items()
    ]
    return [System("best constant answer", "constant", scores)] if scores else []


def _sizes(results: Mapping[str, Any], scored: list[dict[str, Any]], system: str) -> dict[str, Any]:
    """Of the models that are scored; of a teacher its language model's."""
    counts = [row["parameters"] for row in scored if row["system"] == system and "parameters" in row]
    counts = counts or [each for name, each in results["parameters"].items() if name == system]
    return {"parameters": counts[0]["total"], "vocabulary": counts[0]["vocabulary"]} if counts else {}


def _budget(rows: list[dict[str, Any]], system: str) -> dict[str, Any]:
    """Updates, tokens and seconds of all stages of one seed, of several tasks the sum."""
    if system.startswith("teacher"):
        return {}
    own = [row for row in rows if row["system"] == system]
    begun = {"hard labels": "student", "trim after": "full vocabulary"}.get(system)  # from what it begins
    own += [row for row in rows if row["system"] == begun and (row["task"] is None or system == "trim after")]
    seed = min((row["seed"] for row in own), default=0)
    first = [row for row in own if row["seed"] == seed or row["task"] is None]
    budgets = [row["budget"] for row in first if "budget" in row]
    return {
        "updates": sum(each["updates"] for each in budgets),
        "tokens": sum(each["tokens_at_most"] for each in budgets),
        "seconds": round(sum(row.get("seconds", 0.0) for row in first), 1),
    }
