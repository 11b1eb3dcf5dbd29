"""A task as data: which fields of a row become the texts a model reads, and what its answer is.

    task = load_task("RTE")
    examples = read_split(task, "SuperGLUE/", "train", require_labels=True)

The answer is one of the task's `labels`, or one of the row's own candidates (`choices`, `choices_from`), each of which
gives a text. A task is one YAML (configs/tasks, or a file of your own). Examples come from the official jsonl files or
from the hub.
"""

import dataclasses
import json
import logging
import math
import random
import re
import string
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glmd.data.oddities import Oddities
from glmd.data.tables import Place, Split, open_split
from glmd.errors import ConfigError, DataError, suggestion
from glmd.strict_yaml import build, configs_root, load_yaml, named_file
from glmd.tasks.superglue import Form, checked, flat_rows

logger = logging.getLogger(__name__)

Label = str | bool | int
NO_LABEL = -1  # the hub's sign for a hidden label; null is another


# Stands in an example's text for the blank. A noncharacter of Unicode: no text has it.
BLANK = "\ufdd0"
# What {choice} and {blank} of a template stand for is no field of a row.
RESERVED = ("choice", "blank")


@dataclass(frozen=True)
class Cloze:
    """A task asked as words in a blank, for a model that stays a masked LM (arXiv:2103.10360, section 2.3)."""

    text: str  # with {field} for a field, and {blank} once here or in text_pair (or where `placeholder` stands)
    text_pair: str | None = None  # the one without the blank loses its end at max_length
    verbalizers: tuple[
        str, ...
    ] = ()  # what fills the blank for each label: one token each; candidates fill it themselves
    mean_over_tokens: bool = False  # a candidate's score: the mean of its tokens' log-probabilities, not their sum


