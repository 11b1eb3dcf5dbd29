"""Whole runs: what lies in the folder, what the results say, and what a repeated, changed or killed run does."""

import json
import logging
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from glmd.cli import main
from glmd.config_file import load_config
from glmd.errors import ConfigError, GlmdError, ModelError, RunError
from glmd.pipeline.context import Context
from glmd.pipeline.elastic import require_shareable
from glmd.pipeline.run import _near_the_end, prepared_run, run
from glmd.pipeline.run_folder import RunFolder, only_goes_on
from glmd.pipeline.teachers import live_teacher
from glmd.planning.plan import make_plan
from glmd.planning.rules import with_dtype
from glmd.reporting.report import results_table
from glmd.stage_config import StageConfig
from glmd.tasks.examples import read_split
from glmd.tasks.tasks import load_task
from glmd.training.checkpoint import load_checkpoint
from glmd.vocabulary.tokenizer import load_tokenizer
from glmd.vocabulary.vocabulary import Vocabulary

STOCK = {
    "config.json",
    "model.safetensors",
    "README.md",
    "export_probe.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
EXACT = {"token_map.json", "source_tokenizer.json", "tokenization_glmd.py"}


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every exported model."""
    return {path: (folder / path).read_bytes() for path in listing(folder) if path.endswith("model.safetensors")}


def stages(folder: Path) -> set[str]:
    return {path.removesuffix("/stage.json") for path in listing(folder) if path.endswith("/stage.json")}


def row_of(results: dict, stage: str, system: str = "student") -> dict:
    found = [row for row in results["rows"] if row["stage"] == stage and row["system"] == system]
    assert len(found) == 1
    return found[0]


def log_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_times(value):
    """Results without what a clock measured."""
    if isinstance(value, dict):
        clocks = ("seconds", "tokens_per_second")
        return {key: without_times(each) for key, each in value.items() if key not in clocks}
    return [without_times(each) for each in value] if isinstance(value, list) else value


# --- A finished run -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_leaves_these_files_and_no_others(finished):
    task = "tasks/RTE/seed-0"
    models = {
        "pretraining/student",
        f"{task}/task_lm/student",
        f"{task}/task_soft_labels/student",
        f"{task}/hard_labels/student",
    }
    expected = {"config.yaml", "lock", "log.jsonl", "results.json", "exports_checked.json"}
    expected |= {"corpus/manifest.json", "corpus/tokens.bin"}
    expected |= {f"vocabulary/{name}" for name in listing(finished.folder / "vocabulary")}
    expected |= {f"{folder}/{name}" for folder in models for name in STOCK | EXACT}
    expected |= {f"tasks/RTE/task_teacher/model/{name}" for name in STOCK}
    expected |= {f"{folder.removesuffix('/student')}/stage.json" for folder in models}
    expected |= {"vocabulary/stage.json", "tasks/RTE/task_teacher/stage.json", "tasks/RTE/task_teacher/answers.json"}
    expected |= {f"{task}/{stage}/answers.json" for stage in ("task_soft_labels", "hard_labels")}
    assert listing(finished.folder) == expected


def test_the_recorded_config_is_the_run(finished):
    assert load_config(finished.folder / "config.yaml") == with_dtype(finished.config)


def test_results_have_a_row_for_every_stage_and_are_on_disk(finished):
    assert json.loads((finished.folder / "results.json").read_text()) == finished.results
    assert [(row["system"], row["stage"], row["task"], row["seed"]) for row in finished.results["rows"]] == [
        ("teacher", "task_teacher", "RTE", 0),
        ("student", "pretraining", None, 0),
        ("student", "task_lm", "RTE", 0),
        ("student", "task_soft_labels", "RTE", 0),
        ("hard labels", "hard_labels", "RTE", 0),
    ]
    for stage, steps in (("pretraining", 6), ("task_lm", 3), ("task_soft_labels", 3)):
        assert row_of(finished.results, stage)["training"]["steps"] == steps
    # The control has had the updates of both passes.
    assert row_of(finished.results, "hard_labels", "hard labels")["training"]["steps"] == 3 + 3


def test_results_say_what_the_start_took_by_phase(finished):
    seconds = finished.results["seconds"]
    assert {"training", "proof of exports"} <= seconds.keys() and all(each > 0 for each in seconds.values())
    trained = sum(row["training"]["seconds"] for row in finished.results["rows"])
    assert seconds["training"] >= trained - 0.1 * len(finished.results["rows"])


def test_word_prediction_comes_nearer_to_the_teacher(finished):
    for stage in ("pretraining", "task_lm"):
        row = row_of(finished.results, stage)
        assert 0 < row["lm_scores"]["kl_divergence"] < row["lm_scores_before"]["kl_divergence"]


def test_the_log_has_every_interval_of_every_stage(finished):
    task = "tasks/RTE/seed-0"
    assert [(row["stage"], row["step"], row["max_steps"]) for row in log_rows(finished.folder)] == [
        ("tasks/RTE/task_teacher", 3, 3),
        ("pretraining", 2, 6),
        ("pretraining", 4, 6),
        ("pretraining", 6, 6),
        (f"{task}/task_lm", 3, 3),
        (f"{task}/task_soft_labels", 3, 3),
        (f"{task}/hard_labels", 6, 6),
    ]
    assert all(np.isfinite(row["loss"]) and row["learning_rate"] > 0 for row in log_rows(finished.folder))


def test_parameters_are_those_of_the_exported_students(finished):
    from transformers import AutoModelForMaskedLM

    student = AutoModelForMaskedLM.from_pretrained(finished.folder / "pretraining" / "student")
    counted = sum(parameter.numel() for parameter in student.parameters())
    kept = student.config.vocab_size
    assert kept == int(0.6 * 86)
    # Word embeddings (16 wide, tied to the output) and the output's bias have a vocabulary axis.
    expected = {"total": counted, "vocabulary": kept * 17, "body": counted - kept * 17, "embedding_size": 16}
    assert (
        finished.results["parameters"]["student"] == row_of(finished.results, "pretraining")["parameters"] == expected
    )


def answers(folder: Path, examples) -> list[int]:
    """The plainest evaluation: stock model, the folder's own tokenizer, one example after the other, unpadded."""
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return [int(model(**tokenizer(*each.texts[0], return_tensors="pt")).logits.argmax()) for each in examples]


def test_scores_are_those_of_the_exported_folders(finished, tiny):
    """Batches, padding and token map of the run against none of them."""
    val = read_split(load_task("RTE"), str(tiny.superglue), "val", require_labels=True)
    labels = np.array([each.label for each in val])
    teacher = answers(finished.folder / "tasks/RTE/task_teacher/model", val)
    assert row_of(finished.results, "task_teacher", "teacher")["metrics"]["accuracy"] == (teacher == labels).mean()
    for name, system in (("task_soft_labels", "student"), ("hard_labels", "hard labels")):
        row = row_of(finished.results, name, system)
        given = answers(finished.folder / "tasks/RTE/seed-0" / name / "student", val)
        assert row["metrics"]["accuracy"] == (given == labels).mean()
        assert row["agreement"] == np.equal(given, teacher).mean()
        assert row["constant"] == {"accuracy": 0.5} and row["examples"] == len(val)


# --- The same run again, and a changed one ------------------------------------------------------------------------


def test_a_second_run_skips_every_stage_and_returns_the_same(finished, tiny, monkeypatch, tmp_path):
    folder = finished.copy(tmp_path / "run")
    before = {path: (folder / path).read_bytes() for path in listing(folder) - {"lock"}}

    def never(*_, **__):
        raise AssertionError("a finished run trains nothing and loads no weights")

    monkeypatch.setattr("glmd.training.trainer.Trainer.run", never)
    monkeypatch.setattr("glmd.models.loading.require_complete", never)
    monkeypatch.setattr("glmd.models.export.subprocess.Popen", never)
    assert run(tiny.config(folder)) == finished.results
    assert {path: (folder / path).read_bytes() for path in listing(folder) - {"lock", "config.yaml"}} == {
        path: before[path] for path in before if path != "config.yaml"
    }


def test_watching_a_run_otherwise_changes_no_stage(finished, tiny, trusting, tmp_path):
    folder = finished.copy(tmp_path / "run")
    watching = ("pretraining.save_steps=1", "task_soft_labels.logging_steps=1", "task_lm.per_device_eval_batch_size=3")
    assert run(tiny.config(folder, *watching)) == finished.results


@pytest.mark.slow
def test_a_further_seed_adds_its_stages_and_no_others(finished, tiny, trusting, tmp_path):
    folder = finished.copy(tmp_path / "run")
    results = run(tiny.config(folder, "seeds=[0,1]"))
    added = {f"tasks/RTE/seed-1/{name}" for name in ("task_lm", "task_soft_labels", "hard_labels")}
    assert stages(folder) - stages(finished.folder) == added
    assert [row for row in results["rows"] if row["seed"] == 0] == finished.results["rows"]
    assert {name: each for name, each in weights(folder).items() if "seed-1" not in name} == weights(finished.folder)
    first, second = (
        weights(folder)[f"tasks/RTE/seed-{seed}/task_soft_labels/student/model.safetensors"] for seed in (0, 1)
    )
    assert first != second


def lost_config(finished, folder: Path) -> Path:
    """A finished run that is known by the records of its stages alone: their inputs are compared, not the config."""
    (finished.copy(folder) / "config.yaml").unlink()
    return folder


def test_a_stage_whose_inputs_changed_is_refused_field_by_field(finished, tiny, tmp_path):
    """What the config names is another: a task's examples, the teacher's weights."""
    teacher = shutil.copytree(tiny.teacher, tmp_path / "teacher")
    superglue = shutil.copytree(tiny.superglue, tmp_path / "superglue")
    rows = (superglue / "RTE/train.jsonl").read_text()
    (superglue / "RTE/train.jsonl").write_text(rows.replace("not_entailment", "entailment", 1))
    flip(teacher / "model.safetensors")
    folder = lost_config(finished, tmp_path / "run")
    for place, key in ((f"data.superglue={superglue}", "tasks.RTE"), (f"teacher={teacher}", "teacher")):
        with pytest.raises(RunError, match=rf"vocabulary was made from other inputs \({key} has changed\)"):
            run(tiny.config(folder, place))
        (folder / "config.yaml").unlink()
    assert run(tiny.config(folder)) == finished.results


@pytest.mark.slow
def test_a_run_whose_learning_rate_is_constant_may_get_longer_until_its_stage_is_complete(tiny, trusting, tmp_path):
    steady = ("tasks={}", "pretraining.lr_scheduler_type=constant", "pretraining.warmup_ratio=0")
    run(tiny.config(tmp_path / "whole", *steady, "pretraining.max_steps=8"))
    run(tiny.config(tmp_path / "run", *steady))
    with pytest.raises(RunError, match=r"pretraining was made from other inputs \(stage.max_steps: 6 -> 8\)"):
        run(tiny.config(tmp_path / "run", *steady, "pretraining.max_steps=8"))
    record = tmp_path / "run/pretraining/stage.json"
    record.write_text(json.dumps({"complete": False, "inputs": json.loads(record.read_text())["inputs"]}))
    run(tiny.config(tmp_path / "run", *steady, "pretraining.max_steps=8"))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_a_teacher_beside_its_copy_teaches_what_it_does_alone_and_another_one_does_not(tiny, trusting, tmp_path):
    copied, other = (shutil.copytree(tiny.teacher, tmp_path / name) for name in ("copy", "other"))
    tensors = load_file(other / "model.safetensors")
    turned = {name: each.flip(0).contiguous() for name, each in tensors.items() if name.endswith("query.weight")}
    save_file(tensors | turned, other / "model.safetensors", {"format": "pt"})
    for name, ensemble in (("alone", ""), ("twice", f"{copied}"), ("several", f"{other}")):
        run(tiny.config(tmp_path / name, "tasks={}", f"teacher.ensemble=[{ensemble}]"))
    alone, twice, several = (weights(tmp_path / name) for name in ("alone", "twice", "several"))
    assert alone == twice != several
    save_file(
        tensors | {name: each + 1 for name, each in turned.items()}, other / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(RunError, match=r"pretraining was made from other inputs \(ensemble: \['\w+'\] -> \['\w+'\]\)"):
        run(tiny.config(tmp_path / "several", "tasks={}", f"teacher.ensemble=[{other}]"))


def test_further_teachers_that_cannot_serve_are_refused(tiny, models, tmp_path):
    copied = shutil.copytree(tiny.teacher, tmp_path / "copy")
    for changes, says in (
        (("method=hard",), "teacher.ensemble has no effect: method hard compares nothing with further teachers"),
        ((f"teacher.ensemble=[{tiny.teacher}]",), "ensemble names a model twice"),
        ((f"teacher.ensemble=[{tmp_path / 'nowhere'}]",), "nowhere"),
        ((f"teacher.ensemble=[{models / 'RobertaForMaskedLM'}]",), "its tokenizer .* differs from the teacher's"),
        ((f"teacher.ensemble=[{models / 'GPT2LMHeadModel'}]",), "is a causal LM, and teacher.model a masked LM"),
    ):
        with pytest.raises(GlmdError, match=says):
            make_plan(tiny.config(tmp_path / "run", "tasks={}", f"teacher.ensemble=[{copied}]", *changes))
    assert make_plan(tiny.config(tmp_path / "run", "tasks={}", f"teacher.ensemble=[{copied}]"))


def test_a_stage_whose_best_checkpoint_is_kept_may_not_get_longer():
    """Its end is scored, and would not be in a longer one."""
    stage = {"lr_scheduler_type": "constant", "warmup_ratio": 0, "max_steps": 6}
    grown = {**stage, "max_steps": 8}
    assert only_goes_on({"stage": stage, "selection": "last"}, {"stage": grown, "selection": "last"})
    assert not only_goes_on({"stage": stage, "selection": "best"}, {"stage": grown, "selection": "best"})
    drawn = {"selection": "last", "changes": True}  # layers in turn, an intervention: all of which look at progress
    assert not only_goes_on({"stage": stage, **drawn}, {"stage": grown, **drawn})


def begun_with(folder: Path, processes: int) -> None:
    """Let the records of a run say that so many processes began it."""
    for record in folder.rglob("stage.json"):
        values = json.loads(record.read_text())
        if "processes" in values["inputs"]:
            values["inputs"]["processes"] = processes
            record.write_text(json.dumps(values))


def test_a_stage_begun_by_another_number_of_processes_is_refused_with_both(finished, tiny, trusting, tmp_path):
    folder = finished.copy(tmp_path / "run")
    begun_with(folder, 2)
    with pytest.raises(RunError, match=r"task_teacher was made from other inputs \(processes: 2 -> 1\)"):
        run(tiny.config(folder))


def test_an_elastic_run_goes_on_with_other_processes_in_the_same_global_batches(finished, tiny, trusting, tmp_path):
    folder = finished.copy(tmp_path / "run")
    begun_with(folder, 2)
    shutil.rmtree(folder / LABELS)
    results = run(tiny.config(folder, "elastic=true", "controls.hard_labels=false"))
    record = json.loads((folder / LABELS / "stage.json").read_text())
    assert record["inputs"]["processes"] == 2 and record["inputs"]["stage"]["gradient_accumulation_steps"] == 1
    # 24 examples, in batches of 8 on each of two processes: one process takes both in a step.
    assert row_of(results, "task_soft_labels")["training"]["steps"] == 2
    assert row_of(finished.results, "task_soft_labels")["training"]["steps"] == 3


def test_an_elastic_run_is_asked_only_for_the_stages_that_are_still_to_come(finished, tiny, tmp_path):
    folder = finished.copy(tmp_path / "run")
    begun_with(folder, 3)
    # A first pass that this method has not, and a pretraining that is complete, could not be shared by two.
    config = tiny.config(folder, "elastic=true", "task_soft_labels.gradient_accumulation_steps=2")
    plan = make_plan(config)
    require_shareable(plan, 3, 2)  # nothing is left
    shutil.rmtree(folder / LABELS)
    require_shareable(plan, 3, 2)
    with pytest.raises(ConfigError, match="elastic: the 6 micro-batches of a step cannot be shared by 4 processes"):
        require_shareable(plan, 3, 4)
    shutil.rmtree(folder / "pretraining")
    with pytest.raises(ConfigError, match="elastic: the 3 micro-batches of a step cannot be shared by 2 processes"):
        require_shareable(plan, 3, 2)


def test_an_elastic_run_with_processes_that_cannot_share_its_batches_is_refused_before_any_stage(
    finished, tiny, tmp_path, monkeypatch
):
    folder = finished.copy(tmp_path / "run")
    begun_with(folder, 3)
    shutil.rmtree(folder / LABELS)
    accelerator = SimpleNamespace(num_processes=2, is_main_process=True, distributed_type="MULTI_CPU")
    plan = make_plan(tiny.config(folder, "elastic=true"))
    with pytest.raises(ConfigError, match="elastic: the 3 micro-batches of a step cannot be shared by 2 processes"):
        Context(plan, RunFolder(folder), accelerator)


@pytest.mark.parametrize(
    ("overrides", "launched", "answer"),
    [
        ((), None, "processes the run was begun with 2, and goes on with as many"),
        ((), "1", "was begun with 2 processes, not 1; launch 2, or give elastic: true"),
        (("elastic=true",), "1", "processes the run was begun with 2, and goes on with 1, 2"),
        (("elastic=true",), "3", "the 2 micro-batches of a step cannot be shared by 3 processes"),
    ],
)
def test_check_knows_by_how_many_processes_a_run_was_begun(
    finished, tiny, tmp_path, capsys, monkeypatch, overrides, launched, answer
):
    folder = finished.copy(tmp_path / "run")
    begun_with(folder, 2)
    shutil.rmtree(folder / LABELS)
    if launched is not None:
        monkeypatch.setenv("WORLD_SIZE", launched)
    main(["check", str(tiny.root / "run.yaml"), f"output_dir={folder}", *overrides])
    said = capsys.readouterr()
    assert answer in said.out + said.err
    if answer in said.out:
        assert " 16 " in next(line for line in said.out.splitlines() if "task_soft_labels" in line), (
            "a batch of two ranks"
        )


# --- A damaged one ------------------------------------------------------------------------------------------------


def test_passes_over_a_task_depend_on_their_fine_tuned_teacher(finished, tiny, tmp_path):
    named, folder = tmp_path / "named", lost_config(finished, tmp_path / "run")
    shutil.copytree(finished.folder / "tasks/RTE/task_teacher/model", named)
    config, found = tiny.config(folder, f"teacher.tasks.RTE={named}"), []
    for _ in range(2):
        with prepared_run(config) as context:
            found.append({stage.path: context.inputs(stage) for stage in context.stages})
        flip(named / "model.safetensors")
    changed = {
        path: [key for key, value in inputs.items() if value != found[1][path][key]]
        for path, inputs in found[0].items()
    }
    passes = {path: ["classifier"] for path in changed if "seed-0" in path}
    assert changed == passes | {"vocabulary": [], "pretraining": [], "tasks/RTE/task_teacher": ["start"]}


def test_what_the_teacher_reads_is_in_the_records_of_students_that_learn_from_it_alone(finished, tiny, tmp_path):
    """And there alone where tokens are mapped: runs that were begun before the setting was there go on."""
    found = []
    with prepared_run(tiny.config(lost_config(finished, tmp_path / "run"))) as context:
        for reads in ("all", "mapped"):
            vocabulary = replace(context.config.vocabulary, teacher_reads=reads)
            context.config = replace(context.config, vocabulary=vocabulary)
            found.append({stage.path: context.inputs(stage) for stage in context.stages})
        learns = next(stage for stage in context.stages if stage.kind == "task_lm")
        for vocabulary, maps in ((context.vocabulary(learns), True), (Vocabulary.identity(100), False)):
            assert (live_teacher(context, learns, vocabulary).source_map is not None) is maps
    before, after = found
    assert not any("teacher_reads" in str(inputs) for inputs in before.values())
    for path, inputs in after.items():
        of_student = path == "pretraining" or "seed-0" in path
        assert inputs == before[path] | ({"teacher_reads": "mapped"} if of_student else {}), path


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("stage", "name", "damage", "found"),
    [
        ("vocabulary", "vocabulary.safetensors", flip, "has changed"),
        ("pretraining", "student/model.safetensors", cut_short, "bytes, not"),
        ("pretraining", "student", shutil.rmtree, "is missing"),
        ("tasks/RTE/task_teacher", "model/model.safetensors", flip, "has changed"),
        ("tasks/RTE/seed-0/task_lm", "student/config.json", Path.unlink, "is missing"),
        ("tasks/RTE/seed-0/task_soft_labels", "student/token_map.json", cut_short, "bytes, not"),
        ("tasks/RTE/seed-0/task_soft_labels", "student/export_probe.json", Path.unlink, "is missing"),
        ("tasks/RTE/seed-0/hard_labels", "student", shutil.rmtree, "is missing"),
    ],
)
def test_a_damaged_result_is_refused_with_the_folder_to_delete(finished, tiny, tmp_path, stage, name, damage, found):
    folder = finished.copy(tmp_path / "run")
    place = folder / stage
    damage(place / name)
    with pytest.raises(RunError) as refused:
        run(tiny.config(folder))
    message = str(refused.value)
    assert message.startswith(f"{place} is not what the complete stage left ({name}")
    assert found in message and message.endswith(f"delete {place} to make it again")
    assert "\n" not in message


@pytest.mark.parametrize("stage", ["vocabulary", "pretraining", "tasks/RTE/seed-0/task_lm"])
def test_a_stage_that_was_deleted_is_made_anew(finished, tiny, trusting, tmp_path, stage):
    folder = finished.copy(tmp_path / "run")
    shutil.rmtree(folder / stage)
    assert without_times(run(tiny.config(folder))) == without_times(finished.results)
    assert weights(folder) == weights(finished.folder) and listing(folder) == listing(finished.folder)


def test_a_model_card_may_be_edited_and_a_file_added(finished, tiny, trusting, tmp_path):
    folder = finished.copy(tmp_path / "run")
    student = folder / LABELS / "student"
    (student / "README.md").write_text("Mine.")
    (student / "notes.txt").write_text("Good on the second half.")
    (folder / "pretraining/student/README.md").unlink()
    assert run(tiny.config(folder)) == finished.results
    assert (student / "README.md").read_text() == "Mine."


def test_each_result_of_a_finished_run_is_hashed_once(finished, tiny, tmp_path, monkeypatch):
    import glmd.pipeline.run_folder
    import glmd.storage

    folder, hashed = finished.copy(tmp_path / "run"), []
    for module, name in ((glmd.storage, "file_sha256"), (glmd.pipeline.run_folder, "model_fingerprint")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda first, *more, real=real, name=name, **known: (
                hashed.append((name, str(first))) or real(first, *more, **known)
            ),
        )
    run(tiny.config(folder))
    assert len(hashed) == len(set(hashed))
    results = {path for path in listing(folder) if path.count("/") and path.startswith(("voc", "pre", "tasks"))}
    results = {path for path in results if not path.endswith(("README.md", "stage.json"))}
    assert {path for name, path in hashed if name == "file_sha256"} == {str(folder / path) for path in results}
    starts = ("pretraining/student", "tasks/RTE/seed-0/task_lm/student", "tasks/RTE/task_teacher/model")
    models = {path for name, path in hashed if name == "model_fingerprint"}
    assert models == {str(tiny.teacher), *(str(folder / start) for start in starts)}


def test_a_task_whose_definition_changed_is_refused(finished, tiny, tmp_path):
    """The config names the same file; lengths, metrics and labels in it are others."""
    definition, folder = tmp_path / "rte.yaml", lost_config(finished, tmp_path / "run")
    text = (Path(__file__).parents[2] / "configs/tasks/RTE.yaml").read_text()
    for old, new in (
        ("max_length: 256", "max_length: 16"),
        ("[accuracy]", "[accuracy, macro_f1]"),
        ("[entailment, not_entailment]", "[not_entailment, entailment]"),
    ):
        assert old in text
        definition.write_text(text.replace(old, new))
        with pytest.raises(RunError, match=r"vocabulary was made from other inputs \(tasks.RTE has changed\)"):
            run(tiny.config(folder, f"tasks.RTE.definition={definition}"))
        (folder / "config.yaml").unlink()
    definition.write_text(text)
    assert without_times(run(tiny.config(folder, f"tasks.RTE.definition={definition}"))) == without_times(
        finished.results
    )


@pytest.mark.parametrize("text", ["{", "teacher: [1", "unknown_key: 3"])
def test_a_run_that_lost_its_config_goes_by_the_records_of_its_stages(finished, tiny, trusting, tmp_path, text):
    folder = finished.copy(tmp_path / "run")
    recorded = folder / "config.yaml"
    recorded.write_text(text)
    with pytest.raises(RunError, match=r"config.yaml.*; delete .*config.yaml, and each stage is compared by its own"):
        run(tiny.config(folder))
    recorded.unlink()
    with pytest.raises(RunError, match=r"was made from other inputs \(stage.learning_rate"):
        run(tiny.config(folder, "pretraining.learning_rate=0.5"))
    recorded.unlink()
    assert without_times(run(tiny.config(folder))) == without_times(finished.results)
    assert load_config(recorded) == with_dtype(tiny.config(folder))


@pytest.mark.parametrize("name", ["exports_checked.json", "results.json"])
def test_a_folder_where_a_file_is_written_is_refused_by_name(finished, tiny, trusting, tmp_path, name):
    folder = finished.copy(tmp_path / "run")
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(RunError, match=rf"{name}: cannot be written \(Is a directory\); make room"):
        run(tiny.config(folder))


@pytest.mark.parametrize("text", ["{", "[1]", "7", ""])
def test_a_damaged_list_of_proved_exports_has_them_all_proved_again(finished, tiny, tmp_path, monkeypatch, text):
    folder, proved = finished.copy(tmp_path / "run"), []
    monkeypatch.setattr("glmd.pipeline.exports.check_exports", proved.extend)
    record = folder / "exports_checked.json"
    whole = json.loads(record.read_text())
    record.write_text(text)
    run(tiny.config(folder))
    assert [path.relative_to(folder).as_posix() for path in proved] == sorted(whole)
    assert json.loads(record.read_text()) == whole


@pytest.mark.parametrize(("name", "damage"), [("tokens.bin", cut_short), ("tokens.bin", flip), ("manifest.json", flip)])
def test_a_damaged_corpus_is_built_again_with_a_warning(finished, tiny, trusting, tmp_path, caplog, name, damage):
    folder = finished.copy(tmp_path / "run")
    damage(folder / "corpus" / name)
    with caplog.at_level(logging.WARNING, logger="glmd"):
        assert run(tiny.config(folder)) == finished.results
    warnings = [record.getMessage() for record in caplog.records]
    (warning,) = [each for each in warnings if "damaged" in each]  # besides what is said of the scores
    assert str(folder / "corpus") in warning and warning.endswith("building it again")
    for path in ("corpus/tokens.bin", "corpus/manifest.json"):
        assert (folder / path).read_bytes() == (finished.folder / path).read_bytes()


def test_a_corpus_that_is_another_when_it_is_built_again_is_refused(finished, tiny, trusting, tmp_path, monkeypatch):
    """As a data set of the hub may be: all that is known of it beforehand is its name."""
    folder = finished.copy(tmp_path / "run")
    shutil.rmtree(folder / "corpus")
    monkeypatch.setattr("glmd.data.token_store.read_documents", lambda *_, **__: iter(["abcd . " * 200] * 5))
    with pytest.raises(RunError, match=r"vocabulary was made from other inputs \(tokens has changed\)"):
        run(tiny.config(folder))


PRETRAINED = "pretraining/student/model.safetensors"


@pytest.fixture(scope="module")
def pretrained(tiny, tmp_path_factory):
    """(results, folder) of a run that only pretrains."""
    config = tiny.config(tmp_path_factory.mktemp("pretrained") / "run", "tasks={}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glmd.pipeline.exports.check_exports", lambda folders: None)
        patch.setattr("glmd.pipeline.run.stranger_ahead", nullcontext)
        return run(config), Path(config.output_dir)


# --- Methods and options ------------------------------------------------------------------------------------------

LABELS, WORDS = "tasks/RTE/seed-0/task_soft_labels", "tasks/RTE/seed-0/task_lm"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("kd", {LABELS: {"task_logits.cross_entropy", "task_labels.hard_cross_entropy"}}),
        ("hard", {"pretraining": {"lm_labels.hard_cross_entropy"}, LABELS: {"task_labels.hard_cross_entropy"}}),
    ],
)
def test_a_method_without_words_or_without_a_teacher_runs_its_terms(tiny, trusting, tmp_path, method, expected):
    results = run(tiny.config(tmp_path / "run", f"method={method}", "controls.hard_labels=false"))
    logged = {row["stage"]: row for row in log_rows(tmp_path / "run") if row["stage"] != "tasks/RTE/task_teacher"}
    assert set(logged) == set(expected)
    for stage, terms in expected.items():
        losses = {key: value for key, value in logged[stage].items() if "." in key}
        assert set(losses) == terms
        assert all(np.isfinite(value) and value > 0 for value in losses.values())
        assert logged[stage]["loss"] == pytest.approx(sum(losses.values()), rel=1e-6)
    assert 0 <= row_of(results, "task_soft_labels")["metrics"]["accuracy"] <= 1


