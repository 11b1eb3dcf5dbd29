"""The answer that a row of a task has: a class, several labels, a number, or a label for each word.

    label = label_in(task, row, "reviews.csv:7", require_labels=True)     # 2, (0, 1, 1), 3.5, or (0, 3, 4) of words

None for a row without one. What is there and is no answer of the task is refused by place and field.
"""

import ast
import math
import re
from decimal import Decimal
from typing import Any

from glmd.errors import DataError, suggestion
from glmd.tasks.tasks import Label, Task, _is_given, _listed, _shown, label_of_text

Answer = int | float | tuple[int, ...]


def label_in(task: Task, row: dict[str, Any], where: str, *, require_labels: bool) -> Answer | None:
    """Of a class its id, of a choice its position, of several labels 0 or 1 for each, of a number itself, of words the
    id of each one's label. Raises DataError naming place and field."""
    if task.label_fields:
        return _of_columns(task, row, where, require_labels)
    label = row.get(task.label_field)
    # -1 is a number like others.
    is_given = label is not None if task.problem_type == "regression" else _is_given(label)
    # Of several labels an empty field of a file of texts says that none is right.
    if not is_given or (task.problem_type == "regression" and isinstance(label, str) and not label.strip()):
        if require_labels:
            raise DataError(f"{where}: field {task.label_field!r} must be {_wanted(task)}; the row has none")
        return None
    if task.problem_type == "regression":
        return _number(task, label, where)
    if task.problem_type == "multi_label_classification":
        return _set(task, label, where)
    if task.problem_type == "token_classification":
        words = row.get(task.fields[0])
        if not isinstance(label, list) or not isinstance(words, list) or len(label) != len(words):
            found = (
                f"{len(label)} for {len(words)} words" if isinstance(label, list) and isinstance(words, list) else ""
            )
            raise DataError(
                f"{where}: field {task.label_field!r} must list a label for each word; got {found or _shown(label)}"
            )
        return tuple(class_id(task, task.labels, each, where) for each in label)
    return class_id(task, task.labels or tuple(range(len(task.choices))), label, where)


def class_id(task: Task, known: tuple[Label, ...], label: Any, where: str) -> int:
    """The place of a label among those that are known."""
    for number, each in enumerate(known):
        if type(label) is type(each) and label == each:
            return number
    got = f"got {_shown(label)}" if _is_given(label) else "the row has none"
    raise DataError(f"{where}: field {task.label_field!r} must be one of {_listed(known)}; {got}")


def is_written_list(value: Any) -> bool:
    """Whether a field is a list as Python writes it, which is what pandas makes of one in a .csv."""
    return isinstance(value, str) and re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL) is not None


def listed_labels(text: str, separator: str) -> list[str]:
    """The labels that a field of a file of texts lists: as Python or JSON writes a list, or between separators."""
    if is_written_list(text):
        try:
            found = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found = None
        if isinstance(found, list) and all(isinstance(each, str | int) for each in found):
            return [str(each).strip() for each in found]
    return [each.strip() for each in text.split(separator) if each.strip()]


def number_of(value: Any) -> float | None:
    """A number, or the text of one; None for what is none that a loss could be taken of."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\s*", value, re.ASCII | re.I):
        value = float(value)
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    # Beyond that the square of an error is not finite in float32.
    return float(value) if is_number and math.isfinite(value) and abs(value) < 1e15 else None


def _wanted(task: Task) -> str:
    wanted = {
        "regression": "a number",
        "multi_label_classification": f"a list of {_listed(task.labels)}",
        "token_classification": "a list of labels, one for each word",
    }
    return wanted.get(task.problem_type) or f"one of {_listed(task.labels or tuple(range(len(task.choices))))}"


def _number(task: Task, label: Any, where: str) -> float:
    number = number_of(label)
    if number is None:
        raise DataError(f"{where}: field {task.label_field!r} must be a number, got {_shown(label)}")
    return number


def _set(task: Task, label: Any, where: str) -> tuple[int, ...]:
    if isinstance(label, str):  # a field of a file of texts
        found = [label_of_text(task.labels, each) for each in listed_labels(label, task.label_separator)]
    elif isinstance(label, list):
        found = label
    else:
        raise DataError(f"{where}: field {task.label_field!r} must be a list of labels, got {_shown(label)}")
    ids = {class_id(task, task.labels, each, where) for each in found}
    return tuple(int(i in ids) for i in range(len(task.labels)))


def _of_columns(task: Task, row: dict[str, Any], where: str, require_labels: bool) -> tuple[int, ...] | None:
    """Of a field for each label, which all rows have or none."""
    missing = [name for name in task.label_fields if row.get(name) is None or str(row[name]).strip() in ("", "-1")]
    if len(missing) == len(task.label_fields) and not require_labels:
        return None
    if missing:
        hint = suggestion(missing[0], map(str, row)) if missing[0] not in row else ""
        raise DataError(f"{where}: field {missing[0]!r} must be 0 or 1; the row has none{hint}")
    marks = []
    for name in task.label_fields:
        mark = {"0": 0, "1": 1, "false": 0, "true": 1, "0.0": 0, "1.0": 1}.get(str(row[name]).strip().casefold())
        if mark is None:
            raise DataError(f"{where}: field {name!r} must be 0 or 1, got {_shown(row[name])}")
        marks.append(mark)
    return tuple(marks)
