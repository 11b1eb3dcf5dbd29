"""Losses of a user's own file, modules by their names, layers in turn and drawn layers."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from test_seams import V, batch_of, distiller_of, model_of, teacher_of
from torch import Tensor

from glmd.config_file import differences
from glmd.distillation.distiller import Distiller
from glmd.distillation.layer_losses import turn_weights
from glmd.distillation.methods import load_method
from glmd.distillation.objective import Objective, Term
from glmd.distillation.teacher import OnlineTeacher
from glmd.errors import ConfigError, ModelError
from glmd.models.layers import LayerChoice, layer_pairs
from glmd.vocabulary.vocabulary import Vocabulary

LOSSES = """
def absolute(student, teacher, *, power: float = 1.0):
    return (student - teacher).abs().pow(power).mean(-1)

def softened(student, teacher, *, temperature: float = 1.0):
    p, q = ((each / temperature).log_softmax(-1) for each in (teacher, student))
    return temperature**2 * (p.exp() * (p - q)).sum(-1)

def one_number(student, teacher):
    return (student - teacher).square().mean()

def with_option(student, teacher, *, sharpness: float = 1.0):
    return sharpness * (student - teacher).square().mean(-1)

def later(student, teacher, *, progress: float, factor: float = 1.0):
    return progress * factor * (student - teacher).square().mean(-1)

def of_labels(student, teacher, *, labels):
    return student.gather(1, labels.clamp(min=0)[:, None])[:, 0]

def kl_divergence(student, teacher):
    return (student - teacher).square().mean(-1)

def broken(student, teacher):
    return undefined

def first_three(student, teacher):
    return (student - teacher).square().mean(-1)[:3]

def in_place(student, teacher):
    return teacher.sub_(student.detach()).square().mean(-1) + student.sum(-1)

def needs_option(student, teacher, *, power: float):
    return (student - teacher).abs().pow(power).mean(-1)

def untyped(student, teacher, *, power):
    return (student - teacher).abs().pow(power).mean(-1)

def sharp(student, teacher, *, temperature: float = 4.0):
    return softened(student, teacher, temperature=temperature)

def hard_cross_entropy(student, teacher):
    return softened(student, teacher)
