"""A method's stages as composed terms: signal x loss x tokens x layers x weight.

    objective = load_method("glmd")["pretraining"]      # one term: KL of LM logits at temperature 15

A term yields one number per token or example; the objective sums them, counts what they are averaged over, and
divides once.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from glmd.distillation.interventions import Intervention
from glmd.distillation.schedules import Schedule, is_scheduled, scheduled
from glmd.distillation.signals import SIGNALS, Need, feature_loss, needs_labels, takes
from glmd.losses.teacher_weights import WEIGHTINGS, Weighting
from glmd.models.layers import LayerChoice, Layers


@dataclass(frozen=True)
class Term:
    """One comparison of student and teacher (or label)."""

    signal: str  # a key of SIGNALS
    loss: str
    weight: Schedule = 1.0  # a number, {from: a, to: b} over the stage's progress, or [[progress, weight], ...]
    # Of words and layers: every non-pad token, or only the masked ones; of layers also the first one of each text, or
    # the mean of its tokens
    tokens: Literal["all", "masked", "first", "mean"] = "all"
    options: dict[str, Any] = field(
        default_factory=dict
    )  # keyword options of the loss; the temperature may be scheduled
    gkd_compat: bool = False  # lm_logits: divide by all B * S positions, pads included, as GLMD's published code does
    layers: Layers = "uniform"  # of signals of layers: which are compared (`layer_pairs`)
    modules: tuple[tuple[str, str], ...] = ()  # of modules: (the student's, the teacher's), by names in the backbones
    over_layers: Literal["mean", "sum"] = "mean"  # what is taken of the values of the layers
    # hidden_states: a learned map from the student's width to the teacher's, one for all layers; maps of each of the
    # teacher's layers to the student's width; or maps of both models' widths, each layer's its own (of drawn layers
    # each place's, whichever is drawn there), to projection_size, the teacher's width where it is not given
    projection: Literal["none", "linear", "teacher", "both"] = "none"
    projection_size: int | None = None
    # Progress is divided into one turn for each pair of layers and a last one. In its turn a pair joins those before
    # it, which then weigh older_weight; in the last turn no layers count, and terms in turn of other signals do.
    in_turn: bool = False
    older_weight: float = 1.0
    intervened: bool = False  # of words and examples: of a second pass, under the stage's intervention
    teachers: str | None = None  # what is taken of several teachers: a key of WEIGHTINGS; None: their mean, or the one
    # of a loss of the user's own: (name, sha256) of its file, and of those beside it that it imports
    source: tuple[tuple[str, str], ...] = ()
    label: str = ""  # what tells it from a term of the same signal and loss, in logs and results

    @property
    def name(self) -> str:
        return f"{self.signal}.{self.loss.partition('@')[0]}" + (f".{self.label}" if self.label else "")

    def record(self) -> dict[str, Any]:
        """What it is, for a stage's record; keys that came later stand there where they are not as they were before."""
        later = ["modules", "over_layers", "projection_size", "in_turn", "older_weight", "intervened", "source"]
        later.append("teachers")
        plain = {each.name: each.default for each in fields(self) if each.name in later}
        found = {key: value for key, value in asdict(self).items() if key not in later or value != plain[key]}
        return found | ({"loss": self.loss.partition("@")[0], "source": dict(self.source)} if self.source else {})

    @property
    def weighting(self) -> Weighting:
        """How several teachers count."""
        return WEIGHTINGS[self.teachers or "mean"]

    @property
    def takes_mean(self) -> bool:
        """Whether the losses to several teachers are averaged."""
        return self.teachers in (None, "mean")

    @property
    def asks_all_teachers(self) -> bool:
        """Whether it compares with more than the first of several teachers."""
        return SIGNALS[self.signal].labels is None and self.teachers != "first"

    @property
    def of_layers(self) -> bool:
        return SIGNALS[self.signal].level == "layer"

    @property
    def needs_masking(self) -> bool:
        """Whether the term says nothing about clean inputs."""
        return self.tokens == "masked"

    @property
    def changes(self) -> bool:
        """Whether what it is depends on the stage's progress."""
        is_drawn = isinstance(self.layers, LayerChoice) and self.layers.map == "random"
        is_other = takes(self.function, "progress") or is_scheduled(self.options.get("temperature"))
        return is_scheduled(self.weight) or self.in_turn or is_drawn or is_other

    @property
    def function(self) -> Any:
        """The loss itself."""
        return SIGNALS[self.signal].losses[self.loss]

    def options_at(self, progress: float, **given: Any) -> dict[str, Any]:
        """Options of the loss at this point of the stage, with progress and what is given where it asks for them."""
        asked = {name: value for name, value in {"progress": progress, **given}.items() if takes(self.function, name)}
        if is_scheduled(self.options.get("temperature")):
            asked["temperature"] = scheduled(self.options["temperature"], progress)
        return self.options | asked


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
        found = frozenset().union(*(SIGNALS[term.signal].needs for term in asking))
        found |= {"hidden_states"} if self.learns_weights else frozenset()
        return found | (self.intervention.teacher_needs if self.intervention is not None else frozenset())

    @property
    def further_needs(self) -> frozenset[Need]:
        """Which parts of each teacher but the first; none where only the first one is asked."""
        return frozenset().union(*(SIGNALS[term.signal].needs for term in self.terms if term.asks_all_teachers))

    @property
    def layer_terms(self) -> tuple[Term, ...]:
        """The terms that compare layers."""
        return tuple(term for term in self.terms if term.of_layers)

    @property
    def reads_layers(self) -> bool:
        """Whether a live teacher has to give more than its logits."""
        return bool(self.layer_terms) or "layers" in self.teacher_needs or self.learns_weights

    @property
    def reads_tokens(self) -> bool:
        """Whether a term speaks of tokens, so that masking its inputs changes what it says."""
        return any(SIGNALS[term.signal].level != "example" for term in self.terms)

    @property
    def least_texts(self) -> int:
        """How many texts of a batch are compared with each other at least; 1 where each stands for itself."""
        signals = [SIGNALS[term.signal] for term in self.terms]
        others = [each for term in self.terms for each in (term.function, term.weighting)]
        kinds = [] if self.intervention is None else [self.intervention.kind]
        return max(1, *(getattr(each, "least_texts", 1) for each in (*signals, *others, *kinds)))

    @property
    def couples(self) -> bool:
        """Whether the value of an example depends on the others of its batch."""
        return self.least_texts > 1

    def reads(self, column: str) -> bool:
        """Whether a term cannot do without this column of labels, or weighs several teachers by it."""
        weighs = any(term.weighting.needs_labels for term in self.terms)
        in_loss = column == "labels" and (weighs or any(needs_labels(term.function) for term in self.terms))
        return in_loss or any(SIGNALS[term.signal].labels == column for term in self.terms)

    @property
    def weighs_teachers(self) -> bool:
        """Whether it makes sense with several teachers alone."""
        return any(term.teachers is not None for term in self.terms)

    @property
    def asks_assistants(self) -> bool:
        """Whether it names several teachers, and so learns from all assistants, not from the last alone."""
        return any(term.teachers not in (None, "first") for term in self.terms)

    @property
    def learns_weights(self) -> bool:
        """Whether a policy chooses among teachers, which looks at a state of the first one."""
        return any(term.weighting.is_learned for term in self.terms)

    @property
    def needs_masking(self) -> bool:
        return any(term.needs_masking for term in self.terms)

    @property
    def is_constant(self) -> bool:
        """Whether equal batches are computed alike throughout a stage, on tensors whose sizes follow from theirs."""
        return not self.changes and all(term.tokens == "all" for term in self.terms)

    @property
    def changes(self) -> bool:
        """Whether what a step does depends on the stage's progress."""
        return self.intervention is not None or any(term.changes for term in self.terms)

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
            if signal.labels is not None:
                labels = batch[signal.labels]
                return int((labels.isfinite() if labels.is_floating_point() else labels >= 0).sum())
            return int(batch["num_decisions"].sum()) if "num_decisions" in batch else len(batch["example_id"])
        if term.gkd_compat:
            return batch["predicts"].numel()
        if term.tokens in ("first", "mean") or (term.of_layers and feature_loss(term).unit == "text"):
            return len(batch["input_ids"])
        return len(positions_of(term, batch))

    def means(self, sums: Tensor, counts: Tensor) -> Tensor:
        """(terms,) mean of each term from global sums and counts; a term without tokens is 0."""
        return sums / counts.clamp(min=1).to(sums)

    def total(self, means: Tensor, progress: float) -> Tensor:
        """Scalar: the weighted sum of the terms' means at `progress` in [0, 1]."""
        weights = [scheduled(term.weight, progress) for term in self.terms]
        # One by one: a tensor of them would have to come from the host, which waits for it.
        return sum(
            (mean if weight == 1 else weight * mean for mean, weight in zip(means.unbind(), weights, strict=True)),
            start=means.new_zeros(()),
        )


def positions_of(term: Term, batch: Mapping[str, Tensor]) -> Tensor:
    """(N,) the flat positions that a term on tokens is about. Pads never are."""
    return batch["labeled_positions" if term.tokens == "masked" else "positions"]


HARD_LABELS = Objective((Term("task_labels", "hard_cross_entropy"),))
MASKED_LM = Objective((Term("lm_labels", "hard_cross_entropy", tokens="masked"),))
