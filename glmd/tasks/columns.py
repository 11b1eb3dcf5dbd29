"""A task without a YAML: columns of a file, with the labels that stand there.

task = task_of_columns("reviews", Columns("body", label="stars"), "reviews.csv")
train, val = hold_out(examples, 0.1, seed=0)
"""

import hashlib
import logging
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from glmd.data.tables import Place, open_split
from glmd.errors import ConfigError, DataError
from glmd.tasks.examples import TaskExample
from glmd.tasks.tasks import RESERVED, Label, Task, _is_given, _listed, _number_text, _shown, label_of_text

MOST_LABELS = 1000
MAX_LENGTH = 256  # tokens of an example, where the stage says nothing, as in the tasks that come with glmd
UNBALANCED = 2  # times as many rows of the most frequent label as of the rarest; more, and F1 is scored too

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """Names of a file's columns, or of the fields of its rows. Raises ConfigError for one that no template can hold."""

    text: str
    label: str
    text_pair: str | None = None

    def __post_init__(self) -> None:
        for name in self.texts:
            if name in RESERVED or name.isdecimal() or re.search(r"[][{}.!:]", name):
                raise ConfigError(f"column {name!r} cannot stand in a task's template; rename it in the file")

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,) if self.text_pair is None else (self.text, self.text_pair)


@dataclass(frozen=True)
class Labels:
    """The labels of a file, each with the number of its rows. spellings: other forms that are read as one of them."""

    counts: tuple[tuple[Label, int], ...]
    spellings: tuple[tuple[Label, Label], ...] = ()
    are_texts: bool = False

    @property
    def labels(self) -> tuple[Label, ...]:
        return tuple(label for label, _ in self.counts)


def labels_in(source: str, columns: Columns, name: str) -> Labels:
    """The labels that stand in the rows of a file, in order: numbers by size, then texts. Rows without one are skipped.

    In a file of texts 5 and 5.0, or good and Good, are one label, spelled as it is most often.
    Raises DataError for columns that are not there, for more than 1,000 labels and for what can be none.
    """
    found = open_split(source, "train", Place(name))
    if found.texts is not None:
        found.texts.require([*columns.texts, columns.label])
    names = found.class_names.get(columns.label)
    rows: dict[str, int] = defaultdict(int)  # by what tells labels apart: 1, true and "1" are equal keys or hashes
    labels: dict[str, Label] = {}
    for where, row in found.rows:
        label: Any = row.get(columns.label)
        if found.texts is not None:
            label = label.strip() or None
        elif found.is_table and isinstance(label, float):  # pandas makes numbers of a column with gaps such
            label = None if math.isnan(label) else int(label) if label.is_integer() else label
        if not _is_given(label):
            continue
        if names is not None and type(label) is int and 0 <= label < len(names):
            label = names[label]
        if not isinstance(label, str | int):
            raise DataError(
                f"{where}: field {columns.label!r} must be text, a whole number, true or false; got {_shown(label)}"
            )
        key = _shown(label) if len(str(label)) < 50 else str(label)
        labels[key] = label
        rows[key] += 1
        if len(rows) > MOST_LABELS:
            raise DataError(
                f"{where}: field {columns.label!r} has more than {MOST_LABELS:,} labels by here, as "
                f"{', '.join(list(rows)[:3])}; name the column of the answers"
            )
    forms: dict[str, list[str]] = defaultdict(list)
    for key in sorted(rows, key=lambda key: (-rows[key], key)):
        forms[_number_text(labels[key]) if found.texts is not None else key].append(key)
    counts = [(labels[keys[0]], sum(rows[key] for key in keys)) for keys in forms.values()]
    spellings = [(labels[other], labels[keys[0]]) for keys in forms.values() for other in keys[1:]]
    return Labels(tuple(sorted(counts, key=_by_size)), tuple(spellings), found.texts is not None)


