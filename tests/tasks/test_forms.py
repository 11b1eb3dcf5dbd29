"""A form of a task is one class: what it reads, which model reads it, and what that answers."""

import dataclasses

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from families import class_form, cloze_form
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from glmd.data.batches import Collate
from glmd.evaluation.scoring import answers_of, predict
from glmd.pipeline.run import run
from glmd.planning.plan import make_plan
from glmd.planning.run_cost import Layout, run_cost
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.examples import TaskExample, read_split
from glmd.tasks.forms import CASTINGS, ClassForm, task_form
from glmd.tasks.tasks import BLANK, load_task


class SwappedForm(ClassForm):
    """Classes of the second text before the first, by logits of the opposite sign."""

    name = "swapped"

    def rows(self, examples, tokenizer, *, max_length):
        swapped = [dataclasses.replace(e, texts=tuple((b, a) for a, b in e.texts)) for e in examples]
        return super().rows(swapped, tokenizer, max_length=max_length)

    def logits(self, *arguments, **options):
        return -super().logits(*arguments, **options)


@pytest.mark.slow
def test_a_form_is_added_by_one_class_and_runs_to_the_end(tiny, trusting, tmp_path, monkeypatch):
    """Checked, costed, fine-tuned, distilled and scored: by no other module's leave."""
    monkeypatch.setitem(CASTINGS, "swapped", lambda task, causal: SwappedForm(task))
    config = tiny.config(tmp_path / "run", "casting=swapped", "pretraining.max_steps=1")
    plan = make_plan(config)
    assert {stage.name for stage in run_cost(plan, Layout()).stages} >= {"RTE task_teacher", "RTE task_soft_labels"}
    rows = {row["stage"]: row for row in run(config)["rows"] if row["system"] in ("teacher", "student")}
    assert {row.get("casting", "swapped") for row in rows.values()} == {"swapped"}
    folder = tmp_path / "run/tasks/RTE/task_teacher/model"
    task = load_task("RTE", "swapped")
    examples = read_split(task, str(tiny.superglue), "val", require_labels=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = []
    for example in examples:
        ((first, second),) = example.texts
        with torch.no_grad():
            logits = model(**tokenizer(second, first, truncation=True, max_length=32, return_tensors="pt")).logits
        expected.append(int(logits.argmin()))
    accuracy = np.mean([answer == example.label for answer, example in zip(expected, examples, strict=True)])
    assert rows["task_teacher"]["metrics"]["accuracy"] == pytest.approx(accuracy)
    data = TaskDataset(examples, SwappedForm(task), tokenizer, max_length=32)
    got = predict(model, data, Collate(0), token_map=None, accelerator=Accelerator(cpu=True))
    assert answers_of(task, got).tolist() == expected


def test_an_unknown_casting_is_refused_with_those_that_there_are(tiny, tmp_path):
    with pytest.raises(Exception, match="casting must be one of head, cloze; got 'haed'"):
        make_plan(tiny.config(tmp_path / "run", "casting=haed"))


@pytest.mark.parametrize("name", ["classes", "choices", "labels in a cloze", "candidates in a cloze", "continuation"])
def test_the_columns_that_a_plan_counts_are_those_of_a_real_batch(name, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
    one, two = [word for word in tokenizer.get_vocab() if word.isalpha() and len(word) == 4][:2]
    forms = {
        "classes": class_form(),
        "choices": task_form(load_task("COPA"), kind="masked"),
        "labels in a cloze": cloze_form(one, two),
        "candidates in a cloze": cloze_form(),
        "continuation": cloze_form(one, two, kind="causal"),
    }
    form, choices = forms[name], (one, two) if forms[name].task.is_choice else ()
    text = one if form.has_own_head else f"{one} {BLANK}"
    examples = [TaskExample(i, ((text, None),) * max(1, len(choices)), 0, choices=choices) for i in range(2)]
    data = TaskDataset(examples, form, tokenizer, max_length=16)
    batch = Collate(0)([data[0, i] for i in range(2)])
    dummy = form.dummy(2, max(1, len(choices)), batch["input_ids"].shape[1])
    every = {"input_ids", "token_type_ids", "attention_mask", "labels", "example_id", "predicts", "positions"}
    assert {key: value.shape for key, value in dummy.items()} == {
        key: value.shape for key, value in batch.items() if key not in every
    }
