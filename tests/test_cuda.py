"""The promises of docs/reliability.md on a GPU: `pytest -m cuda`, within five minutes on one card.

Sums whose order is left to chance show as a difference of bits in a few steps; models are as large as that needs.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_trainer import Killed, assert_identical, weights_of
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from glmd.data.batches import Batch, Collate, Examples
from glmd.data.blocks import BlockDataset
from glmd.data.masking import Masking
from glmd.data.sampling import StepPlan, step_batches
from glmd.distillation.distiller import Distiller
from glmd.distillation.objective import Objective, Term
from glmd.distillation.teacher import OnlineTeacher, TeacherOutputs
from glmd.losses.head import Head
from glmd.losses.linear import linear_distillation_loss
from glmd.runtime.determinism import cublas_workspace, same_bits
from glmd.stage_config import StageConfig
from glmd.training.log import RunLog
from glmd.training.trainer import Trainer
from glmd.vocabulary.vocabulary import Vocabulary

pytestmark = pytest.mark.cuda

V, STEPS = 3001, 30
SETTINGS = StageConfig(
    max_steps=STEPS,
    per_device_train_batch_size=16,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    logging_steps=10,
    save_steps=7,
)
WORDS = Term("lm_logits", "kl_divergence", options={"temperature": 15.0})
LABELS = Term("lm_labels", "hard_cross_entropy", 0.3, "masked")
TASK = Term("task_labels", "hard_cross_entropy")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps one state for the process. Flushing to disk is another file's matter, and slow."""
    monkeypatch.setattr("glmd.storage.sync_to_disk", lambda path: None)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


