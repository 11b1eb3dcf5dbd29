"""Scenarios on two ranks, each in two forked processes that meet by gloo; run by test_ranks.py in one process.

    python rank_scenarios.py FOLDER

Writes FOLDER/ends.json: for each scenario and rank the exit code, the seconds and the last line of its error.
"""

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from test_trainer import Rows, distiller_of, settings_of, teacher_of, trainer_of, weights_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import glmd.checkpoint
from glmd.data.batches import Batch, Collate, StepPlan, step_batches
from glmd.errors import DataError, GlmdError
from glmd.teacher import TeacherOutputs

glmd.checkpoint.sync_to_disk = lambda path: None


def train(folder: Path, rank: int, act: Callable[[int, int], Any] | None = None, **changes: Any) -> None:
    """Five steps of two micro-steps. act: called with (rank, number of the micro-step from 0) before its teacher."""
    teacher, distiller, calls = teacher_of(), distiller_of(), iter(range(1000))

    def answer(batch: Batch) -> TeacherOutputs:
        spoil = act(rank, next(calls)) if act else None
        outputs = teacher(batch)
        if spoil is not None:
            assert outputs.head_bias is not None
            outputs = replace(outputs, head_bias=outputs.head_bias * spoil)
        return outputs

    trainer = trainer_of(folder, settings_of(**changes))
    assert trainer.accelerator.num_processes == int(os.environ["WORLD_SIZE"])
    trainer.run(distiller, answer, Rows(), Collate(0))
    torch.save(weights_of(distiller), folder / f"rank-{rank}.pt")


def signal_to_rank_1(rank: int, call: int) -> None:
    if (rank, call) == (1, 4):  # in step 3
        os.kill(os.getpid(), 15)


def kill_rank_1(rank: int, call: int) -> None:
    if (rank, call) == (1, 6):  # in step 4, after the checkpoint of step 2
        os.kill(os.getpid(), 9)


def raise_on_rank_1(rank: int, call: int) -> None:
    if (rank, call) == (1, 6):
        raise DataError("rows.jsonl:7: cannot be read")


def nan_on_rank_1(rank: int, call: int) -> float | None:
    return float("nan") if (rank, call) == (1, 5) else None  # in step 3


def compare_sharding(folder: Path, rank: int, tied: bool) -> None:
    """Three steps of one distiller under DDP and of its twin under FSDP2, layer by layer; writes how far they part."""
    folder.mkdir(exist_ok=True)
    torch.distributed.init_process_group("gloo")
    models = [distiller_of(dropout=0.0) for _ in range(2)]
    for model in models:
        language_model = model.language_model
        if not tied:
            decoder = language_model.cls.predictions.decoder
            decoder.weight = torch.nn.Parameter(decoder.weight.detach().clone())
        assert (language_model.get_input_embeddings().weight is language_model.cls.predictions.decoder.weight) == tied
    plain, sharded = torch.nn.parallel.DistributedDataParallel(models[0]), models[1]
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.language_model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    teacher, plan = teacher_of(), StepPlan(len(Rows()), 3, 1, rank, 2, seed=0)
    objective, losses, norms = models[0].objective, [], []
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, foreach=False) for model in models]
    for (batch,) in step_batches(Rows(), plan, Collate(0), start_step=0, stop_step=3):  # type: ignore[arg-type]
        counts = objective.counts(batch).float()
        torch.distributed.all_reduce(counts)
        for model, optimizer in zip((plain, sharded), optimizers, strict=True):
            loss = objective.total(objective.means(model(batch, teacher(batch)), counts), 0.0) * 2
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    theirs = dict(models[0].named_parameters())
    is_sharded, errors = [], []
    for name, ours in sharded.named_parameters():
        is_sharded.append(isinstance(ours, DTensor) and ours.to_local().numel() < ours.numel())
        whole = ours.full_tensor() if isinstance(ours, DTensor) else ours
        errors.append(float((whole - theirs[name]).abs().max()))
    found = {"losses": losses, "norms": norms, "error": max(errors), "sharded": sum(is_sharded), "names": len(theirs)}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


RANKS = {"elastic, resumed": range(1)}  # of others: two
SHARDINGS = {"sharded, tied": True, "sharded, untied": False}
SCENARIOS: dict[str, tuple[str, Callable[[int, int], Any] | None, dict[str, Any]]] = {
    # name: (folder, what happens, settings)
    "undisturbed": ("undisturbed", None, {}),
    "signal": ("signal", signal_to_rank_1, {"save_steps": 100}),
    "signal, resumed": ("signal", None, {}),
    "killed": ("killed", kill_rank_1, {}),
    "killed, resumed": ("killed", None, {}),
    # Some gradients are zero but for rounding, which AdamW would make large without a large epsilon.
    "whole": ("whole", None, {"adam_epsilon": 1e-3}),
    "elastic": ("elastic", kill_rank_1, {"adam_epsilon": 1e-3}),
    "elastic, resumed": ("elastic", None, vars(settings_of(adam_epsilon=1e-3).spread(2, 1))),
    "run again": ("run again", None, {"gradient_checkpointing": True}),
    "raised": ("raised", raise_on_rank_1, {}),
    "nan": ("nan", nan_on_rank_1, {}),
    "nan, tolerated": ("tolerated", nan_on_rank_1, {"skip_nonfinite": 1}),
}


def start(root: Path, name: str, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    os.environ.update(
        WORLD_SIZE=str(len(RANKS.get(name, range(2)))), RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1"
    )
    os.environ.update(MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    code = 1
    with (root / f"{name}-{rank}.txt").open("w") as said:
        try:
            if name in SHARDINGS:
                compare_sharding(root / name, rank, SHARDINGS[name])
            else:
                folder, act, changes = SCENARIOS[name]
                train(root / folder, rank, act, **changes)
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        except GlmdError as error:
            code = error.exit_code
            said.write(f"{type(error).__name__}: {error}")
        except BaseException:
            said.write(traceback.format_exc())
    os._exit(code)


def main(root: Path) -> None:
    ends: dict[str, Any] = {}
    for name in (*SCENARIOS, *SHARDINGS):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [start(root, name, rank, port) for rank in RANKS.get(name, range(2))]
        began, ended = time.monotonic(), {}
        while len(ended) < len(ranks) and time.monotonic() - began < 100:
            for rank, child in enumerate(ranks):
                if rank not in ended:
                    done, status = os.waitpid(child, os.WNOHANG)
                    if done:
                        ended[rank] = (os.waitstatus_to_exitcode(status), time.monotonic() - began)
            time.sleep(0.01)
        for rank, child in enumerate(ranks):
            if rank not in ended:
                os.kill(child, 9)
                os.waitpid(child, 0)
        said = [(root / f"{name}-{rank}.txt").read_text() for rank, _ in enumerate(ranks)]
        ends[name] = [[*ended.get(rank, (None, None)), text] for rank, text in enumerate(said)]
    (root / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
