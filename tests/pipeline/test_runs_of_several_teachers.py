"""Runs whose student learns from several teachers: on corpus and tasks, live, from caches, planned and refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertTokenizer

from glmd.cli import main
from glmd.pipeline.run import run
from glmd.planning.plan import make_plan
from glmd.planning.run_cost import Layout, run_cost
from glmd.planning.stages import stages
from glmd.reporting.report import results_table

SIZES = {"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64, "initializer_range": 0.4}
TINY = {"hidden_size": 8, "num_hidden_layers": 1}
MASKS = ("pretraining.num_maskings=2", "pretraining.logging_steps=1", "task_lm.logging_steps=1")
LOGS = (*MASKS, "task_soft_labels.logging_steps=1", "controls.hard_labels=false")


@pytest.fixture(scope="module")
def others(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two further language models of other depth and width, with padded rows, and classifiers of RTE."""
    root, tokenizer = tmp_path_factory.mktemp("others"), BertTokenizer.from_pretrained(tiny.teacher)
    for name, seed, depth, width in (("deep", 1, 3, 8), ("wide", 2, 1, 20)):
        torch.manual_seed(seed)
        config = BertConfig(vocab_size=128, num_hidden_layers=depth, hidden_size=width, **SIZES)
        for folder, model in ((name, BertForMaskedLM), (f"{name}-rte", BertForSequenceClassification)):
            model(config).save_pretrained(root / folder)
            tokenizer.save_pretrained(root / folder)
    BertForSequenceClassification(BertConfig(vocab_size=128, num_labels=3, **SIZES | TINY)).save_pretrained(
        root / "three"
    )
    tokenizer.save_pretrained(root / "three")
    return root


def losses(folder: Path, stage: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["stage"].endswith(stage) and "loss" in row]


@pytest.mark.slow
def test_a_run_learns_from_all_on_corpus_and_task_and_caches_give_the_live_curves(tiny, trusting, others, tmp_path):
    given = (f"teacher.ensemble=[{others / 'deep'}, {others / 'wide'}]", *LOGS)
    live = run(tiny.config(tmp_path / "live", *given))
    cached = run(tiny.config(tmp_path / "cached", *given, f"teacher.cache={tmp_path / 'cache'}"))
    fine_tuned = {path.name for path in (tmp_path / "live" / "tasks" / "RTE").glob("task_teacher*")}
    assert fine_tuned == {"task_teacher", "task_teacher_2", "task_teacher_3"}
    assert [row["system"] for row in live["rows"]][:4] == ["teacher", "teacher 2", "teacher 3", "student"]
    found = {
        path.parent.relative_to(tmp_path / "cache").as_posix() for path in tmp_path.rglob("cache/**/manifest.json")
    }
    tasks = ("tasks/RTE/task_lm", "tasks/RTE/task_soft_labels")
    folders = [f"{place}{task}" for place in ("", "teacher_2/", "teacher_3/") for task in tasks]
    assert found == {".", "teacher_2", "teacher_3", *folders}
    for stage in ("pretraining", "task_lm", "task_soft_labels"):
        ours, theirs = losses(tmp_path / "cached", stage), losses(tmp_path / "live", stage)
        assert len(ours) >= 3 and np.allclose(ours, theirs, rtol=2e-3, atol=0), stage
    for one, other in zip(live["rows"], cached["rows"], strict=True):
        if "lm_scores" in one:
            assert one["lm_scores"] == pytest.approx(other["lm_scores"], rel=2e-3)
    run(tiny.config(tmp_path / "cached", *given, f"teacher.cache={tmp_path / 'cache'}"))  # nothing is made anew
    table = results_table(live)
    first_cells = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert [each for each in first_cells if each.startswith("teacher")][:3] == ["teacher", "teacher 2", "teacher 3"]
    alone = run(tiny.config(tmp_path / "alone", *LOGS))
    assert losses(tmp_path / "alone", "task_soft_labels") != losses(tmp_path / "live", "task_soft_labels")
    assert [row["system"] for row in alone["rows"]].count("teacher") == 1


@pytest.mark.slow
def test_named_teachers_of_a_task_are_taken_in_their_order_without_language_models(tiny, trusting, others, tmp_path):
    classifier = BertForSequenceClassification.from_pretrained(tiny.teacher)
    classifier.save_pretrained(tmp_path / "rte")
    BertTokenizer.from_pretrained(tiny.teacher).save_pretrained(tmp_path / "rte")
    named = f"teacher.tasks.RTE=[{tmp_path / 'rte'}, {others / 'deep-rte'}, {others / 'wide-rte'}]"
    given = ("method=kd", "task_soft_labels.logging_steps=1", "controls.hard_labels=false")
    run(tiny.config(tmp_path / "run", *given, named))
    assert not list((tmp_path / "run" / "tasks" / "RTE").glob("task_teacher*/model"))
    swapped = named.replace("deep", "x").replace("wide", "deep").replace("x-", "wide-")
    run(tiny.config(tmp_path / "swapped", *given, swapped))
    ours, theirs = (losses(tmp_path / each, "task_soft_labels") for each in ("run", "swapped"))
    assert np.allclose(ours, theirs, rtol=1e-5), "the mean knows no order"
    record = json.loads((tmp_path / "run/tasks/RTE/seed-0/task_soft_labels/stage.json").read_text())["inputs"]
    other = json.loads((tmp_path / "swapped/tasks/RTE/seed-0/task_soft_labels/stage.json").read_text())["inputs"]
    assert record["ensemble"] == other["ensemble"][::-1] and len(set(record["ensemble"])) == 2


