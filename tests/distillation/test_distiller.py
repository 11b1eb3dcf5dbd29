"""Loss sums of student, teacher and objective against both models' own full logits, in float64."""

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
)

from glmd.data.batches import with_positions
from glmd.distillation.distiller import Distiller
from glmd.distillation.objective import Objective, Term
from glmd.distillation.teacher import Ensemble, OnlineTeacher, TeacherOutputs
from glmd.losses.logits import TASK_LOGIT_LOSSES
from glmd.tasks.forms import task_form
from glmd.tasks.tasks import load_task
from glmd.vocabulary.vocabulary import Vocabulary

V, C = 30, 3
KEPT = np.array([0, 1, 2, 3, 4, *range(6, V, 2)])
TOKEN_MAP = np.where(np.isin(np.arange(V), KEPT), np.searchsorted(KEPT, np.arange(V)), 7)
VOCABULARY = Vocabulary(KEPT, TOKEN_MAP)

Batch = dict[str, Tensor]
WORDS = Term("lm_logits", "kl_divergence", options={"temperature": 15.0})
MASKED = Term("lm_logits", "kl_divergence", tokens="masked", options={"temperature": 2.0})
WORD_LABELS = Term("lm_labels", "hard_cross_entropy", tokens="masked")
TASK = Term("task_logits", "kl_divergence", options={"temperature": 3.0})
TASK_LABELS = Term("task_labels", "hard_cross_entropy")
EVERYTHING = (WORDS, WORD_LABELS, TASK, TASK_LABELS)


def model_of(head: type, vocab_size: int, num_hidden_layers: int, seed: int, **fields: Any) -> Any:
    config_class = ModernBertConfig if "ModernBert" in head.__name__ else BertConfig
    if config_class is BertConfig:
        fields |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=8,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        initializer_range=0.4,
        num_labels=C,
        **fields,
    )
    torch.manual_seed(seed)
    model = head(config).double()
    with torch.no_grad():
        for parameter in model.parameters():  # so that no bias is zero
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def students() -> dict[str, Any]:
    return {
        "language_model": model_of(BertForMaskedLM, len(KEPT), 1, seed=2),
        "classifier": model_of(BertForSequenceClassification, len(KEPT), 1, seed=3),
    }


def teacher() -> OnlineTeacher:
    language_model = model_of(BertForMaskedLM, V, 2, seed=0)
    return OnlineTeacher(language_model, model_of(BertForSequenceClassification, V, 2, seed=1), VOCABULARY)


def batch(length: int = 7) -> Batch:
    """Rows of 7, 4, 2 and 5 tokens, padded to `length`; about a third of the tokens are masked."""
    generator = torch.Generator().manual_seed(0)
    valid = torch.arange(7) < torch.tensor([7, 4, 2, 5])[:, None]
    ids = torch.randint(5, V, (4, 7), generator=generator)
    masked = (torch.rand(4, 7, generator=generator) < 0.4) & valid
    labels = torch.randint(5, V, (4, 7), generator=generator).masked_fill(~masked, -100)
    padding = (0, length - 7)
    found = {
        "input_ids": functional.pad(ids * valid, padding),
        "attention_mask": functional.pad(valid.long(), padding),
        "predicts": functional.pad(valid, padding),
        "lm_labels": functional.pad(labels, padding, value=-100),
        "labels": torch.tensor([2, 0, -100, 1]),
        "example_id": torch.arange(4),
    }
    return with_positions(found)


def rows(batch: Mapping[str, Tensor], start: int, stop: int) -> Batch:
    """Some rows of a batch, padded to their longest."""
    length = int(batch["attention_mask"][start:stop].sum(1).max())
    return with_positions(
        {
            name: tensor[start:stop, :length] if tensor.ndim == 2 else tensor[start:stop]
            for name, tensor in batch.items()
        }
    )


def loss_of(distiller: Distiller, teacher: OnlineTeacher, *micro_batches: Batch) -> Tensor:
    """The weighted mean over all micro-batches, summed first and divided once."""
    objective = distiller.objective
    sums = sum(distiller(each, teacher(each)) for each in micro_batches)
    counts = sum(objective.counts(each) for each in micro_batches)
    return objective.total(objective.means(sums, counts), 0.5)


