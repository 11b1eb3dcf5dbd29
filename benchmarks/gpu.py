"""What a run takes on a GPU: the loss, whole steps, the loader and the cache, beside what else is in use. Minutes.

    python benchmarks/gpu.py --json gpu.json
    pip install --no-deps liger-kernel==0.8.5 orda-kernel       # whose losses are then measured too

Prints Markdown with the card and the versions. Every table is of one process, its variants in turn, so read the ratios.
The usual loop is what one writes by hand: transformers models, SDPA, bfloat16 autocast, fused AdamW, the KL on float32
logits of both models, nothing compiled. Ours is the trainer of a run on blocks of random words, its loader and log
included; a step's time is that of the last steps, which run freely. `--tiny` shows on any machine that all of it runs.
"""

import argparse
import copy
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from linear_loss import TEMPERATURE, Inputs, make_inputs, naive_without_pads
from step import OBJECTIVE
from torch.nn.functional import kl_div, linear
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from glmd.data.batches import Collate, Examples
from glmd.data.blocks import BlockDataset
from glmd.data.masking import Masking
from glmd.data.sampling import StepPlan, loader_workers, step_batches
from glmd.distillation.cached_teacher import CachedTeacher
from glmd.distillation.distiller import Distiller
from glmd.distillation.teacher import OnlineTeacher
from glmd.distillation.teacher_cache import TeacherCache
from glmd.losses.head import Head
from glmd.losses.linear import chunk_tokens, linear_distillation_loss
from glmd.runtime.determinism import cublas_workspace, same_bits
from glmd.stage_config import StageConfig
from glmd.training.log import RunLog
from glmd.training.trainer import Trainer
from glmd.vocabulary.vocabulary import Vocabulary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Tokens, hidden size of student and teacher, kept words.
LOSSES = [
    (16384, 4096, 4096, 128256),
    (16384, 1024, 4096, 128256),
    (16384, 1024, 1024, 128256),
    (16384, 768, 768, 30522),
    (16384, 768, 768, 15261),
    (8192, 384, 384, 15261),
]
TINY_LOSSES = [(64, 16, 24, 150)]


# The loss


def usual(inputs: Inputs) -> None:
    """Full logits in float32, as a careful loop has them."""
    student = linear(inputs.student_hidden, inputs.student_weight).float() / TEMPERATURE
    with torch.no_grad():
        teacher = linear(inputs.teacher_hidden, inputs.teacher_weight).float() / TEMPERATURE
    logs = student.log_softmax(-1), teacher.log_softmax(-1)
    (TEMPERATURE**2 * kl_div(*logs, reduction="sum", log_target=True) / len(student)).backward()


def ours(inputs: Inputs) -> None:
    """As in a step: the mean over tokens is a factor of the loss."""
    heads = Head(inputs.student_weight), Head(inputs.teacher_weight)
    pairs = inputs.student_hidden, heads[0], inputs.teacher_hidden, heads[1]
    linear_distillation_loss(*pairs, temperature=TEMPERATURE, factor=1 / len(inputs.mask)).backward()


def liger(inputs: Inputs, *, compiled: bool) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss: Any = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=0.0,
        temperature=TEMPERATURE,
        compiled=compiled,
        chunk_size=1024,
    )
    labels = torch.zeros(len(inputs.mask), dtype=torch.int64, device=DEVICE)
    models = inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight
    (loss(*models, labels) * TEMPERATURE**2).backward()


def orda(inputs: Inputs) -> None:
    from orda_kernel import SeparateTeacher, distillation_loss

    labels = torch.zeros(len(inputs.mask), dtype=torch.int64, device=DEVICE)
    teacher = SeparateTeacher(inputs.teacher_hidden, inputs.teacher_weight)
    found = distillation_loss(
        inputs.student_hidden,
        inputs.student_weight,
        labels,
        teacher,
        student_ce_weight=0.0,
        kl_weight=1.0,
        kl_temperature=TEMPERATURE,
    )
    found[0].backward()


