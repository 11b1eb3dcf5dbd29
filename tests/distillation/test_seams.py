"""Methods are added from outside: a loss on layers and an intervention, each by one function and a YAML.

Neither touches a module of glmd: what they need is asked for by tables.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from test_trainer import (
    Killed,
    Rows,
    assert_identical,
    log_rows,
    settings_of,
    trainer_of,
    weights_of,
)
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from glmd.data.batches import Batch, Collate, with_positions
from glmd.data.sampling import StepPlan, step_batches
from glmd.distillation.cached_teacher import CachedTeacher
from glmd.distillation.distiller import Distiller
from glmd.distillation.interventions import INTERVENTIONS
from glmd.distillation.methods import load_method
from glmd.distillation.objective import Objective, Term
from glmd.distillation.teacher import OnlineTeacher, TeacherOutputs
from glmd.errors import ConfigError, ModelError
from glmd.losses.features import HIDDEN_LOSSES
from glmd.models.layers import LayerChoice
from glmd.vocabulary.vocabulary import Vocabulary

V = 30
Write = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps one state for the process. Flushing to disk is another file's matter, and slow."""
    monkeypatch.setattr("glmd.storage.sync_to_disk", lambda path: None)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def model_of(head: Any = BertForMaskedLM, layers: int = 2, width: int = 8, seed: int = 0, **fields: Any) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=V,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        initializer_range=0.4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    config.update(fields)
    return head(config)


def teacher_of(layers: int = 4, width: int = 12) -> OnlineTeacher:
    return OnlineTeacher(model_of(layers=layers, width=width, seed=1).double(), None, Vocabulary.identity(V))


def distiller_of(objective: Objective, model: Any = None) -> Distiller:
    return Distiller(objective, np.arange(V), language_model=(model or model_of()).double())


def batch_of(*rows: int, length: int = 0) -> Batch:
    """Some examples of `Rows`, padded, if given, to a length."""
    batch = Collate(0)([Rows()[0, row] for row in rows])
    surplus = max(0, length - batch["input_ids"].shape[1])
    fill = {"lm_labels": -100}
    padded = {
        name: nn.functional.pad(each, (0, surplus), value=fill.get(name, 0)) if each.ndim == 2 else each
        for name, each in batch.items()
    }
    return with_positions(padded)


def layers_alone(**fields: Any) -> Objective:
    return Objective((Term("hidden_states", "mse", **fields),))


# A loss of one's own on the layers


def absolute(student: Tensor, teacher: Tensor, *, power: float = 1.0) -> Tensor:
    """(N, H), (N, H) -> (N,)"""
    return (student - teacher).abs().pow(power).sum(-1)


METHOD = """
pretraining:
  - {signal: hidden_states, loss: absolute, power: 1.5, layers: [[0, 1], [1, 3]], projection: linear, weight: 2}
  - {signal: lm_logits, loss: kl_divergence, temperature: 4}
"""


