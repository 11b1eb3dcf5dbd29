"""What a card tells of a task, and the task that is read from it again."""

from dataclasses import replace

import pytest

from glmd.models.card import PROBE, ModelCard, card_text, told_by_card
from glmd.tasks.tasks import Cloze, Task, load_task, task_names
from glmd.tasks.told import facts_of, told_task

TASK = Task("own", ("Body", "Tëxt\u2028two"), "{Body}: {{x}}\n{Body}", ("accuracy", "macro_f1"), 256, labels=("a", "b"),
            text_pair="{Tëxt\u2028two}", label_field="my - label: 1")  # fmt: skip


def through_a_card(task, folder, classes=None):
    (folder / "README.md").write_text(card_text(ModelCard("A", "", "B", facts_of(task))), encoding="utf-8")
    (folder / PROBE).touch()
    return told_task(told_by_card(folder)[1], classes or [str(each) for each in task.labels])


@pytest.mark.parametrize(
    "task",
    [
        TASK,
        replace(TASK, labels=(False, True)),
        replace(TASK, labels=(3, 1)),
        replace(TASK, name="RTE"),
        *map(load_task, task_names()),
    ],
    ids=lambda task: f"{task.name} {task.labels}",
)
def test_a_task_is_read_from_its_card_again(task, tmp_path):
    assert through_a_card(task, tmp_path) == task


def test_a_task_of_other_keys_is_told_by_name_alone(tmp_path):
    for key, value in (("may_be_blank", ("Body",)), ("group_by", ("id",)), ("cloze", Cloze("{Body} {blank}", None, ("x", "y")))):  # noqa: E501  # fmt: skip
        other = replace(TASK, **{key: value})
        if key == "cloze":
            other = replace(TASK, fields=("Body",), text="{Body}", text_pair=None, cloze=value)
        assert facts_of(other) == {"task": "own"}
        assert through_a_card(other, tmp_path) is None
    assert facts_of(load_task("RTE", "cloze")) == {"task": "RTE"}
