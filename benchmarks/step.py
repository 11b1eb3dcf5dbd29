"""A whole training step of glmd against the usual loop and against TextBrewer's, in one process.

    python benchmarks/step.py --rounds 5
    python benchmarks/step.py --shape 2,1,128,2000 --batch 4 --length 32      # seconds: to see that it runs

Teacher and student are BERTs with random weights. The variants alternate, one step each per round, so that a busy
machine slows all alike; read the ratios. The naive loop is what is usually written: the logits of both models at every
position, `kl_div`, the mask at the end, AdamW as torch makes it, all in float32. TextBrewer's step is that of its
`GeneralDistiller`, called in the package (PyPI `textbrewer`) where it can be imported, else a twin of it. Ours is the
trainer's own step, with the precision of a run: "bf16" is `mixed_precision: bf16` with `teacher.dtype: bfloat16`.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from linear_loss import TEMPERATURE, resident_extra_mib
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, softmax
from transformers import BertConfig, BertForMaskedLM

import glmd.distillation.distiller
from glmd.data.batches import Batch, Collate
from glmd.distillation.cached_teacher import CachedTeacher
from glmd.distillation.distiller import Distiller
from glmd.distillation.objective import Objective, Term
from glmd.distillation.teacher import OnlineTeacher
from glmd.distillation.teacher_cache import TeacherCache
from glmd.stage_config import StageConfig
from glmd.training.ahead import Fed
from glmd.training.log import RunLog
from glmd.training.optimizer import make_optimizer
from glmd.training.trainer import Teacher, Trainer
from glmd.vocabulary.vocabulary import Vocabulary

OBJECTIVE = Objective((Term("lm_logits", "kl_divergence", options={"temperature": TEMPERATURE}),))
PIECES = ("teacher", "student forward", "loss", "backward", "clip", "optimizer", "rest")
VARIANTS = ("naive fp32", "TextBrewer", "ours fp32", "ours fp32, cache", "ours bf16", "ours bf16, cache")
FURTHER = ("ours bf16, checkpointing", "ours fp32, compiled", "ours bf16, compiled")


@dataclass(frozen=True)
class Shape:
    """The sizes of both models, and the batch."""

    teacher_layers: int = 12
    student_layers: int = 6
    hidden_size: int = 768
    words: int = 30522
    batch: int = 8
    length: int = 128
    pad: float = 0.3  # share of padding
    keep_ratio: float = 1.0  # of words, in the student
    accumulation: int = 1  # micro-batches of a step, of `batch` texts each; ours alone

    def model(self, layers: int, words: int) -> BertForMaskedLM:
        torch.manual_seed(layers)
        return BertForMaskedLM(
            BertConfig(
                vocab_size=words,
                hidden_size=self.hidden_size,
                intermediate_size=4 * self.hidden_size,
                num_hidden_layers=layers,
                num_attention_heads=max(1, self.hidden_size // 64),
                max_position_embeddings=max(512, self.length),
            )
        )

    def vocabulary(self) -> Vocabulary:
        """The first words are kept; which ones costs the same."""
        kept = max(2, round(self.keep_ratio * self.words))
        return Vocabulary(np.arange(kept), np.minimum(np.arange(self.words), kept - 1))


class Texts:
    """Texts of random words whose lengths lie evenly around 1 - pad of the longest; as a data set of the corpus is."""

    def __init__(self, shape: Shape, count: int) -> None:
        lengths = np.linspace(1 - 2 * shape.pad, 1, shape.batch) * shape.length
        rng = np.random.default_rng(0)
        self.rows = [
            rng.integers(1, shape.words, max(1, int(lengths[i % shape.batch])))
            for i in range(count * shape.accumulation * shape.batch)
        ]
        self.longest, self.num_tokens = shape.length, sum(map(len, self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return {"input_ids": self.rows[key[1]], "example_id": key[1]}


@dataclass
class Watch:
    """Seconds of each piece of each step, by wall clock or by this process's share of the processor."""

    clock: Callable[[], float]
    steps: list[dict[str, float]] = field(default_factory=list)

    @contextmanager
    def piece(self, name: str) -> Iterator[None]:
        start = self.clock()
        yield
        self.steps[-1][name] = self.steps[-1].get(name, 0.0) + self.clock() - start

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.piece(name):
                return function(*args, **kwargs)

        return timed

    def step(self, function: Callable[[], None]) -> None:
        self.steps.append({})
        with self.piece("step"):
            function()
        self.steps[-1]["rest"] = 2 * self.steps[-1]["step"] - sum(self.steps[-1].values())

    def median(self, name: str) -> float:
        """Of all steps but the first, which warms up."""
        return median(each.get(name, 0.0) for each in self.steps[1:])


