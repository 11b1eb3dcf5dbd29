"""Interventions that come with glmd and run a student twice, against the models' own layers called one by one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_seams import V, assert_identical, batch_of, distiller_of, fresh, log_rows, model_of, teacher_of, train
from test_trainer import Killed
from torch import Tensor

from glmd.distillation.distiller import Distiller
from glmd.distillation.interchange import interchanged
from glmd.distillation.interventions import Intervention
from glmd.distillation.methods import load_method
from glmd.distillation.objective import Objective, Term
from glmd.distillation.teacher import OnlineTeacher
from glmd.errors import ConfigError
from glmd.vocabulary.vocabulary import Vocabulary

__all__ = ["fresh"]  # of each test by itself
WORDS = Term("lm_logits", "kl_divergence", weight=2.0, options={"temperature": 2.0})
PERTURBED = Objective(
    (WORDS, Term("lm_labels", "hard_cross_entropy", tokens="masked")), Intervention("embedding_gradient", {"size": 1.5})
)
CAUSAL = Term("lm_logits", "kl_divergence", options={"temperature": 2.0}, intervened=True, label="causal")
EXCHANGED = Objective((WORDS, CAUSAL), Intervention("interchange", {"share": 0.5}))


def logits_of(
    model: Any, hidden: Tensor, mask: Tensor, change: Callable[[int, Tensor], Tensor] | None = None
) -> Tensor:
    """Of a model from its embeddings, layer by layer; change: of what each gives."""
    for number, layer in enumerate(model.bert.encoder.layer):
        hidden = layer(hidden, torch.where(mask[:, None, None].bool(), 0.0, -torch.inf).double())
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        hidden = hidden if change is None else change(number, hidden)
    logits: Tensor = model.cls(hidden)
    return logits


def soft_words(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    p, q = ((each[mask.bool()] / 2).log_softmax(-1) for each in (teacher, student))
    return 4 * (p.exp() * (p - q)).sum()


def learned(objective: Objective, **teacher: Any) -> tuple[Distiller, OnlineTeacher]:
    distiller, live = distiller_of(objective), teacher_of(**{"width": 8} | teacher)
    distiller.learn_from(live)
    return distiller, live


def assert_same(distiller: Distiller, ours: Tensor, theirs: Tensor) -> None:
    """Values, and gradients of all weights."""
    torch.testing.assert_close(ours, theirs)
    weights = list(distiller.parameters())
    found = (torch.autograd.grad(each.sum(), weights, allow_unused=True) for each in (ours, theirs))
    for (name, _), mine, other in zip(distiller.named_parameters(), *found, strict=True):
        assert mine is not None and other is not None, name
        torch.testing.assert_close(mine, other, msg=name)


def test_a_student_learns_beside_where_its_loss_rises_fastest() -> None:
    """Each embedding is moved along its gradient of the whole loss, weights and counts included, by one length."""
    (distiller, live), batch = learned(PERTURBED, width=12), batch_of(0, 1, 2)
    student, mask, labels = distiller.language_model, batch["attention_mask"], batch["lm_labels"]
    factors = torch.tensor([0.1, 0.7], dtype=torch.float64)
    found = distiller(batch, live(batch), 0.0, factors)
    assert all(p.grad is None for p in distiller.parameters()), "the pass before leaves none"
    with torch.no_grad():
        theirs = live.language_model(input_ids=batch["input_ids"], attention_mask=mask).logits

    def sums(embeddings: Tensor) -> Tensor:
        logits = logits_of(student, embeddings, mask)
        hard = torch.nn.functional.cross_entropy(logits[labels >= 0], labels[labels >= 0], reduction="sum")
        return torch.stack([soft_words(logits, theirs, mask), hard]) * factors

    embeddings = student.bert.embeddings(batch["input_ids"])  # type: ignore[union-attr, operator]
    before = sums(embeddings)
    (gradient,) = torch.autograd.grad(2 * before[0] + before[1], embeddings, retain_graph=True)
    length = gradient.norm(dim=-1, keepdim=True)
    assert (length[mask.bool()] > 0).all()
    moved = embeddings + 1.5 * torch.where(length > 0, gradient / length, 0.0)
    assert_same(distiller, found, sums(moved))
    assert (2 * found[0] + found[1] > 2 * before[0] + before[1]).item()


def test_what_a_gradient_is_added_to_depends_on_no_padding_and_no_split_of_a_step() -> None:
    (distiller, live), rows = learned(PERTURBED), [(0, 1, 2, 3)]
    counts = PERTURBED.counts(batch_of(0, 1, 2, 3))

    def loss(*batches: Any) -> Tensor:
        return sum(distiller(each, live(each), 0.0, 1 / counts) for each in batches)

    whole = loss(batch_of(*rows[0]))
    torch.testing.assert_close(loss(batch_of(*rows[0], length=14)), whole)
    torch.testing.assert_close(loss(batch_of(0, 1), batch_of(2, 3, length=11)), whole)


def test_a_part_of_each_text_is_exchanged_for_as_much_of_the_next() -> None:
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
    generator = torch.Generator().manual_seed(0)
    starts = set()
    for places in [torch.zeros(2, 3), *torch.rand(50, 2, 3, generator=generator), torch.full((2, 3), 1 - 1e-7)]:
        inside, sources = interchanged(mask, places, 0.5)
        for row, (count, length, other) in enumerate(((2, 6, 4), (2, 4, 5), (2, 5, 6))):
            columns = inside[row].nonzero()[:, 0].tolist()
            taken = sources[row][inside[row]].tolist()
            assert columns == [*range(columns[0], columns[0] + count)] and columns[-1] < length
            assert taken == [*range(taken[0], taken[0] + count)] and taken[-1] < other
            starts.add((row, columns[0], taken[0]))
    assert len(starts) == 5 * 3 + 3 * 4 + 4 * 5, "every place is drawn"


@pytest.mark.parametrize("seed", range(4))
def test_both_models_go_on_with_the_states_of_another_text(seed: int) -> None:
    (distiller, live), batch = learned(EXCHANGED), batch_of(0, 1, 2)
    mask, student, teacher = batch["attention_mask"], distiller.language_model, live.language_model
    torch.manual_seed(seed)
    found = distiller(batch, live(batch))
    generator = torch.Generator().manual_seed(seed ^ 1)
    drawn = int(torch.randint(2, (), generator=generator))
    inside, sources = interchanged(mask, torch.rand(2, 3, generator=generator), 0.5)
    assert inside.any()

    def exchanging(wanted: int) -> Callable[[int, Tensor], Tensor]:
        def change(number: int, hidden: Tensor) -> Tensor:
            if number != wanted:
                return hidden
            rows = [
                hidden[(row + 1) % 3, sources[row, place]] if inside[row, place] else hidden[row, place]
                for row in range(3)
                for place in range(hidden.shape[1])
            ]
            return torch.stack(rows).view_as(hidden)

        return change

    logits = []
    for exchanges in (False, True):
        for model, number in ((student, drawn), (teacher, (1, 3)[drawn])):
            embeddings = model.bert.embeddings(batch["input_ids"])  # type: ignore[union-attr, operator]
            logits.append(logits_of(model, embeddings, mask, exchanging(number) if exchanges else None))
    expected = torch.stack([soft_words(*logits[:2], mask), soft_words(*logits[2:], mask)])
    assert abs(expected[0] - expected[1]) > 1e-3
    assert_same(distiller, found, expected)


def test_where_nothing_is_exchanged_both_passes_say_the_same() -> None:
    distiller, live = learned(Objective((WORDS, CAUSAL), Intervention("interchange", {"share": 0.01})))
    plain, causal = distiller(batch_of(0, 1), live(batch_of(0, 1)))
    torch.testing.assert_close(plain, causal)


@pytest.mark.parametrize("objective", [PERTURBED, EXCHANGED], ids=["perturbed", "exchanged"])
def test_a_killed_stage_of_two_passes_ends_in_the_same_bits(
    objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = OnlineTeacher(model_of(seed=1, layers=4), None, Vocabulary.identity(V))
    undisturbed = train(tmp_path / "whole", objective, live)
    step, calls = Distiller.forward, iter(range(8))

    def dying(self: Distiller, *given: Any) -> Tensor:
        if next(calls) == 7:
            raise Killed
        return step(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "forward", dying)
        with pytest.raises(Killed):
            train(tmp_path / "killed", objective, live)
    assert_identical(train(tmp_path / "killed", objective, live), undisturbed)
    assert log_rows(tmp_path / "killed") == log_rows(tmp_path / "whole")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("intervention: {name: interchange, share: 0}", "pretraining.intervention: share must be in (0, 1], got 0"),
        ("intervention: {name: embedding_gradient, size: 0}", "size must be above 0 and finite, got 0"),
        ("intervention: {name: theseus, until: 2}", "replacing_rate must be in [0, 1] and until in (0, 1]"),
        ("intervention: {name: interchange}", "no effect on what the teacher says in the first pass; give a term"),
    ],
)
def test_options_of_interventions_are_checked_when_a_method_is_read(given: str, message: str, write: Any) -> None:
    path = write("bad.yaml", f"pretraining: {{terms: [{{signal: lm_logits, loss: mse}}], {given}}}")
    with pytest.raises(ConfigError) as refused:
        load_method(str(path))
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[{signal: lm_logits, loss: mse, intervened: true}]", "intervened has no effect: there is no intervention"),
        ("[{signal: hidden_states, loss: mse, intervened: true}]", "intervened has no effect on hidden_states mse"),
        (
            "{terms: [{signal: hidden_states, loss: mse}], intervention: {name: theseus}}",
            "hidden_states.mse compares layers in whose place theseus runs the teacher's; remove one of the two",
        ),
        (
            "{terms: [{signal: lm_logits, loss: mse, intervened: true}], intervention: {name: embedding_gradient}}",
            "intervened has no effect: all terms are under embedding_gradient",
        ),
    ],
)
def test_terms_that_an_intervention_makes_nothing_of_are_refused(given: str, message: str, write: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        load_method(str(write("bad.yaml", f"pretraining: {given}")))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_teacher_needs_a_block_for_each_layer_that_is_exchanged() -> None:
    intervention = Intervention("interchange")
    intervention.check(model_of(layers=2).config, model_of(layers=4, width=12).config)
    with pytest.raises(ConfigError, match="the student must have 1 to 1 layers"):
        intervention.check(model_of(layers=2).config, model_of(layers=1).config)
    assert EXCHANGED.couples and not PERTURBED.couples
    assert EXCHANGED.teacher_needs == {"head", "layers"} and PERTURBED.teacher_needs == {"head"}