@dataclass(frozen=True)
class Task:
    """A classification task, or a choice among candidates. Raises ConfigError for keys that cannot work together."""

    name: str
    fields: tuple[str, ...]  # of a row; each must hold text
    text: str  # what the model reads, with {field} for a field
    metrics: tuple[str, ...]  # of glmd.evaluation.metrics; the first selects checkpoints
    max_length: int  # tokens of text and text_pair, special ones included
    labels: tuple[Label, ...] = ()  # as they stand in the rows; the position is the class id. Empty: a choice
    folder: str | None = None  # its subfolder in a SuperGLUE folder; None: its name
    hub_name: str | None = None  # its config in aps/super_glue, if it is read from the hub
    only_split: Split | None = None  # of a diagnostic set, which has no train and val; read for val too
    may_be_blank: tuple[str, ...] = ()  # fields that a few rows leave empty; counted in a warning
    text_pair: str | None = None  # the second text, if there is one
    label_field: str = "label"
    rows: Form = "flat"  # the form of its rows, of glmd.tasks.superglue; flat: texts and a label as they stand
    choices: tuple[str, ...] = ()  # a template for each candidate; a row's label is the right one's position
    choices_from: str | None = None  # or: the field that lists a row's candidates; its `answers` are the right ones
    placeholder: str | None = None  # what stands for the candidate in the fields' text, where no template has {choice}
    max_choices: int | None = None  # candidates of a training example; None: all, as in evaluation
    asks_first: bool = False  # a row asks only whether its first candidate is the right one: the second of the labels
    group_by: tuple[str, ...] = ()  # fields whose values make an example's group, for metrics over groups
    cloze: Cloze | None = None  # the task's other form
    casting: str = "head"  # how it is put to a model, a key of tasks.forms.CASTINGS; a run's choice

    @property
    def is_choice(self) -> bool:
        """Whether the model scores candidates rather than classes."""
        return bool(self.choices or self.choices_from)

    @property
    def mean_over_tokens(self) -> bool:
        """Whether a candidate in a blank scores the mean over its tokens."""
        return self.cloze is not None and self.casting == "cloze" and self.cloze.mean_over_tokens

    @property
    def verbalizers(self) -> tuple[str, ...]:
        """The word of each label, where the task is asked as words in a blank."""
        return self.cloze.verbalizers if self.cloze is not None and self.casting == "cloze" else ()

    def __post_init__(self) -> None:
        if self.casting == "cloze" and self.cloze is None:
            raise ConfigError(
                f"task {self.name} has no cloze form; write one, or give a model with a task head (casting=head)"
            )
        for name in RESERVED:
            if name in self.fields:
                raise ConfigError(f"fields: {name!r} has a meaning of its own in templates; rename the field")
        for key in ("name", "folder", "hub_name"):
            value = getattr(self, key)
            if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
                raise ConfigError(f"{key} must be letters, digits, - and _; got {value!r}")
        for field in self.may_be_blank:
            if field not in self.fields:
                raise ConfigError(f"may_be_blank: {field!r} is not in fields{suggestion(field, self.fields)}")
        if self.is_choice:
            self._check_choices()
        else:
            self._check_classes()
        templates = {"text": self.text, "text_pair": self.text_pair or ""}
        candidate = ("choice",) if self.is_choice else ()
        used = [name for key, text in templates.items() for name in _template_fields(text, key, self.fields, candidate)]
        for i, text in enumerate(self.choices):
            used += _template_fields(text, f"choices[{i}]", self.fields)
        if self.cloze is not None:
            used += self._check_cloze(self.cloze)
        for field in self.fields:
            if field not in used:
                raise ConfigError(f"fields: {field!r} stands in no template; remove it, or write {{{field}}} in one")
        if self.is_choice and used.count("choice") != (self.placeholder is None):
            where = "no template: placeholder is given" if self.placeholder else "exactly one of text and text_pair"
            raise ConfigError(f"choices: {{choice}}, the candidate, must stand once in {where}")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ConfigError(f"metrics must be one or more and differ; got {', '.join(self.metrics) or 'none'}")
        if self.max_length < 8:
            raise ConfigError(f"max_length must be at least 8, got {self.max_length}")

    def _check_choices(self) -> None:
        if self.asks_first:
            if self.choices_from is None or len(self.labels) != 2:
                raise ConfigError("asks_first needs choices_from, and two labels: the first is no, the second yes")
            self._check_labels()
        elif self.labels:
            raise ConfigError("labels has no effect beside choices: the label is a position; remove it")
        if self.choices and self.choices_from:
            raise ConfigError("choices and choices_from exclude each other; keep one")
        if self.choices_from and not self.asks_first and self.label_field != "label":
            raise ConfigError(
                "label_field has no effect beside choices_from: the row's answers are the label; remove it"
            )
        if len(self.choices) == 1:
            raise ConfigError("choices must be two or more templates")
        if self.placeholder is not None and not self.placeholder.strip():
            raise ConfigError("placeholder is blank")
        if self.max_choices is not None:
            if self.choices:
                raise ConfigError("max_choices has no effect on choices that are templates; remove it")
            if self.max_choices < 2:
                raise ConfigError(f"max_choices must be at least 2, got {self.max_choices}")

    def _check_cloze(self, cloze: Cloze) -> list[str]:
        """The fields that the cloze form uses."""
        templates = {"cloze.text": cloze.text, "cloze.text_pair": cloze.text_pair or ""}
        used = [
            name for key, text in templates.items() for name in _template_fields(text, key, self.fields, ("blank",))
        ]
        if used.count("blank") != (self.placeholder is None):
            where = "no template: placeholder is given" if self.placeholder else "exactly one of text and text_pair"
            raise ConfigError(f"cloze: {{blank}} must stand once in {where}")
        if len(set(cloze.verbalizers)) != len(cloze.verbalizers) or len(cloze.verbalizers) != (
            0 if self.is_choice else len(self.labels)
        ):
            wanted = "nothing: the candidates fill the blank" if self.is_choice else "a different word for each label"
            raise ConfigError(f"cloze.verbalizers must be {wanted}; got {', '.join(cloze.verbalizers) or 'none'}")
        if cloze.mean_over_tokens and not self.is_choice:
            raise ConfigError("cloze.mean_over_tokens has no effect on words of one token; remove it")
        return used

    def _check_labels(self) -> None:
        if len(self.labels) < 2:
            raise ConfigError(f"labels must be two or more and differ; got {_listed(self.labels) or 'none'}")
        for label in self.labels:
            if not _is_given(label) or (isinstance(label, str) and not label.strip()):
                sign = "blank" if isinstance(label, str) else "what rows say where they have no label"
                raise ConfigError(f"labels: {_shown(label)} is {sign}; write other labels there and in the rows")
        texts = [_label_text(label) for label in self.labels]
        for i, text in enumerate(texts):
            if text in texts[:i]:
                alike = f"{_shown(self.labels[texts.index(text)])} and {_shown(self.labels[i])} are alike"
                raise ConfigError(f"labels must be two or more and differ; got {_listed(self.labels)}: {alike}")

    def _check_classes(self) -> None:
        self._check_labels()
        for key in ("placeholder", "max_choices", "asks_first"):
            if getattr(self, key):
                raise ConfigError(f"{key} has no effect without choices or choices_from; remove it")