@dataclass
class Variant:
    """One way to train: a function that takes a step, its watch, and how many MiB it holds between steps."""

    run: Callable[[], None]
    watch: Watch
    held: float


def mib(*tensors: Tensor) -> float:
    distinct = {each.data_ptr(): each.numel() * each.element_size() for each in tensors}
    return sum(distinct.values()) / 2**20


def naive(teacher: nn.Module, student: nn.Module, batches: Iterator[Batch], watch: Watch) -> Variant:
    """The loop that one writes by hand."""
    student.train()
    optimizer, words = torch.optim.AdamW(student.parameters(), lr=1e-5), student.config.vocab_size

    def step() -> None:
        batch = next(batches)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with watch.piece("teacher"), torch.no_grad():
            theirs = teacher(**inputs).logits[..., :words]
        with watch.piece("student forward"):
            ours = student(**inputs | {"input_ids": inputs["input_ids"].clamp(max=words - 1)}).logits
        with watch.piece("loss"):
            log_q, p = log_softmax(ours / TEMPERATURE, dim=-1), softmax(theirs / TEMPERATURE, dim=-1)
            of_tokens = kl_div(log_q, p, reduction="none").sum(-1) * TEMPERATURE**2
            loss = (of_tokens * inputs["attention_mask"]).sum() / inputs["attention_mask"].sum()
        _finish(loss, student, optimizer, watch)

    return Variant(step, watch, _held(teacher, student))


def textbrewer(teacher: nn.Module, student: nn.Module, batches: Iterator[Batch], watch: Watch) -> Variant:
    """The step of TextBrewer's GeneralDistiller on the logits of both models."""
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    loss_of = _package_loss(teacher, student) or _twin_loss(teacher, student)

    def step() -> None:
        batch = next(batches)
        with watch.piece("student forward"):  # and the teacher's, and the loss
            loss = loss_of({name: batch[name] for name in ("input_ids", "attention_mask")})
        _finish(loss, student, optimizer, watch)

    return Variant(step, watch, _held(teacher, student))


def _package_loss(teacher: nn.Module, student: nn.Module) -> Callable[[Batch], Tensor] | None:
    """The package's own `train_on_batch`; None where it is not installed, or does not import any more."""
    try:
        from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
    except ImportError:
        return None

    def adaptor(batch: Batch, outputs: Any) -> dict[str, Any]:
        return {"logits": (outputs.logits,), "logits_mask": (batch["attention_mask"],)}

    settings = DistillationConfig(temperature=TEMPERATURE, kd_loss_type="ce", kd_loss_weight=TEMPERATURE**2)
    training = TrainingConfig(device="cpu", output_dir=tempfile.gettempdir(), log_dir=None)
    distiller = GeneralDistiller(training, settings, teacher, student, adaptor, adaptor)
    return lambda batch: distiller.train_on_batch(batch, {})[0]


def _twin_loss(teacher: nn.Module, student: nn.Module) -> Callable[[Batch], Tensor]:
    """What that does, written plainly: `get_outputs_from_batch`, `select_logits_with_mask`, `kd_ce_loss`."""

    def loss_of(batch: Batch) -> Tensor:
        with torch.no_grad():
            theirs = teacher(**batch).logits
        ours = student(**batch).logits
        mask = batch["attention_mask"].unsqueeze(-1).expand_as(ours).bool()
        ours, theirs = (torch.masked_select(each, mask).view(-1, each.shape[-1]) for each in (ours, theirs))
        p = softmax(theirs / TEMPERATURE, dim=-1)
        return TEMPERATURE**2 * -(p * log_softmax(ours / TEMPERATURE, dim=-1)).sum(dim=-1).mean()

    return loss_of


