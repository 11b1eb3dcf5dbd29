"""Run models over held-out examples, in one process or many, each example counted once.

logits = predict(classifier, dataset, collate, token_map=map, accelerator=accelerator)    # (examples, C)
words = score_lm(student, teacher, dataset, collate, token_map=map, accelerator=accelerator)
"""

import logging
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from glmd.data.batches import Batch, Collate
from glmd.data.sampling import evaluation_batches
from glmd.distillation.teacher import AllOutputs, of_each
from glmd.evaluation.label_metrics import pearson
from glmd.evaluation.sentences import nearness
from glmd.losses.finite import examples_of_tokens, not_finite, require_finite
from glmd.losses.logits import kl_divergence
from glmd.losses.rows import BLOCK_ROWS
from glmd.models.heads import Split
from glmd.tasks.dataset import TaskDataset, TrainingData
from glmd.tasks.tasks import SENTENCES, Task

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

    Of an example of several decisions those of all, one after another: `answers_of` reads them.

    token_map: (V,) source id -> student id when the classifier is a compressed student; None for a teacher.
    name: of the model. Raises NumericsError, alike on every rank, for logits that are not finite.
    """
    split = Split(classifier.eval())
    own_ids = None if token_map is None else torch.from_numpy(token_map).to(accelerator.device)
    ids: list[int] = []
    rows: list[list[float]] = []
    for batch, is_own in _share(dataset, collate, accelerator, batch_size):
        inputs = _student_inputs(split, batch, token_map)
        logits = dataset.form.logits(split, split.run_backbone(inputs), inputs, batch, own_ids)
        if not is_own:
            continue
        ids += batch["example_id"].tolist()
        table = logits.float().tolist()
        if "num_decisions" in batch:
            flat = iter([value for row in table for value in row])
            rows += [list(islice(flat, count * logits.shape[1])) for count in batch["num_decisions"].tolist()]
            continue
        counts = batch["num_choices"].tolist() if "num_choices" in batch else [logits.shape[1]] * len(table)
        rows += [row[:count] for row, count in zip(table, counts, strict=True)]
    gathered = gather_object([(ids, rows)])
    result: dict[int, list[float]] = {}
    for part_ids, part_rows in gathered:
        result.update(zip(part_ids, part_rows, strict=True))
    require_finite(name, result)
    if "tagged" in dataset.read.tokens:
        result = {i: _at_words(numbers, result[i]) for i, numbers in enumerate(dataset.tagged_words())}
    most = max(map(len, result.values()))
    return np.array([result[i] + [-np.inf] * (most - len(result[i])) for i in range(len(dataset))], dtype=np.float32)


@torch.no_grad()
def score_lm(
    student: nn.Module,
    teacher: Callable[[Batch], AllOutputs],
    dataset: TrainingData,
    collate: Collate,
    *,
    token_map: np.ndarray,
    accelerator: Accelerator,
    batch_size: int = 64,
) -> dict[str, float]:
    """How well a student predicts tokens, over its own (kept) vocabulary.

    kl_divergence: nats a token from the teacher at temperature 1. agreement: share of tokens whose likeliest token
    is the teacher's. On masked inputs also masked_accuracy and teacher_masked_accuracy: share of masked
    tokens whose word (or the token it is mapped to) is the likeliest. Of conversations whose roles are known also the
    first two of the tokens that an assistant says (`assistant_kl_divergence`, ...) and of the `others`.
    Raises NumericsError, alike on every rank, where the divergence of an example is not finite.
    """
    split = Split(student.eval())
    head = split.head
    to_student = torch.from_numpy(token_map).to(accelerator.device)
    totals, block = np.zeros(9), BLOCK_ROWS.get(accelerator.device.type, 512)
    bad: set[int] = set()
    for batch, is_own in _share(dataset, collate, accelerator, batch_size):
        outputs = of_each(teacher(batch))[0]
        if not is_own:
            continue
        hidden = split.hidden_before_final(split.run_backbone(_student_inputs(split, batch, token_map)))
        valid = batch["predicts"]
        labels = batch["lm_labels"][valid] if "lm_labels" in batch else None
        student_hidden, teacher_hidden = hidden[valid], outputs.hidden_states
        assert teacher_hidden is not None and outputs.head is not None, "the teacher has an LM head"
        for rows in torch.arange(len(student_hidden), device=student_hidden.device).split(ROWS):
            ours = head.logits(student_hidden[rows]).float()
            theirs = outputs.head.logits(teacher_hidden[rows]).float()
            best, teacher_best = ours.argmax(-1), theirs.argmax(-1)
            blocks = zip(ours.split(block), theirs.split(block), strict=True)
            kl = torch.cat([kl_divergence(*each) for each in blocks])
            totals[:3] += [len(rows), kl.sum().item(), (best == teacher_best).sum().item()]
            if not np.isfinite(totals[1]):
                bad |= set(examples_of_tokens(batch)[rows][~torch.isfinite(kl)].tolist())
            if "by_assistant" in batch:
                said = batch["by_assistant"][valid][rows].bool()
                right = (best == teacher_best)[said].sum().item()
                totals[6:] += [said.sum().item(), kl[said].sum().item(), right]
            if labels is not None:
                chosen = labels[rows] >= 0
                words = to_student[labels[rows][chosen]]
                both = [(each[chosen] == words).sum().item() for each in (best, teacher_best)]
                totals[3:6] += [len(words), *both]
    found = sorted(set().union(*gather_object([bad])))
    if found:
        raise not_finite("student and teacher", found, "the predictions")
    sums = np.sum(gather_object([totals]), axis=0)
    tokens, total, agreed, masked, right, teacher_right = sums[:6]
    scores = {"kl_divergence": total / tokens, "agreement": agreed / tokens}
    if masked:
        scores |= {"masked_accuracy": right / masked, "teacher_masked_accuracy": teacher_right / masked}
    of_roles = {"assistant": sums[6:], "others": sums[:3] - sums[6:]} if sums[6] else {}
    for role, (count, divergence, same) in of_roles.items():
        if count:
            scores |= {f"{role}_kl_divergence": divergence / count, f"{role}_agreement": same / count}
    return {name: float(value) for name, value in scores.items()}


def answers_of(task: Task, logits: np.ndarray, *, texts: int = 1) -> np.ndarray:
    """(examples,) class ids, positions of choices, or numbers, from (examples, C) logits.

    Of several labels (examples, C) of 0 and 1; of words (examples, W) class ids, -1 where an example has no such word,
    or none that a token begins; of sentences (examples, T, H) their vectors. texts: T of each example.
    """
    if task.problem_type == SENTENCES:
        return logits.reshape(len(logits), texts, -1)
    if task.problem_type == "regression":
        return logits[:, 0]
    if not task.has_one_answer:
        decisions = logits.reshape(len(logits), -1, task.num_classes)
        found: np.ndarray = decisions.argmax(-1)
        return np.where(np.isfinite(decisions[..., 0]), found, -1)
    best: np.ndarray = logits.argmax(-1)
    return (best == 0).astype(best.dtype) if task.asks_first else best


def _at_words(numbers: np.ndarray, logits: list[float]) -> list[float]:
    """Logits of the words of these numbers -> of all words up to the last, -inf where there are none."""
    if not len(numbers):
        return []
    table = np.full((int(numbers[-1]) + 1, len(logits) // len(numbers)), -np.inf)
    table[numbers] = np.reshape(logits, (len(numbers), -1))
    return table.ravel().tolist()


def agreement(task: Task, ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of equal answers of two models; of several labels all must be equal, of words each counts.

    Of numbers their correlation, Pearson's; of vectors the mean of their cosines, or where widths differ Spearman's
    correlation of similarities.
    """
    if task.problem_type == SENTENCES:
        return next(iter(nearness(ours, theirs).values()))
    if task.problem_type == "regression":
        return pearson(ours, theirs)
    if task.problem_type == "token_classification":
        return float((ours == theirs)[theirs >= 0].mean())
    return float((ours == theirs).reshape(len(ours), -1).all(-1).mean())


def _share(
    dataset: TrainingData, collate: Collate, accelerator: Accelerator, batch_size: int
) -> Iterator[tuple[Batch, bool]]:
    """This rank's batches, on its device, one at a time, and whether they are its own.

    A rank that has fewer ends with another's: a sharded model waits for all ranks at each call.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes

    def share_of(rank: int) -> Iterator[Batch]:
        batches = evaluation_batches(dataset, collate, batch_size=batch_size, rank=rank, world_size=world_size)
        return ({k: v.to(accelerator.device) for k, v in batch.items()} for batch in batches)

    most, made = -(-len(dataset) // world_size), 0  # that the first rank has
    for made, batch in enumerate(share_of(rank), start=1):  # noqa: B007
        yield batch, True
    for _ in range(-(-most // batch_size) - made):
        yield next(share_of(0)), False


def _student_inputs(split: Split, batch: Batch, token_map: np.ndarray | None) -> dict[str, Tensor]:
    own_ids = None if token_map is None else torch.from_numpy(token_map).to(batch["input_ids"].device)
    return split.inputs(batch, own_ids)
