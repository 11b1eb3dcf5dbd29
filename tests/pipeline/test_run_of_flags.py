"""A run of flags: a fine-tuned model and a file of texts and labels in, a student out, without a language model."""

import csv
import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, ModernBertConfig

from glmd.cli import main
from glmd.commands.own_data import Flags, run_of_flags
from glmd.config_file import load_config
from glmd.errors import ConfigError
from glmd.models.student import fitting_initialization
from glmd.planning.plan import make_plan


@pytest.fixture
def reviews(tiny, tmp_path) -> Path:
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["body", "stars"])
        for line in (tiny.superglue / "RTE/train.jsonl").read_text().splitlines():
            row = json.loads(line)
            writer.writerow([row["premise"], row["label"]])
    return path


@pytest.fixture
def classifier(finished) -> str:
    return str(finished.folder / "tasks/RTE/task_teacher/model")


def test_a_classifier_and_a_csv_become_a_student_that_answers(classifier, reviews, tmp_path, trusting, capsys, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "run"
    settings = ["task_soft_labels.num_train_epochs=1", "tasks.reviews.max_length=32"]
    given = ["--teacher", classifier, "--data", str(reviews), "--output", str(folder), *settings]
    assert main(["run", *given]) == 0
    assert "predicts no words, so the stages of word prediction are left out" in caplog.text
    assert "text: body, a guess" in caplog.text and "label: stars, a guess" in caplog.text
    student = folder / "tasks/reviews/seed-0/task_soft_labels/student"
    said = capsys.readouterr().out
    assert str(student) in said and 'pipeline("text-classification"' in said
    config = json.loads((student / "config.json").read_text())
    teacher = json.loads((Path(classifier) / "config.json").read_text())
    assert (config["num_hidden_layers"], config["id2label"]) == (1, teacher["id2label"])
    assert config["vocab_size"] <= teacher["vocab_size"] * 0.7
    assert "word prediction" not in (folder / "pretraining/student/README.md").read_text()
    assert main(["predict", str(student), "--file", str(reviews)]) == 0
    answered = list(csv.DictReader((tmp_path / "reviews.predicted.csv").open()))
    assert len(answered) == 24 and {row["prediction"] for row in answered} <= set(teacher["id2label"].values())


def test_a_student_of_all_layers_and_tokens_begins_as_its_teacher(classifier, reviews, tmp_path, trusting):
    folder = tmp_path / "run"
    given = ["--teacher", classifier, "--data", str(reviews), "--output", str(folder), "--layers", "2"]
    settings = ["task_soft_labels.max_steps=1", "task_soft_labels.learning_rate=1e-12", "controls.hard_labels=false"]
    assert main(["run", *given, "--keep-ratio", "1", "tasks.reviews.max_length=32", *settings]) == 0
    theirs = AutoModelForSequenceClassification.from_pretrained(classifier).state_dict()
    ours = AutoModelForSequenceClassification.from_pretrained(folder / "pretraining/student").state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["agreement"] for row in rows if "agreement" in row] == [1.0]


def test_the_method_has_the_stages_that_the_models_allow(tiny, classifier, reviews):
    model, corpus = str(tiny.teacher), (str(tiny.corpus),)
    whole = {"teacher": classifier, "data": str(reviews), "text": "body", "label": ["stars"]}
    for flags, method, words in (
        (Flags(**whole), "soft-labels", "predicts no words"),
        (Flags(**whole, base=model), "glmd-no-pretraining", f"by the LM head of {model} on the layers of {classifier}"),
        (Flags(**whole, base=model, corpus=corpus), "glmd", "task_lm: the words"),
        (Flags(**whole | {"teacher": model}), "glmd-no-pretraining", f"{model} is fine-tuned on "),
    ):
        values, said = run_of_flags(flags)
        assert values["method"] == method and words in "\n".join(said)
        plan = make_plan(
            load_config(values),
            try_out=False,
            hash_corpus=False,
        )
        assert plan.teaches_task_alone == (method == "soft-labels")


def test_what_flags_cannot_mean_is_refused(tiny, classifier, reviews, tmp_path, capsys):
    model, data = str(tiny.teacher), ["--data", str(reviews)]
    for given, says in (
        (["--teacher", classifier], "--data is missing"),
        (data, "--teacher is missing"),
        (["--teacher", classifier, *data, "--corpus", str(tiny.corpus)], "--corpus has no effect without --base"),
        (["--teacher", model, "--base", model, *data], f"--teacher {model}: is no model of a task"),
        (["quickstart", "--teacher", classifier, *data], "quickstart and --data are both given"),
        (["--teacher", classifier, *data, "--text", "bdy"], "--text bdy: "),
        (["--teacher", classifier, *data, "method=glmd"], "method glmd compares them in pretraining and task_lm"),
        (["--teacher", classifier, *data, "casting=cloze"], "casting cloze: teacher.model"),
        (["--teacher", classifier, "--base", classifier, *data], f"--base {classifier}: holds a Bert"),
        (["--teacher", classifier, *data, "--layers", "1", "student.num_hidden_layers=2"], "--layers and student.num"),
    ):
        assert main(["check", *given, f"output_dir={tmp_path / 'run'}"]) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]


def test_the_layers_are_copied_as_the_architecture_allows():
    sizes = {"vocab_size": 90, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    assert fitting_initialization(BertConfig(**sizes, num_hidden_layers=4), 2) == "uniform"
    # Its first layer alone has no norm before its attention.
    assert fitting_initialization(ModernBertConfig(**sizes, num_hidden_layers=6, pad_token_id=0), 3) == "even"


def test_a_teacher_of_one_task_is_none_of_another(classifier, reviews, tmp_path):
    values, _ = run_of_flags(Flags(teacher=classifier, data=str(reviews), output=str(tmp_path / "run")))
    values["tasks"]["more"] = values["tasks"]["reviews"]
    with pytest.raises(ConfigError, match="answers to one task, and there are 2 tasks"):
        make_plan(load_config(values))
    del values["tasks"]["more"]
    values["teacher"]["tasks"] = {"reviews": "others/model"}
    with pytest.raises(ConfigError, match=r"and teacher\.tasks\.reviews names another"):
        make_plan(load_config(values))
