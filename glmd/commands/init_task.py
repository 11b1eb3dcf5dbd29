"""Look at a file of texts and labels, and write the YAML of its task beside it: `glmd init-task reviews.csv`."""

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from glmd.data.delimited import SEPARATORS
from glmd.data.tables import READ_FROM, ROW_SUFFIXES, Found, Place, open_split
from glmd.errors import ConfigError, DataError, counted, suggestion
from glmd.public import public
from glmd.storage import write_atomically, write_problem
from glmd.strict_yaml import dump_yaml
from glmd.task_files import PROBLEMS, VAL_FRACTION
from glmd.tasks.columns import MOST_LABELS, Columns, labels_in, task_of_columns
from glmd.tasks.examples import TaskExample, read_split
from glmd.tasks.labels import number_of
from glmd.tasks.tasks import ProblemType, Task

# Names of columns, the likeliest first.
TEXT_NAMES = ("text", "sentence", "body", "review", "content", "comment", "message", "document")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "stars", "rating", "score", "answer")
SHOWN = 20  # labels and columns in what is said
_NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")


@dataclass
class Column:
    """What stands in a column: filled fields, different values while they are few, and the lengths of texts."""

    name: str
    filled: int = 0
    values: Counter[str] | None = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    numbers: int = 0  # fields that hold one
    is_label: bool = True  # all values are text, whole numbers, true or false

    def add(self, value: Any) -> None:
        """Of a list each entry is a value, and all together are a text."""
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            return
        self.filled += 1
        self.numbers += number_of(value) is not None
        each = value if isinstance(value, list) else [value]
        self.is_label &= all(isinstance(entry, str | int) for entry in each)
        if any(isinstance(entry, str) and not _NUMBER.fullmatch(entry.strip()) for entry in each):
            self.lengths.append(len(" ".join(map(str, each))))
        if self.values is not None:
            self.values.update(str(entry)[:200] for entry in each)
            if len(self.values) > MOST_LABELS:
                self.values = None

    @property
    def may_be_label(self) -> bool:
        """Whether it has several values, of which each stands in two rows on average."""
        return self.is_label and self.values is not None and 2 <= len(self.values) <= self.filled / 2

    def described(self) -> str:
        different = f"more than {MOST_LABELS:,}" if self.values is None else f"{len(self.values):,}"
        text = f", texts of {self.length:,} characters in the median" if self.lengths else ""
        return f"{counted(self.filled, 'field')} filled, {different} different{text}"

    @property
    def length(self) -> int:
        return round(statistics.median(self.lengths))


@public
def init_task(
    file: str | Path,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    problem_type: str | None = None,
) -> str:
    """Write the YAML of the task that a file holds, beside it, and say what was seen. It never replaces a file.

    text, text_pair, label: names of columns. A second text is never guessed. The others are guessed where they are not
        given: the label among columns of which each value stands in two rows on average, the text among those of texts,
        by their names, else as the column of fewest values, and that of the longest texts.
    problem_type: as `tasks` has it; None for what the rows show, a list of labels or of words or one label.
    Raises GlmdError for a file that cannot be read, or is no task of this kind, by line.
    """
    file = Path(file)
    if file.suffix.lower() not in ROW_SUFFIXES:
        raise DataError(f"{file}: {READ_FROM}; convert it to one of them")
    output = file.with_suffix(".yaml")
    problem = "exists already; move it away" if output.exists() else write_problem(output.parent)
    if problem is not None:
        raise DataError(f"{output}: {problem}")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", file.stem).strip("._-") or "task"
    found = open_split(str(file), "train", Place(name))
    num_rows, columns = looked_at(found)
    if problem_type not in (None, *PROBLEMS):
        raise ConfigError(f"--problem-type {problem_type}: must be one of {', '.join(PROBLEMS)}")
    text_guesses, label_guesses = guesses(
        columns, str(file), text=text, text_pair=text_pair, label=label, problem_type=problem_type
    )
    of_task = Columns(text_guesses[0], label_guesses[0], text_pair)
    task = task_of_columns(name, of_task, str(file), problem_type=cast(ProblemType | None, problem_type))
    examples = read_split(task, str(file), "train", require_labels=True)  # as `glmd check` will
    answers = _answers(task, examples) if task.problem_type == "regression" else _labels(task, str(file), of_task)
    separated = f" separated by {SEPARATORS[found.texts.separator]}" if found.texts is not None else ""
    lines = [f"{file}: {counted(num_rows, 'row')}, {counted(len(columns), 'column')}{separated}"]
    lines += [f"  {column.name}: {column.described()}" for column in list(columns.values())[:SHOWN]]
    lines += [f"  ... and {len(columns) - SHOWN} columns more"] if len(columns) > SHOWN else []
    lengths = [len(first) + len(second or "") for example in examples for first, second in example.texts]
    lines += [
        chosen("text", text_guesses, text),
        *([f"text_pair: {text_pair}"] if text_pair else []),
        chosen("label", label_guesses, label),
        answers,
        f"{round(statistics.median(lengths)):,} characters of text in the median",
    ]
    lines = ["".join(letter if letter.isprintable() else " " for letter in line) for line in lines]
    write_atomically(output, "".join(f"# {line}\n" for line in lines) + dump_yaml(_values(task)))
    use = f"{{definition: {_quoted(output)}, train: {_quoted(file)}, val_fraction: {VAL_FRACTION}}}"
    return "\n".join([*lines, f"{output}: written. In a run: tasks: {{{name}: {use}}}"])


