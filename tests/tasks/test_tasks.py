"""Tasks as data: what a YAML must say, and what a row must hold."""

import dataclasses
import json
from collections import Counter

import pytest
import yaml

from glmd.errors import ConfigError, DataError
from glmd.evaluation.leaderboard import SUPERGLUE
from glmd.evaluation.metrics import METRICS
from glmd.tasks.examples import TaskExample, read_split
from glmd.tasks.tasks import load_task, task_names

YES_NO = {
    "name": "Toy",
    "folder": "Toy",
    "hub_name": "toy",
    "fields": ["claim", "proof"],
    "text": "{claim}",
    "text_pair": "because {proof}",
    "labels": [False, True],
    "metrics": ["accuracy"],
    "max_length": 32,
}


def refusal(error, call, *arguments, **options) -> str:
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def make_task(tmp_path):
    def make(**changes):
        path = tmp_path / "toy.yaml"
        values = {**YES_NO, **changes}
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not ...}))
        return load_task(path)

    return make


@pytest.fixture
def write(tmp_path):
    """Write rows to a jsonl file; its path as a source."""

    def write(*rows, name="rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


# Changes that make it a task of choosing one of two texts.
PICK = {"labels": ..., "fields": ["claim", "a", "b"], "text_pair": "{choice}", "choices": ["{a}", "{b}"]}
# Or one of any number of texts that the row lists.
PICK_FROM = {"labels": ..., "text_pair": "{proof}", "choices_from": "options", "placeholder": "___"}

ROW = {"claim": "it rains", "proof": "the street is wet", "label": True}

# The YAML


@pytest.mark.parametrize("name", task_names())
def test_every_task_that_comes_with_glmd_loads_in_any_case(name):
    task = load_task(name)
    assert task == load_task(name.lower()) == load_task(name.upper())
    assert task.name == name
    assert set(task.metrics) <= METRICS.keys()


def test_all_tasks_of_superglue_its_two_diagnostics_and_glue_come_with_glmd():
    glue = {"CoLA", "SST-2", "MRPC", "QQP", "STS-B", "MNLI", "MNLI-mm", "QNLI", "GLUE-RTE", "WNLI"}
    assert set(task_names()) == SUPERGLUE.keys() | {"AXb", "AXg"} | glue


@pytest.mark.parametrize("name", ["AXb", "AXg"])
def test_the_diagnostics_are_answered_by_a_model_of_rte(name):
    assert load_task(name).labels == load_task("RTE").labels


def test_the_tasks_that_score_candidates_are_known():
    assert {name for name in task_names() if load_task(name).is_choice} == {"COPA", "ReCoRD", "WSC"}


def test_an_unknown_task_is_refused_with_the_nearest_name(tmp_path):
    assert "did you mean BoolQ?" in refusal(ConfigError, load_task, "Bool")
    assert "no such file" in refusal(ConfigError, load_task, tmp_path / "none.yaml")


def test_a_task_of_your_own_is_a_path(make_task):
    task = make_task()
    assert task.labels == (False, True)
    assert task.label_field == "label"
    assert make_task(text="{claim} {proof}", text_pair=...).text_pair is None
    assert not task.is_choice
    assert make_task(**PICK).is_choice
    assert make_task(**PICK_FROM, max_choices=3).is_choice


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metric": ["accuracy"]}, "metric is unknown; did you mean metrics?"),
        ({"labels": ...}, "labels must be two or more and differ; got none"),
        ({"text": ...}, "text is missing"),
        ({"max_length": "32"}, "max_length must be a whole number"),
        ({"max_length": 7}, "max_length must be at least 8"),
        ({"fields": "claim"}, "fields must be a list"),
        ({"labels": [0.5, 1.5]}, "labels[0] must be"),
        ({"labels": ["yes"]}, "labels must be two or more"),
        ({"labels": ["yes", "yes", "no"]}, "labels must be two or more"),
        ({"labels": [-1, 1]}, "labels: -1 is what rows say where they have no label; write other labels"),
        ({"labels": [0, -1, 1]}, "labels: -1 is what rows say where they have no label"),
        ({"labels": ["", "yes"]}, 'labels: "" is blank; write other labels'),
        ({"labels": [1, "1"]}, 'differ; got 1, "1": 1 and "1" are alike'),
        ({"labels": [0, False]}, "differ; got 0, false: 0 and false are alike"),
        ({"labels": [True, 1]}, "differ; got true, 1: true and 1 are alike"),
        ({"labels": [False, True, "True"]}, 'true and "True" are alike'),
        ({"labels": ["yes", "yes "]}, 'got "yes", "yes ": "yes" and "yes " are alike'),
        ({"labels": [None, 1]}, "labels[0] must be"),
        ({"may_be_blank": ["prof"]}, "may_be_blank: 'prof' is not in fields; did you mean proof?"),
        ({"metrics": []}, "metrics must be one or more and differ; got none"),
        ({"metrics": ["accuracy", "accuracy"]}, "metrics must be one or more and differ; got accuracy, accuracy"),
        ({"text": "{clam}"}, "did you mean claim?"),
        ({"text": "{}"}, "not in fields"),
        ({"text": "{claim.__class__}"}, "not in fields"),
        ({"text": "{claim[0]}"}, "not in fields"),
        ({"text": "{claim!r}"}, "'{claim!r}': write {claim} alone, without : and !"),
        ({"text": "{claim:>9}"}, "'{claim:>9}': write {claim} alone, without : and !"),
        ({"text": "{claim"}, "is no template"),
        ({"text_pair": "{claim}"}, "'proof' stands in no template"),
        ({"name": "../up"}, "name must be letters"),
        ({"folder": "a/b"}, "folder must be letters"),
        ({"hub_name": ""}, "hub_name must be letters"),
        ({"rows": "multi"}, "rows must be one of flat, axg, copa, multirc, record, wic, wsc"),
        ({"max_choices": 4}, "max_choices has no effect without choices"),
        ({"placeholder": "___"}, "placeholder has no effect without choices"),
        ({"text_pair": "{proof} {choice}"}, "'choice', which is not in fields"),
        ({**PICK, "labels": [0, 1]}, "labels has no effect beside choices"),
        ({**PICK, "choices_from": "options"}, "choices and choices_from exclude each other"),
        ({**PICK, "choices": ["{a}"]}, "choices must be two or more"),
        ({**PICK, "choices": ["{a}", "{c}"]}, "choices[1]: '{c}' asks for 'c', which is not in fields"),
        ({**PICK, "choices": ["{a}", "{choice}"]}, "choices[1]: '{choice}' asks for 'choice'"),
        ({**PICK, "choices": ["{a}", "{a}"]}, "'b' stands in no template"),
        ({**PICK, "max_choices": 2}, "max_choices has no effect on choices that are templates"),
        ({**PICK, "text_pair": "so"}, "must stand once in exactly one of text and text_pair"),
        ({**PICK, "text": "{claim} {choice}"}, "must stand once in exactly one of text and text_pair"),
        ({**PICK, "placeholder": "___"}, "must stand once in no template: placeholder is given"),
        ({**PICK, "fields": ["claim", "a", "b", "choice"]}, "'choice' has a meaning of its own in templates"),
        ({"fields": ["claim", "choice"]}, "'choice' has a meaning of its own in templates; rename the field"),
        ({"fields": ["claim", "blank"]}, "'blank' has a meaning of its own in templates; rename the field"),
        ({**PICK_FROM, "label_field": "right"}, "label_field has no effect beside choices_from"),
        ({**PICK_FROM, "placeholder": " "}, "placeholder is blank"),
        ({**PICK_FROM, "max_choices": 1}, "max_choices must be at least 2, got 1"),
        ({"asks_first": True}, "asks_first has no effect without choices"),
        ({**PICK, "asks_first": True}, "asks_first needs choices_from, and two labels"),
        ({**PICK_FROM, "asks_first": True}, "asks_first needs choices_from, and two labels"),
        ({**PICK_FROM, "asks_first": True, "labels": [0, 0]}, "labels must be two or more and differ; got 0, 0"),
        ({**PICK_FROM, "labels": [0, 1]}, "labels has no effect beside choices"),
        (
            {"cloze": {"text": "{claim} {proof} {blank}", "verbalizers": ["a", "b"], "mean_over_tokens": True}},
            "cloze.mean_over_tokens has no effect on words of one token",
        ),
    ],
)
def test_a_yaml_that_cannot_work_is_refused_by_file_and_key(make_task, tmp_path, changes, says):
    message = refusal(ConfigError, make_task, **changes)
    assert message.startswith(f"{tmp_path / 'toy.yaml'}: ")
    assert says in message


