"""Every task of SuperGLUE on its real files, in both castings: a whole run of one step a stage."""

import json
from pathlib import Path

import pytest
import torch

from glmd.cli import main
from glmd.pipeline.run import run

# Where each task's labeled rows lie; ReCoRD, WSC and WiC only as subsets.
FILES = {
    "RTE": "superglue/RTE/train.jsonl",
    "CB": "superglue/CB/train.jsonl",
    "COPA": "superglue/COPA/train.jsonl",
    "MultiRC": "superglue/MultiRC/val.jsonl",
    "BoolQ": "superglue/BoolQ/val.jsonl",
    "ReCoRD": "fewglue/ReCoRD/train.jsonl",
    "WSC": "fewglue/WSC/train.jsonl",
    "WiC": "fewglue/WiC/train.jsonl",
}


@pytest.fixture(scope="module")
def teacher(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of random weights with a real tokenizer of 30,522 tokens."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/minilm-l6-mlm")
    torch.manual_seed(0)
    BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            initializer_range=0.2,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("casting", ["head", pytest.param("cloze", marks=pytest.mark.full)])
def test_every_task_runs_on_its_real_files(shared, tiny, teacher, trusting, tmp_path, casting, capsys, monkeypatch):
    monkeypatch.setattr("glmd.storage.sync_to_disk", lambda path: None)  # flushing to disk is another file's matter
    tasks = {}
    for task, name in FILES.items():
        lines = (shared / "data" / name).read_text(encoding="utf-8").splitlines()[:2]
        rows = tmp_path / f"{task}.jsonl"
        rows.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        tasks[task] = {"train": str(rows), "val": str(rows)}
    stages = {
        f"{stage}.{key}": value
        for stage in ("task_teacher", "task_lm", "task_soft_labels")
        for key, value in {
            "max_steps": 1,
            "num_train_epochs": None,
            "max_length": 256,
            "per_device_train_batch_size": 2,
        }.items()
    }
    config = tiny.config(
        tmp_path / "run",
        f"teacher={teacher}",
        f"casting={casting}",
        f"tasks={json.dumps(tasks)}",
        "pretraining.max_steps=1",
        "controls.hard_labels=false",
        *(f"{key}={json.dumps(value)}" for key, value in stages.items()),
    )
    results = run(config)
    scored = {
        row["task"]: row for row in results["rows"] if (row["system"], row["stage"]) == ("student", "task_soft_labels")
    }
    assert set(scored) == set(FILES)
    for row in scored.values():
        assert row["metrics"] and all(0 <= value <= 1 for value in row["metrics"].values())
    for task, row in scored.items():
        student, output = (
            str(tmp_path / f"run/tasks/{task}/seed-0/task_soft_labels/student"),
            tmp_path / f"{task}.predictions",
        )
        arguments = [student, "--task", task, "--max-length", "256"]
        file = tasks[task]["val"]
        assert main(["predict", *arguments, "--file", file, "--output", str(output)]) == 0
        written = [json.loads(line)["idx"] for line in output.read_text().splitlines()]
        assert len(set(written)) == len(written) >= 2
        capsys.readouterr()
        assert main(["evaluate", *arguments, "--data", file]) == 0
        printed = capsys.readouterr().out
        assert all(f"{value:.4f}" in printed for value in row["metrics"].values())