def _finish(loss: Tensor, student: nn.Module, optimizer: torch.optim.Optimizer, watch: Watch) -> None:
    with watch.piece("backward"):
        loss.backward()
    with watch.piece("clip"):
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    with watch.piece("optimizer"):
        optimizer.step()
        optimizer.zero_grad()


def ours(
    teacher: Teacher,
    distiller: Distiller,
    batches: Iterator[Batch],
    watch: Watch,
    *,
    mixed_precision: str,
    teacher_tensors: list[Tensor],
    settings: StageConfig,
    folder: Path,
    accumulation: int,
) -> Variant:
    """The trainer's own step, between the places where a run prepares and logs."""
    AcceleratorState._reset_state(True)  # one process has one precision otherwise
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    trainer = Trainer(accelerator, folder, "step", settings, seed=0, log=RunLog(folder / "log.jsonl", accelerator))
    model, optimizer = accelerator.prepare(distiller, make_optimizer(distiller, settings))
    model.train()
    model.forward = watch.around("student forward", model.forward)
    optimizer.step = watch.around("optimizer", optimizer.step)
    is_cached, done = isinstance(teacher, CachedTeacher), iter(range(1, settings.max_steps))
    asked = teacher if is_cached else watch.around("teacher", teacher)  # reading a cache is part of the rest
    accelerator.backward = watch.around("backward", accelerator.backward)
    accelerator.clip_grad_norm_ = watch.around("clip", accelerator.clip_grad_norm_)
    loss = watch.around("loss", glmd.distillation.distiller.linear_distillation_loss)

    def step() -> None:
        with patch.object(glmd.distillation.distiller, "linear_distillation_loss", loss):
            given = [next(batches) for _ in range(accumulation)]
            micro_batches = [Fed(batch, batch, teacher(batch) if is_cached else None) for batch in given]
            trainer._step(model, optimizer, asked, micro_batches, next(done), settings.max_steps)
        times = watch.steps[-1]
        times["student forward"] -= times["loss"]

    return Variant(step, watch, _held(None, distiller) + mib(*teacher_tensors))


def _held(teacher: nn.Module | None, student: nn.Module) -> float:
    """MiB of both models' weights, and of AdamW's two averages of the student's."""
    theirs = list(teacher.parameters()) if teacher is not None else []
    return mib(*theirs) + 3 * mib(*(p for p in student.parameters() if p.requires_grad))


def make_variants(
    shape: Shape, names: list[str], clock: Callable[[], float], rounds: int, folder: Path
) -> dict[str, Variant]:
    """The variants by name. All see the same batches, and begin with the same student."""
    texts, collate, vocabulary = Texts(shape, rounds + 2), Collate(0), shape.vocabulary()
    ids = [range(first, first + shape.batch) for first in range(0, len(texts), shape.batch)]
    batches = [collate([texts[0, i] for i in each]) for each in ids]
    teacher = shape.model(shape.teacher_layers, shape.words).eval().requires_grad_(False)
    half = copy.deepcopy(teacher).to(torch.bfloat16)
    student = shape.model(shape.student_layers, len(vocabulary.kept_ids))
    settings = StageConfig(max_steps=1000, learning_rate=1e-5)

    def variant(name: str) -> Variant:
        watch, mine, given = Watch(clock), copy.deepcopy(student), iter(batches)
        if name in ("naive fp32", "TextBrewer"):
            return (naive if name == "naive fp32" else textbrewer)(teacher, mine, given, watch)
        precision = "bf16" if "bf16" in name else "no"
        model = half if precision == "bf16" else teacher
        distiller = Distiller(OBJECTIVE, vocabulary.token_map, language_model=mine)
        make = partial(
            ours, mixed_precision=precision, settings=settings, folder=folder, accumulation=shape.accumulation
        )
        if "cache" not in name:
            live: Teacher = OnlineTeacher(model, None, vocabulary)
            if "compiled" in name:
                live = OnlineTeacher(_compiled(model), None, vocabulary)
                mine.bert = torch.compile(mine.bert, dynamic=True)
            if "checkpointing" in name:
                distiller.recompute_activations()
            return make(live, distiller, given, watch, teacher_tensors=list(model.parameters()))
        cached = CachedTeacher(_cache(texts, model, vocabulary, folder / name).open(), model, vocabulary)
        return make(cached, distiller, given, watch, teacher_tensors=[cached.head.weight, cached.head.bias])

    return {name: variant(name) for name in names}