def test_a_key_that_stands_twice_is_refused_by_file(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text("name: A\nname: B\n")
    assert refusal(ConfigError, load_task, path) == f"{path}: line 2: key 'name' stands twice; keep one"


# Rows


def test_rows_become_texts_and_class_ids_in_file_order(make_task, tmp_path):
    path = tmp_path / "Toy" / "val.jsonl"
    path.parent.mkdir()
    rows = [{**ROW, "idx": 7}, {**ROW, "claim": "{proof} {", "label": False}]
    # A blank line shifts line numbers and no example.
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(map(json.dumps, rows)).encode())
    expected = [
        TaskExample(0, (("it rains", "because the street is wet"),), 1, idx=7),
        TaskExample(1, (("{proof} {", "because the street is wet"),), 0),
    ]
    assert read_split(make_task(), str(tmp_path), "val", require_labels=True) == expected
    assert read_split(make_task(), str(path), "train", require_labels=True) == expected
    alone = make_task(text="{claim} {proof}", text_pair=...)
    assert read_split(alone, str(path), "val", require_labels=True)[0].texts == (("it rains the street is wet", None),)


def test_the_diagnostics_only_file_is_their_test_split(make_task, write, tmp_path):
    write(ROW, name="Toy/Toy.jsonl")
    read = {"source": str(tmp_path), "require_labels": True}
    assert len(read_split(make_task(), split="test", **read)) == 1
    assert "no such file" in refusal(DataError, read_split, make_task(), split="val", **read)
    write(ROW, ROW, name="Toy/test.jsonl")
    assert len(read_split(make_task(), split="test", **read)) == 2


