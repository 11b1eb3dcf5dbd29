"""Answers that are lists, numbers and labels of words are read from rows as they stand, or refused by place."""

import json

import datasets
import numpy as np
import pytest

from glmd.errors import ConfigError, DataError
from glmd.evaluation.scoring import answers_of
from glmd.tasks.columns import Columns, task_of_columns
from glmd.tasks.examples import read_split
from glmd.tasks.labels import label_in, listed_labels, number_of
from glmd.tasks.rows import word_places
from glmd.tasks.tasks import Task

TOPICS = Columns("text", "topics")


def read(path, columns, name="own", **options):
    task = task_of_columns(name, columns, str(path), **options)
    return task, [each.label for each in read_split(task, str(path), "train", require_labels=True)]


@pytest.mark.parametrize("sign", ["|", "; ", ", "])
def test_several_labels_are_those_between_the_sign_that_the_file_uses(tmp_path, sign):
    path = tmp_path / "rows.csv"
    rows = [["red", "blue"], [], ["blue"], ["red"]]
    path.write_text("text,topics\n" + "".join(f'a text,"{sign.join(each)}"\n' for each in rows))
    task, labels = read(path, TOPICS, problem_type="multi_label_classification")
    assert (task.labels, task.label_separator) == (("blue", "red"), sign.strip())
    assert labels == [(1, 1), (0, 0), (1, 0), (0, 1)]


def test_a_list_that_python_has_written_into_a_csv_is_one(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,topics\na,\"['red', 'blue']\"\nb,[]\nc,['blue']\nd,['red']\n")
    task, labels = read(path, TOPICS)
    assert (task.problem_type, task.labels) == ("multi_label_classification", ("blue", "red"))
    assert labels == [(1, 1), (0, 0), (1, 0), (0, 1)]
    assert listed_labels('["a", 1]', ",") == ["a", "1"] and listed_labels("[a, b]", ",") == ["[a", "b]"]


def test_class_numbers_in_lists_of_a_table_are_their_names(tmp_path):
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-X", "I-X"])),
        }
    )
    rows = [{"tokens": ["a", "b", "c"], "ner_tags": [1, 2, 0]}, {"tokens": ["d", "e"], "ner_tags": [0, 1]}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "rows.parquet"))
    task, labels = read(tmp_path / "rows.parquet", Columns("tokens", "ner_tags"))
    assert (task.labels, task.metrics) == (("B-X", "I-X", "O"), ("entity_f1", "word_accuracy"))
    assert labels == [(0, 1, 2), (2, 0)]


SHARED = {"name": "T", "fields": ("text",), "text": "{text}", "max_length": 16}
NUMBERS = Task(**SHARED, metrics=("pearson",), problem_type="regression")
WORDS = Task(**SHARED, labels=("O", "B-X"), metrics=("entity_f1",), problem_type="token_classification")
SEVERAL = Task(**SHARED, labels=("a", "b"), metrics=("subset_accuracy",), problem_type="multi_label_classification")


def test_numbers_are_read_from_numbers_and_their_texts():
    for value, number in ((-1, -1.0), ("2.50", 2.5), (" 1e-2", 0.01), (True, None), ("nan", None), (1e300, None)):
        assert number_of(value) == number
    assert label_in(NUMBERS, {"label": -1}, "f:1", require_labels=True) == -1.0
    assert label_in(NUMBERS, {"label": " "}, "f:1", require_labels=False) is None


def test_what_is_no_answer_is_refused_by_place():
    for task, row, says in (
        (NUMBERS, {"label": "near"}, "f:1: field 'label' must be a number, got \"near\""),
        (NUMBERS, {}, "f:1: field 'label' must be a number; the row has none"),
        (
            WORDS,
            {"text": ["x", "y"], "label": ["O"]},
            "'label' must list a label for each word; got 1 for 2",
        ),
        (WORDS, {"text": ["x"], "label": ["B-Y"]}, 'f:1: field \'label\' must be one of "O", "B-X"; got "B-Y"'),
        (SEVERAL, {"label": 3}, "f:1: field 'label' must be a list of labels, got 3"),
        (SEVERAL, {"label": ["c"]}, 'must be one of "a", "b"; got "c"'),
    ):
        with pytest.raises(DataError) as caught:
            label_in(task, row, "f:1", require_labels=True)
        assert says in str(caught.value)


def test_classes_that_are_called_as_the_rows_call_them_keep_the_models_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    classes = [f"LABEL_{i}" for i in range(12)]
    rows = [{"text": "a", "label": name} for name in classes * 2]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task, labels = read(path, Columns("text", "label"), classes=classes)
    assert list(task.labels) == classes and labels == [*range(12)] * 2


def test_a_model_for_words_is_refused_for_texts_and_numbers_are_pointed_at(tmp_path, caplog):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,0.5\nb,1.5\nc,0.5\nd,1.5\n")
    columns = Columns("text", "label")
    with pytest.raises(ConfigError, match=r"problem_type is token_classification, but .* lists no words in 'text'"):
        task_of_columns("own", columns, str(path), classes=["O"], problem_type="token_classification")
    task_of_columns("own", columns, str(path))
    assert "problem_type regression reads numbers" in caplog.text


# Which token is a word's


def test_a_word_is_at_the_first_token_that_stands_in_it():
    words = ["ab", "c", "def"]  # the text "ab c def"
    assert word_places(words, [(0, 0), (0, 1), (1, 2), (3, 4), (5, 8), (0, 0)]) == [1, 3, 4]
    assert word_places(words, [(0, 2), (2, 4), (4, 6), (6, 8)]) == [0, 1, 2]  # each with the space before it
    assert word_places(words, [(0, 4), (5, 8)]) == [0, None, 1]  # a token that begins two is the first one's
    assert word_places(words, [(0, 2), (5, 8)]) == [0, None, 1]  # the tokenizer drops a word
    assert word_places(words, [(0, 2), (3, 4)]) == [0, 1, None]  # truncated


def test_a_word_without_a_token_has_no_answer_and_moves_none():
    from glmd.evaluation.scoring import _at_words

    row = _at_words(np.array([0, 2]), [0.0, 1.0, 3.0, 2.0])
    assert row == [0.0, 1.0, -np.inf, -np.inf, 3.0, 2.0]
    assert answers_of(WORDS, np.array([row], dtype=np.float32)).tolist() == [[1, -1, 0]]
