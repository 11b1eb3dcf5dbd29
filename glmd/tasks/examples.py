"""The examples of a task's split, read from its rows and checked."""

import dataclasses
import json
import logging
import math
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from glmd.data.oddities import Oddities
from glmd.data.tables import Place, Split, open_split
from glmd.errors import DataError, suggestion
from glmd.tasks.labels import Answer, label_in
from glmd.tasks.superglue import checked, flat_rows
from glmd.tasks.tasks import BLANK, NO_LABEL, Label, Task, _shown, label_of_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskExample:
    """One example: what the model reads for each choice, and the right answer where it is known."""

    example_id: int  # its place in the split, from 0
    texts: tuple[tuple[str, str | None], ...]  # (text, text_pair) of each choice; classification has one
    # Class id, or the right choice's position (to train on, also where a row asks for the first); of several labels 0
    # or 1 for each; a number; or the class id of each word
    label: Answer | None
    idx: Any = None  # as the row has it, for prediction files: a number, or a dict of numbers
    group: tuple[Any, ...] | None = None  # the values of task.group_by
    choices: tuple[str, ...] = ()  # the candidates themselves
    answers: tuple[str, ...] = ()  # all right candidates, where a row may have several (ReCoRD)
    words: tuple[str, ...] = ()  # of a text whose words have labels
    where: str = dataclasses.field(default="", compare=False)  # file and line, or their like, to name in a refusal

    @property
    def content(self) -> list[Any]:
        """What it is, for fingerprints."""
        return [self.texts, self.label, self.group, self.choices, self.answers, *([self.words] if self.words else [])]

    @property
    def is_labeled(self) -> bool:
        """Whether its right answer is known, also where none of its candidates is one."""
        return self.label is not None or bool(self.answers)


def read_split(
    task: Task, source: str, split: Split, *, require_labels: bool, training: bool = False
) -> list[TaskExample]:
    """Every example of a split, checked.

    source: a folder that holds the split in the official form or in the hub's (`glmd.data.tables`); or one .jsonl,
        .csv, .tsv or .parquet file, whatever its name; or a data set of the hub, `aps/super_glue`.
    require_labels: refuse a row without a label. A label that is there is checked in any case; null and -1,
        with which the hub marks hidden labels, count as none.
    training: make examples to learn from. Where a row lists its candidates, an example has at most
        `task.max_choices` of them, drawn by the row's idx alone: a right one and wrong ones, an example for each right
        one, where labels are required (none, where a row only says that its first is wrong); any, and no label, where
        they are not, so that inputs without labels and with them teach the same. Without `training` a row is one
        example with all its candidates.
    What is odd in official rows and harms nothing is counted in one warning.
    Raises DataError naming file, line and field.
    """
    examples: list[TaskExample] = []
    first_of: dict[str, tuple[str, TaskExample]] = {}
    oddities = Oddities()
    for where, row in _rows(task, str(source), split, oddities, require_labels=require_labels):
        _check_blanks(task, row, where, oddities)
        made = _examples(task, row, where, len(examples), require_labels=require_labels, training=training)
        if made and row.get("idx") is not None:
            before, twin = first_of.setdefault(_key(row["idx"]), (where, made[0]))
            if before != where:
                _check_twin(made[0], twin, row, where, before)
                oddities.note("a row stands twice", where)
                # A pool without labels may hold one input twice, as a published one of WiC does.
                made = made if made[0].label is None else []
        examples += made
    oddities.warn(str(source))
    alone = sum(task.asks_first and len(example.choices) == 1 for example in examples)
    if alone:
        logger.warning(
            "%s: in %d of %d rows nothing but the phrase that is asked about can be meant; whatever a model says, the "
            "answer is yes",
            source,
            alone,
            len(examples),
        )
    if not examples:
        left_out = task.asks_first and training and require_labels
        found = f"no rows labeled {_shown(task.labels[1])} to learn from" if left_out else "no rows"
        raise DataError(f"{source}: {task.name} has {found} in {split}")
    return examples