@pytest.mark.slow
def test_selection_by_validation_exports_the_best_epoch(tiny, trusting, tmp_path):
    options = (
        "selection=best",
        "method=kd",
        "data.corpus=[]",
        "controls.hard_labels=false",
        "tasks.RTE.save_steps=100",
    )
    longer = ("task_soft_labels.num_train_epochs=4", "task_soft_labels.learning_rate=1e-2")
    results = run(tiny.config(tmp_path / "run", *options, *longer))
    row = row_of(results, "task_soft_labels")
    scores = {
        each["step"]: each["score"]
        for each in log_rows(tmp_path / "run")
        if "score" in each and each["stage"] == LABELS
    }
    assert list(scores) == [3, 6, 9, 12]
    assert row["metrics"]["accuracy"] == max(scores.values())
    assert row["training"]["best_step"] == next(step for step, score in scores.items() if score == max(scores.values()))
    assert row["selection"] == "best on val" and not (tmp_path / "run" / LABELS / "best").exists()


@pytest.mark.slow
def test_a_named_teacher_distils_unlabeled_examples(tiny, finished, trusting, tmp_path):
    """Nothing is trained on labels, so train needs none; as many examples of another file."""
    train = tmp_path / "unlabeled.jsonl"
    rows = [json.loads(line) for line in (tiny.superglue / "RTE/train.jsonl").read_text().splitlines()]
    train.write_text("".join(json.dumps({key: row[key] for key in ("premise", "hypothesis")}) + "\n" for row in rows))
    named = finished.folder / "tasks/RTE/task_teacher/model"
    config = tiny.config(
        tmp_path / "run", f"teacher.tasks.RTE={named}", f"tasks.RTE.train={train}", "controls.hard_labels=false"
    )
    results = run(config)
    assert not (tmp_path / "run/tasks/RTE/task_teacher/model").exists()
    row = row_of(results, "task_teacher", "teacher")
    assert "training" not in row
    assert row["metrics"] == row_of(finished.results, "task_teacher", "teacher")["metrics"]
    # Labels took no part: the student is that of the run which had them.
    path = f"{LABELS}/student/model.safetensors"
    assert weights(tmp_path / "run")[path] == weights(finished.folder)[path]