"""


pytestmark = pytest.mark.usefixtures("no_added_losses")


@pytest.fixture
def own(write: Any) -> Any:
    write("mine/losses.py", LOSSES)
    write("mine/leaves.py", "raise SystemExit(7)")
    return lambda term, stage="pretraining": load_method(str(write("mine/method.yaml", f"{stage}: [{term}]")))[stage]


def sums_and_gradients(objective: Objective, teacher: Any = None) -> tuple[Tensor, list[Tensor]]:
    distiller, teacher = distiller_of(objective, model_of(layers=2, width=8)), teacher or teacher_of(width=8)
    distiller.learn_from(teacher)
    batch = batch_of(0, 1, 2)
    sums = distiller(batch, teacher(batch))
    return sums, list(torch.autograd.grad(sums.sum(), [p for p in distiller.parameters() if p.requires_grad]))


def test_a_function_of_a_file_is_the_loss_of_words_as_one_that_comes_with_glmd(own: Any) -> None:
    ours = sums_and_gradients(own("{signal: lm_logits, loss: 'losses.py:softened', temperature: 4}"))
    theirs = sums_and_gradients(Objective((Term("lm_logits", "kl_divergence", options={"temperature": 4.0}),)))
    torch.testing.assert_close(ours, theirs)


def test_a_function_of_a_file_is_the_loss_of_layers_with_its_options(own: Any) -> None:
    objective = own("{signal: hidden_states, loss: 'losses.py:absolute', power: 2}")
    assert (
        objective.terms[0].name == "hidden_states.absolute"
        and objective.terms[0].loss.startswith("absolute@")
        and [name for name, _ in objective.terms[0].source] == ["losses.py"]
    )
    torch.testing.assert_close(
        sums_and_gradients(objective), sums_and_gradients(Objective((Term("hidden_states", "mse"),)))
    )


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("{signal: hidden_states, loss: 'none.py:absolute'}", "none.py is no file"),
        ("{signal: hidden_states, loss: 'losses.py:absolut'}", "losses.py has no function absolut"),
        ("{signal: hidden_states, loss: 'losses.py:one_number'}", r"value for each of 3 rows of \(3, 5\), gave \(\)"),
        ("{signal: hidden_states, loss: 'losses.py:broken'}", "NameError: name 'undefined'"),
        ("{signal: hidden_states, loss: 'losses.py:first_three'}", r"each of 5 rows of \(5, 5\), gave \(3,\)"),
        ("{signal: hidden_states, loss: 'losses.py:in_place'}", "changes the teacher's numbers"),
        ("{signal: hidden_states, loss: 'losses.py:needs_option'}", "missing 1 required keyword-only argument"),
        ("{signal: hidden_states, loss: 'losses.py:untyped'}", "option power has neither type nor default"),
        ("{signal: hidden_states, loss: 'leaves.py:absolute'}", "SystemExit: 7"),
        (
            "{signal: lm_logits, loss: 'losses.py:with_option', factor: 2}",
            "factor has no effect on lm_logits with_option",
        ),
        ("{signal: lm_logits, loss: 'losses.py:of_labels'}", "missing 1 required keyword-only argument: 'labels'"),
        ("{signal: lm_labels, loss: 'losses.py:absolute'}", "lm_labels have one loss"),
        (
            "{signal: hidden_states, loss: 'losses.py:absolute', strength: 2}",
            "strength has no effect on hidden_states absolute;",
        ),
    ],
)
def test_a_function_that_cannot_be_a_loss_is_refused_in_one_line(own: Any, term: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        own(term)
    assert "\n" not in str(refused.value) and "pretraining[0]" in str(refused.value)


def test_losses_of_one_name_from_two_files_stand_beside_each_other_and_hide_none_of_glmds(own: Any, write: Any) -> None:
    write("mine/other.py", "def absolute(a, b):\n    return 1000 * (a - b).square().mean(-1)\n")
    terms = [f"{{signal: hidden_states, loss: '{file}.py:absolute', label: {file}}}" for file in ("losses", "other")]
    (mine, other), _ = sums_and_gradients(own(", ".join(terms)))
    torch.testing.assert_close(mine, sums_and_gradients(own(terms[0]))[0][0])
    torch.testing.assert_close(other, sums_and_gradients(own(terms[1]))[0][0])
    assert not torch.isclose(mine, other)
    labels = Objective((Term("lm_labels", "hard_cross_entropy", tokens="masked"),))
    before = sums_and_gradients(labels)
    own("{signal: lm_logits, loss: 'losses.py:hard_cross_entropy'}")
    torch.testing.assert_close(sums_and_gradients(labels), before)
    with pytest.raises(ConfigError, match="'absolute' does not fit hidden_states"):
        own("{signal: hidden_states, loss: absolute}")
    both = "{signal: modules, loss: 'losses.py:absolute', modules: [[encoder.layer.0, encoder.layer.1]]}"
    assert sums_and_gradients(own(f"{terms[0]}, {both}"))[0].min() > 0


def test_an_own_loss_of_words_keeps_its_own_temperature(own: Any) -> None:
    ours = sums_and_gradients(own("{signal: lm_logits, loss: 'losses.py:sharp'}"))
    theirs = sums_and_gradients(Objective((Term("lm_logits", "kl_divergence", options={"temperature": 4.0}),)))
    torch.testing.assert_close(ours, theirs)


def test_an_own_loss_of_words_has_options_of_any_name_and_the_progress_of_the_stage(own: Any) -> None:
    twice = sums_and_gradients(own("{signal: lm_logits, loss: 'losses.py:with_option', sharpness: 2}"))
    torch.testing.assert_close(twice[0], 2 * sums_and_gradients(Objective((Term("lm_logits", "mse"),)))[0])
    objective = own("{signal: lm_logits, loss: 'losses.py:later', factor: 8}")
    assert objective.changes
    distiller, teacher, batch = (
        distiller_of(objective, model_of(layers=2, width=8)),
        teacher_of(width=8),
        batch_of(0, 1, 2),
    )
    torch.testing.assert_close(distiller(batch, teacher(batch), 0.25), twice[0])


def test_annotations_may_be_texts(own: Any, write: Any) -> None:
    write("mine/late.py", f"from __future__ import annotations\n{LOSSES}")
    ours = sums_and_gradients(own("{signal: hidden_states, loss: 'late.py:absolute', power: 2}"))
    torch.testing.assert_close(ours, sums_and_gradients(Objective((Term("hidden_states", "mse"),))))


def test_pairs_stay_pairs_in_losses_of_all_layers() -> None:
    teacher = teacher_of(width=8)
    found = [
        sums_and_gradients(Objective((Term("hidden_states", "gram_mse", layers=pairs),)), teacher)[0]
        for pairs in (((0, 1), (1, 3)), ((0, 3), (1, 0)), ((1, 0), (0, 3)))
    ]
    assert not torch.isclose(found[0], found[1]) and torch.equal(found[1], found[2])


def test_drawn_layers_may_stand_beside_the_embeddings_and_modules_in_several_pairs() -> None:
    drawn = Objective((Term("hidden_states", "mse", layers=LayerChoice("random", embeddings=True, redraws=2)),))
    assert sums_and_gradients(drawn)[0] > 0
    pairs = (("encoder.layer.0", "encoder.layer.1"), ("encoder.layer.0", "encoder.layer.2"))
    terms = tuple(Term("modules", loss, modules=pairs) for loss in ("mse", "cosine"))
    torch.testing.assert_close(
        sums_and_gradients(Objective(terms))[0],
        sums_and_gradients(
            Objective(tuple(Term("hidden_states", loss, layers=((0, 1), (0, 2))) for loss in ("mse", "cosine")))
        )[0],
    )


def test_a_file_that_has_changed_is_read_again(own: Any, write: Any) -> None:
    term = "{signal: hidden_states, loss: 'losses.py:absolute'}"
    before, source = sums_and_gradients(own(term))[0], own(term).terms[0].source
    write("mine/losses.py", LOSSES.replace(".mean(-1)", ".sum(-1)"))
    objective = load_method(str(write("mine/method.yaml", f"pretraining: [{term}]")))["pretraining"]
    assert objective.terms[0].source != source
    torch.testing.assert_close(sums_and_gradients(objective)[0], 8 * before)


@pytest.mark.parametrize(
    ("imported", "line"),
    [
        ("helpers.py", "from helpers import scale"),
        ("helpers/__init__.py", "from helpers import scale"),
        ("helpers/inner.py", "from helpers.inner import scale"),
        ("inside/mine.py", "import sys; sys.path.insert(0, HERE + '/inside'); from mine import scale"),
    ],
)
def test_what_a_file_imports_beside_it_is_read_again_where_it_has_changed_and_is_recorded(
    imported: str, line: str, own: Any, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is in this folder: another one's of the same name, or one imported before, is another."""
    term = "{signal: hidden_states, loss: 'scaled.py:scaled'}"
    monkeypatch.setattr(sys, "path", [*sys.path])
    text = f"import numpy\nHERE = __file__.rpartition('/')[0]\n{line}\n"
    text += "def scaled(a, b):\n    return scale * (a - b).square().mean(-1)\n"
    found, foreign = [], ModuleType("helpers")
    monkeypatch.setitem(sys.modules, "helpers", foreign)
    for number in (1, 2):  # of one size, and within a second
        write("mine/scaled.py", text)
        write(f"mine/{imported}", f"scale = {number}\n")
        found.append(own(term))
    write("other/scaled.py", text)
    write(f"other/{imported}", "scale = 3\n")
    found.append(load_method(str(write("other/method.yaml", f"pretraining: [{term}]")))["pretraining"])
    values = [sums_and_gradients(each)[0] for each in found]
    torch.testing.assert_close(torch.stack(values) / values[0], torch.tensor([[1.0], [2.0], [3.0]]).double())
    records = [each.terms[0].record() for each in found]
    assert [[*each["source"]] for each in records] == [["scaled.py", imported]] * 3
    assert differences(*records[:2]) == [f"source.{imported} has changed"] and records[0]["loss"] == "scaled"
    assert sys.modules["helpers"] is foreign and "helpers.inner" not in sys.modules


