"""Scenarios on two ranks, each in two forked processes that meet by gloo; run by test_ranks.py in one process.

    python rank_scenarios.py FOLDER

Writes FOLDER/ends.json: for each scenario and rank the exit code, the seconds and the last line of its error.
"""

import copy
import faulthandler
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent / "training"))

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_trainer import (
    MASKED_LABELS,
    TASK,
    WORDS,
    Rows,
    V,
    distiller_of,
    log_rows,
    model_of,
    settings_of,
    teacher_of,
    trainer_of,
    weights_of,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import BertForMaskedLM

import glmd.storage
import glmd.training.checkpoint
from glmd.data.batches import Batch, Collate
from glmd.data.masking import Masking
from glmd.data.sampling import StepPlan, step_batches
from glmd.distillation.distiller import Distiller
from glmd.distillation.objective import Objective, Term
from glmd.distillation.teacher import OnlineTeacher, TeacherOutputs
from glmd.errors import DataError, GlmdError
from glmd.evaluation.bits_per_byte import text_bits
from glmd.evaluation.scoring import score_lm
from glmd.models.layers import EMBEDDINGS
from glmd.pipeline.scores import InParts
from glmd.runtime.processes import wait
from glmd.training.fsdp import end_sharding, is_sharded, shard_backbones
from glmd.training.state import trainable
from glmd.vocabulary.vocabulary import Vocabulary

glmd.storage.sync_to_disk = lambda path: None


def train(
    folder: Path,
    rank: int,
    act: Callable[[int, int], Any] | None = None,
    *,
    workers: int = 0,
    dies_at: int | None = None,
    blind: bool = False,
    apart: bool = False,
    **changes: Any,
) -> None:
    """Five steps of two micro-steps. act: called with (rank, number of the micro-step from 0) before its teacher.

    workers: of each rank's loader; with any the weights are scored after each step. dies_at: in the middle of that.
    blind: rank 1 takes every checkpoint for damaged. apart: it has other scores, the best of them elsewhere.
    """
    teacher, distiller, calls = teacher_of(), distiller_of(), iter(range(1000))

    def answer(batch: Batch) -> TeacherOutputs:
        spoil = act(rank, next(calls)) if act else None
        outputs = teacher(batch)
        if spoil is not None:
            assert outputs.head is not None and outputs.head.bias is not None
            outputs = replace(outputs, head=outputs.head._replace(bias=outputs.head.bias * spoil))
        return outputs

    def score(_: Distiller) -> float:
        if trainer.progress.step == dies_at and rank == 1:
            os.kill(os.getpid(), 9)
        return -abs(trainer.progress.step - (5.0 if apart and rank == 1 else 3.0))

    if blind and rank == 1:
        glmd.storage.manifest_problem = lambda folder: "not visible yet"
    evaluate = score if workers else None
    trainer = trainer_of(folder, settings_of(**changes), workers=workers, evaluate=evaluate)
    assert trainer.accelerator.num_processes == int(os.environ["WORLD_SIZE"])
    trainer.run(distiller, answer, Rows(), Collate(0))
    assert is_sharded(trainer.accelerator) == ("ACCELERATE_USE_FSDP" in os.environ)
    torch.save(weights_of(distiller), folder / f"rank-{rank}.pt")


def signal_to_rank_1(rank: int, call: int) -> None:
    if (rank, call) == (1, 4):  # in step 3
        os.kill(os.getpid(), 15)


def signal_soon_to_rank_1(rank: int, call: int) -> None:
    if (rank, call) == (1, 2):  # in step 4 of a run that goes on after step 2
        os.kill(os.getpid(), 15)


def kill_rank_1(rank: int, call: int) -> None:
    if (rank, call) == (1, 6):  # in step 4, after the checkpoint of step 2
        os.kill(os.getpid(), 9)


def kill_rank_0_in_its_save(rank: int, call: int) -> None:
    if (rank, call) == (0, 7):  # in step 4, which is saved next; the checkpoint of step 2 is whole
        glmd.training.checkpoint.write_manifest = lambda folder: os.kill(os.getpid(), 9)


def raise_on_rank_1(rank: int, call: int) -> None:
    if (rank, call) == (1, 6):
        raise DataError("rows.jsonl:7: cannot be read")


def nan_on_rank_1(rank: int, call: int) -> float | None:
    return float("nan") if (rank, call) == (1, 5) else None  # in step 3


def shard(**changes: str) -> None:
    """What Accelerate's launcher says of configs/accelerate/fsdp2.yaml."""
    values = {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"} | changes
    os.environ.update(ACCELERATE_USE_FSDP="true", **values)


JOINT = Objective((WORDS, MASKED_LABELS, *TASK.terms))
RARE = Objective((MASKED_LABELS, TASK.terms[1]))


class RareRows(Rows):
    """Of all tokens one in fifty is masked, and of the labels most are missing: some ranks have nothing to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.masking = Masking(0.02, 4, np.arange(5), np.arange(5, V), seed=1)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return super().__getitem__(key) | {"labels": 1 if key[1] == 7 else -100}


WORDS_ALONE = Objective((WORDS, MASKED_LABELS))
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**SMALL, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}),
    "electra": ("ElectraForMaskedLM", {**SMALL, "embedding_size": 8}),
    # Its head joins two weights, and reads them by itself.
    "mobilebert": ("MobileBertForMaskedLM", {**SMALL, "embedding_size": 8, "intra_bottleneck_size": 16}),
    # One layer, run twice.
    "albert": ("AlbertForMaskedLM", {**SMALL, "embedding_size": 8}),
    "modernbert": ("ModernBertForMaskedLM", {**SMALL, "max_position_embeddings": 16, "pad_token_id": 0}),
}


def student_of(name: str) -> Distiller:
    head, settings = BODIES[name]
    model_class = getattr(transformers, head)
    torch.manual_seed(4)
    return Distiller(WORDS_ALONE, np.arange(V), language_model=model_class(model_class.config_class(**settings)))


# A term of each kind of signal, of projection, and of what a loss is given.
LAYERS = Objective(
    (
        Term("hidden_states", "mse", layers=((0, 1),), projection="linear"),
        Term("hidden_states", "concatenated_mse", tokens="mean", projection="both", projection_size=4),
        Term("hidden_states", "energy_mse", in_turn=True, older_weight=0.5),
        Term("attentions", "kl_divergence"),
        Term("values", "relation_kl", options={"relation_heads": 4}),
        Term("modules", "energy_mse", modules=(("encoder.layer.0", "encoder.layer.1"),)),
    )
)


def layered_student() -> Distiller:
    return Distiller(LAYERS, np.arange(V), language_model=model_of(BertForMaskedLM, 2, 2, 0.3))


def train_twins(folder: Path, rank: int) -> None:
    """Whole stages under DDP and their twins under FSDP2, one after another. Writes how far they part."""
    found = {
        "tied": twins(folder / "tied", rank, select=True),
        "untied": twins(folder / "untied", rank, tied=False, FSDP_RESHARD_AFTER_FORWARD="false"),
        "one group": twins(folder / "one", rank, FSDP_AUTO_WRAP_POLICY="NO_WRAP"),
        "bf16": twins(folder / "bf16", rank, mixed_precision="bf16"),
        "layers": twins(folder / "layers", rank, LAYERS, student=layered_student),
        "idle ranks": twins(folder / "idle", rank, RARE, RareRows()),
        **{name: twins(folder / name, rank, student=partial(student_of, name), max_steps=3) for name in BODIES},
        "teachers": {name: shared_teacher(name) for name in ("pair", "opt", *BODIES)},
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


class FewRows(Rows):
    """Three rows: two for the first rank, one for the second."""

    def __init__(self) -> None:
        super().__init__(3)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[dict[str, Any]]:
        return [self[epoch, int(row)] for epoch, row in keys]


def shared_teacher(name: str) -> dict[str, Any]:
    """A frozen teacher whole and shared out over the ranks: what it answers, and what this rank holds of it."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    AcceleratorState._reset_state()
    accelerator, student = Accelerator(cpu=True), model_of(BertForMaskedLM, 1, 5)
    batch, found = Collate(0)([FewRows()[0, 0], FewRows()[0, 1]]), []
    for is_shared in (False, True):
        teacher = teacher_of() if name == "pair" else OnlineTeacher(teacher_body(name), None, Vocabulary.identity(V))
        models = [model for model in (teacher.classifier, teacher.language_model) if model is not None]
        if is_shared:
            shard_backbones(models, accelerator.device)
            teacher = OnlineTeacher(models[-1], None if name != "pair" else models[0], Vocabulary.identity(V))
        teacher.layers = {"hidden_states": [EMBEDDINGS, 0, 1]}
        outputs, own = teacher(batch), models[-1].eval()
        assert outputs.head is not None and outputs.hidden_states is not None
        assert not any(isinstance(each, DTensor) for each in (outputs.head.weight, outputs.hidden_states))
        answers = {
            "logits": outputs.head.logits(outputs.hidden_states).tolist(),
            "layers": [each.tolist() for each in outputs.layers["hidden_states"].values()],
            "task": None if outputs.task_logits is None else outputs.task_logits.tolist(),
            "scores": score_lm(
                student, teacher, FewRows(), Collate(0), token_map=np.arange(V), accelerator=accelerator, batch_size=1
            ),
        }
        if type(own).__name__.endswith(("CausalLM", "LMHeadModel")):
            texts = [[5, 6, 7], [8, 9], [6, 6, 7, 8]]
            answers["bits"] = text_bits(InParts(own), texts, start=[5], max_length=8, accelerator=accelerator)
        found.append(answers)
    parts = {
        key: p.to_local().numel() / p.numel() for key, p in teacher.base.named_parameters() if isinstance(p, DTensor)
    }
    return {"whole": found[0], "shared": found[1], "parts": parts}


def teacher_body(name: str) -> Any:
    if name != "opt":
        return student_of(name).language_model
    config = transformers.OPTConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=16
    )
    torch.manual_seed(4)
    return transformers.OPTForCausalLM(config)  # whose own forward calls a part of its backbone


def twins(
    folder: Path,
    rank: int,
    objective: Objective = JOINT,
    rows: Rows | None = None,
    *,
    tied: bool = True,
    select: bool = False,
    mixed_precision: str = "no",
    student: Callable[[], Distiller] | None = None,
    max_steps: int = 6,
    **environment: str,
) -> dict[str, Any]:
    """The same stage twice; select: the best of each epoch is kept, as a whole student on every rank scores it."""
    ends, logs, parts, idle = [], [], {}, []
    for kind in ("ddp", "fsdp2"):
        AcceleratorState._reset_state()
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        if kind == "fsdp2":
            shard(**environment)
        distiller, teacher = distiller_of(objective) if student is None else student(), teacher_of()
        distiller.learn_from(teacher)
        if not tied:
            decoder = distiller.language_model.cls.predictions.decoder
            decoder.weight = torch.nn.Parameter(decoder.weight.detach().clone())
        probe = next(step_batches(Rows(), StepPlan(18, 6, 1, 0, 1, 0), Collate(0), start_step=0, stop_step=1))[0]

        def evaluate(distiller: Distiller = distiller, teacher: OnlineTeacher = teacher, probe: Batch = probe) -> float:
            with torch.no_grad():
                return float(distiller.eval()(probe, teacher(probe))[0])  # the worst, which comes first

        def answer(batch: Batch, teacher: OnlineTeacher = teacher) -> TeacherOutputs:
            idle.append(float(objective.counts(batch).sum()) == 0)
            return teacher(batch)

        (folder / kind).mkdir(parents=True, exist_ok=True)
        # Some gradients are zero but for rounding, which AdamW would make large without a large epsilon.
        settings = settings_of(adam_epsilon=1e-3, max_steps=max_steps, max_grad_norm=0.5)
        fields = {"mixed_precision": mixed_precision, "evaluate": evaluate if select else None}
        trainer = trainer_of(folder / kind, settings, **fields)
        _, trained, _ = trainer._prepare(copy.deepcopy(distiller))
        parts[kind] = {
            name: p.to_local().numel() / p.numel() for name, p in trainable(trained).items() if isinstance(p, DTensor)
        }
        groups = sum(isinstance(module, FSDPModule) for module in trained.modules())
        trainer.accelerator.free_memory()
        trainer.run(distiller, teacher if objective.reads_layers else answer, rows or Rows(), Collate(0))
        assert is_sharded(trainer.accelerator) == (kind == "fsdp2")
        end_sharding(trainer.accelerator)
        assert not any(isinstance(p, DTensor) for p in distiller.parameters()), "the student is whole for the export"
        ends.append(weights_of(distiller))
        wait()  # until the main rank has written
        logs.append(log_rows(folder / kind))
    assert ends[0].keys() == ends[1].keys()
    return {
        "error": max(float((ends[0][name] - tensor).abs().max()) for name, tensor in ends[1].items()),
        "logs": logs,
        "parts": parts,
        "groups": groups,  # of weights that are gathered together
        "names": len(ends[0]),
        "idle": sum(idle),
        "best": [[path.name for path in sorted((folder / kind).glob("best/*"))] for kind in ("ddp", "fsdp2")],
    }


LIMIT = 180  # seconds, of one scenario
RANKS = {"elastic, resumed": range(1), "then one process": range(1)}  # of others: two
SHARDED = {"fsdp2", "fsdp2, killed", "fsdp2, resumed", "ddp, then fsdp2", "fsdp2, nan tolerated", "fsdp2, run again"}
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
    "scored": ("scored", None, {"workers": 2}),
    "killed while scored": ("killed-while-scored", None, {"workers": 2, "dies_at": 4}),
    "killed while scored, resumed": ("killed-while-scored", None, {"workers": 2}),
    "killed again": ("blind", kill_rank_1, {}),
    "blind, resumed": ("blind", None, {"blind": True}),
    "apart": ("apart", None, {"workers": 2, "apart": True}),
    "fsdp2": ("fsdp2", None, {"adam_epsilon": 1e-3}),
    "killed in a save": ("killed-in-a-save", kill_rank_0_in_its_save, {}),
    "killed in a save, resumed": ("killed-in-a-save", None, {}),
    "fsdp2, killed": ("fsdp2-killed", kill_rank_0_in_its_save, {"adam_epsilon": 1e-3}),
    "fsdp2, resumed": ("fsdp2-killed", None, {"adam_epsilon": 1e-3}),
    "ddp, killed": ("switched", kill_rank_1, {"adam_epsilon": 1e-3}),
    "ddp, then fsdp2": ("switched", signal_soon_to_rank_1, {"adam_epsilon": 1e-3}),
    "then one process": ("switched", None, vars(settings_of(adam_epsilon=1e-3).spread(2, 1))),
    "fsdp2, nan tolerated": ("fsdp2-tolerated", nan_on_rank_1, {"skip_nonfinite": 1, "adam_epsilon": 1e-3}),
    "run again": ("run again", None, {"gradient_checkpointing": True}),
    "fsdp2, run again": ("fsdp2-run-again", None, {"gradient_checkpointing": True, "adam_epsilon": 1e-3}),
    "raised": ("raised", raise_on_rank_1, {}),
    "nan": ("nan", nan_on_rank_1, {}),
    "nan, tolerated": ("tolerated", nan_on_rank_1, {"skip_nonfinite": 1, "adam_epsilon": 1e-3}),
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
        faulthandler.enable(said)  # a crash of the interpreter says where
        try:
            if name == "twins":
                train_twins(root, rank)
            else:
                if name in SHARDED:
                    shard()
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
    for name in (*SCENARIOS, "twins"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [start(root, name, rank, port) for rank in RANKS.get(name, range(2))]
        began, ended = time.monotonic(), {}
        while len(ended) < len(ranks) and time.monotonic() - began < LIMIT:
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
