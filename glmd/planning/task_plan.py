"""A task of a run, with its examples read in."""

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

from glmd.config import RunConfig
from glmd.distillation.objective import Objective
from glmd.errors import ConfigError, DataError, counted
from glmd.evaluation.metrics import constant_answers, require_metrics, score
from glmd.planning.teacher_rules import columns_of, fine_tunes_teacher, follows_teacher, learns_from_train, task_of
from glmd.tasks.columns import hold_out, require_same_labels
from glmd.tasks.examples import TaskExample, read_split
from glmd.tasks.sentences import each_sentence, read_sentences, told
from glmd.tasks.tasks import SENTENCES, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskPlan:
    """A task with its examples.

    train: what the teacher and the control learn from; empty where nothing does. inputs: what the student learns
        from, the training examples unless others are named. val: what all are scored on, with all labels or none.
    """

    task: Task
    train: list[TaskExample]
    inputs: list[TaskExample]
    val: list[TaskExample]
    verbalizers: tuple[int, ...] = ()  # ids of the words for the labels, where the task is asked as a cloze

    @property
    def is_scored(self) -> bool:
        return self.val[0].is_labeled

    @property
    def has_own_inputs(self) -> bool:
        return self.inputs is not self.train

    def val_fingerprint(self) -> str:
        """Of what all are scored on, however it is asked."""
        rows = [each.content for each in self.val]
        return hashlib.sha256(json.dumps([self.task.metrics, rows]).encode()).hexdigest()

    def fingerprint(self) -> str:
        splits = [self.train, self.val, *([self.inputs] if self.has_own_inputs else [])]
        rows = [[each.content for each in split] for split in splits]
        return hashlib.sha256(json.dumps([self.task.record(), self.verbalizers, rows]).encode()).hexdigest()


def plan_task(
    config: RunConfig, name: str, method: dict[str, Objective], source: str | None, verbalizers: tuple[int, ...]
) -> TaskPlan:
    """Read a task's examples. Raises GlmdError for what is not there, or cannot be learned from or scored.

    source: of the tasks that have no files of their own.
    """
    task, files = task_of(config, name), config.tasks[name]
    require_metrics(task)
    columns, share = columns_of(config, name), files.get("val_fraction")
    if task.problem_type == SENTENCES:
        return _plan_sentences(config, task, files)
    own_inputs, uses_labels = files.get("inputs"), any(each.reads("labels") for each in method.values())
    train: list[TaskExample] = []
    learned = learns_from_train(config, method, name)
    if learned:
        needs_labels = fine_tunes_teacher(config, method, name) or config.controls.hard_labels or uses_labels
        train = read_split(task, _source(files, source, "train"), "train", require_labels=needs_labels, training=True)
    elif files.get("train") and columns is None and share is None:
        raise ConfigError(f"tasks.{name}.train has no effect beside inputs and a named teacher; remove it")
    val_source, scored = _source(files, source, "val"), config.selection == "best"
    if columns is not None and share is None and files.get("train"):
        require_same_labels(task, columns, files["train"], val_source)
    if share is not None:
        if task.is_choice or task.group_by:
            has = "choices" if task.is_choice else "groups of rows"
            raise ConfigError(f"tasks.{name}.val_fraction: {name} has {has}, which it would tear apart; give val")
        rows = train or read_split(task, val_source, "train", require_labels=scored, training=True)
        rest, val = _held_out(task, rows, share, val_source)
        train = rest if learned else []
    else:
        val = read_split(task, val_source, "val", require_labels=scored)
    inputs = train
    if own_inputs:
        inputs = read_split(task, own_inputs, "train", require_labels=uses_labels, training=True)
    unlabeled = [not example.is_labeled for example in val]
    if any(unlabeled) and not all(unlabeled):
        found = f"{sum(unlabeled)} of {len(val)} rows of {name} val have no label"
        raise DataError(f"{val_source}: {found}; give all or none")
    if columns is not None:
        labels = ", ".join(map(str, task.labels[:10])) + (", ..." if len(task.labels) > 10 else "") or "numbers"
        named = "as the teacher has them" if follows_teacher(config, name) else "as they stand in the file"
        kind = "labels" if task.has_one_answer else task.problem_type
        logger.info("%s: %s %s, %s; scored by %s", name, kind, labels, named, " and ".join(task.metrics))
    if not all(unlabeled):
        score(task, constant_answers(task, val)[0], val)  # what cannot be scored is refused now, not after training
    return TaskPlan(task, train, inputs, val, verbalizers)


def _plan_sentences(config: RunConfig, task: Task, files: dict[str, Any]) -> TaskPlan:
    """The sentences of train, and the rows of val. Raises GlmdError, as `plan_task`."""
    name, is_labeled = task.name, bool(task.label_field)
    if config.controls.hard_labels:
        raise ConfigError(
            f"controls.hard_labels: the sentences of {name} have no labels; give controls.hard_labels=false"
        )
    if files.get("inputs"):
        raise ConfigError(f"tasks.{name}.inputs has no effect: train has no labels either; name its file in train")
    if config.selection == "best" and not is_labeled:
        raise ConfigError(f"selection best needs {name}'s label, of val; give it, or agreement")
    source, share = str(files["train"]), files.get("val_fraction")
    rows = read_sentences(task, source, "train", is_labeled=is_labeled and share is not None)
    if share is not None:
        if task.val_fields:
            raise ConfigError(f"tasks.{name}.val_text has no effect: val is a share of train; name a file in val")
        kept, val = hold_out(rows, share, seed=0)
        logger.info("%s: %d of %s of %s are held out as val", name, len(val), counted(len(rows), "row"), source)
    else:
        kept, val = rows, read_sentences(task, str(files["val"]), "val", is_labeled=is_labeled)
    train = each_sentence(kept)
    logger.info("%s", told(task, train, len(kept)))
    twins = {text for each in val for text, _ in each.texts} & {each.texts[0][0] for each in train}
    if twins:
        logger.warning("%s: %s of val stand in train too, word for word", name, counted(len(twins), "text"))
    if is_labeled and len({each.label for each in val}) < 2:
        raise DataError(f"{files['val']}: field {task.label_field!r} holds one number alone, which ranks nothing")
    return TaskPlan(task, train, train, val)


def _held_out(
    task: Task, rows: list[TaskExample], share: float, source: str
) -> tuple[list[TaskExample], list[TaskExample]]:
    """Rows of train, and those of them that are val: the same for all seeds, which are compared by it."""
    train, val = hold_out(rows, share, seed=0)
    logger.info("%s: %d of %s of %s are held out as val", task.name, len(val), counted(len(rows), "row"), source)
    twins = len({each.texts for each in train} & {each.texts for each in val})
    if twins:
        logger.warning("%s: %s of val stand in train too, word for word", task.name, counted(twins, "text"))
    return train, val


def _source(files: dict[str, Any], source: str | None, split: str) -> str:
    found = files.get(split) or source
    assert found is not None, "checked before"
    return str(found)
