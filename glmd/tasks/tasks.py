"""A task as data: which fields of a row become the texts a model reads, and what its answer is.

    task = load_task("RTE")
    examples = read_split(task, "SuperGLUE/", "train", require_labels=True)

The answer is one of the task's `labels`, or one of the row's own candidates (`choices`, `choices_from`), each of which
gives a text. A task is one YAML (configs/tasks, or a file of your own). Examples come from the official jsonl files or
from the hub.
"""

import itertools
import json
import re
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from glmd.data.tables import Split
from glmd.errors import ConfigError, suggestion
from glmd.strict_yaml import build, configs_root, load_yaml, named_file
from glmd.tasks.superglue import Form

Label = str | bool | int
ProblemType = Literal[
    "single_label_classification",
    "multi_label_classification",
    "regression",
    "token_classification",
    "sentence_similarity",
]
SENTENCES: ProblemType = "sentence_similarity"
LISTED = 300  # letters of labels in a message
NO_LABEL = -1  # the hub's sign for a hidden label; null is another


# Stands in an example's text for the blank. A noncharacter of Unicode: no text has it.
BLANK = "\ufdd0"
# What {choice} and {blank} of a template stand for is no field of a row.
RESERVED = ("choice", "blank")


@dataclass(frozen=True)
class Cloze:
    """A task asked as a cloze, for a model that stays a masked LM (arXiv:2103.10360, section 2.3)."""

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
    hub_name: str | None = None  # its config in aps/super_glue, or nyu-mll/glue, if it is read from the hub
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
    # What an answer is, by transformers' names: one of the labels; any of them, also none; a number, which there are no
    # labels for; one of them for each word, where `text` is one field that lists words and label_field their labels; or
    # the vector of a sentence, by which two of them are similar
    problem_type: ProblemType = "single_label_classification"
    label_fields: tuple[str, ...] = ()  # of several labels: a field of 0 or 1 for each, in place of one that lists them
    label_separator: str = "|"  # of several labels in a field of a file of texts
    val_name: str | None = None  # of its validation split in files and on the hub, where that is a name of its own
    # Of sentences: the fields of val, where these are others; what is put before each; and how a model makes a vector,
    # (mode, whether of length 1), as `models.pooling` has it
    val_fields: tuple[str, ...] = ()
    prompt: str = ""
    pooling: tuple[str, bool] = ("mean", False)
    casting: str = "head"  # how it is put to a model, a key of tasks.forms.CASTINGS; a run's choice

    def record(self) -> dict[str, Any]:
        """What it is, for fingerprints: keys that came later stand there where they are not as they were before."""
        later = ("problem_type", "label_fields", "label_separator", "val_name", "val_fields", "prompt", "pooling")
        plain = {each.name: each.default for each in fields(Task) if each.name in later}
        return {key: value for key, value in asdict(self).items() if key not in later or value != plain[key]}

    @property
    def has_one_answer(self) -> bool:
        """Whether an example's answer is one of its classes, or of its choices."""
        return self.problem_type == "single_label_classification"

    @property
    def num_classes(self) -> int:
        """Of each decision: of several labels each is one of yes or no; a number has 1; 0 where examples differ."""
        counts = {"multi_label_classification": 2, "regression": 1}
        return 0 if self.is_choice else counts.get(self.problem_type, len(self.labels))

    @property
    def num_outputs(self) -> int:
        """Numbers that a task head gives of an example, or of a token; of sentences as many as the model is wide."""
        return 1 if self.is_choice or self.problem_type == "regression" else len(self.labels)

    @property
    def is_choice(self) -> bool:
        """Whether the model scores candidates rather than classes."""
        return bool(self.choices or self.choices_from)

    @property
    def mean_over_tokens(self) -> bool:
        """Whether a candidate in a cloze scores the mean over its tokens."""
        return self.cloze is not None and self.casting == "cloze" and self.cloze.mean_over_tokens

    @property
    def verbalizers(self) -> tuple[str, ...]:
        """The word of each label, where the task is asked as a cloze."""
        return self.cloze.verbalizers if self.cloze is not None and self.casting == "cloze" else ()

    def __post_init__(self) -> None:
        if self.casting == "cloze" and self.cloze is None:
            raise ConfigError(
                f"task {self.name} has no cloze form; write one, or give a model with a task head (casting=head)"
            )
        self._check_problem()
        for name in RESERVED:
            if name in self.fields:
                raise ConfigError(f"fields: {name!r} has a meaning of its own in templates; rename the field")
        for key in ("name", "folder", "hub_name", "val_name"):
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

    def _check_problem(self) -> None:
        """Refuse keys that a type of problem makes nothing of."""
        kind = self.problem_type
        if kind != SENTENCES:
            require_default(self, ("val_fields", "prompt", "pooling"), f"without problem_type {SENTENCES}")
        if self.has_one_answer:
            where = "without problem_type multi_label_classification"
            require_default(self, ("label_fields", "label_separator"), where)
            return
        if self.casting != "head" or self.cloze is not None:
            raise ConfigError(f"task {self.name}: a {kind} has no cloze; give casting=head, and no cloze")
        require_default(self, ("choices", "choices_from", "placeholder", "group_by", "asks_first"), f"beside {kind}")
        if kind != "multi_label_classification":
            require_default(self, ("label_fields", "label_separator"), f"beside {kind}")
        if kind in ("regression", SENTENCES) and self.labels:
            raise ConfigError(f"labels has no effect beside problem_type {kind}: the answer is a number; remove it")
        if self.label_fields and len(self.label_fields) != len(self.labels):
            raise ConfigError(f"label_fields must be one for each of the {len(self.labels)} labels")
        if kind == "token_classification" and (
            self.fields != (self.text[1:-1],) or self.text != f"{{{self.fields[0]}}}" or self.text_pair is not None
        ):
            raise ConfigError(f"text: a {kind} reads one field, which lists words; got {self.text!r}")
        if not self.label_separator.strip():
            raise ConfigError("label_separator is blank")

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
        if self.problem_type not in ("regression", SENTENCES):
            self._check_labels()
        for key in ("placeholder", "max_choices", "asks_first"):
            if getattr(self, key):
                raise ConfigError(f"{key} has no effect without choices or choices_from; remove it")


