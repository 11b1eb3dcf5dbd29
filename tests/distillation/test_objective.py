"""Methods as YAML, and an objective's masks, counts, means and weights."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glmd.data.batches import with_positions
from glmd.distillation.methods import load_method, parse_term
from glmd.distillation.objective import Objective, Term, positions_of
from glmd.errors import ConfigError
from glmd.losses.logits import LOGIT_LOSSES

WORDS = Term("lm_logits", "kl_divergence", options={"temperature": 15.0})
MASKED = Term("lm_logits", "kl_divergence", tokens="masked")
LABELS = Term("lm_labels", "hard_cross_entropy", tokens="masked")
TASK = Term("task_logits", "kl_divergence")
TASK_LABELS = Term("task_labels", "hard_cross_entropy")

Write = Callable[[str, str], Path]


def batch() -> dict[str, Tensor]:
    """3 rows of 4, 2 and 3 tokens; 3 tokens were masked; one row has no label."""
    found = {
        "input_ids": torch.tensor([[2, 7, 8, 3], [2, 3, 0, 0], [2, 9, 3, 0]]),
        "predicts": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool(),
        "lm_labels": torch.tensor([[-100, 7, 5, -100], [-100, -100, -100, -100], [-100, 0, -100, -100]]),
        "example_id": torch.arange(3),
        "labels": torch.tensor([1, -100, 0]),
    }
    return with_positions(found)


# Methods


def test_glmd_is_two_stages_of_words_at_temperature_15_and_one_of_soft_labels() -> None:
    assert load_method("glmd") == {
        "pretraining": Objective((WORDS,)),
        "task_lm": Objective((WORDS,)),
        "task_soft_labels": Objective((TASK,)),
    }


def test_a_method_of_ones_own_is_a_path(write: Write) -> None:
    path = write(
        "mine.yaml",
        """
        pretraining:
          - {signal: lm_logits, loss: reverse_kl, temperature: 4, weight: {from: 1, to: 0}, tokens: masked}
          - {signal: lm_labels, loss: hard_cross_entropy, weight: 2}
        """,
    )
    first = Term("lm_logits", "reverse_kl", {"from": 1.0, "to": 0.0}, "masked", {"temperature": 4.0})
    second = Term("lm_labels", "hard_cross_entropy", 2.0, "masked")
    assert load_method(str(path)) == {"pretraining": Objective((first, second))}


def test_gkd_compat_is_an_option_of_a_term(write: Write) -> None:
    given = "{signal: lm_logits, loss: mse, gkd_compat: true}"
    path = write("mine.yaml", f"pretraining: [{given}]\ntask_lm: [{GOOD}]")
    assert [each.terms[0].gkd_compat for each in load_method(str(path)).values()] == [True, False]


GOOD = "{signal: lm_logits, loss: kl_divergence}"


@pytest.mark.parametrize(
    ("text", "place", "remedy"),
    [
        (f"pretrainig: [{GOOD}]", "pretrainig is unknown", "did you mean pretraining?"),
        ("pretraining: []", "pretraining must be a list of terms", ""),
        (f"pretraining: {GOOD}", "pretraining must be a list of terms", ""),
        ("pretraining: [lm_logits]", "pretraining[0] must be a mapping", "lm_logits"),
        (f"pretraining: [{GOOD}, {{loss: mse}}]", "pretraining[1].signal is missing", ""),
        ("pretraining: [{signal: lm_logits}]", "pretraining[0].loss is missing", ""),
        ("pretraining: [{signal: word_logit, loss: mse}]", "[0].signal 'word_logit'", "did you mean lm_logits?"),
        ("pretraining: [{signal: task_logits, loss: mse}]", "[0].signal 'task_logits'", "lm_logits"),
        ("task_lm: [{signal: 3, loss: mse}]", "[0].signal must be text", "3"),
        ("task_lm: [{signal: lm_logits, loss: kl_divergance}]", "[0].loss 'kl_divergance'", "did you mean kl_div"),
        (
            "task_soft_labels: [{signal: task_labels, loss: mse}]",
            "[0].loss 'mse' does not fit task_labels",
            "hard_cross",
        ),
        ("task_lm: [{signal: lm_logits, loss: mse, temperature: 2}]", "[0].temperature has no effect", "weight"),
        ("task_lm: [{signal: lm_logits, loss: kl_divergence, temprature: 2}]", "[0].temprature", "temperature?"),
        ("task_soft_labels: [{signal: task_logits, loss: mse, tokens: all}]", "[0].tokens has no effect", "weight"),
        ("task_lm: [{signal: task_logits, loss: mse, gkd_compat: true}]", "[0].gkd_compat has no effect", "weight"),
        ("task_lm: [{signal: lm_logits, loss: mse, gkd_compat: 1}]", "[0].gkd_compat must be true or false", "1"),
        ("pretraining: [{signal: lm_labels, loss: hard_cross_entropy, tokens: all}]", "[0].tokens has no eff", ""),
        ("task_lm: [{signal: lm_logits, loss: mse, tokens: mask}]", "[0].tokens must be one of all, masked", ""),
        ("task_lm: [{signal: lm_logits, loss: kl_divergence, temperature: 0}]", "[0].temperature", "from 0.01"),
        ("task_lm: [{signal: lm_logits, loss: kl_divergence, temperature: hot}]", "[0].temperature", "a number"),
        ("task_lm: [{signal: lm_logits, loss: kl_divergence, temperature: .nan}]", "[0].temperature", "nan"),
        ("task_lm: [{signal: lm_logits, loss: kl_divergence, temperature: .inf}]", "[0].temperature", "inf"),
        (
            "task_lm: [{signal: lm_logits, loss: kl_divergence, temperature: {from: 1}}]",
            "[0].temperature",
            "{from: a, to",
        ),
        ("task_lm: [{signal: lm_logits, loss: kl_divergence, temperature: [[0, 1], [1, 0]]}]", "from 0.01", "got 0.0"),
        (
            "task_lm: [{signal: lm_logits, loss: kl_divergence, temperature: [[1, 1], [0, 2]]}]",
            "must rise",
            "[1.0, 0.0]",
        ),
        ("task_lm: [{signal: lm_logits, loss: skew_kl, mixing: {from: 0, to: 1}}]", "[0].mixing must be a number", ""),
        ("task_lm: [{signal: lm_logits, loss: mse, weight: -1}]", "[0].weight must be at least 0", "-1"),
        ("task_lm: [{signal: lm_logits, loss: mse, weight: .inf}]", "[0].weight", "inf"),
        ("task_lm: [{signal: lm_logits, loss: mse, weight: .nan}]", "[0].weight", "nan"),
        ("task_lm: [{signal: lm_logits, loss: mse, weight: much}]", "[0].weight must be a number", "much"),
        ("task_lm: [{signal: lm_logits, loss: mse, weight: {from: 1}}]", "[0].weight", "{from: a, to: b}"),
        ("task_lm: [{signal: lm_logits, loss: mse, weight: {from: 1, to: -1}}]", "[0].weight", "at least 0"),
        (
            f"pretraining: [{GOOD}, {GOOD}]",
            "pretraining has lm_logits.kl_divergence twice",
            "add their weights, or give",
        ),
        (
            "task_lm: [{signal: lm_logits, loss: mse, weight: 0}]",
            "[0].weight is 0, so the term has no effect",
            "remove",
        ),
        ("task_lm: [{signal: lm_logits, loss: mse, label: a.b}]", "[0].label must be letters, digits and _", "a.b"),
        ("{}", "no stage", "pretraining, task_lm, task_soft_labels"),
    ],
)
def test_what_a_method_cannot_mean_is_refused_in_one_line_with_its_place(
    write: Write, text: str, place: str, remedy: str
) -> None:
    path = write("mine.yaml", text)
    with pytest.raises(ConfigError) as refusal:
        load_method(str(path))
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert place in message and remedy in message


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"method 'gmld' is unknown; did you mean glmd\?"):
        load_method("gmld")


# Tokens and counts


def test_lm_labels_speak_of_masked_tokens_only() -> None:
    term = parse_term({"signal": "lm_labels", "loss": "hard_cross_entropy"}, "here", "pretraining")
    assert term == LABELS and term.needs_masking
    assert len(positions_of(term, batch())) == 3


def test_a_pad_is_no_token_even_with_a_label() -> None:
    changed = batch()
    changed["lm_labels"][1, 3] = 5
    changed = with_positions(changed)
    assert positions_of(WORDS, changed).tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10]
    for term in (MASKED, LABELS):
        assert positions_of(term, changed).tolist() == [1, 2, 9]


def test_each_term_counts_what_its_mean_runs_over() -> None:
    objective = Objective((WORDS, MASKED, LABELS, TASK, TASK_LABELS))
    counts = objective.counts(batch())
    assert counts.dtype == torch.float64
    assert counts.tolist() == [9, 3, 3, 3, 2]


def test_with_gkd_compat_a_term_counts_pads_too_and_the_others_do_not() -> None:
    words, masked = (replace(term, gkd_compat=True) for term in (WORDS, MASKED))
    assert Objective((words, masked, LABELS, TASK, TASK_LABELS)).counts(batch()).tolist() == [12, 12, 3, 3, 2]
    assert Objective((words, MASKED)).counts(batch()).tolist() == [12, 3]


def test_an_objective_knows_what_it_uses_and_whether_it_needs_corruption() -> None:
    assert Objective((WORDS, TASK_LABELS)).needs == {"head", "task_head"}
    assert Objective((WORDS, TASK_LABELS)).teacher_needs == {"head"} and not Objective((LABELS,)).teacher_needs
    assert Objective((TASK, TASK_LABELS)).reads("labels") and not Objective((WORDS, TASK)).reads("labels")
    assert Objective((LABELS,)).reads_tokens and not Objective((TASK,)).reads_tokens
    assert not Objective((WORDS, TASK, TASK_LABELS)).needs_masking
    assert Objective((WORDS, MASKED)).needs_masking and Objective((LABELS,)).needs_masking


# Means and weights


def published_loss(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """The published code's word loss on (B, L, K) logits: they, not the losses, are multiplied by the mask."""
    student, teacher = student * mask[..., None], teacher * mask[..., None]
    p = (teacher / temperature).softmax(-1)
    kl = (p * ((teacher / temperature).log_softmax(-1) - (student / temperature).log_softmax(-1))).sum(-1)
    return temperature**2 * kl.mean()


