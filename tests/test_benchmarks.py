"""The benchmarks of a step run, at sizes of seconds; their figures are in docs/performance.md."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.slow


def output_of(name: str, *options: str) -> str:
    command = [sys.executable, str(BENCHMARKS / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_way_to_take_a_step_is_timed_in_all_its_pieces() -> None:
    names = ("naive fp32", "TextBrewer", "ours fp32", "ours fp32, cache", "ours bf16", "ours bf16, cache")
    names += ("ours bf16, checkpointing",)
    options = ("--shape", "2,1,64,500", "--batch", "2", "--length", "16", "--rounds", "1")
    said = output_of("step.py", *options, "--variants", ";".join(names))
    for name in names:
        whole, pieces = (line.split("|")[2:-1] for line in said.splitlines() if line.startswith(f"| {name} |"))
        assert float(whole[0]) > 0 and len(pieces) == 7
        assert (pieces[0].strip() == "-") == ("cache" in name or name == "TextBrewer"), "who asks the teacher"
    assert re.search(r"about 22 tokens", said)


def test_a_tasks_batches_are_timed_by_strategy(tiny) -> None:
    options = ("--data", str(tiny.superglue), "--tasks", "RTE", "--batch", "2", "--steps", "2")
    said = output_of("bucketing.py", str(tiny.teacher), *options)
    pads = {kind: int(share) for kind, share in re.findall(r"\| RTE, \w+ \| ([\w' ]+) \| (\d+) % ", said)}
    assert pads["group_by_length"] < pads["random"]
    assert pads["longest first"] <= pads["rows' order"]


def test_a_tasks_pads_are_counted_without_a_model_that_runs(tiny) -> None:
    options = ("--data", str(tiny.superglue), "--tasks", "RTE", "--pads", "1", "4")
    rows = dict(
        re.findall(r"\| RTE, \d+ \| ([\w', ]+) \|(.+) \|", output_of("bucketing.py", str(tiny.teacher), *options))
    )
    assert len(rows) == 4 and all(each.split("|")[0].strip() == "0.0 %" for each in rows.values()), "of one text"


def test_batches_are_timed_the_old_way_and_ours() -> None:
    said = output_of(
        "loader.py", "--batches", "2", "--rounds", "1", "--step-ms", "1", "--texts", "100", "--workers", "0"
    )
    rows = re.findall(r"\| (.+), (clean|masked) \| (\d) \| .+ \| (\d+\.\d) \| [\d.]+ % \| [\d.]+ % \|", said)
    assert len(rows) == 6 and {row[0] for row in rows} == {"blocks of 128", "blocks of 512", "pairs of texts"}


def test_the_cost_of_the_same_bits_is_a_ratio() -> None:
    said = output_of("deterministic.py", "--shape", "2,1,64,500", "--batch", "2", "--length", "16", "--rounds", "1")
    assert re.search(r"deterministic: true \d+\.\d ms a step, false \d+\.\d ms: ratio \d+\.\d\d", said)