def test_an_idx_that_stands_twice_in_a_file_is_refused_by_both_lines(make_task, write):
    first, again = {**ROW, "idx": 3}, {**ROW, "idx": 3, "claim": "it snows"}
    source = write(first, {**ROW, "idx": 4}, ROW, ROW, again)
    message = refusal(DataError, read_split, make_task(), source, "train", require_labels=True)
    assert message == f"{source}:5: field 'idx' is 3, as in {source}:1; each row needs its own"
    other = {**first, "label": False}
    assert ":2: field 'idx' is 3" in refusal(
        DataError, read_split, make_task(), write(first, other), "train", require_labels=False
    )
    source = write({**first, "idx": {"b": 1, "a": 2}}, {**again, "idx": {"a": 2, "b": 1}})
    assert ":2: field 'idx'" in refusal(DataError, read_split, make_task(), source, "train", require_labels=True)


def test_a_labeled_row_that_stands_twice_is_read_once(make_task, write, caplog):
    source = write({**ROW, "idx": 3}, {**ROW, "idx": 3}, {**ROW, "idx": 4})
    examples = read_split(make_task(), source, "val", require_labels=True)
    assert [(e.example_id, e.idx) for e in examples] == [(0, 3), (1, 4)]
    assert f"a row stands twice (1, first {source}:2)" in caplog.text


