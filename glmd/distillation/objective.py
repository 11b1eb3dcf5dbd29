"""A method as composed terms: signal x loss x tokens x weight, read from configs/methods/*.yaml.

    method = load_method("glmd")
    objective = method["pretraining"]          # Objective of one term: KL of LM logits at temperature 15

A term yields one number per token or example; the objective sums them, counts what they are averaged over, and
divides once. A YAML may only name options that the loss function has.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from glmd.config import STAGES
from glmd.distillation.interventions import INTERVENTIONS, Intervention
from glmd.distillation.schedules import scheduled_weight
from glmd.distillation.signals import SIGNALS, Need
from glmd.errors import RENAMED, ConfigError, suggestion
from glmd.models.layers import LayerChoice, Layers
from glmd.strict_yaml import build, coerce, load_yaml, named_file


@dataclass(frozen=True)
class Term:
    """One comparison of student and teacher (or label)."""

    signal: str  # a key of SIGNALS
    loss: str
    weight: float | dict[str, float] = 1.0  # a number, or {from: a, to: b} over the stage's progress
    # Of words and layers: every non-pad token, or only the masked ones; of layers also the first one of each text, or
    # the mean of its tokens
    tokens: Literal["all", "masked", "first", "mean"] = "all"
    options: dict[str, Any] = field(default_factory=dict)  # keyword options of the loss, e.g. temperature
    gkd_compat: bool = False  # lm_logits: divide by all B * S positions, pads included, as GLMD's published code does
    layers: Layers = "uniform"  # of signals of layers: which are compared (`layer_pairs`)
    over_layers: Literal["mean", "sum"] = "mean"  # what is taken of the values of the layers
    projection: Literal["none", "linear"] = "none"  # hidden_states: a learned map from the student's width
    label: str = ""  # what tells it from a term of the same signal and loss, in logs and results

    @property
    def name(self) -> str:
        return f"{self.signal}.{self.loss}" + (f".{self.label}" if self.label else "")

    @property
    def needs_masking(self) -> bool:
        """Whether the term says nothing about clean inputs."""
        return self.tokens == "masked"


@dataclass(frozen=True)
class Objective:
    """The terms of one stage."""

    terms: tuple[Term, ...]
    intervention: Intervention | None = None

    @property
    def needs(self) -> frozenset[Need]:
        """Which parts of the student give what is compared."""
        return frozenset().union(*(SIGNALS[term.signal].needs for term in self.terms))

    @property
    def teacher_needs(self) -> frozenset[Need]:
        """Which parts of a teacher; none where there are only labels."""
        asking = [term for term in self.terms if SIGNALS[term.signal].labels is None]
        return frozenset().union(*(SIGNALS[term.signal].needs for term in asking))

    @property
    def layer_terms(self) -> tuple[Term, ...]:
        """The terms that compare layers."""
        return tuple(term for term in self.terms if SIGNALS[term.signal].level == "layer")

    @property
    def reads_layers(self) -> bool:
        """Whether a live teacher has to give more than its logits."""
        return bool(self.layer_terms)

    @property
    def reads_tokens(self) -> bool:
        """Whether a term speaks of tokens, so that masking its inputs changes what it says."""
        return any(SIGNALS[term.signal].level != "example" for term in self.terms)

    @property
    def couples(self) -> bool:
        """Whether the value of an example depends on the others of its batch."""
        return any(SIGNALS[term.signal].couples for term in self.terms)

    def reads(self, column: str) -> bool:
        """Whether a term compares with this column of labels."""
        return any(SIGNALS[term.signal].labels == column for term in self.terms)

    @property
    def needs_masking(self) -> bool:
        return any(term.needs_masking for term in self.terms)

    @property
    def is_constant(self) -> bool:
        """Whether equal batches are computed alike throughout a stage, on tensors whose sizes follow from theirs."""
        return self.intervention is None and all(
            isinstance(term.weight, int | float) and term.tokens == "all" for term in self.terms
        )

    def columns(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch without the labels that no term reads: how many there are differs from batch to batch."""
        unread = () if any(term.tokens == "masked" for term in self.terms) else ("lm_labels", "labeled_positions")
        return {name: column for name, column in batch.items() if name not in unread}

    def counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(terms,) float64: how many tokens or examples each term's mean runs over in this micro-batch."""
        return torch.tensor([float(self._count(term, batch)) for term in self.terms], dtype=torch.float64)

    def _count(self, term: Term, batch: Mapping[str, Tensor]) -> int:
        signal = SIGNALS[term.signal]
        if signal.level == "example":
            return len(batch["example_id"]) if signal.labels is None else int((batch[signal.labels] >= 0).sum())
        if term.gkd_compat:
            return batch["input_ids"].numel()
        if term.tokens in ("first", "mean"):
            return len(batch["input_ids"])
        return len(positions_of(term, batch))

    def means(self, sums: Tensor, counts: Tensor) -> Tensor:
        """(terms,) mean of each term from global sums and counts; a term without tokens is 0."""
        return sums / counts.clamp(min=1).to(sums)

    def total(self, means: Tensor, progress: float) -> Tensor:
        """Scalar: the weighted sum of the terms' means at `progress` in [0, 1]."""
        weights = [scheduled_weight(term.weight, progress) for term in self.terms]
        # One by one: a tensor of them would have to come from the host, which waits for it.
        return sum(
            (mean if weight == 1 else weight * mean for mean, weight in zip(means.unbind(), weights, strict=True)),
            start=means.new_zeros(()),
        )