def test_gkd_compat_reproduces_the_published_reduction() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 30, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    student.requires_grad_()
    inputs = batch()
    valid = inputs["predicts"]
    expected = published_loss(student, teacher, valid.double(), 15.0)
    for gkd_compat, factor in ((True, 1.0), (False, 12 / 9)):
        objective = Objective((replace(WORDS, gkd_compat=gkd_compat),))
        values = LOGIT_LOSSES["kl_divergence"](student[valid], teacher[valid], temperature=15.0)
        loss = objective.total(objective.means(values.sum()[None], objective.counts(inputs)), 0.0)
        torch.testing.assert_close(loss, expected * factor)
        ours, theirs = (torch.autograd.grad(each, student, retain_graph=True)[0] for each in (loss, expected))
        torch.testing.assert_close(ours, theirs * factor)
        assert not ours[~valid].any()


def test_a_term_without_tokens_is_zero() -> None:
    means = Objective((LABELS, WORDS)).means(torch.tensor([0.0, 6.0]), torch.tensor([0.0, 3.0]))
    assert means.tolist() == [0.0, 2.0]


def test_the_total_is_the_sum_of_weight_times_mean_and_weights_follow_the_progress() -> None:
    fading = Term("lm_logits", "kl_divergence", {"from": 2.0, "to": 0.5})
    objective = Objective((fading, Term("lm_labels", "hard_cross_entropy", 3.0, "masked")))
    means = torch.tensor([10.0, 1.0], dtype=torch.float64, requires_grad=True)
    for progress, weight in ((0.0, 2.0), (0.5, 1.25), (1.0, 0.5)):
        total = objective.total(means, progress)
        assert total.item() == pytest.approx(weight * 10 + 3)
        assert torch.autograd.grad(total, means)[0].tolist() == [weight, 3.0]