def test_a_pool_without_labels_may_hold_one_input_twice_and_no_other_under_its_idx(make_task, write):
    bare = {"claim": "a", "proof": "b", "idx": 3}
    assert len(read_split(make_task(), write(bare, bare), "train", require_labels=False)) == 2
    source = write(bare, {**bare, "proof": "c"})
    assert ":2: field 'idx'" in refusal(DataError, read_split, make_task(), source, "train", require_labels=False)


def test_a_group_is_the_values_of_its_fields(make_task, write):
    task = make_task(group_by=["proof", "place.page"])
    rows = [{**ROW, "place": {"page": 3}}, {**ROW, "claim": "it snows", "place": {"page": 4}}]
    examples = read_split(task, write(*rows), "val", require_labels=True)
    assert [example.group for example in examples] == [("the street is wet", 3), ("the street is wet", 4)]
    assert read_split(make_task(), write(*rows), "val", require_labels=True)[0].group is None
    says = "field 'place.page' is missing; Toy is scored by groups of equal place.page"
    for wrong in ({}, {"place": 3}, {"place": {"pag": 3}}):
        assert refusal(DataError, read_split, task, write({**ROW, **wrong}), "val", require_labels=True).endswith(says)
    source = write({**ROW, "place": {"page": [3]}})
    assert "must be text or a whole number, got [3]" in refusal(
        DataError, read_split, task, source, "val", require_labels=True
    )


# Candidates


def test_each_choice_gives_a_text_and_the_label_is_its_position(make_task, write):
    row = {"claim": "it rains", "a": "{b}", "b": "the street is wet", "label": 1, "idx": 5}
    texts = (("it rains", "{b}"), ("it rains", "the street is wet"))
    expected = [TaskExample(0, texts, 1, idx=5, choices=("{b}", "the street is wet"))]
    for training in (False, True):
        assert read_split(make_task(**PICK), write(row), "val", require_labels=True, training=training) == expected
    del row["label"]
    (example,) = read_split(make_task(**PICK), write(row), "test", require_labels=False)
    assert example == dataclasses.replace(expected[0], label=None)


@pytest.mark.parametrize("label", [2, -2, True, "1", 1.0])
def test_a_label_that_is_no_position_of_a_choice_is_refused(make_task, write, label):
    source = write({"claim": "it rains", "a": "x", "b": "y", "label": label})
    message = refusal(DataError, read_split, make_task(**PICK), source, "val", require_labels=False)
    assert message == f"{source}:1: field 'label' must be one of 0, 1; got {json.dumps(label)}"


LISTED = {
    "claim": "Ann met Bob and Cleo.",
    "proof": "___ came, ___ left.",
    "options": ["Cleo", "Bob", "Ann", "Bob", "Dan", "Eve"],
    "answers": ["Dan", "Ann"],
    "idx": 5,
}


def test_listed_candidates_are_all_scored_and_each_stands_at_the_placeholder(make_task, write):
    task = make_task(**PICK_FROM, max_choices=2)
    (example,) = read_split(task, write(LISTED), "val", require_labels=True)
    assert example.choices == ("Cleo", "Bob", "Ann", "Dan", "Eve")  # a candidate that stands twice is one
    assert example.texts == tuple((LISTED["claim"], f"{name} came, {name} left.") for name in example.choices)
    assert (example.label, example.answers, example.idx) == (2, ("Dan", "Ann"), 5)  # the first that is right
    bare = {**LISTED, "answers": []}
    for row in (bare, {**LISTED, "answers": None}, {key: bare[key] for key in bare if key != "answers"}):
        (other,) = read_split(task, write(row), "test", require_labels=False)
        assert other == dataclasses.replace(example, label=None, answers=())


