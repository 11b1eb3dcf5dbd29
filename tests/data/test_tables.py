"""Where the rows of a split lie: the official zip's layout, the hub's Parquet in a folder, and folders around them."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features
from test_superglue import OFFICIAL, hub_features, hub_rows

from glmd.cli import main
from glmd.errors import DataError
from glmd.tasks.examples import read_split
from glmd.tasks.tasks import load_task


def refusal(*arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        read_split(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_jsonl(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path, name, rows, *, features=...) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = hub_features(name) if features is ... else features
    Dataset.from_list(hub_rows(name, rows), features=features).to_parquet(str(path))


def seen(examples):
    return [(e.texts, e.label, e.idx, e.choices, e.answers) for e in examples]


def split_of(name: str) -> str:
    return load_task(name).only_split or "val"


OFFICIAL_FILES = {"AXb": "AX-b/AX-b.jsonl", "AXg": "AX-g/AX-g.jsonl"}
HUB_FILES = ["{config}/{split}-00000-of-00001.parquet", "{config}/{split}.parquet", "{config}/{split}/0000.parquet"]


@pytest.mark.parametrize("around", ["", "COMBINED", "superglue/v2"])
@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_the_official_zips_layout_is_found(tmp_path, name, around):
    file = tmp_path / around / OFFICIAL_FILES.get(name, f"{name}/val.jsonl")
    write_jsonl(file, OFFICIAL[name])
    write_jsonl(tmp_path / "__MACOSX" / OFFICIAL_FILES.get(name, f"{name}/val.jsonl"), [])
    task = load_task(name)
    expected = seen(read_split(task, str(file), split_of(name), require_labels=True))
    for folder in {tmp_path / around, file.parent.parent.parent, file.parent} - {tmp_path.parent}:
        assert seen(read_split(task, str(folder), "val", require_labels=True)) == expected


@pytest.mark.parametrize("form", HUB_FILES)
@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_a_copy_of_the_hubs_parquet_gives_the_examples_of_the_official_file(tmp_path, name, form):
    task = load_task(name)
    write_jsonl(tmp_path / "rows.jsonl", OFFICIAL[name])
    expected = seen(read_split(task, str(tmp_path / "rows.jsonl"), "val", require_labels=True))
    split = {"val": "validation", "test": "test"}[split_of(name)]
    file = tmp_path / "hub" / form.format(config=task.hub_name, split=split)
    write_parquet(file, name, OFFICIAL[name])
    config = tmp_path / "hub" / task.hub_name
    for source in (tmp_path / "hub", config, file):
        assert seen(read_split(task, str(source), "val", require_labels=True)) == expected


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_the_hubs_hidden_labels_are_none(tmp_path, name):
    rows = [
        {**row, "label": None} if name not in ("MultiRC", "ReCoRD") else json.loads(json.dumps(row))
        for row in OFFICIAL[name]
    ]
    for row in rows:
        for question in row.get("passage", {}).get("questions", []) if name == "MultiRC" else ():
            for answer in question["answers"]:
                del answer["label"]
        for query in row.get("qas", ()):
            del query["answers"]
    task = load_task(name)
    write_parquet(tmp_path / task.hub_name / "test-00000-of-00001.parquet", name, rows)
    examples = read_split(task, str(tmp_path), "test", require_labels=False)
    assert {example.label for example in examples} == {None}
    assert refusal(task, str(tmp_path), "test", require_labels=True).startswith(f"{tmp_path}/{task.hub_name}/test-")


def test_the_hubs_unfixed_wsc_serves_too(tmp_path):
    write_parquet(tmp_path / "wsc" / "validation.parquet", "WSC", OFFICIAL["WSC"])
    assert len(read_split(load_task("WSC"), str(tmp_path), "val", require_labels=True)) == 1


def test_class_numbers_without_names_are_taken_in_order_with_a_warning(tmp_path, caplog):
    rows = [{"premise": "p", "hypothesis": "h", "label": label, "idx": label} for label in range(3)]
    Dataset.from_list(rows).to_pandas().to_parquet(tmp_path / "val.parquet")
    examples = read_split(load_task("CB"), str(tmp_path / "val.parquet"), "val", require_labels=True)
    assert [example.label for example in examples] == [0, 1, 2]
    assert "class numbers without names and are taken in the order of the task's labels (3, first" in caplog.text
    Dataset.from_list([{**rows[0], "label": 3}]).to_pandas().to_parquet(tmp_path / "val.parquet")
    message = refusal(load_task("CB"), str(tmp_path / "val.parquet"), "val", require_labels=True)
    assert message.startswith(f"{tmp_path}/val.parquet row 1: field 'label' must be one of")


def test_a_column_with_gaps_that_pandas_made_numbers_of_holds_labels_and_none(tmp_path):
    rows = [{"premise": f"p{i}", "hypothesis": "h", "label": label} for i, label in enumerate([1.0, None, 0.0])]
    Dataset.from_list(rows).to_pandas().to_parquet(tmp_path / "val.parquet")
    examples = read_split(load_task("RTE"), str(tmp_path), "val", require_labels=False)
    assert [example.label for example in examples] == [1, None, 0]


def test_class_numbers_follow_the_files_own_names(tmp_path):
    classes = ClassLabel(names=["neutral", "entailment", "contradiction"])  # not our order
    features = Features({**hub_features("CB"), "label": classes})
    rows = [{"premise": "p", "hypothesis": "h", "label": label, "idx": label} for label in range(3)]
    (tmp_path / "cb").mkdir()
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "cb" / "train.parquet"))
    examples = read_split(load_task("CB"), str(tmp_path), "train", require_labels=True)
    assert [load_task("CB").labels[each.label] for each in examples] == classes.names


def test_all_parts_of_a_split_are_read_in_order_and_none_may_be_missing(tmp_path):
    for part in (1, 0):
        rows = [{"premise": f"p{part}", "hypothesis": "h", "label": "entailment", "idx": part}]
        write_parquet(tmp_path / f"rte/train-0000{part}-of-00002.parquet", "RTE", rows)
    examples = read_split(load_task("RTE"), str(tmp_path), "train", require_labels=True)
    assert [each.texts[0][0] for each in examples] == ["p0", "p1"]
    (tmp_path / "rte/train-00001-of-00002.parquet").unlink()
    message = refusal(load_task("RTE"), str(tmp_path), "train", require_labels=True)
    assert message == f"{tmp_path}/rte: 1 of 2 Parquet files of train are there"


def test_what_is_no_parquet_is_refused_by_name(tmp_path):
    (tmp_path / "val.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    message = refusal(load_task("RTE"), str(tmp_path), "val", require_labels=True)
    assert message.startswith(f"{tmp_path}/val.parquet: cannot be read as Parquet (")
    assert "cannot be read as Parquet" in refusal(load_task("RTE"), "none.parquet", "val", require_labels=True)


def test_a_task_that_lies_in_several_places_is_not_guessed(tmp_path):
    for place in ("all/RTE/val", "few/RTE/val", "all/CB/val", "few/CB/train"):
        write_jsonl(tmp_path / f"{place}.jsonl", OFFICIAL[place.split("/")[1]])
    for name in ("RTE", "CB"):  # with only one val, but train would be another collection's
        message = refusal(load_task(name), str(tmp_path), "val", require_labels=True)
        assert f"{name} lies in several places ({tmp_path}/all, {tmp_path}/few); give one of them" in message


@pytest.mark.parametrize("name", ["AXb", "AXg"])
def test_the_diagnostics_have_no_train_split(tmp_path, name):
    write_jsonl(tmp_path / OFFICIAL_FILES[name], OFFICIAL[name])
    message = refusal(load_task(name), str(tmp_path), "train", require_labels=True)
    assert message.endswith(f"{name} has no train split; it is scored with a model of another task")


@pytest.mark.parametrize("layout", ["AX-b/AX-b.jsonl", "AX-b.jsonl", "axb/test-00000-of-00001.parquet"])
def test_evaluate_finds_the_diagnostics_by_itself(finished, tmp_path, capsys, layout):
    write = write_jsonl if layout.endswith(".jsonl") else lambda path, rows: write_parquet(path, "AXb", rows)
    write(tmp_path / layout, OFFICIAL["AXb"])
    student = finished.folder / "tasks/RTE/seed-0/task_soft_labels/student"
    arguments = ["evaluate", str(student), "--task", "AXb", "--max-length", "32"]
    assert main([*arguments, "--data", str(tmp_path)]) == 0
    assert "matthews_correlation" in capsys.readouterr().out
