"""Comparisons from end to end: what is shared, what fails, what is added, and what a kill leaves of the table."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import one_of
from safetensors.torch import load_file
from transformers import BertForMaskedLM

from glmd.cli import main
from glmd.commands.compare import join_runs
from glmd.commands.evaluate import evaluate_folder
from glmd.errors import ConfigError, RunError
from glmd.pipeline import run as runs
from glmd.pipeline.compare import compare
from glmd.pipeline.run import run
from glmd.pipeline.run_stage import run_stage
from glmd.vocabulary.vocabulary import Vocabulary

FILES = ("table.md", "table.tex", "scores.csv", "comparison.json")
WORDS = ("seeds=[0, 1]", "compare.control_methods=[hard-no-pretraining]", "compare.methods=[glmd, kd, tmkd]")


@pytest.fixture(scope="module")
def world(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A comparison of a method with another, and with one that cannot be run."""
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("compared") / "out"
    patch.setattr("glmd.pipeline.exports.check_exports", lambda folders: None)
    table = compare(tiny.root / "run.yaml", f"output_dir={folder}", *WORDS)
    patch.undo()
    return folder, table


def of(table: Any, name: str) -> Any:
    return next(row for row in table.rows if row.system.name == name)


def texts(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text(encoding="utf-8") for name in FILES}


@pytest.mark.slow
def test_a_table_has_a_row_for_each_method_control_and_failure(world):
    folder, table = world
    assert [(row.system.kind, row.system.name) for row in table.rows] == [
        ("teacher", "teacher"),
        ("constant", "best constant answer"),
        ("method", "glmd"),
        ("method", "kd"),
        ("method", "tmkd"),
        ("control", "glmd: teacher trimmed, not trained"),
        ("control", "glmd: hard labels from the same start"),
        ("control", "glmd: full vocabulary"),
        ("control", "glmd: full vocabulary, trimmed after training"),
        ("control", "hard labels, not pretrained"),
    ]
    assert "weighs several teachers" in of(table, "tmkd").system.problems[""]
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert "- No score of tmkd: method tmkd weighs several teachers" in text
    for row in json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["rows"]:
        assert "method" in row
    assert all(len(each.resamples) == 1000 for each in of(table, "kd").system.scores)
    assert set(of(table, "glmd").average.seeds) == {0, 1}


@pytest.mark.slow
def test_what_two_methods_make_from_the_same_is_made_once_and_updates_are_matched(world):
    folder, table = world
    for name in ("vocabulary/vocabulary.json", "tasks/RTE/task_teacher/model/model.safetensors", "corpus/tokens.bin"):
        places = [folder / "runs" / method / name for method in ("glmd", "kd", "hard-no-pretraining")]
        assert len({path.stat().st_ino for path in places}) == 1, name
    results = {name: json.loads((folder / f"runs/{name}/results.json").read_text()) for name in ("glmd", "kd")}
    updates = {
        name: sum(
            row["budget"]["updates"]
            for row in found["rows"]
            if row["system"] == "student" and row["task"] and row["seed"] == 0
        )
        for name, found in results.items()
    }
    assert updates == {"glmd": 6, "kd": 6}
    assert of(table, "kd").system.updates == 6 and of(table, "glmd").system.updates == 12


@pytest.mark.slow
def test_a_trimmed_teacher_is_the_teacher_with_the_students_rows(world, tiny):
    folder, table = world
    root = folder / "runs/glmd"
    whole = load_file(root / "tasks/RTE/task_teacher/model/model.safetensors")
    trimmed = load_file(root / "controls/trim_only/tasks/RTE/student/model.safetensors")
    kept = Vocabulary.load(root / "vocabulary").kept_ids
    for name, tensor in whole.items():
        assert (trimmed[name] == (tensor[kept] if "word_embeddings" in name else tensor)).all(), name
    scores = evaluate_folder(root / "controls/trim_only/tasks/RTE/student", "RTE", tiny.superglue, "val")
    assert scores["accuracy"] == of(table, "glmd: teacher trimmed, not trained").tasks["RTE"].mean
    after = root / "controls/trim_after/tasks/RTE/seed-1/student/model.safetensors"
    before = root / "controls/full_vocabulary/tasks/RTE/seed-1/task_soft_labels/student/model.safetensors"
    name = next(each for each in load_file(after) if "word_embeddings" in each)
    assert (load_file(after)[name] == load_file(before)[name][kept]).all()


