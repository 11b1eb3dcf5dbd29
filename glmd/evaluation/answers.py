"""A file's own rows with a model's answers beside them, as .csv or .tsv.

table = require_answerable(task, "new.csv", Path("answers.csv"))
write_answers(task, logits, examples, table, Path("answers.csv"))
"""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from glmd.data.delimited import Delimited, open_delimited
from glmd.data.tables import TEXT_SUFFIXES
from glmd.errors import DataError
from glmd.storage import write_atomically
from glmd.tasks.examples import TaskExample
from glmd.tasks.tasks import Task


def added(task: Task) -> tuple[str, ...]:
    """The columns that answers are written to. A number is sure of nothing."""
    return ("prediction",) if task.problem_type == "regression" else ("prediction", "score")


def require_answerable(task: Task, file: str, output: Path) -> Delimited:
    """The file, with its header read. Refuses one whose rows cannot be written with answers beside them."""
    if Path(file).suffix.lower() not in TEXT_SUFFIXES:
        raise DataError(f"--output {output}: is for the rows of a .csv or .tsv file, not of {file}; give a .jsonl")
    if task.is_choice or task.rows != "flat" or task.problem_type == "token_classification":
        raise DataError(f"--output {output}: a row of {task.name} is not one text with one label; give a .jsonl")
    table = open_delimited(file)
    for name in added(task):
        if name in table.columns:
            raise DataError(f"{file}:{table.line}: column {name!r} is what answers are written to; rename it")
    return table


def write_answers(
    task: Task, logits: np.ndarray, examples: Sequence[TaskExample], table: Delimited, output: Path
) -> None:
    """Write every row of the file with the likeliest label and its probability, by the separator of the output's name.

    Of several labels all that are likelier than not, and their probabilities, as the task's files separate them; of a
    number itself. logits: (examples, C). The rows are found by the lines that the examples were read from.
    """
    columns = _columns(task, logits.astype(np.float64))
    answers = {example.where: row for example, row in zip(examples, columns, strict=True)}
    text = io.StringIO()
    is_alike = output.suffix.lower() == table.path.suffix.lower()
    separator = table.separator if is_alike else "\t" if output.suffix.lower() == ".tsv" else ","
    writer = csv.writer(text, delimiter=separator, lineterminator="\n")
    writer.writerow([*table.columns, *added(task)])
    for line, record in table.records():
        writer.writerow([*record, *answers[f"{table.path}:{line}"]])
    write_atomically(output, text.getvalue())


def _columns(task: Task, logits: np.ndarray) -> Iterator[tuple[str, ...]]:
    """What stands in the added columns of each example."""
    if task.problem_type == "regression":
        yield from ((f"{value:.6g}",) for value in logits[:, 0])
        return
    decisions = logits.reshape(len(logits), -1, task.num_classes)
    scores = np.exp(decisions - decisions.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    if task.problem_type == "multi_label_classification":
        for yes in scores[..., 1]:
            given = np.flatnonzero(yes > 0.5)
            names = [str(task.labels[i]) for i in given]
            yield task.label_separator.join(names), task.label_separator.join(f"{yes[i]:.6f}" for i in given)
        return
    for row in scores[:, 0]:
        yield str(task.labels[row.argmax()]), f"{row.max():.6f}"
