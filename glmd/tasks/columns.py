"""A task without a YAML: columns of a file, with the labels that stand there.

task = task_of_columns("reviews", Columns("body", label="stars"), "reviews.csv")
train, val = hold_out(examples, 0.1, seed=0)
"""

import hashlib
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glmd.data.tables import Found, Place, open_split
from glmd.errors import ConfigError, DataError
from glmd.tasks.examples import TaskExample
from glmd.tasks.labels import is_written_list, listed_labels, number_of
from glmd.tasks.tasks import RESERVED, Label, ProblemType, Task, _is_given, _listed, _number_text, _shown, label_of_text

MOST_LABELS = 1000
MAX_LENGTH = 256  # tokens of an example, where the stage says nothing, as in the tasks that come with glmd
ONE_LABEL: ProblemType = "single_label_classification"
METRICS_OF: dict[ProblemType, tuple[str, ...]] = {
    "regression": ("pearson", "spearman"),
    "multi_label_classification": ("labels_micro_f1", "labels_macro_f1", "subset_accuracy"),
    "token_classification": ("word_accuracy",),
}
MANY_NUMBERS = 20  # labels that are numbers, from which on they may be meant as such
UNBALANCED = 2  # times as many rows of the most frequent label as of the rarest; more, and F1 is scored too

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """Names of a file's columns, or of the fields of its rows. Raises ConfigError for one that no template can hold."""

    text: str
    label: str
    text_pair: str | None = None
    labels: tuple[str, ...] = ()  # of 0 and 1, one for each of several labels, in place of `label`

    def __post_init__(self) -> None:
        for name in self.texts:
            if name in RESERVED or name.isdecimal() or re.search(r"[][{}.!:]", name):
                raise ConfigError(f"column {name!r} cannot stand in a task's template; rename it in the file")

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,) if self.text_pair is None else (self.text, self.text_pair)

    @property
    def answers(self) -> tuple[str, ...]:
        return self.labels or (self.label,)


@dataclass(frozen=True)
class Labels:
    """The labels of a file, each with the number of its rows. spellings: other forms that are read as one of them."""

    counts: tuple[tuple[Label, int], ...]
    spellings: tuple[tuple[Label, Label], ...] = ()
    are_texts: bool = False

    @property
    def labels(self) -> tuple[Label, ...]:
        return tuple(label for label, _ in self.counts)


def labels_in(source: str, columns: Columns, name: str, separator: str | None = None) -> Labels:
    """The labels that stand in the rows of a file, in order: numbers by size, then texts. Rows without one are skipped.

    In a file of texts 5 and 5.0, or good and Good, are one label, spelled as it is most often. Of a list each counts.
    separator: what stands between several labels in a field of such a file.
    Raises DataError for columns that are not there, for more than 1,000 labels and for what can be none.
    """
    found = open_split(source, "train", Place(name))
    if found.texts is not None:
        found.texts.require([*columns.texts, *columns.answers])
    names = found.class_names.get(columns.label)
    rows: dict[str, int] = defaultdict(int)  # by what tells labels apart: 1, true and "1" are equal keys or hashes
    labels: dict[str, Label] = {}
    for where, label in _each_label(found, columns.label, separator):
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
                + ("; problem_type: regression reads numbers" if isinstance(label, float) else "")
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


def _each_label(found: Found, column: str, separator: str | None) -> Iterator[tuple[str, Any]]:
    """Where it stands, and each label of a column, of those that list several too."""
    for where, row in found.rows:
        label = row.get(column)
        if separator is not None and isinstance(label, str):
            label = listed_labels(label, separator)
        for each in label if isinstance(label, list) else [label]:
            yield where, each


def problem_of_rows(source: str, columns: Columns, name: str) -> ProblemType:
    """What the first row with an answer shows: a list of words, a list of labels, or one label."""
    if columns.labels:
        return "multi_label_classification"
    for _, row in open_split(source, "train", Place(name)).rows:
        if isinstance(row.get(columns.text), list):
            return "token_classification"
        if row.get(columns.label) is not None:
            is_list = isinstance(row[columns.label], list) or is_written_list(row[columns.label])
            return "multi_label_classification" if is_list else ONE_LABEL
    return ONE_LABEL


def separator_in(source: str, column: str, name: str) -> str:
    """What separates labels in a column of a file of texts: of | ; and , the one that most rows have; | if none has."""
    found = open_split(source, "train", Place(name))
    if found.texts is None:
        return "|"
    counts = Counter(sign for _, row in found.rows for sign in "|;," if sign in str(row.get(column)))
    return max("|;,", key=lambda sign: counts[sign])


