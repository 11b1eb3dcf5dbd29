"""The forms in which a task is put to a model: the rows that it reads, its class, and the logits of its answer.

    form = task_form(load_task("RTE"), kind="masked")          # ClassForm
    data = TaskDataset(examples, form, tokenizer, max_length=256)
    logits = form.logits(Split(model), outputs, inputs, batch)        # (B, C)

A form is one class; `CASTINGS` says which one a task has under a run's `casting`. Another form is another class, and an
entry there.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from glmd.errors import ConfigError, ModelError, suggestion
from glmd.losses.labels import IGNORED_LABEL
from glmd.losses.positions import rows_at
from glmd.models.heads import LMKind, Split, is_encoder, task_class
from glmd.models.loading import language_model_class
from glmd.models.pooling import Pooling
from glmd.models.probes import (
    one_choice_each,
    prove_answers_unseen,
    prove_encoder,
    prove_language_model,
    prove_task_model,
)
from glmd.tasks.blank_rows import blank_rows
from glmd.tasks.cloze import cloze_logits, cloze_rows, continuation_rows, infilling_rows, verbalizer_ids
from glmd.tasks.examples import TaskExample
from glmd.tasks.rows import Rows, pair_rows, word_rows
from glmd.tasks.tasks import SENTENCES, ProblemType, Task

logger = logging.getLogger(__name__)
Batch = Mapping[str, Tensor]
TaskLogits = Callable[..., Tensor]  # (split, outputs, inputs, batch, token_map) -> (B, C), as `TaskForm.logits`


class TaskForm(ABC):
    """One way to put a task to a model.

    has_own_head: whether its model has a head that language models lack; else it is a language model itself. head:
        which, as it stands in the names of stock classes; "" for none. unread: parts of its model, by the beginnings of
        their names, that a file need not hold, and that are not trained.

    Logits are (N, K) of decisions: an example is one, unless several of its labels may be right, which are a decision
    of yes or no each, or its words have labels of their own. The batch's `num_decisions` (B,) then says how many.
    """

    name: ClassVar[str]
    has_own_head: ClassVar[bool] = True
    head: ClassVar[str] = "SequenceClassification"
    unread: ClassVar[tuple[str, ...]] = ()

    def __init__(self, task: Task) -> None:
        self.task = task

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.task!r})"

    @abstractmethod
    def rows(self, examples: Sequence[TaskExample], tokenizer: Any, *, max_length: int) -> Rows:
        """What the model reads of each example. Raises DataError for an example that cannot be put so."""

    def model_class(self, config: Any) -> Any:
        """The auto class of a stock model for this form."""
        import transformers

        return getattr(transformers, f"AutoModelFor{self.head}")

    def label_column(self, examples: Sequence[TaskExample]) -> np.ndarray | None:
        """(B,) or (B, C) labels of the examples, -100 or nan where there is none; None where `rows` gives them."""
        return np.array([IGNORED_LABEL if each.label is None else each.label for each in examples])

    @abstractmethod
    def logits(
        self, split: Split, outputs: Any, inputs: Batch, batch: Batch, token_map: Tensor | None = None
    ) -> Tensor:
        """(N, K) logits of decisions on the backbone's `outputs`; -inf for a choice that an example does not have.

        inputs: what the backbone was given. batch: all columns. token_map: (V,) source id -> the model's own.
        """

    @abstractmethod
    def require(self, config: Any, name: str) -> None:
        """Refuse the model at `name` where its config says that it is none of this form. Raises ModelError."""

    def prove(self, model: Any) -> None:
        """Prove what glmd assumes of a model of this form. Raises ModelError."""
        (prove_task_model if self.has_own_head else prove_language_model)(model)

    def new_head(self) -> dict[str, Any]:
        """What `from_pretrained` is told where a head of this form begins on a language model."""
        return {}

    def num_outputs(self, config: Any) -> int:
        """K of a model's logits, by its config; 0 where it differs by example."""
        return self.task.num_classes

    def dummy(self, examples: int, choices: int, length: int) -> dict[str, Tensor]:
        """The columns of this form in a batch of so many examples, with arbitrary values."""
        return {"num_choices": torch.full((examples,), choices)} if self.task.is_choice else {}

    def _require_architecture(self, config: Any, name: str, needed: str) -> None:
        for architecture in config.architectures or ():
            if needed not in architecture:
                raise ModelError(f"{name}: holds a {architecture}; {self.task.name} needs a model for {needed}")