def test_each_right_answer_is_trained_on_against_wrong_ones_alone(make_task, write):
    task = make_task(**PICK_FROM, max_choices=3)
    rows = [{**LISTED, "idx": i} for i in range(40)]
    examples = read_split(task, write(*rows), "train", require_labels=True, training=True)
    assert len(examples) == 80
    assert [example.example_id for example in examples] == list(range(80))
    assert [example.choices[0] for example in examples] == ["Dan", "Ann"] * 40
    assert {example.label for example in examples} == {0}
    drawn = Counter(name for example in examples for name in example.choices[1:])
    assert drawn.keys() == {"Cleo", "Bob", "Eve"}
    assert min(drawn.values()) > 30  # of 160 places, 53 for each on average
    assert all(len(set(example.choices)) == 3 for example in examples)
    everything = dataclasses.replace(task, max_choices=None)
    examples = read_split(everything, write(LISTED), "train", require_labels=True, training=True)
    assert [set(e.choices) for e in examples] == [{"Dan", "Cleo", "Bob", "Eve"}, {"Ann", "Cleo", "Bob", "Eve"}]


def test_what_is_drawn_to_train_on_depends_on_the_idx_alone(make_task, write):
    task = make_task(**PICK_FROM, max_choices=3)
    rows = [{**LISTED, "idx": i} for i in range(8)]

    def drawn(*rows):
        examples = read_split(task, write(*rows), "train", require_labels=True, training=True)
        return {(e.idx, e.choices[0]): e.choices for e in examples}

    assert drawn(*rows) == drawn(*rows[::-1])
    assert drawn(rows[3]).items() <= drawn(*rows).items()


def test_where_no_labels_are_needed_answers_do_not_change_what_is_trained_on(make_task, write):
    task = make_task(**PICK_FROM, max_choices=3)
    rows = [{**LISTED, "idx": i} for i in range(20)]
    bare = [{key: row[key] for key in row if key != "answers"} for row in rows]
    read = {"split": "train", "require_labels": False, "training": True}
    examples = read_split(task, write(*rows), **read)
    assert examples == read_split(task, write(*bare), **read)
    assert len(examples) == 20
    for example in examples:
        assert len(example.choices) == len(set(example.choices)) == 3
        assert (example.label, example.answers) == (None, ())
    assert {name for example in examples for name in example.choices} == set(LISTED["options"])
    source = write({**LISTED, "answers": ["Zoe"]})
    assert "'Zoe', which is none of the candidates" in refusal(DataError, read_split, task, source, **read)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"answers": []}, "field 'answers' must list the right candidates; the row has none"),
        ({"answers": ["Zoe"]}, "field 'answers' has 'Zoe', which is none of the candidates"),
        ({"answers": "Ann"}, "field 'answers' must be a list of texts, got \"Ann\""),
        ({"options": []}, "field 'options' must be a list of texts, got []"),
        ({"options": ["Ann", " "]}, 'field \'options\' must be a list of texts, got ["Ann", " "]'),
        ({"options": ["Ann", 3]}, "field 'options' must be a list of texts, got [\"Ann\", 3]"),
        ({"proof": "they came"}, "'___' stands in none of the fields claim, proof"),
    ],
)
def test_listed_candidates_that_cannot_serve_are_named_by_line_and_field(make_task, write, changes, says):
    source = write(LISTED, {**LISTED, "idx": 6, **changes})
    for training in (False, True):
        message = refusal(
            DataError, read_split, make_task(**PICK_FROM), source, "val", require_labels=True, training=training
        )
        assert message == f"{source}:2: {says}"


