"""Two processes on the CPU: the weights of one process with twice the batch, every validation example scored once."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from glmd.configs_root import configs_root
from glmd.errors import RunError

pytestmark = pytest.mark.slow


DDP = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
FSDP2 = ["--config_file", str(configs_root() / "accelerate" / "fsdp2.yaml")]


def launch(
    arguments: list[str],
    processes: int = 2,
    *,
    command: str = "run",
    printed: str = "| student (distilled)",
    options: Sequence[str] = DDP,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "accelerate.commands.launch", *options, "--num_processes", str(processes)]
    words += ["--main_process_port", str(port), "-m", "glmd", command, *arguments]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    # Ranks that wait for one another for ever are a failure, not a long test.
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(printed) == 1, "only the main process prints"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        f"{path.parent.relative_to(folder)} {name}": tensor
        for path in sorted(folder.rglob("model.safetensors"))
        for name, tensor in load_file(path).items()
    }


def masked_tokens_of_batches(run: Path, tiny) -> list[int]:
    """How many masked tokens each micro-batch of either rank has in pretraining."""
    from transformers import AutoTokenizer

    from glmd.data.batches import BlockDataset, StepPlan, corruption_for
    from glmd.data.corpus import open_token_store

    tokenizer, store = AutoTokenizer.from_pretrained(tiny.teacher), open_token_store(run / "corpus")
    blocks = range(store.num_blocks(14) - 4)  # the last four are held out
    data = BlockDataset(store, tokenizer, max_length=16, blocks=blocks, corruption=corruption_for(tokenizer, 0.02, 0))
    plans = [StepPlan(len(blocks), 2, 1, rank, 2, 0) for rank in range(2)]
    return [
        sum(int((data[key]["word_labels"] >= 0).sum()) for key in keys)
        for plan in plans
        for keys in plan.micro_batches(0, 6)
    ]


def test_two_processes_do_the_work_of_one(tiny, trusting, tmp_path):
    """Under DDP, and with the student shared out by FSDP2; of the latter one process ends what two began.

    Masked tokens are so rare that batches without one occur; val has 11 examples, which two cannot share evenly.
    """
    from glmd.pipeline import run

    val = tmp_path / "val.jsonl"
    val.write_text("".join((tiny.superglue / "RTE/val.jsonl").read_text().splitlines(keepends=True)[:11]))
    # The student has no dropout: it is a function of the rank, which one process has only one of.
    plain = "student.config={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"
    stages = ("pretraining", "task_teacher", "task_words", "task_labels")
    shared = [plain, "method=glmd-hard", "pretraining.mlm_probability=0.02", f"tasks.RTE.val={val}"]
    # AdamW and clipping hide a wrong scale of the gradients: with a large epsilon, and no clipping, it shows.
    shared += [f"{stage}.{key}" for stage in stages for key in ("adam_epsilon=1e-2", "max_grad_norm=1000")]
    shared += ["controls.hard_labels=false"]
    named = tmp_path / "one/tasks/RTE/teacher/model"
    size = "per_device_train_batch_size"
    one = [*shared, *(f"{stage}.{size}=4" for stage in stages)]
    expected = run(tiny.config(tmp_path / "one", *one))
    two = [*shared, *(f"{stage}.{size}=2" for stage in stages), f"teacher.tasks.RTE={named}"]
    assert {0} < set(masked_tokens_of_batches(tmp_path / "one", tiny)), "a batch without masked tokens is wanted"
    for kind, options in (("ddp", DDP), ("fsdp2", FSDP2)):
        place = tmp_path / kind
        launch([str(tiny.root / "run.yaml"), f"output_dir={place}", *two], options=options)
        assert_same_run(place, tmp_path / "one", json.loads((place / "results.json").read_text()), expected)
    shutil.rmtree(place / "tasks/RTE/seed-0/labels")
    with pytest.raises(RunError, match=r"processes: 2 -> 1; sharding: 'FSDP2' -> None"):
        run(tiny.config(place, *two))
    assert_same_run(place, tmp_path / "one", run(tiny.config(place, *two, "elastic=true")), expected)


def assert_same_run(place: Path, one: Path, results: dict[str, Any], expected: dict[str, Any]) -> None:
    """The students and scores of a run of several processes are those of one."""
    ours, theirs = weights(place), weights(one)
    assert ours.keys() == {name for name in theirs if not name.startswith("tasks/RTE/teacher")}
    for name, tensor in ours.items():
        error = (tensor - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1)
        assert error < 1e-6, f"{name} differs by {error:.1e}"
    rows = {row["stage"]: row for row in expected["rows"]}
    for row in results["rows"]:
        twin = rows[row["stage"]]
        for key in ("metrics", "agreement", "examples"):
            assert row.get(key) == twin.get(key)
        for key in ("words", "words_before"):
            assert row.get(key, {}) == pytest.approx(twin.get(key, {}), rel=1e-5)
    assert results["rows"][-1]["examples"] == 11


def test_two_processes_share_the_work_of_a_cache_and_read_their_own_rows(tiny, trusting, tmp_path, monkeypatch):
    """The cache is begun here in small shards, of which one is made; the ranks make the others, and the task's."""
    from glmd.cache import TeacherCache
    from glmd.pipeline import make_cache, run

    monkeypatch.setattr("glmd.cache.SHARD_BYTES", 16 * 16 * 2 * 20)  # twenty texts of 16 tokens
    plain = "student.config={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"
    shared = ["pretraining.num_maskings=2", "pretraining.max_steps=30", plain, "controls.hard_labels=false"]
    stages, size = ("pretraining", "task_words", "task_labels"), "per_device_train_batch_size"
    shared += [f"{stage}.logging_steps=1" for stage in stages]
    one, two = tmp_path / "one", tmp_path / "two"
    alone = [f"{stage}.{size}=4" for stage in stages]
    run(tiny.config(one / "run", *shared, f"teacher.cache={one / 'cache'}", *alone))
    shared.append(f"teacher.tasks.RTE={one / 'run/tasks/RTE/teacher/model'}")

    real = TeacherCache.write_shard
    written: list[int] = []

    def first_alone(self, number, *rest, **options):
        if written:
            raise KeyboardInterrupt
        written.append(number)
        real(self, number, *rest, **options)

    monkeypatch.setattr(TeacherCache, "write_shard", first_alone)
    arguments = [*shared, f"teacher.cache={two / 'cache'}", *(f"{stage}.{size}=2" for stage in stages)]
    with pytest.raises(KeyboardInterrupt):
        make_cache(tiny.config(two / "begun", *arguments))
    arguments = [str(tiny.root / "run.yaml"), f"output_dir={two / 'run'}", *arguments]
    launch(arguments, command="cache", printed=": complete")
    names, others = ({path.name for path in each.glob("*.*")} for each in (one / "cache", two / "cache"))
    assert names == others and len(names) > 6
    for name in names:
        assert (one / "cache" / name).read_bytes() == (two / "cache" / name).read_bytes(), name
    launch(arguments)
    logs = [(place / "run/log.jsonl").read_text().splitlines() for place in (one, two)]
    rows = [[row for line in log if "loss" in (row := json.loads(line))] for log in logs]
    losses = [[row["loss"] for row in log if not row["stage"].endswith("/teacher")] for log in rows]
    assert len(losses[0]) == 30 + 6 + 6 and losses[1] == pytest.approx(losses[0], rel=1e-3)