@pytest.mark.slow
def test_the_full_vocabulary_control_is_the_whole_method_with_every_word(finished, tiny, trusting, tmp_path):
    folder = finished.copy(tmp_path / "run")
    results = run(tiny.config(folder, "controls.full_vocabulary=true"))
    control = folder / "controls/full_vocabulary"
    assert stages(folder) - stages(finished.folder) == {
        f"controls/full_vocabulary/{stage}" for stage in ("pretraining", WORDS, LABELS)
    }
    assert [row["stage"] for row in results["rows"] if row["system"] == "full vocabulary"] == [
        "pretraining", "task_lm", "task_soft_labels",
    ]  # fmt: skip
    student = control / LABELS / "student"
    assert json.loads((student / "config.json").read_text())["vocab_size"] == 86
    assert listing(student) == STOCK, "a student with the teacher's tokens has the teacher's tokenizer"
    assert weights(finished.folder).items() <= weights(folder).items()


@pytest.mark.slow
def test_bf16_between_float32_runs_of_one_process_keeps_weights_in_float32(tiny, pretrained, trusting, tmp_path):
    from safetensors.torch import load_file

    options = ("tasks={}", "mixed_precision=bf16")
    results = run(tiny.config(tmp_path / "bf16", *options))
    tensors = load_file(tmp_path / "bf16/pretraining/student/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    words, expected = (row_of(each, "pretraining")["lm_scores"]["kl_divergence"] for each in (results, pretrained[0]))
    assert words == pytest.approx(expected, rel=0.02) and words != expected
    run(tiny.config(tmp_path / "float32", "tasks={}"))
    assert weights(tmp_path / "float32")[PRETRAINED] == weights(pretrained[1])[PRETRAINED]


# --- Interrupted runs ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_signal_ends_the_step_and_saves_and_the_run_goes_on_from_there(
    pretrained, tiny, trusting, tmp_path, monkeypatch
):
    from glmd.training.trainer import Trainer

    real, config = Trainer._step, tiny.config(tmp_path / "run", "tasks={}", "pretraining.save_steps=100")

    def step_with_signal(self, model, optimizer, teacher, batches, step, max_steps):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(self, model, optimizer, teacher, batches, step, max_steps)

    monkeypatch.setattr(Trainer, "_step", step_with_signal)
    with pytest.raises(SystemExit) as ended:
        run(config)
    assert ended.value.code == 143
    checkpoint = load_checkpoint(tmp_path / "run/pretraining/checkpoints")
    assert checkpoint is not None and checkpoint.state["progress"]["step"] == 3
    monkeypatch.setattr(Trainer, "_step", real)
    run(config)
    assert weights(tmp_path / "run")[PRETRAINED] == weights(pretrained[1])[PRETRAINED]


