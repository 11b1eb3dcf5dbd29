"""What the same bits cost on a GPU: steps with and without `deterministic: true`, in turn, in one process.

    python benchmarks/deterministic.py
    python benchmarks/deterministic.py --shape 2,1,64,500 --batch 2 --length 16 --rounds 1     # seconds, on a CPU: 1.00

Teacher and student are BERTs with random weights, in bf16; the step is the trainer's own. Blocks of steps of both kinds
take turns, so that a busy machine slows both alike; read the ratio. Both have cuBLAS's variable, which a process reads
once: what that alone costs is not in the ratio.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from step import OBJECTIVE, Shape, Texts

from glmd.data.batches import Batch, Collate
from glmd.distillation.distiller import Distiller
from glmd.distillation.teacher import OnlineTeacher
from glmd.runtime.determinism import cublas_workspace, same_bits
from glmd.stage_config import StageConfig
from glmd.training.ahead import Fed, to_device
from glmd.training.log import RunLog
from glmd.training.trainer import Trainer

BLOCK = 5  # steps that are timed together: a step alone ends before its work on the device


def seconds_per_step(shape: Shape, rounds: int, precision: str, folder: Path) -> dict[bool, list[float]]:
    """Of each block of steps with (True) and without the switches; the first round warms up and is left out."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
    device, vocabulary = accelerator.device, shape.vocabulary()
    model = shape.model(shape.teacher_layers, shape.words).to(device, torch.bfloat16)
    teacher = OnlineTeacher(model, None, vocabulary)
    student = shape.model(shape.student_layers, len(vocabulary.kept_ids))
    distiller = Distiller(OBJECTIVE, vocabulary.token_map, language_model=student)
    settings = StageConfig(max_steps=10**6, learning_rate=1e-5)
    trainer = Trainer(accelerator, folder, "step", settings, 0, RunLog(folder / "log.jsonl", accelerator))
    wrapped, _, optimizer = trainer._prepare(distiller)
    wrapped.train()
    batches, number = _batches(shape), iter(range(1, 10**6))

    def block() -> float:
        began = time.perf_counter()
        for _ in range(BLOCK):
            batch = next(batches)
            fed = Fed(batch, {name: to_device(each, device) for name, each in batch.items()}, None)
            trainer._step(wrapped, optimizer, teacher, [fed], next(number), 10**6)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / BLOCK

    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds + 1):
        for wanted, times in found.items():
            with same_bits(device, wanted):
                times.append(block())
    return {wanted: times[1:] for wanted, times in found.items()}


def _batches(shape: Shape) -> Iterator[Batch]:
    texts, collate = Texts(shape, BLOCK), Collate(0)
    return cycle(
        [
            collate([texts[0, i] for i in range(first, first + shape.batch)])
            for first in range(0, len(texts), shape.batch)
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="12,6,768,30522", help="layers of teacher and student, hidden size, words")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--keep-ratio", type=float, default=0.5, help="share of words in the student")
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16", "fp16"))
    parser.add_argument("--rounds", type=int, default=8)
    given = parser.parse_args()
    shape = Shape(
        *map(int, given.shape.split(",")), batch=given.batch, length=given.length, keep_ratio=given.keep_ratio
    )
    with cublas_workspace(True), tempfile.TemporaryDirectory() as folder:
        found = seconds_per_step(shape, given.rounds, given.precision, Path(folder))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, where there is no difference"
    with_bits, without = (1e3 * median(found[wanted]) for wanted in (True, False))
    print(f"{device}, torch {torch.__version__}, {shape}")
    print(f"deterministic: true {with_bits:.1f} ms a step, false {without:.1f} ms: ratio {with_bits / without:.2f}")


if __name__ == "__main__":
    main()
