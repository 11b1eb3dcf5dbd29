"""`analysis: layer_distances`: how far the layers of a student are from its teacher's while it learns words alone.

    observe = LayerDistances(context, stage, teacher)
    observe(distiller)      # {"lm_loss": 2.1, "hidden_states.cosine": [0.2, 0.3], ...}, one number for each pair

Nothing is trained on them. GLMD (arXiv:2306.06625) explains by them why no intermediate layer has to be distilled: the
layers come nearer as the loss on words falls.
"""

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glmd.distillation.distiller import Distiller
from glmd.distillation.objective import Objective, Term
from glmd.distillation.signals import feature_loss
from glmd.distillation.teacher import OnlineTeacher, first_of
from glmd.models.attention_calls import is_heard
from glmd.models.layers import layer_pairs
from glmd.pipeline.context import Context
from glmd.pipeline.data import corpus_blocks
from glmd.planning.stages import Stage
from glmd.training.trainer import Teacher

logger = logging.getLogger(__name__)
TEXTS = 8  # held-out blocks that are looked at, one after another: attention is kept whole
DISTANCES = (
    ("hidden_states", "cosine"),
    ("hidden_states", "mse"),
    ("attentions", "kl_divergence"),
    ("attentions", "mse"),
)
LM_LOSS = "lm_loss"  # the stage's own loss on words, or that of glmd


class LayerDistances:
    """What a stage's student is asked beside its training, on the main process, with dropout off."""

    def __init__(self, context: Context, stage: Stage, teacher: Teacher) -> None:
        first = first_of(teacher)
        assert isinstance(first, OnlineTeacher) and stage.objective is not None, "checked before"
        self.teacher = copy.copy(first)  # the same weights, asked for other layers
        self.teacher.layers, self.teacher.is_silent = {}, False
        words = [term for term in stage.objective.terms if term.signal == "lm_logits"]
        self.words = words[0] if words else Term("lm_logits", "kl_divergence", options={"temperature": 15.0})
        data = corpus_blocks(context, stage, held_out=True)
        self.batches = [context.collate(data.__getitems__([(0, i)])) for i in range(min(TEXTS, len(data)))]
        self.token_map = context.vocabulary(stage).token_map
        self.observer: Distiller | None = None
        self.places: list[tuple[str, int]] = []  # of each term: the distance, and which pair

    @torch.no_grad()
    def __call__(self, distiller: Distiller) -> dict[str, Any]:
        """`lm_loss`, and of each distance the mean over tokens for each pair of layers, in their order."""
        student = distiller.language_model
        assert student is not None, "a stage on the corpus has a language model"
        if self.observer is None:
            self.observer = self._made(student)
        device = next(student.parameters()).device
        sums = counts = torch.zeros((), dtype=torch.float64)
        modes = {module: module.training for module in student.modules()}
        student.eval()
        for batch in self.batches:
            there = {name: each.to(device) for name, each in batch.items()}
            sums = sums + self.observer(there, self.teacher(there)).double().cpu()
            counts = counts + self.observer.objective.counts(batch)
        for module, mode in modes.items():
            module.training = mode
        means = self.observer.objective.means(sums, counts).tolist()
        found: dict[str, Any] = {LM_LOSS: means[0]}
        for (name, _), value in zip(self.places, means[1:], strict=True):
            found.setdefault(name, []).append(value)
        return found

    def _made(self, student: Any) -> Distiller:
        models: list[Any] = [student, self.teacher.base]
        configs = [model.config.get_text_config() for model in models]
        pairs = layer_pairs("uniform", *(config.num_hidden_layers for config in configs))
        terms = [self.words]
        for signal, loss in DISTANCES:
            if _fits(Term(signal, loss), student, self.teacher.base, *configs):
                for i, pair in enumerate(pairs):
                    terms.append(Term(signal, loss, layers=(pair,), label=f"pair{i}"))
                    self.places.append((f"{signal}.{loss}", i))
        observer = Distiller(Objective(tuple(terms)), self.token_map, language_model=student)
        observer.learn_from(self.teacher)
        return observer


def _fits(term: Term, student: Any, teacher: Any, ours: Any, theirs: Any) -> bool:
    if term.signal == "attentions":
        return ours.num_attention_heads == theirs.num_attention_heads and is_heard(student) and is_heard(teacher)
    return not feature_loss(term).same_width or ours.hidden_size == theirs.hidden_size


def distances_of(log: Path, stage: str) -> dict[str, Any]:
    """A stage's distances from the run's log: before, after, and Spearman's correlation with `lm_loss` over the steps.

    A correlation is None where fewer than three steps were looked at, or one of both never changes.
    """
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    found = [row for row in rows if row["stage"] == stage and LM_LOSS in row]
    names = [name for name, value in found[0].items() if isinstance(value, list)]
    losses = [row[LM_LOSS] for row in found]
    return {
        "steps": [row["step"] for row in found],
        LM_LOSS: losses,
        **{
            name: {
                "before": found[0][name],
                "after": found[-1][name],
                "spearman": [spearman(losses, [row[name][i] for row in found]) for i in range(len(found[0][name]))],
            }
            for name in names
        },
    }


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, with mean ranks for equal values. None where it is not defined."""
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    ranks: list[np.ndarray] = []
    for values in (first, second):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def draw_distances(log: Path, stage: str, path: Path) -> None:
    """A picture of the distances over the steps; without matplotlib a line that says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("analysis: %s is not drawn: pip install 'glmd[plots]'", path)
        return
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    found: list[Mapping[str, Any]] = [row for row in rows if row["stage"] == stage and LM_LOSS in row]
    names = [name for name, value in found[0].items() if isinstance(value, list)]
    figure = Figure(figsize=(4 * (len(names) + 1), 3.4), layout="constrained")
    panels = figure.subplots(1, len(names) + 1)
    steps = [row["step"] for row in found]
    panels[0].plot(steps, [row[LM_LOSS] for row in found], color="black")
    panels[0].set(title="loss on words", xlabel="step")
    for panel, name in zip(panels[1:], names, strict=True):
        for i in range(len(found[0][name])):
            panel.plot(steps, [row[name][i] for row in found], label=f"student layer {i + 1}")
        panel.set(title=name, xlabel="step", ylim=(0, None))
    if len(names):
        panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def is_analyzed(context: Context, stage: Stage) -> bool:
    return context.config.analysis == "layer_distances" and stage.kind == "pretraining" and stage.settings is not None


def told(context: Context, stage: Stage) -> dict[str, Any]:
    """What a stage's record says of its distances, after they have been drawn into its folder."""
    draw_distances(context.log.path, stage.path, context.folder(stage) / "layer_distances.png")
    return distances_of(context.log.path, stage.path)
