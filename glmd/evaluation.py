"""Run models over held-out examples, in one process or many, each example counted once.

logits = predict(classifier, dataset, collate, token_map=map, accelerator=accelerator)    # (examples, C)
words = score_words(student, teacher, dataset, collate, token_map=map, accelerator=accelerator)
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from glmd.card import told_by_card
from glmd.checkpoint import write_problem
from glmd.data.batches import Batch, BlockDataset, Collate, TaskDataset, evaluation_batches
from glmd.data.blanks import verbaliser_ids
from glmd.data.predictions import require_idx, with_idx, write_predictions
from glmd.data.sources import ROW_SUFFIXES, Split
from glmd.data.tasks import Task, TaskExample, load_task, read_split
from glmd.errors import ConfigError, DataError, ModelError
from glmd.finite import examples_of_tokens, not_finite, require_finite
from glmd.heads import (
    LinearMap,
    choice_logits,
    final_linear,
    hidden_before_final_linear,
    is_causal,
    one_choice_each,
    run_backbone,
    run_task_head,
)
from glmd.loading import (
    load_classifier,
    load_model_config,
    model_positions,
    require_model,
    require_task_head,
    warn_of_unnamed_classes,
)
from glmd.losses.logits import kl_divergence, merge_words
from glmd.memory import USABLE, forward_bytes, memory_of_this_machine
from glmd.metrics import score
from glmd.public import public
from glmd.teacher import TeacherOutputs, model_inputs
from glmd.tokenizer import load_tokenizer, ordinary_tokenizer

logger = logging.getLogger(__name__)
ROWS = 1024  # tokens whose logits over the vocabulary are held at once


@torch.no_grad()
def predict(
    classifier: nn.Module,
    dataset: TaskDataset,
    collate: Collate,
    *,
    token_map: np.ndarray | None,
    accelerator: Accelerator,
    batch_size: int = 64,
    name: str = "the model",
) -> np.ndarray:
    """(examples, C) float32 logits in the dataset's order, the same on every rank; -inf for a choice that is not there.

    token_map: (V,) source id -> student id when the classifier is a compressed student; None for a teacher.
    name: of the model. Raises NumericsError, alike on every rank, for logits that are not finite.
    """
    classifier.eval()
    ids: list[int] = []
    rows: list[list[float]] = []
    for batch in _share(dataset, collate, accelerator, batch_size):
        ids += batch["example_id"].tolist()
        inputs = _student_inputs(batch, token_map)
        if "blank_ids" in batch:
            own_ids = None if token_map is None else torch.from_numpy(token_map).to(accelerator.device)
            logits = run_task_head(classifier, run_backbone(classifier, inputs), inputs, batch, own_ids)
        elif "num_choices" in batch:
            logits = choice_logits(classifier(**one_choice_each(inputs)).logits, batch["num_choices"])
        else:
            logits = classifier(**inputs).logits
        table = logits.float().tolist()
        counts = batch["num_choices"].tolist() if "num_choices" in batch else [logits.shape[1]] * len(table)
        rows += [row[:count] for row, count in zip(table, counts, strict=True)]
    gathered = gather_object([(ids, rows)])
    result: dict[int, list[float]] = {}
    for part_ids, part_rows in gathered:
        result.update(zip(part_ids, part_rows, strict=True))
    require_finite(name, result)
    most = max(map(len, result.values()))
    return np.array([result[i] + [-np.inf] * (most - len(result[i])) for i in range(len(dataset))], dtype=np.float32)


@torch.no_grad()
def score_words(
    student: nn.Module,
    teacher: Callable[[Batch], TeacherOutputs],
    dataset: BlockDataset | TaskDataset,
    collate: Collate,
    *,
    token_map: np.ndarray,
    accelerator: Accelerator,
    batch_size: int = 64,
) -> dict[str, float]:
    """How well a student predicts words, over its own (kept) vocabulary.

    kl_divergence: nats a token from the teacher at temperature 1. agreement: share of tokens whose likeliest word
    is the teacher's. On corrupted inputs also masked_accuracy and teacher_masked_accuracy: share of corrupted
    tokens whose word (or the word it is mapped to) is the likeliest.
    Raises NumericsError, alike on every rank, where the divergence of an example is not finite.
    """
    student.eval()
    linear = final_linear(student)
    to_student = torch.from_numpy(token_map).to(accelerator.device)
    totals = np.zeros(6)
    bad: set[int] = set()
    for batch in _share(dataset, collate, accelerator, batch_size):
        outputs = teacher(batch)
        hidden = hidden_before_final_linear(student, run_backbone(student, _student_inputs(batch, token_map)))
        valid = batch["attention_mask"].bool()
        labels = batch["word_labels"][valid] if "word_labels" in batch else None
        student_hidden, teacher_hidden = hidden[valid], outputs.hidden_states
        assert teacher_hidden is not None and outputs.head_weight is not None, "the teacher has an LM head"
        teacher_head = LinearMap(outputs.head_weight, outputs.head_bias, outputs.head_scaling)
        for rows in torch.arange(len(student_hidden), device=student_hidden.device).split(ROWS):
            ours, theirs = (
                linear.logits(student_hidden[rows]).float(),
                teacher_head.logits(teacher_hidden[rows]).float(),
            )
            if outputs.merged_into is not None:
                theirs = merge_words(theirs, outputs.merged_into)
            best, teacher_best, kl = ours.argmax(-1), theirs.argmax(-1), kl_divergence(ours, theirs)
            totals[:3] += [len(rows), kl.sum().item(), (best == teacher_best).sum().item()]
            if not np.isfinite(totals[1]):
                bad |= set(examples_of_tokens(batch)[rows][~torch.isfinite(kl)].tolist())
            if labels is not None:
                chosen = labels[rows] >= 0
                words = to_student[labels[rows][chosen]]
                right = [(each[chosen] == words).sum().item() for each in (best, teacher_best)]
                totals[3:] += [len(words), *right]
    found = sorted(set().union(*gather_object([bad])))
    if found:
        raise not_finite("student and teacher", found, "the predictions")
    tokens, total, agreed, masked, right, teacher_right = np.sum(gather_object([totals]), axis=0)
    scores = {"kl_divergence": total / tokens, "agreement": agreed / tokens}
    if masked:
        scores |= {"masked_accuracy": right / masked, "teacher_masked_accuracy": teacher_right / masked}
    return {name: float(value) for name, value in scores.items()}


def answers_of(task: Task, logits: np.ndarray) -> np.ndarray:
    """(examples,) class ids, or positions of choices, from (examples, C) logits."""
    best: np.ndarray = logits.argmax(-1)
    return (best == 0).astype(best.dtype) if task.asks_first else best


def _share(
    dataset: BlockDataset | TaskDataset, collate: Collate, accelerator: Accelerator, batch_size: int
) -> Iterator[Batch]:
    """This rank's batches, on its device, one at a time."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    batches = evaluation_batches(dataset, collate, batch_size=batch_size, rank=rank, world_size=world_size)
    return ({k: v.to(accelerator.device) for k, v in batch.items()} for batch in batches)


