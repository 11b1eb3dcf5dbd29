"""What a method does to the student's forward: a context manager around its one backbone call.

    @contextmanager
    def embedding_noise(student, teacher, batch, progress, generator, *, scale: float = 0.1):
        handle = student.model.get_input_embeddings().register_forward_hook(...)
        try:
            yield
        finally:
            handle.remove()

    INTERVENTIONS["embedding_noise"] = embedding_noise

and in a method's YAML, in place of a stage's list of terms:

    task_soft_labels:
      terms: [{signal: task_logits, loss: kl_divergence}]
      intervention: {name: embedding_noise, scale: 0.05}

A function is given the student's Split, the live teacher's Splits (the one whose backbone runs comes first; none where
the stage asks no live teacher), the batch on the student's device, the stage's progress in [0, 1] and a CPU generator
that is a function of seed, micro-step and rank alone: what draws from nothing else is resumed bit for bit. What it
changes it puts back. Options are keyword-only parameters. One that asks for more says so by an InterventionKind.

Terms that say `intervened: true` are of a second pass, under the intervention, and the others of a first one without.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from glmd.distillation.embedding_gradient import embedding_gradient, require_size
from glmd.distillation.interchange import interchange, require_block_for_each, require_share
from glmd.distillation.theseus import require_alike, require_rates, theseus


@dataclass(frozen=True)
class InterventionKind:
    """An intervention, and what it asks for.

    check: of the configs of student and teacher, options: of its options; both raise ConfigError, one line, where they
        do not fit.
    lends_layers: it uses layers of a live teacher, whatever the terms ask of it.
    replaces_layers: it runs them in the place of the student's, so that layers cannot be compared in that pass.
    changes_teacher: and changes the teacher's answers in the second pass, so that it is asked again there. Some term
        has to be of that pass.
    takes_gradient: it is given, behind the generator, the loss' gradient of a pass before with respect to what goes
        into the student's first layer, (R, S, H).
    least_texts: how many texts of a batch it needs; where these are more than one, each depends on the others.
    """

    function: Callable[..., AbstractContextManager[None]]
    check: Callable[[Any, Any], None] = lambda student, teacher: None
    options: Callable[..., None] = lambda **given: None
    lends_layers: bool = False
    replaces_layers: bool = False
    changes_teacher: bool = False
    takes_gradient: bool = False
    least_texts: int = 1

    def __call__(self, *given: Any, **options: Any) -> AbstractContextManager[None]:
        return self.function(*given, **options)


INTERVENTIONS: dict[str, Callable[..., AbstractContextManager[None]]] = {
    "theseus": InterventionKind(theseus, require_alike, require_rates, lends_layers=True, replaces_layers=True),
    "interchange": InterventionKind(
        interchange, require_block_for_each, require_share, lends_layers=True, changes_teacher=True, least_texts=2
    ),
    "embedding_gradient": InterventionKind(embedding_gradient, options=require_size, takes_gradient=True),
}


@dataclass(frozen=True)
class Intervention:
    """One entry of INTERVENTIONS with its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> InterventionKind:
        """What it asks for; of a function alone nothing."""
        found = INTERVENTIONS[self.name]
        return found if isinstance(found, InterventionKind) else InterventionKind(found)

    def check(self, student: Any, teacher: Any) -> None:
        """Raises ConfigError where models of these configs do not fit."""
        self.kind.check(student, teacher)

    @property
    def teacher_needs(self) -> frozenset[Literal["layers"]]:
        """What of a live teacher it uses."""
        return frozenset({"layers"}) if self.kind.lends_layers else frozenset()
