"""What a term can compare: a row of a table for each signal.

    signal = SIGNALS["hidden_states"]
    pairs = signal.pair(student, teacher, batch)      # [(student's tensor, teacher's or labels), ...]
    values = signal.losses["mse"](*pairs[0])          # one per token or example

A new loss is an entry of a row's `losses`, a new signal a row; nothing else knows their names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from glmd.distillation.teacher import TeacherOutputs
from glmd.errors import ConfigError
from glmd.losses.features import ATTENTION_LOSSES, HIDDEN_LOSSES
from glmd.losses.labels import LABEL_LOSSES
from glmd.losses.logits import LOGIT_LOSSES
from glmd.models.layers import layer_pairs

Need = Literal["head", "task_head", "hidden_states", "attentions"]


@dataclass(frozen=True)
class StudentOutputs:
    """What one term asks of the student: `task_logits` (B, C), or its layers, projected, with their partners."""

    task_logits: Tensor | None = None
    layers: Sequence[Tensor] = ()  # (N, H) or (N, A, S) each
    partners: Sequence[int] = ()  # the teacher's layer of each


Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Signal:
    """What a term compares.

    level: whether a loss gives a value per example, per token, or per token of each of some layers.
    needs: which parts of a model give it.
    losses: name -> pure function of the two tensors of a pair; an option is a keyword-only parameter.
    pair: the tensors to compare; None where `losses.linear` makes the logits itself.
    labels: the batch's column that the student is compared with; None for the teacher.
    couples: whether the value of an example depends on the others of its batch.
    """

    level: Literal["token", "example", "layer"]
    needs: frozenset[Need]
    losses: Mapping[str, Callable[..., Tensor]]
    pair: Callable[[StudentOutputs, TeacherOutputs, Mapping[str, Tensor]], Pairs] | None = None
    labels: str | None = None
    couples: bool = False


def pair_task_logits(student: StudentOutputs, teacher: TeacherOutputs, batch: Mapping[str, Tensor]) -> Pairs:
    assert student.task_logits is not None and teacher.task_logits is not None, "both have a task head"
    return [(student.task_logits, teacher.task_logits)]


def pair_task_labels(student: StudentOutputs, teacher: TeacherOutputs, batch: Mapping[str, Tensor]) -> Pairs:
    assert student.task_logits is not None, "the student has a task head"
    return [(student.task_logits, batch["labels"])]


def pair_layers(signal: str) -> Callable[[StudentOutputs, TeacherOutputs, Mapping[str, Tensor]], Pairs]:
    """The pairing of a signal that each layer has."""

    def pair(student: StudentOutputs, teacher: TeacherOutputs, batch: Mapping[str, Tensor]) -> Pairs:
        theirs = teacher.layers[signal]
        return [(ours, theirs[layer]) for ours, layer in zip(student.layers, student.partners, strict=True)]

    return pair


SIGNALS: dict[str, Signal] = {
    # Student and teacher over the kept vocabulary.
    "lm_logits": Signal("token", frozenset({"head"}), LOGIT_LOSSES),
    # The student over the kept vocabulary against the masked token.
    "lm_labels": Signal("token", frozenset({"head"}), LABEL_LOSSES, labels="lm_labels"),
    # Student and teacher over a task's classes.
    "task_logits": Signal("example", frozenset({"task_head"}), LOGIT_LOSSES, pair_task_logits),
    # The student over a task's classes against the label.
    "task_labels": Signal("example", frozenset({"task_head"}), LABEL_LOSSES, pair_task_labels, labels="labels"),
    # What layers give: (N, H). The last one as the model gives it, after a final norm where it has one.
    "hidden_states": Signal("layer", frozenset({"hidden_states"}), HIDDEN_LOSSES, pair_layers("hidden_states")),
    # Attention probabilities: (N, A, S).
    "attentions": Signal("layer", frozenset({"attentions"}), ATTENTION_LOSSES, pair_layers("attentions")),
}


def pairs_of(term: Any, student: Any, teacher: Any) -> list[tuple[int, int]]:
    """The layers that a term compares, checked against the configs of both models.

    term: a Term of a signal of layers. Raises ConfigError, one line, for layers, widths or heads that do not fit.
    """
    student, teacher = student.get_text_config(), teacher.get_text_config()
    try:
        pairs = layer_pairs(term.layers, student.num_hidden_layers, teacher.num_hidden_layers)
    except ConfigError as error:
        raise ConfigError(f"{term.name}: {error}") from None
    name, remedy = (
        ("hidden_size", "give projection: linear")
        if term.signal == "hidden_states"
        else ("num_attention_heads", "give a student with as many")
    )
    ours, theirs = getattr(student, name), getattr(teacher, name)
    if ours != theirs and term.projection == "none":
        raise ConfigError(f"{term.name}: the student's {name} is {ours}, the teacher's {theirs}; {remedy}")
    return pairs


def require_layers(terms: Sequence[Any], student: Any, teacher: Any) -> None:
    """Raises ConfigError for the first Term whose layers these two configs have not."""
    for term in terms:
        if SIGNALS[term.signal].level == "layer":
            pairs_of(term, student, teacher)