class ClassForm(TaskForm):
    """Classes by a stock model for sequence classification."""

    name = "classes"

    def rows(self, examples: Sequence[TaskExample], tokenizer: Any, *, max_length: int) -> Rows:
        return pair_rows(examples, tokenizer, max_length=max_length)

    def logits(
        self, split: Split, outputs: Any, inputs: Batch, batch: Batch, token_map: Tensor | None = None
    ) -> Tensor:
        return class_logits(split, outputs, inputs, batch, token_map)

    def require(self, config: Any, name: str) -> None:
        """Also refuses classes that are not the task's, in the task's order."""
        self._require_architecture(config, name, self.head)
        theirs = getattr(config, "problem_type", None)
        if self.head == "SequenceClassification" and theirs not in (None, self.task.problem_type):
            raise ModelError(
                f"{name}: its problem_type is {theirs}, that of {self.task.name} {self.task.problem_type}; give the "
                "task's model, or the task that type"
            )
        got, expected = _classes_of(config), self._names()
        if not _is_unnamed(got) and [each.lower() for each in got] != [each.lower() for each in expected]:
            raise ModelError(f"{name}: its classes {got} are not those of {self.task.name} in this order: {expected}")
        if len(got) != len(expected):
            raise ModelError(f"{name}: has {len(got)} classes, {self.task.name} has {len(expected)}: {expected}")

    def new_head(self) -> dict[str, Any]:
        names = self._names()
        named = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        is_said = self.head == "SequenceClassification" and not self.task.has_one_answer
        return named | ({"problem_type": self.task.problem_type} if is_said else {})

    def _names(self) -> list[str]:
        return [str(label) for label in self.task.labels]


class LabelsForm(ClassForm):
    """Several labels by a stock model for sequence classification: of each its logit against 0, as a sigmoid has it."""

    name = "labels"

    def logits(
        self, split: Split, outputs: Any, inputs: Batch, batch: Batch, token_map: Tensor | None = None
    ) -> Tensor:
        found = class_logits(split, outputs, inputs, batch, token_map).flatten()
        return torch.stack([torch.zeros_like(found), found], dim=-1)

    def label_column(self, examples: Sequence[TaskExample]) -> np.ndarray:
        none = (IGNORED_LABEL,) * len(self.task.labels)
        return np.array([none if each.label is None else each.label for each in examples])

    def dummy(self, examples: int, choices: int, length: int) -> dict[str, Tensor]:
        count = len(self.task.labels)
        return {"num_decisions": torch.full((examples,), count), "labels": torch.zeros(examples * count).long()}


class NumberForm(ClassForm):
    """A number by a stock model for sequence classification with one output."""

    name = "number"

    def label_column(self, examples: Sequence[TaskExample]) -> np.ndarray:
        return np.array([np.nan if each.label is None else each.label for each in examples], dtype=np.float32)

    def _names(self) -> list[str]:
        return ["LABEL_0"]

    def require(self, config: Any, name: str) -> None:
        if config.num_labels != 1:
            found = f"{config.num_labels} outputs ({', '.join(_classes_of(config)[:5])})"
            raise ModelError(f"{name}: has {found}; the answer of {self.task.name} is a number")
        self._require_architecture(config, name, self.head)

    def dummy(self, examples: int, choices: int, length: int) -> dict[str, Tensor]:
        return {"labels": torch.zeros(examples)}


class WordForm(ClassForm):
    """A label for each word by a stock model for token classification, at the first token of each."""

    name = "words"
    head = "TokenClassification"

    def rows(self, examples: Sequence[TaskExample], tokenizer: Any, *, max_length: int) -> Rows:
        return word_rows(examples, tokenizer, max_length=max_length)

    def label_column(self, examples: Sequence[TaskExample]) -> None:
        return None

    def logits(
        self, split: Split, outputs: Any, inputs: Batch, batch: Batch, token_map: Tensor | None = None
    ) -> Tensor:
        return rows_at(class_logits(split, outputs, inputs, batch, token_map), batch["tagged_positions"])

    def dummy(self, examples: int, choices: int, length: int) -> dict[str, Tensor]:
        marks = torch.ones(examples, length).long()
        marks[-1, -1] = 0  # padding
        return {
            "tagged": marks,
            "tagged_positions": marks.flatten().nonzero()[:, 0],
            "num_decisions": marks.sum(1),
            "labels": torch.zeros(int(marks.sum())).long(),
        }