def _cache(texts: Texts, model: Any, vocabulary: Vocabulary, folder: Path) -> TeacherCache:
    """What the model says of all texts, on disk."""
    width, dtype = model.config.hidden_size, str(model.dtype).removeprefix("torch.")
    cache = TeacherCache(folder, ((texts, 1),), width=width, dtype=dtype, made_from={})
    missing, teacher = cache.missing(), OnlineTeacher(model, None, vocabulary)
    cache.begin()
    for number in missing:
        cache.write_shard(number, teacher, Collate(0), batch_size=8)
    cache.finish()
    return cache


def _compiled(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.bert = torch.compile(model.bert, dynamic=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="12,6,768,30522", help="layers of teacher and student, hidden size, words")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--pad", type=float, default=0.3, help="share of padding, below 0.5")
    parser.add_argument("--keep-ratio", type=float, default=1.0, help="share of words in the student")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", default=";".join(VARIANTS), help=f"of {'; '.join((*VARIANTS, *FURTHER))}")
    parser.add_argument("--cpu-time", action="store_true", help="the process's time, where the machine is busy")
    arguments = parser.parse_args()
    names = [name.strip() for name in arguments.variants.split(";")]
    if arguments.keep_ratio < 1 and "TextBrewer" in names:
        parser.error("--keep-ratio: TextBrewer has no smaller vocabulary; leave it out of --variants")
    sizes = [int(x) for x in arguments.shape.split(",")]
    shape = Shape(*sizes, arguments.batch, arguments.length, arguments.pad, arguments.keep_ratio)
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, names, shape, Path(folder))


def compare(arguments: argparse.Namespace, names: list[str], shape: Shape, folder: Path) -> None:
    """Take the steps, print the tables."""
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    variants = make_variants(shape, names, clock, arguments.rounds, folder)
    peaks: dict[str, float | None] = {}
    for number in range(arguments.rounds + 1):
        for name, variant in variants.items():
            variant.watch.step(variant.run)
            if number == 0:  # AdamW's averages are there now; the second step is like all others
                peaks[name] = resident_extra_mib(partial(variant.watch.step, variant.run))
                del variant.watch.steps[-1]
    tokens = round(shape.batch * shape.length * (1 - shape.pad))
    print(f"{shape}; about {tokens} tokens; {'process' if arguments.cpu_time else 'wall'} time, median of")
    print(f"{arguments.rounds} rounds; torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    first = variants[names[0]].watch.median("step")
    print(f"| variant | s a step | tokens/s | speed-up over {names[0]} | peak MiB of a step | MiB held |")
    print("|---|---|---|---|---|---|")
    for name, variant in variants.items():
        step, peak = variant.watch.median("step"), peaks[name]
        cells = [name, f"{step:.3g}", f"{tokens / step:.0f}", f"{first / step:.2f}"]
        print("| " + " | ".join([*cells, "" if peak is None else f"{peak:.0f}", f"{variant.held:.0f}"]) + " |")
    print(f"\n| ms of | {' | '.join(PIECES)} |")
    print("|---" * (len(PIECES) + 1) + "|")
    for name, variant in variants.items():
        taken = variant.watch.steps[-1]
        cells = [f"{1000 * variant.watch.median(piece):.0f}" if piece in taken else "-" for piece in PIECES]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