class Rows:
    """Texts of 20 to 200 random words, a fifth of them masked."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.rows = [rng.integers(5, V, int(rng.integers(20, 200))) for _ in range(256)]
        self.masking = Masking(0.2, 4, np.arange(5), np.arange(5, V), seed=1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        ids, labels = self.masking(self.rows[key[1]], key)
        return {"input_ids": ids, "lm_labels": labels, "labels": key[1] % 2, "example_id": key[1]}


def bert(head: Any, layers: int, dropout: float) -> Any:
    torch.manual_seed(layers)
    return head(
        BertConfig(
            vocab_size=V,
            hidden_size=256,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=512,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def llama(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(layers)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=256,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=512,
        )
    )


Pair = tuple[Distiller, Any, Vocabulary]  # a student in training, and the teacher with the vocabulary to ask it by


def masked_pair() -> Pair:
    """Language model and classifier that share a backbone, under both kinds of terms."""
    models = bert(BertForMaskedLM, 2, 0.1), bert(BertForSequenceClassification, 2, 0.1)
    objective = Objective((WORDS, LABELS, TASK))
    distiller = Distiller(objective, np.arange(V), language_model=models[0], classifier=models[1])
    return distiller, bert(BertForMaskedLM, 3, 0.0), Vocabulary.identity(V)


def causal_pair() -> Pair:
    return Distiller(Objective((WORDS,)), np.arange(V), language_model=llama(2)), llama(3), Vocabulary.identity(V)


def merging_pair() -> Pair:
    """Dropped words give their probability to kept ones: sums over rows in any order, if nobody sees to it."""
    kept = V // 2
    vocabulary = Vocabulary(np.arange(kept), np.arange(V) % kept)
    config = bert(BertForMaskedLM, 2, 0.1).config
    config.vocab_size = kept
    distiller = Distiller(Objective((WORDS,)), vocabulary.token_map, language_model=BertForMaskedLM(config))
    return distiller, bert(BertForMaskedLM, 3, 0.0), vocabulary


def dropout_pair() -> Pair:
    """Words alone, of a student with dropout."""
    student = bert(BertForMaskedLM, 2, 0.1)
    return (
        Distiller(Objective((WORDS,)), np.arange(V), language_model=student),
        bert(BertForMaskedLM, 3, 0.0),
        Vocabulary.identity(V),
    )


PAIRS: dict[str, Callable[[], Pair]] = {
    "masked": masked_pair,
    "causal": causal_pair,
    "merging": merging_pair,
    "dropout": dropout_pair,
}


def train(folder: Path, pair: str, precision: str, *, dies_at: int | None = None) -> dict[str, torch.Tensor]:
    """A stage on the GPU, going on from what is there. dies_at: before the teacher answers this micro-batch."""
    folder.mkdir(exist_ok=True)
    AcceleratorState._reset_state(True)
    with cublas_workspace(True):
        accelerator = Accelerator(mixed_precision=precision)
        distiller, model, vocabulary = PAIRS[pair]()
        teacher = OnlineTeacher(model.to(accelerator.device), None, vocabulary, merge_dropped=pair == "merging")
        calls = iter(range(10**6))

        def answer(batch: Batch) -> TeacherOutputs:
            if next(calls) == dies_at:
                raise Killed
            return teacher(batch)

        log = RunLog(folder / "log.jsonl", accelerator)
        with same_bits(accelerator.device, True):
            Trainer(accelerator, folder, "pretraining", SETTINGS, 0, log).run(distiller, answer, Rows(), Collate(0))
    return {name: tensor.cpu() for name, tensor in weights_of(distiller).items()}


def test_batches_come_pinned_and_the_same_from_any_number_of_workers() -> None:
    rows: Any = Rows()
    plan = StepPlan(len(rows), 16, 2, 0, 1, seed=0)
    steps = [
        [
            batch
            for step in step_batches(rows, plan, Collate(0), start_step=0, stop_step=6, num_workers=workers)
            for batch in step
        ]
        for workers in (0, 2)
    ]
    for alone, ahead in zip(*steps, strict=True):
        assert alone.keys() == ahead.keys()
        for name, tensor in alone.items():
            assert tensor.is_pinned() and ahead[name].is_pinned() and torch.equal(tensor, ahead[name]), name


@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
@pytest.mark.parametrize("pair", PAIRS)
def test_equal_stages_and_one_that_was_killed_end_in_the_same_bits(tmp_path: Path, pair: str, precision: str) -> None:
    first = train(tmp_path / "first", pair, precision)
    assert_identical(train(tmp_path / "second", pair, precision), first)
    with pytest.raises(Killed):
        train(tmp_path / "killed", pair, precision, dies_at=2 * 17 + 1)
    assert_identical(train(tmp_path / "killed", pair, precision), first)
    moved = [not torch.equal(a, b) for a, b in zip(first.values(), weights_of(PAIRS[pair]()[0]).values(), strict=True)]
    assert all(moved), "what does not learn proves nothing"


def students(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.relative_to(run)} {name}": tensor
        for path in sorted(run.rglob("model.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_through_all_stages_on_a_gpu_is_proved_and_ends_in_the_same_bits_after_a_kill(
    tiny: Any, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run dies in a later stage, whose loss scale of fp16 is that of a run that was not disturbed."""
    from glmd.pipeline.run import run

    given = [f"mixed_precision={precision}", "pretraining.max_steps=40", "controls.hard_labels=false"]
    results = run(tiny.config(tmp_path / "first", *given))
    assert results["exports_verified"]
    real, seen = Trainer._step, []

    def step(self: Trainer, *rest: Any) -> Any:
        seen.append(self.stage)
        if seen.count("tasks/RTE/seed-0/task_lm") == 3:
            raise Killed
        return real(self, *rest)

    monkeypatch.setattr(Trainer, "_step", step)
    with pytest.raises(Killed):
        run(tiny.config(tmp_path / "second", *given))
    monkeypatch.setattr(Trainer, "_step", real)
    run(tiny.config(tmp_path / "second", *given))
    ours, theirs = students(tmp_path / "second"), students(tmp_path / "first")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_export_is_proved_where_products_are_rounded_to_tf32(tiny: Any, tmp_path: Path) -> None:
    from glmd.pipeline.run import run

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert run(tiny.config(tmp_path / "run", "controls.hard_labels=false"))["exports_verified"]
    finally:
        torch.set_float32_matmul_precision(before)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["exports_verified"]


