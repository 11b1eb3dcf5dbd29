"""Pads and time of a task's steps, by how its examples are put into batches, in one process.

    python benchmarks/bucketing.py MODEL --data SUPERGLUE --tasks RTE BoolQ --batch 8 --accumulation 2 --steps 20

For each strategy of `train_sampling_strategy`: the share of pads in an epoch, and the time of the first word-prediction
steps (teacher, student of half its layers, loss, backward, AdamW), which alternate between the strategies. For scoring:
the share of pads, and the time of a forward, in the rows' order and longest first.
"""

import argparse
import time
from collections.abc import Callable, Sequence
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
from glmd.models.loading import load_language_model, load_source_tokenizer
from glmd.models.student import build_student
from glmd.stage_config import StageConfig
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.examples import read_split
from glmd.tasks.forms import task_form
from glmd.tasks.tasks import load_task
from glmd.training.optimizer import make_optimizer
from glmd.vocabulary.vocabulary import Vocabulary

STRATEGIES = ("random", "group_by_length")


def share_of_pads(batches: Sequence[np.ndarray]) -> float:
    """From the lengths of the examples of each batch."""
    total = sum(len(each) * int(each.max()) for each in batches)
    return 1 - sum(int(each.sum()) for each in batches) / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a masked LM: folder or hub id")
    parser.add_argument("--data", required=True, help="a folder of SuperGLUE's jsonl folders")
    parser.add_argument("--tasks", nargs="+", default=["RTE", "BoolQ"])
    parser.add_argument("--split", default="train", choices=("train", "val"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cpu-time", action="store_true", help="the process's time, where the machine is busy")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; batch {arguments.batch}, ", end="")
    print(f"accumulation {arguments.accumulation}; time of {arguments.steps} steps\n")
    print("| task | batches | pads | ms of 1,000 tokens | speed-up |\n|---|---|---|---|---|")
    for task in arguments.tasks:
        compare(task, arguments)


def compare(name: str, arguments: argparse.Namespace) -> None:
    """Print the rows of one task."""
    tokenizer, task = load_source_tokenizer(arguments.model), load_task(name)
    examples = read_split(task, arguments.data, arguments.split, require_labels=False)
    form = task_form(task, causal=False)
    data, collate = TaskDataset(examples, form, tokenizer, max_length=task.max_length), Collate(tokenizer.pad_token_id)
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
        pads[strategy] = share_of_pads([data.lengths[[i for _, i in each]] for each in keys])
        # Spread over the epoch: the first steps of grouped ones are of a few lengths.
        chosen = np.linspace(0, len(keys) // arguments.accumulation - 1, arguments.steps + 1).astype(int)
        micro = arguments.accumulation
        steps[strategy] = [[collate([data[k] for k in keys[i * micro + j]]) for j in range(micro)] for i in chosen]
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    _report(name, "training", steps, pads, train, clock)

    size = 64
    part = TaskDataset(examples[: 3 * size], form, tokenizer, max_length=task.max_length)
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
