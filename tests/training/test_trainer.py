"""The loop: equal to the plainest one, bit-identical after any interruption, stopped in time by what goes wrong."""

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

import glmd.training.trainer
from glmd.data.batches import Batch, Collate
from glmd.data.masking import Masking
from glmd.data.sampling import StepPlan, step_batches
from glmd.distillation.distiller import Distiller
from glmd.distillation.objective import Objective, Term
from glmd.distillation.teacher import OnlineTeacher, TeacherOutputs
from glmd.errors import NumericsError, RunError
from glmd.losses.head import Head
from glmd.stage_config import StageConfig
from glmd.storage import write_manifest
from glmd.training.checkpoint import load_checkpoint
from glmd.training.fsdp import take_up_sharding
from glmd.training.log import RunLog
from glmd.training.state import STEP_VERSION, code_of_a_step, trainable
from glmd.training.trainer import Interrupted, Trainer, TrainingResult
from glmd.vocabulary.vocabulary import Vocabulary

V, C = 30, 2
WORDS = Term("lm_logits", "kl_divergence", {"from": 1.0, "to": 0.5}, options={"temperature": 15.0})
MASKED_LABELS = Term("lm_labels", "hard_cross_entropy", 0.3, "masked")
OBJECTIVE = Objective((WORDS, MASKED_LABELS))
TASK = Objective((Term("task_logits", "kl_divergence"), Term("task_labels", "hard_cross_entropy")))

Weights = dict[str, Tensor]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps one state for the process. Flushing to disk is another file's matter, and slow."""
    monkeypatch.setattr("glmd.storage.sync_to_disk", lambda path: None)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


class Rows:
    """Random sentences of 3 to 8 tokens with labels, a fifth of the tokens masked."""

    def __init__(self, count: int = 18) -> None:
        rng = np.random.default_rng(0)
        self.rows = [rng.integers(5, V, int(rng.integers(3, 9))) for _ in range(count)]
        self.masking = Masking(0.3, 4, np.arange(5), np.arange(5, V), seed=1)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.rows])

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        ids, labels = self.masking(self.rows[key[1]], key)
        return {"input_ids": ids, "lm_labels": labels, "labels": key[1] % C, "example_id": key[1]}


def model_of(head: type, layers: int, seed: int, dropout: float = 0.0) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=V,
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        initializer_range=0.4,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=C,
    )
    return head(config)


def distiller_of(objective: Objective = OBJECTIVE, *, dropout: float = 0.3) -> Distiller:
    language_model = model_of(BertForMaskedLM, 1, 2, dropout)
    classifier = model_of(BertForSequenceClassification, 1, 3, dropout)
    return Distiller(objective, np.arange(V), language_model=language_model, classifier=classifier)


def teacher_of() -> OnlineTeacher:
    models = model_of(BertForMaskedLM, 2, 0), model_of(BertForSequenceClassification, 2, 1)
    return OnlineTeacher(*models, Vocabulary.identity(V))


def settings_of(**changes: Any) -> StageConfig:
    values = {
        "max_steps": 5,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.4,
        "logging_steps": 1,
        "save_steps": 2,
    }
    return StageConfig(**{**values, **changes})


def trainer_of(folder: Path, settings: StageConfig, *, seed: int = 0, workers: int = 0, **fields: Any) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=True, mixed_precision=fields.pop("mixed_precision", "no"))
    take_up_sharding(accelerator, os.environ)
    log = RunLog(folder / "log.jsonl", accelerator)
    return Trainer(accelerator, folder, "pretraining", settings, seed, log, workers, **fields)


def train(
    folder: Path,
    *,
    distiller: Distiller | None = None,
    teacher: Callable[[Batch], TeacherOutputs] | None = None,
    seed: int = 0,
    workers: int = 0,
    **changes: Any,
) -> Weights:
    """Train in `folder`, going on from what is there, and return the final weights."""
    distiller = distiller or distiller_of()
    trainer = trainer_of(folder, settings_of(**changes), seed=seed, workers=workers)
    trainer.run(distiller, teacher or teacher_of(), Rows(), Collate(0))
    return weights_of(distiller)


def weights_of(distiller: Distiller) -> Weights:
    return {name: p.detach().clone() for name, p in trainable(distiller).items()}


def log_rows(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "seconds")} for row in rows]


def assert_identical(ours: Weights, theirs: Weights) -> None:
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Killed(BaseException):
    """What a test throws into the middle of a step."""


