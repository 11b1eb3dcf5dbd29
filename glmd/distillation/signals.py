"""What a term can compare: a row of a table for each signal.

    signal = SIGNALS["hidden_states"]
    values = signal.losses["mse"](ours, theirs)       # one per token or example

A new loss is an entry of a row's `losses`, a new signal a row; nothing else knows their names.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor

from glmd.errors import ConfigError
from glmd.losses.embeddings import EMBEDDING_LOSSES
from glmd.losses.feature_loss import FeatureLoss
from glmd.losses.features import ATTENTION_LOSSES, HIDDEN_LOSSES, RELATION_LOSSES, SCORE_LOSSES
from glmd.losses.labels import LABEL_LOSSES
from glmd.losses.logits import LOGIT_LOSSES, TASK_LOGIT_LOSSES
from glmd.models.attention_calls import key_value_heads
from glmd.models.layers import EMBEDDINGS, Place, layer_pairs

# attention_inputs: queries, keys, values, and the scores they give.
# layers: the modules themselves, of a live teacher.
Need = Literal["head", "task_head", "hidden_states", "attentions", "attention_inputs", "modules", "layers"]
WIDEST_PROJECTION = 8  # times the wider model's hidden size


@dataclass(frozen=True)
class Signal:
    """What a term compares.

    level: whether a loss gives a value per example, per token, or per token of each of some layers.
    needs: which parts of a model give it.
    losses: name -> pure function of the student's tensor and the teacher's, or the labels; an option is a keyword-only
        parameter, and one of GIVEN what the stage or the batch gives. Those of layers may say by a FeatureLoss that
        they take more than two (N, ...).
    labels: the batch's column that the student is compared with; None for the teacher.
    least_texts: how many texts of a batch it needs; where these are more than one, each depends on the others.
    """

    level: Literal["token", "example", "layer"]
    needs: frozenset[Need]
    losses: Mapping[str, Callable[..., Tensor]]
    labels: str | None = None
    least_texts: int = 1


SIGNALS: dict[str, Signal] = {
    # Student and teacher over the kept vocabulary.
    "lm_logits": Signal("token", frozenset({"head"}), LOGIT_LOSSES),
    # The student over the kept vocabulary against the masked token.
    "lm_labels": Signal("token", frozenset({"head"}), LABEL_LOSSES, labels="lm_labels"),
    # Student and teacher over a task's classes.
    "task_logits": Signal("example", frozenset({"task_head"}), TASK_LOGIT_LOSSES),
    # The student over a task's classes against the label.
    "task_labels": Signal("example", frozenset({"task_head"}), LABEL_LOSSES, labels="labels"),
    # Vectors of texts, by a sentence encoder.
    "sentence_embeddings": Signal("example", frozenset({"task_head"}), EMBEDDING_LOSSES),
    # What layers give: (R, S, H). The last one as the model gives it, after a final norm where it has one.
    "hidden_states": Signal("layer", frozenset({"hidden_states"}), HIDDEN_LOSSES),
    # Attention probabilities, and scores before the softmax, of each query: (R, S, A, S).
    "attentions": Signal("layer", frozenset({"attentions"}), ATTENTION_LOSSES),
    "attention_scores": Signal("layer", frozenset({"attention_inputs"}), SCORE_LOSSES),
    # What attention is made from, as it is used (after rotation by position): (R, S, A, D).
    **{
        name: Signal("layer", frozenset({"attention_inputs"}), RELATION_LOSSES)
        for name in ("queries", "keys", "values")
    },
    # What a part of the backbone gives, by its name there: (R, S, H).
    "modules": Signal("layer", frozenset({"modules"}), HIDDEN_LOSSES),
}


def feature_loss(term: Any) -> FeatureLoss:
    """The loss of a Term of a signal of layers."""
    loss = SIGNALS[term.signal].losses[term.loss]
    return loss if isinstance(loss, FeatureLoss) else FeatureLoss(loss)


# Parameters of a loss that are no options: the progress of the stage, and the labels of a task's examples.
GIVEN = ("progress", "labels")


def takes(loss: Any, name: str) -> bool:
    """Whether a loss has a keyword-only parameter of this name."""
    return name in _keywords(loss)


def needs_labels(loss: Any) -> bool:
    """Whether a loss on what both models say cannot do without labels; some take them where they are there."""
    return _keywords(loss).get("labels", False)


@cache
def _keywords(loss: Any) -> dict[str, bool]:
    """The keyword-only parameters of a loss, and whether each must be given."""
    parameters = inspect.signature(getattr(loss, "function", loss)).parameters.values()
    return {each.name: each.default is each.empty for each in parameters if each.kind is each.KEYWORD_ONLY}


def pairs_of(term: Any, student: Any, teacher: Any, draw: str = "") -> list[tuple[Place, Place]]:
    """The layers that a term compares, checked against the configs of both models.

    term: a Term of a signal of layers. draw: what drawn layers are a function of. Raises ConfigError, one line, for
    layers, widths or heads that do not fit.
    """
    student, teacher, loss = student.get_text_config(), teacher.get_text_config(), feature_loss(term)
    pairs: Sequence[tuple[Place, Place]]
    try:
        pairs = term.modules or layer_pairs(term.layers, student.num_hidden_layers, teacher.num_hidden_layers, draw)
    except ConfigError as error:
        raise ConfigError(f"{term.name}: {error}") from None
    if loss.is_paired and any(len(set(side)) < len(pairs) for side in zip(*pairs, strict=True)):
        raise ConfigError(f"{term.name}: layers: {term.loss} takes each layer once; give uniform, or such pairs")
    if len(pairs) < loss.least_layers:
        raise ConfigError(f"{term.name}: layers: {loss.least_layers} are needed, {pairs} are fewer; give uniform")
    if term.signal == "modules":
        return list(pairs)
    if (EMBEDDINGS, EMBEDDINGS) in pairs and term.signal != "hidden_states":
        raise ConfigError(f"{term.name}: layers: the embeddings have no {term.signal}; give embeddings: false")
    count: Callable[[Any], int]
    if term.signal == "hidden_states":
        name, remedy, count = "hidden_size", "give projection: linear", attrgetter("hidden_size")
        fits = not loss.same_width or term.projection != "none"
    else:
        is_shared = term.signal in ("keys", "values")  # by several heads of queries, in many decoders
        name, count = "num_attention_heads", attrgetter("num_attention_heads")
        if is_shared and any(key_value_heads(each) != count(each) for each in (student, teacher)):
            name, count = "num_key_value_heads", key_value_heads
        remedy = "give a student with as many" + (", or relation_heads" if loss.unit == "row" else "")
        fits = term.options.get("relation_heads") is not None
    if count(student) != count(teacher) and not fits:
        found = f"the student's {name} is {count(student)}, the teacher's {count(teacher)}"
        raise ConfigError(f"{term.name}: {found}; {remedy}")
    most = WIDEST_PROJECTION * max(student.hidden_size, teacher.hidden_size)
    if (term.projection_size or 0) > most:
        raise ConfigError(
            f"{term.name}: projection_size {term.projection_size:,} is more than {WIDEST_PROJECTION} times the wider "
            f"model's hidden_size; give at most {most:,}"
        )
    return list(pairs)


def require_layers(terms: Sequence[Any], student: Any, teacher: Any) -> None:
    """Raises ConfigError for the first Term whose layers, or widths, these two configs have not."""
    for term in terms:
        if SIGNALS[term.signal].level == "layer":
            pairs_of(term, student, teacher)
        if term.signal != "sentence_embeddings" or not feature_loss(term).same_width:
            continue
        ours, theirs = (each.get_text_config().hidden_size for each in (student, teacher))
        if ours != theirs:
            others = [name for name, loss in EMBEDDING_LOSSES.items() if not loss.same_width]
            raise ConfigError(
                f"{term.name}: the student's hidden_size is {ours}, the teacher's {theirs}; give a student as wide, or "
                f"a method of {' or '.join(others)} alone"
            )