def plain_loss(student: Any, projection: Tensor, teacher: Any, batch: Batch) -> Tensor:
    """The method by the models' own forwards, token by token."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ours = student(**given, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher(**given, output_hidden_states=True)
    tokens = batch["attention_mask"].nonzero().tolist()
    total = torch.zeros((), dtype=torch.float64)
    for row, place in tokens:
        for mine, other in ((0, 1), (1, 3)):
            projected = projection @ ours.hidden_states[mine + 1][row, place]
            difference = projected - theirs.hidden_states[other + 1][row, place]
            total = total + 2 * (difference.abs() ** 1.5).sum() / 2  # weight, and the mean over two pairs
        p, q = ((each.logits[row, place] / 4).log_softmax(-1) for each in (theirs, ours))
        total = total + 16 * (p.exp() * (p - q)).sum()
    return total / len(tokens)


def test_a_loss_on_layers_is_one_function_and_a_line_of_yaml(
    monkeypatch: pytest.MonkeyPatch, write: Write, tmp_path: Path
) -> None:
    """Values, gradients and weights after three steps are those of the plainest twin, the projection's among them."""
    monkeypatch.setitem(HIDDEN_LOSSES, "absolute", absolute)
    objective = load_method(str(write("mine.yaml", METHOD)))["pretraining"]
    teacher, distiller = teacher_of(), distiller_of(objective)
    distiller.learn_from(teacher)
    (projection,) = distiller.projections.values()
    assert projection.weight.shape == (12, 8) and projection.weight.dtype == torch.float64
    batch = batch_of(0, 1, 2, 3)
    loss = objective.total(objective.means(distiller(batch, teacher(batch)), objective.counts(batch)), 0.0)
    expected = plain_loss(distiller.language_model, projection.weight, teacher.language_model, batch)
    torch.testing.assert_close(loss, expected)
    names = [name for name, _ in distiller.named_parameters()]
    found = [torch.autograd.grad(each, list(distiller.parameters()), allow_unused=True) for each in (loss, expected)]
    for name, ours, theirs in zip(names, *found, strict=True):
        assert ours is not None and theirs is not None, name
        torch.testing.assert_close(ours, theirs, msg=name)
        assert ours.abs().max() > 0 or "key.bias" in name, f"{name} learns"

    settings = settings_of(max_steps=3, learning_rate=1e-2)
    ours, twin = distiller_of(objective), distiller_of(objective)
    twin.learn_from(teacher_of())
    trainer_of(tmp_path, settings).run(ours, teacher_of(), Rows(), Collate(0))  # type: ignore[arg-type]
    matrices, vectors = ([p for p in twin.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (settings.adam_beta1, settings.adam_beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=settings.adam_epsilon)
    plan, live = StepPlan(len(Rows()), 6, 1, 0, 1, seed=0), teacher_of().language_model
    batches = step_batches(Rows(), plan, Collate(0), start_step=0, stop_step=3)  # type: ignore[arg-type]
    for step, (batch,) in enumerate(batches, start=1):
        (projection,) = twin.projections.values()
        plain_loss(twin.language_model, projection.weight, live, batch).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), settings.max_grad_norm)
        warm = settings.warmup_ratio * 3
        share = step / warm if step < warm else 0.1 + 0.9 * (3 - step) / (3 - warm)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * share
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights_of(ours), weights_of(twin), rtol=1e-6, atol=1e-8)
    assert "projections.hidden_states_absolute.weight" in weights_of(ours)


def test_options_of_layers_are_checked_like_all_others(write: Write) -> None:
    base = "{signal: hidden_states, loss: mse"
    good = load_method(str(write("good.yaml", f"task_lm: [{base}, layers: all, projection: linear, tokens: masked}}]")))
    assert good["task_lm"].terms == (Term("hidden_states", "mse", tokens="masked", layers="all", projection="linear"),)
    for given, message in (
        (f"{base}, layers: central}}", "layers must be uniform, last, first, all, every"),
        (f"{base}, layers: [[0, 1, 2]]}}", "or pairs"),
        (f"{base}, layers: [[0, 1], [0, 1]]}}", "or pairs"),
        (f"{base}, layers: []}}", "or pairs"),
        (f"{base}, projection: deep}}", "projection must be one of none, linear"),
        (f"{base}, temperature: 2}}", "temperature has no effect on hidden_states mse"),
        ("{signal: attentions, loss: mse, projection: linear}", "projection has no effect on attentions mse"),
        ("{signal: lm_logits, loss: mse, layers: all}", "layers has no effect on lm_logits mse"),
        ("{signal: hidden_states, loss: cosin}", "did you mean cosine"),
    ):
        with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
            load_method(str(write("bad.yaml", f"task_lm: [{given}]")))


@pytest.mark.parametrize("signal", ["hidden_states", "attentions"])
def test_padding_and_accumulation_change_nothing_of_layers(signal: str) -> None:
    objective = Objective((Term(signal, "mse", layers=((0, 1), (1, 3))),))
    teacher, distiller = teacher_of(width=8), distiller_of(objective)
    distiller.learn_from(teacher)

    def loss(*batches: Batch) -> Tensor:
        sums = sum(distiller(each, teacher(each)) for each in batches)
        return objective.means(sums, sum(objective.counts(each) for each in batches))[0]

    whole = loss(batch_of(0, 1, 2, 3))
    assert whole > 1e-4
    torch.testing.assert_close(loss(batch_of(0, 1, 2, 3, length=14)), whole)
    torch.testing.assert_close(loss(batch_of(0, 1), batch_of(2, 3, length=11)), whole)