@pytest.mark.parametrize(
    "loss", ["kl_divergence", "cross_entropy", "reverse_kl", "generalized_js", "hard_cross_entropy"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_says_what_plain_torch_says_and_the_same_twice(loss: str, dtype: torch.dtype) -> None:
    from glmd.losses.linear import triton_problem
    from glmd.losses.rows import EagerRows, LossSpec
    from glmd.losses.triton_rows import TritonRows

    device = torch.device("cuda")
    assert triton_problem(device, dtype) is None
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(200, 30528, generator=generator).to(device, dtype) for _ in range(2))
    given = torch.arange(200, device=device) if loss == "hard_cross_entropy" else teacher
    task = LossSpec(loss, 1.0 if loss == "hard_cross_entropy" else 15.0)
    values, gradients = [], []
    for rows in (TritonRows(task), TritonRows(task), EagerRows(task, student, given)):
        gradient = student.clone()
        values.append(rows(gradient, given.clone(), None))
        gradients.append(gradient)
    assert torch.equal(values[0], values[1]) and torch.equal(gradients[0], gradients[1])
    torch.testing.assert_close(values[0], values[2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=2e-2, atol=1e-6)


class Blocks(BlockDataset):
    """Full texts of random words."""

    def __init__(self) -> None:
        self.ids = np.random.default_rng(0).integers(5, V, (256, 64))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Examples:
        numbers = np.array([number for _, number in keys])
        tokens = {"input_ids": self.ids[numbers].reshape(-1)}
        return Examples(np.full(len(keys), 64), tokens, {"example_id": numbers})


def stage_on_blocks(
    folder: Path, pair: str, *, replays: bool, compiles: bool = False, dies_at: int | None = None
) -> tuple[dict[str, torch.Tensor], Trainer]:
    folder.mkdir(exist_ok=True)
    AcceleratorState._reset_state(True)
    with cublas_workspace(True):
        accelerator = Accelerator(mixed_precision="bf16")
        distiller, model, vocabulary = PAIRS[pair]()
        distiller.objective = Objective((WORDS,))
        teacher = OnlineTeacher(model.to(accelerator.device), None, vocabulary)
        log = RunLog(folder / "log.jsonl", accelerator)
        trainer = Trainer(accelerator, folder, "pretraining", SETTINGS, 0, log, 2, compiles=compiles, replays=replays)
        real = trainer._step

        def step(*given: Any) -> Any:
            if given[-2] == dies_at:
                raise Killed
            return real(*given)

        trainer._step = step  # type: ignore[method-assign]
        with same_bits(accelerator.device, True):
            trainer.run(distiller, teacher, Blocks(), Collate(0))
    return {name: tensor.cpu() for name, tensor in weights_of(distiller).items()}, trainer


@pytest.mark.parametrize("pair", ["causal", "dropout"])
def test_replayed_steps_end_in_the_bits_of_steps_that_are_not_and_of_a_stage_that_was_killed(
    tmp_path: Path, pair: str
) -> None:
    expected, trainer = stage_on_blocks(tmp_path / "eager", pair, replays=False)
    assert trainer.replayed is None
    replayed, trainer = stage_on_blocks(tmp_path / "replayed", pair, replays=True)
    assert trainer.replayed is not None and len(trainer.replayed.recorded) == 1, "else nothing was replayed"
    assert_identical(replayed, expected)
    with pytest.raises(Killed):
        stage_on_blocks(tmp_path / "killed", pair, replays=True, dies_at=17)
    assert_identical(stage_on_blocks(tmp_path / "killed", pair, replays=True)[0], expected)


def test_compiled_steps_end_in_the_same_bits_when_the_stage_was_killed(tmp_path: Path) -> None:
    expected, _ = stage_on_blocks(tmp_path / "whole", "causal", replays=False, compiles=True)
    with pytest.raises(Killed):
        stage_on_blocks(tmp_path / "killed", "causal", replays=False, compiles=True, dies_at=17)
    assert_identical(stage_on_blocks(tmp_path / "killed", "causal", replays=False, compiles=True)[0], expected)


def test_a_step_on_a_gpu_waits_for_nothing_but_the_step_before(tmp_path: Path) -> None:
    """torch's own guard says where the host waits; the one place is `_settle`."""
    real = Trainer._step

    def guarded(self: Trainer, *given: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error" if given[-2] > 5 else "default")
        try:
            return real(self, *given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", guarded)
        stage_on_blocks(tmp_path / "stage", "causal", replays=False)
        assert train(tmp_path / "texts", "masked", "bf16")


@pytest.mark.parametrize(
    "loss", ["kl_divergence", "reverse_kl", "js_divergence", "generalized_js", "cross_entropy", "skew_kl"]
)
@pytest.mark.parametrize("words", [1001, 3000])
def test_a_loss_on_a_gpu_is_that_of_float64_whatever_the_number_of_words(loss: str, words: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=generator) for s in ((300, 64), (words, 64), (words,)))
    weight = weight / 4

    def gradients(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [each.to(device, dtype).requires_grad_() for each in (hidden, weight, bias)]
        theirs = [(each + 0.1 * each.roll(1, 0)).to(device, dtype) for each in (hidden, weight, bias)]
        factor = torch.tensor(1 / 300, device=device)
        value = linear_distillation_loss(
            leaves[0],
            Head(*leaves[1:]),
            theirs[0],
            Head(*theirs[1:]),
            loss=loss,
            temperature=15.0,
            factor=factor,
        )
        return [value.detach().cpu().double()] + [g.cpu().double() for g in torch.autograd.grad(value, leaves)]

    exact = gradients("cpu", torch.float64)
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        for ours, expected in zip(gradients("cuda", dtype)[1:], exact[1:], strict=True):
            assert ours.shape == expected.shape
            if dtype == torch.float32:
                assert ((ours - expected).norm() / expected.norm()).item() < most
            else:  # inputs were rounded too, so only the order of it
                assert ((ours - expected).norm() / expected.norm()).item() < 10 * most