# Imports once, then runs the same run in forked children that kill themselves (SIGKILL) just before their Nth
# change to the run folder: opening a file for writing, renaming, removing, making a folder, or half-way through the
# bytes of a tensor file. Prints how many children were killed before one came to the end.
KILLED_CHILDREN = """
import contextlib, os, sys
import glmd.training.checkpoint, glmd.pipeline.run, glmd.pipeline.exports, glmd.data.corpus, glmd.training.trainer
from glmd.config_file import load_config
import transformers
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, BertForMaskedLM
glmd.pipeline.exports.check_exports = lambda folders: None
glmd.pipeline.run.stranger_ahead = contextlib.nullcontext
config = load_config(sys.argv[1], sys.argv[2:])
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}

def die_before_change(number):
    left, dying = [number], [False]
    def count():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), 9)
    def audit(event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and config.output_dir in str(arguments[0]):
            count()
    sys.addaudithook(audit)
    save = glmd.training.checkpoint.save_file
    def save_in_two_halves(tensors, path):
        save(tensors, path)
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            content = file.read()
        os.truncate(path, size // 2)
        count()
        save(tensors, path)
    glmd.training.checkpoint.save_file = save_in_two_halves

killed = 0
for number in [1, 2, 3, 4, 5, *range(8, 300, 23)] * 9:
    child = os.fork()
    if child == 0:
        die_before_change(number)
        glmd.pipeline.run.run(config)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        print(killed)
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == 9, f"child {killed} of {number} ended with {status}"
    killed += 1
"""


