"""Two processes on the CPU: the weights of one process with twice the batch, every validation example scored once."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import one_of

from glmd.errors import RunError
from glmd.strict_yaml import configs_root

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

    from glmd.data.blocks import BlockDataset
    from glmd.data.masking import masking_for
    from glmd.data.sampling import StepPlan
    from glmd.data.token_store import open_token_store

    tokenizer, store = AutoTokenizer.from_pretrained(tiny.teacher), open_token_store(run / "corpus")
    blocks = range(store.num_blocks(14) - 4)  # the last four are held out
    data = BlockDataset(store, tokenizer, max_length=16, blocks=blocks, masking=masking_for(tokenizer, 0.02, 0))
    plans = [StepPlan(len(blocks), 2, 1, rank, 2, 0) for rank in range(2)]
    return [
        sum(int((data[key]["lm_labels"] >= 0).sum()) for key in keys)
        for plan in plans
        for keys in plan.micro_batches(0, 6)
    ]


def test_two_processes_do_the_work_of_one(tiny, trusting, tmp_path):
    """Under DDP, and with the student shared out by FSDP2; of the latter one process ends what two began.

    Masked tokens are so rare that batches without one occur; val has 11 examples, which two cannot share evenly.
    """
    from glmd.pipeline.run import run

    val = tmp_path / "val.jsonl"
    val.write_text("".join((tiny.superglue / "RTE/val.jsonl").read_text().splitlines(keepends=True)[:11]))
    # The student has no dropout: it is a function of the rank, which one process has only one of.
    plain = "student.config={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"
    stages = ("pretraining", "task_teacher", "task_lm", "task_soft_labels")
    shared = [plain, "method=glmd-hard", "pretraining.mlm_probability=0.02", f"tasks.RTE.val={val}"]
    # AdamW and clipping hide a wrong scale of the gradients: with a large epsilon, and no clipping, it shows.
    shared += [f"{stage}.{key}" for stage in stages for key in ("adam_epsilon=1e-2", "max_grad_norm=1000")]
    shared += ["controls.hard_labels=false"]
    named = tmp_path / "one/tasks/RTE/task_teacher/model"
    size = "per_device_train_batch_size"
    one = [*shared, *(f"{stage}.{size}=4" for stage in stages)]
    expected = run(tiny.config(tmp_path / "one", *one))
    two = [*shared, *(f"{stage}.{size}=2" for stage in stages), f"teacher.tasks.RTE={named}"]
    assert {0} < set(masked_tokens_of_batches(tmp_path / "one", tiny)), "a batch without masked tokens is wanted"
    for kind, options in (("ddp", DDP), ("fsdp2", FSDP2)):
        place = tmp_path / kind
        launch([str(tiny.root / "run.yaml"), f"output_dir={place}", *two], options=options)
        assert_same_run(place, tmp_path / "one", json.loads((place / "results.json").read_text()), expected)
    shutil.rmtree(place / "tasks/RTE/seed-0/task_soft_labels")
    with pytest.raises(RunError, match=r"processes: 2 -> 1; sharding: 'FSDP2' -> None"):
        run(tiny.config(place, *two))
    assert_same_run(place, tmp_path / "one", run(tiny.config(place, *two, "elastic=true")), expected)


def assert_same_run(place: Path, one: Path, results: dict[str, Any], expected: dict[str, Any]) -> None:
    """The students and scores of a run of several processes are those of one."""
    ours, theirs = weights(place), weights(one)
    assert ours.keys() == {name for name in theirs if not name.startswith("tasks/RTE/task_teacher")}
    for name, tensor in ours.items():
        error = (tensor - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1)
        assert error < 1e-6, f"{name} differs by {error:.1e}"
    rows = {row["stage"]: row for row in expected["rows"]}
    for row in results["rows"]:
        twin = rows[row["stage"]]
        for key in ("metrics", "agreement", "examples"):
            assert row.get(key) == twin.get(key)
        for key in ("lm_scores", "lm_scores_before"):
            assert row.get(key, {}) == pytest.approx(twin.get(key, {}), rel=1e-5)
    assert results["rows"][-1]["examples"] == 11


def test_two_processes_share_the_work_of_a_cache_and_read_their_own_rows(tiny, trusting, tmp_path, monkeypatch):
    """The cache is begun here in small shards, of which one is made; the ranks make the others, and the task's."""
    from glmd.distillation.teacher_cache import TeacherCache
    from glmd.pipeline.run import make_cache, run

    monkeypatch.setattr("glmd.distillation.teacher_cache.SHARD_BYTES", 16 * 16 * 2 * 20)  # twenty texts of 16 tokens
    plain = "student.config={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"
    shared = ["pretraining.num_maskings=2", "pretraining.max_steps=30", plain, "controls.hard_labels=false"]
    stages, size = ("pretraining", "task_lm", "task_soft_labels"), "per_device_train_batch_size"
    shared += [f"{stage}.logging_steps=1" for stage in stages]
    one, two = tmp_path / "one", tmp_path / "two"
    alone = [f"{stage}.{size}=4" for stage in stages]
    run(tiny.config(one / "run", *shared, f"teacher.cache={one / 'cache'}", *alone))
    shared.append(f"teacher.tasks.RTE={one / 'run/tasks/RTE/task_teacher/model'}")

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
    losses = [[row["loss"] for row in log if not row["stage"].endswith("/task_teacher")] for log in rows]
    assert len(losses[0]) == 30 + 6 + 6 and losses[1] == pytest.approx(losses[0], rel=1e-3)


