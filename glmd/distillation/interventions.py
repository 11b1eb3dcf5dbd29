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
changes it puts back. Options are keyword-only parameters.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from glmd.distillation.theseus import require_alike, theseus


@dataclass(frozen=True)
class OfLayers:
    """An intervention that uses layers of a live teacher, whatever the terms ask of it.

    check: of the configs of student and teacher, and the options; raises ConfigError, one line, where they do not fit.
    """

    function: Callable[..., AbstractContextManager[None]]
    check: Callable[..., None]

    def __call__(self, *given: Any, **options: Any) -> AbstractContextManager[None]:
        return self.function(*given, **options)


INTERVENTIONS: dict[str, Callable[..., AbstractContextManager[None]]] = {
    "theseus": OfLayers(theseus, require_alike),
}


@dataclass(frozen=True)
class Intervention:
    """One entry of INTERVENTIONS with its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def check(self, student: Any, teacher: Any) -> None:
        """Raises ConfigError where models of these configs do not fit."""
        kind = INTERVENTIONS[self.name]
        if isinstance(kind, OfLayers):
            kind.check(student, teacher, **self.options)

    @property
    def teacher_needs(self) -> frozenset[Literal["layers"]]:
        """What of a live teacher it uses."""
        return frozenset({"layers"}) if isinstance(INTERVENTIONS[self.name], OfLayers) else frozenset()
