"""Prediction files in the form of the SuperGLUE leaderboard, one JSON object a line, and its average.

    write_predictions(load_task("RTE"), [0, 1, ...], examples, "RTE.jsonl")

The leaderboard wants one file for each task, named like its folder (BoolQ.jsonl, AX-b.jsonl, ...).
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from glmd.errors import DataError, suggestion
from glmd.storage import write_atomically
from glmd.tasks.examples import TaskExample
from glmd.tasks.tasks import Label, Task

# The form is what jiant, the benchmark's own toolkit, writes and its authors uploaded: `super_glue_format_preds` of
# jiant/tasks/lib/*.py, and before that `_write_*_preds` of jiant/evaluate.py. Truth values are words there, with a
# capital in WSC and without one in BoolQ and WiC; answers of MultiRC and COPA are numbers; ReCoRD's is the entity.

logger = logging.getLogger(__name__)

# The tasks of the benchmark, and how many metrics each has there (arXiv:1905.00537, table 1). Its two diagnostic
# sets, AX-b and AX-g, do not enter the average.
SUPERGLUE = {"BoolQ": 1, "CB": 2, "COPA": 1, "MultiRC": 2, "ReCoRD": 2, "RTE": 1, "WiC": 1, "WSC": 1}

_IDX_PARTS = {"multirc": ("paragraph", "question", "answer"), "record": ("query",)}


def write_predictions(task: Task, predictions: ArrayLike, examples: Sequence[TaskExample], path: str | Path) -> None:
    """Write the predictions for a split that was read without `training`.

    predictions: (B,) class ids, or positions of the chosen candidates, in the order of the examples; of tasks with
        other answers what `answers_of` gives.
    Rows of which none has an idx are known by their number, from 0.
    Raises DataError for an example without idx beside others, or with another's, and for a prediction that is no class
    or candidate.
    """
    chosen = np.asarray(predictions)
    if not task.has_one_answer:
        examples = with_idx(task, examples)
        require_idx(task, examples)
        answers = zip(examples, chosen, strict=True)
        rows = [{"idx": each.idx, "label": _answer(task, row, each)} for each, row in answers]
        write_atomically(Path(path), "".join(json.dumps(row) + "\n" for row in rows))
        return
    if chosen.shape != (len(examples),):
        raise ValueError(f"{len(examples)} examples need as many predictions in one row; got shape {chosen.shape}")
    if chosen.size and chosen.dtype.kind not in "iu":
        raise DataError(f"predictions must be one row of class ids or positions, got {chosen.dtype}")
    examples = with_idx(task, examples)
    require_idx(task, examples)
    for example, prediction in zip(examples, chosen.tolist(), strict=True):
        count = len(task.labels) or len(example.choices)
        if not 0 <= prediction < count:
            found = f"prediction {prediction} for idx {json.dumps(example.idx)}"
            raise DataError(f"{task.name}: {found}, which has {count} possible answers")
    as_rows = _multirc_rows if task.rows == "multirc" else _flat_rows
    rows = as_rows(task, chosen.tolist(), examples)
    write_atomically(Path(path), "".join(json.dumps(row) + "\n" for row in rows))


def _answer(task: Task, prediction: Any, example: TaskExample) -> Any:
    """A number, the labels that are given, or the label of each word; null for a word that the model has not read."""
    if task.problem_type == "regression":
        return float(prediction)
    if task.problem_type == "multi_label_classification":
        return [label for label, is_given in zip(task.labels, prediction, strict=True) if is_given]
    read = [*prediction[: len(example.words)].tolist(), *[-1] * len(example.words)][: len(example.words)]
    return [task.labels[each] if each >= 0 else None for each in read]


def with_idx(task: Task, examples: Sequence[TaskExample]) -> list[TaskExample]:
    """The examples as they are, or with the numbers of their rows from 0 where no row has an idx.

    Raises DataError where the form of the answers needs more than a number.
    """
    if any(example.idx is not None for example in examples):
        return list(examples)
    parts = _IDX_PARTS.get(task.rows, ())
    if parts and examples:
        named = ", ".join(map(repr, parts))
        raise DataError(
            f"{_where(task, examples[0])}: field 'idx' is missing; the answers of {task.name} are written by its parts "
            f"{named}, which a row's number does not tell: give the rows as the official file or the hub has them"
        )
    logger.info("%s: no row has an idx; answers are given by the number of the row, from 0", task.name)
    return [replace(example, idx=number) for number, example in enumerate(examples)]


def _where(task: Task, example: TaskExample) -> str:
    return example.where or f"{task.name} example {example.example_id}"


def require_idx(task: Task, examples: Sequence[TaskExample]) -> None:
    """Refuse examples without an idx of their own, and an idx that has not its form's parts."""
    first_of: dict[str, TaskExample] = {}
    for example in examples:
        where = _where(task, example)
        if example.idx is None:
            raise DataError(
                f"{where}: field 'idx' is missing, by which the leaderboard knows a row; give it to all rows or to none"
            )
        for part in _IDX_PARTS.get(task.rows, ()):
            if not isinstance(example.idx, dict) or part not in example.idx:
                raise DataError(f"{where}: field 'idx' must have {part!r}, got {json.dumps(example.idx)[:60]}")
        idx = json.dumps(example.idx, sort_keys=True)
        before = first_of.setdefault(idx, example)
        if before is not example:
            twin = before.where or f"example {before.example_id}"
            raise DataError(f"{where}: idx {idx} stands in {twin} too; the leaderboard wants one prediction for each")