class ChoiceForm(TaskForm):
    """Candidates by a stock model for multiple choice, each a row of its own."""

    name = "choices"
    head = "MultipleChoice"

    def rows(self, examples: Sequence[TaskExample], tokenizer: Any, *, max_length: int) -> Rows:
        return pair_rows(examples, tokenizer, max_length=max_length)

    def logits(
        self, split: Split, outputs: Any, inputs: Batch, batch: Batch, token_map: Tensor | None = None
    ) -> Tensor:
        return choice_logits(split.run_head(outputs, inputs=one_choice_each(inputs)), batch["num_choices"])

    def require(self, config: Any, name: str) -> None:
        self._require_architecture(config, name, self.head)


class ClozeForm(TaskForm):
    """Tokens that fill a cloze, by a masked LM: one verbalizer for each label, or the candidates (arXiv:2103.10360).

    make_rows: of its model. architecture: a part of the names of its model's classes.
    """

    name = "cloze"
    has_own_head = False
    make_rows: ClassVar[Callable[..., Rows]] = staticmethod(cloze_rows)
    architecture: ClassVar[str] = "MaskedLM"

    def rows(self, examples: Sequence[TaskExample], tokenizer: Any, *, max_length: int) -> Rows:
        return self.make_rows(examples, tokenizer, max_length=max_length)._replace(columns=self._columns(tokenizer))

    def _columns(self, tokenizer: Any) -> dict[str, Any]:
        verbalizers = np.array(verbalizer_ids(self.task, tokenizer), dtype=np.int64)
        columns: dict[str, Any] = {"verbalizers": verbalizers} if len(verbalizers) else {}
        return columns | ({"mean_over_tokens": 1} if self.task.mean_over_tokens else {})

    def model_class(self, config: Any) -> Any:
        return language_model_class(config)

    def logits(
        self, split: Split, outputs: Any, inputs: Batch, batch: Batch, token_map: Tensor | None = None
    ) -> Tensor:
        scores: Tensor = split.run_head(
            outputs, final_linear=lambda hidden, head: cloze_logits(batch, token_map, hidden, head)
        )
        return choice_logits(scores, batch["num_choices"]) if "num_choices" in batch else scores

    def require(self, config: Any, name: str) -> None:
        self._require_architecture(config, name, self.architecture)

    def dummy(self, examples: int, choices: int, length: int) -> dict[str, Tensor]:
        ids = torch.full((examples * choices, length), IGNORED_LABEL)
        ids[:, 1] = 1
        columns = super().dummy(examples, choices, length) | {"cloze_ids": ids}
        if not self.task.is_choice:
            columns["verbalizers"] = torch.arange(len(self.task.labels)).expand(examples, -1)
        return columns


class ContinuationForm(ClozeForm):
    """The same by a causal LM, which predicts what fills the cloze, and what follows it, from what stands before."""

    name = "continuation"
    make_rows = staticmethod(continuation_rows)

    def require(self, config: Any, name: str) -> None:
        """Every causal LM is one of this form."""


class InfillingForm(ClozeForm):
    """The same by an encoder-decoder: its encoder reads the cloze, its decoder says what fills it."""

    name = "infilling"
    make_rows = staticmethod(infilling_rows)
    architecture = "ForConditionalGeneration"

    def prove(self, model: Any) -> None:
        """Also that the decoder is not told the answer."""
        super().prove(model)
        prove_answers_unseen(model)

    def dummy(self, examples: int, choices: int, length: int) -> dict[str, Tensor]:
        return super().dummy(examples, choices, length) | {"target_ids": torch.ones(examples * choices, length).long()}


class BlankForm(ClozeForm):
    """The same by a GLM, which says token by token what fills its blank."""

    name = "blanks"
    make_rows = staticmethod(blank_rows)
    architecture = "ForBlankInfilling"