def require_default(task: Task, keys: Sequence[str], where: str) -> None:
    """Refuse keys of a task that have no effect there."""
    plain = {each.name: each.default for each in fields(Task)}
    for key in keys:
        if getattr(task, key) != plain[key]:
            raise ConfigError(f"{key} has no effect {where}; remove it")


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


def _is_given(label: Any) -> bool:
    return label is not None and not (label == NO_LABEL and type(label) is int)


def _label_text(label: Label) -> str:
    """By which labels are told apart: true and "True" are alike, and 1 and "1"; so are 1 and true, 0 and false."""
    if isinstance(label, str) and label.strip().casefold() not in ("true", "false"):
        return label.strip()
    return str(label).strip().casefold().replace("true", "1").replace("false", "0")


def label_of_text(known: tuple[Label, ...], text: str) -> Label | None:
    """The label that a field of a file of texts means: 5.0 is 5, Positive is positive, true is True, where only one
    of `known` is meant. None for an empty field and -1, where that is no label; else the text itself."""
    if text in known:
        return text
    alike = [each for each in known if _number_text(each) == _number_text(text)]
    if len(alike) == 1:
        return alike[0]
    return None if text.strip() in ("", str(NO_LABEL)) else text


def _number_text(label: Label) -> str:
    """_label_text without regard to case and to zeros behind a point."""
    text = _label_text(label).casefold()
    return text.partition(".")[0] if re.fullmatch(r"-?\d+\.0+", text) else text


def _listed(labels: tuple[Label, ...]) -> str:
    """The first labels, each cut short, and how many there are beside."""
    shown = [_shown(label) for label in labels]
    ends = itertools.accumulate(len(each) + 2 for each in shown)
    count = max(1, sum(end <= LISTED for end in ends)) if shown else 0
    return ", ".join(shown[:count]) + (f" and {len(shown) - count:,} more" if len(shown) > count else "")


def _shown(value: Any) -> str:
    """A value as it stands in JSON, cut short."""
    return json.dumps(value, ensure_ascii=False, default=str)[:60]