def teacher_that(act: Callable[[], Any], call: int) -> Callable[[Batch], TeacherOutputs]:
    """A teacher that does something at its `call`-th call, from 0, before it answers."""
    teacher, calls = teacher_of(), iter(range(10_000))

    def answer(batch: Batch) -> TeacherOutputs:
        if next(calls) == call:
            act()
        return teacher(batch)

    return answer


def die() -> None:
    raise Killed


def ask_to_stop(number: int = signal.SIGTERM) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


# The step


def plain_training(distiller: Distiller, teacher: OnlineTeacher, settings: StageConfig) -> list[float]:
    """One batch of all examples a step, torch's own AdamW, linear schedule. Returns the losses."""
    batch_size = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    steps, objective, losses = settings.max_steps, distiller.objective, []
    assert steps is not None
    named = [p for p in distiller.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in named if p.ndim == 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in named if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        foreach=False,
    )
    plan = StepPlan(len(Rows()), batch_size, 1, 0, 1, seed=0)
    batches = step_batches(Rows(), plan, Collate(0), start_step=0, stop_step=steps)  # type: ignore[arg-type]
    for step, (batch,) in enumerate(batches, start=1):
        sums, counts = distiller(batch, teacher(batch)), objective.counts(batch)
        fading = 1.0 - 0.5 * (step - 1) / (steps - 1)
        loss = fading * sums[0] / counts[0] + 0.3 * sums[1] / counts[1]
        loss.backward()
        gradients = [p.grad for p in named if p.grad is not None]
        norm = sum((g**2).sum() for g in gradients) ** 0.5
        for gradient in gradients:
            gradient *= min(1.0, settings.max_grad_norm / (norm + 1e-6))
        warm = settings.warmup_ratio * steps
        share = step / warm if step < warm else 0.1 + 0.9 * (steps - step) / (steps - warm)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * share
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


LAYOUTS = [(8, 1), (4, 2), (2, 4)]


@pytest.mark.parametrize(("batch", "accumulation"), LAYOUTS)
@pytest.mark.parametrize("max_grad_norm", [0.2, 100.0])
def test_every_layout_of_a_global_batch_trains_as_the_plainest_loop_does(
    tmp_path: Path, batch: int, accumulation: int, max_grad_norm: float
) -> None:
    changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 6}
    changes |= {"max_grad_norm": max_grad_norm}
    ours, theirs = (distiller_of(dropout=0.0).double() for _ in range(2))
    teacher = teacher_of()
    teacher.language_model.double()
    teacher.head = Head(teacher.head.weight.double(), teacher.head.bias.double())
    teacher.classifier = None
    weights = train(tmp_path, distiller=ours, teacher=teacher, **changes)
    losses = plain_training(theirs, teacher, settings_of(**changes))
    assert [row["loss"] for row in log_rows(tmp_path)] == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(weights, weights_of(theirs), rtol=1e-6, atol=1e-8)
    assert max(float((weights[name] - p).abs().max()) for name, p in weights_of(distiller_of()).items()) > 0.01


def test_the_logged_learning_rate_follows_the_schedule(tmp_path: Path) -> None:
    train(tmp_path, max_steps=5, warmup_ratio=0.4, min_lr_ratio=0.1, learning_rate=1e-2)
    assert [row["learning_rate"] for row in log_rows(tmp_path)] == pytest.approx([0.005, 0.01, 0.007, 0.004, 0.001])
    train(tmp_path / "cosine", lr_scheduler_type="cosine", warmup_ratio=0.0, min_lr_ratio=0.0)
    expected = [5e-3 * (1 + np.cos(np.pi * step / 5)) for step in range(1, 6)]
    assert [row["learning_rate"] for row in log_rows(tmp_path / "cosine")] == pytest.approx(expected)


def test_a_row_of_the_log_is_the_mean_of_its_interval(tmp_path: Path) -> None:
    train(tmp_path / "each")
    train(tmp_path / "pairs", logging_steps=2)
    each, pairs = log_rows(tmp_path / "each"), log_rows(tmp_path / "pairs")
    assert [row["step"] for row in pairs] == [2, 4, 5]
    for key in ("lm_logits.kl_divergence", "lm_labels.hard_cross_entropy"):
        means = [(each[0][key] + each[1][key]) / 2, (each[2][key] + each[3][key]) / 2, each[4][key]]
        assert [row[key] for row in pairs] == pytest.approx(means, rel=1e-6)


