"""A sweep trains every combination of its values, shares what they have in common, and tells the best from the rest."""

import pytest

from glmd.cli import main
from glmd.config import grid_point_name
from glmd.config_file import load_config
from glmd.errors import ConfigError
from glmd.pipeline.run import run
from glmd.reporting.report import results_table

TASK = "tasks/RTE"
RATES = "sweep.task_soft_labels.learning_rate=[1e-3, 5e-2]"


def stages(folder) -> set[str]:
    return {path.parent.relative_to(folder).as_posix() for path in folder.rglob("stage.json")}


@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory):
    """(folder, results) of a run with two learning rates for the second pass."""
    folder = tmp_path_factory.mktemp("sweep") / "run"
    return folder, run(tiny.config(folder, RATES))


@pytest.mark.slow
def test_grid_points_share_all_that_they_have_in_common(swept, finished):
    folder, results = swept
    shared = {stage for stage in stages(finished.folder) if not stage.endswith(("task_soft_labels", "hard_labels"))}
    grid_points = [f"{TASK}/task_soft_labels.learning_rate={rate}/seed-0" for rate in ("0.001", "0.05")]
    assert stages(folder) == shared | {
        f"{grid_point}/{stage}" for grid_point in grid_points for stage in ("task_soft_labels", "hard_labels")
    }
    rows = [(row["stage"], row.get("grid_point")) for row in results["rows"]]
    assert len(rows) == len(stages(folder)) - 1, "a row for every stage but the vocabulary's, none twice"
    assert ("task_soft_labels", {"task_soft_labels.learning_rate": 0.05}) in rows and ("task_lm", None) in rows


def test_a_grid_point_is_the_run_with_its_settings(swept, finished):
    """The tiny run's own learning rate is one of the two."""
    for stage in ("task_soft_labels", "hard_labels"):
        path = f"{stage}/student/model.safetensors"
        grid_point, other = (
            (swept[0] / TASK / f"task_soft_labels.learning_rate={rate}/seed-0" / path).read_bytes()
            for rate in ("0.001", "0.05")
        )
        assert grid_point == (finished.folder / TASK / "seed-0" / path).read_bytes() != other


@pytest.mark.slow
def test_a_further_value_trains_its_grid_points_alone(swept, tiny, trusting, tmp_path, monkeypatch):
    import shutil

    from glmd.training.trainer import Trainer

    folder, trained = shutil.copytree(swept[0], tmp_path / "run"), []
    real = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self, *rest: trained.append(self.stage) or real(self, *rest))
    results = run(tiny.config(folder, "sweep.task_soft_labels.learning_rate=[1e-3, 5e-2, 1e-2]"))
    assert trained == [
        f"{TASK}/task_soft_labels.learning_rate=0.01/seed-0/{each}" for each in ("task_soft_labels", "hard_labels")
    ]
    assert sum("grid_point" in row for row in results["rows"]) == 6


def scored(system: str, grid_point: dict, accuracy: float, **more) -> dict:
    return {
        "system": system, "task": "RTE", "stage": "task_soft_labels", "seed": more.pop("seed", 0), "split": "val",
        "selection": "last", "casting": "head", "metrics": {"accuracy": accuracy}, "agreement": 0.5,
        "grid_point": grid_point,
        "constant": {"accuracy": 0.5},
    } | more  # fmt: skip


MANY = ("adam_beta1", "adam_beta2", "warmup_ratio", "min_lr_ratio", "learning_rate", "weight_decay", "max_grad_norm",
        "adam_epsilon")  # fmt: skip
LOW, HIGH = {"task_soft_labels.learning_rate": 1e-5}, {"task_soft_labels.learning_rate": 1e-4}
PARAMETERS = {"teacher": {"total": 1, "vocabulary": 1, "body": 0}}