def _labels(task: Task, file: str, columns: Columns) -> str:
    is_several = task.problem_type == "multi_label_classification"
    counts = labels_in(file, columns, task.name, task.label_separator if is_several else None).counts
    kind = "" if task.has_one_answer else f"{task.problem_type}, "
    return f"{kind}{len(counts)} labels: {_listed([f'{each} ({number:,})' for each, number in counts])}"


def _answers(task: Task, examples: Sequence[TaskExample]) -> str:
    numbers = [each.label for each in examples if isinstance(each.label, float)]
    return f"{task.problem_type}, numbers from {min(numbers):g} to {max(numbers):g}"


def guesses(
    columns: Mapping[str, Column],
    file: str,
    *,
    text: str | None,
    text_pair: str | None,
    label: str | None,
    problem_type: str | None = None,
) -> tuple[list[str], list[str]]:
    """Columns for the text and for the label, the likeliest first; one that is given alone.

    Raises ConfigError naming the option for a column that is not there, and where none will do.
    """
    for option, given in (("--text", text), ("--text-pair", text_pair), ("--label", label)):
        if given is not None and given not in columns:
            raise ConfigError(f"{option} {given}: {file} has no such column{suggestion(given, columns)}")
    fitting = [each for each in columns.values() if each.may_be_label]
    if problem_type == "regression":
        fitting = [each for each in columns.values() if 0 < each.filled == each.numbers]
    label_guesses = [label] if label else _label_guesses(fitting, {text, text_pair})
    if not label_guesses:
        raise ConfigError(f"{file}: no column looks like labels; --label names it: {', '.join(columns)}")
    texts = [text] if text else text_guesses(columns, file, others={label_guesses[0], text_pair})
    return texts, label_guesses


def text_guesses(columns: Mapping[str, Column], file: str, *, others: set[str | None]) -> list[str]:
    """Columns for the text, the likeliest first, without the others. Raises ConfigError where none will do."""
    found = _text_guesses(columns.values(), others)
    if not found:
        raise ConfigError(f"{file}: no column looks like texts; --text names it: {', '.join(columns)}")
    return found


def looked_at(found: Found) -> tuple[int, dict[str, Column]]:
    """Number of rows, and what stands in each column."""
    columns = {name: Column(name) for name in found.texts.columns if name} if found.texts is not None else {}
    num_rows = 0
    for _, row in found.rows:
        num_rows += 1
        for name, value in row.items():
            columns.setdefault(name, Column(name)).add(value)
    return num_rows, columns


def _label_guesses(columns: Iterable[Column], others: set[str | None]) -> list[str]:
    fitting = [each for each in columns if each.name not in others]
    return [each.name for each in sorted(fitting, key=lambda each: (_place(each, LABEL_NAMES), len(each.values or ())))]


def _text_guesses(columns: Iterable[Column], others: set[str | None]) -> list[str]:
    """Columns of which most fields are texts."""
    fitting = [each for each in columns if each.name not in others and 2 * len(each.lengths) > each.filled]
    return [each.name for each in sorted(fitting, key=lambda each: (_place(each, TEXT_NAMES), -each.length))]


def _place(column: Column, names: Sequence[str]) -> int:
    name = column.name.casefold()
    return names.index(name) if name in names else len(names)


def chosen(key: str, guesses: Sequence[str], given: str | None) -> str:
    """What a column was chosen for, and which others there are."""
    if given is not None:
        return f"{key}: {given}"
    others = f"; --{key} may name {_listed(guesses[1:])} instead" if len(guesses) > 1 else ""
    return f"{key}: {guesses[0]}, a guess{others}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(each[:60] for each in names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _quoted(path: Path) -> str:
    """A path within braces of YAML."""
    return str(path) if re.fullmatch(r"[\w./-]+", str(path)) else json.dumps(str(path), ensure_ascii=False)


def _values(task: Task) -> dict[str, Any]:
    """The keys of the task's YAML."""
    values = {
        "name": task.name,
        "fields": list(task.fields),
        "text": task.text,
        "text_pair": task.text_pair,
        "labels": list(task.labels) or None,
        "label_field": task.label_field,
        "problem_type": None if task.has_one_answer else task.problem_type,
        "label_separator": task.label_separator if task.problem_type == "multi_label_classification" else None,
        "metrics": list(task.metrics),
        "max_length": task.max_length,
    }
    return {key: value for key, value in values.items() if value is not None}
