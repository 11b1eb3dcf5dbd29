"""What the card of a model tells of its task, so that the model is used without naming the task again.

facts = facts_of(task)                                   # {"task": "reviews", "text": '"{body}"', ...}
task = told_task(facts, classes=["1", "5"])              # None where the card tells too little
"""

import json
import string
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from glmd.errors import ConfigError
from glmd.tasks.columns import MAX_LENGTH, METRICS_OF, Columns
from glmd.tasks.tasks import SENTENCES, ProblemType, Task, load_task, task_names

# What a task is asked with beside its name; one that uses other keys is told by the name alone.
_TOLD = (
    *("name", "fields", "text", "text_pair", "labels", "label_field", "metrics", "max_length"),
    *("problem_type", "label_fields", "label_separator"),
)


def facts_of(task: Task) -> dict[str, str]:
    """Facts for a card: the task's name, and how it reads a row where it is none that comes with glmd."""
    facts = {"task": task.name}
    if task.problem_type == SENTENCES:
        return facts | ({"prompt": _line(task.prompt)} if task.prompt else {})
    plain = None if task.is_choice else Task(**{key: getattr(task, key) for key in _TOLD})
    if task != plain or (task.name in task_names() and load_task(task.name) == task):
        return facts
    facts["text"] = _line(task.text)
    if task.text_pair is not None:
        facts["text_pair"] = _line(task.text_pair)
    facts |= {"label": _line(task.label_field), "metrics": ", ".join(task.metrics)}
    if not task.has_one_answer:
        facts |= {"problem_type": task.problem_type}
    if task.problem_type == "multi_label_classification":
        facts |= {"label_fields": _line(task.label_fields), "label_separator": _line(task.label_separator)}
    # Names of classes are text; what stands in the rows may be numbers or true and false.
    return facts if all(isinstance(each, str) for each in task.labels) else facts | {"labels": _line(task.labels)}


def told_task(facts: Mapping[str, str], classes: Sequence[str]) -> Task | None:
    """The task of a card, or None. classes: names of the model's. Raises ConfigError for facts that are no task."""
    name = facts.get("task", "")
    if "text" not in facts:
        return load_task(name) if name in task_names() else None
    try:
        keys = ("text", "text_pair", "label", "labels", "label_fields", "label_separator")
        told = {key: json.loads(facts[key]) for key in keys if key in facts}
        problem: Any = facts.get("problem_type", "single_label_classification")
        if problem not in get_args(ProblemType):
            raise ValueError(f"problem_type {problem}")
        templates = str(told["text"]), str(told.get("text_pair") or "")
        fields = [field for each in templates for _, field, _, _ in string.Formatter().parse(each) if field]
        return Task(
            name,
            tuple(dict.fromkeys(fields)),
            templates[0],
            tuple(facts.get("metrics", "accuracy").split(", ")),
            MAX_LENGTH,  # its card has the length of its own
            labels=() if problem == "regression" else tuple(told.get("labels", classes)),
            text_pair=told.get("text_pair"),
            label_field=told.get("label", "label"),
            problem_type=problem,
            label_fields=tuple(told.get("label_fields", ())),
            label_separator=told.get("label_separator", "|"),
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"its card tells a task that cannot be read ({error}); mend it, or give --task") from None


def task_of_classes(
    classes: Sequence[str], text: str, text_pair: str | None, problem_type: ProblemType | None = None
) -> Task:
    """The task of a classifier that reads columns of these names. problem_type: as its config tells, if it does."""
    # No file that answers are written to has a column of this name: whatever labels its rows have are not looked at.
    columns = Columns(text, "prediction", text_pair)
    pair = None if text_pair is None else f"{{{text_pair}}}"
    problem: ProblemType = problem_type or "single_label_classification"
    labels = () if problem == "regression" else tuple(classes)
    options: dict[str, Any] = {"labels": labels, "text_pair": pair, "label_field": columns.label}
    metrics = METRICS_OF.get(problem, ("accuracy",))
    return Task("texts", columns.texts, f"{{{text}}}", metrics, MAX_LENGTH, problem_type=problem, **options)


def _line(value: Any) -> str:
    """JSON on one line, in the letters themselves where they end none."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text.splitlines()) == 1 else json.dumps(value)