def test_dropout_is_on_and_given_by_the_seed_whatever_was_drawn_before(tmp_path: Path) -> None:
    def embedding(folder: str, drawn: int, *, seed: int = 0, dropout: float = 0.3) -> Tensor:
        distiller, teacher = distiller_of(dropout=dropout).eval(), teacher_of()
        torch.manual_seed(drawn)
        return next(iter(train(tmp_path / folder, distiller=distiller, teacher=teacher, seed=seed).values()))

    first = embedding("a", 7)
    assert torch.equal(embedding("b", 8), first)
    assert not torch.equal(embedding("c", 7, seed=1), first)
    assert not torch.equal(embedding("d", 7, dropout=0.0), first)


def test_no_two_micro_steps_draw_the_same_dropout(tmp_path: Path) -> None:
    distiller, seeds = distiller_of(), []
    distiller.register_forward_pre_hook(lambda module, args: seeds.append(torch.initial_seed()))
    train(tmp_path / "a", distiller=distiller)
    train(tmp_path / "b", distiller=distiller, seed=1)
    assert len(seeds) == len(set(seeds)) == 20, "five steps of two, with each of two seeds"


def test_bfloat16_autocast_trains_float32_weights_to_nearly_the_same_loss(tmp_path: Path) -> None:
    losses = {}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(True)
        distiller, folder = distiller_of(dropout=0.0), tmp_path / precision
        trainer = trainer_of(folder, settings_of(learning_rate=1e-3), mixed_precision=precision)
        trainer.run(distiller, teacher_of(), Rows(), Collate(0))
        assert {p.dtype for p in distiller.parameters()} == {torch.float32}
        losses[precision] = [row["loss"] for row in log_rows(folder)]
    assert losses["bf16"] != losses["no"]
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.02)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": None, "num_train_epochs": 2.0}, 3),  # ceil(2 * 18 / 12)
        ({"max_steps": None, "num_train_epochs": 0.1}, 1),
    ],
)
def test_a_stage_lasts_for_its_steps_or_enough_of_them_for_its_epochs(changes: dict[str, Any], steps: int) -> None:
    assert settings_of(**changes).steps(18, world_size=2) == steps


def test_batches_grouped_by_length_see_other_steps_than_random_ones(tmp_path: Path) -> None:
    weights = {}
    for strategy in ("random", "group_by_length", None):
        changes = {"train_sampling_strategy": strategy, "adam_epsilon": 1e-3, "per_device_train_batch_size": 1}
        weights[strategy] = train(tmp_path / str(strategy), distiller=distiller_of(dropout=0.0), **changes)
    assert_identical(weights[None], weights["group_by_length"])  # the choice for texts that differ in length
    with pytest.raises(AssertionError):
        torch.testing.assert_close(weights["group_by_length"], weights["random"], rtol=1e-5, atol=1e-6)


# Layers that are run again in the backward


def saved_for_backward(distiller: Distiller) -> int:
    """Bytes that the forward keeps, parameters included."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = Collate(0)([Rows()[0, i] for i in range(len(Rows()))])
    outputs = teacher_of()(batch)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sums = distiller(batch, outputs)
    assert bool(torch.isfinite(sums).all())
    return sum(sizes.values())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_layers_run_again_in_the_backward_end_in_the_same_bits_of_less_memory(tmp_path: Path, precision: str) -> None:
    weights, saved = [], []
    for checkpointing in (False, True):
        AcceleratorState._reset_state(True)
        distiller, folder = distiller_of(), tmp_path / str(checkpointing)
        trainer = trainer_of(folder, settings_of(gradient_checkpointing=checkpointing), mixed_precision=precision)
        trainer.run(distiller, teacher_of(), Rows(), Collate(0))
        weights.append(weights_of(distiller))
        saved.append(saved_for_backward(distiller))
    assert_identical(*weights)
    assert saved[1] < 0.7 * saved[0]


def test_a_run_that_was_short_of_memory_goes_on_with_layers_run_again_to_the_same_bits(
    tmp_path: Path, uninterrupted: tuple[Weights, list[dict[str, Any]]]
) -> None:
    with pytest.raises(Killed):
        train(tmp_path, teacher=teacher_that(die, 5))
    assert_identical(train(tmp_path, gradient_checkpointing=True), uninterrupted[0])
    assert log_rows(tmp_path) == uninterrupted[1]


# Interruption and resume


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, list[dict[str, Any]]]:
    """Weights and log of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    AcceleratorState._reset_state(True)
    return train(folder), log_rows(folder)


