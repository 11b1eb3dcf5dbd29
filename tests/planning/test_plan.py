"""What a run's plan reads before anything is trained."""

import json

import pytest

from glmd.errors import ConfigError, DataError
from glmd.planning.plan import make_plan

SENTIMENT = """
name: Sentiment
fields: [sentence]
text: "{sentence}"
labels: [negative, positive]
metrics: [accuracy]
max_length: 32
"""


@pytest.fixture
def files(write):
    """A task's own YAML and jsonl files, as the value of its key in `tasks`."""
    rows = [
        {"sentence": f"it was {word}", "label": label} for word, label in (("bad", "negative"), ("good", "positive"))
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    places = {"definition": write("task/mine.yaml", SENTIMENT)}
    places |= {split: write(f"task/{split}.jsonl", lines) for split in ("train", "val")}
    return {key: str(path) for key, path in places.items()}


def test_a_task_of_ones_own_is_read_from_its_definition_and_files(tiny, tmp_path, files):
    plan = make_plan(tiny.config(tmp_path / "run", f"tasks={json.dumps({'mood': files})}"))
    assert list(plan.tasks) == ["Sentiment"]
    assert [example.texts for example in plan.tasks["Sentiment"].train] == [
        (("it was bad", None),),
        (("it was good", None),),
    ]


def test_a_subfolder_is_named_only_where_a_task_is_read_from_one(tiny, tmp_path, files):
    del files["train"], files["val"]
    of_the_task = f"tasks={json.dumps({'mood': files})}"
    with pytest.raises(DataError, match=r"Sentiment/train\.jsonl: no such file; .* holds RTE; the key folder in"):
        make_plan(tiny.config(tmp_path / "run", of_the_task))
    with pytest.raises(DataError, match=r"o/n: .* the hub gave no train .*o/n:CONFIG names one"):
        make_plan(tiny.config(tmp_path / "run", of_the_task, "data.superglue=o/n"))
    folder = tmp_path / "task"
    (folder / "val.jsonl").rename(folder / "validation.jsonl")
    (folder / "Sentiment").mkdir()
    for path in folder.glob("*.jsonl"):
        path.rename(folder / "Sentiment" / path.name)
    plan = make_plan(tiny.config(tmp_path / "run", of_the_task, f"data.superglue={folder}"))
    assert len(plan.tasks["Sentiment"].val) == 2


def test_settings_beside_a_definition_change_its_stages(tiny, tmp_path, files):
    changes = {**files, "learning_rate": 0.5}
    plan = make_plan(tiny.config(tmp_path / "run", f"tasks={json.dumps({'Sentiment': changes})}"))
    assert plan.config.stage("task_lm", "Sentiment").learning_rate == 0.5


def test_a_definition_that_is_not_there_is_refused(tiny, tmp_path, files):
    tasks = {"Sentiment": {**files, "definition": str(tmp_path / "absent.yaml")}}
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        make_plan(tiny.config(tmp_path / "run", f"tasks={json.dumps(tasks)}"))


def test_a_tasks_fingerprint_knows_the_candidates_that_only_fill_a_blank(tiny, tmp_path):
    """In a blank the text of every candidate is the same: the wrong ones are in no text and no answer."""
    words = sorted({word for line in tiny.corpus.read_text().splitlines() for word in line.split()} - {"."})[:4]
    found = set()
    for other in words[2:4]:
        target = {"span1_text": words[0], "span1_index": 0, "span2_text": words[1], "span2_index": 1}
        row = {"text": " ".join(words[:2]), "target": target, "candidates": [other], "label": True, "idx": 0}
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps(row) + "\n")
        lengths = [f"{stage}.max_length=64" for stage in ("task_teacher", "task_lm", "task_soft_labels")]
        tasks = f"tasks={{WSC: {{train: {rows}, val: {rows}}}}}"
        plan = make_plan(tiny.config(tmp_path / "run", tasks, "casting=cloze", *lengths))
        found.add(plan.tasks["WSC"].fingerprint())
    assert len(found) == 2


def test_a_tasks_corruption_is_for_its_passes_and_not_for_its_teacher(tiny, tmp_path):
    plan = make_plan(tiny.config(tmp_path / "run", "tasks.RTE.mlm_probability=0.3", "tasks.RTE.num_maskings=2"))
    stages = {name: plan.config.stage(name, "RTE") for name in ("task_teacher", "task_lm")}
    assert (stages["task_lm"].mlm_probability, stages["task_lm"].num_maskings) == (0.3, 2)
    assert not stages["task_teacher"].mlm_probability and stages["task_teacher"].num_maskings is None


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("pretraining.gradient_checkpointing=true", "gradient_checkpointing of pretraining has no effect"),
        ("tasks.RTE.gradient_checkpointing=true", "gradient_checkpointing of task_teacher of RTE has no effect"),
    ],
)
def test_an_architecture_whose_layers_cannot_be_run_again_is_refused(tiny, tmp_path, monkeypatch, override, named):
    config = tiny.config(tmp_path / "run", override)
    make_plan(config)
    monkeypatch.setattr("transformers.BertForMaskedLM.supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=f"{named}: BertForMaskedLM cannot run its layers again; remove it"):
        make_plan(config)