def _template_fields(template: str, key: str, fields: tuple[str, ...], more: tuple[str, ...] = ()) -> list[str]:
    """The names in a template, which must be among fields or `more`."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{key}: {template!r} is no template ({error}); write {{{{ for a brace") from None
    known = (*fields, *more)
    for _, name, form, conversion in parts:
        if name is not None and (name not in known or form or conversion):
            if name in known:
                raise ConfigError(f"{key}: {template!r}: write {{{name}}} alone, without : and !")
            raise ConfigError(f"{key}: {template!r} asks for {name!r}, which is not in fields{suggestion(name, known)}")
    return [name for _, name, _, _ in parts if name is not None]


@dataclass(frozen=True)
class TaskExample:
    """One example: what the model reads for each choice, and the right answer where it is known."""

    example_id: int  # its place in the split, from 0
    texts: tuple[tuple[str, str | None], ...]  # (text, text_pair) of each choice; classification has one
    label: int | None  # class id, or the right choice's position (to train on, also where a row asks for the first)
    idx: Any = None  # as the row has it, for prediction files: a number, or a dict of numbers
    group: tuple[Any, ...] | None = None  # the values of task.group_by
    choices: tuple[str, ...] = ()  # the candidates themselves
    answers: tuple[str, ...] = ()  # all right candidates, where a row may have several (ReCoRD)
    where: str = dataclasses.field(default="", compare=False)  # file and line, or their like, to name in a refusal

    @property
    def is_labeled(self) -> bool:
        """Whether its right answer is known, also where none of its candidates is one."""
        return self.label is not None or bool(self.answers)


def task_names() -> list[str]:
    """The tasks that come with glmd."""
    return sorted(path.stem for path in (configs_root() / "tasks").glob("*.yaml"))


def load_task(name_or_path: str | Path, casting: str = "head") -> Task:
    """A task of `task_names()`, in any case, or the YAML at a path, as `casting` casts it.

    Raises ConfigError naming file and key, or where the task has no such form.
    """
    path = named_file("tasks", str(name_or_path))
    values = load_yaml(path)
    if "casting" in values:
        raise ConfigError(f"{path}: casting is the choice of a run; remove it here")
    return replace(build(Task, values, where=f"{path}:"), casting=casting)


def read_split(
    task: Task, source: str, split: Split, *, require_labels: bool, training: bool = False
) -> list[TaskExample]:
    """Every example of a split, checked.

    source: a folder that holds the split in the official form or in the hub's (`glmd.data.tables`); or one .jsonl or
        .parquet file, whatever its name; or a data set of the hub, `aps/super_glue`.
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
    for where, row in _rows(task, str(source), split, oddities):
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


def _rows(task: Task, source: str, split: Split, oddities: Oddities) -> Iterator[tuple[str, dict[str, Any]]]:
    """Flat rows, with class numbers turned back into the labels of the official files."""
    if task.only_split is not None and split != task.only_split:
        if split == "train":
            raise DataError(f"{source}: {task.name} has no train split; it is scored with a model of another task")
        split = task.only_split
    found = open_split(source, split, Place(task.name, task.folder, task.hub_name))
    names = found.class_names.get(task.label_field)
    for where, row in found.rows:
        if found.is_table:
            row = _with_label(task, row, names, where, oddities)
        for place, flat in flat_rows(task.rows, row, where, oddities):
            yield place, checked(task.rows, flat, place, oddities)


def _with_label(
    task: Task, row: dict[str, Any], names: list[str] | None, where: str, oddities: Oddities
) -> dict[str, Any]:
    """The row of a table with the label that its class number stands for."""
    label = row.get(task.label_field)
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


def _examples(
    task: Task, row: dict[str, Any], where: str, first_id: int, *, require_labels: bool, training: bool
) -> list[TaskExample]:
    """The examples of a flat row: one, or in training one for each of its right answers."""
    fields = {field: _text(row, field, where, may_be_blank=field in task.may_be_blank) for field in task.fields}
    answers: tuple[str, ...] = ()
    if task.choices_from is not None:
        candidates = _text_list(row, task.choices_from, where)
        if task.asks_first:
            known = _label(task, task.labels, row, where, require_labels)
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
        label = _label(task, task.labels or tuple(range(len(task.choices))), row, where, require_labels)
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
    if (example.texts, example.label, example.answers) != (twin.texts, twin.label, twin.answers):
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


def _text(row: dict[str, Any], field: str, where: str, *, may_be_blank: bool = False) -> str:
    if field not in row:
        raise DataError(f"{where}: field {field!r} is missing{suggestion(field, map(str, row))}")
    text = row[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} must be text, got {_shown(text)}")
    if not text.strip() and not may_be_blank:
        raise DataError(f"{where}: field {field!r} is blank")
    _refuse_marker(text, field, where)
    return text


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


def _is_given(label: Any) -> bool:
    return label is not None and not (label == NO_LABEL and type(label) is int)


def _label_text(label: Label) -> str:
    """By which labels are told apart: true and "True" are alike, and 1 and "1"; so are 1 and true, 0 and false."""
    if isinstance(label, str) and label.strip().casefold() not in ("true", "false"):
        return label.strip()
    return str(label).strip().casefold().replace("true", "1").replace("false", "0")


def _label(task: Task, known: tuple[Label, ...], row: dict[str, Any], where: str, require_labels: bool) -> int | None:
    label = row.get(task.label_field)
    return _class_id(task, known, label, where) if _is_given(label) or require_labels else None


def _class_id(task: Task, known: tuple[Label, ...], label: Any, where: str) -> int:
    for class_id, each in enumerate(known):
        if type(label) is type(each) and label == each:
            return class_id
    got = f"got {_shown(label)}" if _is_given(label) else "the row has none"
    raise DataError(f"{where}: field {task.label_field!r} must be one of {_listed(known)}; {got}")


def _listed(labels: tuple[Label, ...]) -> str:
    return ", ".join(map(_shown, labels))


def _shown(value: Any) -> str:
    """A value as it stands in JSON, cut short."""
    return json.dumps(value, ensure_ascii=False, default=str)[:60]