@pytest.mark.slow
def test_a_run_killed_at_any_change_on_disk_ends_in_the_same_weights(finished, tiny, tmp_path):
    options = [f"output_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_CHILDREN, str(tiny.root / "run.yaml"), *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 10
    assert weights(tmp_path / "run") == weights(finished.folder)
    assert listing(tmp_path / "run") == listing(finished.folder)
    results = json.loads((tmp_path / "run/results.json").read_text())
    for row, expected in zip(results["rows"], finished.results["rows"], strict=True):
        for key in ("metrics", "agreement", "lm_scores", "lm_scores_before", "parameters"):
            assert row.get(key) == expected.get(key)


@pytest.mark.slow
def test_a_student_learns_from_inputs_without_labels_and_is_chosen_without_them(tiny, finished, trusting, tmp_path):
    """Nothing that has a label is read: a fine-tuned teacher is named, and val has none either."""
    rows = [json.loads(line) for line in (tiny.superglue / "RTE/train.jsonl").read_text().splitlines()]
    for name, part in (("inputs", rows[:16]), ("val", rows[16:])):
        unlabeled = [{key: row[key] for key in ("premise", "hypothesis")} for row in part]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unlabeled))
    named = finished.folder / "tasks/RTE/task_teacher/model"
    results = run(
        tiny.config(
            tmp_path / "run",
            "data.superglue=null",
            f"tasks.RTE={{inputs: {tmp_path / 'inputs.jsonl'}, val: {tmp_path / 'val.jsonl'}}}",
            f"teacher.tasks.RTE={named}",
            "controls.hard_labels=false",
            "selection=agreement",
            "task_soft_labels.num_train_epochs=3",
        )
    )
    row = row_of(results, "task_soft_labels")
    assert "metrics" not in row and "constant" not in row
    assert row["selection"] == "nearest to the teacher on val inputs"
    assert row["inputs"] == {"examples": 16, "labeled": 0}
    logged = [each for each in log_rows(tmp_path / "run") if each["stage"] == LABELS]
    scores = [each["score"] for each in logged if "score" in each]
    assert len(scores) == 3 and row["agreement"] == max(scores)
    text = results_table(results)
    assert "| student's agreement with the teacher" in text and "RTE (no labels)" in text
    assert "RTE: the student learned from 16 examples without labels." in text