def products(inputs: Inputs) -> Callable[[Inputs], None]:
    """The floor: our four chunked products alone, on weights of whole multiples of 64 rows, everything prepared."""
    student, teacher = inputs.student_hidden.detach(), inputs.teacher_hidden
    fill = (0, 0, 0, -len(inputs.student_weight) % 64)
    weights = [torch.nn.functional.pad(each.detach(), fill) for each in (inputs.student_weight, inputs.teacher_weight)]
    size = chunk_tokens(len(student), len(weights[0]), DEVICE.type, student.element_size())
    logits = student.new_empty(2, size, len(weights[0]))
    grad_hidden, grad_weight = torch.empty_like(student), torch.empty_like(weights[0], dtype=torch.float32)
    wide = {"out_dtype": torch.float32} if student.dtype != torch.float32 and DEVICE.type == "cuda" else {}
    if not wide:
        grad_weight = grad_weight.to(student.dtype)

    def run(_: Inputs) -> None:
        for start in range(0, len(student), size):
            chunk = slice(start, min(start + size, len(student)))
            first, second = (each[: chunk.stop - start] for each in logits)
            torch.mm(teacher[chunk], weights[1].t(), out=second)
            torch.mm(student[chunk], weights[0].t(), out=first)
            torch.mm(first, weights[0], out=grad_hidden[chunk])
            beta = 0 if start == 0 else 1
            torch.addmm(grad_weight, first.t(), student[chunk], beta=beta, out=grad_weight, **wide)

    return run


def milliseconds(function: Callable[[], None]) -> float:
    if DEVICE.type != "cuda":
        began = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - began)
    begins, ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begins.record()
    function()
    ends.record()
    ends.synchronize()
    return float(begins.elapsed_time(ends))