def test_a_row_without_its_candidates_is_refused(make_task, write):
    source = write({key: LISTED[key] for key in LISTED if key != "options"})
    message = refusal(DataError, read_split, make_task(**PICK_FROM), source, "val", require_labels=True)
    assert "field 'options' is missing" in message


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"claim": "a", "label": True}, "field 'proof' is missing; known: claim, label"),
        ({"claim": "a", "prof": "b", "label": True}, "field 'proof' is missing; did you mean prof?"),
        ({**ROW, "claim": 3}, "field 'claim' must be text, got 3"),
        ({**ROW, "claim": None}, "field 'claim' must be text, got null"),
        ({**ROW, "claim": " \n"}, "field 'claim' is blank"),
        ({**ROW, "claim": "a \ufdd0"}, "field 'claim' holds U+FDD0, which is no character; remove it"),
        ({**ROW, "label": "true"}, "field 'label' must be one of false, true; got \"true\""),
        ({**ROW, "label": 1}, "field 'label' must be one of false, true; got 1"),
        ({**ROW, "label": 1.0}, "got 1.0"),
        ({**ROW, "label": [True]}, "got [true]"),
        ({**ROW, "label": -1}, "the row has none"),
        ({**ROW, "label": None}, "the row has none"),
        ({"claim": "a", "proof": "b"}, "field 'label' must be one of false, true; the row has none"),
    ],
)
def test_a_row_that_cannot_serve_is_named_by_line_and_field(make_task, write, row, says):
    source = write(ROW, row)
    message = refusal(DataError, read_split, make_task(), source, "train", require_labels=True)
    assert message.startswith(f"{source}:2: ")
    assert message.endswith(says)


def test_a_label_is_one_of_its_own_kind(make_task, write):
    numbers = make_task(labels=[0, 1])
    assert read_split(numbers, write({**ROW, "label": 1}), "train", require_labels=True)[0].label == 1
    assert "one of 0, 1; got true" in refusal(DataError, read_split, numbers, write(ROW), "train", require_labels=True)


def test_without_need_of_labels_they_may_be_missing_and_not_wrong(make_task, write):
    bare = {"claim": "a", "proof": "b"}
    source = write(bare, {**bare, "label": None}, {**bare, "label": -1}, ROW)
    examples = read_split(make_task(), source, "test", require_labels=False)
    assert [example.label for example in examples] == [None, None, None, 1]
    source = write({**bare, "label": "maybe"})
    assert 'got "maybe"' in refusal(DataError, read_split, make_task(), source, "test", require_labels=False)


def test_a_split_without_rows_is_refused(make_task, write):
    message = refusal(DataError, read_split, make_task(), write(), "train", require_labels=True)
    assert message.endswith("rows.jsonl: the file holds no rows")


def test_a_source_that_is_not_there_is_refused_with_what_is(make_task, write, tmp_path):
    task = make_task()
    read = {"split": "train", "require_labels": True}
    write(ROW, name="Toy/val.jsonl")
    message = refusal(DataError, read_split, task, str(tmp_path), **read)
    assert message == f"{tmp_path}/Toy/train.jsonl: no such file; {tmp_path}/Toy holds val.jsonl"
    message = refusal(DataError, read_split, task, str(tmp_path / "Toy"), **read)  # one folder too deep
    assert message == f"{tmp_path}/Toy/Toy/train.jsonl: no such file; {tmp_path}/Toy holds val.jsonl"
    for name in ("none.jsonl", "none.csv", "none.tsv"):
        assert "cannot be read" in refusal(DataError, read_split, task, str(tmp_path / name), **read)
    for source in (tmp_path / "none", tmp_path / "none.txt", "superglue", "./none", " "):
        assert "no such folder, nor a file of rows" in refusal(DataError, read_split, task, str(source), **read)
    for name in ("rows.xlsx", "rows.jsonl.gz", "rows"):
        (tmp_path / name).write_text("claim,proof\n")
        message = refusal(DataError, read_split, task, str(tmp_path / name), **read)
        assert f"{name}: rows are read from .jsonl, .csv, .tsv and .parquet files, not from" in message


# The hub