def gradients(distiller: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(distiller.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)


def test_of_several_teachers_the_student_learns_the_mean_of_their_losses_and_so_their_mean_probability() -> None:
    """For the forward KL both have one gradient: sum(p log q) is linear in p."""
    terms = (Term("lm_logits", "kl_divergence", 1.0, options={"temperature": 3.0}),)
    distiller = Distiller(Objective(terms), TOKEN_MAP, language_model=students()["language_model"]).eval()
    teachers = [OnlineTeacher(model_of(BertForMaskedLM, V, 2, seed=seed), None, VOCABULARY) for seed in (0, 7, 8)]
    several, each_alone = loss_of(distiller, Ensemble(teachers), batch()), []
    each_alone = [loss_of(distiller, teacher, batch()) for teacher in teachers]
    assert_same(several, torch.stack(each_alone).mean())
    assert max(each_alone) > 1.1 * min(each_alone)
    source = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    mapped = {**source, "input_ids": torch.from_numpy(TOKEN_MAP)[source["input_ids"]]}
    mean = sum((t.language_model(**source).logits[..., KEPT] / 3).softmax(-1) for t in teachers) / 3
    log_q = (distiller.language_model(**mapped).logits / 3).log_softmax(-1)
    mask = source["attention_mask"].bool()
    expected = 9 * -(mean * log_q).sum(-1)[mask].mean()
    ours, theirs = (gradients(distiller, loss) for loss in (several, expected))
    assert_same(ours, theirs)


def plain_loss(term: Term, distiller: Distiller, teacher: OnlineTeacher, batch: Batch) -> Tensor:
    """A term's mean from the full logits of both models' own forward."""
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mapped = {**source, "input_ids": torch.from_numpy(TOKEN_MAP)[batch["input_ids"]]}
    temperature = term.options.get("temperature", 1.0)
    if term.signal.startswith("lm_"):
        student_logits = distiller.language_model(**mapped).logits
        teacher_logits = teacher.language_model(**source).logits[..., KEPT]
        mask = batch["attention_mask"].bool()
        if term.tokens == "masked":
            mask &= batch["lm_labels"] != -100
        labels = torch.from_numpy(TOKEN_MAP)[batch["lm_labels"].clamp(min=0)]
    else:
        student_logits = distiller.classifier(**mapped).logits
        teacher_logits = teacher.classifier(**source).logits.float().double()
        labels = batch["labels"].clamp(min=0)
        mask = batch["labels"] >= 0 if term.signal == "task_labels" else torch.ones(len(labels), dtype=torch.bool)
    q = (student_logits / temperature).log_softmax(-1)
    p = (teacher_logits / temperature).softmax(-1)
    if term.signal.endswith("labels"):
        values = -q.gather(-1, labels[..., None])[..., 0]
    elif term.loss == "mse":
        values = ((student_logits - teacher_logits) ** 2).mean(-1)
    elif term.loss == "reverse_kl":
        values = temperature**2 * (q.exp() * (q - p.log())).sum(-1)
    else:
        values = temperature**2 * (p * (p.log() - q)).sum(-1)
    return (values * mask).sum() / mask.sum()


TERMS = {
    "words": WORDS,
    "masked words": MASKED,
    "reverse": Term("lm_logits", "reverse_kl", options={"temperature": 4.0}),
    "mse": Term("lm_logits", "mse"),
    "masked mse": Term("lm_logits", "mse", tokens="masked"),
    "word labels": WORD_LABELS,
    "task": TASK,
    "task labels": TASK_LABELS,
}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_equals_the_plain_loss_of_both_models_full_logits(name: str) -> None:
    distiller, term = Distiller(Objective((TERMS[name],)), TOKEN_MAP, **students()), TERMS[name]
    loss, expected = (loss_of(distiller, teacher(), batch()), plain_loss(term, distiller, teacher(), batch()))
    assert expected > 0.01
    assert_same(loss, expected)
    assert_same(gradients(distiller, loss), gradients(distiller, expected))


@pytest.mark.parametrize("signal", ["lm_logits", "task_logits"])
def test_a_scheduled_temperature_is_that_of_its_place_in_the_stage(signal: str) -> None:
    def sums(progress: float, temperature: Any) -> Tensor:
        term = Term(signal, "kl_divergence", options={"temperature": temperature})
        distiller, inputs = Distiller(Objective((term,)), TOKEN_MAP, **students()), batch()
        return distiller(inputs, teacher()(inputs), progress)

    falling = {"from": 15.0, "to": 1.0}
    assert_same(sums(0.5, falling), sums(0.0, 8.0))
    assert_same(sums(1.0, falling), sums(0.3, 1.0))
    assert sums(1.0, falling) != sums(0.0, falling)


@pytest.mark.parametrize("signal", ["lm_logits", "task_logits"])
def test_taid_is_given_the_progress_of_the_stage(signal: str) -> None:
    def sums(progress: float, loss: str = "taid") -> Tensor:
        distiller, inputs = Distiller(Objective((Term(signal, loss),)), TOKEN_MAP, **students()), batch()
        return distiller(inputs, teacher()(inputs), progress)

    assert_same(sums(1.0), sums(1.0, "kl_divergence"))
    assert sums(0.0) < sums(0.5) < sums(1.0)


def test_losses_that_look_at_labels_are_given_those_of_the_task() -> None:
    inputs, both = batch(), students()
    model, classifier = teacher(), both["classifier"]
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    logits = classifier(**given | {"input_ids": torch.from_numpy(TOKEN_MAP)[inputs["input_ids"]]}).logits
    theirs = model(inputs).task_logits
    for loss in ("modified_targets", "decoupled_kd"):
        found = Distiller(Objective((Term("task_logits", loss),)), TOKEN_MAP, **both)(inputs, model(inputs))
        expected = TASK_LOGIT_LOSSES[loss](logits, theirs, labels=inputs["labels"]).sum()
        torch.testing.assert_close(found[0], expected)
        assert found[0] != TASK_LOGIT_LOSSES[loss](logits, theirs, labels=torch.full((4,), -100)).sum()


def test_words_and_task_together_are_the_weighted_sum_of_the_plain_losses() -> None:
    terms = (
        Term("lm_logits", "kl_divergence", {"from": 1.0, "to": 0.0}, options={"temperature": 15.0}),
        Term("lm_labels", "hard_cross_entropy", 2.0, "masked"),
        Term("task_logits", "kl_divergence", 0.25, options={"temperature": 3.0}),
        TASK_LABELS,
    )
    distiller = Distiller(Objective(terms), TOKEN_MAP, **students())
    loss = loss_of(distiller, teacher(), batch())
    weights = (0.5, 2.0, 0.25, 1.0)
    expected = sum(w * plain_loss(t, distiller, teacher(), batch()) for w, t in zip(weights, terms, strict=True))
    assert isinstance(expected, Tensor)
    assert_same(loss, expected)
    assert_same(gradients(distiller, loss), gradients(distiller, expected))


@pytest.mark.parametrize("name", [*TERMS, "everything"])
def test_padding_a_batch_further_changes_no_loss_and_no_gradient(name: str) -> None:
    terms = (TERMS[name],) if name in TERMS else EVERYTHING
    distiller, model = Distiller(Objective(terms), TOKEN_MAP, **students()), teacher()
    short, long = (loss_of(distiller, model, batch(length)) for length in (7, 13))
    assert_same(long, short)
    assert_same(gradients(distiller, long), gradients(distiller, short))


def test_padding_changes_nothing_for_a_task_head_that_averages_over_tokens() -> None:
    fields = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    fields |= {"classifier_pooling": "mean"}
    heads = ModernBertForMaskedLM, ModernBertForSequenceClassification
    pair = [model_of(head, len(KEPT), 1, seed, **fields) for seed, head in enumerate(heads)]
    model = OnlineTeacher(*(model_of(head, V, 2, seed, **fields) for seed, head in enumerate(heads, 2)), VOCABULARY)
    distiller = Distiller(Objective((WORDS, TASK)), TOKEN_MAP, language_model=pair[0], classifier=pair[1])
    short, long = (loss_of(distiller, model, batch(length)) for length in (7, 13))
    torch.testing.assert_close(long, short, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradients(distiller, long), gradients(distiller, short), rtol=1e-5, atol=1e-8)
    assert_same(short, plain_loss(WORDS, distiller, model, batch()) + plain_loss(TASK, distiller, model, batch()))


def test_the_gradient_of_a_pad_is_exactly_zero() -> None:
    distiller, inputs = Distiller(Objective(EVERYTHING), TOKEN_MAP, **students()), batch()
    seen: list[Tensor] = []
    embedding = distiller.classifier.bert.embeddings
    embedding.register_forward_hook(lambda module, args, output: seen.append(output))
    (gradient,) = torch.autograd.grad(loss_of(distiller, teacher(), inputs), seen)
    pads = inputs["attention_mask"] == 0
    assert pads.sum() == 10 and not gradient[pads].any()
    assert (gradient[~pads].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("cuts", [(0, 2, 4), (0, 1, 2, 3, 4), (0, 3, 4)])
def test_splitting_a_step_into_micro_batches_gives_the_same_loss_and_gradients(cuts: tuple[int, ...]) -> None:
    distiller, model = Distiller(Objective(EVERYTHING), TOKEN_MAP, **students()), teacher()
    parts = [rows(batch(), *cut) for cut in pairwise(cuts)]
    whole, split = loss_of(distiller, model, batch()), loss_of(distiller, model, *parts)
    torch.testing.assert_close(split, whole, rtol=1e-9, atol=0)
    # The teacher's task logits are float32, so that batches of other sizes may round them differently.
    torch.testing.assert_close(gradients(distiller, split), gradients(distiller, whole), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["words", "masked words", "reverse"])
def test_merged_words_give_their_probability_to_the_word_they_are_mapped_onto(name: str) -> None:
    """At temperature 1 the teacher's probabilities of a group add up; the sums' logarithms are its logits."""
    distiller, term = Distiller(Objective((TERMS[name],)), TOKEN_MAP, **students()), TERMS[name]
    model = OnlineTeacher(model_of(BertForMaskedLM, V, 2, seed=0), None, VOCABULARY, merge_dropped=True)

    class Merged(torch.nn.Module):
        """The teacher with the logits of groups where the kept tokens' stood."""

        def forward(self, **inputs: Any) -> Any:
            outputs = model.language_model(**inputs)
            sums = outputs.logits.softmax(-1) @ torch.eye(len(KEPT), dtype=torch.float64)[TOKEN_MAP]
            outputs.logits = torch.zeros_like(outputs.logits)
            outputs.logits[..., KEPT] = sums.log()
            return outputs

    plain = teacher()
    plain.language_model = Merged()
    loss, expected = loss_of(distiller, model, batch()), plain_loss(term, distiller, plain, batch())
    assert_same(loss, expected)
    assert abs(loss - plain_loss(term, distiller, teacher(), batch())) > 1e-3, "renormalizing is another loss"
    ours, theirs = gradients(distiller, loss), gradients(distiller, expected)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["words", "masked words", "task"])
def test_a_teacher_that_reads_mapped_tokens_is_given_what_the_student_reads(name: str) -> None:
    """Values and gradients are those of the plain twin, whose teacher's ids are exchanged one by one."""
    distiller, term = Distiller(Objective((TERMS[name],)), TOKEN_MAP, **students()), TERMS[name]
    both = (model_of(BertForMaskedLM, V, 2, seed=0), model_of(BertForSequenceClassification, V, 2, seed=1))
    loss = loss_of(distiller, OnlineTeacher(*both, VOCABULARY, reads_mapped=True), batch())
    given = batch()
    before = given["input_ids"].clone()
    plain = OnlineTeacher(*(copy.deepcopy(model) for model in both), VOCABULARY)

    def exchanged(model: nn.Module, args: Any, named: dict[str, Any]) -> Any:
        ids = [[int(KEPT[TOKEN_MAP[token]]) for token in row] for row in named["input_ids"].tolist()]
        return args, named | {"input_ids": torch.tensor(ids)}

    for model in (plain.language_model, plain.classifier):
        model.register_forward_pre_hook(exchanged, with_kwargs=True)  # type: ignore[union-attr]
    expected = plain_loss(term, distiller, plain, given)
    assert_same(loss, expected)
    assert abs(loss - plain_loss(term, distiller, teacher(), batch())) > 1e-4, "reading all tokens is another loss"
    assert given["input_ids"].equal(before), "the student's batch stays as it is"
    torch.testing.assert_close(gradients(distiller, loss), gradients(distiller, expected))


@pytest.mark.parametrize("terms", [(WORDS,), (MASKED,), (TASK,), (WORDS, TASK)])
def test_a_student_equal_to_the_teacher_has_zero_loss_and_zero_gradient(terms: tuple[Term, ...]) -> None:
    model = OnlineTeacher(
        *(model_of(head, V, 2, 0) for head in (BertForMaskedLM, BertForSequenceClassification)), Vocabulary.identity(V)
    )
    pair = {name: copy.deepcopy(getattr(model, name)).requires_grad_() for name in ("language_model", "classifier")}
    distiller = Distiller(Objective(terms), np.arange(V), **pair)
    loss = loss_of(distiller, model, batch())
    # Task logits come from the teacher in float32.
    tolerance = 1e-6 if TASK in terms else 1e-12
    assert abs(loss.item()) < tolerance
    assert max(float(g.abs().max()) for g in gradients(distiller, loss).values()) < tolerance


def counted_calls(module: nn.Module) -> list[Tensor]:
    """The input ids of each call that is made from now on."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["input_ids"])

    module.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("terms", [(WORDS,), (WORDS, WORD_LABELS), (TASK, TASK_LABELS), EVERYTHING])
def test_one_backbone_forward_serves_all_terms_of_student_and_of_teacher(terms: tuple[Term, ...]) -> None:
    distiller, model = Distiller(Objective(terms), TOKEN_MAP, **students()), teacher()
    student = distiller.classifier if distiller.classifier is not None else distiller.language_model
    ours, theirs = counted_calls(student.bert), counted_calls(model.base.bert)
    inputs = batch()
    distiller(inputs, model(inputs))
    assert len(ours) == len(theirs) == 1
    assert torch.equal(ours[0], torch.from_numpy(TOKEN_MAP)[inputs["input_ids"]]), "the student sees kept tokens"
    assert torch.equal(theirs[0], inputs["input_ids"]), "the teacher sees the source's"


def test_the_tied_embedding_gets_the_gradients_of_words_and_of_the_task() -> None:
    def embedding_gradient(*terms: Term) -> Tensor:
        distiller = Distiller(Objective(terms), TOKEN_MAP, **students())
        if distiller.classifier is None:  # words alone, over the same backbone
            distiller.language_model.bert.load_state_dict(students()["classifier"].bert.state_dict(), strict=False)
        loss_of(distiller, teacher(), batch()).backward()
        student = distiller.classifier if distiller.classifier is not None else distiller.language_model
        weight = student.get_input_embeddings().weight
        assert distiller.language_model is None or distiller.language_model.get_output_embeddings().weight is weight
        assert weight.grad is not None
        return weight.grad

    words, task = embedding_gradient(WORDS), embedding_gradient(TASK)
    assert words.abs().max() > 1e-3 and task.abs().max() > 1e-3
    unused = sorted(set(range(len(KEPT))) - set(TOKEN_MAP[batch()["input_ids"].flatten()].tolist()))
    assert unused and not task[unused].any() and words[unused].any(), "a word that is not read is still predicted"
    assert_same(embedding_gradient(WORDS, TASK), words + task)


def test_a_micro_batch_without_corrupted_tokens_adds_zero_and_still_reaches_every_weight() -> None:
    distiller, inputs = Distiller(Objective((MASKED, WORD_LABELS)), TOKEN_MAP, **students()), batch()
    inputs = with_positions(inputs | {"lm_labels": torch.full_like(inputs["lm_labels"], -100)})
    sums = distiller(inputs, teacher()(inputs))
    assert sums.tolist() == [0.0, 0.0]
    sums.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in distiller.parameters())


# What a distiller holds


def test_a_distiller_holds_only_the_models_that_its_terms_need() -> None:
    words = Distiller(Objective((WORDS,)), TOKEN_MAP, **students())
    task = Distiller(Objective((TASK,)), TOKEN_MAP, **students())
    assert words.classifier is None and task.language_model is None
    assert list(words.describe()) == ["language_model"] and list(task.describe()) == ["classifier"]
    described = Distiller(Objective(EVERYTHING), TOKEN_MAP, **students()).describe()
    assert described["classifier"]["class"] == "BertForSequenceClassification"
    assert described["language_model"]["config"]["vocab_size"] == len(KEPT)
    assert not [name for name in words.state_dict() if "token_map" in name], "the map is no weight"


# The teacher


def test_a_teacher_with_both_heads_reads_the_fine_tuned_backbone_and_learns_nothing() -> None:
    language_model, classifier = (
        model_of(BertForMaskedLM, V, 2, seed=0),
        model_of(BertForSequenceClassification, V, 2, 1),
    )
    model, inputs = OnlineTeacher(language_model, classifier, VOCABULARY), batch()
    assert model.base.bert is classifier.bert is language_model.bert
    outputs = model(inputs)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert_same(outputs.task_logits, classifier(**given).logits.float())
    assert outputs.hidden_states is not None and outputs.head is not None
    logits = outputs.head.logits(outputs.hidden_states)
    assert_same(logits, language_model(**given).logits[inputs["attention_mask"].bool()][:, KEPT])
    assert not any(p.requires_grad for m in (language_model, classifier) for p in m.parameters())
    assert not outputs.hidden_states.requires_grad and not language_model.training and not classifier.training


def test_a_teacher_says_only_what_it_has_heads_for() -> None:
    words = OnlineTeacher(model_of(BertForMaskedLM, V, 2, seed=0), None, VOCABULARY)(batch())
    task = OnlineTeacher(None, model_of(BertForSequenceClassification, V, 2, seed=1), VOCABULARY)(batch())
    assert words.task_logits is None and words.hidden_states is not None
    assert task == TeacherOutputs(task_logits=task.task_logits) and task.task_logits is not None


def test_choices_are_distilled_like_the_plain_softmax_over_each_examples_own() -> None:
    task, hard = Term("task_logits", "kl_divergence", options={"temperature": 3.0}), TASK_LABELS
    student = model_of(BertForMultipleChoice, len(KEPT), 1, seed=3)
    source = model_of(BertForMultipleChoice, V, 2, seed=1)
    form = task_form(load_task("COPA"), kind="masked")
    teacher_of_choices = OnlineTeacher(None, source, VOCABULARY, task_logits=form.logits)
    data = batch() | {
        "num_choices": torch.tensor([1, 3]),
        "labels": torch.tensor([0, 2]),
        "example_id": torch.arange(2),
    }
    distiller = Distiller(Objective((task, hard)), TOKEN_MAP, classifier=student, task_logits=form.logits)
    loss = loss_of(distiller, teacher_of_choices, data)

    def scores(model: nn.Module, ids: Tensor, start: int, stop: int) -> Tensor:
        rows = slice(start, stop)
        inputs = {"input_ids": ids[None, rows], "attention_mask": data["attention_mask"][None, rows]}
        logits: Tensor = model(**inputs).logits[0]
        return logits

    mapped, expected = torch.from_numpy(TOKEN_MAP)[data["input_ids"]], torch.zeros(())
    for (start, stop), label in (((0, 1), 0), ((1, 4), 2)):
        ours, theirs = scores(student, mapped, start, stop), scores(source, data["input_ids"], start, stop).detach()
        log_ours, target = (ours / 3).log_softmax(-1), (theirs / 3).softmax(-1)
        expected = expected + 9 * (target * (target.log() - log_ours)).sum() / 2 - ours.log_softmax(-1)[label] / 2
    torch.testing.assert_close(loss, expected, check_dtype=False)
    actual, wanted = gradients(distiller, loss), gradients(distiller, expected)
    for name, gradient in actual.items():
        # The teacher's task logits are float32, as in every run.
        torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-5)
    assert any(gradient.any() for gradient in actual.values())


def test_the_words_of_every_choice_are_distilled() -> None:
    flat = batch()
    choices = flat | {"num_choices": torch.tensor([1, 3]), "labels": flat["labels"][:2], "example_id": torch.arange(2)}
    distiller = Distiller(Objective((WORDS, MASKED)), TOKEN_MAP, language_model=students()["language_model"])
    language_model = OnlineTeacher(model_of(BertForMaskedLM, V, 2, seed=0), None, VOCABULARY)
    torch.testing.assert_close(loss_of(distiller, language_model, choices), loss_of(distiller, language_model, flat))
