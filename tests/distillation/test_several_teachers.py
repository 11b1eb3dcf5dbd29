"""Terms over several teachers: against plain twins in float64, values and gradients; laws of pads and batches."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_distiller import (
    TOKEN_MAP,
    VOCABULARY,
    C,
    V,
    assert_same,
    batch,
    gradients,
    loss_of,
    model_of,
    rows,
    students,
)
from torch import Tensor
from transformers import BertForMaskedLM, BertForSequenceClassification

from glmd.distillation.distiller import Distiller
from glmd.distillation.methods import load_method, weightings_of
from glmd.distillation.objective import Objective, Term
from glmd.distillation.teacher import Ensemble, OnlineTeacher
from glmd.distillation.teacher_policy import TeacherPolicy, chosen_by, draws, policy_loss
from glmd.errors import ConfigError
from glmd.losses.teacher_weights import WEIGHTINGS

TEMPERATURE = {"temperature": 3.0}


def teachers(*depths: int) -> Ensemble:
    """Of other depths, each a language model and a classifier over one backbone."""
    found = []
    for i, depth in enumerate(depths):
        words = model_of(BertForMaskedLM, V, depth, seed=10 * i)
        found.append(
            OnlineTeacher(words, model_of(BertForSequenceClassification, V, depth, seed=10 * i + 1), VOCABULARY)
        )
    return Ensemble(found)


def labeled(**fields: Any) -> dict[str, Tensor]:
    found = batch(**fields)
    return found | {"labels": torch.tensor([2, 0, 1, 1])}


def distiller_of(*terms: Term) -> Distiller:
    return Distiller(Objective(terms), TOKEN_MAP, **students(), num_classes=C).eval()


def logits_of(distiller: Distiller, several: Ensemble, batch: dict[str, Tensor], kind: str) -> tuple[Tensor, Tensor]:
    """(N, K) or (B, C) of the student, and of each teacher, by the models' own forward."""
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mapped = {**source, "input_ids": torch.from_numpy(TOKEN_MAP)[source["input_ids"]]}
    ours = getattr(distiller, kind)(**mapped).logits
    theirs = torch.stack([getattr(each, kind)(**source).logits for each in several.teachers])
    if kind == "classifier":
        return ours, theirs.float().double()  # as a teacher of training gives them
    mask = batch["attention_mask"].bool()
    return ours[mask], theirs[:, mask][..., torch.from_numpy(VOCABULARY.kept_ids)]


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = (teacher / temperature).softmax(-1), (student / temperature).log_softmax(-1)
    return temperature**2 * (p * (p.log() - q)).sum(-1)


PAIRS = [
    (signal, name)
    for signal in ("lm_logits", "task_logits")
    for name in weightings_of(signal)
    if WEIGHTINGS[name].function is not None
]


@pytest.mark.parametrize(("signal", "name"), PAIRS)
def test_a_term_is_the_weighted_sum_of_the_losses_to_each_teacher(signal: str, name: str) -> None:
    weighting = WEIGHTINGS[name]
    distiller, several = distiller_of(Term(signal, "kl_divergence", options=TEMPERATURE, teachers=name)), teachers(2, 1)
    given = labeled()
    ours, theirs = logits_of(distiller, several, given, "language_model" if signal == "lm_logits" else "classifier")
    weights = weighting.function(theirs, ours.detach(), given["labels"])  # type: ignore[misc]
    expected = sum((weights[t] * kl(ours, theirs[t], 3.0)).sum() for t in range(2)) / len(ours)
    found = loss_of(distiller, several, given)  # type: ignore[arg-type]
    assert_same(found, expected)
    for mine, other in zip(*(gradients(distiller, each).values() for each in (found, expected)), strict=True):
        assert_same(mine, other)