def line_of(text: str, first: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {first} "))
    return [grid_point.strip() for grid_point in line.strip("|").split("|")][1:]


def test_the_table_has_the_best_mean_of_a_system_and_every_grid_point_below():
    rows = [
        scored("student", LOW, 0.9), scored("student", LOW, 0.5, seed=1),  # 0.7, with the best seed of all
        scored("student", HIGH, 0.75), scored("student", HIGH, 0.75, seed=1),
        scored("hard labels", LOW, 0.6), scored("hard labels", HIGH, 0.4),
    ]  # fmt: skip
    text = results_table({"rows": rows, "parameters": PARAMETERS})
    assert line_of(text, "student (distilled)") == ["0.750 ± 0.000"]
    assert line_of(text, "control: same student, hard labels only") == ["0.600"]
    assert "the best of 2 grid points, chosen on val by score; below all, it with a *" in text
    assert line_of(text, "student: task_soft_labels.learning_rate=1e-05")[0].startswith("0.700 ± 0.28")
    assert line_of(text, "student: task_soft_labels.learning_rate=0.0001")[0] == "0.750 ± 0.000 *"
    assert line_of(text, "hard labels: task_soft_labels.learning_rate=0.0001")[0] == "0.400"
    assert line_of(text, "hard labels: task_soft_labels.learning_rate=1e-05")[0] == "0.600 *"


def test_without_a_look_at_labels_the_best_student_is_the_one_nearest_to_the_teacher():
    nearest = {"selection": "nearest to the teacher on val inputs"}
    rows = [
        scored("student", LOW, 0.9, agreement=0.6, **nearest),
        scored("student", HIGH, 0.7, agreement=0.8, **nearest),
        scored("hard labels", LOW, 0.9), scored("hard labels", HIGH, 0.4, agreement=0.9),
    ]  # fmt: skip
    text = results_table({"rows": rows, "parameters": PARAMETERS})
    assert line_of(text, "student (distilled)") == ["0.700"]
    assert line_of(text, "control: same student, hard labels only") == ["0.900"]
    assert "by score, or by agreement with the teacher where labels are not looked at or not there" in text
    bare = [{key: value for key, value in row.items() if key != "metrics"} for row in rows[:2]]
    assert "chosen on val by agreement with the teacher;" in results_table({"rows": bare, "parameters": PARAMETERS})


def test_grid_points_are_every_combination_and_win_over_the_tasks_own_settings(tiny, tmp_path):
    axes = "{task_lm: {max_steps: [4, 5]}, task_soft_labels: {per_device_train_batch_size: [8, 16, 32]}}"
    config = tiny.config(tmp_path / "run", f"sweep={axes}", "tasks.RTE={num_train_epochs: 9, learning_rate: 0.5}")
    assert len(config.grid_points) == 6 and config.grid_points[1] == {
        "task_lm.max_steps": 4,
        "task_soft_labels.per_device_train_batch_size": 16,
    }
    words, labels = (config.stage(name, "RTE", config.grid_points[1]) for name in ("task_lm", "task_soft_labels"))
    assert (words.max_steps, words.num_train_epochs, words.learning_rate) == (4, None, 0.5)
    assert (labels.per_device_train_batch_size, labels.num_train_epochs) == (16, 9)
    assert load_config(tiny.root / "run.yaml").grid_points == [{}]


def test_a_grid_point_is_the_same_however_its_sweep_is_written(tiny, tmp_path):
    """In another order, or with 1 for 1.0: its folders are found again."""
    first = tiny.config(
        tmp_path / "run", "sweep={task_soft_labels: {num_train_epochs: [1, 2], learning_rate: [1e-3, 1]}}"
    )
    other = "sweep={task_soft_labels: {learning_rate: [0.001, 1.0], num_train_epochs: [1.0, 2.0]}}"
    assert first.grid_points == tiny.config(tmp_path / "run", other).grid_points
    assert (
        grid_point_name(first.grid_points[0])
        == "task_soft_labels.learning_rate=0.001,task_soft_labels.num_train_epochs=1.0"
    )


def test_report_says_when_the_run_has_grown_since(swept, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(swept[0], tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().err == ""
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("seeds:\n- 0", "seeds:\n- 0\n- 1"))
    assert main(["report", str(folder)]) == 0
    assert "the run has grown since (seeds: [0] -> [0, 1]); `glmd run` completes the table" in capsys.readouterr().err


def test_check_prints_the_lines_of_a_sweep(tiny, tmp_path, capsys):
    assert main(["check", str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", RATES,
                 "sweep.task_soft_labels.max_steps=[7, 9]"]) == 0  # fmt: skip
    out = capsys.readouterr().out
    lines = [line.split()[2] for line in out.splitlines() if line.startswith("RTE task_soft_labels")]
    assert lines == ["7", "9", "7", "9"] and sum(line.startswith("RTE task_lm") for line in out.splitlines()) == 1
    assert next(line for line in out.splitlines() if line.startswith("RTE task_soft_labels")).endswith(
        "learning_rate=0.001,max_steps=7"
    )
    assert (
        "sweep     4 grid points: task_soft_labels.learning_rate [0.001, 0.05], task_soft_labels.max_steps [7, 9]"
        in out
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sweep.task_teacher.learning_rate=[1, 2]", "sweep.task_teacher is no stage that can be swept; those of the m"),
        ("sweep.task_soft_labels.learning_rte=[1, 2]", "no setting that can be swept; did you mean learning_rate?"),
        (
            "sweep.task_soft_labels.max_length=[16, 32]",
            "sweep.task_soft_labels.max_length is no setting that can be swept",
        ),
        ("sweep.task_soft_labels.learning_rate=[1e-3]", "must list two or more values, got [0.001]"),
        ("sweep.task_soft_labels.learning_rate=[1e-3, 0.001]", "has a value twice"),
        ("sweep.task_soft_labels.num_train_epochs=[1, 1.0]", "has a value twice: [1, 1.0]"),
        ("sweep.task_soft_labels.weight_decay=[0, -0.0]", "has a value twice"),
        ("sweep={task_soft_labels: {}}", "sweep.task_soft_labels names no setting; name one, or remove it"),
        (
            f"sweep.task_soft_labels={ {key: [0.1, 0.2] for key in MANY} }",
            "sweep: a grid point's folder would have a name of",
        ),
        ("sweep.task_soft_labels.learning_rate=1e-3", "sweep.task_soft_labels.learning_rate must be a list, got 0.001"),
        (
            "sweep.task_soft_labels.learning_rate=[1e-3, -1]",
            "sweep.task_soft_labels.learning_rate must be in (0, 10], got -1",
        ),
        (
            "sweep.task_soft_labels.learning_rate=[1e-3, fast]",
            "sweep.task_soft_labels.learning_rate must be a number, got 'fast'",
        ),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_by_key_and_value(tiny, tmp_path, override, says):
    with pytest.raises(ConfigError) as refused:
        tiny.config(tmp_path / "run", override)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_sweep_without_effect_is_refused(tiny, tmp_path, capsys):
    with pytest.raises(ConfigError, match="sweep has no effect without tasks; remove it"):
        tiny.config(tmp_path / "run", RATES, "tasks={}")
    arguments = ["check", str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", "data.corpus=[]", "method=kd"]
    assert main([*arguments, "sweep.task_lm.learning_rate=[1e-3, 1e-2]"]) == 2
    assert "sweep.task_lm has no effect: method kd has no such stage; remove it" in capsys.readouterr().err