@pytest.mark.slow
def test_the_same_command_trains_nothing_again_and_writes_the_same_bytes(world, tiny, trusting, monkeypatch, tmp_path):
    folder, _ = world
    copy = tmp_path / "out"
    shutil.copytree(folder, copy)
    for method in ("glmd", "kd", "hard-no-pretraining"):  # whose folder is recorded in nothing
        assert (copy / "runs" / method).is_dir()
    monkeypatch.setattr(runs, "run_stage", lambda *_: pytest.fail("a stage was run again"))
    compare(tiny.root / "run.yaml", f"output_dir={copy}", *WORDS)
    assert texts(copy) == texts(folder)


@pytest.mark.slow
@pytest.mark.parametrize("stop", one_of([14, 3]))
def test_a_comparison_that_is_stopped_anywhere_ends_in_the_same_table(
    world, tiny, trusting, monkeypatch, tmp_path, stop
):
    folder, _ = world
    made = []

    def stopping(context: Any, stage: Any) -> dict[str, Any]:
        made.append(stage.path)
        if len(made) == stop:
            raise KeyboardInterrupt
        return run_stage(context, stage)

    words = [f"output_dir={tmp_path / 'out'}", *WORDS]
    with monkeypatch.context() as patch:
        patch.setattr(runs, "run_stage", stopping)
        with pytest.raises(KeyboardInterrupt):
            compare(tiny.root / "run.yaml", *words)
    compare(tiny.root / "run.yaml", *words)
    assert texts(tmp_path / "out") == texts(folder)


@pytest.mark.slow
def test_a_method_that_crashes_is_a_row_and_is_tried_again_and_methods_may_be_added(
    world, tiny, trusting, monkeypatch, tmp_path
):
    folder, table = world
    copy = tmp_path / "out"
    shutil.copytree(folder, copy)

    def breaking(context: Any, stage: Any) -> dict[str, Any]:
        if context.config.method == "pd":
            raise RuntimeError("the card\nwas lost")
        return run_stage(context, stage)

    words = [f"output_dir={copy}", *WORDS[:2], "compare.methods=[glmd, pd, kd]"]
    with monkeypatch.context() as patch:
        patch.setattr(runs, "run_stage", breaking)
        broken = compare(tiny.root / "run.yaml", *words)
    assert of(broken, "pd").system.problems == {"": "RuntimeError: the card was lost"}
    assert of(broken, "kd").metrics == of(table, "kd").metrics
    whole = compare(tiny.root / "run.yaml", *words)
    assert of(whole, "pd").average is not None and not (copy / "failures" / "pd.json").exists()


@pytest.mark.slow
def test_a_task_that_a_method_cannot_do_is_left_out_and_still_counts_for_the_vocabulary(tiny, trusting, tmp_path):
    (tmp_path / "Three.yaml").write_text(
        'name: Three\nfields: [premise]\ntext: "{premise}"\nlabels: [a, b, c]\nmetrics: [accuracy]\nmax_length: 32\n',
        encoding="utf-8",
    )
    rows = [json.loads(line) for line in (tiny.superglue / "RTE" / "train.jsonl").read_text().splitlines()]
    rows = [row | {"label": "abc"[i % 3]} for i, row in enumerate(rows)]
    (tmp_path / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "standardized.yaml").write_text(
        "task_soft_labels:\n  - {signal: task_logits, loss: standardized_kl}\n", encoding="utf-8"
    )
    task = f"definition: {tmp_path / 'Three.yaml'}, train: {tmp_path / 'three.jsonl'}, val: {tmp_path / 'three.jsonl'}"
    table = compare(
        tiny.root / "run.yaml",
        *[
            f"output_dir={tmp_path / 'out'}",
            f"compare.methods=[kd, {tmp_path / 'standardized.yaml'}]",
            "compare.control_methods=[]",
            "controls={hard_labels: false, full_vocabulary: false, trim_only: false}",
            f"tasks={{RTE: {{}}, Three: {{{task}}}}}",
        ],
    )
    row = of(table, "standardized")
    assert list(row.tasks) == ["Three"] and row.average is None
    assert list(row.system.problems) == ["RTE"] and "needs at least 3 choices" in row.system.problems["RTE"]
    places = [tmp_path / "out" / "runs" / name / "vocabulary" / "vocabulary.json" for name in ("kd", "standardized")]
    assert len({path.stat().st_ino for path in places}) == 1


