"""A training step with the live teacher against those that read what it said, in one process.

    python benchmarks/cache.py MODEL --corpus TEXT --layers 3 --batch 16 --length 128 --rounds 7
    python benchmarks/cache.py MODEL --corpus TEXT --stage task_soft_labels

The steps alternate on the same batches, so that a busy machine slows all alike; read the ratios. A step is the teacher,
student, loss, backward, clipping and AdamW. The floor is the step of a teacher whose answer is there already: live over
floor is R + 1, and no cache can do better. Reads come from the page cache, as they do where the memory holds a masking
of the corpus. The gradient's error is that of all student parameters together, without dropout.

stage task_lm, task_soft_labels: pairs of sentences cut from the corpus and a task head that was not trained, which
costs what a trained one does.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from glmd.config import StudentConfig, TeacherConfig
from glmd.data.batches import Collate
from glmd.data.blocks import BlockDataset, block_texts
from glmd.data.masking import masking_for
from glmd.data.sampling import StepPlan, step_batches
from glmd.data.token_store import build_token_store
from glmd.distillation.cached_teacher import CachedTeacher
from glmd.distillation.distiller import Distiller
from glmd.distillation.methods import load_method
from glmd.distillation.teacher import OnlineTeacher, TeacherOutputs
from glmd.distillation.teacher_cache import TeacherCache
from glmd.models.heads import final_linear
from glmd.models.loading import load_language_model
from glmd.models.source_tokenizer import load_source_tokenizer
from glmd.models.student import build_student
from glmd.stage_config import StageConfig
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.examples import TaskExample
from glmd.tasks.forms import task_form
from glmd.tasks.loading import load_classifier
from glmd.tasks.tasks import load_task
from glmd.training.optimizer import make_optimizer
from glmd.training.trainer import Teacher
from glmd.vocabulary.build import build_vocabulary


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
    parser.add_argument("--stage", default="pretraining", choices=("pretraining", "task_lm", "task_soft_labels"))
    parser.add_argument("--layers", type=int, default=3, help="of the student")
    parser.add_argument(
        "--near",
        type=float,
        help="a student that is its teacher but for noise of this share: gradients "
        "are small there, and errors weigh most",
    )
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--texts", type=int, default=256, help="blocks of the corpus to keep")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the teacher")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments, Path(folder))


def pairs(blocks: BlockDataset, tokenizer: Any, length: int) -> TaskDataset:
    """Two texts of a block's length together, cut from the blocks' words."""
    words, half = " ".join(block_texts(blocks, tokenizer)).split(), length // 3
    starts = range(0, len(words) - 2 * half, 2 * half)
    texts = [(" ".join(words[i : i + half]), " ".join(words[i + half : i + 2 * half])) for i in starts]
    examples = [TaskExample(i, (pair,), 0) for i, pair in enumerate(texts)]
    return TaskDataset(examples, task_form(load_task("RTE"), kind="masked"), tokenizer, max_length=length)


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Make the caches, take the steps, print the table."""
    tokenizer = load_source_tokenizer(arguments.model, kind=None)
    store = build_token_store(folder / "corpus", arguments.corpus, tokenizer)
    source = load_language_model(TeacherConfig(arguments.model))
    probability = 0.15 if tokenizer.mask_token_id is not None else 0.0
    blocks = BlockDataset(
        store,
        tokenizer,
        max_length=arguments.length,
        blocks=range(arguments.texts),
        masking=masking_for(tokenizer, probability, 0, 1),
    )
    is_task, is_words = arguments.stage != "pretraining", arguments.stage != "task_soft_labels"
    data = pairs(blocks, tokenizer, arguments.length) if is_task else blocks
    embeddings = source.get_input_embeddings().weight.detach()
    vocabulary = build_vocabulary(
        tokenizer, embeddings, store.counts(len(tokenizer)), keep_ratio=arguments.keep_ratio, mapping="inner_product"
    )
    shape = StudentConfig(num_hidden_layers=None if arguments.near else arguments.layers)
    student = build_student(source, vocabulary, shape, seed=0)
    if arguments.near:
        torch.manual_seed(0)
        for parameter in student.parameters():
            parameter.data += arguments.near * parameter.data.std() * torch.randn_like(parameter)
    student.save_pretrained(folder / "student")
    models: dict[str, Any] = {"language_model": None, "classifier": None}
    students: dict[str, Any] = {"language_model": student}
    if is_words:
        models["language_model"] = load_language_model(TeacherConfig(arguments.model, dtype=arguments.dtype))
    if is_task:
        options = {"new_head": True, "dtype": getattr(torch, arguments.dtype)}
        models["classifier"] = load_classifier(arguments.model, load_task("RTE"), **options)
    if not is_words:
        students = {"classifier": load_classifier(str(folder / "student"), load_task("RTE"), new_head=True)}
    live = OnlineTeacher(**models, vocabulary=vocabulary)
    collate = Collate(tokenizer.pad_token_id or 0)
    width = final_linear(models["language_model"]).weight.shape[1] if is_words else None

    kept = TeacherCache(
        folder / "cache",
        ((data, 1),),
        width=width,
        num_classes=None if is_words else 2,
        dtype=arguments.dtype,
        made_from={"model": arguments.model},
    )
    caches = {"16 bits" if is_words else "task logits": kept}
    teachers: dict[str, Teacher] = {"live": live}
    making = {name: make(cache, live, collate, arguments.batch) for name, cache in caches.items()}
    for name, cache in caches.items():
        teachers[name] = CachedTeacher(cache.open(), models["language_model"], vocabulary)

    distiller = Distiller(load_method("glmd")[arguments.stage], vocabulary.token_map, **students)
    optimizer = make_optimizer(distiller, StageConfig(max_steps=1, learning_rate=1e-5))
    plan = StepPlan(len(data), arguments.batch, 1, 0, 1, seed=0)
    batches = [batch for (batch,) in step_batches(data, plan, collate, start_step=0, stop_step=arguments.rounds + 1)]
    exact = gradient(distiller, live, batches[0])
    errors = {
        name: ((gradient(distiller, each, batches[0]) - exact).norm() / exact.norm()).item()
        for name, each in teachers.items()
    }

    def step(asked: Teacher, batch: dict[str, Any]) -> tuple[float, float]:
        start = time.perf_counter()
        outputs = asked(batch)
        middle = time.perf_counter()
        distiller(batch, outputs).sum().div(batch["attention_mask"].sum()).backward()
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return 1000 * (middle - start), 1000 * (time.perf_counter() - start)

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in [*teachers, "floor"]}
    for number, batch in enumerate(batches):  # the first round warms up and is not counted
        there = replace(live(batch))
        asked: dict[str, Callable[[Any], TeacherOutputs]] = {**teachers, "floor": lambda _, said=there: said}
        # Each round begins with another one, so that none always follows the same.
        names = [*asked][number % len(asked) :] + [*asked][: number % len(asked)]
        for name in names:
            times[name].append(step(asked[name], batch))
    tokens = int(median(int(batch["attention_mask"].sum()) for batch in batches))

    def ratio(name: str, other: str) -> float:
        return median(ours[1] / theirs[1] for ours, theirs in zip(times[name][1:], times[other][1:], strict=True))

    weights = {id(p): p for model in models.values() if model is not None for p in model.parameters()}
    memory = {"live": sum(p.numel() * p.element_size() for p in weights.values())}
    head = teachers["live"](batches[0]).head
    for name, each in teachers.items():
        if isinstance(each, CachedTeacher):
            index = each.outputs.names.nbytes + each.outputs.order.nbytes
            memory[name] = index + (head.weight.nbytes if head is not None else 0)
    bound = ratio("live", "floor")
    print(f"{arguments.model}: {arguments.stage}, H {width or '-'}, {arguments.dtype}; ", end="")
    print(f"student of {student.config.num_hidden_layers} layers, {vocabulary.size} words")
    print(f"{tokens} tokens a step; median of {arguments.rounds} rounds; torch {torch.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads; R + 1 = {bound:.2f}\n")
    print("| teacher | asked ms | step ms | times faster | of R + 1 | gradient error | MB in memory | bytes a token |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, took in times.items():
        asked_ms, step_ms = (median(each[i] for each in took[1:]) for i in range(2))
        faster = ratio("live", name)
        line = f"| {name} | {asked_ms:.1f} | {step_ms:.0f} | {faster:.2f} | {faster / bound:.0%} |"
        on_disk = sum(path.stat().st_size for path in caches[name].folder.iterdir()) if name in caches else 0
        line += f" {errors[name]:.1e} |" if name in errors else " |"
        line += f" {memory[name] / 1e6:.1f} |" if name in memory else " |"
        print(line + (f" {on_disk / caches[name].num_tokens:.2f} |" if name in caches else " |"))
    for name, (seconds, compared) in making.items():
        cache = caches[name]
        print(f"\n{name}: made in {seconds:.1f} s, {cache.num_tokens / seconds:.0f} tokens/s; ", end="")
        print(f"{cache.num_bytes / 1e6:.1f} MB compared with their sums in {1000 * compared:.0f} ms", end="")
    print()


def make(cache: TeacherCache, teacher: Teacher, collate: Collate, batch_size: int) -> tuple[float, float]:
    """Seconds to make a cache, and to compare it."""
    missing, began = cache.missing(), time.perf_counter()
    cache.begin()
    for number in missing:
        cache.write_shard(number, teacher, collate, batch_size=batch_size)
    cache.finish()
    made = time.perf_counter()
    assert not cache.missing()
    return made - began, time.perf_counter() - made


if __name__ == "__main__":
    main()
