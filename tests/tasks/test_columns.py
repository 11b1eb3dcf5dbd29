"""Tasks that are made of a file's columns: their labels, and the share of the rows that is held out."""

import json
import logging
from collections import Counter

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from glmd.config_file import dump_config, load_config
from glmd.errors import ConfigError, GlmdError
from glmd.evaluation.metrics import require_metrics
from glmd.planning.teacher_rules import task_of
from glmd.tasks.columns import Columns, hold_out, labels_in, require_same_labels, task_of_columns
from glmd.tasks.examples import TaskExample, read_split

COLUMNS = Columns("body", "stars")


@pytest.fixture
def csv(write):
    """`csv("5", "1")` is a file with a row for each label."""

    def csv(*labels: str, name: str = "rows.csv") -> str:
        rows = "".join(f"text {i},{label}\n" for i, label in enumerate(labels))
        return str(write(name, "body,stars\n" + rows))

    return csv


def refusal(function, *arguments, **options) -> str:
    with pytest.raises(GlmdError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def labels(source) -> dict:
    return dict(labels_in(str(source), COLUMNS, "reviews").counts)


def test_labels_are_counted_and_ordered_by_size_then_as_texts(csv):
    assert list(labels(csv("10", "9", "bad", "9", "", "-1")).items()) == [
        ("-1", 1),
        ("9", 2),
        ("10", 1),
        ("bad", 1),
    ]


def test_forms_of_one_label_are_one_and_said(csv, caplog):
    source = csv("1", "1.0", '"1"', " 1", "Good", "good", "good")
    assert labels(source) == {"1": 4, "good": 3}
    task = task_of_columns("reviews", COLUMNS, source)
    assert (
        f'{source}: column \'stars\' is read with other forms of labels: "1.0" as "1", "Good" as "good"' in caplog.text
    )
    assert [each.label for each in read_split(task, source, "train", require_labels=True)] == [0] * 4 + [1] * 3


def test_labels_of_jsonl_and_parquet_keep_their_types(write, tmp_path):
    def jsonl(*labels):
        return write("rows.jsonl", "".join(json.dumps({"body": "a", "stars": each}) + "\n" for each in labels))

    assert labels(jsonl(2, 1, None, -1, 2)) == {1: 1, 2: 2}
    assert [type(each) for each in labels(jsonl(True, False))] == [bool, bool]
    assert "are alike" in refusal(task_of_columns, "reviews", COLUMNS, str(jsonl(1, "1", 1, "1")))
    assert "must be text, a whole number, true or false; got 1.5" in refusal(labels, jsonl(1.5))
    features = Features({"body": Value("string"), "stars": ClassLabel(names=["one", "five"])})
    Dataset.from_dict({"body": ["a", "b"], "stars": [1, 0]}, features=features).to_parquet(str(tmp_path / "a.parquet"))
    assert labels(tmp_path / "a.parquet") == {"five": 1, "one": 1}
    Dataset.from_dict({"body": ["a", "b", "c"], "stars": [1.0, 0.0, None]}).to_parquet(str(tmp_path / "b.parquet"))
    assert labels(tmp_path / "b.parquet") == {0: 1, 1: 1}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "names", "numbers"])
def test_every_row_of_a_training_file_has_a_label_of_its_task(write, tmp_path, kind):
    rows = [{"body": f"text {i}", "stars": i % 3} for i in range(9)]
    path = tmp_path / f"rows.{kind if kind in ('csv', 'jsonl') else 'parquet'}"
    if kind == "csv":
        path.write_text("body,stars\n" + "".join(f"{row['body']},{row['stars']}\n" for row in rows))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        stars = ClassLabel(names=["c", "b", "a"]) if kind == "names" else Value("int64")
        Dataset.from_list(rows, features=Features({"body": Value("string"), "stars": stars})).to_parquet(str(path))
    task = task_of_columns("reviews", COLUMNS, str(path))
    require_metrics(task)
    found = [each.label for each in read_split(task, str(path), "train", require_labels=True, training=True)]
    assert found == [2 - i % 3 if kind == "names" else i % 3 for i in range(9)]