def test_attentions_are_those_of_the_models_own_forward_and_leave_no_trace_in_the_config(tmp_path: Path) -> None:
    objective = Objective((Term("attentions", "kl_divergence", layers=((1, 3),)),))
    teacher, distiller, batch = teacher_of(width=8), distiller_of(objective), batch_of(0, 1, 2)
    distiller.learn_from(teacher)
    total, expected = distiller(batch, teacher(batch))[0], 0.0
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    asked = []
    for model in (distiller.language_model, teacher.language_model):
        model.set_attn_implementation("eager")
        asked.append(model(**given, output_attentions=True))
    ours, theirs = asked[0].attentions[1], asked[1].attentions[3]
    for row, place in batch["attention_mask"].nonzero().tolist():
        there = batch["attention_mask"][row].bool()
        p, q = theirs[row, :, place, there], ours[row, :, place, there]
        expected += float((p * (p / q).log()).sum(-1).mean())
    assert total.item() == pytest.approx(expected, rel=1e-6)
    distiller.language_model.save_pretrained(tmp_path)
    assert "eager" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("head", [BertForMaskedLM, BertForSequenceClassification])
def test_where_only_layers_are_compared_every_weight_has_a_gradient(head: Any) -> None:
    """Else a data-parallel rank would wait for it; that of the head, and of layers above those compared, is zero."""
    objective = layers_alone(layers=((0, 1),))
    model, batch = model_of(head).double(), batch_of(0, 1)
    name = "language_model" if head is BertForMaskedLM else "classifier"
    distiller, teacher = Distiller(objective, np.arange(V), **{name: model}), teacher_of(width=8)
    distiller.learn_from(teacher)
    distiller(batch, teacher(batch)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())
    top = [p.grad.abs().max() for key, p in distiller.named_parameters() if "layer.1" in key]
    below = [p.grad.abs().max() for key, p in distiller.named_parameters() if "layer.0.output" in key]
    assert not any(top) and all(below)


@pytest.mark.parametrize(
    ("term", "model", "teacher", "message"),
    [
        (Term("hidden_states", "mse"), {}, {}, "hidden_size is 8, the teacher's 12; give projection: linear"),
        (Term("hidden_states", "mse", layers="all"), {}, {"width": 8}, "2 layers and the teacher 4"),
        (Term("hidden_states", "mse", layers=((0, 4),)), {}, {"width": 8}, "the teacher's 0 to 3"),
        (Term("hidden_states", "mse", layers=((2, 3),)), {}, {"width": 8}, "student's layers count 0 to 1"),
        (Term("attentions", "mse"), {"num_attention_heads": 4}, {}, "num_attention_heads is 4, the teacher's 2"),
        (Term("values", "relation_kl", layers="embeddings"), {}, {}, "the embeddings have no values"),
        (Term("values", "relation_kl", options={"relation_heads": 3}), {}, {}, "divided into 3 relation_heads"),
        (
            Term("hidden_states", "attended_mse", projection="both", projection_size=97),
            {},
            {},
            "projection_size 97 is more than 8 times the wider model's hidden_size; give at most 96",
        ),
        (Term("hidden_states", "gram_mse", layers="middle"), {}, {"width": 8}, "layers: 2 are needed"),
        (Term("hidden_states", "gram_mse", layers="every"), {}, {"width": 8}, "gram_mse takes each layer once"),
        (Term("hidden_states", "mse", layers=LayerChoice(start=5)), {}, {"width": 8}, "none of 2 pairs of uniform is"),
    ],
)
def test_layers_that_do_not_fit_are_refused_in_one_line(term: Term, model: Any, teacher: Any, message: str) -> None:
    distiller = distiller_of(Objective((term,)), model_of(**model))
    live, batch = teacher_of(**teacher), batch_of(0, 1)

    def make_a_step() -> None:
        distiller.learn_from(live)
        distiller(batch, live(batch))

    with pytest.raises((ConfigError, ModelError)) as refused:
        make_a_step()
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_attentions_are_read_before_dropout_where_they_can_be_and_else_refused() -> None:
    objective = Objective((Term("attentions", "mse", layers=((0, 0),)),))
    dropping = {"attention_probs_dropout_prob": 0.2}
    distiller, plain = distiller_of(objective, model_of(**dropping)), distiller_of(objective)
    teacher, batch, found = teacher_of(width=8), batch_of(0, 1), []
    for each in (distiller, plain):
        each.learn_from(teacher)
        found.append(each.train()(batch, teacher(batch)))
    torch.testing.assert_close(*found)
    alone = model_of(**dropping)
    alone.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="after attention dropout"):
        distiller_of(objective, alone).learn_from(teacher)
    with pytest.raises(ModelError, match="its attention is eager, not torch's scaled_dot_product_attention"):
        distiller_of(Objective((Term("values", "relation_kl"),)), alone).learn_from(teacher)


