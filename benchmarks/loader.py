"""How fast batches come: as glmd makes them and example by example, as it did before, in turn, in one process.

    python benchmarks/loader.py --step-ms 14
    python benchmarks/loader.py --batches 3 --rounds 1 --step-ms 1 --texts 200             # seconds

Blocks of a corpus of random tokens, masked and not, and pairs of texts of 4 to 120 words as of a task. The share is
what a step that keeps another device busy for --step-ms waits for its next micro-batch; the loader's processes may use
the CPU meanwhile, of which the step's own launches would take a part. Tokens are without pads. Read the ratios.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from glmd.data.batches import Batch, Collate, Key
from glmd.data.blocks import BlockDataset
from glmd.data.masking import Masking, masking_for, random_generator
from glmd.data.sampling import StepPlan, step_batches
from glmd.data.token_store import TokenStore
from glmd.losses.labels import IGNORED_LABEL
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.examples import TaskExample
from glmd.tasks.forms import task_form
from glmd.tasks.tasks import load_task

Data = BlockDataset | TaskDataset
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = 30_522


# The old way, an example at a time


class OneByOne:
    """A data set's examples, each read, and masked by a generator of its own."""

    def __init__(self, data: Data) -> None:
        self.data, self.rows = data, data.rows if isinstance(data, TaskDataset) else []

    def __getitem__(self, key: Key) -> dict[str, Any]:
        data, number = self.data, key[1]
        if isinstance(data, BlockDataset):
            tokens = data.store.block(data.blocks[number], data.block_length).astype(np.int64)
            example = {"input_ids": np.concatenate([data.start, tokens, data.end]), "example_id": number}
        else:
            example = {**self.rows[number], "labels": data.examples[number].label, "example_id": number}
        if data.masking is not None:
            example["input_ids"], example["lm_labels"] = masked(example["input_ids"], key, data.masking)
        return example


def masked(input_ids: np.ndarray, key: Key, masking: Masking) -> tuple[np.ndarray, np.ndarray]:
    generator = random_generator(1, masking.seed, *key)
    chosen = generator.random(len(input_ids)) < masking.probability
    chosen &= ~np.isin(input_ids, masking.special_ids)
    action = generator.random(len(input_ids))
    random_ids = masking.replacement_ids[generator.integers(0, len(masking.replacement_ids), len(input_ids))]
    read = np.where(chosen & (action < 0.8), masking.mask_id, input_ids)
    read = np.where(chosen & (action >= 0.9), random_ids, read)
    return read, np.where(chosen, input_ids, IGNORED_LABEL)


def collate_rows(examples: list[dict[str, Any]]) -> Batch:
    batch: Batch = {}
    for name, first in examples[0].items():
        if isinstance(first, int):
            batch[name] = torch.tensor([example[name] for example in examples])
            continue
        rows = [example[name] for example in examples]
        padded = np.full((len(rows), max(map(len, rows))), -100 if name == "lm_labels" else 0, dtype=np.int64)
        for line, row in zip(padded, rows, strict=True):
            line[: len(row)] = row
        batch[name] = torch.from_numpy(padded)
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    batch["predicts"] = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
    batch["attention_mask"] = batch["predicts"].long()
    return batch


def old(data: Data, plan: StepPlan, steps: int, workers: int) -> Iterator[Batch]:
    rows: Any = OneByOne(data)
    yield from DataLoader(
        rows, batch_sampler=plan.micro_batches(0, steps), collate_fn=collate_rows, num_workers=workers
    )


def ours(data: Data, plan: StepPlan, steps: int, workers: int) -> Iterator[Batch]:
    for (batch,) in step_batches(data, plan, Collate(0), start_step=0, stop_step=steps, num_workers=workers):
        yield batch


# The data