def test_without_a_network_the_hub_is_refused_with_the_local_way():
    message = refusal(DataError, read_split, load_task("RTE"), "aps/super_glue", "val", require_labels=True)
    assert message.startswith("aps/super_glue: no such folder, and the hub gave no rte validation (")
    assert message.endswith("give a folder that holds RTE/{train,val,test}.jsonl")


def test_a_mistyped_folder_beside_others_is_no_owner_on_the_hub(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    read = {"split": "val", "require_labels": True}
    assert "nor a file of rows" in refusal(DataError, read_split, load_task("RTE"), "data/superglue", **read)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> str:
    """The hub's id, answered by files of the same form: parquet for each split, labels as class numbers."""
    import datasets

    classes = datasets.ClassLabel(names=["neutral", "entailment", "contradiction"])  # not our order
    texts = {"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"]}
    for split, label in {"validation": [0, 1, 2], "test": [-1, -1, -1]}.items():
        rows = datasets.Dataset.from_dict({**texts, "label": label}).cast_column("label", classes)
        rows.to_parquet(str(tmp_path / "hub" / "cb" / f"{split}.parquet"))
    files = [{"split": split, "path": f"cb/{split}.parquet"} for split in ("validation", "test")]
    front = yaml.safe_dump({"configs": [{"config_name": "cb", "data_files": files}]})
    (tmp_path / "hub" / "README.md").write_text(f"---\n{front}---\n")
    load_dataset = datasets.load_dataset

    def load(source, *arguments, **options):
        assert source == "aps/super_glue"
        return load_dataset(str(tmp_path / "hub"), *arguments, **options, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return "aps/super_glue"


def test_class_numbers_of_the_hub_become_ours_by_name(hub):
    task = load_task("CB")
    examples = read_split(task, hub, "val", require_labels=True)
    assert [task.labels[e.label] for e in examples] == ["neutral", "entailment", "contradiction"]
    assert examples[2] == TaskExample(2, (("c", "f"),), 1)
    examples = read_split(task, hub, "test", require_labels=False)
    assert [example.label for example in examples] == [None] * 3
    message = refusal(DataError, read_split, task, hub, "test", require_labels=True)
    assert message.startswith("aps/super_glue cb test row 1: field 'label'")
    assert "row has none" in message


def test_a_hub_label_the_task_has_not_is_refused_by_its_name(hub):
    two = dataclasses.replace(load_task("CB"), labels=("entailment", "contradiction"), cloze=None)
    message = refusal(DataError, read_split, two, hub, "val", require_labels=True)
    assert message.startswith("aps/super_glue cb validation row 1: ")
    assert message.endswith('got "neutral"')


def test_a_split_the_hub_has_not_is_refused(hub):
    message = refusal(DataError, read_split, load_task("CB"), hub, "train", require_labels=True)
    assert message.startswith("aps/super_glue: no such folder, and the hub gave no cb train (")


# The real files

REAL = {  # file -> examples of each class or position, in the task's order; a number where no row has a label
    "superglue/RTE/train.jsonl": [1249, 1241],
    "superglue/RTE/val.jsonl": [146, 131],
    "superglue/RTE/test.jsonl": 3000,
    "superglue/CB/train.jsonl": [115, 119, 16],
    "superglue/CB/val.jsonl": [23, 28, 5],
    "superglue/CB/test.jsonl": 250,
    "superglue/BoolQ/val.jsonl": [1237, 2033],
    "superglue/BoolQ/test.jsonl": 3245,
    "superglue/COPA/train.jsonl": [195, 205],
    "superglue/COPA/val.jsonl": [55, 45],
    "superglue/COPA/test.jsonl": 500,
    "superglue/MultiRC/train.jsonl": [15218, 12025],
    "superglue/MultiRC/val.jsonl": [2773, 2075],
    "superglue/MultiRC/test.jsonl": 9693,
    "superglue_resplit/BoolQ/resplit_train_from_official_val.jsonl": [994, 1606],
    "superglue_resplit/BoolQ/resplit_dev_from_official_val.jsonl": [243, 427],
    "fewglue/RTE/train.jsonl": [13, 19],
    "fewglue/RTE/dev32.jsonl": [21, 11],
    "fewglue/CB/train.jsonl": [19, 10, 3],
    "fewglue/CB/dev32.jsonl": [17, 13, 2],
    "fewglue/BoolQ/train.jsonl": [14, 18],
    "fewglue/BoolQ/dev32.jsonl": [13, 19],
    "fewglue/WiC/train.jsonl": [15, 17],
    "fewglue/WiC/dev32.jsonl": [16, 16],
    "fewglue/WiC/unlabeled.jsonl": 5428,
    "fewglue/COPA/train.jsonl": [14, 18],
    "fewglue/COPA/dev32.jsonl": [15, 17],
    "fewglue/COPA/unlabeled.jsonl": 400,
    "fewglue/MultiRC/train.jsonl": [86, 68],
    "fewglue/MultiRC/dev32.jsonl": [93, 74],
    "fewglue/MultiRC/unlabeled.jsonl": 27243,
    "fewglue/WSC/train.jsonl": [0, 32],
    "fewglue/WSC/dev32.jsonl": [22, 10],
    "fewglue/WSC/unlabeled.jsonl": 554,
}
REAL_RECORD = {"fewglue/ReCoRD/train.jsonl": (32, 397, 44), "fewglue/ReCoRD/dev32.jsonl": (32, 369, 46)}


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_a_real_file_holds_the_documented_examples(shared, name):
    task = load_task(name.split("/")[1])
    labeled = isinstance(REAL[name], list)
    source = str(shared / "data" / name)
    examples = read_split(task, source, "val", require_labels=labeled)
    counts = Counter(example.label for example in examples)
    assert counts == (Counter(dict(enumerate(REAL[name]))) if labeled else {None: REAL[name]})
    assert [example.example_id for example in examples] == list(range(len(examples)))
    if not labeled:
        message = refusal(DataError, read_split, task, source, "val", require_labels=True)
        assert message.startswith(f"{source}:1: ") and "field 'label'" in message


@pytest.mark.real
@pytest.mark.parametrize("name", REAL_RECORD)
def test_real_queries_have_their_entities_and_an_example_for_each_answer_in_training(shared, name):
    task, source = load_task("ReCoRD"), str(shared / "data" / name)
    examples = read_split(task, source, "val", require_labels=True)
    queries, entities, answers = REAL_RECORD[name]
    assert (len(examples), sum(len(e.choices) for e in examples)) == (queries, entities)
    assert all(e.choices[e.label] in e.answers and set(e.answers) <= set(e.choices) for e in examples)
    training = read_split(task, source, "train", require_labels=True, training=True)
    assert len(training) == answers == sum(len(e.answers) for e in examples)
    assert max(len(e.choices) for e in training) == task.max_choices
    assert {tuple(e.idx.items()) for e in training} == {tuple(e.idx.items()) for e in examples}
    for e in examples + training:
        assert len(e.texts) == len(e.choices) and "@placeholder" not in str(e.texts)


@pytest.mark.real
def test_every_real_file_of_the_built_in_tasks_is_among_those_read_here(shared):
    found = {
        str(path.relative_to(shared / "data"))
        for folder in ("superglue", "superglue_resplit", "fewglue")
        for name in task_names()
        for path in (shared / "data" / folder / name).glob("*.jsonl")
    }
    assert found == REAL.keys() | REAL_RECORD.keys()


@pytest.mark.real
def test_a_superglue_folder_is_read_by_split(shared):
    folder = str(shared / "data" / "superglue")
    assert len(read_split(load_task("cb"), folder, "val", require_labels=True)) == 56
    message = refusal(DataError, read_split, load_task("boolq"), folder, "train", require_labels=True)
    assert message.endswith("holds test.jsonl, val.jsonl")