def test_more_than_two_or_unbalanced_labels_are_scored_by_f1_too(csv):
    def metrics(*labels):
        return task_of_columns("reviews", COLUMNS, csv(*labels)).metrics

    assert metrics("a", "b", "a", "b") == metrics("a", "a", "b") == ("accuracy",)
    assert metrics("a", "a", "a", "b") == metrics("a", "b", "c", "c") == ("accuracy", "macro_f1")


def test_labels_of_which_nothing_can_be_learned_are_refused(csv, caplog):
    def message(*labels, name="rows.csv"):
        return refusal(task_of_columns, "reviews", COLUMNS, csv(*labels, name=name))

    assert message("a", "a").endswith("rows.csv: column 'stars' holds the one label \"a\"; a task has two or more")
    assert message("", "").endswith("rows.csv: column 'stars' holds no label; a task has two or more")
    assert message("a", "b", "c").endswith("holds each of its 3 labels once; name the column of the answers")
    said = message(*map(str, range(1001)))
    assert "rows.csv:1002: field 'stars' has more than 1,000 labels by here, as " in said
    task_of_columns("reviews", COLUMNS, csv("a", "b", "b"))
    assert "rows.csv: column 'stars' holds in one row alone: \"a\"" in caplog.text
    columns = Columns("bdy", "stars")
    assert "rows.csv:1: there is no column 'bdy'; did you mean body?" in refusal(labels_in, csv("a"), columns, "r")
    assert "'a.b' cannot stand in a task's template" in refusal(Columns, "a.b", "stars")


def test_classes_of_a_named_model_give_order_and_spelling(csv, write):
    source = csv("1", "1", "5.0", "Good")
    order = ("good", "5", "1")
    task = task_of_columns("reviews", COLUMNS, source, classes=order)
    assert task.labels == order
    assert [each.label for each in read_split(task, source, "train", require_labels=True)] == [2, 2, 1, 0]
    unnamed = task_of_columns("reviews", COLUMNS, source, classes=("LABEL_0", "LABEL_1", "LABEL_2"))
    assert unnamed.labels == ("1", "5.0", "Good")
    assert task_of_columns("reviews", COLUMNS, None, classes=order).labels == order
    said = refusal(task_of_columns, "reviews", COLUMNS, source, classes=("bad", "good"))
    assert 'teacher.tasks.reviews has the classes "bad", "good", ' in said
    assert f'{source} the labels "1", "5.0", "Good"' in said
    numbers = write("rows.jsonl", "".join(json.dumps({"body": "a", "stars": i % 2}) + "\n" for i in range(4)))
    assert task_of_columns("reviews", COLUMNS, str(numbers), classes=("1", "0")).labels == (1, 0)


def test_labels_of_val_must_be_those_of_train(csv, caplog):
    train = csv("a", "b", "a", "c", name="train.csv")
    task = task_of_columns("reviews", COLUMNS, train)
    said = refusal(require_same_labels, task, COLUMNS, train, val := csv("a", "d", "B", name="val.csv"))
    assert f'{val} has labels "d" that {train} has not, which has "a", "b", "c"' in said
    require_same_labels(task, COLUMNS, train, csv("A", "B", name="val.csv"))
    assert f'{val} has no row labeled "c"' in caplog.text


def made(*labels: int) -> list[TaskExample]:
    return [TaskExample(i, ((f"text {i}", None),), label) for i, label in enumerate(labels)]


