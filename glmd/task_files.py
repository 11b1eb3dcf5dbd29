"""Where the rows of a task of a run lie, and which of their columns it reads: keys of `tasks` that train nothing.

files = task_files({"train": "reviews.csv", "text": "body", "label": "stars"}, "tasks.reviews")
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glmd.stage_config import require
from glmd.strict_yaml import build

VAL_FRACTION = 0.1
SENTENCES = "sentence_similarity"
PROBLEMS = (
    *("single_label_classification", "multi_label_classification", "regression", "token_classification"),
    SENTENCES,
)
POOLINGS = ("mean", "cls", "last")


@dataclass(frozen=True)
class TaskFiles:
    """Files of rows, or folders of them, and what the task is: a YAML, or columns of the files."""

    definition: str | None = None  # its YAML; None: its name is one of configs/tasks, or it is made of columns
    train: str | None = None
    val: str | None = None  # the same as train where a share of that is held out
    inputs: str | None = None  # what the student learns from in place of train
    text: str | None = None  # column that a model reads
    text_pair: str | None = None  # column of the second text
    # Column of the answer; or of several labels a column of 0 and 1 for each. Of sentences that of how similar the two
    # of a row of val are; without it the student is scored by how near its vectors are to the teacher's
    label: str | list[str] | None = None
    # Of columns, by transformers' names: single_label_classification, multi_label_classification, regression,
    # token_classification or sentence_similarity. None: what a named teacher's config says, else what the rows show
    problem_type: str | None = None
    val_text: str | list[str] | None = None  # of sentences: column or two of val, where it has others than train
    # Of sentences: what is put before each. None: the default prompt of the encoder's folder
    prompt: str | None = None
    # Of sentences: mean, cls or last, where no 1_Pooling/config.json beside the encoder says how a vector is made
    pooling: str | None = None
    val_fraction: float | None = None  # share of each label's rows of train that is held out as val

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_column = field.name in ("text", "text_pair", "label", "val_text")
            given = "give a column" if is_column else "give a path"
            is_given = not isinstance(value, str) or bool(value.strip()) or field.name == "prompt"
            require(is_given, f"{field.name} is empty; {given}, or remove it")
        fraction = self.val_fraction
        if fraction is not None:
            require(
                self.train is not None, "val_fraction has no effect without train, of which it is held out; give it"
            )
            require(
                self.val in (None, self.train),
                "val_fraction has no effect: val is no share of train; remove one of the two",
            )
            require(0 < fraction < 1, f"val_fraction must be in (0, 1), got {fraction}")
        if self.text is None:
            for name in ("text_pair", "label", "problem_type", "val_text", "prompt", "pooling"):
                require(getattr(self, name) is None, f"{name} has no effect without text, the column to read; give it")
            return
        require(self.definition is None, "definition and text are both given; keep the YAML or the columns")
        is_of_sentences = self.problem_type in (None, SENTENCES)
        require(self.label is not None or is_of_sentences, "label is missing: the column of the answers")
        for name in ("val_text", "prompt", "pooling"):
            require(getattr(self, name) is None or is_of_sentences, f"{name} has no effect beside {self.problem_type}")
        mode = self.pooling
        require(mode in (None, *POOLINGS), f"pooling must be one of {', '.join(POOLINGS)}; got {mode!r}")
        sides = [self.val_text] if isinstance(self.val_text, str) else self.val_text
        require(
            sides is None or len(set(sides)) == len(sides) in (1, 2), "val_text names one column, or two that differ"
        )
        labels = self.label if isinstance(self.label, list) else [self.label]
        is_clear = not isinstance(self.label, list) or len(labels) > 1
        require(is_clear, "label lists fewer than two columns; name the one of the answers")
        problem = self.problem_type
        require(problem in (None, *PROBLEMS), f"problem_type must be one of {', '.join(PROBLEMS)}; got {problem!r}")
        columns = [each for each in (self.text, self.text_pair, *labels) if each is not None]
        require(len(set(columns)) == len(columns), f"text, text_pair and label name a column twice: {columns}")
        require(
            self.train is not None or (self.inputs is not None and self.val is not None),
            "train is missing: the labels are those of its rows",
        )


TASK_FILES = tuple(field.name for field in dataclasses.fields(TaskFiles))


def task_files(changes: Mapping[str, Any], where: str) -> TaskFiles:
    """Of a task's keys those of its files. Raises ConfigError that begins with `where` and the key."""
    return build(TaskFiles, {key: value for key, value in changes.items() if key in TASK_FILES}, where)


def with_held_out(changes: dict[str, Any]) -> dict[str, Any]:
    """The keys of a task, with val and its share where that is of train, which it is of columns unless val is given."""
    train, fraction = changes.get("train"), changes.get("val_fraction")
    is_meant = fraction is not None or changes.get("text") is not None
    if not is_meant or train is None or changes.get("val") not in (None, train):
        return changes
    return {**changes, "val": train, "val_fraction": VAL_FRACTION if fraction is None else fraction}
