"""One's own data: a file of texts and labels in, a student out."""

import csv
import json
import logging
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from glmd.cli import main
from glmd.pipeline.run import run
from glmd.planning.plan import make_plan
from glmd.tasks.tasks import Task
from glmd.tasks.told import facts_of
from glmd.vocabulary.tokenizer import load_tokenizer


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
    assert run(config)["rows"] == results["rows"]  # a finished run is the same one
    folder, output = str(tmp_path / "run/tasks/own/seed-0/task_soft_labels/student"), tmp_path / "answers.csv"
    assert main(["predict", folder, "--file", str(reviews), "--output", str(output)]) == 0
    assert f"{folder}: is asked as its task own, which reads Body text and Title" in caplog.text


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
    assert 'reviews.csv the labels "contradiction", "entailment"; give rows with the classes\' names as labels' in said


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


# A student that is used without naming its task again


@pytest.fixture(scope="module")
def own(tiny, finished, tmp_path_factory):
    """The finished run's student with the card that a task of columns leaves."""
    folder = finished.copy(tmp_path_factory.mktemp("own") / "run") / "tasks/RTE/seed-0/task_soft_labels/student"
    task = Task(
        "own",
        ("Body text", "Title"),
        "{Body text}",
        ("accuracy",),
        256,
        labels=("entailment", "not_entailment"),
        text_pair="{Title}",
        label_field="answer",
    )
    card = (folder / "README.md").read_text()
    assert "- task: RTE\n" in card
    told = "".join(f"- {key}: {value}\n" for key, value in facts_of(task).items())
    (folder / "README.md").write_text(card.replace("- task: RTE\n", told))
    return folder


def test_answers_stand_beside_the_rows_of_a_new_file(own, reviews, tmp_path, capsys):
    new = tmp_path / "new.csv"
    rows = [row[:3] for row in csv.reader(reviews.open(), delimiter=";")]
    rows[2][1] = 'a, "b"\nc; d'
    with new.open("w", newline="") as file:
        csv.writer(file, delimiter=";").writerows([*rows[:5], [], *rows[5:]])
    output, plain = tmp_path / "answers.csv", tmp_path / "answers.jsonl"
    assert main(["predict", str(own), "--file", str(new), "--output", str(output)]) == 0
    assert f"{output}: answers to 24 examples" in capsys.readouterr().out
    written = list(csv.reader(output.open(newline=""), delimiter=";"))
    assert [row[:-2] for row in written] == rows
    assert written[0][-2:] == ["prediction", "score"]
    assert main(["predict", str(own), "--file", str(new), "--output", str(plain)]) == 0
    answers = [json.loads(line)["label"] for line in plain.read_text().splitlines()]
    assert [row[-2] for row in written[1:]] == answers
    assert all(0.5 <= float(row[-1]) <= 1 for row in written[1:]), "the likelier of two labels"
    before = output.read_bytes()
    assert main(["predict", str(own), "--file", str(new), "--output", str(output)]) == 2
    assert output.read_bytes() == before
    tabs = tmp_path / "answers.tsv"
    columns = ("--text", "Body text", "--text-pair", "Title")  # in place of what the card tells
    assert main(["predict", str(own), *columns, "--file", str(new), "--output", str(tabs), "--max-length", "32"]) == 0
    assert list(csv.reader(tabs.open(newline=""), delimiter="\t")) == written


def test_a_score_is_the_models_probability_of_the_label(own, reviews, tmp_path):
    output = tmp_path / "answers.csv"
    assert main(["predict", str(own), "--file", str(reviews), "--output", str(output)]) == 0
    tokenizer, model = load_tokenizer(own), AutoModelForSequenceClassification.from_pretrained(own).eval()
    for row in list(csv.DictReader(output.open(newline=""), delimiter=";"))[:4]:
        inputs = tokenizer(row["Body text"], row["Title"], return_tensors="pt", truncation=True, max_length=32)
        probabilities = model(**inputs).logits[0].double().softmax(-1).tolist()
        assert float(row["score"]) == pytest.approx(max(probabilities), abs=2e-6)
        assert row["prediction"] == model.config.id2label[probabilities.index(max(probabilities))]


def test_a_model_is_scored_on_the_task_of_its_card(own, reviews, capsys):
    assert main(["evaluate", str(own), "--data", str(reviews)]) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out and "examples                      24" in out


def test_what_cannot_be_answered_is_refused(own, finished, tiny, reviews, tmp_path, capsys):
    def refused(model, *given, file=reviews, output="out.csv"):
        assert main(["predict", str(model), "--file", str(file), "--output", str(tmp_path / output), *given]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    pretrained = finished.folder / "pretraining/student"
    assert f"--task is missing, and the card of {pretrained} tells none" in refused(pretrained)
    assert "--task is missing, and the card of" in refused(tiny.teacher)
    assert "reviews.csv:1: there is no column 'premise'; known: " in refused(own, "--task", "RTE")
    assert "--text and --task are both given" in refused(own, "--task", "RTE", "--text", "Title")
    assert "--text-pair has no effect without --text" in refused(own, "--text-pair", "Title")
    assert "is for the rows of a .csv or .tsv file" in refused(own, file=tiny.superglue / "RTE/val.jsonl")
    reviews.write_text(reviews.read_text().replace("id;Title", "score;Title"))
    assert f"{reviews}:1: column 'score' is what answers are written to; rename it" in refused(own)
    twice = tmp_path / "twice.csv"
    twice.write_text("idx,Title,Body text,answer\n" + "1,a,b,entailment\n" * 2)
    assert main(["predict", str(own), "--file", str(twice)]) == 0  # each row is answered
    assert len((tmp_path / "twice.predicted.csv").read_text().splitlines()) == 3
    broken = tmp_path / "broken"
    shutil.copytree(own, broken)
    card = (broken / "README.md").read_text()
    (broken / "README.md").write_text(card.replace('- text: "{Body text}"', "- text: {Body text}"))
    assert f"{broken}: its card tells a task that cannot be read (" in refused(broken)
    assert not (tmp_path / "out.csv").exists()
