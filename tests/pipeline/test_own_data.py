"""One's own data: a file of texts and labels in, a student out."""

import csv
import json
import logging
from pathlib import Path

import pytest

from glmd.cli import main
from glmd.pipeline.run import run
from glmd.planning.plan import make_plan


@pytest.fixture
def reviews(tiny, tmp_path) -> Path:
    """The rows of tiny's RTE as a file of columns, its labels spelled in two ways."""
    rows = [json.loads(line) for line in (tiny.superglue / "RTE/train.jsonl").read_text().splitlines()]
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["id", "Title", "Body text", "answer"])
        for i, row in enumerate(rows):
            answer = row["label"].upper() if i == 7 else row["label"]
            writer.writerow([i, row["hypothesis"], row["premise"], answer])
    return path


COLUMNS = ("tasks.own.text=Body text", "tasks.own.text_pair=Title", "tasks.own.label=answer")


def overrides(folder, reviews, *more):
    return ["tasks=", "data.superglue=", f"output_dir={folder / 'run'}", f"tasks.own.train={reviews}", *COLUMNS, *more]


def plan_of(tiny, folder, reviews, *more):
    return make_plan(tiny.config(folder, *overrides(folder, reviews, *more)), try_out=False)


def test_a_file_of_texts_and_labels_becomes_a_student(tiny, tmp_path, reviews, trusting, caplog):
    caplog.set_level(logging.INFO)
    config = tiny.config(tmp_path, *overrides(tmp_path, reviews, "tasks.own.val_fraction=0.25"))
    results = run(config)
    assert {row["task"] for row in results["rows"]} == {"own", None}
    assert "own: 6 of 24 rows of " in caplog.text
    student = json.loads((tmp_path / "run/tasks/own/seed-0/task_soft_labels/student/config.json").read_text())
    assert student["id2label"] == {"0": "entailment", "1": "not_entailment"}
    caplog.clear()
    assert run(config)["rows"] == results["rows"]  # a finished run is the same one


def test_rows_held_out_are_none_of_the_students(tiny, tmp_path, reviews):
    plan = plan_of(tiny, tmp_path, reviews)
    task = plan.tasks["own"]
    assert (len(task.train), len(task.val), task.has_own_inputs) == (22, 2, False)
    assert sorted(each.label for each in task.val) == [0, 1]
    assert not {each.where for each in task.train} & {each.where for each in task.val}
    task = plan_of(tiny, tmp_path, reviews, f"tasks.own.inputs={reviews}").tasks["own"]
    assert (len(task.train), len(task.val), len(task.inputs)) == (22, 2, 24)


def test_a_named_teacher_gives_the_order_of_labels_or_is_refused(tiny, finished, tmp_path, reviews, capsys):
    model = finished.copy(tmp_path / "copy") / "tasks/RTE/task_teacher/model"
    file = model / "config.json"
    values = json.loads(file.read_text())
    values["id2label"] = {"0": "not_entailment", "1": "entailment"}
    values["label2id"] = {"not_entailment": 0, "entailment": 1}
    file.write_text(json.dumps(values))
    options = (f"teacher.tasks.own={model}", "controls.hard_labels=false", f"tasks.own.inputs={reviews}")
    plan = plan_of(tiny, tmp_path, reviews, *options)
    assert plan.tasks["own"].task.labels == ("not_entailment", "entailment")
    assert (len(plan.tasks["own"].train), len(plan.tasks["own"].val), len(plan.tasks["own"].inputs)) == (0, 2, 24)
    reviews.write_text(
        reviews.read_text().lower().replace("not_entailment", "contradiction").replace("title;body", "Title;Body")
    )
    assert main(["check", str(tiny.root / "run.yaml"), *overrides(tmp_path, reviews, *options)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert 'teacher.tasks.own has the classes "not_entailment", "entailment", ' in said
    assert 'reviews.csv the labels "contradiction", "entailment"; give the file that it was trained on' in said


def test_check_says_the_line_of_a_row_that_cannot_be_read(tiny, tmp_path, reviews, capsys):
    lines = reviews.read_text().splitlines()
    for line, says in (
        ("8;title; ;entailment", ":9: field 'Body text' is blank"),
        ("8;title;body", ":9: the row has 3 fields, the header 4"),
        ("8;title;body;", ':9: field \'answer\' must be one of "entailment", "not_entailment"; the row has none'),
    ):
        reviews.write_text("\n".join([*lines[:8], line, *lines[9:]]))
        assert main(["check", str(tiny.root / "run.yaml"), *overrides(tmp_path, reviews)]) == 2
        assert f"{reviews}{says}" in capsys.readouterr().err.splitlines()[-1]


def test_no_share_of_choices_or_groups_is_held_out(tiny, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    passage = {"text": "a b", "questions": [{"question": "c", "idx": 0, "answers": []}]}
    passage["questions"][0]["answers"] = [{"text": f"d {i}", "label": i, "idx": i} for i in range(2)]
    choices = {"premise": "a b.", "choice1": "c", "choice2": "d", "question": "cause", "label": 0, "idx": 0}
    for task, row, has in (
        ("MultiRC", {"idx": 0, "passage": passage}, "groups of rows"),
        ("COPA", choices, "choices"),
    ):
        rows.write_text(json.dumps(row) + "\n")
        given = [
            "tasks=",
            f"tasks.{task}.train={rows}",
            f"tasks.{task}.val_fraction=0.5",
            f"output_dir={tmp_path / 'r'}",
        ]
        assert main(["check", str(tiny.root / "run.yaml"), *given]) == 2
        said = f"tasks.{task}.val_fraction: {task} has {has}, which it would tear apart; give val"
        assert said in capsys.readouterr().err