@pytest.mark.slow
def test_a_folder_of_another_comparison_or_of_something_else_is_refused(world, tiny, trusting, tmp_path, capsys):
    folder, _ = world
    for words, found in (
        (["vocabulary.keep_ratio=0.7"], "holds another comparison (config.vocabulary.keep_ratio: 0.6 -> 0.7)"),
        (["compare.budget=own"], "holds another comparison (compare.budget: 'matched' -> 'own')"),
    ):
        for command in ("compare", "check"):
            assert main([command, str(tiny.root / "run.yaml"), f"output_dir={folder}", *WORDS, *words]) == 2
            assert found in capsys.readouterr().err
    assert main(["run", str(tiny.root / "run.yaml"), f"output_dir={folder}"]) == 2
    assert "holds a comparison" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="is not empty and holds no comparison"):
        compare(tiny.root / "run.yaml", f"output_dir={tmp_path}", *WORDS)
    assert main(["run", str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'new'}", *WORDS]) == 2
    assert "`glmd compare` runs it" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_made_apart_are_joined_and_their_conditions_told(world, tiny, trusting, tmp_path, capsys):
    folder, _ = world
    again = run(tiny.config(tmp_path / "again", "seeds=[0, 1]", "controls.hard_labels=false"))
    assert again["rows"][-1]["path"] == "tasks/RTE/seed-1/task_soft_labels"
    joined, notes = join_runs([folder / "runs/glmd", tmp_path / "again"])
    row = of(joined, (tmp_path / "again").as_posix())
    assert notes == []
    assert (row.difference.mean, row.difference.over_examples, row.difference.over_seeds) == (0, (0, 0), (0, 0))
    other = tiny.config(tmp_path / "other", "seeds=[0, 1]", "controls.hard_labels=false", "vocabulary.keep_ratio=0.8")
    run(other)
    assert main(["report", str(folder / "runs/glmd"), str(tmp_path / "other"), "--reference", "glmd"]) == 2
    assert "there are: teacher" in capsys.readouterr().err
    assert main(["report", str(folder / "runs/glmd"), str(tmp_path / "other")]) == 0
    assert "Conditions differ: vocabulary (" in capsys.readouterr().out
    assert main(["report", str(folder), "--format", "csv"]) == 0
    assert capsys.readouterr().out == (folder / "scores.csv").read_text(encoding="utf-8")
    answers = tmp_path / "again" / "tasks/RTE/seed-0/task_soft_labels/answers.json"
    answers.write_text(answers.read_text().replace("0.5", "0.6"))
    with pytest.raises(RunError, match=r"answers\.json has changed; delete .*, and the run makes it again"):
        join_runs([folder / "runs/glmd", tmp_path / "again"])
    assert main(["report", str(folder / "runs/glmd"), "--format", "csv"]) == 2
    assert main(["report", str(folder / "runs/glmd"), str(folder / "runs/glmd")]) == 2


@pytest.mark.slow
def test_scores_on_other_examples_are_not_joined(world, tmp_path, monkeypatch):
    folder, _ = world
    run_folder, place = tmp_path / "run", "tasks/RTE/seed-0/task_soft_labels"
    shutil.copytree(folder / "runs/kd", run_folder)
    record = json.loads((run_folder / place / "stage.json").read_text())
    answers = json.loads((run_folder / place / "answers.json").read_text()) | {"val": "of another set"}
    (run_folder / place / "answers.json").write_text(json.dumps(answers))
    digest = hashlib.sha256((run_folder / place / "answers.json").read_bytes()).hexdigest()
    record["files"]["answers.json"]["sha256"] = digest
    (run_folder / place / "stage.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"RTE: .* was scored on other examples than glmd"):
        join_runs([folder / "runs/glmd", run_folder])


@pytest.mark.full
def test_a_grid_over_teachers_has_a_row_for_each_of_them(tiny, trusting, tmp_path):
    other = shutil.copytree(tiny.teacher, tmp_path / "other")
    model = BertForMaskedLM.from_pretrained(other)
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(other)
    words = ["compare.methods=[kd]", "compare.control_methods=[]", f"compare.grid.teacher=[{tiny.teacher}, {other}]"]
    table = compare(tiny.root / "run.yaml", f"output_dir={tmp_path / 'out'}", *words)
    names = [row.system.name for row in table.rows]
    assert names[:2] == ["teacher", "teacher, teacher other"]
    assert {"kd, teacher teacher", "kd, teacher other"} <= set(names)


@pytest.mark.full
def test_two_ranks_run_one_method_after_another_and_share_what_is_the_same(tiny, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "glmd"]
    words = [f"output_dir={tmp_path / 'out'}", "compare.methods=[glmd, kd]", "compare.control_methods=[]"]
    for _ in range(2):  # the second finds all complete
        done = subprocess.run(
            [*command, "compare", tiny.root / "run.yaml", *words], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("| kd ") == 2
    places = [tmp_path / "out/runs" / name / "vocabulary/vocabulary.json" for name in ("glmd", "kd")]
    assert places[0].samefile(places[1])
