"""Pads and time of a task's steps, by how its examples are put into batches, in one process.

    python benchmarks/bucketing.py MODEL --data SUPERGLUE --tasks RTE BoolQ --batch 8 --accumulation 2 --steps 20
    python benchmarks/bucketing.py MODEL --data SUPERGLUE --tasks RTE CB --pads 8 16 32       # pads alone, untimed

For each strategy of `train_sampling_strategy`: the share of pads in an epoch, and the time of the first word-prediction
steps (teacher, student of half its layers, loss, backward, AdamW), which alternate between the strategies. For scoring:
the share of pads, and the time of a forward, in the rows' order and longest first. With --pads only the shares, over
whole epochs and the whole validation split, for each of these batch sizes: the most that packed texts could save.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from glmd.config import StudentConfig, TeacherConfig
from glmd.data.batches import Batch, Collate
from glmd.data.sampling import StepPlan, evaluation_batches
from glmd.distillation.distiller import Distiller
from glmd.distillation.methods import load_method
from glmd.distillation.teacher import OnlineTeacher
from glmd.models.heads import Split
from glmd.models.loading import load_language_model
from glmd.models.source_tokenizer import load_source_tokenizer
from glmd.models.student import build_student
from glmd.stage_config import StageConfig
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.examples import read_split
from glmd.tasks.forms import task_form
from glmd.tasks.tasks import load_task
from glmd.training.optimizer import make_optimizer
from glmd.vocabulary.vocabulary import Vocabulary

STRATEGIES = ("random", "group_by_length")


def share_of_pads(data: TaskDataset, batches: Iterable[Sequence[int]]) -> float:
    """Of the positions of batches with these examples; the choices of an example are rows of their own."""
    lengths, positions = 0, 0
    for each in batches:
        rows = [data.read.lengths[slice(*data.first_row[i : i + 2])] for i in each]
        lengths += sum(int(row.sum()) for row in rows)
        positions += sum(map(len, rows)) * max(int(row.max()) for row in rows)
    return 1 - lengths / positions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a masked LM: folder or hub id")
    parser.add_argument("--data", required=True, help="a folder of SuperGLUE's jsonl folders")
    parser.add_argument("--tasks", nargs="+", default=["RTE", "BoolQ"])
    parser.add_argument("--split", default="train", choices=("train", "val"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--pads", type=int, nargs="+", metavar="BATCH", help="time nothing; a table of pads by batch size"
    )
    parser.add_argument("--cpu-time", action="store_true", help="the process's time, where the machine is busy")
    arguments = parser.parse_args()
    if arguments.pads:
        print("| task, longest text | pads: |" + "".join(f" batches of {size} |" for size in arguments.pads))
        print("|---" * (2 + len(arguments.pads)) + "|")
        for task in arguments.tasks:
            tabulate_pads(task, arguments)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; batch {arguments.batch}, ", end="")
    print(f"accumulation {arguments.accumulation}; time of {arguments.steps} steps\n")
    print("| task | batches | pads | ms of 1,000 tokens | speed-up |\n|---|---|---|---|---|")
    for task in arguments.tasks:
        compare(task, arguments)


def read_task(name: str, arguments: argparse.Namespace, split: str, tokenizer: Any) -> TaskDataset:
    task = load_task(name)
    examples = read_split(task, arguments.data, split, require_labels=False)
    return TaskDataset(examples, task_form(task, kind="masked"), tokenizer, max_length=task.max_length)


def tabulate_pads(name: str, arguments: argparse.Namespace) -> None:
    """Print a task's share of pads, of an epoch by strategy and of the validation split by order."""
    tokenizer = load_source_tokenizer(arguments.model)
    data, val = (read_task(name, arguments, split, tokenizer) for split in (arguments.split, "val"))
    orders = {"rows' order": np.arange(len(val)), "longest first": np.argsort(-val.lengths, kind="stable")}
    shares: dict[str, list[float]] = {}
    for size in arguments.pads:
        for strategy in STRATEGIES:
            plan = StepPlan(len(data), size, 1, 0, 1, 0, strategy, data.lengths)
            keys = plan.micro_batches(0, max(1, len(data) // size))
            shares.setdefault(f"training, {strategy}", []).append(
                share_of_pads(data, ([i for _, i in k] for k in keys))
            )
        for order, ids in orders.items():
            batches = (ids[first : first + size] for first in range(0, len(ids), size))
            shares.setdefault(f"scoring, {order}", []).append(share_of_pads(val, batches))
    for kind, each in shares.items():
        print(
            f"| {name}, {data.lengths.max()} | {kind} |" + "".join(f" {100 * share:.1f} % |" for share in each),
            flush=True,
        )


def compare(name: str, arguments: argparse.Namespace) -> None:
    """Print the rows of one task."""
    tokenizer = load_source_tokenizer(arguments.model)
    data, collate = read_task(name, arguments, arguments.split, tokenizer), Collate(tokenizer.pad_token_id)
    examples, form, max_length = data.examples, data.form, load_task(name).max_length
    vocabulary = Vocabulary.identity(len(tokenizer))
    model = load_language_model(TeacherConfig(arguments.model))
    split, layers = Split(model), max(1, model.config.num_hidden_layers // 2)
    student = build_student(model, vocabulary, StudentConfig(num_hidden_layers=layers), seed=0)
    distiller = Distiller(load_method("glmd")["task_lm"], vocabulary.token_map, language_model=student).train()
    optimizer, teacher = make_optimizer(distiller, StageConfig(max_steps=1)), OnlineTeacher(model, None, vocabulary)

    def train(micro_batches: list[Batch]) -> None:
        count = sum(int(batch["attention_mask"].sum()) for batch in micro_batches)
        for batch in micro_batches:
            distiller(batch, teacher(batch)).sum().div(count).backward()
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def score(batches: list[Batch]) -> None:
        for batch in batches:
            split.run_backbone(split.inputs(batch))

    steps: dict[str, list[list[Batch]]] = {}
    pads: dict[str, float] = {}
    for strategy in STRATEGIES:
        plan = StepPlan(len(data), arguments.batch, arguments.accumulation, 0, 1, 0, strategy, data.lengths)
        keys = list(plan.micro_batches(0, len(data) // plan.global_batch_size))
        pads[strategy] = share_of_pads(data, ([i for _, i in each] for each in keys))
        # Spread over the epoch: the first steps of grouped ones are of a few lengths.
        chosen = np.linspace(0, len(keys) // arguments.accumulation - 1, arguments.steps + 1).astype(int)
        micro = arguments.accumulation
        steps[strategy] = [[collate([data[k] for k in keys[i * micro + j]]) for j in range(micro)] for i in chosen]
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    _report(name, "training", steps, pads, train, clock)

    size = 64
    part = TaskDataset(examples[: 3 * size], form, tokenizer, max_length=max_length)
    longest_first = list(evaluation_batches(part, collate, batch_size=size))
    ids = [range(first, min(first + size, len(part))) for first in range(0, len(part), size)]
    orders = {"rows' order": [collate([part[0, i] for i in each]) for each in ids], "longest first": longest_first}
    pads = {order: 1 - _mean_mask(batches) for order, batches in orders.items()}
    # The longest and the shortest come together, so that each round has the same work.
    rounds = {
        order: [batches[:1], *([batches[i], batches[-1 - i]] for i in range((len(batches) + 1) // 2))]
        for order, batches in orders.items()
    }
    _report(name, "scoring", rounds, pads, score, clock)


def _mean_mask(batches: list[Batch]) -> float:
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return tokens / sum(batch["attention_mask"].numel() for batch in batches)


def _report(
    task: str,
    kind: str,
    rounds: dict[str, list[Any]],
    pads: dict[str, float],
    run: Callable[[Any], None],
    clock: Callable[[], float],
) -> None:
    """Run all kinds in turn, one round of each; the first round warms up and is not counted. Pads are no tokens."""
    seconds, tokens = dict.fromkeys(rounds, 0.0), dict.fromkeys(rounds, 0)
    for number in range(min(map(len, rounds.values()))):
        for name, batches in rounds.items():
            start = clock()
            run(batches[number])
            if number > 0:
                seconds[name] += clock() - start
                tokens[name] += sum(int(batch["attention_mask"].sum()) for batch in batches[number])
    ms = {name: 1e6 * took / tokens[name] for name, took in seconds.items()}
    for name, each in ms.items():
        speed_up = next(iter(ms.values())) / each
        print(f"| {task}, {kind} | {name} | {100 * pads[name]:.0f} % | {each:.0f} | {speed_up:.2f} |", flush=True)


if __name__ == "__main__":
    main()
