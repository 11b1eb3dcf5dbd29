"""One stage at a time: what it begins from and learns from may be any other stage."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glmd.models.loading import model_fingerprint
from glmd.pipeline.run import complete, prepared_run

CONTROL = "controls/full_vocabulary"
LABELS = f"{CONTROL}/tasks/RTE/seed-0/task_soft_labels"


@pytest.fixture
def context(finished, tiny, tmp_path):
    """Of a finished run that gets the control with the full vocabulary, whose stages are run as they are asked for."""
    with prepared_run(tiny.config(finished.copy(tmp_path / "run"), "controls.full_vocabulary=true")) as context:
        yield context


def complete_to(context, path):
    for stage in context.stages:
        result = complete(context, stage)
        if stage.path == path:
            return result
    raise AssertionError(path)


@pytest.mark.slow
def test_a_stage_begins_from_the_stage_that_is_its_start_and_learns_from_the_one_that_is_its_teacher(context, finished):
    """A student that begins as its own teacher is at no distance from it; another one is, and begins as it was.

    The assistant of TAKD is such a stage: nothing but the description is new.
    """
    assistant, found = f"{CONTROL}/pretraining", {}
    of_teacher = complete_to(context, assistant)["lm_scores"]["kl_divergence"]
    for name, start in (("twin", assistant), ("second", "pretraining")):
        stage = context.stage(start)
        still = replace(stage.training, learning_rate=1e-12)
        stage = replace(stage, path=f"more/{name}", start=start, teacher=assistant, settings=still)
        context.stages.append(stage)
        found[name] = complete(context, stage)["lm_scores_before"]["kl_divergence"]
        began, ended = (load_file(Path(context.model(path)) / "model.safetensors") for path in (start, stage.path))
        assert all(torch.allclose(began[key], ended[key], atol=1e-6) for key in began)
        record = json.loads((context.folder(stage) / "stage.json").read_text())["inputs"]
        assert record["start"] == model_fingerprint(context.model(start))
        assert record["teacher"] == model_fingerprint(context.model(assistant))
    assert abs(found["twin"]) < 1e-6 < 0.01 < found["second"] < of_teacher
    student = next(row for row in finished.results["rows"] if row["stage"] == "pretraining")["lm_scores"]
    assert found["second"] != student["kl_divergence"], "which is its distance from the pretrained teacher"


@pytest.mark.slow
def test_a_pass_over_a_task_learns_from_its_teacher_and_is_compared_with_the_tasks_own(context):
    with_teacher = complete_to(context, LABELS)
    stage = context.stage(LABELS)
    still = replace(stage.training, learning_rate=1e-12)
    twin = replace(stage, path="more/twin", start=LABELS, teacher=LABELS, settings=still)
    context.stages.append(twin)
    found = complete(context, twin)
    record = json.loads((context.folder(twin) / "stage.json").read_text())["inputs"]
    assert record["classifier"] == model_fingerprint(context.model(LABELS)), "it learns from the student"
    assert found["agreement"] == with_teacher["agreement"] < 1, "which is with the fine-tuned teacher"


def test_ranks_whose_teacher_runs_in_half_precision_get_the_student_that_the_main_one_made(tiny, tmp_path, monkeypatch):
    """Only there is the teacher read in float32; the student is the same, and nothing of it stays behind."""
    import glmd.pipeline.run_stage as run_stage

    with prepared_run(tiny.config(tmp_path / "run", "tasks={}", "teacher.dtype=bfloat16")) as context:
        complete_to(context, "vocabulary")
        stage = context.stage("pretraining")
        alone, _ = run_stage.start(context, stage)
        monkeypatch.setattr(run_stage, "number_of_ranks", lambda: 2)
        given, read = [], []
        monkeypatch.setattr(run_stage, "on_main", lambda function: given.append(function()))
        load = run_stage.load_language_model
        monkeypatch.setattr(run_stage, "load_language_model", lambda model, **o: read.append(model) or load(model, **o))
        main, _ = run_stage.start(context, stage)
        assert [(each.model, each.dtype) for each in read] == [
            (str(tiny.teacher), "float32"), (str(context.folder(stage) / "start"), "float32")
        ]  # fmt: skip
        assert not (context.folder(stage) / "start").exists() and len(given) == 2
        ours, theirs = main.state_dict(), alone.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
