"""Stages that a method names itself: their order, settings and sweeps, and what is refused of them."""

from typing import Any

import pytest

from glmd.cli import main
from glmd.distillation.methods import load_method
from glmd.errors import ConfigError
from glmd.pipeline.run import run
from glmd.planning.plan import make_plan
from glmd.planning.stages import stages

METHOD = """
pretraining: [{signal: lm_logits, loss: kl_divergence}]
task_layers: [{signal: hidden_states, loss: mse}]
task_annealed: [{signal: task_logits, loss: annealed_mse}]
task_hard_labels: [{signal: task_labels, loss: hard_cross_entropy}]
"""


@pytest.fixture
def method(write: Any) -> str:
    return str(write("own.yaml", METHOD))


def test_stages_of_a_methods_own_follow_one_another_with_settings_that_are_changed(
    method: str, tiny: Any, tmp_path: Any
) -> None:
    changes = ["task_soft_labels.learning_rate=3e-4", "stages.task_layers.max_steps=7", "tasks.RTE.weight_decay=0.2"]
    plan = make_plan(tiny.config(tmp_path / "run", f"method={method}", *changes), hash_corpus=False)
    found = {stage.kind: stage for stage in stages(plan, 1) if stage.task is not None and not stage.trains_teacher}
    assert [*found] == ["task_layers", "task_annealed", "task_hard_labels", "hard_labels"]
    layers, annealed, last, control = found.values()
    assert layers.training.max_steps == 7 and layers.training.num_train_epochs is None
    assert {each.training.learning_rate for each in found.values()} == {3e-4}
    assert {each.training.weight_decay for each in found.values()} == {0.2}
    assert annealed.start == layers.path and last.start == annealed.path and control.start == layers.start
    assert [each.leaves_language_model for each in found.values()] == [True, False, False, False]
    assert layers.masking == (0.0, None) and not layers.asks_lm_logits
    assert control.training.max_steps == 7 + 2 * 3  # as many updates as the passes have together


def test_the_last_stage_leaves_the_model_of_the_task_whatever_it_is_called(
    tiny: Any, tmp_path: Any, write: Any
) -> None:
    both = "[{signal: lm_logits, loss: mse}, {signal: task_logits, loss: mse}]"
    path = write("both.yaml", f"task_a: {both}\ntask_b: {both}")
    plan = make_plan(tiny.config(tmp_path / "run", f"method={path}"), hash_corpus=False)
    found = {stage.kind: stage.leaves_language_model for stage in stages(plan, 1) if stage.task is not None}
    assert found == {"task_teacher": False, "task_a": True, "task_b": False, "hard_labels": False}


def test_a_sweep_of_a_stage_shares_the_stages_before_it(method: str, tiny: Any, tmp_path: Any) -> None:
    sweep = "sweep={task_annealed: {learning_rate: [1e-3, 2e-3]}}"
    config = tiny.config(tmp_path / "run", f"method={method}", sweep, "controls.hard_labels=false")
    plan = make_plan(config, hash_corpus=False)
    kinds = [stage.kind for stage in stages(plan, 1) if stage.task is not None and not stage.trains_teacher]
    assert kinds == ["task_layers", *(2 * ["task_annealed", "task_hard_labels"])]


@pytest.mark.slow
def test_stages_of_a_methods_own_run_and_the_last_leaves_the_student(
    method: str, tiny: Any, tmp_path: Any, trusting: None, capsys: Any
) -> None:
    results = run(tiny.config(tmp_path / "run", f"method={method}"))
    rows = {row["stage"]: row for row in results["rows"] if row["task"] == "RTE"}
    assert [*rows] == ["task_teacher", "task_layers", "task_annealed", "task_hard_labels", "hard_labels"]
    assert "lm_scores" not in rows["task_layers"] and "metrics" not in rows["task_layers"]
    assert all("metrics" in rows[name] for name in ("task_annealed", "task_hard_labels"))
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "as many updates as all its passes together" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task_soft_labls: [{signal: task_labels, loss: hard_cross_entropy}]", "did you mean task_soft_labels"),
        (
            "layers: [{signal: hidden_states, loss: mse}]",
            "one of the method's own begins with task_|own begin with task_",
        ),
        ("task_teacher: [{signal: task_labels, loss: hard_cross_entropy}]", "stage task_teacher is unknown"),
        ("task_words: [{signal: lm_logits, loss: mse}]", "it is called task_lm since 0.2"),
        ("task_a: [{signal: lm_logits, loss: mse}]\npretraining: [{signal: lm_logits, loss: mse}]", "put it first"),
    ],
)
def test_names_that_no_stage_has_are_refused(text: str, message: str, write: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        load_method(str(write("bad.yaml", text)))


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("", "stages.task_annealled.max_steps=3", "stages.task_annealled has no effect: it is no stage of method"),
        ("", "stages.task_lm.max_steps=3", "give task_lm itself"),
        ("", "stages.task_layers.max_stps=3", "stages.task_layers.max_stps is unknown; did you mean max_steps"),
        ("", "stages.task_layers.learning_rate=-1", "learning_rate must be in"),
        ("", "stages.task_layers.mlm_probability=0", None),
        ("", "stages.task_annealed.mlm_probability=0.1", "stages.task_annealed.mlm_probability has no effect"),
        ("task_a: [{signal: hidden_states, loss: mse}]", "seeds=[0]", "task_a, its last stage on a task, trains no"),
        (
            "task_a: [{signal: task_logits, loss: mse}]\ntask_lm: [{signal: lm_logits, loss: mse}]\n"
            "task_b: [{signal: task_logits, loss: mse}]",
            "seeds=[0]",
            "task_lm needs a language model, but task_a before it leaves a model of the task",
        ),
    ],
)
def test_what_stages_of_a_methods_own_cannot_have_is_refused_by_check(
    text: str, given: str, message: str | None, method: str, tiny: Any, tmp_path: Any, write: Any, capsys: Any
) -> None:
    path = str(write("other.yaml", text)) if text else method
    words = ["check", str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", f"method={path}", given]
    assert main(words) == (0 if message is None else 2)
    said = capsys.readouterr().err
    assert message is None or (message in said and len(said.strip().splitlines()) == 1)