def test_modules_by_their_names_are_what_layers_give() -> None:
    pairs = (("encoder.layer.0", "encoder.layer.1"), ("encoder.layer.1", "encoder.layer.3"))
    by_name = Objective((Term("modules", "mse", modules=pairs),))
    torch.testing.assert_close(
        sums_and_gradients(by_name), sums_and_gradients(Objective((Term("hidden_states", "mse"),)))
    )


def test_modules_that_cannot_be_compared_are_refused_in_one_line(write: Any) -> None:
    for given, message in (
        ("{signal: modules, loss: mse}", "modules is missing"),
        ("{signal: modules, loss: mse, modules: [a, b]}", "must be different pairs of names"),
        ("{signal: modules, loss: mse, modules: [[a, b]], layers: all}", "layers has no effect"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_method(str(write("method.yaml", f"pretraining: [{given}]")))
    wide = Objective((Term("modules", "mse", modules=(("encoder.layer.0", "encoder.layer.0.intermediate"),)),))
    with pytest.raises(ConfigError, match=r"layer.0, \(\d+, 8\), with .*.intermediate, \(\d+, 16\): .*one width"):
        sums_and_gradients(wide)
    pooled = Objective((Term("modules", "mse", modules=(("encoder", "encoder.layer.0.intermediate"),)),))
    with pytest.raises(ModelError, match="module encoder gives"):
        sums_and_gradients(pooled)


def test_layers_join_in_turn_and_what_comes_after_them_counts_last() -> None:
    term = Term("hidden_states", "mse", in_turn=True, older_weight=0.1)
    assert [turn_weights(term, 2, at) for at in (0.0, 0.34, 0.67, 1.0)] == [[1, 0], [0.1, 1], [0, 0], [0, 0]]
    objective = Objective((term, Term("lm_logits", "kl_divergence", in_turn=True)))
    distiller, teacher, batch = distiller_of(objective), teacher_of(width=8), batch_of(0, 1)
    distiller.learn_from(teacher)
    found = [distiller(batch, teacher(batch), at) for at in (0.0, 0.5, 1.0)]
    assert [(value > 0).tolist() for value in found] == [[True, False], [True, False], [False, True]]
    alone = Objective((Term("hidden_states", "mse", layers=((0, 1),)),))
    twin = distiller_of(alone)
    twin.learn_from(teacher)
    torch.testing.assert_close(found[0][0], twin(batch, teacher(batch))[0] / 2)  # of two layers the mean


def test_layers_are_averaged_or_added_and_taken_in_their_order() -> None:
    pairs = ((1, 3), (0, 1))  # as a user may write them
    found = [
        sums_and_gradients(Objective((Term("hidden_states", "mse", layers=pairs, over_layers=over),)))[0]
        for over in ("mean", "sum")
    ]
    torch.testing.assert_close(found[1], 2 * found[0])
    of_all = (Term("hidden_states", "gram_mse", layers=each) for each in (pairs, pairs[::-1]))
    ours, theirs = (sums_and_gradients(Objective((term,)))[0] for term in of_all)
    torch.testing.assert_close(ours, theirs)  # from each layer into the next, not the one that is written next


def test_drawn_layers_rise_change_with_progress_and_are_drawn_alike_again() -> None:
    pairs = [layer_pairs("random", 4, 12, f"0-{draw}") for draw in range(8)]
    assert all(each == sorted(each) and each[-1] == (3, 11) and len(each) == 4 for each in pairs)
    assert len({tuple(each) for each in pairs}) > 4
    assert pairs[3] == layer_pairs("random", 4, 12, "0-3")
    choice = LayerChoice("random", redraws=4)
    objective = Objective((Term("hidden_states", "mse", layers=choice),))
    distiller, teacher, batch = distiller_of(objective), teacher_of(layers=8, width=8), batch_of(0, 1)
    distiller.learn_from(teacher, seed=1)
    values = [float(distiller(batch, teacher(batch), at)) for at in (0.0, 0.2, 0.3, 0.6, 0.9)]
    assert values[0] == values[1] and len(set(values)) > 2


def test_first_projections_and_drawn_layers_are_functions_of_the_seed() -> None:
    drawn = Term("hidden_states", "mse", layers=LayerChoice("random", redraws=9), projection="linear")
    found = []
    for seed in (0, 0, 1):
        distiller = distiller_of(Objective((drawn,)))
        distiller.learn_from(teacher_of(layers=8), seed=seed)
        (projection,) = distiller.projections.values()
        found.append((projection.weight, [distiller.pairs[drawn.name, 0](at / 9) for at in range(9)]))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert not torch.isclose(found[0][0], found[2][0]).any() and found[0][1] != found[2][1]


def test_both_models_are_projected_layer_by_layer_to_the_size_that_is_asked() -> None:
    term = Term("hidden_states", "concatenated_mse", projection="both", projection_size=5, tokens="mean")
    teacher, distiller, batch = teacher_of(), distiller_of(Objective((term,))), batch_of(0, 1, 2)
    distiller.learn_from(teacher)
    made = dict(distiller.projections.named_parameters())
    assert {tuple(each.shape) for each in made.values()} == {(5, 8), (5, 12)} and len(made) == 4
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    wide, mask = [], batch["attention_mask"][..., None].double()
    for side, model in (("student", distiller.language_model), ("teacher", teacher.language_model)):
        hidden = model(**given, output_hidden_states=True).hidden_states
        numbers = (1, 2) if side == "student" else (2, 4)
        joined = torch.cat([(hidden[n] * mask).sum(1) / mask.sum(1) for n in numbers], dim=1)
        matrix = torch.cat([made[f"hidden_states_concatenated_mse.{side}.{i}.weight"] for i in (0, 1)], dim=1)
        wide.append(torch.nn.functional.normalize(joined @ matrix.T, dim=-1))
    expected = (wide[0] - wide[1]).square().sum()
    torch.testing.assert_close(distiller(batch, teacher(batch))[0], expected)


@pytest.mark.parametrize("signal", ["queries", "keys", "values"])
def test_attention_inputs_are_those_that_the_models_own_layers_make(signal: str) -> None:
    """And a term on them sees all heads, and the first ones alone where keys and values are shared."""
    module = {"queries": "query", "keys": "key", "values": "value"}[signal]
    teacher, batch = teacher_of(width=8), batch_of(0, 1)
    teacher.layers = {signal: [2]}
    found = teacher(batch).layers[signal][2]
    states = []
    layer = teacher.language_model.bert.encoder.layer[2].attention.self
    handle = getattr(layer, module).register_forward_hook(lambda _, __, output: states.append(output))
    teacher.language_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    torch.testing.assert_close(found.flatten(2), states[0])


def test_scores_are_logits_of_the_attention_probabilities() -> None:
    teacher, batch = teacher_of(width=8), batch_of(0, 1, 2)
    teacher.layers = {"attention_scores": [1], "attentions": [1]}
    found = teacher(batch).layers
    torch.testing.assert_close(found["attention_scores"][1].softmax(-1), found["attentions"][1])
    hidden = found["attention_scores"][1].isneginf().any(2)
    assert hidden.eq(batch["attention_mask"][:, None] == 0).all()


def test_first_and_mean_tokens_count_each_text_once() -> None:
    objective = Objective(tuple(Term("hidden_states", "mse", tokens=each, label=each) for each in ("first", "mean")))
    batch = batch_of(0, 1, 2)
    assert objective.counts(batch).tolist() == [3, 3]
    teacher, distiller = teacher_of(width=8), distiller_of(objective)
    distiller.learn_from(teacher)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = [model(**given, output_hidden_states=True).hidden_states for model in (distiller.language_model, teacher.language_model)]  # fmt: skip  # noqa: E501
    expected = []
    for pick in (lambda x, n: x[0], lambda x, n: x[:n].mean(0)):
        total = torch.zeros((), dtype=torch.float64)
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            for mine, other in ((1, 2), (2, 4)):
                a, b = pick(hidden[0][mine][row], length), pick(hidden[1][other][row], length)
                total = total + (a - b).square().mean() / 2
        expected.append(total)
    torch.testing.assert_close(distiller(batch, teacher(batch)), torch.stack(expected))


def test_theseus_runs_the_teachers_blocks_where_the_student_is_replaced_and_fades(write: Any) -> None:
    text = "pretraining: {terms: [{signal: lm_logits, loss: kl_divergence}], intervention: {name: theseus, "
    never, always = (
        load_method(str(write("t.yaml", f"{text}replacing_rate: {rate}, until: 0.5}}}}")))["pretraining"]
        for rate in (1.0, 0.0)
    )
    teacher, batch = teacher_of(width=8), batch_of(0, 1)
    student = distiller_of(Objective((Term("lm_logits", "kl_divergence"),)))
    plain = student(batch, teacher(batch))
    for objective, progress in ((never, 0.0), (always, 0.5)):
        distiller = distiller_of(objective)
        distiller.learn_from(teacher)
        torch.testing.assert_close(distiller(batch, teacher(batch), progress), plain)
    distiller = distiller_of(always)
    distiller.learn_from(teacher)
    found = distiller(batch, teacher(batch), 0.0)
    assert not torch.allclose(found, plain)
    body, theirs = distiller.language_model.bert, teacher.language_model.bert
    hidden = body.embeddings(batch["input_ids"])
    mask = torch.where(batch["attention_mask"][:, None, None].bool(), 0.0, -torch.inf).double()
    for layer in theirs.encoder.layer:
        hidden = layer(hidden, mask)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    logits = distiller.language_model.cls(hidden)
    p, q = teacher.language_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, logits
    valid = batch["attention_mask"].bool()
    p, q = (each[valid].log_softmax(-1) for each in (p, q))
    torch.testing.assert_close(found[0], (p.exp() * (p - q)).sum())
    found.sum().backward()
    gradients = [p.grad for name, p in distiller.named_parameters() if "encoder.layer" in name]
    assert all(each is not None and not each.any() for each in gradients)
    assert not any(p.requires_grad for p in teacher.language_model.parameters())


def test_theseus_on_labels_asks_nothing_of_the_teacher_but_its_layers(write: Any) -> None:
    path = write("t.yaml", "task_hard_labels: {terms: [{signal: task_labels, loss: hard_cross_entropy}], intervention: {name: theseus}}")  # fmt: skip  # noqa: E501
    objective = load_method(str(path))["task_hard_labels"]
    assert objective.teacher_needs == {"layers"} and objective.reads_layers and objective.changes
    teacher = OnlineTeacher(model_of(layers=4, width=8).double(), None, Vocabulary.identity(V))
    distiller = Distiller(objective, np.arange(V), classifier=model_of())
    distiller.learn_from(teacher)
    assert teacher(batch_of(0)).hidden_states is None
    with pytest.raises(ConfigError, match="hidden_size is 8, the teacher's 12"):
        objective.intervention.check(model_of().config, teacher_of().language_model.config)


def test_paths_of_own_losses_count_from_the_yaml(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path.parent)
    write("there/losses.py", LOSSES)
    path = write("there/method.yaml", "pretraining: [{signal: hidden_states, loss: 'losses.py:absolute'}]")
    assert load_method(str(path))["pretraining"].terms[0].name == "hidden_states.absolute"
