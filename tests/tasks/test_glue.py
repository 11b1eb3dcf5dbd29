"""GLUE's nine tasks are read as the hub's nyu-mll/glue has them, and scored as GLUE is."""

import datasets
import pytest

from glmd.errors import DataError
from glmd.evaluation.metrics import require_metrics, score
from glmd.tasks.examples import read_split
from glmd.tasks.tasks import load_task

NLI = ["entailment", "not_entailment"]
# The columns and names of classes of nyu-mll/glue; the official scores (gluebenchmark.com/faq).
GLUE = {
    "CoLA": ("cola", ["sentence"], ["unacceptable", "acceptable"], {"matthews_correlation"}),
    "SST-2": ("sst2", ["sentence"], ["negative", "positive"], {"accuracy"}),
    "MRPC": ("mrpc", ["sentence1", "sentence2"], ["not_equivalent", "equivalent"], {"accuracy", "f1_binary"}),
    "QQP": ("qqp", ["question1", "question2"], ["not_duplicate", "duplicate"], {"accuracy", "f1_binary"}),
    "STS-B": ("stsb", ["sentence1", "sentence2"], None, {"pearson", "spearman"}),
    "MNLI": ("mnli", ["premise", "hypothesis"], ["entailment", "neutral", "contradiction"], {"accuracy"}),
    "QNLI": ("qnli", ["question", "sentence"], NLI, {"accuracy"}),
    "GLUE-RTE": ("rte", ["sentence1", "sentence2"], NLI, {"accuracy"}),
    "WNLI": ("wnli", ["sentence1", "sentence2"], NLI[::-1], {"accuracy"}),
}


def rows_of(name, count=4, offset=0):
    _, fields, names, _ = GLUE[name]
    labels = [i % len(names) for i in range(count)] if names else [0.5 + i for i in range(count)]
    rows = [
        {**{field: f"{field} {i + offset}" for field in fields}, "label": label, "idx": i}
        for i, label in enumerate(labels)
    ]
    features = {field: datasets.Value("string") for field in fields} | {"idx": datasets.Value("int32")}
    features["label"] = datasets.ClassLabel(names=names) if names else datasets.Value("float32")
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


@pytest.mark.parametrize("name", GLUE)
def test_a_copy_of_the_hubs_rows_is_read_and_scored(tmp_path, name):
    config, fields, names, metrics = GLUE[name]
    task = load_task(name)
    rows = rows_of(name)
    split = "validation_matched" if name == "MNLI" else "validation"
    folder = tmp_path / config
    folder.mkdir()
    rows.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    rows_of(name, offset=9).to_parquet(str(folder / "train-00000-of-00001.parquet"))
    examples = read_split(task, str(tmp_path), "val", require_labels=True)
    texts = [tuple(f"{field} {i}" for field in fields) for i in range(4)]
    assert [tuple(each for each in example.texts[0] if each is not None) for example in examples] == texts
    assert [example.label for example in examples] == rows["label"][:]
    assert list(task.labels) == (names or []) and set(task.metrics) == metrics
    require_metrics(task)
    assert set(score(task, [example.label for example in examples], examples).values()) == {1.0}
    assert read_split(task, str(tmp_path), "train", require_labels=True)[0].texts[0][0] == f"{fields[0]} 9"


def test_mnli_is_scored_on_the_split_that_the_task_names(tmp_path, monkeypatch):
    folder = tmp_path / "mnli"
    folder.mkdir()
    for offset, split in enumerate(("validation_matched", "validation_mismatched")):
        rows_of("MNLI", offset=10 * offset).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    first = {
        name: read_split(load_task(name), str(tmp_path), "val", require_labels=True)[0].texts[0][0]
        for name in ("MNLI", "MNLI-mm")
    }
    assert first == {"MNLI": "premise 0", "MNLI-mm": "premise 10"}
    asked = []

    def load(source, config, *, split):
        asked.append((source, config, split))
        return rows_of("MNLI")

    monkeypatch.setattr(datasets, "load_dataset", load)
    read_split(load_task("MNLI-mm"), "nyu-mll/glue", "val", require_labels=True)
    read_split(load_task("MNLI-mm"), "nyu-mll/glue", "train", require_labels=True)
    assert asked == [
        ("nyu-mll/glue", "mnli", "validation_mismatched"),
        ("nyu-mll/glue", "mnli", "train"),
    ]


def test_a_number_that_is_none_is_refused_by_row(tmp_path):
    path = tmp_path / "val.jsonl"
    path.write_text('{"sentence1": "a", "sentence2": "b", "label": "near"}\n')
    with pytest.raises(DataError, match=r"val.jsonl:1: field 'label' must be a number, got \"near\""):
        read_split(load_task("STS-B"), str(path), "val", require_labels=True)