@pytest.mark.slow
def test_the_teacher_and_the_control_learn_from_train_when_the_student_has_inputs_of_its_own(
    tiny, finished, trusting, tmp_path
):
    inputs = tmp_path / "inputs.jsonl"
    rows = (tiny.superglue / "RTE/train.jsonl").read_text().splitlines()
    inputs.write_text("".join(line + "\n" for line in rows[:8]))
    results = run(tiny.config(tmp_path / "run", f"tasks.RTE.inputs={inputs}"))
    teacher = "tasks/RTE/task_teacher/model/model.safetensors"
    assert weights(tmp_path / "run")[teacher] == weights(finished.folder)[teacher]
    steps = {row["stage"]: row["training"]["steps"] for row in results["rows"]}
    assert steps["task_lm"] == steps["task_soft_labels"] == 1 and steps["task_teacher"] == 3
    assert steps["hard_labels"] == 2, "as many updates as both passes"


def test_a_corpus_is_read_once_to_know_it_by(tiny, tmp_path, monkeypatch):
    """Of many processes one does it, for the plan and for the store alike."""
    import glmd.data.corpus

    real, read = glmd.data.corpus._sha256, []
    monkeypatch.setattr("glmd.data.corpus._sha256", lambda path: read.append(path.name) or real(path))
    with prepared_run(tiny.config(tmp_path / "run")):
        pass
    assert read.count("corpus.txt") == 1