def positions_of(term: Term, batch: Mapping[str, Tensor]) -> Tensor:
    """(N,) the flat positions that a term on tokens is about. Pads never are."""
    return batch["labeled_positions" if term.tokens == "masked" else "positions"]


def load_method(name: str) -> dict[str, Objective]:
    """Stage -> objective in the order in which they are run, from a built-in method or a YAML of the user's.

    `pretraining` is the one on the corpus; the others are over a task, `task_lm`, `task_soft_labels` or of a name of
    the method's own. Raises ConfigError naming file, stage, term and key.
    """
    path = named_file("methods", name)
    method: dict[str, Objective] = {}
    for stage, given in load_yaml(path).items():
        _check_stage(stage, list(method), str(path))
        where, intervention, terms = f"{path}: {stage}", None, given
        if isinstance(given, dict) and "terms" in given:
            for key in given.keys() - {"terms", "intervention"}:
                raise ConfigError(f"{where}.{key} is unknown{suggestion(key, ['terms', 'intervention'])}")
            terms = given["terms"]
            if "intervention" in given:
                intervention = parse_intervention(given["intervention"], f"{where}.intervention")
        if not isinstance(terms, list) or not terms:
            raise ConfigError(f"{where} must be a list of terms, or {{terms: [...], intervention: ...}}, got {given!r}")
        parsed = tuple(parse_term(term, f"{where}[{i}]", stage) for i, term in enumerate(terms))
        names = [term.name for term in parsed]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{where} has {twice} twice; add their weights, or give one of them a label of its own")
        method[stage] = Objective(parsed, intervention)
    if not method:
        raise ConfigError(f"{path}: no stage; name at least one of {', '.join(STAGES)}")
    return method


def _check_stage(name: Any, before: list[str], path: str) -> None:
    """Refuse a name that no stage has, or that is most likely mistyped."""
    known, own = [each for each in STAGES if each not in before], r"task_[a-z0-9_]+"
    is_own = isinstance(name, str) and re.fullmatch(own, name) is not None and name != "task_teacher"
    is_mistyped = name not in STAGES and bool(difflib.get_close_matches(str(name), STAGES, n=1, cutoff=0.9))
    if name not in STAGES and (not is_own or is_mistyped or name in RENAMED):
        raise ConfigError(
            f"{path}: stage {name} is unknown{suggestion(str(name), known)}; a method's own begin with task_, "
            "in small letters"
        )
    if name == "pretraining" and before:
        raise ConfigError(f"{path}: pretraining stands behind {before[-1]}; stages run in their order: put it first")