def _student_inputs(batch: Batch, token_map: np.ndarray | None) -> dict[str, Tensor]:
    inputs = model_inputs(batch)
    if token_map is not None:
        ids = inputs["input_ids"]
        inputs["input_ids"] = torch.from_numpy(token_map).to(ids.device)[ids]
    return inputs


@public
def evaluate_folder(
    model: str | Path,
    task_name: str | Path,
    data: str | Path,
    split: Split = "val",
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    ordinary: bool = False,
) -> dict[str, float | str]:
    """Casting, counts and metrics of a task model on a task's split, with the folder's own tokenizer.

    task_name: of a task that comes with glmd, or the YAML of one. max_length: None for the folder's own, by its card,
        else the task's, as far as the model's positions go.
    ordinary: read a compressed model's text as plain AutoTokenizer does without glmd.
    Raises GlmdError where task, data and model do not fit, or where a compressed model would be scored with a
    tokenizer that is not exact.
    """
    if split not in get_args(Split):
        raise ConfigError(f"split must be one of {', '.join(get_args(Split))}; got {split!r}")
    task = _task_for(str(model), str(task_name))
    length = _length(str(model), task, max_length)
    examples = read_split(task, str(data), split, require_labels=True)
    score(task, np.zeros(len(examples), dtype=np.int64), examples)  # what cannot be scored is refused before it is run
    answers, truncated = _answers(str(model), task, examples, length, batch_size, ordinary=ordinary)
    return {
        "casting": task.casting,
        "examples": len(examples),
        "max_length": length,
        "truncated": truncated,
        **score(task, answers, examples),
    }