def of_loss(shape: tuple[int, int, int, int], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Medians of each variant, the memory that ours takes beside gradients, and its gradient's error."""
    n, student, teacher, words = shape
    inputs = make_inputs(n, student, teacher, words, 0.0, DEVICE.type).to(dtype)
    variants: dict[str, Callable[[Inputs], None]] = {"floor": products(inputs), "ours": ours}
    variants |= {
        "Liger": lambda each: liger(each, compiled=False),
        "Liger compiled": lambda each: liger(each, compiled=True),
        "orda": orda,
        "usual": usual,
        "usual narrow": naive_without_pads,
    }
    found: dict[str, Any] = {}
    times: dict[str, list[float]] = {}

    def call(function: Callable[[Inputs], None]) -> Callable[[], None]:
        def run() -> None:
            inputs.student_hidden.grad = inputs.student_weight.grad = None
            function(inputs)

        return run

    for name, function in list(variants.items()):
        try:
            for _ in range(2):  # to compile, and to take memory
                call(function)()
            times[name] = []
        except Exception as error:  # not installed, or too large for the card
            del variants[name]
            print(f"{name}: {type(error).__name__} {str(error)[:80]}", file=sys.stderr)
    for _ in range(rounds):
        for name in times:
            times[name].append(milliseconds(call(variants[name])))
    found |= {name: median(each) for name, each in times.items()}
    if DEVICE.type == "cuda":
        call(ours)()
        inputs.student_hidden.grad = inputs.student_weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ours(inputs)
        gradients = sum(each.numel() * each.element_size() for each in inputs.gradients)
        found["MiB beside gradients"] = (torch.cuda.max_memory_allocated() - before - gradients) / 2**20
    return found


# Steps


@dataclass(frozen=True)
class Pair:
    """Teacher and student of a step, and its batch of full texts."""

    name: str
    family: str
    layers: tuple[int, int]
    hidden_size: int
    words: int
    kept: int
    batch: int
    length: int

    def model(self, layers: int, words: int) -> Any:
        heads, options = max(1, self.hidden_size // 64), {"vocab_size": words, "num_hidden_layers": layers}
        torch.manual_seed(layers)
        if self.family == "llama":
            config = LlamaConfig(
                hidden_size=self.hidden_size,
                intermediate_size=4 * self.hidden_size,
                num_attention_heads=heads,
                num_key_value_heads=max(1, heads // 4),
                tie_word_embeddings=True,
                **options,
            )
            return LlamaForCausalLM(config)
        heads = 12 if self.hidden_size == 384 else heads  # MiniLM's
        positions = max(512, self.length)
        config = BertConfig(
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.hidden_size,
            num_attention_heads=heads,
            max_position_embeddings=positions,
            **options,
        )
        return BertForMaskedLM(config)

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(np.arange(self.kept), np.minimum(np.arange(self.words), self.kept - 1))


PAIRS = [
    Pair("BERT-base 64 x 512", "bert", (12, 6), 768, 30522, 15296, 64, 512),
    Pair("BERT-base 32 x 128", "bert", (12, 6), 768, 30522, 15296, 32, 128),
    Pair("MiniLM 32 x 128", "bert", (6, 3), 384, 30522, 15296, 32, 128),
    Pair("Llama 1B 8 x 1024", "llama", (16, 8), 2048, 128256, 128256, 8, 1024),
]
TINY_PAIRS = [Pair("tiny", "bert", (2, 1), 64, 200, 128, 2, 16)]


class Blocks(BlockDataset):
    """Blocks of random words, masked as BERT's are, of a corpus that has no end."""

    def __init__(self, pair: Pair) -> None:
        self.ids = np.random.default_rng(0).integers(5, pair.words, (256, pair.length))
        self.max_length = pair.length
        is_masked = pair.family == "bert"
        self.masking = Masking(0.15, 4, np.arange(5), np.arange(5, pair.words), 0) if is_masked else None

    def __len__(self) -> int:
        return 10**6

    @property
    def num_tokens(self) -> int:
        return self.ids.size

    def __getitems__(self, keys: list[tuple[int, int]]) -> Examples:
        numbers = np.array([[epoch, number, 0] for epoch, number in keys])
        rows = self.ids[numbers[:, 1] % len(self.ids)]
        lengths, tokens = np.full(len(keys), rows.shape[1]), {"input_ids": rows.reshape(-1).copy()}
        examples = Examples(lengths, tokens, {"example_id": numbers[:, 1]})
        return examples if self.masking is None else self.masking.corrupt(examples, numbers)


def seconds_of_usual(pair: Pair, steps: int) -> float:
    """The loop that one writes by hand, fed with batches that lie on the device."""
    teacher = pair.model(pair.layers[0], pair.words).to(DEVICE).eval().requires_grad_(False)
    student = pair.model(pair.layers[1], pair.kept).to(DEVICE).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(5, pair.words, (pair.batch, pair.length), device=DEVICE)
    mask = torch.ones_like(ids)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            with torch.no_grad():
                theirs = teacher(input_ids=ids, attention_mask=mask).logits[..., : pair.kept]
            logits = student(input_ids=ids.clamp(max=pair.kept - 1), attention_mask=mask).logits
        logs = [(each.float() / TEMPERATURE).log_softmax(-1) for each in (logits, theirs)]
        (TEMPERATURE**2 * kl_div(*logs, reduction="sum", log_target=True) / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        step()
    return _seconds(lambda: [step() for _ in range(steps)]) / steps


def _seconds(function: Callable[[], Any]) -> float:
    _wait()
    began = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def of_run(pair: Pair, steps: int, *, deterministic: bool, cached: bool = False, **options: Any) -> dict[str, float]:
    """Milliseconds of a step of a run, its tokens a second, and the most memory in GB."""
    AcceleratorState._reset_state(True)
    with cublas_workspace(deterministic), tempfile.TemporaryDirectory() as name:
        folder, accelerator = Path(name), Accelerator(mixed_precision="bf16", cpu=DEVICE.type == "cpu")
        model = pair.model(pair.layers[0], pair.words).to(DEVICE, torch.bfloat16)
        data, collate, vocabulary = Blocks(pair), Collate(0), pair.vocabulary
        teacher: Any = OnlineTeacher(model, None, vocabulary)
        if cached:
            teacher = _cached(teacher, model, data, vocabulary, folder / "cache")
        distiller = Distiller(
            OBJECTIVE, vocabulary.token_map, language_model=pair.model(pair.layers[1], pair.kept).to(DEVICE)
        )
        settings = StageConfig(
            max_steps=20 + steps, learning_rate=1e-5, per_device_train_batch_size=pair.batch, logging_steps=10**6
        )
        workers = loader_workers(None, DEVICE)
        trainer = Trainer(
            accelerator, folder, "step", settings, 0, RunLog(folder / "log.jsonl", accelerator), workers, **options
        )
        real, moments = trainer._step, []

        def step(*rest: Any) -> Any:
            if rest[-2] == 21:
                _wait()
                moments.append(time.perf_counter())
            return real(*rest)

        trainer._step = step  # type: ignore[method-assign]
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with same_bits(DEVICE, deterministic):
            trainer.run(distiller, teacher, data, collate)
        seconds = (time.perf_counter() - moments[0]) / steps
        peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else math.nan
        replayed = float(trainer.replayed is not None and len(trainer.replayed.recorded) > 0)
    tokens = pair.batch * pair.length
    return {"ms": 1e3 * seconds, "tokens/s": tokens / seconds, "GB": peak, "replayed": replayed}


class _First(Blocks):
    """As many blocks as are kept."""

    def __len__(self) -> int:
        return 256


def _cached(live: OnlineTeacher, model: Any, data: Blocks, vocabulary: Vocabulary, folder: Path) -> CachedTeacher:
    """What a teacher says of the blocks, on disk; the data are then of one masking, and no longer than that."""
    data.__class__, data.masking = _First, None
    width = model.config.hidden_size
    cache = TeacherCache(folder, ((data, 1),), width=width, dtype="bfloat16", made_from={})
    missing = cache.missing()
    cache.begin()
    for number in missing:
        cache.write_shard(number, live, Collate(0), batch_size=32)
    cache.finish()
    return CachedTeacher(cache.open(), model, vocabulary, device=DEVICE)


VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {"deterministic": False},
    "ours, deterministic": {"deterministic": True},
    "ours, no graphs": {"deterministic": False, "replays": False},
    "ours, compiled": {"deterministic": False, "compiles": True},
    "ours, cached": {"deterministic": False, "cached": True},
}


def of_loader(pair: Pair, batches: int) -> float:
    """Tokens a second of the loader of a run, alone."""
    plan, data = StepPlan(10**6, pair.batch, 1, 0, 1, 0), Blocks(pair)
    workers = loader_workers(None, DEVICE)
    made = step_batches(data, plan, Collate(0), start_step=0, stop_step=batches + 5, num_workers=workers)
    for _ in range(5):
        next(made)
    began = time.perf_counter()
    for _ in range(batches):
        next(made)
    seconds = time.perf_counter() - began
    made.close()
    return batches * pair.batch * pair.length / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--parts", default="loss,steps,loader", help="which of these")
    parser.add_argument("--variants", default=";".join(VARIANTS), help="of steps")
    parser.add_argument("--rounds", type=int, default=8, help="calls of each loss")
    parser.add_argument("--steps", type=int, default=40, help="steps that are timed together")
    parser.add_argument("--seconds", type=float, default=300, help="begin nothing more after so long")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    began, figures = time.perf_counter(), {}
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}, transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}")

    def has_time() -> bool:
        return time.perf_counter() - began < given.seconds

    if "loss" in given.parts:
        shapes = [(each, torch.bfloat16) for each in (TINY_LOSSES if given.tiny else LOSSES)]
        shapes += [] if given.tiny else [((16384, 768, 768, 30522), torch.float32)]
        names = ("floor", "ours", "Liger", "Liger compiled", "orda", "usual", "usual narrow", "MiB beside gradients")
        print(f"\n| tokens, H student, H teacher, K | x floor | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}")
        for shape, dtype in shapes:
            if not has_time():
                break
            found = of_loss(shape, dtype, given.rounds)
            title = ", ".join(map(str, shape)) + (", fp32" if dtype == torch.float32 else "")
            figures[f"loss {title}"] = found
            cells = [f"{found[name]:.2f}" if name in found else "" for name in names]
            print(f"| {title} | {found['ours'] / found['floor']:.2f} | {' | '.join(cells)} |", flush=True)
    if "steps" in given.parts:
        wanted = [name for name in VARIANTS if name in given.variants.split(";")]
        print(f"\n| ms a step | usual | {' | '.join(wanted)} |\n|{'---|' * (len(wanted) + 2)}")
        for pair in TINY_PAIRS if given.tiny else PAIRS:
            if not has_time():
                break
            steps = 2 if given.tiny else given.steps
            found = {"usual": {"ms": 1e3 * seconds_of_usual(pair, steps)}}
            cells = [f"{found['usual']['ms']:.1f}"]
            for name in wanted:
                if not has_time():
                    break
                try:
                    found[name] = of_run(pair, steps, **copy.deepcopy(VARIANTS[name]))
                except RuntimeError as error:
                    cells.append(str(error)[:60])
                    continue
                times = found["usual"]["ms"] / found[name]["ms"]
                cells.append(f"{found[name]['ms']:.1f} ({times:.2f} x, {found[name]['GB']:.1f} GB)")
            figures[f"step {pair.name}"] = found
            print(f"| {pair.name} | {' | '.join(cells)} |", flush=True)
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
    if "loader" in given.parts:
        for pair in TINY_PAIRS if given.tiny else PAIRS[1:3]:
            figures[f"loader {pair.name}"] = of_loader(pair, 20 if given.tiny else 500)
            print(f"\nloader alone, {pair.name}: {figures[f'loader {pair.name}']:,.0f} tokens/s")
    print(f"\n{time.perf_counter() - began:.0f} s")
    if given.json is not None:
        given.json.write_text(json.dumps({"card": card, "torch": torch.__version__, "figures": figures}, indent=1))


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