def parse_term(values: Any, where: str, stage: str) -> Term:
    """A checked term from its YAML mapping. Raises ConfigError that begins with `where`."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping, got {values!r}")
    for key in ("signal", "loss"):
        if key not in values:
            raise ConfigError(f"{where}.{key} is missing")
    signal, loss = values["signal"], values["loss"]
    in_pretraining = [name for name, each in SIGNALS.items() if each.level != "example"]
    allowed = in_pretraining if stage == "pretraining" else list(SIGNALS)
    if signal not in allowed:
        raise ConfigError(f"{where}.signal {signal!r} is not possible here{suggestion(str(signal), allowed)}")
    kind = SIGNALS[signal]
    if loss not in kind.losses:
        raise ConfigError(f"{where}.loss {loss!r} does not fit {signal}{suggestion(str(loss), kind.losses)}")
    options = _options(kind.losses[loss])
    own = {"weight", "label"}
    own |= {"tokens"} if kind.level != "example" and kind.labels is None else set()
    own |= {"gkd_compat"} if signal == "lm_logits" else set()
    own |= {"layers", "over_layers"} if kind.level == "layer" else set()
    own |= {"projection"} if "hidden_states" in kind.needs else set()
    for key in values:
        if key not in {"signal", "loss", *own, *options}:
            raise ConfigError(f"{where}.{key} has no effect on {signal} {loss}{suggestion(key, [*own, *options])}")
    weight = _checked_weight(values.get("weight", 1.0), f"{where}.weight")
    # Only a masked token has a label, so lm_labels speaks of masked tokens whatever is asked.
    tokens: Any = (
        "masked"
        if signal == "lm_labels"
        else coerce(_tokens_of(kind.losses[loss], kind.level), values.get("tokens", "all"), f"{where}.tokens")
    )
    given = {key: coerce(options[key], values[key], f"{where}.{key}") for key in options if key in values}
    if not 0 < given.get("temperature", 1.0) < float("inf"):
        raise ConfigError(f"{where}.temperature must be above 0 and finite, got {given['temperature']}")
    gkd_compat = coerce(bool, values.get("gkd_compat", False), f"{where}.gkd_compat")
    layers = _checked_layers(values.get("layers", "uniform"), f"{where}.layers")
    over_layers: Any = coerce(Literal["mean", "sum"], values.get("over_layers", "mean"), f"{where}.over_layers")
    if "over_layers" in values and getattr(kind.losses[loss], "takes_all_layers", False):
        raise ConfigError(f"{where}.over_layers has no effect on {loss}, which compares all layers at once; remove it")
    projection: Any = coerce(Literal["none", "linear"], values.get("projection", "none"), f"{where}.projection")
    label = coerce(str, values.get("label", ""), f"{where}.label")
    if not re.fullmatch(r"\w*", label):
        raise ConfigError(f"{where}.label must be letters, digits and _, got {label!r}")
    return Term(signal, loss, weight, tokens, given, gkd_compat, layers, over_layers, projection, label)


def parse_intervention(values: Any, where: str) -> Intervention:
    """A checked intervention from its YAML mapping. Raises ConfigError that begins with `where`."""
    if not isinstance(values, dict) or "name" not in values:
        raise ConfigError(f"{where} must be a mapping with a name, got {values!r}")
    name = values["name"]
    if name not in INTERVENTIONS:
        known = suggestion(str(name), INTERVENTIONS) if INTERVENTIONS else "; none is registered in INTERVENTIONS"
        raise ConfigError(f"{where}.name {name!r} is unknown{known}")
    options = _options(INTERVENTIONS[name])
    for key in values.keys() - {"name", *options}:
        raise ConfigError(f"{where}.{key} has no effect on {name}{suggestion(key, options)}")
    given = {key: coerce(options[key], values[key], f"{where}.{key}") for key in options if key in values}
    return Intervention(name, given)


def _tokens_of(loss: Any, level: str) -> Any:
    """What a term's `tokens` may be."""
    if level == "layer" and getattr(loss, "unit", "token") == "token":
        return Literal["all", "masked", "first", "mean"]
    return Literal["all", "masked"]


def _checked_layers(given: Any, where: str) -> Layers:
    maps = ("uniform", "last", "first", "all", "every")
    if given in maps:
        return str(given)
    if isinstance(given, dict):
        return build(LayerChoice, given, where)
    try:
        pairs = tuple(tuple(pair) for pair in coerce(list[list[int]], given, where))
    except ConfigError:
        pairs = ()
    if not pairs or any(len(pair) != 2 for pair in pairs) or len(set(pairs)) < len(pairs):
        wanted = f"{', '.join(maps)}, some of these {{map: uniform, start: -1}}, or pairs [[student, teacher], ...]"
        raise ConfigError(f"{where} must be {wanted}; got {given!r}")
    return pairs


def _options(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only options of a loss or an intervention, with their types."""
    parameters = inspect.signature(getattr(function, "function", function)).parameters.values()
    return {p.name: p.annotation for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _checked_weight(weight: Any, where: str) -> float | dict[str, float]:
    checked = coerce(float | dict[str, float], weight, where)
    if isinstance(checked, dict) and set(checked) != {"from", "to"}:
        raise ConfigError(f"{where} must be a number or {{from: a, to: b}}, got {weight!r}")
    for value in checked.values() if isinstance(checked, dict) else [checked]:
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{where} must be at least 0, got {value}")
    if not any(checked.values() if isinstance(checked, dict) else [checked]):
        raise ConfigError(f"{where} is 0, so the term has no effect; remove the term")
    return checked


HARD_LABELS = Objective((Term("task_labels", "hard_cross_entropy"),))


MASKED_LM = Objective((Term("lm_labels", "hard_cross_entropy", tokens="masked"),))