@pytest.mark.parametrize(
    ("steps", "complete", "expected"),
    [
        ([500, 300, 200, 100, 50], (), [1, 2, 3, 4]),
        ([500, 300, 200, 100, 50], (3, 4), [0, 1, 2]),
        ([9, 9, 9, 9000, 9000], (), [2, 3, 4]),
        ([9, 9, 9], (), [0, 1, 2]),
        ([9, 9], (0, 1), []),
    ],
)
def test_the_process_that_proves_exports_begins_near_the_end(monkeypatch, steps, complete, expected):
    monkeypatch.setattr("glmd.pipeline.run.NEAR_THE_END", 700)

    def stage(number, count):
        return SimpleNamespace(path=str(number), examples=(), settings=StageConfig(max_steps=count))

    stages = [stage(*each) for each in enumerate(steps)]
    context = SimpleNamespace(stages=stages, processes=1, is_complete=lambda stage: int(stage.path) in complete)
    assert sorted(_near_the_end(context)) == [str(each) for each in expected]


def test_results_are_on_disk_before_the_exports_are_proved_and_say_so(finished, tiny, tmp_path, monkeypatch, capsys):
    from glmd.cli import main

    folder = finished.copy(tmp_path / "run")
    for name in ("exports_checked.json", "results.json"):
        (folder / name).unlink()

    def refuse(folders: list[Path]) -> None:
        raise ModelError(f"{folders[0]}: its output differs")

    monkeypatch.setattr("glmd.pipeline.exports.check_exports", refuse)
    with pytest.raises(ModelError, match="its output differs"):
        run(tiny.config(folder))
    assert main(["report", str(folder)]) == 0
    said = capsys.readouterr()
    assert "| student" in said.out and "the exports are not verified yet" in said.err
    monkeypatch.setattr("glmd.pipeline.exports.check_exports", lambda folders: None)
    results = run(tiny.config(folder))
    assert results["exports_verified"] and json.loads((folder / "results.json").read_text()) == results
    assert main(["report", str(folder)]) == 0 and "verified" not in capsys.readouterr().err


def test_the_inputs_of_a_task_are_made_once_for_its_stages_and_each_masks_its_own(
    finished, tiny, tmp_path, monkeypatch
):
    from glmd.pipeline import data

    real, made = data.task_dataset, []
    monkeypatch.setattr(data, "task_dataset", lambda *given: made.append(given[1]) or real(*given))
    masked = ("task_lm.mlm_probability=0.3", "seeds=[0,1]")
    (finished.copy(tmp_path / "run") / "config.yaml").unlink()
    with prepared_run(tiny.config(tmp_path / "run", *masked)) as context:
        found = {stage.path: data.training_data(context, stage) for stage in context.stages if stage.task is not None}
        assert data.val_data(context, context.stage("tasks/RTE/seed-1/task_lm")).masking is None
        assert made == ["RTE", "RTE"], "training and validation inputs"
        seeds = [each.masking.seed for path, each in found.items() if path.endswith("task_lm")]
        assert len(set(seeds)) == 2 and found["tasks/RTE/seed-0/task_soft_labels"].masking is None
        assert len({id(each.read) for each in found.values()}) == 1