def _rows(
    task: Task, source: str, split: Split, oddities: Oddities, *, require_labels: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Flat rows, with class numbers and texts turned back into the labels of the official files."""
    if task.only_split is not None and split != task.only_split:
        if split == "train":
            raise DataError(f"{source}: {task.name} has no train split; it is scored with a model of another task")
        split = task.only_split
    found = open_split(source, split, Place(task.name, task.folder, task.hub_name, task.val_name))
    names = found.class_names.get(task.label_field)
    if found.texts is not None and task.rows == "flat":
        labels = [*(task.label_fields or (task.label_field,))]
        found.texts.require([*task.fields, *(labels if require_labels else [])])
    meant: dict[str, Label | None] = {}
    for where, row in found.rows:
        if found.texts is not None:
            row = _from_texts(task, row, meant)
        if found.is_table:
            row = _with_label(task, row, names, where, oddities)
        for place, flat in flat_rows(task.rows, row, where, oddities):
            yield place, checked(task.rows, flat, place, oddities)


def _from_texts(task: Task, row: dict[str, str], meant: dict[str, Label | None]) -> dict[str, Any]:
    """The row of a file of texts with its label as the task has it, and a number as its idx.

    meant: grows with what each text of a label means.
    """
    typed: dict[str, Any] = dict(row)
    label = row.get(task.label_field)
    if label is not None and task.has_one_answer:
        if label not in meant:
            meant[label] = label_of_text(task.labels or tuple(range(len(task.choices))), label)
        typed[task.label_field] = meant[label]
    if "idx" in row:
        idx = row["idx"].strip()
        typed["idx"] = int(idx) if re.fullmatch("0|[1-9][0-9]{0,17}", idx) else idx or None
    return typed


def _with_label(
    task: Task, row: dict[str, Any], names: list[str] | None, where: str, oddities: Oddities
) -> dict[str, Any]:
    """The row of a table with the label that its class number stands for."""
    label = row.get(task.label_field)
    if not task.has_one_answer:
        return row if names is None else _with_names(task, row, names)
    if isinstance(label, float):  # pandas makes numbers of a column with gaps such
        label = int(label) if label.is_integer() else None if math.isnan(label) else label
        row = row | {task.label_field: label}
    # Where the official label is a number (COPA, MultiRC), the class number is that number, whatever its name.
    if type(label) is not int or label == NO_LABEL or all(type(each) is int for each in task.labels):
        return row
    labels = {str(each): each for each in task.labels}
    if names is not None:
        name = names[label] if 0 <= label < len(names) else None
        return row if name is None else row | {task.label_field: labels.get(name, name)}
    if not 0 <= label < len(task.labels):
        return row
    oddities.note("labels are class numbers without names and are taken in the order of the task's labels", where)
    return row | {task.label_field: task.labels[label]}


def _with_names(task: Task, row: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The row of a table with the labels that a list of class numbers stands for."""
    labels = {str(each): each for each in task.labels}
    found = row.get(task.label_field)
    if not isinstance(found, list):
        return row
    told = [names[each] if type(each) is int and 0 <= each < len(names) else each for each in found]
    return row | {task.label_field: [labels.get(each, each) for each in told]}


def _examples(
    task: Task, row: dict[str, Any], where: str, first_id: int, *, require_labels: bool, training: bool
) -> list[TaskExample]:
    """The examples of a flat row: one, or in training one for each of its right answers."""
    words: tuple[str, ...] = ()
    if task.problem_type == "token_classification":
        words = _words(row, task.fields[0], where)
        row = row | {task.fields[0]: list(words)}
        fields = {task.fields[0]: " ".join(words)}
    else:
        fields = {field: text_of(row, field, where, may_be_blank=field in task.may_be_blank) for field in task.fields}
    answers: tuple[str, ...] = ()
    label: Answer | None
    variants: Sequence[tuple[tuple[str, ...], Answer | None]]
    if task.choices_from is not None:
        candidates = _text_list(row, task.choices_from, where)
        if task.asks_first:
            known = label_in(task, row, where, require_labels=require_labels)
            answers, label = candidates[:1] if known == 1 else (), known
        else:
            answers = _answers(task, row, candidates, where, require_labels)
            label = next((i for i, each in enumerate(candidates) if each in answers), None)
        if training:
            answers = tuple(each for each in answers if each in candidates)
        if training and require_labels and not answers:
            return []  # which of the candidates is right nobody says
        answers = answers if require_labels or not training else ()
        variants = _drawn(task, row, candidates, answers) if training else [(candidates, label)]
    else:
        label = label_in(task, row, where, require_labels=require_labels)
        variants = [(tuple(choice.format(**fields) for choice in task.choices), label)]
    return [
        TaskExample(
            example_id=first_id + i,
            texts=_texts(task, fields, choices, where),
            label=label,
            idx=row.get("idx"),
            group=_group(task, row, where),
            choices=choices,
            answers=answers,
            words=words,
            where=where,
        )
        for i, (choices, label) in enumerate(variants)
    ]


def _texts(
    task: Task, fields: dict[str, str], choices: tuple[str, ...], where: str
) -> tuple[tuple[str, str | None], ...]:
    """(text, text_pair) of each choice, or of the row as a whole."""
    if task.placeholder is not None and not any(task.placeholder in text for text in fields.values()):
        raise DataError(f"{where}: {task.placeholder!r} stands in none of the fields {', '.join(fields)}")
    form = task.cloze if task.casting == "cloze" and task.cloze is not None else task
    texts = []
    for choice in choices or ("",):
        fill = BLANK if form is task.cloze else choice
        values = {**fields, "choice": choice, "blank": BLANK}
        if task.placeholder is not None:
            values = {field: text.replace(task.placeholder, fill) for field, text in fields.items()}
        pair = form.text_pair.format(**values) if form.text_pair is not None else None
        # A passage stands in many examples: all share one.
        texts.append((sys.intern(form.text.format(**values)), pair))
    return tuple(texts)


def _drawn(
    task: Task, row: dict[str, Any], candidates: tuple[str, ...], answers: tuple[str, ...]
) -> list[tuple[tuple[str, ...], int | None]]:
    """Candidates to train on and the right one's position: each answer with wrong ones, or some where none is known."""
    wrong = [each for each in candidates if each not in answers]
    variants: list[tuple[tuple[str, ...], int | None]] = []
    for answer in answers or (None,):
        given = () if answer is None else (answer,)
        places = len(wrong) if task.max_choices is None else min(len(wrong), task.max_choices - len(given))
        draw = random.Random(f"{_key(row.get('idx'))} {answer}")  # text: seeded by its hash, alike in every process
        variants.append(((*given, *draw.sample(wrong, places)), None if answer is None else 0))
    return variants


def _answers(
    task: Task, row: dict[str, Any], candidates: tuple[str, ...], where: str, require_labels: bool
) -> tuple[str, ...]:
    answers = _text_list(row, "answers", where) if row.get("answers") else ()
    if require_labels and not answers:
        raise DataError(f"{where}: field 'answers' must list the right candidates; the row has none")
    for answer in answers:
        if answer not in candidates and task.rows != "record":  # of which a few official rows are counted
            raise DataError(f"{where}: field 'answers' has {answer[:60]!r}, which is none of the candidates")
    return answers


def _group(task: Task, row: dict[str, Any], where: str) -> tuple[Any, ...] | None:
    if not task.group_by:
        return None
    values = []
    for field in task.group_by:
        value: Any = row
        for part in field.split("."):
            if not isinstance(value, dict) or part not in value:
                raise DataError(
                    f"{where}: field {field!r} is missing; {task.name} is scored by groups of equal {field}"
                )
            value = value[part]
        if not isinstance(value, str | int):
            raise DataError(f"{where}: field {field!r} must be text or a whole number, got {_shown(value)}")
        values.append(value)
    return tuple(values)


def _check_twin(example: TaskExample, twin: TaskExample, row: dict[str, Any], where: str, before: str) -> None:
    """Refuse an idx of two rows that differ: nobody could tell which of them an answer is for."""
    if [*example.content[:2], example.answers] != [*twin.content[:2], twin.answers]:
        raise DataError(f"{where}: field 'idx' is {_shown(row['idx'])}, as in {before}; each row needs its own")


def _check_blanks(task: Task, row: dict[str, Any], where: str, oddities: Oddities) -> None:
    """Count a text that is blank where it may be; refuse a row in which nothing else stands."""
    blank = [field for field in task.fields if isinstance(row.get(field), str) and not row[field].strip()]
    if blank and len(blank) == len(task.fields):
        raise DataError(f"{where}: field {blank[0]!r} is blank, and the row has no other text")
    for field in blank:
        if field in task.may_be_blank:
            oddities.note(f"field {field!r} is blank", where)


def _key(idx: Any) -> str:
    return json.dumps(idx, sort_keys=True, default=str)


def text_of(row: dict[str, Any], field: str, where: str, *, may_be_blank: bool = False) -> str:
    """The text of a field. Raises DataError naming place and field for what is none, or blank where it may not be."""
    if field not in row:
        raise DataError(f"{where}: field {field!r} is missing{suggestion(field, map(str, row))}")
    text = row[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} must be text, got {_shown(text)}")
    if not text.strip() and not may_be_blank:
        raise DataError(f"{where}: field {field!r} is blank")
    _refuse_marker(text, field, where)
    return text


def _words(row: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    """A list of words, each without white space at its ends."""
    if field not in row:
        raise DataError(f"{where}: field {field!r} is missing{suggestion(field, map(str, row))}")
    words = row[field]
    if not isinstance(words, list) or not words or not all(isinstance(each, str) and each.strip() for each in words):
        raise DataError(f"{where}: field {field!r} must be a list of words, none of them blank; got {_shown(words)}")
    for word in words:
        _refuse_marker(word, field, where)
    return tuple(word.strip() for word in words)


def _refuse_marker(text: str, field: str, where: str) -> None:
    if BLANK in text:
        raise DataError(f"{where}: field {field!r} holds U+FDD0, which is no character; remove it")


def _text_list(row: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    """A list of different texts."""
    if field not in row:
        raise DataError(f"{where}: field {field!r} is missing{suggestion(field, map(str, row))}")
    values = row[field]
    if not values or not isinstance(values, list) or not all(isinstance(each, str) and each.strip() for each in values):
        raise DataError(f"{where}: field {field!r} must be a list of texts, got {_shown(values)}")
    for value in values:
        _refuse_marker(value, field, where)
    return tuple(dict.fromkeys(values))
