"""Any two terms together: laws of padding, accumulation, chunks, pads and equal models, over the table of all losses.

Every loss of every signal stands in one pair of each seed, with a weight and a temperature that may be scheduled.
"""

import copy
import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from logit_cases import OPTIONS, TEMPERED, WITH_JUMPS
from test_distiller import KEPT, TOKEN_MAP, VOCABULARY, Batch, V, batch, gradients, model_of, rows
from torch import Tensor
from transformers import BertForMaskedLM, BertForSequenceClassification

from glmd.distillation.distiller import Distiller
from glmd.distillation.methods import parse_term
from glmd.distillation.objective import Objective, Term
from glmd.distillation.signals import SIGNALS, feature_loss
from glmd.distillation.teacher import OnlineTeacher
from glmd.losses import linear
from glmd.vocabulary.vocabulary import Vocabulary

TABLE = [(signal, loss) for signal, kind in SIGNALS.items() for loss in kind.losses]
HEADS = BertForMaskedLM, BertForSequenceClassification
PROGRESS = 0.3


def drawn_term(signal: str, loss: str, draw: random.Random) -> Term:
    """One as it stands in a method's YAML."""

    def schedule(low: float, high: float) -> Any:
        first, second = draw.uniform(low, high), draw.uniform(low, high)
        return draw.choice([first, {"from": first, "to": second}, [[0, first], [0.2, second], [0.9, first]]])

    given: dict[str, Any] = {"signal": signal, "loss": loss, "weight": schedule(0.1, 2.0)}
    if signal.endswith("_logits"):
        given |= {name: value for name, value in OPTIONS.get(loss, {}).items() if name != "progress"}
        given |= {"temperature": schedule(1.0, 15.0)} if loss in TEMPERED else {}
    if signal == "modules":
        given["modules"] = [[f"encoder.layer.{i}", f"encoder.layer.{i}"] for i in range(2)]
    if signal == "lm_logits" or (SIGNALS[signal].level == "layer" and _unit(signal, loss) == "token"):
        given["tokens"] = draw.choice(["all", "masked"])
    return parse_term(given, "drawn", "task_pair")


def _unit(signal: str, loss: str) -> str:
    return getattr(SIGNALS[signal].losses[loss], "unit", "token")


def drawn_pairs(seed: int) -> list[tuple[Term, ...]]:
    draw, table = random.Random(seed), TABLE.copy()
    draw.shuffle(table)
    terms = [drawn_term(*each, draw) for each in table]
    return [tuple(terms[i : i + 2]) for i in range(0, len(terms), 2)]


PAIRS = [
    pytest.param(pair, id=f"{seed}-{'-'.join(term.name for term in pair)}", marks=[pytest.mark.full] if seed else [])
    for seed in range(4)
    for pair in drawn_pairs(seed)
]


@cache
def _made(head: type, words: int, layers: int, seed: int) -> Any:
    return model_of(head, words, layers, seed)


def models_of(words: int, layers: int, *seeds: int) -> list[Any]:
    """A language model and a classifier, fresh copies."""
    return [copy.deepcopy(_made(head, words, layers, seed)) for head, seed in zip(HEADS, seeds, strict=True)]


def of_models(terms: tuple[Term, ...]) -> tuple[Distiller, OnlineTeacher]:
    """Two layers on half of the tokens, and their teacher of four."""
    language_model, classifier = models_of(len(KEPT), 2, 2, 3)
    teacher = OnlineTeacher(*models_of(V, 4, 0, 1), VOCABULARY)
    distiller = Distiller(Objective(terms), TOKEN_MAP, language_model=language_model, classifier=classifier)
    distiller.learn_from(teacher)
    return distiller.double(), teacher


def loss_of(distiller: Distiller, teacher: OnlineTeacher, *micro_batches: Batch) -> Tensor:
    """The weighted mean over micro-batches, or ranks, summed first and divided once."""
    objective = distiller.objective
    sums = sum(distiller(each, teacher(each), PROGRESS) for each in micro_batches)
    counts = sum(objective.counts(each) for each in micro_batches)
    return objective.total(objective.means(sums, counts), PROGRESS)


@pytest.mark.parametrize("pair", PAIRS)
def test_padding_accumulation_and_chunks_change_nothing_and_pads_have_no_gradient(
    pair: tuple[Term, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller, teacher = of_models(pair)
    seen: list[Tensor] = []
    embeddings = distiller.splits[0].backbone.embeddings
    embeddings.register_forward_hook(lambda module, args, output: seen.append(output))
    whole = loss_of(distiller, teacher, batch())
    (inside,) = torch.autograd.grad(whole, seen, retain_graph=True)
    of_weights = gradients(distiller, whole)
    assert whole.isfinite() and any(each.any() for each in of_weights.values())
    assert not inside[batch()["attention_mask"] == 0].any()
    others = [loss_of(distiller, teacher, batch(13))]
    if not distiller.objective.couples:
        others.append(loss_of(distiller, teacher, rows(batch(), 0, 1), rows(batch(), 1, 4)))
    monkeypatch.setattr(linear, "chunk_tokens", lambda *_: 3)
    others.append(loss_of(distiller, teacher, batch()))
    for other in others:
        torch.testing.assert_close(other, whole, rtol=1e-6, atol=1e-9)  # the teacher's task logits are float32
        torch.testing.assert_close(gradients(distiller, other), of_weights, rtol=1e-5, atol=1e-7)


# Losses that are not 0 for equal models: on labels, on other targets than the teacher's, of mixtures of layers, or
# through projections that begin at random.
NOT_ZERO = {"hard_cross_entropy", "cross_entropy", "modified_targets", "annealed_mse", "margin_mse"}
NOT_ZERO |= {"attended_mse", "attended_kl"}


def is_zero_for_equals(term: Term) -> bool:
    of_layers = term.of_layers and (feature_loss(term).least_texts > 1 or feature_loss(term).needs_both)
    return term.loss not in NOT_ZERO and not of_layers


@pytest.mark.parametrize("pair", [each for each in PAIRS if any(map(is_zero_for_equals, each.values[0]))])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(pair: tuple[Term, ...]) -> None:
    terms = tuple(term for term in pair if is_zero_for_equals(term))
    teacher = OnlineTeacher(*models_of(V, 2, 0, 0), Vocabulary.identity(V))
    pair_of = {name: copy.deepcopy(getattr(teacher, name)) for name in ("language_model", "classifier")}
    models = {name: each.requires_grad_() for name, each in pair_of.items()}
    distiller = Distiller(Objective(terms), np.arange(V), **models)
    distiller.learn_from(teacher)
    loss = loss_of(distiller.double(), teacher, batch())
    assert abs(loss.item()) < 1e-5  # the teacher's task logits are float32
    if not any(term.loss in WITH_JUMPS and term.signal == "task_logits" for term in terms):  # there p is q but for that
        assert max(float(each.abs().max()) for each in gradients(distiller, loss).values()) < 1e-5


def test_every_loss_stands_in_one_pair_of_each_seed() -> None:
    for seed in range(2):
        terms = [(term.signal, term.loss) for pair in drawn_pairs(seed) for term in pair]
        assert sorted(terms) == sorted(TABLE)
    assert any(term.changes for pair in drawn_pairs(0) for term in pair)