class SentenceForm(TaskForm):
    """The vector of a sentence by a model without a head; each text of an example is a row of its own.

    Logits are (R, H), of which an example of two texts has two.
    """

    name = "sentences"
    head = ""
    unread = ("pooler",)  # BERT's, which sentence-transformers does not look at

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        mode, normalizes = task.pooling
        self.pooling = Pooling(mode, normalizes)  # type: ignore[arg-type]

    def rows(self, examples: Sequence[TaskExample], tokenizer: Any, *, max_length: int) -> Rows:
        count = len(examples[0].texts)
        return pair_rows(examples, tokenizer, max_length=max_length)._replace(
            columns={"num_decisions": np.array(count)} if count > 1 else {}
        )

    def label_column(self, examples: Sequence[TaskExample]) -> None:
        return None

    def model_class(self, config: Any) -> Any:
        import transformers

        return transformers.AutoModel

    def logits(
        self, split: Split, outputs: Any, inputs: Batch, batch: Batch, token_map: Tensor | None = None
    ) -> Tensor:
        return self.pooling(outputs.last_hidden_state, inputs["attention_mask"])

    def require(self, config: Any, name: str) -> None:
        if not is_encoder(config):
            raise ModelError(
                f"{name}: holds a {(config.architectures or ['model'])[0]}; {self.task.name} is of sentences, and "
                "needs a sentence encoder: a model without a head, or with modules.json beside it"
            )

    def prove(self, model: Any) -> None:
        prove_encoder(model)

    def num_outputs(self, config: Any) -> int:
        return int(config.get_text_config().hidden_size)


# Of tasks with classes, a number, or a vector.
HEADS: dict[ProblemType, type[TaskForm]] = {
    "single_label_classification": ClassForm,
    "multi_label_classification": LabelsForm,
    "regression": NumberForm,
    "token_classification": WordForm,
    SENTENCES: SentenceForm,
}


def _head(task: Task, kind: LMKind) -> TaskForm:
    return ChoiceForm(task) if task.is_choice else HEADS[task.problem_type](task)


CLOZES: dict[LMKind, type[TaskForm]] = {
    "masked": ClozeForm,
    "causal": ContinuationForm,
    "encoder-decoder": InfillingForm,
    "blank-infilling": BlankForm,
}


def _cloze(task: Task, kind: LMKind) -> TaskForm:
    return CLOZES[kind](task)


# casting -> (task, how the teacher predicts tokens) -> form
CASTINGS: dict[str, Callable[[Task, LMKind], TaskForm]] = {"head": _head, "cloze": _cloze}


def task_form(task: Task, *, kind: LMKind) -> TaskForm:
    """The form of a task as it is cast, for models of a kind. Raises ConfigError for an unknown casting."""
    if task.casting not in CASTINGS:
        raise ConfigError(f"casting {task.casting!r} is unknown{suggestion(task.casting, CASTINGS)}")
    return CASTINGS[task.casting](task, kind)


def class_logits(split: Split, outputs: Any, inputs: Batch, batch: Batch, token_map: Tensor | None = None) -> Tensor:
    """(B, C) logits of a classification head, or (B, S, C) of one for tokens, as `ClassForm.logits`."""
    logits: Tensor = split.run_head(outputs, inputs=inputs)
    return logits


def choice_logits(scores: Tensor, num_choices: Tensor) -> Tensor:
    """(R, 1) scores of rows and (B,) how many of them are each example's -> (B, C), -inf for what is not there."""
    exists = torch.arange(int(num_choices.max()), device=scores.device) < num_choices[:, None]
    return scores.new_full(exists.shape, -torch.inf).masked_scatter(exists, scores)


def problem_of(config: Any) -> ProblemType | None:
    """What a task model's config says of the answers that it gives; None where it leaves that open."""
    name = task_class(config) or ""
    if is_encoder(config):
        return SENTENCES
    if name.endswith("TokenClassification"):
        return "token_classification"
    told: ProblemType | None = getattr(config, "problem_type", None)
    is_number = name.endswith("SequenceClassification") and config.num_labels == 1
    return "regression" if told is None and is_number else told


def warn_of_unnamed_classes(config: Any, form: TaskForm, name: str) -> None:
    """Say where a classifier's classes have no names, and are therefore taken to be in the task's order."""
    if isinstance(form, ClassForm) and form.task.labels and _is_unnamed(_classes_of(config)):
        logger.warning(
            "%s: its config names no classes (LABEL_0, ...); they are taken to be those of %s in this order: %s. If "
            "they stand in another, name them in its id2label",
            name,
            form.task.name,
            ", ".join(map(str, form.task.labels)),
        )


def _classes_of(config: Any) -> list[str]:
    return [str(config.id2label[i]) for i in sorted(config.id2label)]


def _is_unnamed(classes: list[str]) -> bool:
    return classes == [f"LABEL_{i}" for i in range(len(classes))]