@pytest.mark.parametrize(
    ("call", "workers"), [*((call, (0, 0)) for call in range(10)), *((call, (2, 2)) for call in (3, 6)), (5, (0, 2))]
)
def test_a_run_killed_in_any_micro_step_and_resumed_ends_in_the_same_bits(
    tmp_path: Path, uninterrupted: tuple[Weights, list[dict[str, Any]]], call: int, workers: tuple[int, int]
) -> None:
    with pytest.raises(Killed):
        train(tmp_path, teacher=teacher_that(die, call), workers=workers[0])
    weights = train(tmp_path, workers=workers[1])
    assert_identical(weights, uninterrupted[0])
    assert log_rows(tmp_path) == uninterrupted[1]


def test_a_run_killed_again_and_again_ends_in_the_same_bits(
    tmp_path: Path, uninterrupted: tuple[Weights, list[dict[str, Any]]]
) -> None:
    for _ in range(6):  # a step and a half at a time, with a checkpoint after every step
        try:
            weights = train(tmp_path, teacher=teacher_that(die, 3), save_steps=1)
        except Killed:
            continue
        break
    assert_identical(weights, uninterrupted[0])
    assert log_rows(tmp_path) == uninterrupted[1]


def test_a_task_stage_killed_and_resumed_ends_in_the_same_bits(tmp_path: Path) -> None:
    expected = train(tmp_path / "whole", distiller=distiller_of(TASK))
    with pytest.raises(Killed):
        train(tmp_path / "killed", distiller=distiller_of(TASK), teacher=teacher_that(die, 7))
    assert_identical(train(tmp_path / "killed", distiller=distiller_of(TASK)), expected)


def test_a_damaged_newest_checkpoint_costs_steps_and_changes_no_bit(
    tmp_path: Path, uninterrupted: tuple[Weights, list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        train(tmp_path, teacher=teacher_that(die, 9))
    path = tmp_path / "checkpoints" / "step-000004" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert_identical(train(tmp_path), uninterrupted[0])
    assert "step-000004 is damaged" in caplog.text


def test_a_stage_is_not_continued_by_another_step_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed):
        train(tmp_path, teacher=teacher_that(die, 6))
    monkeypatch.setattr("glmd.training.state.STEP_VERSION", 99)
    made = f"made by training steps of version {STEP_VERSION}, and this glmd makes those of 99; go on with the glmd"
    with pytest.raises(RunError, match=made):
        train(tmp_path)


def test_a_checkpoint_that_does_not_say_by_which_code_it_was_made_is_not_continued(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, teacher=teacher_that(die, 6))
    place = tmp_path / "checkpoints/step-000002"
    state = json.loads((place / "state.json").read_text())
    del state["code"]
    (place / "MANIFEST.json").unlink()
    (place / "state.json").write_text(json.dumps(state))
    write_manifest(place)
    with pytest.raises(RunError, match="made by training steps of version 0"):
        train(tmp_path)


def test_the_losses_of_a_few_steps_are_those_of_this_step_version(
    tmp_path: Path, uninterrupted: tuple[Weights, list[dict[str, Any]]]
) -> None:
    """Where this fails and the change is meant, raise STEP_VERSION and write down the new figures."""
    stages = [uninterrupted, (train(tmp_path, distiller=distiller_of(TASK)), log_rows(tmp_path))]
    found = {}
    for (weights, rows), name in zip(stages, ("corpus", "task"), strict=True):
        found[name] = [row["loss"] for row in rows] + [sum(float(each.norm()) for each in weights.values())]
    assert STEP_VERSION == 2
    assert found == {name: pytest.approx(each, rel=1e-4) for name, each in GOLDEN.items()}


# The losses of five steps, with dropout and accumulation, and what the norms of the weights add up to after them.
GOLDEN = {
    "corpus": [2.468205, 2.006151, 1.900948, 1.655898, 1.535856, 48.13606],
    "task": [0.979239, 1.353575, 1.324274, 1.132827, 1.632724, 48.86838],
}


@pytest.mark.slow
def test_a_changed_comment_in_a_source_file_refuses_no_resume(tmp_path: Path) -> None:
    code = "import glmd.training.state as state; print(state.__file__, state.code_of_a_step())"
    package = Path(glmd.training.trainer.__file__).parents[1]
    shutil.copytree(package, tmp_path / "glmd", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "glmd/training/state.py").open("a", encoding="utf-8") as file:
        file.write("# A comment.\n")
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == [str(tmp_path / "glmd/training/state.py"), *str(code_of_a_step()).split()]


def test_a_run_continued_with_another_torch_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        train(tmp_path, teacher=teacher_that(die, 6))
    monkeypatch.setattr("glmd.training.state.code_of_a_step", lambda: {**code_of_a_step(), "torch": "9.9"})
    train(tmp_path)
    assert f"continues with torch 9.9 after {torch.__version__}, which would end in identical weights" in caplog.text


def test_a_run_continued_with_other_cpu_threads_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_num_threads()
    with pytest.raises(Killed):
        train(tmp_path, teacher=teacher_that(die, 9))
    torch.set_num_threads(before + 1)
    try:
        with caplog.at_level(logging.WARNING):
            train(tmp_path)
    finally:
        torch.set_num_threads(before)
    assert f"{before + 1} CPU threads after {before}" in caplog.text


def test_rows_of_steps_that_are_run_again_are_dropped_and_others_stay(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, teacher=teacher_that(die, 7))  # in step 4; the checkpoint is of step 2
    log = tmp_path / "log.jsonl"
    assert [row["step"] for row in log_rows(tmp_path)] == [1, 2, 3]
    other = json.dumps({"stage": "tasks/RTE/task_lm", "step": 9, "loss": 1.0})
    log.write_text(other + "\n" + log.read_text(encoding="utf-8") + '{"stage": "pretrai', encoding="utf-8")
    seen: list[list[int]] = []
    with pytest.raises(Killed):
        train(tmp_path, teacher=teacher_that(lambda: [seen.append([r["step"] for r in log_rows(tmp_path)]), die()], 0))
    assert seen == [[9, 1, 2]]
    train(tmp_path)
    assert [row["step"] for row in log_rows(tmp_path)] == [9, 1, 2, 3, 4, 5]


def test_a_checkpoint_says_what_models_it_holds(tmp_path: Path) -> None:
    train(tmp_path)
    found = load_checkpoint(tmp_path / "checkpoints")
    assert found is not None and found.state["progress"]["step"] == 4, "the end is saved by the stage, not twice"
    assert found.state["models"]["language_model"]["class"] == "BertForMaskedLM"
    assert found.tensors["model"].keys() == trainable(distiller_of()).keys()


# Signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_step_is_saved(
    tmp_path: Path, uninterrupted: tuple[Weights, list[dict[str, Any]]], number: int, code: int
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted) as stop:
        train(tmp_path, teacher=teacher_that(ask_to_stop(number), 4), save_steps=100)  # in step 3
    assert stop.value.code == code
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert_identical(train(tmp_path), uninterrupted[0])
    assert log_rows(tmp_path) == uninterrupted[1]