def test_a_share_of_each_label_is_held_out_by_number_and_seed_alone():
    examples = made(*[0] * 100, *[1] * 10, *[2] * 2, 3)
    train, val = hold_out(examples, 0.2, seed=0)
    assert Counter(each.label for each in val) == {0: 20, 1: 2, 2: 1}
    assert {each.texts for each in train} | {each.texts for each in val} == {each.texts for each in examples}
    assert len(train) + len(val) == len(examples)
    for part in (train, val):
        assert [each.example_id for each in part] == list(range(len(part)))
        assert [each.texts for each in part] == sorted(
            (each.texts for each in part), key=lambda texts: int(texts[0][0].split()[1])
        )
    assert hold_out(examples, 0.2, seed=0) == (train, val)
    assert hold_out(examples, 0.2, seed=1)[1] != val
    assert Counter(each.label for each in hold_out(made(0, 0, 1, 1), 0.9, seed=0)[1]) == {0: 1, 1: 1}


# As keys of a run

RUN = {"output_dir": "runs/reviews", "teacher": "none", "vocabulary": {"keep_ratio": 0.5}}


def config(**files):
    return load_config({**RUN, "tasks": {"reviews": files}})


def test_a_task_of_columns_without_val_has_a_share_of_train(csv):
    whole = config(train="a.csv", text="body", label="stars")
    assert whole.tasks["reviews"]["val"] == "a.csv" and whole.tasks["reviews"]["val_fraction"] == 0.1
    assert config(train="a.csv", text="body", label="stars", val="a.csv", val_fraction=0.1) == whole
    assert config(train="a.csv", val_fraction=0.5).tasks["reviews"]["val"] == "a.csv"
    assert config(train="a.csv", val="a.csv").tasks["reviews"] == {"train": "a.csv", "val": "a.csv"}
    assert "val_fraction" not in config(train="a.csv", text="body", label="stars", val="b.csv").tasks["reviews"]


def test_a_resolved_config_with_columns_is_read_back(write):
    whole = config(train="a.csv", text="body", text_pair="title", label="stars", num_train_epochs=2.0)
    assert load_config(write("config.yaml", dump_config(whole))) == whole


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"text": "body", "label": "stars"}, "train is missing: the labels are those of its rows"),
        (
            {"text": "body", "train": "a.csv", "problem_type": "regression"},
            "label is missing: the column of the answers",
        ),
        ({"label": "stars", "train": "a.csv"}, "label has no effect without text, the column to read; give it"),
        ({"text": "a", "label": "a", "train": "a.csv"}, "text, text_pair and label name a column twice: ['a', 'a']"),
        ({"text": " ", "label": "a", "train": "a.csv"}, "text is empty; give a column, or remove it"),
        ({"text": "a", "label": 5, "train": "a.csv"}, "label must be text, got 5"),
        ({"definition": "a.yaml", "text": "a", "label": "b", "train": "a"}, "definition and text are both given"),
        (
            {"text": "a", "label": "b", "train": "a", "val": "b", "val_fraction": 0.1},
            "val_fraction has no effect: val is no share of train",
        ),
        ({"val_fraction": 0.1}, "val_fraction has no effect without train, of which it is held out; give it"),
        ({"text": "a", "label": "b", "train": "a", "val_fraction": 0}, "val_fraction must be in (0, 1), got 0"),
        ({"text": "a", "lable": "b", "train": "a"}, "lable is unknown; did you mean label?"),
    ],
)
def test_columns_that_cannot_be_a_task_are_refused_by_key(files, says):
    with pytest.raises(ConfigError) as caught:
        config(**files)
    assert f"tasks.reviews.{says}" in str(caught.value)


def test_a_file_that_grows_gives_its_labels_anew(csv, caplog):
    caplog.set_level(logging.INFO)
    files = {"train": csv("a", "a", "b", "b"), "text": "body", "label": "stars"}
    run = config(**files, problem_type="single_label_classification")  # asked of no model
    assert task_of(run, "reviews").labels == ("a", "b")
    csv("a", "a", "b", "b", "c", "c")
    assert task_of(run, "reviews").labels == ("a", "b", "c")
