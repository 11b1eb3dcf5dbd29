"""Tasks whose answer is one of several candidates: from rows to a stock multiple-choice model and its predictions."""

import json

import numpy as np
import pytest
import torch

from glmd.cli import main
from glmd.pipeline.run import run
from glmd.tasks.examples import read_split
from glmd.tasks.tasks import load_task
from glmd.vocabulary.tokenizer import load_tokenizer

STUDENT = "tasks/COPA/seed-0/task_soft_labels/student"


@pytest.fixture(scope="module")
def copa(tiny, tmp_path_factory):
    """A file of questions about the tiny world's words, whose right choice repeats a word of the premise."""
    rng = np.random.default_rng(1)
    text = (tiny.superglue / "RTE/train.jsonl").read_text()
    words = sorted({word for line in text.splitlines() for word in json.loads(line)["premise"].split()} - {"."})
    rows = []
    for i in range(40):
        premise, other = rng.choice(words, 3), str(rng.choice(words))
        choices = [f"{premise[0]} .", f"{other} ."]
        rows.append(
            {
                "premise": " ".join(premise) + " .",
                "question": ("cause", "effect")[i % 2],
                "choice1": choices[i % 3 == 0],
                "choice2": choices[i % 3 != 0],
                "label": int(i % 3 == 0),
                "idx": i,
            }
        )
    path = tmp_path_factory.mktemp("copa") / "copa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chosen(tiny, copa, tmp_path_factory):
    """(folder, results) of a whole run on it."""
    folder = tmp_path_factory.mktemp("choices") / "run"
    task = f"tasks={{COPA: {{train: {copa}, val: {copa}}}}}"
    return folder, run(tiny.config(folder, task, "pretraining.max_steps=2"))


@pytest.mark.slow
def test_a_run_on_choices_leaves_a_stock_multiple_choice_model_with_the_scores_of_the_table(chosen, copa):
    from transformers import AutoModelForMultipleChoice

    folder, results = chosen
    row = next(row for row in results["rows"] if (row["system"], row["stage"]) == ("student", "task_soft_labels"))
    model = AutoModelForMultipleChoice.from_pretrained(folder / STUDENT)
    tokenizer = load_tokenizer(folder / STUDENT)
    answers, labels = [], []
    for example in read_split(load_task("COPA"), str(copa), "val", require_labels=True):
        texts, pairs = zip(*example.texts, strict=True)
        inputs = tokenizer(list(texts), list(pairs), padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**{name: each[None] for name, each in inputs.items()}).logits
        answers.append(int(logits.argmax()))
        labels.append(example.label)
    assert row["metrics"] == {"accuracy": pytest.approx(np.mean(np.array(answers) == labels))}
    assert row["constant"] == {"accuracy": pytest.approx(26 / 40)}
    assert 0 <= row["agreement"] <= 1 and row["examples"] == 40
    stages = {(row["system"], row["stage"]) for row in results["rows"]}
    assert {("teacher", "task_teacher"), ("student", "task_lm"), ("hard labels", "hard_labels")} <= stages
    card = (folder / STUDENT / "README.md").read_text()
    assert "AutoModelForMultipleChoice.from_pretrained" in card


def test_predict_writes_what_evaluate_scores(chosen, copa, tmp_path, capsys):
    folder, _ = chosen
    unlabeled = tmp_path / "test.jsonl"
    rows = [json.loads(line) for line in copa.read_text().splitlines()]
    unlabeled.write_text("".join(json.dumps({**row, "label": None}) + "\n" for row in rows), encoding="utf-8")
    output = tmp_path / "COPA.jsonl"
    common = [str(folder / STUDENT), "--task", "COPA", "--max-length", "32", "--batch-size", "7"]
    assert main(["predict", *common, "--file", str(unlabeled), "--output", str(output)]) == 0
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["idx"] for row in written] == list(range(40))
    accuracy = np.mean([row["label"] == given["label"] for row, given in zip(written, rows, strict=True)])
    capsys.readouterr()
    assert main(["evaluate", *common, "--data", str(copa)]) == 0
    assert f"{accuracy:.4f}" in capsys.readouterr().out
    assert main(["predict", *common, "--file", str(unlabeled), "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_model_with_another_head_is_refused_by_name(chosen, copa, finished, capsys):
    folder, _ = chosen
    classifier = finished.folder / "tasks/RTE/seed-0/task_soft_labels/student"
    assert main(["evaluate", str(classifier), "--task", "COPA", "--data", str(copa)]) == 2
    assert "holds a BertForSequenceClassification; COPA needs a model for MultipleChoice" in capsys.readouterr().err
    assert main(["evaluate", str(folder / STUDENT), "--task", "RTE", "--data", "unread"]) == 2
    assert "holds a BertForMultipleChoice; RTE needs a model for SequenceClassification" in capsys.readouterr().err


def test_more_tokens_than_positions_are_refused_before_the_model_loads(chosen, copa, monkeypatch, capsys):
    monkeypatch.setattr("glmd.commands.evaluate.load_classifier", lambda *_: pytest.fail("loaded"))
    folder, _ = chosen
    assert main(["evaluate", str(folder / STUDENT), "--task", "COPA", "--data", str(copa), "--max-length", "256"]) == 2
    assert "256 tokens are more than its 64 positions; give --max-length" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_run_on_choices_continues_to_the_same_weights(
    chosen, tiny, copa, trusting, tmp_path, monkeypatch
):
    from glmd.training.trainer import Trainer

    real, calls = Trainer._step, []

    def dies(self, *arguments):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return real(self, *arguments)

    task = f"tasks={{COPA: {{train: {copa}, val: {copa}}}}}"
    config = tiny.config(tmp_path / "run", task, "pretraining.max_steps=2")
    monkeypatch.setattr(Trainer, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(Trainer, "_step", real)
    run(config)
    weights = f"{STUDENT}/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (chosen[0] / weights).read_bytes()