def task_of_columns(
    name: str,
    columns: Columns,
    train: str | None,
    *,
    classes: Sequence[str] | None = None,
    casting: str = "head",
    problem_type: ProblemType | None = None,
) -> Task:
    """The task whose labels are those of a training file.

    classes: of a model that has learned the task already, which must be the same, and whose order and spelling is
        taken; LABEL_0, ... name none. Without `train` they are the labels.
    problem_type: None for what the rows show. Several labels are lists, texts with | ; or , between them, or columns of
        0 and 1; labels of words are lists beside lists of words.
    Scored by accuracy; with more than two labels, or of very different numbers, by macro F1 too. Other problems by
    METRICS_OF, and entities, where labels are like B-PER and O, by their F1.
    Raises GlmdError for one label or none, for a file of which every label stands in one row, and for other classes.
    """
    problem = problem_type or (problem_of_rows(train, columns, name) if train is not None else ONE_LABEL)
    shown = problem_of_rows(train, columns, name) if train is not None else problem
    if "token_classification" in (problem, shown) and problem != shown:
        held = "lists words" if shown == "token_classification" else "lists no words"
        whose = "the named model's" if classes is not None else "its"
        raise ConfigError(
            f"tasks.{name}: {whose} problem_type is {problem}, but {train} {held} in {columns.text!r}; give a file, or "
            "a model, of the other kind"
        )
    if columns.labels and problem != "multi_label_classification":
        raise ConfigError(f"tasks.{name}.label names {len(columns.labels)} columns, but problem_type is {problem}")
    more: dict[str, Any] = {} if problem == ONE_LABEL else {"problem_type": problem}
    if columns.labels:
        more["label_fields"] = columns.labels
    elif problem == "multi_label_classification" and train is not None:
        more["label_separator"] = separator_in(train, columns.label, name)
    named = tuple(classes) if classes is not None and are_named(classes) else None
    if problem == "regression":
        labels: tuple[Label, ...] = ()
    elif columns.labels:
        labels = columns.labels if named is None else _in_order_of(named, _of_names(columns), str(train), name)
    elif train is None:
        if named is None:
            raise ConfigError(f"tasks.{name}.train is missing: the labels are those of its rows")
        labels = named
        is_even = len(labels) == 2
    else:
        found = labels_in(train, columns, name, more.get("label_separator"))
        if classes is not None and {*map(str, found.labels)} == {*classes}:  # LABEL_0, ... are what the rows say too
            named = tuple(classes)
        _require_classes(found, train, columns)
        labels = found.labels if named is None else _in_order_of(named, found, train, name)
        numbers = [number for _, number in found.counts]
        is_even = len(labels) == 2 and max(numbers) <= UNBALANCED * min(numbers)
    metrics = METRICS_OF.get(problem) or (("accuracy",) if is_even else ("accuracy", "macro_f1"))
    if problem == "token_classification" and all(re.fullmatch(r"O|[BIESLU]-.+", str(each)) for each in labels):
        metrics = ("entity_f1", *metrics)
    if more.get("label_fields"):  # each with the column of its label
        more["label_fields"] = tuple(columns.labels[_place_of(columns.labels, each)] for each in labels)
    return Task(
        name,
        columns.texts,
        f"{{{columns.text}}}",
        metrics,
        MAX_LENGTH,
        labels=labels,
        text_pair=None if columns.text_pair is None else f"{{{columns.text_pair}}}",
        label_field=columns.label,
        casting=casting,
        **more,
    )


def are_named(classes: Sequence[str]) -> bool:
    """Whether a model's classes have names of their own."""
    return not all(re.fullmatch(r"LABEL_\d+", each) for each in classes)


def _of_names(columns: Columns) -> Labels:
    return Labels(tuple((each, 2) for each in columns.labels), are_texts=True)


def _place_of(names: Sequence[str], label: Label) -> int:
    return next(i for i, each in enumerate(names) if _number_text(each) == _number_text(label))


def require_same_labels(task: Task, columns: Columns, train: str, val: str) -> None:
    """Refuse a validation file with labels that the training file lacks; say which it has none of itself."""
    if task.problem_type == "regression" or columns.labels:
        return  # read and checked row by row
    is_several = task.problem_type == "multi_label_classification"
    theirs = labels_in(val, columns, task.name, task.label_separator if is_several else None)
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

    Of each label's examples (of numbers, several labels and labels of words: of all) a share, one at least where there
    are two: those whose hash of seed and number is least,
    so that neither the machine nor what was drawn before has a say.
    """
    groups: dict[int | None, list[TaskExample]] = defaultdict(list)
    for example in examples:
        groups[example.label if isinstance(example.label, int) else None].append(example)
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
    numbers = [number_of(str(label)) for label in labels]
    if all(each is not None for each in numbers) and (
        len(labels) > MANY_NUMBERS or any(each is not None and not each.is_integer() for each in numbers)
    ):
        logger.warning("%s holds numbers, each of which becomes a class; problem_type regression reads numbers", place)
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
            "give rows with the classes' names as labels, all of them, or another model"
        )
    return tuple(each if found.are_texts else ours[key] for key, each in zip(theirs, classes, strict=True))


def _by_size(count: tuple[Label, int]) -> tuple[Any, ...]:
    text = str(count[0])
    is_number = re.fullmatch(r"[-+]?\d{1,15}(\.\d+)?", text) is not None
    return not is_number, float(text) if is_number else 0.0, text