@pytest.mark.parametrize("teachers_key", [None, "sum", "first"])
@pytest.mark.parametrize("projection", ["linear", "teacher"])
def test_layers_are_compared_with_those_of_each_teacher_by_maps_of_its_own(
    projection: Any, teachers_key: str | None
) -> None:
    term = Term("hidden_states", "mse", projection=projection, layers="last", teachers=teachers_key)
    distiller, several, given = distiller_of(term), teachers(2, 3), labeled()
    distiller.learn_from(several)
    asked = 1 if teachers_key == "first" else 2
    assert len(distiller.projections) == asked
    states = [each(given).layers["hidden_states"] for each in several.teachers if each.layers]
    assert [list(each) for each in states] == [[1], [2]][:asked]
    source = {name: given[name] for name in ("input_ids", "attention_mask")}
    mapped = {**source, "input_ids": torch.from_numpy(TOKEN_MAP)[source["input_ids"]]}
    mine = distiller.language_model(**mapped, output_hidden_states=True).hidden_states[-1]  # type: ignore[misc]
    mask, sums = given["attention_mask"].bool(), []
    for layers, made in zip(states, distiller.projections.values(), strict=True):
        (theirs,) = layers.values()
        ours = mine
        if projection == "teacher":
            (weight,) = [name for name, _ in made.named_parameters()]
            assert weight == "teacher.0.weight"
            theirs = theirs @ made.teacher[0].weight.t()
        else:
            ours = ours @ made.weight.t()
        sums.append((ours - theirs)[mask].square().mean(-1).sum())
    expected = sum(sums) / int(mask.sum()) / (asked if teachers_key is None else 1)
    found = loss_of(distiller, several, given)  # type: ignore[arg-type]
    assert_same(found, expected)
    for one, other in zip(*(gradients(distiller, each).values() for each in (found, expected)), strict=True):
        assert_same(one, other)


EACH = (
    Term("lm_logits", "kl_divergence", options=TEMPERATURE, teachers="uncertainty"),
    Term("task_logits", "kl_divergence", teachers="label_loss"),
    Term("hidden_states", "mse", projection="linear"),
)


def test_pads_and_micro_batches_change_nothing_of_several_teachers() -> None:
    distiller, several = distiller_of(*EACH), teachers(2, 1)
    distiller.learn_from(several)
    whole = loss_of(distiller, several, labeled())  # type: ignore[arg-type]
    assert_same(loss_of(distiller, several, labeled(length=11)), whole)  # type: ignore[arg-type]
    parts = [rows(labeled(), 0, 1), rows(labeled(), 1, 4)]
    assert_same(loss_of(distiller, several, *parts), whole)  # type: ignore[arg-type]


def test_of_one_teacher_twice_the_student_learns_what_it_does_of_it_alone() -> None:
    terms = [Term("lm_logits", "kl_divergence"), Term("task_logits", "mse"), Term("hidden_states", "mse")]
    (one,) = teachers(2).teachers
    alone, twice = distiller_of(*terms), distiller_of(*terms)
    alone.learn_from(one)
    twice.learn_from(Ensemble([one, one]))
    ours, theirs = loss_of(twice, Ensemble([one, one]), labeled()), loss_of(alone, one, labeled())  # type: ignore[arg-type]
    assert_same(ours, theirs)


# A policy that is learned


def policy_objective() -> Term:
    return Term("task_logits", "kl_divergence", options=TEMPERATURE, teachers="policy")


def drawn(distiller: Distiller, several: Ensemble, progress: float, *batches: dict[str, Tensor]) -> Tensor:
    """The mean over four examples."""
    parts = [distiller(each, several(each), progress) for each in batches or (labeled(),)]
    return torch.stack(parts).sum() / 4


