"""The metrics of a task for users of `evaluate`, without the hub: the code is here and nothing is fetched.

metric = SuperGlueMetric("MultiRC")
metric.add_batch(predictions=logits.argmax(-1), references=metric.references(examples))
metric.compute()    # {"f1_binary": 0.71, "group_exact_match": 0.24}
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import datasets
import evaluate

from glmd.errors import ConfigError
from glmd.evaluation.metrics import METRICS, require_metrics, score
from glmd.tasks.examples import TaskExample
from glmd.tasks.tasks import Task, load_task

HINTS = get_type_hints(TaskExample)
TYPES = {HINTS["label"]: datasets.Value("int64"), tuple[str, ...]: datasets.List(datasets.Value("string"))}


def _type(field: str) -> Any:
    """How `evaluate` keeps a field of the examples: numbers and lists as they are, all else as text."""
    return TYPES.get(HINTS[field], datasets.Value("string"))


class SuperGlueMetric(evaluate.Metric):
    """glmd.evaluation.metrics.score as an `evaluate.Metric`.

    task: a name of `task_names()`, the YAML at a path, or a Task. settings: those of `evaluate.Metric`, such as
    `keep_in_memory`, `num_process` and `process_id`.
    A prediction is a class id, or the position of the chosen candidate. A reference is the label alone where the
    task's metrics read no more; otherwise a dict of what they read: label, group (any text that members of a group
    share), choices and answers. `references` makes them from examples.
    """

    def __init__(self, task: str | Path | Task, **settings: Any) -> None:
        self.task = task if isinstance(task, Task) else load_task(task)
        require_metrics(self.task)
        if not self.task.has_one_answer:
            raise ConfigError(f"{self.task.name}: its answers are no classes; score takes them")
        self.fields = tuple(dict.fromkeys(field for name in self.task.metrics for field in METRICS[name].fields))
        if self.task.choices_from and not self.task.labels and "choices" not in self.fields:
            self.fields += ("choices",)  # their number differs, and a prediction is checked against it
        super().__init__(config_name=self.task.name, **settings)

    def references(self, examples: Sequence[TaskExample]) -> list[Any]:
        """One reference for each example, of the form that this task's metrics read."""
        rows = [{field: getattr(example, field) for field in self.fields} for example in examples]
        if self.fields == ("label",):
            return [row["label"] for row in rows]
        texts = [field for field in self.fields if HINTS[field] not in TYPES]
        return [row | {field: str(row[field]) for field in texts if row[field] is not None} for row in rows]

    def _info(self) -> evaluate.MetricInfo:
        references = _type("label") if self.fields == ("label",) else {field: _type(field) for field in self.fields}
        return evaluate.MetricInfo(
            description=f"The metrics of {self.task.name}: {', '.join(self.task.metrics)}.",
            citation="arXiv:1905.00537",
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": references}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[Any]) -> dict[str, float]:
        return score(self.task, predictions, [self._example(i, each) for i, each in enumerate(references)])

    def _example(self, example_id: int, reference: Any) -> TaskExample:
        given = {"label": reference} if self.fields == ("label",) else reference
        read: dict[str, Any] = {"label": None}
        read |= {field: tuple(value) if isinstance(value, list) else value for field, value in given.items()}
        # The texts are gone; their number says how many candidates there are.
        texts = (("", None),) * (len(read.get("choices", ())) or len(self.task.choices) or 1)
        return TaskExample(example_id, texts, **read)