# Two ranks, in turn: what the main one answers, refuses and breaks on, what each finds, and that one has gone.
ASK_ONE_ANOTHER = """
import os, sys, time
import torch.distributed
from glmd.errors import GlmdError, RunError
from glmd.runtime.processes import gathered, on_main, together, wait

rank = 0 if os.fork() else 1
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=rank, world_size=2)

def refuse():
    raise RunError(f"rank {rank} refuses")

def said(ask, function):
    try:
        return ask(function)
    except (GlmdError, SystemExit, KeyError) as error:
        return f"{type(error).__name__}: {getattr(error, 'code', error)}"

found = [said(on_main, lambda: {"rank": rank}), said(on_main, refuse), said(on_main, lambda: {}["key"])]
found += [said(on_main, lambda: sys.exit(143)), said(on_main, lambda: rank)]
found += [said(together, lambda: rank), said(together, refuse if rank else lambda: rank), gathered(rank)]
if rank == 1:
    os._exit(0 if open(f"{sys.argv[1]}/1", "w").write(repr(found)) else 1)
began = time.monotonic()
found.append(said(lambda _: wait(), None))
assert time.monotonic() - began < 20
open(f"{sys.argv[1]}/0", "w").write(repr(found))
os._exit(0)
"""


def test_what_the_main_rank_finds_refuses_or_breaks_on_is_that_of_all_and_so_is_a_refusal_of_any(tmp_path):
    """Else the others would wait for an answer that never comes."""
    command = [sys.executable, "-c", ASK_ONE_ANOTHER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    lost = "RankError: the main process ended with KeyError: 'key'"
    gone = "RankError: another process of this run has ended; what it said last is why"
    both = [{"rank": 0}, "RunError: rank 0 refuses"], [0], ["RunError: rank 1 refuses", [0, 1]]
    for rank, broke, told, mine, more in (
        (0, "KeyError: 'key'", "SystemExit", [0], [gone]),
        (1, lost, "EndedAtOnce", [1], []),
    ):
        expected = [*both[0], broke, f"{told}: 143", *both[1], *mine, *both[2], *more]
        assert (tmp_path / str(rank)).read_text() == repr(expected)


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


def agents(words: list[str], folders: Sequence[Path], *, processes: int = 1) -> list[subprocess.Popen[str]]:
    """A torchrun for each folder that it is started in, as on so many machines that meet on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(folders))]
    command += ["--nproc_per_node", str(processes), "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}"]
    command += ["--rdzv_id", str(port), "-m", "glmd", "run", *words]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return [
        subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **options) for folder in folders
    ]


def ended(started: Sequence[subprocess.Popen[str]]) -> list[str]:
    """What each said. Ranks that wait for one another for ever are a failure, not a long test."""
    try:
        return [each.communicate(timeout=60)[0] for each in started]
    finally:
        for each in started:
            each.kill()


def ranks_of(agent: subprocess.Popen[str]) -> list[int]:
    return [int(each) for each in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def wait_for_training(run: Path, started: Sequence[subprocess.Popen[str]]) -> None:
    until = time.monotonic() + 90
    while not list((run / "pretraining" / "checkpoints").glob("step-*")):
        assert time.monotonic() < until and all(each.poll() is None for each in started)
        time.sleep(0.1)


def frames_of_ours(said: str) -> list[str]:
    return [line for line in said.splitlines() if "/glmd/" in line and line.lstrip().startswith("File ")]


def test_a_rank_that_refuses_on_another_host_ends_all_with_its_line(tiny, tmp_path):
    """The second machine has not the task's files where the config says."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    shutil.copytree(tiny.superglue, here / "data")
    words = [str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", "data.superglue=data"]
    began = time.monotonic()
    started = agents(words, [here, there])
    both = ended(started)
    assert all(each.returncode not in (0, None) for each in started) and time.monotonic() - began < 60
    for said in both:
        assert "glmd: DataError: " in said and not frames_of_ours(said)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_that_dies_on_another_host_ends_all_in_time(tiny, tmp_path):
    words = [str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", "pretraining.max_steps=1000000"]
    started = agents(words, [tmp_path, tmp_path])
    wait_for_training(tmp_path / "run", started)
    os.kill(ranks_of(started[1])[0], signal.SIGKILL)
    began = time.monotonic()
    said = ended(started)[0]
    assert time.monotonic() - began < 30 and all(each.returncode not in (0, None) for each in started)
    assert "RankError: another process of this run has ended" in said and not frames_of_ours(said)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", one_of([signal.SIGTERM, signal.SIGINT]))
def test_a_signal_to_a_launcher_and_its_ranks_saves_once_and_has_no_traceback_of_ours(tiny, tmp_path, number):
    """As Slurm sends it: every process of the job has it, and the ranks once more from their launcher."""
    words = [str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", "dataloader_num_workers=1"]
    words += ["pretraining.max_steps=1000000", "pretraining.save_steps=20"]
    started = agents(words, [tmp_path], processes=2)
    wait_for_training(tmp_path / "run", started)
    for process in (*ranks_of(started[0]), started[0].pid):
        os.kill(process, number)
    said = ended(started)[0]
    assert said.count("the step is being finished and saved") == 1 and not frames_of_ours(said), said[-3000:]
    steps = sorted(int(path.name[5:]) for path in (tmp_path / "run/pretraining/checkpoints").glob("step-*"))
    logged = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert steps[-1] >= max(row["step"] for row in logged if row["stage"] == "pretraining")