def _flat_rows(task: Task, chosen: list[int], examples: Sequence[TaskExample]) -> list[dict[str, Any]]:
    rows = []
    for prediction, example in zip(chosen, examples, strict=True):
        if task.rows == "record":
            rows.append({"idx": example.idx["query"], "label": example.choices[prediction]})
        else:
            rows.append(
                {"idx": example.idx, "label": _word(task, task.labels[prediction]) if task.labels else prediction}
            )
    return rows


def _word(task: Task, label: Label) -> Label:
    if isinstance(label, bool):
        return str(label) if task.rows == "wsc" else str(label).lower()
    return label


def _multirc_rows(task: Task, chosen: list[int], examples: Sequence[TaskExample]) -> list[dict[str, Any]]:
    """Nested like the official file: a line is a paragraph, in the order of the examples."""
    paragraphs: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for prediction, example in zip(chosen, examples, strict=True):
        questions = paragraphs.setdefault(example.idx["paragraph"], {})
        answer = {"idx": example.idx["answer"], "label": task.labels[prediction]}
        questions.setdefault(example.idx["question"], []).append(answer)
    return [
        {"idx": paragraph, "passage": {"questions": [{"idx": q, "answers": a} for q, a in questions.items()]}}
        for paragraph, questions in paragraphs.items()
    ]


def superglue_average(scores: Mapping[str, Mapping[str, float]]) -> tuple[float, list[str]]:
    """(mean over the tasks that are given, names of the benchmark's tasks that are not).

    scores: task -> metric -> fraction. A task's two metrics are averaged first. The mean is the benchmark's
    own only where no task is missing: show the missing ones beside it.
    """
    if not scores:
        raise DataError("SuperGLUE average: no scores are given")
    for task, metrics in scores.items():
        if task not in SUPERGLUE:
            raise DataError(f"SuperGLUE average: {task!r} is no task of it{suggestion(task, SUPERGLUE)}")
        if len(metrics) != SUPERGLUE[task]:
            names = ", ".join(metrics) or "none"
            raise DataError(f"SuperGLUE average: {task} has {SUPERGLUE[task]} metrics there; got {names}")
        for name, value in metrics.items():
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise DataError(f"SuperGLUE average: {task} {name} must be a fraction in [0, 1], got {value}")
    means = [sum(metrics.values()) / len(metrics) for metrics in scores.values()]
    return sum(means) / len(means), [task for task in SUPERGLUE if task not in scores]