def test_layers_of_a_teacher_that_is_not_live_are_refused() -> None:
    class Nothing:
        names, order = np.zeros(0), np.zeros(0)

    cached = CachedTeacher(Nothing(), None, Vocabulary.identity(V))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a live teacher"):
        distiller_of(layers_alone()).learn_from(cached)


def test_decoders_compare_layers_too() -> None:
    def decoder(layers: int, seed: int) -> Any:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
        return LlamaForCausalLM(LlamaConfig(vocab_size=V, num_hidden_layers=layers, **sizes)).double()

    objective = Objective((Term("hidden_states", "cosine"), Term("attentions", "kl_divergence", layers="last")))
    teacher = OnlineTeacher(decoder(4, 0), None, Vocabulary.identity(V))
    distiller, batch = Distiller(objective, np.arange(V), language_model=decoder(2, 1)), batch_of(0, 1, 2)
    distiller.learn_from(teacher)
    values = distiller(batch, teacher(batch))
    assert values.isfinite().all() and values.min() > 0
    values.sum().backward()
    assert all(p.grad is not None for p in distiller.parameters())


# An intervention of one's own


@contextmanager
def embedding_noise(
    student: Any, teacher: Any, batch: Batch, progress: float, generator: Any, *, scale: float = 0.1
) -> Iterator[None]:
    """Noise on the word embeddings that fades over the stage."""

    def disturb(module: Any, args: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator).to(output)
        return output + scale * (1 - progress) * noise

    handle = student.model.get_input_embeddings().register_forward_hook(disturb)
    try:
        yield
    finally:
        handle.remove()


NOISY = """
pretraining:
  terms: [{signal: lm_logits, loss: kl_divergence}]
  intervention: {name: embedding_noise, scale: 0.5}
"""


def train(folder: Path, objective: Objective, teacher: Any) -> dict[str, Tensor]:
    distiller = Distiller(objective, np.arange(V), language_model=model_of(hidden_dropout_prob=0.2))
    trainer_of(folder, settings_of()).run(distiller, teacher, Rows(), Collate(0))  # type: ignore[arg-type]
    return weights_of(distiller)


def test_an_intervention_is_one_function_and_resumes_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, write: Write, tmp_path: Path
) -> None:
    monkeypatch.setitem(INTERVENTIONS, "embedding_noise", embedding_noise)
    noisy = load_method(str(write("noisy.yaml", NOISY)))["pretraining"]
    assert noisy.intervention is not None and noisy.intervention.options == {"scale": 0.5}
    teacher = OnlineTeacher(model_of(seed=1, width=8), None, Vocabulary.identity(V))
    disturbed = train(tmp_path / "noisy", noisy, teacher)
    plain = train(tmp_path / "plain", replace(noisy, intervention=None), teacher)
    assert any(not torch.equal(disturbed[name], plain[name]) for name in plain), "it has an effect"
    none = replace(noisy, intervention=replace(noisy.intervention, options={"scale": 0.0}))
    assert_identical(train(tmp_path / "none", none, teacher), plain)
    calls = iter(range(8))

    def dying(batch: Batch) -> TeacherOutputs:
        if next(calls) == 7:
            raise Killed
        return teacher(batch)

    with pytest.raises(Killed):
        train(tmp_path / "killed", noisy, dying)
    assert_identical(train(tmp_path / "killed", noisy, teacher), disturbed)
    assert log_rows(tmp_path / "killed") == log_rows(tmp_path / "noisy")


