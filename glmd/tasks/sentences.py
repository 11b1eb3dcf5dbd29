"""Sentences to learn vectors of: the texts of a file, without labels, and pairs with a number to score by.

    task = task_of_sentences("mine", columns, pooling)
    rows = read_sentences(task, "sts.csv", "val")           # an example a row, of one text or two
    train = each_sentence(rows)                             # an example a sentence

Both sides of a pair are sentences. The prompt of the encoder is part of each text.
"""

from collections.abc import Sequence
from pathlib import Path

from glmd.data.jsonl import read_lines
from glmd.data.tables import Found, Place, Split, open_split
from glmd.errors import DataError, counted
from glmd.models.pooling import Pooling
from glmd.tasks.columns import MAX_LENGTH, Columns
from glmd.tasks.examples import TaskExample, text_of
from glmd.tasks.labels import number_of
from glmd.tasks.tasks import SENTENCES, Task, _shown

METRICS = ("spearman", "pearson")


def task_of_sentences(
    name: str, columns: Columns, pooling: Pooling, *, val_fields: Sequence[str] = (), prompt: str = ""
) -> Task:
    """The task of making the vectors of an encoder. columns: `label` is that of val's numbers, "" where it has none.

    val_fields: the columns of val's texts, where these are others.
    """
    return Task(
        name,
        columns.texts,
        f"{{{columns.text}}}",
        METRICS,
        pooling.max_length or MAX_LENGTH,
        text_pair=None if columns.text_pair is None else f"{{{columns.text_pair}}}",
        label_field=columns.label,
        problem_type=SENTENCES,
        val_fields=tuple(val_fields),
        prompt=prompt,
        pooling=(pooling.mode, pooling.normalizes),
    )


def read_sentences(task: Task, source: str, split: Split, *, is_labeled: bool) -> list[TaskExample]:
    """An example for each row of a file: its text, or its two, each a row of tokens, and its number where it has one.

    is_labeled: each row has a number. Raises DataError naming file, line and field.
    """
    names = task.val_fields if split == "val" and task.val_fields else task.fields
    found = _found(source, split, task.name)
    if found.texts is not None:
        found.texts.require([*names, *([task.label_field] if is_labeled else [])])
    examples: list[TaskExample] = []
    for where, row in found.rows:
        texts = tuple((task.prompt + text_of(row, name, where), None) for name in names)
        label = number_of(row.get(task.label_field)) if is_labeled else None
        if is_labeled and label is None:
            got = _shown(row.get(task.label_field))
            raise DataError(
                f"{where}: field {task.label_field!r} must be a number, how similar both texts are; got {got}"
            )
        examples.append(TaskExample(len(examples), texts, label, where=where))
    if not examples:
        raise DataError(f"{source}: {task.name} has no rows in {split}")
    return examples


def each_sentence(rows: Sequence[TaskExample]) -> list[TaskExample]:
    """An example for each different text of the rows, in their order."""
    first_at: dict[str, str] = {}
    for row in rows:
        for text, _ in row.texts:
            first_at.setdefault(text, row.where)
    return [TaskExample(i, ((text, None),), None, where=where) for i, (text, where) in enumerate(first_at.items())]


def told(task: Task, train: Sequence[TaskExample], rows: int) -> str:
    """What is learned from, in words."""
    prompt = f", each after the prompt {task.prompt!r}" if task.prompt else ""
    normal = ", brought to length 1" if task.pooling[1] else ""
    how = {"mean": "the mean of a text's tokens", "cls": "a text's first token", "last": "a text's last token"}
    return (
        f"{task.name}: {counted(len(train), 'different sentence')} of {counted(rows, 'row')}{prompt}; a vector is "
        f"{how[task.pooling[0]]}{normal}"
    )


def _found(source: str, split: Split, name: str) -> Found:
    """The rows of a file; of one of plain text its lines, as the field `text`."""
    path = Path(source).expanduser()
    if path.suffix.lower() != ".txt" or not path.is_file():
        return open_split(source, split, Place(name))
    return Found((f"{path}:{number}", {"text": line}) for number, line in read_lines(path) if line.strip())
