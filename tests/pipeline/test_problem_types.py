"""Tasks whose answers are numbers, several labels, or a label for each word: runs, losses, and what students answer."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import curve, one_of, short_run
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from glmd.cli import main
from glmd.commands.usage import describe_students
from glmd.data.batches import Collate
from glmd.distillation.distiller import Distiller
from glmd.distillation.methods import load_method
from glmd.distillation.objective import HARD_LABELS
from glmd.distillation.teacher import OnlineTeacher, TeacherOutputs
from glmd.errors import ConfigError, DataError
from glmd.pipeline.run import run
from glmd.planning.plan import make_plan
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.forms import task_form
from glmd.vocabulary.tokenizer import load_tokenizer
from glmd.vocabulary.vocabulary import Vocabulary

PROBLEMS = ["regression", "multi_label_classification", "token_classification"]
NAMES = {"multi_label_classification": ["one", "two", "three"], "token_classification": ["B-X", "I-X", "O"]}


@pytest.fixture(scope="module")
def texts(tiny) -> list[str]:
    rows = [json.loads(line) for line in (tiny.superglue / "RTE/train.jsonl").read_text().splitlines()]
    return [row["premise"] for row in rows]


@pytest.fixture(scope="module")
def files(tiny, texts, tmp_path_factory) -> Path:
    """Rows of each problem, and a teacher with its head of drawn weights."""
    folder = tmp_path_factory.mktemp("problems")
    random = np.random.default_rng(0)
    with (folder / "regression.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "answer"])
        writer.writerows([text, f"{random.normal():.3f}"] for text in texts)
    marks = random.integers(2, size=(len(texts), 3))
    with (folder / "multi_label_classification.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", *NAMES["multi_label_classification"]])
        writer.writerows([text, *row] for text, row in zip(texts, marks.tolist(), strict=True))
    with (folder / "token_classification.jsonl").open("w") as file:
        for text in texts:
            tags = [NAMES["token_classification"][i] for i in random.integers(3, size=len(text.split()))]
            file.write(json.dumps({"text": text.split(), "answer": tags}) + "\n")
    for problem in PROBLEMS:
        names = NAMES.get(problem, ["LABEL_0"])
        options = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        is_words = problem == "token_classification"
        options |= {} if is_words else {"problem_type": problem}
        config = AutoConfig.from_pretrained(tiny.teacher, **options)
        torch.manual_seed(1)
        auto_class = AutoModelForTokenClassification if is_words else AutoModelForSequenceClassification
        auto_class.from_config(config).save_pretrained(folder / problem)
        load_tokenizer(tiny.teacher).save_pretrained(folder / problem)
    return folder


def source(files: Path, problem: str) -> Path:
    return files / f"{problem}.{'jsonl' if problem == 'token_classification' else 'csv'}"


def config_of(files, problem, output, *overrides, **tasks):
    label = NAMES[problem] if problem == "multi_label_classification" else "answer"
    given = {"train": str(source(files, problem)), "text": "text", "label": label, "max_length": 16, **tasks}
    return short_run(output, "soft-labels", files / problem, given, *overrides)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_student_learns_the_answers_and_gives_them_to_new_rows(files, tmp_path, trusting, problem):
    output = tmp_path / "run"
    results = run(config_of(files, problem, output, "controls.hard_labels=true"))
    rows = {row["system"]: row for row in results["rows"] if row["task"] is not None}
    assert rows.keys() == {"teacher", "student", "hard labels"}
    assert all(np.isfinite([*row["metrics"].values(), row.get("agreement", 0)]).all() for row in rows.values())
    student = output / "tasks/own/seed-0/task_soft_labels/student"
    told = json.loads((student / "config.json").read_text())
    assert told["architectures"][0].endswith("TokenClassification" if "token" in problem else "SequenceClassification")
    assert told.get("problem_type") == (None if "token" in problem else problem)
    answers = tmp_path / f"answers.{'jsonl' if 'token' in problem else 'csv'}"
    assert main(["predict", str(student), "--file", str(source(files, problem)), "--output", str(answers)]) == 0
    if problem == "regression":
        assert all(np.isfinite(float(row["prediction"])) for row in csv.DictReader(answers.open()))
    elif problem == "multi_label_classification":
        tokenizer, model = load_tokenizer(student), AutoModelForSequenceClassification.from_pretrained(student)
        for row in csv.DictReader(answers.open()):
            inputs = tokenizer(row["text"], truncation=True, max_length=16, return_tensors="pt")
            with torch.no_grad():
                yes = model(**inputs).logits[0].sigmoid() > 0.5
            names = [name for name, is_given in zip(NAMES[problem], yes.tolist(), strict=True) if is_given]
            assert row["prediction"] == "|".join(names)
    else:
        words = [json.loads(line)["text"] for line in source(files, problem).read_text().splitlines()]
        tags = [json.loads(line)["label"] for line in answers.read_text().splitlines()]
        assert [len(row) for row in tags] == [len(row) for row in words]
    assert main(["evaluate", str(student), "--data", str(source(files, problem)), "--split", "train"]) == 0


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_student_of_all_layers_and_tokens_agrees_and_has_no_loss(files, tmp_path, trusting, problem):
    whole = ("student.num_hidden_layers=2", "vocabulary.keep_ratio=1.0", "student.config={hidden_dropout_prob: 0.0}")
    rows = run(config_of(files, problem, tmp_path / "run", *whole, "task_soft_labels.learning_rate=1e-12"))["rows"]
    assert [row["agreement"] for row in rows if "agreement" in row] == [pytest.approx(1.0)]


@pytest.mark.parametrize("problem", one_of(reversed(PROBLEMS)))
def test_the_cache_gives_the_live_teachers_curve(files, tmp_path, trusting, problem):
    run(config_of(files, problem, tmp_path / "live"))
    run(config_of(files, problem, tmp_path / "cached", f"teacher.cache={tmp_path / 'cache'}"))
    live = curve(tmp_path / "live")
    assert len(live) == 4 and curve(tmp_path / "cached") == pytest.approx(live, rel=1e-5)


# Losses against the plainest twins, in float64


@pytest.fixture
def parts(files, tmp_path):
    """Of a problem the student, the teacher, and a batch of examples of different lengths."""

    def make(problem):
        plan = make_plan(config_of(files, problem, tmp_path / "run"), try_out=False)
        task = plan.tasks["own"]
        form = task_form(task.task, kind="masked")
        data = TaskDataset(task.train[:5], form, plan.tokenizer, max_length=16)
        batch = Collate(0)(data.__getitems__([(0, i) for i in range(5)]))
        models = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            models.append(form.model_class(plan.teacher_config).from_config(plan.teacher_config).double().eval())
        return task.train[:5], form, batch, *models

    return make


def sums(objective, form, batch, student, teacher=None):
    size = student.config.vocab_size
    distiller = Distiller(
        objective,
        np.arange(size),
        classifier=student,
        task_logits=form.logits,
        num_classes=form.task.num_classes,
    ).eval()
    outputs = TeacherOutputs()
    if teacher is not None:
        outputs = OnlineTeacher(None, teacher, Vocabulary.identity(size), task_logits=form.logits)(batch)
    found = distiller(batch, outputs)
    return objective.total(objective.means(found, objective.counts(batch)), 0.0)


def own_outputs(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("problem", PROBLEMS)
def test_soft_labels_are_learned_as_by_the_plain_formula(parts, problem):
    examples, form, batch, student, teacher = parts(problem)
    loss = sums(load_method("soft-labels")["task_soft_labels"], form, batch, student, teacher)
    loss.backward()
    gradient = student.classifier.weight.grad.clone()
    student.zero_grad()
    ours, theirs = own_outputs(student, batch), own_outputs(teacher, batch).detach()
    if problem == "regression":
        twin = torch.stack([(ours[i, 0] - theirs[i, 0]) ** 2 / 2 for i in range(5)]).mean()
    elif problem == "multi_label_classification":
        values = []
        for i in range(5):
            for label in range(3):
                p, q = theirs[i, label].sigmoid(), ours[i, label].sigmoid()
                values.append(p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
        twin = torch.stack(values).mean()
    else:
        values = []
        for i, example in enumerate(examples):
            place = 1  # behind [CLS]; each word of this vocabulary is one token
            for _ in example.words[:14]:
                p, q = theirs[i, place].log_softmax(-1), ours[i, place].log_softmax(-1)
                values.append((p.exp() * (p - q)).sum())
                place += 1
        twin = torch.stack(values).mean()
    twin.backward()
    assert loss.item() == pytest.approx(twin.item(), rel=1e-6)
    torch.testing.assert_close(gradient, student.classifier.weight.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_labels_are_learned_as_by_transformers_own_loss(parts, problem):
    examples, form, batch, student, _ = parts(problem)
    loss = sums(HARD_LABELS, form, batch, student)
    logits = own_outputs(student, batch)
    labels = [each.label for each in examples]
    if problem == "regression":
        twin = functional.mse_loss(logits[:, 0], torch.tensor(labels).double()) / 2
    elif problem == "multi_label_classification":
        twin = functional.binary_cross_entropy_with_logits(logits, torch.tensor(labels).double())
    else:
        targets = torch.full(logits.shape[:2], -100)
        for i, label in enumerate(labels):
            kept = label[:14]
            targets[i, 1 : 1 + len(kept)] = torch.tensor(kept)
        twin = functional.cross_entropy(logits.transpose(1, 2), targets)
    assert loss.item() == pytest.approx(twin.item(), rel=1e-6)


def test_padding_changes_no_loss_of_words(parts):
    _, form, batch, student, teacher = parts("token_classification")
    objective = load_method("soft-labels")["task_soft_labels"]
    alone = sums(objective, form, batch, student, teacher)
    wider = {name: functional.pad(each, (0, 7)) if each.ndim == 2 else each for name, each in batch.items()}
    width = batch["tagged"].shape[1]
    wider["tagged_positions"] = batch["tagged_positions"] // width * (width + 7) + batch["tagged_positions"] % width
    wider["positions"] = wider["predicts"].flatten().nonzero()[:, 0]
    assert sums(objective, form, wider, student, teacher).item() == pytest.approx(alone.item(), rel=1e-12)


def test_a_student_says_what_its_answers_are_where_its_teacher_does_not(files, tmp_path, trusting):
    teacher = tmp_path / "teacher"
    shutil.copytree(files / "multi_label_classification", teacher)
    told = json.loads((teacher / "config.json").read_text())
    told["problem_type"] = None
    (teacher / "config.json").write_text(json.dumps(told))
    config = config_of(files, "multi_label_classification", tmp_path / "run", f"teacher.model={teacher}")
    results = run(config)
    student = tmp_path / "run/tasks/own/seed-0/task_soft_labels/student"
    assert json.loads((student / "config.json").read_text())["problem_type"] == "multi_label_classification"
    assert "top_k=None" in describe_students(config, results)


def test_the_end_of_a_run_on_numbers_that_all_differ_names_its_student(files, tmp_path, trusting):
    config = config_of(files, "regression", tmp_path / "run")
    assert 'function_to_apply="none"' in describe_students(config, run(config))


def test_labels_that_are_all_one_number_are_not_scored(files, tmp_path):
    path = tmp_path / "hidden.csv"
    path.write_text("text,answer\nab,-1.0\ncd,-1.0\n")
    with pytest.raises(DataError, match="all 2 labels are -1, with which nothing correlates"):
        make_plan(config_of(files, "regression", tmp_path / "run", val=str(path)), try_out=False)


# What is refused


def test_what_does_not_fit_a_problem_is_refused(files, tmp_path):
    for problem, tasks, overrides, error, says in (
        ("regression", {"problem_type": "single_label_classification"}, (), DataError, "each of its 24 labels once"),
        ("regression", {}, ("method=pkd", "casting=cloze"), ConfigError, "casting cloze"),
        ("regression", {"label": "text"}, (), ConfigError, "name a column twice"),
        ("token_classification", {"problem_type": "regression"}, (), ConfigError, "lists words in 'text'"),
        ("multi_label_classification", {"label": ["one", "two"]}, (), ConfigError, 'the labels "one", "two"'),
        (
            "multi_label_classification",
            {"label": ["one", "two", "tree"]},
            (),
            ConfigError,
            'the labels "one", "two", "tree"',
        ),
    ):
        with pytest.raises(error, match=says):
            make_plan(config_of(files, problem, tmp_path / "run", *overrides, **tasks), try_out=False)


def test_a_loss_on_classes_is_refused_for_a_number(files, tmp_path, write):
    method = write("own.yaml", "task_soft_labels: [{signal: task_logits, loss: js_divergence}]\n")
    with pytest.raises(ConfigError, match=r"compares classes, and its answer is a number; give .*kl_divergence.*mse"):
        make_plan(config_of(files, "regression", tmp_path / "run", f"method={method}"), try_out=False)