@public
def predict_file(
    model: str | Path,
    task_name: str | Path,
    file: str | Path,
    output: str | Path,
    *,
    max_length: int | None = None,
    batch_size: int = 64,
) -> int:
    """Write the answers of a task model to the rows of a file, in the leaderboard's form. Returns their number.

    Raises GlmdError as `evaluate_folder` does; rows need no labels.
    """
    model, file, output = str(model), str(file), Path(output)
    task = _task_for(model, str(task_name))
    length = _length(model, task, max_length)
    if not file.lower().endswith(ROW_SUFFIXES):
        raise DataError(f"--file {file}: rows are read from .jsonl and .parquet files; convert it to one of them")
    problem = "exists already" if output.exists() else write_problem(output.parent)
    if problem is not None:
        raise DataError(f"--output {output}: {problem}; choose another")
    examples = with_idx(task, read_split(task, file, "test", require_labels=False))
    require_idx(task, examples)
    answers, _ = _answers(model, task, examples, length, batch_size)
    write_predictions(task, answers, examples, output)
    return len(examples)


def _length(model: str, task: Task, asked: int | None) -> int:
    """Tokens that a model reads of an example at most: as asked for, else as its card says, else the task's.

    Raises GlmdError for more than the model has positions for; what was not asked for follows them.
    """
    if asked is not None and asked < 8:
        raise ConfigError(f"--max-length {asked}: so few tokens leave no room for text; give at least 8")
    positions = model_positions(load_model_config(model))
    if asked is not None and positions is not None and asked > positions:
        raise ModelError(
            f"{model}: {asked} tokens are more than its {positions} positions; give --max-length {positions}"
        )
    if asked is not None:
        return asked
    told = told_by_card(Path(model))[1].get("max_length", "")
    length = int(told) if told.isascii() and told.isdigit() and int(told) >= 8 else task.max_length
    chosen = min(length, positions or length)
    if chosen != task.max_length:
        why = f"its card says {told}" if chosen == length else f"it has {positions} positions"
        logger.info("%s: reads %d tokens of an example, as %s; --max-length gives another", model, chosen, why)
    return chosen


def _require_batch(model: str, batch_size: int, examples: list[TaskExample], length: int) -> None:
    """Refuse a batch that the memory of this machine cannot take, by what a layer needs at least."""
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}: give at least 1")
    choices = max((len(each.texts) for each in examples), default=1)
    fits = int(USABLE * memory_of_this_machine() // (choices * forward_bytes(load_model_config(model), length)))
    if min(batch_size, len(examples)) > max(1, fits):
        raise ConfigError(f"--batch-size {batch_size:,}: of {length} tokens about {fits:,} fit; give at most {fits:,}")


def _task_for(model: str, task_name: str) -> Task:
    """The task, where the model has its head: found out before any data is read."""
    task = load_task(task_name)
    require_model(model, field="model")
    config = load_model_config(model)
    if is_causal(config) or any("MaskedLM" in architecture for architecture in config.architectures or ()):
        try:
            task = load_task(task_name, "cloze")
        except ConfigError as error:
            raise ModelError(f"{model}: is a language model without a task head ({error})") from None
    require_task_head(config, task, model)
    warn_of_unnamed_classes(config, task, model)
    return task


def _answers(
    model: str, task: Task, examples: list[TaskExample], max_length: int, batch_size: int, *, ordinary: bool = False
) -> tuple[np.ndarray, int]:
    """(examples,) class ids or positions of choices, and how many inputs were cut."""
    _require_batch(model, batch_size, examples, max_length)
    tokenizer = load_tokenizer(model)
    if ordinary:
        if not getattr(tokenizer, "is_exact", False):
            raise ModelError(f"--tokenizer ordinary has no effect: {model} has no other tokenizer; remove it")
        tokenizer = ordinary_tokenizer(tokenizer)
    classifier = load_classifier(model, task)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    verbalisers = verbaliser_ids(task, tokenizer)
    dataset = TaskDataset(
        examples,
        tokenizer,
        max_length=max_length,
        verbalisers=verbalisers,
        mean_over_tokens=task.mean_over_tokens,
        is_causal=is_causal(classifier.config),
    )
    collate = Collate(tokenizer.pad_token_id or 0)  # a decoder may have none; what stands there is masked
    classifier.to(accelerator.device)
    # The folder's tokenizer gives the model's own ids, so there is nothing to map.
    options: dict[str, Any] = {"accelerator": accelerator, "batch_size": batch_size, "name": model}
    logits = predict(classifier, dataset, collate, token_map=None, **options)
    return answers_of(task, logits), dataset.truncated
