"""`glmd init-task`: what it says of a file, what it guesses, and the YAML that it writes."""

import csv
import json

import pytest
from datasets import Dataset

from glmd.cli import main
from glmd.commands.init_task import init_task
from glmd.errors import GlmdError
from glmd.tasks.tasks import load_task

HEADER = ["id", "title", "body", "country", "stars"]
ROWS = [[i, f"On {i}", f"A longer text about number {i}.", ("de", "fr", "nl")[i % 3], 1 + i % 2 * 4] for i in range(12)]


@pytest.fixture
def reviews(tmp_path):
    def reviews(rows=ROWS, header=HEADER, name="reviews.csv", delimiter=";"):
        path = tmp_path / name
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows([header, *rows])
        return path

    return reviews


def refusal(*arguments, **options) -> str:
    with pytest.raises(GlmdError) as caught:
        init_task(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_seen_is_said_and_the_yaml_is_a_task(reviews):
    path = reviews()
    said = init_task(path)
    assert said.splitlines() == [
        f"{path}: 12 rows, 5 columns separated by semicolons",
        "  id: 12 fields filled, 12 different",
        "  title: 12 fields filled, 12 different, texts of 4 characters in the median",
        "  body: 12 fields filled, 12 different, texts of 29 characters in the median",
        "  country: 12 fields filled, 3 different, texts of 2 characters in the median",
        "  stars: 12 fields filled, 2 different",
        "text: body, a guess; --text may name title, country instead",
        "label: stars, a guess; --label may name country instead",
        "2 labels: 1 (6), 5 (6)",
        "29 characters of text in the median",
        f"{path.with_suffix('.yaml')}: written. In a run: tasks: {{reviews: {{definition: "
        f"{path.with_suffix('.yaml')}, train: {path}, val_fraction: 0.1}}}}",
    ]
    task = load_task(path.with_suffix(".yaml"))
    assert (task.name, task.fields, task.labels, task.label_field) == ("reviews", ("body",), ("1", "5"), "stars")
    assert (task.metrics, task.text_pair, task.max_length) == (("accuracy",), None, 256)


def test_check_accepts_what_was_written(tiny, reviews, tmp_path, capsys):
    odd = [[*row[:2], f"{row[2]} #{i}\n", row[3], ("Über: #a\x07", "yes", "1e-4")[i % 3]] for i, row in enumerate(ROWS)]
    path = reviews(odd, name="My reviews (2).csv")
    said = init_task(path, text_pair="title")
    keys = said.splitlines()[-1].partition("tasks: ")[2]
    assert load_task(path.with_suffix(".yaml")).labels == ("1e-4", "yes", "Über: #a\x07")
    given = [f"tasks={keys}", "data.superglue=", f"output_dir={tmp_path / 'run'}"]
    assert main(["check", str(tiny.root / "run.yaml"), *given]) == 0
    assert "My-reviews-2" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_other_files_are_looked_at_too(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    rows = [{"sentence": f"text {i}", "label": i % 2 == 0, "more": [i]} for i in range(6)]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list(rows).to_parquet(str(path))
    assert "2 labels: False (3), True (3)" in init_task(path)
    assert load_task(tmp_path / "rows.yaml").labels == (False, True)


def test_names_that_are_given_win_and_no_file_is_replaced(reviews, capsys):
    path = reviews()
    assert main(["init-task", str(path), "--text", "title", "--text-pair", "body", "--label", "country"]) == 0
    assert "label: country\n" in capsys.readouterr().out
    task = load_task(path.with_suffix(".yaml"))
    assert (task.text, task.text_pair, task.labels) == ("{title}", "{body}", ("de", "fr", "nl"))
    before = path.with_suffix(".yaml").read_bytes()
    assert refusal(path) == f"{path.with_suffix('.yaml')}: exists already; move it away"
    assert path.with_suffix(".yaml").read_bytes() == before


def test_a_file_that_is_no_task_is_refused_and_nothing_written(reviews, tmp_path):
    path = reviews()
    assert refusal(path, label="star") == f"--label star: {path} has no such column; did you mean stars?"
    assert "rows are read from .jsonl, .csv" in refusal(tmp_path / "a.xlsx")
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "none.csv")
    assert refusal(path, label="id").startswith(f"{path}: column 'id' holds each of its 12 labels once; name ")
    numbers = reviews([[i, i] for i in range(4)], ["a", "b"])
    assert refusal(numbers) == f"{numbers}: no column looks like labels; --label names it: a, b"
    numbers = reviews([[i, i % 2] for i in range(4)], ["a", "b"])
    assert refusal(numbers) == f"{numbers}: no column looks like texts; --text names it: a, b"
    blank = reviews([*ROWS, [12, "On", " ", "de", 5]])
    assert refusal(blank).startswith(f"{blank}:14: field 'body' is blank")
    unlabeled = reviews([*ROWS, [12, "On", "A text", "de", ""]])
    assert refusal(unlabeled) == f'{unlabeled}:14: field \'stars\' must be one of "1", "5"; the row has none'
    assert not list(tmp_path.glob("*.yaml"))


def test_other_answers_are_seen_by_their_lists_or_told(tmp_path, reviews):
    rows = [{"tokens": ["Ann", "runs", str(i)], "tags": ["B-PER", "O", "O"]} for i in range(8)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "token_classification, 2 labels: B-PER (8), O (16)" in init_task(tmp_path / "words.jsonl")
    task = load_task(tmp_path / "words.yaml")
    assert (task.problem_type, task.fields, task.metrics) == (
        "token_classification",
        ("tokens",),
        ("entity_f1", "word_accuracy"),
    )
    rows = [{"text": f"a text of {i}", "topics": [["a"], ["a", "b"], []][i % 3]} for i in range(9)]
    (tmp_path / "topics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "multi_label_classification, 2 labels: a (6), b (3)" in init_task(tmp_path / "topics.jsonl")
    scored = [[f"a text of {i}", i / 7, i % 2] for i in range(8)]
    said = init_task(reviews(scored, ["text", "near", "kind"], "scores.csv"), label="near", problem_type="regression")
    assert "regression, numbers from 0 to 1" in said
    assert load_task(tmp_path / "scores.yaml").problem_type == "regression"
