"""The leaderboard's prediction files, each form written out by hand."""

import json

import numpy as np
import pytest
from datasets import Dataset
from test_superglue import OFFICIAL, hub_features, hub_rows, without_labels

from glmd.errors import DataError
from glmd.evaluation.leaderboard import require_idx, write_predictions
from glmd.tasks.examples import TaskExample, read_split
from glmd.tasks.tasks import load_task


def example(number, idx, choices=()):
    return TaskExample(number, (("text", None),) * max(1, len(choices)), None, idx=idx, choices=choices)


def written(tmp_path, name, predictions, examples):
    path = tmp_path / f"{name}.jsonl"
    write_predictions(load_task(name), predictions, examples, path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]  # no part of a file is left
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("BoolQ", ["true", "false"]),
        ("WiC", ["true", "false"]),
        ("WSC", ["True", "False"]),  # asked of a candidate, answered by yes or no
        ("CB", ["contradiction", "entailment"]),
        ("RTE", ["not_entailment", "entailment"]),
        ("AXb", ["not_entailment", "entailment"]),
        ("AXg", ["not_entailment", "entailment"]),
    ],
)
def test_a_label_is_the_word_that_the_leaderboard_knows(tmp_path, name, labels):
    rows = written(tmp_path, name, np.array([1, 0]), [example(0, 7), example(1, 3)])
    assert rows == [{"idx": 7, "label": labels[0]}, {"idx": 3, "label": labels[1]}]


def test_copas_label_is_the_position_of_the_choice(tmp_path):
    examples = [example(i, i, ("I fell.", "I ate.")) for i in range(2)]
    assert written(tmp_path, "COPA", [1, 0], examples) == [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}]


def test_records_label_is_the_entity_and_its_idx_the_query(tmp_path):
    examples = [
        example(0, {"passage": 4, "query": 40}, ("Zoë", "Oslo", "Ann")),
        example(1, {"passage": 4, "query": 41}, ("Zoë",)),
    ]
    rows = written(tmp_path, "ReCoRD", [2, 0], examples)
    assert rows == [{"idx": 40, "label": "Ann"}, {"idx": 41, "label": "Zoë"}]


def test_multircs_lines_are_paragraphs_with_questions_with_answers(tmp_path):
    places = [(2, 20, 200), (2, 20, 201), (2, 21, 202), (0, 5, 50)]
    examples = [
        example(i, dict(zip(("paragraph", "question", "answer"), place, strict=True))) for i, place in enumerate(places)
    ]
    twenty = {"idx": 20, "answers": [{"idx": 200, "label": 1}, {"idx": 201, "label": 0}]}
    twenty_one = {"idx": 21, "answers": [{"idx": 202, "label": 1}]}
    assert written(tmp_path, "MultiRC", [1, 0, 1, 0], examples) == [
        {"idx": 2, "passage": {"questions": [twenty, twenty_one]}},
        {"idx": 0, "passage": {"questions": [{"idx": 5, "answers": [{"idx": 50, "label": 0}]}]}},
    ]


@pytest.mark.parametrize(
    ("predictions", "examples", "says"),
    [
        ([0, 2], [example(0, 1), example(1, 2)], "RTE: prediction 2 for idx 2, which has 2 possible answers"),
        ([0, -1], [example(0, 1), example(1, 2)], "RTE: prediction -1 for idx 2, which has 2 possible answers"),
        ([0, 0], [example(0, 1), example(1, 1)], "RTE example 1: idx 1 stands in example 0 too"),
        ([0, 0], [example(0, 1), example(1, None)], "RTE example 1: field 'idx' is missing"),
        ([0.5, 0.1], [example(0, 1), example(1, 2)], "predictions must be one row of class ids or positions"),
        ([True, False], [example(0, 1), example(1, 2)], "predictions must be one row of class ids or positions"),
    ],
)
def test_what_the_leaderboard_would_refuse_is_not_written(tmp_path, predictions, examples, says):
    path = tmp_path / "RTE.jsonl"
    with pytest.raises(DataError) as caught:
        write_predictions(load_task("RTE"), predictions, examples, path)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "idx", "says"),
    [
        ("MultiRC", 3, "field 'idx' must have 'paragraph', got 3"),
        ("MultiRC", {"paragraph": 1, "question": 2}, "field 'idx' must have 'answer', got {"),
        ("ReCoRD", {"passage": 1}, "field 'idx' must have 'query', got {"),
    ],
)
def test_an_idx_without_the_parts_of_its_form_is_refused(task, idx, says):
    with pytest.raises(DataError) as caught:
        require_idx(load_task(task), [example(0, idx)])
    assert says in str(caught.value)