# Two ranks ask the main one, which answers, refuses, answers again: what each rank found, as a line.
ASK_THE_MAIN_RANK = """
import os, sys, types
import torch.distributed
from glmd.errors import GlmdError, RunError
from glmd.run_folder import RunFolder

rank = 0 if os.fork() else 1
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=rank, world_size=2)
folder = RunFolder(None, types.SimpleNamespace(num_processes=2, is_main_process=rank == 0))

def refuse():
    raise RunError(f"rank {rank} refuses")

found = [folder.on_main(lambda: {"rank": rank})]
try:
    folder.on_main(refuse)
except GlmdError as error:
    found += [type(error).__name__, str(error)]
found.append(folder.on_main(lambda: rank))
with open(f"{sys.argv[1]}/{rank}", "w") as file:
    file.write(repr(found))
torch.distributed.destroy_process_group()
if rank == 0:
    os.wait()
"""


def test_a_refusal_of_the_main_process_is_that_of_all(tmp_path):
    """Else the others would wait for an answer that never comes."""
    command = [sys.executable, "-c", ASK_THE_MAIN_RANK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = repr([{"rank": 0}, "RunError", "rank 0 refuses", 0])
    assert [(tmp_path / rank).read_text() for rank in "01"] == [expected, expected]


def test_a_launch_on_a_port_in_use_ends_at_once_and_says_so(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
        command += ["--master_port", str(port), "-m", "glmd", "run", f"output_dir={tmp_path / 'run'}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "EADDRINUSE" in done.stderr
    assert not (tmp_path / "run").exists()


def test_accelerate_with_cpu_and_two_processes_is_refused_because_it_starts_one(tiny, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "glmd"]
    command += ["run", str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("glmd: RunError: accelerate launch was asked for several processes and started one") == 1