def task_of_columns(
    name: str, columns: Columns, train: str | None, *, classes: Sequence[str] | None = None, casting: str = "head"
) -> Task:
    """The task whose labels are those of a training file.

    classes: of a model that has learned the task already, which must be the same, and whose order and spelling is
        taken; LABEL_0, ... name none. Without `train` they are the labels.
    Scored by accuracy; with more than two labels, or of very different numbers, by macro F1 too.
    Raises GlmdError for one label or none, for a file of which every label stands in one row, and for other classes.
    """
    named = None if classes is None or all(re.fullmatch(r"LABEL_\d+", each) for each in classes) else tuple(classes)
    if train is None:
        if named is None:
            raise ConfigError(f"tasks.{name}.train is missing: the labels are those of its rows")
        labels: tuple[Label, ...] = named
        is_even = len(labels) == 2
    else:
        found = labels_in(train, columns, name)
        _require_classes(found, train, columns)
        labels = found.labels if named is None else _in_order_of(named, found, train, name)
        numbers = [number for _, number in found.counts]
        is_even = len(labels) == 2 and max(numbers) <= UNBALANCED * min(numbers)
    return Task(
        name,
        columns.texts,
        f"{{{columns.text}}}",
        ("accuracy",) if is_even else ("accuracy", "macro_f1"),
        MAX_LENGTH,
        labels=labels,
        text_pair=None if columns.text_pair is None else f"{{{columns.text_pair}}}",
        label_field=columns.label,
        casting=casting,
    )


def require_same_labels(task: Task, columns: Columns, train: str, val: str) -> None:
    """Refuse a validation file with labels that the training file lacks; say which it has none of itself."""
    theirs = labels_in(val, columns, task.name)
    meant = [label_of_text(task.labels, str(each)) if theirs.are_texts else each for each in theirs.labels]
    others = tuple(label for label in meant if label is not None and label not in task.labels)
    if others:
        raise DataError(
            f"tasks.{task.name}: {val} has labels {_listed(others)} that {train} has not, which has "
            f"{_listed(task.labels)}; give rows of the same labels"
        )
    absent = tuple(label for label in task.labels if label not in meant)
    if absent and meant:
        logger.warning("%s: %s has no row labeled %s", task.name, val, _listed(absent))


def hold_out(examples: Sequence[TaskExample], fraction: float, *, seed: int) -> tuple[list[TaskExample], ...]:
    """(the others, those held out), each in order and numbered from 0.

    Of each label's examples a share, one at least where there are two: those whose hash of seed and number is least,
    so that neither the machine nor what was drawn before has a say.
    """
    groups: dict[int | None, list[TaskExample]] = defaultdict(list)
    for example in examples:
        groups[example.label].append(example)
    held: set[int] = set()
    for group in groups.values():
        group.sort(key=lambda each: hashlib.sha256(f"{seed} {each.example_id}".encode()).digest())
        count = min(max(round(len(group) * fraction), 1), len(group) - 1)
        held.update(each.example_id for each in group[:count])
    parts: tuple[list[TaskExample], ...] = ([], [])
    for example in examples:
        part = parts[example.example_id in held]
        part.append(replace(example, example_id=len(part)))
    return parts


def _require_classes(found: Labels, source: str, columns: Columns) -> None:
    """Refuse labels that nothing can be learned from; say what is odd in them."""
    labels, place = found.labels, f"{source}: column {columns.label!r}"
    if len(labels) < 2:
        held = f"the one label {_listed(labels)}" if labels else "no label"
        raise DataError(f"{place} holds {held}; a task has two or more")
    single = tuple(label for label, number in found.counts if number == 1)
    if len(single) == len(labels):
        raise DataError(f"{place} holds each of its {len(labels)} labels once; name the column of the answers")
    if single:
        some = ", ..." if len(single) > 10 else ""
        logger.warning("%s holds in one row alone: %s%s; more would be learned from", place, _listed(single[:10]), some)
    if found.spellings:
        said = ", ".join(f"{_shown(other)} as {_shown(label)}" for other, label in found.spellings[:10])
        logger.warning("%s is read with other forms of labels: %s", place, said)


def _in_order_of(classes: tuple[str, ...], found: Labels, source: str, name: str) -> tuple[Label, ...]:
    """The labels as a model has them."""
    ours = {_number_text(label): label for label in found.labels}
    theirs = [_number_text(each) for each in classes]
    if len(ours) != len(found.labels) or len(set(theirs)) != len(classes) or set(theirs) != set(ours):
        raise ConfigError(
            f"teacher.tasks.{name} has the classes {_listed(classes)}, {source} the labels {_listed(found.labels)}; "
            "give the file that it was trained on, or leave the model out"
        )
    return tuple(each if found.are_texts else ours[key] for key, each in zip(theirs, classes, strict=True))


def _by_size(count: tuple[Label, int]) -> tuple[Any, ...]:
    text = str(count[0])
    is_number = re.fullmatch(r"[-+]?\d{1,15}(\.\d+)?", text) is not None
    return not is_number, float(text) if is_number else 0.0, text