def test_a_signal_in_the_middle_of_a_save_lets_it_end_and_saves_the_next_step(
    tmp_path: Path, uninterrupted: tuple[Weights, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first file of step 2 is half a checkpoint; what the signal asks for is the next whole one."""
    from glmd.training import checkpoint

    real, asked = checkpoint.save_file, []

    def save_and_be_asked(tensors: Any, path: Path) -> None:
        real(tensors, path)
        if not asked:
            asked.append(path)
            ask_to_stop()()

    monkeypatch.setattr(checkpoint, "save_file", save_and_be_asked)
    with pytest.raises(Interrupted):
        train(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    assert load_checkpoint_of(tmp_path, 2) and load_checkpoint_of(tmp_path, 3)
    assert_identical(train(tmp_path), uninterrupted[0])


def test_a_second_signal_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(code: int) -> None:
        raise Killed(code)

    def impatient() -> None:
        ask_to_stop()()
        time.sleep(0.3)
        ask_to_stop()()

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr("glmd.runtime.interrupts.TOGETHER", 0.2)
    with pytest.raises(Killed) as stop:
        train(tmp_path, teacher=teacher_that(impatient, 4), save_steps=100)
    assert stop.value.args == (143,) and not (tmp_path / "checkpoints").exists()


def test_a_signal_that_is_told_twice_is_one(tmp_path: Path) -> None:
    """The group had it from `timeout` or Slurm, and the rank from its launcher once more."""
    with pytest.raises(Interrupted):
        train(tmp_path, teacher=teacher_that(lambda: [ask_to_stop()() for _ in range(3)], 4), save_steps=100)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_outside_the_main_thread_training_takes_no_signals(
    tmp_path: Path, uninterrupted: tuple[Weights, list[dict[str, Any]]]
) -> None:
    weights: list[Weights] = []
    thread = threading.Thread(target=lambda: weights.append(train(tmp_path)))
    thread.start()
    thread.join()
    assert_identical(weights[0], uninterrupted[0])


# What is not finite


def test_a_checkpoint_before_the_first_update_is_gone_on_from(tmp_path: Path) -> None:
    """All steps so far were left out, so that AdamW's averages are zeros, and its count of steps is."""
    changes = {"skip_nonfinite": 2, "save_steps": 1}
    expected = train(tmp_path / "whole", teacher=spoiled_at(0, 2), **changes)
    spoiling, calls = spoiled_at(0, 2), iter(range(1000))

    def answer(batch: Batch) -> TeacherOutputs:
        if next(calls) == 5:  # in step 3
            die()
        return spoiling(batch)

    with pytest.raises(Killed):
        train(tmp_path / "killed", teacher=answer, **changes)
    found = load_checkpoint(tmp_path / "killed" / "checkpoints")
    assert found is not None and found.state["progress"]["step"] == 2
    assert not any(each.any() for each in found.tensors["optimizer"].values())
    assert_identical(train(tmp_path / "killed", **changes), expected)


def test_the_speed_is_that_of_training_without_scoring_and_saving(tmp_path: Path) -> None:
    def evaluate(_: Distiller) -> float:
        time.sleep(0.5)
        return 0.0

    trainer = trainer_of(tmp_path, settings_of(), evaluate=evaluate)
    trainer.run(distiller_of(), teacher_of(), Rows(), Collate(0))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_second"] for row in rows if "loss" in row]
    assert min(speeds[1:]) > 6 * 8 / 0.5, "six texts of eight tokens at most, in a step that is scored"


def assert_stopped_at_step_3(folder: Path, distiller: Distiller, error: NumericsError) -> None:
    plan = StepPlan(len(Rows()), 3, 2, 0, 1, 0, "group_by_length", Rows().lengths)
    ids = [i for keys in plan.micro_batches(2, 3) for _, i in keys]
    assert "pretraining: step 3" in str(error) and str(ids) in str(error) and "\n" not in str(error)
    assert error.exit_code == 3
    found = load_checkpoint(folder / "checkpoints")
    assert found is not None and found.state["progress"]["step"] == 2
    assert_identical(weights_of(distiller), found.tensors["model"])
    *good, bad = log_rows(folder)
    assert [row["step"] for row in good] == [1, 2] and bad["step"] == 3 and bad["examples"] == ids
    assert not np.isfinite([*bad["losses"], bad["gradient_norm"]]).all(), "what is not finite is written as it is"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path, value: float) -> None:
    distiller, teacher = distiller_of(), teacher_of()

    def spoil() -> None:
        assert teacher.head is not None and teacher.head.bias is not None
        teacher.head.bias[7] = value

    spoiling = teacher_that(spoil, 5)  # the second micro-step of step 3

    def answer(batch: Batch) -> TeacherOutputs:
        spoiling(batch)
        return teacher(batch)

    with pytest.raises(NumericsError) as stop:
        train(tmp_path, distiller=distiller, teacher=answer)
    assert_stopped_at_step_3(tmp_path, distiller, stop.value)


def test_a_gradient_that_is_not_finite_stops_before_the_step_though_the_loss_is_finite(tmp_path: Path) -> None:
    distiller = distiller_of()
    weight = distiller.language_model.bert.embeddings.word_embeddings.weight
    spoil = teacher_that(lambda: weight.register_hook(lambda gradient: gradient * float("nan")), 4)
    with pytest.raises(NumericsError, match="gradient norm nan") as stop:
        train(tmp_path, distiller=distiller, teacher=spoil)
    assert_stopped_at_step_3(tmp_path, distiller, stop.value)


def test_a_loss_that_is_not_finite_stops_before_the_step_though_the_gradient_is_finite(tmp_path: Path) -> None:
    distiller = distiller_of()
    spoil = teacher_that(lambda: distiller.register_forward_hook(lambda module, args, sums: sums + float("inf")), 4)
    with pytest.raises(NumericsError, match=r"loss \[inf, inf\]") as stop:
        train(tmp_path, distiller=distiller, teacher=spoil)
    assert_stopped_at_step_3(tmp_path, distiller, stop.value)


def spoiled_at(*calls: int) -> Callable[[Batch], TeacherOutputs]:
    """A teacher with a NaN for every token in these micro-steps, as for an example that it cannot read."""
    teacher, number = teacher_of(), iter(range(10_000))

    def answer(batch: Batch) -> TeacherOutputs:
        sound = teacher.head
        teacher.head = sound._replace(bias=sound.bias * float("nan")) if next(number) in calls else sound
        outputs = teacher(batch)
        teacher.head = sound
        return outputs

    return answer


def test_as_many_bad_steps_as_tolerated_are_left_out_and_the_next_one_stops(tmp_path: Path) -> None:
    spoiled = spoiled_at(2, 5, 6)  # in steps 2, 3 and 4
    with pytest.raises(NumericsError, match=r"step 4: .*; skip_nonfinite 2 is used up"):
        train(tmp_path, teacher=spoiled, skip_nonfinite=2)
    rows = log_rows(tmp_path)
    assert [row["step"] for row in rows if "examples" in row] == [2, 3, 4]
    assert [np.isfinite(row["loss"]) for row in rows if "loss" in row] == [True, False, False], "no NaN is hidden"
    found = load_checkpoint(tmp_path / "checkpoints")
    assert found is not None and found.state["progress"]["skipped"] == 1


def test_a_step_that_is_not_finite_changes_no_weight_though_the_next_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host reads of it a step later; who waits for each step ends in the same weights, and logs the same."""
    rare = {"logging_steps": 100, "save_steps": 100, "skip_nonfinite": 2}
    ours = train(tmp_path / "later", teacher=spoiled_at(2, 5), **rare)
    monkeypatch.setattr(Trainer, "_waits", True)
    assert_identical(train(tmp_path / "at once", teacher=spoiled_at(2, 5), **rare), ours)
    assert all(each.isfinite().all() for each in ours.values())
    rows = [log_rows(tmp_path / name) for name in ("later", "at once")]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [2, 3, 5]
    with pytest.raises(NumericsError, match=r"step 3: .*skip_nonfinite 1 is used up"):
        train(tmp_path / "stopped", teacher=spoiled_at(2, 5), **rare | {"skip_nonfinite": 1})


def test_a_step_that_is_left_out_changes_no_weight_and_no_moment(tmp_path: Path) -> None:
    distiller = distiller_of()
    train(tmp_path, distiller=distiller, teacher=spoiled_at(4), skip_nonfinite=1, max_steps=4, save_steps=1)
    before, after = (load_checkpoint_of(tmp_path, step) for step in (2, 3))
    for group in ("model", "optimizer"):
        assert_identical(after[group], before[group])
    assert all(bool(torch.isfinite(p).all()) for p in distiller.parameters())


def load_checkpoint_of(folder: Path, step: int) -> dict[str, Weights]:
    place = folder / "checkpoints" / f"step-{step:06d}"
    return {name: load_file(place / f"{name}.safetensors") for name in ("model", "optimizer")}


def test_how_many_steps_were_left_out_is_remembered_over_a_resume(tmp_path: Path) -> None:
    bad, dying = spoiled_at(2), teacher_that(die, 8)  # in step 2; in step 5, after the checkpoint of step 4
    with pytest.raises(Killed):
        train(tmp_path, teacher=lambda batch: (dying(batch), bad(batch))[1], skip_nonfinite=1)
    with pytest.raises(NumericsError, match="skip_nonfinite 1 is used up"):
        train(tmp_path, teacher=spoiled_at(0), skip_nonfinite=1)


@pytest.mark.parametrize("scores", [None, {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.2, 5: 0.2, 6: 0.2, 7: 0.3}])
def test_a_stage_that_gets_longer_ends_in_the_bits_of_one_begun_so(
    tmp_path: Path, scores: dict[int, float] | None
) -> None:
    """Where the learning rate is constant and no weight fades; killed in its last step, and evaluated there or not."""

    def to_the_end(folder: Path, steps: int, call: int = -1) -> Weights:
        distiller = distiller_of(Objective((MASKED_LABELS, Term("lm_logits", "kl_divergence"))))
        settings = settings_of(max_steps=steps, lr_scheduler_type="constant", warmup_ratio=0.0)
        evaluate = None if scores is None else lambda _: scores[trainer.progress.step]
        trainer = trainer_of(folder, settings, evaluate=evaluate)
        trainer.run(distiller, teacher_that(die, call), Rows(), Collate(0))
        return weights_of(distiller)

    with pytest.raises(Killed):
        to_the_end(tmp_path / "longer", 5, call=9)
    assert_identical(to_the_end(tmp_path / "longer", 7), to_the_end(tmp_path / "whole", 7))


# Selection


SCORES = {3: 0.5, 6: 0.9, 7: 0.9}  # an epoch is 3 steps of 6; after the last step too


def train_and_select(
    folder: Path, scores: dict[int, float], teacher: Callable[[Batch], TeacherOutputs] | None = None, **changes: Any
) -> tuple[Distiller, TrainingResult, dict[int, Weights]]:
    """A run of 7 steps scored by `scores`; also the weights at each evaluation."""
    distiller, seen = distiller_of(), {}

    def evaluate(scored: Distiller) -> float:
        assert scored is distiller
        distiller.eval()
        step = trainer.progress.step
        seen[step] = weights_of(distiller)
        return scores[step]

    trainer = trainer_of(folder, settings_of(max_steps=7, **changes), evaluate=evaluate)
    return distiller, trainer.run(distiller, teacher or teacher_of(), Rows(), Collate(0)), seen


@pytest.mark.parametrize(
    ("scores", "best"), [(SCORES, 6), ({3: 0.5, 6: 0.4, 7: 0.1}, 3), ({3: -2.0, 6: -1.5, 7: -1.0}, 7)]
)
def test_the_best_of_the_evaluated_weights_are_kept_and_of_equals_the_first(
    tmp_path: Path, scores: dict[int, float], best: int
) -> None:
    distiller, result, seen = train_and_select(tmp_path, scores)
    assert list(seen) == [3, 6, 7] and result.best_step == best
    assert_identical(weights_of(distiller), seen[best])
    assert [row for row in log_rows(tmp_path) if "score" in row] == [
        {"stage": "pretraining", "step": step, "score": score} for step, score in scores.items()
    ]
    assert len(list((tmp_path / "best").iterdir())) == 1


def test_evaluation_leaves_no_trace_in_the_training(tmp_path: Path) -> None:
    _, _, seen = train_and_select(tmp_path / "selected", {3: 0.0, 6: 0.0, 7: 1.0})
    assert_identical(seen[7], train(tmp_path / "plain", max_steps=7))


@pytest.mark.parametrize("save_steps", [1, 4])
@pytest.mark.parametrize("scores", [SCORES, {3: 0.5, 6: 0.4, 7: 0.1}])
def test_a_resumed_run_selects_what_an_uninterrupted_one_does(
    tmp_path: Path, scores: dict[int, float], save_steps: int
) -> None:
    expected, result, _ = train_and_select(tmp_path / "whole", scores)
    for call in (7, 13):  # after the evaluation of step 3, after that of step 6
        folder = tmp_path / f"killed-{call}"
        with pytest.raises(Killed):
            train_and_select(folder, scores, teacher_that(die, call), save_steps=save_steps)
        resumed, again, _ = train_and_select(folder, scores, save_steps=save_steps)
        assert_identical(weights_of(resumed), weights_of(expected))
        assert again.best_step == result.best_step
        assert log_rows(folder) == log_rows(tmp_path / "whole")


def test_a_run_killed_in_the_middle_of_an_evaluation_ends_in_the_same_bits(tmp_path: Path) -> None:
    expected, result, _ = train_and_select(tmp_path / "whole", SCORES)

    class DyingScores(dict[int, float]):
        def __getitem__(self, step: int) -> float:
            return die() if step == 6 else super().__getitem__(step)  # type: ignore[func-returns-value]

    with pytest.raises(Killed):
        train_and_select(tmp_path / "killed", DyingScores(SCORES))
    resumed, again, _ = train_and_select(tmp_path / "killed", SCORES)
    assert_identical(weights_of(resumed), weights_of(expected))
    assert again.best_step == result.best_step == 6


def test_a_better_score_that_does_not_come_again_after_a_resume_leaves_a_student(tmp_path: Path) -> None:
    with pytest.raises(Killed):  # the best weights of step 6 took the place of those of step 3
        train_and_select(tmp_path, SCORES, teacher_that(die, 13), save_steps=4)
    distiller, result, seen = train_and_select(tmp_path, {6: 0.3, 7: 0.2}, save_steps=4)
    assert result.best_step == 6
    assert_identical(weights_of(distiller), seen[6])


def test_a_score_that_is_not_finite_chooses_no_best_weights(tmp_path: Path) -> None:
    """Nothing would ever be better than NaN, and the first epoch would be kept without a word."""
    with pytest.raises(NumericsError, match="the score that the best checkpoint is chosen by is nan"):
        train_and_select(tmp_path, {3: math.nan, 6: 0.3, 7: 0.1})


def test_best_weights_of_steps_that_are_run_again_are_forgotten(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train_and_select(tmp_path, SCORES, teacher_that(die, 13), save_steps=4)
    best = tmp_path / "best"
    shutil.copytree(best / "step-000006", best / "step-000003")  # a kill before the older ones were removed
    _, result, _ = train_and_select(tmp_path, {6: 0.3, 7: 0.2}, save_steps=4)
    assert result.best_step == 3 and [path.name for path in best.iterdir()] == ["step-000003"]
