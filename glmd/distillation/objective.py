"""A method as composed terms: signal x loss x tokens x weight, read from configs/methods/*.yaml.

    method = load_method("glmd")
    objective = method["pretraining"]          # Objective of one term: KL of word logits at temperature 15

A term yields one number per token or example; the objective sums them, counts what they are averaged over, and
divides once. A YAML may only name options that the loss function has.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from glmd.config import STAGES
from glmd.distillation.schedules import scheduled_weight
from glmd.errors import ConfigError, suggestion
from glmd.losses.labels import LABEL_LOSSES
from glmd.losses.logits import LOGIT_LOSSES
from glmd.strict_yaml import coerce, load_yaml, named_file

Signal = Literal["lm_logits", "lm_labels", "task_logits", "task_labels"]

# What a term compares, and the losses that can compare it.
SIGNALS: dict[str, Mapping[str, Callable[..., Tensor]]] = {
    "lm_logits": LOGIT_LOSSES,  # student and teacher over the kept vocabulary, one value per token
    "lm_labels": LABEL_LOSSES,  # student over the kept vocabulary against the masked word, per masked token
    "task_logits": LOGIT_LOSSES,  # student and teacher over a task's classes, per example
    "task_labels": LABEL_LOSSES,  # student over a task's classes against the label, per example
}
LM_SIGNALS = ("lm_logits", "lm_labels")


@dataclass(frozen=True)
class Term:
    """One comparison of student and teacher (or label)."""

    signal: Signal
    loss: str
    weight: float | dict[str, float] = 1.0  # a number, or {from: a, to: b} over the stage's progress
    tokens: Literal["all", "masked"] = "all"  # word signals: every non-pad token, or only the masked ones
    options: dict[str, Any] = field(default_factory=dict)  # keyword options of the loss, e.g. temperature
    gkd_compat: bool = False  # lm_logits: divide by all B * S positions, pads included, as GLMD's published code does

    @property
    def name(self) -> str:
        return f"{self.signal}.{self.loss}"

    @property
    def needs_masking(self) -> bool:
        """Whether the term says nothing about clean inputs."""
        return self.tokens == "masked"


@dataclass(frozen=True)
class Objective:
    """The terms of one stage."""

    terms: tuple[Term, ...]

    def uses(self, *signals: str) -> bool:
        return any(term.signal in signals for term in self.terms)

    @property
    def needs_masking(self) -> bool:
        return any(term.needs_masking for term in self.terms)

    def counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(terms,) float64: how many tokens or examples each term's mean runs over in this micro-batch."""
        return torch.tensor([float(self._count(term, batch)) for term in self.terms], dtype=torch.float64)

    def _count(self, term: Term, batch: Mapping[str, Tensor]) -> int:
        if term.signal == "task_logits":
            return len(batch["example_id"])
        if term.signal == "task_labels":
            return int((batch["labels"] >= 0).sum())
        if term.gkd_compat:
            return batch["input_ids"].numel()
        return int(token_mask(term, batch).sum())

    def means(self, sums: Tensor, counts: Tensor) -> Tensor:
        """(terms,) mean of each term from global sums and counts; a term without tokens is 0."""
        return sums / counts.clamp(min=1).to(sums)

    def total(self, means: Tensor, progress: float) -> Tensor:
        """Scalar: the weighted sum of the terms' means at `progress` in [0, 1]."""
        weights = [scheduled_weight(term.weight, progress) for term in self.terms]
        return (means * means.new_tensor(weights)).sum()


def token_mask(term: Term, batch: Mapping[str, Tensor]) -> Tensor:
    """(B, S) bool: the positions a word term is about. Pads never are."""
    mask = batch["predicts"]
    return mask & (batch["lm_labels"] >= 0) if term.tokens == "masked" else mask


def load_method(name: str) -> dict[str, Objective]:
    """Stage -> objective, from a built-in method or a YAML of the user's.

    Raises ConfigError naming file, stage, term and key.
    """
    path = named_file("methods", name)
    method = {}
    for stage, terms in load_yaml(path).items():
        if stage not in STAGES:
            raise ConfigError(f"{path}: {stage} is unknown{suggestion(stage, STAGES)}")
        if not isinstance(terms, list) or not terms:
            raise ConfigError(f"{path}: {stage} must be a list of terms, got {terms!r}")
        parsed = tuple(parse_term(term, f"{path}: {stage}[{i}]", stage) for i, term in enumerate(terms))
        names = [term.name for term in parsed]
        if len(set(names)) < len(names):
            raise ConfigError(f"{path}: {stage} has a term twice ({', '.join(names)}); add their weights")
        method[stage] = Objective(parsed)
    if not method:
        raise ConfigError(f"{path}: no stage; name at least one of {', '.join(STAGES)}")
    return method


def parse_term(values: Any, where: str, stage: str) -> Term:
    """A checked term from its YAML mapping. Raises ConfigError that begins with `where`."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping, got {values!r}")
    for key in ("signal", "loss"):
        if key not in values:
            raise ConfigError(f"{where}.{key} is missing")
    signal, loss = values["signal"], values["loss"]
    allowed = LM_SIGNALS if stage == "pretraining" else tuple(SIGNALS)
    if signal not in allowed:
        raise ConfigError(f"{where}.signal {signal!r} is not possible here{suggestion(str(signal), allowed)}")
    if loss not in SIGNALS[signal]:
        raise ConfigError(f"{where}.loss {loss!r} does not fit {signal}{suggestion(str(loss), SIGNALS[signal])}")
    options = _loss_options(SIGNALS[signal][loss])
    own = {"weight"} | ({"tokens", "gkd_compat"} if signal == "lm_logits" else set())
    for key in values:
        if key not in {"signal", "loss", *own, *options}:
            raise ConfigError(f"{where}.{key} has no effect on {signal} {loss}{suggestion(key, [*own, *options])}")
    weight = _checked_weight(values.get("weight", 1.0), f"{where}.weight")
    # Only a masked token has a label, so lm_labels speaks of masked tokens whatever is asked.
    tokens: Any = (
        "masked"
        if signal == "lm_labels"
        else coerce(Literal["all", "masked"], values.get("tokens", "all"), f"{where}.tokens")
    )
    given = {key: coerce(options[key], values[key], f"{where}.{key}") for key in options if key in values}
    if not 0 < given.get("temperature", 1.0) < float("inf"):
        raise ConfigError(f"{where}.temperature must be above 0 and finite, got {given['temperature']}")
    gkd_compat = coerce(bool, values.get("gkd_compat", False), f"{where}.gkd_compat")
    return Term(signal, loss, weight, tokens, given, gkd_compat)


def _loss_options(function: Callable[..., Tensor]) -> dict[str, Any]:
    """The keyword-only options of a loss function, with their types."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.annotation for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _checked_weight(weight: Any, where: str) -> float | dict[str, float]:
    checked = coerce(float | dict[str, float], weight, where)
    if isinstance(checked, dict) and set(checked) != {"from", "to"}:
        raise ConfigError(f"{where} must be a number or {{from: a, to: b}}, got {weight!r}")
    for value in checked.values() if isinstance(checked, dict) else [checked]:
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{where} must be at least 0, got {value}")
    return checked


HARD_LABELS = Objective((Term("task_labels", "hard_cross_entropy"),))


MASKED_LM = Objective((Term("lm_labels", "hard_cross_entropy", tokens="masked"),))