def test_a_policys_draw_is_the_mean_loss_to_the_teachers_that_it_chose_whatever_the_batch() -> None:
    distiller, several, given = distiller_of(policy_objective()), teachers(2, 1), labeled()
    distiller.learn_from(several, seed=5)
    ours, theirs = logits_of(distiller, several, given, "classifier")
    losses = torch.stack([kl(ours, each, 3.0) for each in theirs])
    (policy,) = distiller.policies.values()
    first = several.teachers[0](given).layers["hidden_states"][1][:, 0]
    ce = [torch.nn.functional.cross_entropy(each, given["labels"], reduction="none") for each in theirs]
    seen = torch.cat([first, torch.stack(ce, 1), theirs[0].softmax(-1), theirs[1].softmax(-1)], 1)
    odds = (seen.float() @ policy.choice.weight.t().float() + policy.choice.bias.float()).t()
    sums = []
    for progress in (0.0, 0.1, 0.25, 0.5, 0.9, 1.0):
        chosen = chosen_by(odds, draws(5, progress, given["example_id"], 2))
        means = [losses[chosen[:, n] > 0, n].mean() if chosen[:, n].any() else ours.new_zeros(()) for n in range(4)]
        found = drawn(distiller, several, progress)
        parts = drawn(distiller, several, progress, rows(labeled(), 0, 3), rows(labeled(), 3, 4))
        torch.testing.assert_close(found, torch.stack(means).mean(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(parts, found)
        sums.append(float(found.detach()))
        reward = -(torch.stack(means) + torch.nn.functional.cross_entropy(ours, given["labels"], reduction="none"))
        chances = odds.sigmoid()
        log_chance = torch.where(chosen > 0, chances, 1 - chances).log().sum(0)
        expected = torch.autograd.grad(-(reward.detach() * log_chance).mean(), policy.choice.weight, retain_graph=True)
        of_policy = torch.autograd.grad(found, policy.choice.weight)
        torch.testing.assert_close(of_policy, expected, rtol=1e-4, atol=1e-7)
    assert len(set(sums)) > 3, "it draws"


def test_a_policy_learns_to_ask_the_teacher_whom_the_reward_favors() -> None:
    torch.manual_seed(0)
    policy = TeacherPolicy(width=3, teachers=2, classes=2, like=torch.empty(1), seed=0)
    optimizer = torch.optim.Adam(policy.parameters(), 0.05)
    states, losses, answers = torch.randn(16, 3), torch.rand(2, 16), torch.rand(2, 16, 2)
    for step in range(150):
        odds = policy(states, losses, answers)
        chosen = chosen_by(odds, draws(0, step / 149, torch.arange(16), 2))
        policy_loss(odds, chosen, chosen[0] - chosen[1]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    chances = policy(states, losses, answers).sigmoid()
    assert chances[0].min() > 0.8 and chances[1].max() < 0.2


def test_the_students_gradient_passes_no_policy_and_the_policys_no_student() -> None:
    distiller, several = distiller_of(policy_objective()), teachers(2, 1)
    distiller.learn_from(several)
    found = gradients(distiller, drawn(distiller, several, 0.3))
    assert any(each.abs().max() > 0 for name, each in found.items() if name.startswith("policies."))
    assert any(each.abs().max() > 0 for name, each in found.items() if name.startswith("classifier."))
    without = distiller_of(Term("task_labels", "hard_cross_entropy"))
    assert not without.policies


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            "{signal: lm_logits, loss: mse, teachers: label_loss}",
            "teachers must be one of mean, sum, first, uncertainty",
        ),
        ("{signal: lm_logits, loss: mse, teachers: uncertainty_rank}", "teachers must be one of mean, sum, first"),
        ("{signal: hidden_states, loss: mse, teachers: uncertainty}", "teachers must be one of mean, sum, first; got"),
        ("{signal: lm_labels, loss: hard_cross_entropy, teachers: mean}", "teachers has no effect"),
        ("{signal: lm_logits, loss: mse, teachers: best}", "got 'best'"),
        ("{signal: lm_logits, loss: mse, projection: teacher}", "projection has no effect"),
    ],
)
def test_what_several_teachers_are_not_for_is_refused_by_the_file_and_key(term: str, message: str, write: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        load_method(str(write("method.yaml", f"pretraining: [{term}]")))


def test_a_policy_of_a_task_with_choices_is_refused() -> None:
    distiller = Distiller(Objective((policy_objective(),)), TOKEN_MAP, classifier=students()["classifier"])
    with pytest.raises(ConfigError, match="needs a task with classes"):
        distiller.learn_from(teachers(2, 1))


def test_the_rank_of_uncertainty_couples_the_examples_of_a_batch_and_labels_are_read() -> None:
    def objective(name: str) -> Objective:
        return Objective((Term("task_logits", "mse", teachers=name),))

    assert objective("uncertainty_rank").couples and not objective("uncertainty").couples
    reading: Sequence[str] = [name for name in WEIGHTINGS if objective(name).reads("labels")]
    assert reading == ["label_loss", "policy"]