@pytest.mark.slow
def test_a_policy_is_saved_with_its_stage_and_leaves_no_trace_in_the_student(tiny, trusting, others, tmp_path):
    given = ("method=rl-kd", "stages.task_average.max_steps=2", f"teacher.ensemble=[{others / 'deep'}]")
    run(tiny.config(tmp_path / "run", *given, "task_soft_labels.save_total_limit=1"))
    stage = tmp_path / "run/tasks/RTE/seed-0/task_soft_labels"
    assert not any("polic" in name for name in load_file(stage / "student/model.safetensors"))


def test_check_lists_every_teacher_and_the_plan_counts_all(tiny, others, tmp_path, capsys):
    ensemble = f"teacher.ensemble=[{others / 'deep'}, {others / 'wide'}]"
    config = tiny.config(tmp_path / "run", ensemble)
    plan, alone = make_plan(config), make_plan(tiny.config(tmp_path / "run"))
    found = {stage.path: stage.teachers for stage in stages(plan, 1)}
    assert found["pretraining"] == ("teacher", "teacher_2", "teacher_3")
    teachers = tuple(f"tasks/RTE/task_teacher{number}" for number in ("", "_2", "_3"))
    assert found["tasks/RTE/seed-0/task_lm"] == found["tasks/RTE/seed-0/task_soft_labels"] == teachers
    several, one = (run_cost(each, Layout()).stages for each in (plan, alone))
    ours, theirs = ({stage.name: stage.memory["teacher"] for stage in each} for each in (several, one))
    trained = {stage.name: stage.memory["student"] for stage in several if "task_teacher" in stage.name}
    assert len(set(trained.values())) == 3 and "RTE task_teacher 3" in trained, "each by its own config"
    more = ours["pretraining"] - theirs["pretraining"]
    sizes = [BertForMaskedLM.from_pretrained(others / name) for name in ("deep", "wide")]
    expected = sum(p.nbytes for model in sizes for p in [*model.parameters(), *model.buffers()])
    assert more == pytest.approx(expected, rel=0.01)
    assert ours["RTE task_soft_labels"] > theirs["RTE task_soft_labels"]


NAMED = "teacher.tasks.RTE=[{deep}-rte, {wide}-rte]"
FURTHER = "teacher.ensemble=[{deep}]"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["method=mt-bert"],
            "method mt-bert weighs several teachers in task_soft_labels, and there is one; name others in "
            "teacher.ensemble, or a list of models for each task",
        ),
        (["method=tmkd", "tasks={{}}"], "weighs several teachers in pretraining, and there is one"),
        ([NAMED], "task_lm compares LM logits, which they have none of"),
        (["teacher.tasks.RTE=[{deep}-rte, {deep}-rte]"], "tasks.RTE names a model twice"),
        ([NAMED, "teacher.ensemble=[{deep}, {wide}]"], "names 2 models for 3 teachers"),
        ([NAMED, "method=hard"], "compares nothing on tasks with further teachers"),
        ([FURTHER, "method=rl-kd", "tasks={{RTE: {{}}, COPA: {{}}}}"], "this task has choices; leave it"),
        (
            [FURTHER, "method=uncertainty", "task_soft_labels.gradient_accumulation_steps=2"],
            "compares the examples of a batch with each other",
        ),
        ([FURTHER, "method=minilm"], "teacher 2: attentions.kl_divergence: the student's num_attention_heads"),
        (["teacher.ensemble=[{deep}, {deep}/../deep]"], "names a folder twice"),
        (
            [FURTHER, "method=diito", "tasks={{}}"],
            "the intervention interchange of method diito in pretraining changes",
        ),
        (["method=kd", "teacher.tasks.RTE=[{deep}-rte, {three}]"], "has 3 classes, RTE has 2"),
    ],
)
def test_what_several_teachers_cannot_be_is_refused_by_check(given, message, tiny, others, tmp_path, capsys):
    shutil.copytree(tiny.superglue / "RTE", tmp_path / "superglue" / "RTE")
    places = {"deep": others / "deep", "wide": others / "wide", "three": others / "three"}
    changed = [each.format(**places) for each in given]
    if "method=minilm" in given:
        folder = shutil.copytree(others / "deep", tmp_path / "heads")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
        changed[0] = f"teacher.ensemble=[{folder}]"
    assert main(["check", str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", *changed]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1
