"""A run's `attn_implementation`: who has it, and when."""

import json
from collections import defaultdict
from typing import Any

import pytest
import torch

from glmd.cli import main
from glmd.distillation.teacher import OnlineTeacher
from glmd.models.heads import Split
from glmd.pipeline.run import run


def test_students_and_teachers_train_by_it_and_are_scored_and_saved_without_it(
    tiny: Any, tmp_path: Any, trusting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: defaultdict[str, set[str]] = defaultdict(set)
    real, answer = Split.run_backbone, OnlineTeacher.__call__
    teaching: list[int] = []

    def ask(teacher: OnlineTeacher, batch: Any) -> Any:
        teaching.append(1)
        try:
            return answer(teacher, batch)
        finally:
            teaching.pop()

    def look(split: Split, inputs: Any, **given: Any) -> Any:
        who = "teaches" if teaching else "learns" if split.model.training else "is scored"
        seen[who].add(split.backbone.config._attn_implementation)
        return real(split, inputs, **given)

    monkeypatch.setattr(OnlineTeacher, "__call__", ask)
    monkeypatch.setattr(Split, "run_backbone", look)
    config = tiny.config(tmp_path / "run", "attn_implementation=eager", "selection=best", "controls.hard_labels=false")
    run(config)
    assert seen == {"teaches": {"eager"}, "learns": {"eager"}, "is scored": {"sdpa"}}
    saved = list((tmp_path / "run").rglob("config.json"))
    assert len(saved) > 3 and not any("eager" in path.read_text(encoding="utf-8") for path in saved)
    recorded = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "run").rglob("stage.json")]
    trained = [each["inputs"] for each in recorded if each["inputs"].get("stage")]
    assert len(trained) == 4 and all(each["attn_implementation"] == "eager" for each in trained)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["attn_implementation=nonsense"], 'attn_implementation nonsense: Specified `attn_implementation="nonsense"`'),
        (["attn_implementation=org/kernel"], "kernels of the hub, which are code that is downloaded, are not used"),
        (["attn_implementation=flash_attention_2"], "runs in half precision alone; give mixed_precision=bf16"),
        (["attn_implementation=flash_attention_2", "mixed_precision=bf16"], "alone; give teacher.dtype=bfloat16"),
        (
            ["attn_implementation=flash_attention_2", "mixed_precision=bf16", "teacher.dtype=bfloat16"],
            "to be installed",
        ),
        (
            ["attn_implementation=flex_attention"],
            "the student: BertForMaskedLM: it does not run by attn_implementation",
        ),
        (
            ["attn_implementation=flex_attention", "method={method}"],
            "compares attention, which sdpa and eager alone can",
        ),
        (["attn_implementation=eager", "method={method}"], "they are given after attention dropout; give student.conf"),
    ],
)
def test_check_refuses_what_cannot_be_had_in_one_line(
    given: list[str], message: str, tiny: Any, tmp_path: Any, write: Any, capsys: Any
) -> None:
    method = write("attentions.yaml", "pretraining: [{signal: attentions, loss: mse, layers: last}]")
    words = ["check", str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", "tasks={}"]
    with torch.compiler.set_stance("force_eager"):  # compiling flex_attention takes a quarter of a minute
        assert main([*words, *(each.format(method=method) for each in given)]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1


def test_check_says_which_attention_was_tried(tiny: Any, tmp_path: Any, capsys: Any) -> None:
    words = [str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", "attn_implementation=eager"]
    assert main(["check", *words]) == 0
    assert "attention eager" in capsys.readouterr().out
