"""Methods that compare layers, from a YAML through all stages of a run, and what they are refused with."""

from shutil import copytree

import pytest
from safetensors.torch import load_file
from transformers import BertConfig, MobileBertConfig

from glmd.cli import main
from glmd.commands.export import export_folder
from glmd.distillation.methods import load_method
from glmd.distillation.objective import Objective, Term
from glmd.distillation.signals import SIGNALS
from glmd.errors import ConfigError, RunError
from glmd.pipeline.run import run
from glmd.planning.plan import make_plan
from glmd.planning.step_cost import Cast, counted, require_fitting_layers
from glmd.training.trainer import Trainer

METHOD = """
pretraining:
  - {signal: hidden_states, loss: mse, layers: [[0, 1]], projection: linear}
  - {signal: attentions, loss: kl_divergence, layers: last}
task_lm:
  - {signal: lm_logits, loss: kl_divergence, temperature: 15}
  - {signal: hidden_states, loss: cosine, projection: linear}
task_soft_labels:
  - {signal: hidden_states, loss: mse, projection: linear}
  - {signal: task_logits, loss: kl_divergence}
"""
pytestmark = pytest.mark.usefixtures("no_added_losses")
NARROW = "student={num_hidden_layers: 1, initialization: scratch, config: {hidden_size: 8}}"
SPREAD = "student.config.attention_probs_dropout_prob=0"


@pytest.fixture
def method(write):
    return str(write("layers.yaml", METHOD))


@pytest.mark.slow
def test_a_method_on_layers_runs_through_all_stages_and_exports_no_projection(method, tiny, trusting, tmp_path):
    config = tiny.config(tmp_path / "run", f"method={method}", NARROW, SPREAD, "tasks.RTE={}")
    results = run(config)
    assert {row["stage"] for row in results["rows"]} >= {"pretraining", "task_lm", "task_soft_labels"}
    losses = [row["training"]["losses"] for row in results["rows"] if row["stage"] in ("pretraining", "task_lm")]
    assert all(0 < value < 100 for each in losses for value in each.values())
    for folder in (tmp_path / "run").rglob("student"):
        names = load_file(folder / "model.safetensors")
        assert names and not any("projection" in name for name in names)
        assert "eager" not in (folder / "config.json").read_text()


@pytest.mark.slow
def test_a_checkpoint_holds_the_projection_and_its_export_does_not(method, tiny, trusting, tmp_path, monkeypatch):
    step = Trainer._step

    def dying(self, *arguments):
        if arguments[4] == 5:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(tmp_path / "run", f"method={method}", NARROW, SPREAD, "tasks={}"))
    stage = tmp_path / "run" / "pretraining"
    (saved,) = (load_file(path) for path in (stage / "checkpoints" / "step-000004").glob("model*.safetensors"))
    assert saved["projections.hidden_states_mse.weight"].shape == (16, 8)
    export_folder(stage, tmp_path / "exported")
    assert not any("projection" in name for name in load_file(tmp_path / "exported" / "model.safetensors"))


@pytest.mark.slow
def test_a_stage_of_a_loss_whose_import_has_changed_is_refused_by_the_files_name(write, tiny, trusting, tmp_path):
    write("scale.py", "factor = 1\n")
    write("own.py", "from scale import factor\ndef far(a, b):\n    return factor * (a - b).square().mean(-1)\n")
    path = write("m.yaml", "pretraining: [{signal: hidden_states, loss: 'own.py:far'}]")
    config = tiny.config(tmp_path / "run", f"method={path}", "tasks={}", "pretraining.max_steps=1")
    results = run(config)
    write("scale.py", "factor = 2\n")
    with pytest.raises(RunError, match=r"was made from other inputs \(terms\[0\].source.scale.py has changed\)"):
        run(config)
    write("scale.py", "factor = 1\n")
    assert run(config) == results