def test_a_temperature_may_be_scheduled_as_a_weight_is_and_a_plain_one_leaves_the_term_as_it_was(write: Write) -> None:
    text = "{signal: lm_logits, loss: kl_divergence, temperature: %s}"
    forms = ("15", "{from: 15, to: 1}", "[[0, 15], [0.5, 1]]")
    plain, line, points = (
        load_method(str(write("mine.yaml", f"task_lm: [{text % each}]")))["task_lm"] for each in forms
    )
    assert plain.terms == (WORDS,) and plain.is_constant and not plain.changes
    assert plain.terms[0].record()["options"] == {"temperature": 15.0} == WORDS.record()["options"]
    for objective, wanted in ((line, [15, 8, 1]), (points, [15, 1, 1])):
        term = objective.terms[0]
        assert objective.changes and not objective.is_constant
        assert [term.options_at(at)["temperature"] for at in (0.0, 0.5, 1.0)] == wanted
        assert json.loads(json.dumps(term.record()))["options"] != {"temperature": 15.0}
    assert plain.terms[0].options_at(0.5) == {"temperature": 15.0}


def test_a_loss_that_cannot_do_without_labels_says_so_and_one_that_can_does_not() -> None:
    found = {loss: Objective((Term("task_logits", loss),)) for loss in ("modified_targets", "decoupled_kd", "mse")}
    assert [each.reads("labels") for each in found.values()] == [True, False, False]
    assert not any(each.reads("lm_labels") for each in found.values())
    assert Objective((TASK_LABELS,)).reads("labels")


def test_terms_of_one_signal_and_loss_are_told_apart_by_their_labels(write: Write) -> None:
    one, other = "signal: hidden_states, loss: mse, layers: [[0, 1]]", "signal: hidden_states, loss: mse, label: top"
    found = load_method(str(write("two.yaml", f"pretraining: [{{{one}}}, {{{other}}}]")))["pretraining"].terms
    assert [term.name for term in found] == ["hidden_states.mse", "hidden_states.mse.top"]
    assert [term.layers for term in found] == [((0, 1),), "uniform"]