@pytest.mark.parametrize(("task", "part"), [("MultiRC", "'paragraph', 'question', 'answer'"), ("ReCoRD", "'query'")])
def test_a_form_that_needs_more_than_a_number_says_so(tmp_path, task, part):
    with pytest.raises(DataError, match=f"field 'idx' is missing; the answers of {task} are .* {part}, which"):
        write_predictions(load_task(task), [0], [example(0, None, ("a",))], tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_a_test_split_without_labels_gives_one_file_from_official_rows_and_the_hubs(tmp_path, name):
    rows, task = without_labels(OFFICIAL[name]), load_task(name)
    official, hub = tmp_path / "test.jsonl", tmp_path / "test.parquet"
    official.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(hub_rows(name, rows), features=hub_features(name)).to_parquet(str(hub))
    for source in (official, hub):
        examples = read_split(task, str(source), "test", require_labels=False)
        write_predictions(task, [0] * len(examples), examples, tmp_path / f"{source.suffix[1:]}.answers")
    answers = [path.read_text() for path in (tmp_path / "jsonl.answers", tmp_path / "parquet.answers")]
    assert answers[0] == answers[1]
    ids = [row.get("idx") for row in rows] if name != "ReCoRD" else [q["idx"] for row in rows for q in row["qas"]]
    assert [json.loads(line)["idx"] for line in answers[0].splitlines()] == ids


def test_a_folder_for_the_file_is_made(tmp_path):
    write_predictions(load_task("RTE"), [0], [example(0, 1)], tmp_path / "a/b/RTE.jsonl")
    assert (tmp_path / "a/b/RTE.jsonl").is_file()


def test_a_candidate_that_a_query_has_not_is_refused(tmp_path):
    examples = [example(0, {"passage": 4, "query": 40}, ("Zoë", "Oslo"))]
    with pytest.raises(DataError, match=r"prediction 2 for idx .* which has 2 possible answers"):
        write_predictions(load_task("ReCoRD"), [2], examples, tmp_path / "ReCoRD.jsonl")


@pytest.mark.parametrize("predictions", [[0], [0, 0, 0], [[0, 0]], 0])
def test_as_many_predictions_as_examples_are_needed(tmp_path, predictions):
    with pytest.raises(ValueError, match="2 examples need as many predictions in one row"):
        write_predictions(load_task("RTE"), predictions, [example(0, 1), example(1, 2)], tmp_path / "RTE.jsonl")


# The real files


@pytest.mark.real
@pytest.mark.parametrize("name", ["BoolQ", "CB", "COPA", "RTE"])
def test_right_predictions_of_a_real_split_hold_its_own_labels(shared, tmp_path, name):
    examples = read_split(load_task(name), str(shared / "data" / "superglue"), "val", require_labels=True)
    source = shared / "data" / "superglue" / name / "val.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    expected = [{"idx": row["idx"], "label": row["label"]} for row in rows]
    for row in expected if name == "BoolQ" else ():
        row["label"] = "true" if row["label"] else "false"
    assert written(tmp_path, name, [e.label for e in examples], examples) == expected


@pytest.mark.real
@pytest.mark.parametrize("name", ["WSC", "WiC"])
def test_right_predictions_of_real_truth_values_hold_its_own_labels(shared, tmp_path, name):
    source = shared / "data" / "fewglue" / name / "dev32.jsonl"
    examples = read_split(load_task(name), str(source), "val", require_labels=True)
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    got = written(tmp_path, name, [e.label for e in examples], examples)
    assert [(row["idx"], row["label"].lower()) for row in got] == [(r["idx"], str(r["label"]).lower()) for r in rows]


@pytest.mark.real
def test_right_predictions_of_multirc_have_the_official_nesting(shared, tmp_path):
    examples = read_split(load_task("MultiRC"), str(shared / "data" / "superglue"), "val", require_labels=True)
    source = shared / "data" / "superglue" / "MultiRC" / "val.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]

    def bare(row):
        questions = [
            {"idx": q["idx"], "answers": [{"idx": a["idx"], "label": a["label"]} for a in q["answers"]]}
            for q in row["passage"]["questions"]
        ]
        return {"idx": row["idx"], "passage": {"questions": questions}}

    assert written(tmp_path, "MultiRC", [e.label for e in examples], examples) == [bare(row) for row in rows]


@pytest.mark.real
def test_right_predictions_of_record_are_answers_of_its_queries(shared, tmp_path):
    source = shared / "data" / "fewglue" / "ReCoRD" / "dev32.jsonl"
    examples = read_split(load_task("ReCoRD"), str(source), "val", require_labels=True)
    got = written(tmp_path, "ReCoRD", [e.label for e in examples], examples)
    queries = [q for line in source.read_text(encoding="utf-8").splitlines() for q in json.loads(line)["qas"]]
    assert [row["idx"] for row in got] == [query["idx"] for query in queries]
    for row, query in zip(got, queries, strict=True):
        assert row["label"] in [answer["text"] for answer in query["answers"]]