@pytest.mark.slow
@pytest.mark.parametrize("signal", ["hidden_states", "attentions"])
def test_the_cost_of_layers_is_counted(signal):
    """That of a stage of words and layers is more than that of words alone, for student and teacher."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config, teacher = (BertConfig(num_hidden_layers=number, **sizes) for number in (2, 8))
    words = Term("lm_logits", "mse")
    both = Objective((words, Term(signal, "mse")))
    alone, more = (
        counted(Cast(each, config, 64, teacher), examples=4, length=32) for each in (Objective((words,)), both)
    )
    assert more.student_step > alone.student_step and more.teacher_forward > alone.teacher_forward
    if signal == "hidden_states":
        terms = (Term(signal, "mse"), Term(signal, "mse", projection="linear"))
        casts = [Cast(Objective((term,)), config, 64, teacher) for term in terms]
        plain, projected = (counted(cast, examples=4, length=32).student for cast in casts)
        assert projected == plain + 4 * 16 * 16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["teacher.cache=c", "teacher.cached_stages=[pretraining]"], "compares layers, which the cache does not keep"),
        (["student={num_hidden_layers: 1, config: {num_attention_heads: 4}}"], "num_attention_heads is 4, the teac"),
    ],
)
def test_what_layers_are_not_compared_with_is_refused_by_check(given, message, method, tiny, tmp_path, capsys):
    named = [str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", f"method={method}"]
    assert main(["check", *named, *given]) == 2
    found = capsys.readouterr().err
    assert message in found and len(found.strip().splitlines()) == 1


def test_other_widths_without_a_projection_are_refused_by_check(write, tiny, tmp_path, capsys):
    path = write("narrow.yaml", "pretraining: [{signal: hidden_states, loss: mse}]")
    named = [str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", f"method={path}", "tasks={}", NARROW]
    assert main(["check", *named]) == 2
    assert "hidden_size is 8, the teacher's 16; give projection: linear" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            "signal: modules, loss: mse, modules: [[encoder.layer.0, encoder.layer.1.intermediate]]",
            "modules.mse cannot compare the student's encoder.layer.0, (15, 8), with the teacher's "
            "encoder.layer.1.intermediate, (15, 32): ",
        ),
        (
            "signal: modules, loss: mse, modules: [[encoder.layer.0, pooler]]",
            "pooler is no part of the teacher's backbone",
        ),
        (
            "signal: modules, loss: energy_mse, modules: [[encoder, embeddings]]",
            "module encoder gives BaseModelOutput",
        ),
        (
            "signal: modules, loss: 'own.py:difference', modules: [[encoder.layer.0, encoder.layer.1]]",
            "modules.difference cannot compare the student's encoder.layer.0, (15, 8), with the teacher's "
            "encoder.layer.1, (15, 16): ",
        ),
        (
            "signal: hidden_states, loss: mse, projection: both, projection_size: 1000000000",
            "projection_size 1,000,000,000 is more than 8 times the wider model's hidden_size; give at most 128",
        ),
        (
            "signal: hidden_states, loss: token_angle_mse, window: 1000000001",
            "window must be from 1 to 1,024, got 1,000,000,001",
        ),
        (
            "signal: hidden_states, loss: relation_mse, relation_heads: 0",
            "relation_heads must be from 1 to 1,024, got 0",
        ),
    ],
)
def test_what_the_layers_of_both_models_give_is_compared_in_check(term, message, write, tiny, tmp_path, capsys):
    write("own.py", "def difference(a, b):\n    return (a - b).square().mean(-1)\n")
    path = write("shapes.yaml", f"pretraining: [{{{term}}}]")
    named = [str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", f"method={path}", "tasks={}", NARROW]
    assert main(["check", *named]) == 2
    found = capsys.readouterr().err
    assert message in found and len(found.strip().splitlines()) == 1


def test_a_loss_that_looks_at_numbers_is_left_to_the_first_step_by_check(write, tiny, tmp_path):
    write("own.py", "def looking(a, b):\n    d = (a - b).square().mean(-1)\n    return d if d.max() > 0 else 2 * d\n")
    pair = "[encoder.layer.0, encoder.layer.1]"
    path = write("m.yaml", f"pretraining: [{{signal: modules, loss: 'own.py:looking', modules: [{pair}]}}]")
    make_plan(tiny.config(tmp_path / "run", f"method={path}", "tasks={}"))


def test_heads_are_as_wide_as_the_layers_have_them_and_not_as_the_config_would_have_it():
    """MobileBERT's are a part of its bottleneck, which its hidden size does not tell."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    narrow = {"embedding_size": 8, "intra_bottleneck_size": 12, "true_hidden_size": 12}
    config = MobileBertConfig(num_hidden_layers=2, **sizes, **narrow)
    for heads in (6, 8):  # of 12, and of 16
        cast = Cast(Objective((Term("queries", "relation_kl", options={"relation_heads": heads}),)), config, 64, config)
        if heads == 6:
            require_fitting_layers(cast)
        else:
            with pytest.raises(ConfigError, match="a width of 12 cannot be divided into 8 relation_heads"):
                require_fitting_layers(cast)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("{loss: bild}", "task_logits.bild of RTE: loss bild needs at least 3 choices, got 2"),
        ("{loss: standardized_kl}", "task_logits.standardized_kl of RTE"),
        (
            "{loss: decoupled_kd, alpha: 0}",
            "decoupled_kd of RTE is 0 for 2 classes, whatever the models say",
        ),
        ("{loss: kl_divergence, temperature: 1.0e-30}", "temperature must be from 0.01 to 10,000"),
    ],
)
def test_a_loss_that_says_nothing_of_a_tasks_classes_is_refused_by_check(term, message, write, tiny, tmp_path, capsys):
    path = write("two.yaml", f"task_soft_labels: [{{signal: task_logits, {term[1:]}]")
    assert main(["check", str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", f"method={path}"]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1, said


@pytest.mark.parametrize(
    ("change", "ranks", "message"),
    [
        ("pretraining.gradient_accumulation_steps=2", "1", "gradient_accumulation_steps is 2, but method"),
        ("pretraining.gradient_accumulation_steps=1", "2", "which several processes would divide; launch one"),
    ],
)
def test_a_signal_that_couples_examples_is_refused_where_a_batch_is_divided(
    change, ranks, message, write, tiny, tmp_path, capsys, monkeypatch
):
    from dataclasses import replace

    monkeypatch.setitem(SIGNALS, "hidden_states", replace(SIGNALS["hidden_states"], least_texts=2))
    monkeypatch.setenv("WORLD_SIZE", ranks)
    path = write("coupled.yaml", "pretraining: [{signal: hidden_states, loss: mse}]")
    named = [str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", f"method={path}", "tasks={}", change]
    assert main(["check", *named]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "ranks", "message"),
    [
        (
            ["method=diito", "pretraining.gradient_accumulation_steps=2"],
            "1",
            "gradient_accumulation_steps is 2, but",
        ),
        (
            ["method=minilmv2"],
            "1",
            "queries.relation_kl cannot compare the student's layer 0, (2, 8, 2, 8), with the teacher's layer 1, "
            "(2, 8, 2, 8): a width of 16 cannot be divided into 48 relation_heads",
        ),
        (
            ["method=diito", "pretraining.per_device_train_batch_size=1"],
            "1",
            "method diito compares at least 2 texts of a batch with each other in pretraining, whose "
            "per_device_train_batch_size is 1; give at least 2",
        ),
        (
            ["method=lrc-bert", "task_soft_labels.per_device_train_batch_size=1"],
            "1",
            "in RTE task_layers, whose per_device_train_batch_size is 1; give at least 2",
        ),
        (["method=lrc-bert", "data.superglue=ONE"], "1", "in RTE task_layers, whose data are 1 example; give more"),
        (["method=diito"], "2", "method diito compares the examples of a batch with each other in pretraining"),
        (["method=theseus", "torch_compile=true"], "1", "a compiled student does not see the intervention theseus of"),
        (["method=lrc-bert-perturbed"], "2", "embedding_gradient of method lrc-bert-perturbed in task_layers takes a"),
        (["method=diito", "teacher.cache=c", "teacher.cached_stages=[pretraining]"], "1", "the cache does not keep"),
        (["method=diito", "student.num_hidden_layers=3"], "1", "must have 1 to 2 layers"),
        (["method=lrc-bert-perturbed", "mixed_precision=fp16"], "1", "fp16 has no range for the gradient of the inter"),
    ],
)
def test_what_an_intervention_does_not_go_with_is_refused_by_check(
    given, ranks, message, tiny, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: "mixed_precision=fp16" in given)
    named = [str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}"]
    if "data.superglue=ONE" in given:
        copytree(tiny.superglue, tmp_path / "ONE")
        rows = (tiny.superglue / "RTE" / "train.jsonl").read_text().splitlines()
        (tmp_path / "ONE" / "RTE" / "train.jsonl").write_text(rows[0])
        given = [given[0], f"data.superglue={tmp_path / 'ONE'}"]
    assert main(["check", *named, "pretraining.gradient_accumulation_steps=1", *given]) == 2
    found = capsys.readouterr().err
    assert message in found and len(found.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diito", "lrc-bert-perturbed"])
def test_the_second_pass_of_an_intervention_is_counted(name):
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config, teacher = (BertConfig(num_hidden_layers=number, **sizes) for number in (2, 4))
    given = load_method(name)
    objective = (
        given["pretraining"]
        if name == "diito"
        else Objective(given["task_layers"].terms, given["task_layers"].intervention)
    )
    once = Objective(tuple(term for term in objective.terms if not term.intervened))
    alone, twice = (
        counted(Cast(each, config, 64, teacher, masked=0.2), examples=4, length=32) for each in (once, objective)
    )
    assert twice.student_flops > 1.5 * alone.student_flops


def test_layers_that_do_not_exist_are_refused_with_method_and_stage(tiny, tmp_path, write):
    path = write("far.yaml", "pretraining: [{signal: hidden_states, loss: mse, layers: [[5, 2]]}]")
    with pytest.raises(ConfigError, match=r"far.yaml: pretraining: hidden_states.mse: layers"):
        make_plan(tiny.config(tmp_path / "run", f"method={path}", "tasks={}"))
