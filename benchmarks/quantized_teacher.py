"""What 8 and 4 bits a weight make of a teacher: its error, its bytes, and the time of its forward.

    python benchmarks/quantized_teacher.py MODEL --corpus TEXT

All teachers are loaded by glmd and read the same masked texts, in turn, in one process; on a GPU where there is one.
Prints a Markdown table: KL in nats a token from the float32 teacher over the whole vocabulary, at temperature 1 and at
GLMD's 15; share of tokens with the same likeliest token; MiB of weights with scales; milliseconds of a batch, median.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from glmd.config import TeacherConfig
from glmd.data.batches import Batch, Collate
from glmd.data.blocks import BlockDataset
from glmd.data.masking import masking_for
from glmd.data.token_store import build_token_store
from glmd.distillation.teacher import OnlineTeacher
from glmd.losses.logits import kl_divergence
from glmd.models.loading import load_language_model
from glmd.models.quantization import quantized_savings
from glmd.models.source_tokenizer import load_source_tokenizer
from glmd.planning.checks import model_on_meta
from glmd.vocabulary.vocabulary import Vocabulary

WAYS = [("float32", None), ("float32", "8bit"), ("float32", "4bit"), ("bfloat16", None), ("bfloat16", "8bit")]
WAYS += [("bfloat16", "4bit")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a masked or causal LM: folder or hub id")
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="over all texts, alternating")
    arguments = parser.parse_args()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    tokenizer = load_source_tokenizer(arguments.model, kind=None)
    teachers = [teacher_of(arguments.model, dtype, kind, len(tokenizer), device) for dtype, kind in WAYS]
    sums, seconds = torch.zeros(len(WAYS), 3, dtype=torch.double), [[] for _ in WAYS]  # type: ignore[var-annotated]
    for turn in range(arguments.rounds):
        for batch in batches(arguments, tokenizer):
            answers = [answer(teacher, batch, times) for teacher, times in zip(teachers, seconds, strict=True)]
            for total, ours in zip(sums, answers if turn == 0 else (), strict=False):
                near = [kl_divergence(ours, answers[0], temperature=t).mean().item() for t in (1.0, 15.0)]
                total += torch.tensor([*near, (ours.argmax(-1) == answers[0].argmax(-1)).double().mean().item()])
    count = -(-arguments.texts // arguments.batch)
    print("| weights | KL at 1 | KL at 15 | same top token | MiB | ms a batch |\n|---|---:|---:|---:|---:|---:|")
    for (dtype, kind), total, times in zip(WAYS, sums / count, seconds, strict=True):
        size = bytes_of(teachers[0].base.config, getattr(torch, dtype), kind) / 2**20
        figures = (
            f"{total[0]:.1e} | {total[1]:.1e} | {total[2]:.2%} | {size:.1f} | {statistics.median(times) * 1e3:.0f}"
        )
        print(f"| {dtype}{f', layers in {kind}' if kind else ''} | {figures} |")


def teacher_of(model: str, dtype: Any, kind: Any, size: int, device: torch.device) -> OnlineTeacher:
    found = load_language_model(TeacherConfig(model, dtype=dtype, quantization=kind), device=device)
    return OnlineTeacher(found.to(device), None, Vocabulary.identity(size))


def bytes_of(config: Any, dtype: torch.dtype, kind: Any) -> int:
    model = model_on_meta("teacher", config).to(dtype)
    return sum(each.nbytes for each in model.parameters()) - (quantized_savings(model, kind) if kind else 0)


def batches(arguments: argparse.Namespace, tokenizer: Any) -> Iterator[Batch]:
    probability = 0.15 if tokenizer.mask_token_id is not None else 0.0
    with tempfile.TemporaryDirectory() as folder:
        store = build_token_store(Path(folder) / "corpus", arguments.corpus, tokenizer)
        masking, texts = masking_for(tokenizer, probability, 0, 1), range(arguments.texts)
        blocks = BlockDataset(store, tokenizer, max_length=arguments.length, blocks=texts, masking=masking)
        for first in range(0, len(blocks), arguments.batch):
            rows = range(first, min(first + arguments.batch, len(blocks)))
            yield Collate(tokenizer.pad_token_id or 0)(blocks.__getitems__([(0, row) for row in rows]))


def answer(teacher: OnlineTeacher, batch: Batch, times: list[float]) -> torch.Tensor:
    """(N, V) logits; the time is that of the hidden states, which is what a stage asks for."""
    began = time.perf_counter()
    outputs = teacher(batch)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    times.append(time.perf_counter() - began)
    assert outputs.head is not None and outputs.hidden_states is not None
    return outputs.head.logits(outputs.hidden_states).float()


if __name__ == "__main__":
    main()