def tokenizer_of_words() -> Any:
    model = WordLevel({word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(5, WORDS))])}, "[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    frame = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"}
    tokenizer.post_processor = TemplateProcessing(**frame, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def data_sets(folder: Path, texts: int, tokenizer: Any) -> dict[str, Callable[[Masking | None], Data]]:
    """What each kind is made of; a function of the masking."""
    rng = np.random.default_rng(0)
    ids = rng.integers(len(SPECIAL), WORDS, 256 * texts).astype("<u2")
    ids.tofile(folder / "tokens.bin")
    store = TokenStore(folder, {"num_tokens": len(ids), "dtype": "uint16", "separator_id": 3})

    def blocks(length: int) -> Callable[[Masking | None], Data]:
        whole = range(len(ids) // (length - 2))
        return lambda masking: BlockDataset(store, tokenizer, max_length=length, blocks=whole, masking=masking)

    def words() -> str:
        return " ".join(f"w{i}" for i in rng.integers(len(SPECIAL), WORDS, rng.integers(4, 121)))

    examples = [TaskExample(i, ((words(), words()),), i % 2) for i in range(texts)]
    task = TaskDataset(examples, task_form(load_task("RTE"), kind="masked"), tokenizer, max_length=256)

    def pairs(masking: Masking | None) -> Data:
        task.masking = masking
        return task

    return {"blocks of 128": blocks(128), "blocks of 512": blocks(512), "pairs of texts": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=100, help="of each round, of each way")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=14.0, help="milliseconds of a step to compare with")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--cpu-time", action="store_true", help="this process's time, where the machine is busy")
    parser.add_argument("--texts", type=int, default=8000, help="of the task; the corpus has 256 tokens for each")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers are forked
    print(f"numpy {np.__version__}, torch {torch.__version__}, {os.cpu_count()} cores; batches of {arguments.batch},")
    print(f"{'process' if arguments.cpu_time else 'wall'} time, median of", end=" ")
    print(f"{arguments.rounds} rounds of {arguments.batches}\n")
    step = f"share of a step of {arguments.step_ms:g} ms"
    print(f"| data | workers | examples/s, old | ours | tokens/s, old | ours | speed-up | {step}, old | ours |")
    print("|---" * 9 + "|")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_of_words()
        for name, make in data_sets(Path(folder), arguments.texts, tokenizer).items():
            for probability in (0.0, 0.15):
                data = make(masking_for(tokenizer, probability, seed=0))
                for workers in arguments.workers:
                    report(f"{name}, {'masked' if probability else 'clean'}", data, workers, arguments)


def report(name: str, data: Data, workers: int, arguments: argparse.Namespace) -> None:
    """Time both ways in turn, print one row."""
    plan, steps = StepPlan(len(data), arguments.batch, 1, 0, 1, seed=0), arguments.batches + 1
    seconds: dict[Any, list[float]] = {old: [], ours: []}
    waits: dict[Any, list[float]] = {old: [], ours: []}
    clock, tokens = time.process_time if arguments.cpu_time else time.perf_counter, 0
    for _ in range(arguments.rounds):
        for way in (old, ours):
            batches = way(data, plan, steps, workers)
            next(batches)  # the processes have begun
            began = clock()
            found = list(batches)
            seconds[way].append((clock() - began) / arguments.batches)
            tokens = sum(int(batch["attention_mask"].sum()) for batch in found)
            del found
        for way in (old, ours):
            batches, waited = way(data, plan, steps // 4 + 2, workers), []
            next(batches)
            for _ in range(steps // 4 + 1):
                time.sleep(arguments.step_ms / 1000)
                began = clock()
                next(batches)
                waited.append(clock() - began)
            waits[way].append(median(waited))
    taken = {way: median(each) for way, each in seconds.items()}
    cells = [name, str(workers), *(f"{arguments.batch / taken[way]:,.0f}" for way in taken)]
    cells += [f"{tokens / arguments.batches / taken[way]:,.0f}" for way in taken] + [f"{taken[old] / taken[ours]:.1f}"]
    cells += [f"{100_000 * median(waits[way]) / arguments.step_ms:.1f} %" for way in taken]
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