def test_an_intervention_is_given_both_models_the_batch_and_the_progress_and_ends_with_the_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[Any, ...]] = []

    @contextmanager
    def watch(student: Any, teacher: Any, batch: Batch, progress: float, generator: Any) -> Iterator[None]:
        seen.append((student, teacher, batch, progress, torch.rand(1, generator=generator).item()))
        yield

    monkeypatch.setitem(INTERVENTIONS, "watch", watch)
    method = "pretraining: {terms: [{signal: lm_logits, loss: mse}], intervention: {name: watch}}"
    (tmp_path / "watch.yaml").write_text(method)
    objective = load_method(str(tmp_path / "watch.yaml"))["pretraining"]
    teacher = OnlineTeacher(model_of(seed=1), None, Vocabulary.identity(V))
    train(tmp_path / "run", objective, teacher)
    assert [each[3] for each in seen] == [step / 4 for step in range(5) for _ in range(2)]
    assert all(each[1][0].model is teacher.language_model for each in seen)
    assert len({each[4] for each in seen}) == 10, "each micro-step draws again"
    assert all("input_ids" in each[2] for each in seen)


def test_layers_are_compared_as_an_intervention_leaves_them_in_the_first_call_and_in_later_ones(
    monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    """Also where a call without it came before, as where a student is scored before its first step."""

    @contextmanager
    def louder(student: Any, teacher: Any, batch: Batch, progress: float, generator: Any) -> Iterator[None]:
        handle = student.model.bert.encoder.layer[0].register_forward_hook(lambda _, __, output: 2 * output)
        try:
            yield
        finally:
            handle.remove()

    monkeypatch.setitem(INTERVENTIONS, "louder", louder)
    method = "pretraining: {terms: [{signal: hidden_states, loss: mse}], intervention: {name: louder}}"
    objective = load_method(str(write("louder.yaml", method)))["pretraining"]
    teacher, batch, found = teacher_of(width=8), batch_of(0, 1), []
    for is_asked_before in (False, True):
        distiller = distiller_of(objective)
        distiller.learn_from(teacher)
        if is_asked_before:
            distiller.language_model(input_ids=batch["input_ids"], output_hidden_states=True)
        found += [distiller(batch, teacher(batch)) for _ in range(3)]
    assert all(torch.equal(each, found[0]) for each in found)
    twin = model_of().double()
    mask = torch.where(batch["attention_mask"][:, None, None].bool(), 0.0, -torch.inf).double()
    first = 2 * twin.bert.encoder.layer[0](twin.bert.embeddings(batch["input_ids"]), mask)
    states, theirs = (first, twin.bert.encoder.layer[1](first, mask)), teacher(batch).layers["hidden_states"]
    pairs = zip(states, (theirs[1], theirs[3]), strict=True)
    expected = sum((a - b)[batch["attention_mask"].bool()].square().mean(-1).sum() for a, b in pairs) / 2
    torch.testing.assert_close(found[0][0], expected)


def test_what_an_intervention_cannot_mean_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    terms = "terms: [{signal: lm_logits, loss: mse}]"
    for given, message in (
        (f"{{{terms}, intervention: {{name: thesus}}}}", "name 'thesus' is unknown; did you mean theseus"),
        (f"{{{terms}, intervention: noise}}", "intervention must be a mapping with a name"),
        (f"{{{terms}, intervntion: {{name: x}}}}", "pretraining.intervntion is unknown; did you mean intervention"),
        ("{terms: []}", "pretraining must be a list of terms"),
        ("{terms: [{signal: hidden_states, loss: mse}], intervention: {name: theseus}}", "in whose place theseus runs"),
        ("[{signal: lm_logits, loss: [mse]}]", r"pretraining.0..loss must be text"),
        (f"{{{terms}, intervention: {{name: [theseus]}}}}", "must be a mapping with a name"),
        ("[{signal: hidden_states, loss: token_angle_mse, window: 4}]", r"pretraining.0..window must be odd"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_method(str(write("bad.yaml", f"pretraining: {given}")))
    monkeypatch.setitem(INTERVENTIONS, "embedding_noise", embedding_noise)
    for given, message in (
        ("{name: embedding_nois}", "did you mean embedding_noise"),
        ("{name: embedding_noise, scal: 1}", "scal has no effect on embedding_noise; did you mean scale"),
        ("{name: embedding_noise, scale: much}", "scale must be a number"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_method(str(write("bad.yaml", f"pretraining: {{{terms}, intervention: {given}}}")))
