"""A training step with the live teacher against one that reads the teacher's hidden states, in one process.

    python benchmarks/cache.py MODEL --corpus TEXT --layers 3 --batch 16 --length 128 --rounds 7

The two steps alternate on the same batches, so that a busy machine slows both alike; read the ratios. A step is the
teacher, student, loss, backward, clipping and AdamW. R is the live teacher's time over that of the rest of a step: no
cache can do better than R + 1. Reads come from the page cache, as they do where the memory holds a masking of the
corpus. The gradient's error is that of all student parameters together.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from glmd.cache import CachedTeacher, TeacherCache
from glmd.config import StageConfig, StudentConfig, TeacherConfig
from glmd.data.batches import BlockDataset, Collate, StepPlan, corruption_for, step_batches
from glmd.data.corpus import build_token_store
from glmd.distiller import Distiller
from glmd.heads import final_linear
from glmd.loading import load_language_model, load_source_tokenizer
from glmd.objective import load_method
from glmd.student import build_student
from glmd.teacher import OnlineTeacher
from glmd.trainer import Teacher, make_optimizer
from glmd.vocabulary import build_vocabulary


def gradient(distiller: Distiller, teacher: Teacher, batch: dict[str, Any]) -> torch.Tensor:
    """All of the student's gradients as one row, without dropout."""
    distiller.eval()
    distiller(batch, teacher(batch)).sum().backward()
    found = torch.cat([p.grad.flatten() for p in distiller.parameters() if p.grad is not None])
    distiller.zero_grad()
    distiller.train()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a masked or causal LM: folder or hub id")
    parser.add_argument("--corpus", nargs="+", required=True)
    parser.add_argument("--layers", type=int, default=3, help="of the student")
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--texts", type=int, default=256, help="blocks of the corpus to keep")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the teacher")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, Path(folder))


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Make a cache, take the steps, print the table."""
    tokenizer = load_source_tokenizer(arguments.model, words=False)
    store = build_token_store(folder / "corpus", arguments.corpus, tokenizer)
    source = load_language_model(TeacherConfig(arguments.model))
    probability = 0.15 if tokenizer.mask_token_id is not None else 0.0
    blocks = BlockDataset(
        store,
        tokenizer,
        max_length=arguments.length,
        blocks=range(arguments.texts),
        corruption=corruption_for(tokenizer, probability, 0, 1),
    )
    embeddings = source.get_input_embeddings().weight.detach()
    vocabulary = build_vocabulary(
        tokenizer, embeddings, store.counts(len(tokenizer)), keep_ratio=arguments.keep_ratio, mapping="inner_product"
    )
    student = build_student(source, vocabulary, StudentConfig(num_hidden_layers=arguments.layers), seed=0)
    teacher = load_language_model(TeacherConfig(arguments.model, dtype=arguments.dtype))
    width, collate = final_linear(teacher).weight.shape[1], Collate(tokenizer.pad_token_id or 0)
    cache = TeacherCache(
        folder / "cache", ((blocks, 1),), width=width, dtype=arguments.dtype, made_from={"model": arguments.model}
    )
    missing, began = cache.missing(), time.perf_counter()
    cache.begin()
    for number in missing:
        cache.write_shard(number, teacher, collate, batch_size=arguments.batch)
    cache.finish()
    making = time.perf_counter() - began

    distiller = Distiller(load_method("glmd")["pretraining"], vocabulary.token_map, language_model=student)
    optimizer = make_optimizer(distiller, StageConfig(max_steps=1, learning_rate=1e-5))
    teachers: dict[str, Teacher] = {
        "live": OnlineTeacher(teacher, None, vocabulary),
        "cached": CachedTeacher(cache.open(), teacher, vocabulary),
    }
    plan = StepPlan(len(blocks), arguments.batch, 1, 0, 1, seed=0)
    batches = [batch for (batch,) in step_batches(blocks, plan, collate, start_step=0, stop_step=arguments.rounds + 1)]
    exact, ours = (gradient(distiller, each, batches[0]) for each in teachers.values())
    error = ((ours - exact).norm() / exact.norm()).item()

    def step(asked: Teacher, batch: dict[str, Any], took: list[tuple[float, float]]) -> None:
        start = time.perf_counter()
        outputs = asked(batch)
        middle = time.perf_counter()
        distiller(batch, outputs).sum().div(batch["attention_mask"].sum()).backward()
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        took.append((middle - start, time.perf_counter() - start))

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in teachers}
    for batch in batches:  # the first round warms up and is not counted
        for name, asked in teachers.items():
            step(asked, batch, times[name])
    ms = {name: [1000 * median(each[i] for each in took[1:]) for i in range(2)] for name, took in times.items()}
    rest = median(1000 * (whole - asked) for each in times.values() for asked, whole in each[1:])
    tokens = int(median(int(batch["attention_mask"].sum()) for batch in batches))
    on_disk = sum(path.stat().st_size for path in (folder / "cache").iterdir())
    ratio = median(live[1] / cached[1] for live, cached in zip(times["live"][1:], times["cached"][1:], strict=True))
    bound = 1 + ms["live"][0] / rest

    print(f"{arguments.model}: H {width}, {arguments.dtype}; ", end="")
    print(f"student of {arguments.layers} layers, {vocabulary.size} words")
    print(f"{tokens} tokens a step; median of {arguments.rounds} rounds; torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads\n\n| teacher | teacher ms | step ms | tokens/s |\n|---|---|---|---|")
    for name, (teacher_ms, step_ms) in ms.items():
        print(f"| {name} | {teacher_ms:.1f} | {step_ms:.0f} | {1000 * tokens / step_ms:.0f} |")
    print(f"\nstep {ratio:.2f} times faster; R + 1 = {bound:.2f}, of which {ratio / bound:.0%}")
    print(f"gradient error {error:.1e}; {on_disk / cache.num_tokens:.0f} bytes a token on disk")
    print(f"made in {making:.1f} s, {cache.num_tokens / making:.0f} tokens/s")


if __name__ == "__main__":
    main()
