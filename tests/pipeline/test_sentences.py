"""Sentence encoders: an encoder and sentences in, a smaller encoder out, which sentence-transformers opens."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import curve, save_encoder, short_run
from safetensors.torch import load_file
from transformers import AutoModel

from glmd.cli import main
from glmd.commands.export import export_folder
from glmd.commands.verify import verify_folder
from glmd.data.batches import Collate
from glmd.distillation.distiller import Distiller
from glmd.distillation.methods import load_method
from glmd.distillation.teacher import OnlineTeacher
from glmd.errors import GlmdError
from glmd.models.pooling import pooling_of
from glmd.pipeline.run import run
from glmd.planning.plan import make_plan
from glmd.tasks.dataset import TaskDataset
from glmd.tasks.forms import task_form
from glmd.training.trainer import Trainer
from glmd.vocabulary.tokenizer import load_tokenizer
from glmd.vocabulary.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def texts(tiny) -> list[str]:
    return [line for line in tiny.corpus.read_text().splitlines() if line]


@pytest.fixture(scope="module")
def files(tiny, texts, tmp_path_factory) -> Path:
    """An encoder, sentences, and pairs of others with a number."""
    folder = tmp_path_factory.mktemp("sentences")
    save_encoder(folder / "encoder", tiny.teacher, pooling="mean_tokens", prompts={"q": "ab . "}, default="q")
    (folder / "train.txt").write_text("\n".join(texts[:40]) + "\n\n")
    with (folder / "sts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence1", "sentence2", "score"])
        writer.writerows([texts[40 + i], texts[60 + i], f"{i / 4}"] for i in range(12))
    return folder


STS = {"val_text": ["sentence1", "sentence2"], "label": "score"}


def config_of(files, output, *overrides, **given):
    sentences = {"train": str(files / "train.txt"), "text": "text", "max_length": 24, **given}
    return short_run(output, "embeddings", files / "encoder", sentences, *overrides)


def test_sentence_transformers_opens_a_student_and_gives_the_same_vectors(
    files, texts, tmp_path, trusting, monkeypatch
):
    from sentence_transformers import SentenceTransformer

    monkeypatch.setattr("glmd.commands.verify.check_exports", lambda folders: None)  # a process of six seconds
    output = tmp_path / "run"
    config = config_of(files, output, "controls.trim_only=true", val=str(files / "sts.csv"), **STS)
    results = run(config)
    rows = {row["system"]: row for row in results["rows"] if row["task"] is not None}
    assert rows.keys() == {"teacher", "student", "trim only"}
    assert all(list(row["metrics"])[:2] == ["spearman", "pearson"] for row in rows.values())
    assert rows["teacher"]["metrics"]["teacher_cosine"] == pytest.approx(1.0)
    assert rows["student"]["metrics_before"].keys() == rows["student"]["metrics"].keys()
    assert run(config)["rows"] == results["rows"]  # a finished run is the same one
    for folder in (
        output / "tasks/own/seed-0/task_soft_labels/student",
        output / "controls/trim_only/tasks/own/student",
    ):
        assert 'SentenceTransformer("THIS_FOLDER", trust_remote_code=True)' in (folder / "README.md").read_text()
        assert [check.problem for check in verify_folder(folder) if check.problem] == []
        encoder = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
        tokenizer, model = load_tokenizer(folder), AutoModel.from_pretrained(folder).eval()
        twins = []
        for text in texts[40:52]:
            with torch.no_grad():
                states = model(**tokenizer(f"ab . {text}", return_tensors="pt")).last_hidden_state[0]
            twins.append(states.mean(0) / states.mean(0).norm())
        np.testing.assert_allclose(encoder.encode(texts[40:52]), torch.stack(twins).numpy(), atol=1e-6)
        plain = SentenceTransformer(str(folder), device="cpu").encode(texts[40:52])  # by the stock tokenizer
        assert np.isfinite(plain).all() and plain.shape == (12, 16)


def test_a_student_of_all_layers_and_tokens_is_its_teacher(files, tmp_path, trusting):
    whole = ("student.num_hidden_layers=2", "vocabulary.keep_ratio=1.0", "task_soft_labels.learning_rate=1e-12")
    rows = run(config_of(files, tmp_path / "run", *whole))["rows"]
    assert [row["agreement"] for row in rows if "agreement" in row] == [pytest.approx(1.0)]
    assert "spearman" not in rows[-1]["metrics"] and rows[-1]["metrics"]["teacher_spearman"] == pytest.approx(1.0)


def test_a_killed_run_ends_in_the_same_weights_and_all_its_exports_pool_alike(files, tmp_path, trusting, monkeypatch):
    monkeypatch.setattr("glmd.commands.export.check_exports", lambda folders: None)
    step = Trainer._step

    def dying(self, *arguments):
        if arguments[4] == 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    def of(name):
        return config_of(files, tmp_path / name, "task_soft_labels.save_steps=2")

    stage = "tasks/own/seed-0/task_soft_labels"
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", dying)
        with pytest.raises(KeyboardInterrupt):
            run(of("killed"))
    export_folder(tmp_path / "killed" / stage, tmp_path / "so-far")
    run(of("killed"))
    run(of("whole"))
    weights = [tmp_path / name / stage / "student/model.safetensors" for name in ("killed", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    export_folder(tmp_path / "whole" / stage / "student", tmp_path / "wide", kind="expanded")
    for name in ("so-far", "wide"):
        assert pooling_of(tmp_path / name) == pooling_of(files / "encoder")
    # What nothing reads stays as it was.
    theirs, ours = (
        load_file(place)["pooler.dense.weight"] for place in (files / "encoder/model.safetensors", weights[1])
    )
    assert torch.equal(theirs, ours)


@pytest.mark.full
def test_the_cache_gives_the_live_teachers_curve(files, tmp_path, trusting):
    run(config_of(files, tmp_path / "live"))
    run(config_of(files, tmp_path / "cached", f"teacher.cache={tmp_path / 'cache'}"))
    live = curve(tmp_path / "live")
    assert len(live) == 4 and curve(tmp_path / "cached") == pytest.approx(live, rel=1e-5)


def test_vectors_are_learned_as_by_the_plain_formula_whatever_the_padding(files, tmp_path):
    """Also with a token of padding more."""
    plan = make_plan(config_of(files, tmp_path / "run"), try_out=False)
    task = plan.tasks["own"]
    form, size = task_form(task.task, kind=plan.kind), plan.source_size
    data = TaskDataset(task.train[:5], form, plan.tokenizer, max_length=24)
    batch = Collate(0)(data.__getitems__([(0, i) for i in range(5)]))
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(AutoModel.from_config(plan.teacher_config).double().eval())
    objective = load_method("embeddings")["task_soft_labels"]
    distiller = Distiller(objective, np.arange(size), classifier=models[0], task_logits=form.logits).eval()
    teacher = OnlineTeacher(None, models[1], Vocabulary.identity(size), task_logits=form.logits)
    vectors = []
    for model in models:
        found = []
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            mean = model(input_ids=row[: mask.sum()][None]).last_hidden_state[0].mean(0)
            found.append(mean / mean.norm())
        vectors.append(torch.stack(found))
    ours, theirs = vectors[0], vectors[1].detach()
    cosines = [1 - (ours[i] * theirs[i]).sum() for i in range(5)]
    divergences = []
    for i in range(5):
        others = [j for j in range(5) if j != i]
        p, q = ((each[others] @ each[i] / 0.05).log_softmax(0) for each in (theirs, ours))
        divergences.append((p.exp() * (p - q)).sum())
    twin = 10 * sum(cosines) / 5 + sum(divergences) / 5
    twin.backward()
    gradient = models[0].embeddings.word_embeddings.weight.grad.clone()
    for more in (0, 3):
        wider = {n: torch.nn.functional.pad(e, (0, more)) if e.ndim == 2 else e for n, e in batch.items()}
        wider["positions"] = wider["predicts"].flatten().nonzero()[:, 0]
        models[0].zero_grad()
        loss = objective.total(objective.means(distiller(wider, teacher(wider)), objective.counts(wider)), 0.0)
        loss.backward()
        assert loss.item() == pytest.approx(twin.item(), rel=1e-5)
        torch.testing.assert_close(models[0].embeddings.word_embeddings.weight.grad, gradient, rtol=1e-4, atol=1e-7)


# What is read


def test_both_sides_of_pairs_are_sentences_once_and_a_share_is_held_out(files, texts, tmp_path):
    rows = [{"a": texts[i], "b": texts[(i + 1) % 10], "s": i} for i in range(10)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"train": str(path), "text": "a", "text_pair": "b", "prompt": ""}
    task = make_plan(config_of(files, tmp_path / "run", **given), try_out=False).tasks["own"]
    assert len(task.train) == 10 and [len(each.texts) for each in task.val] == [2] and not task.is_scored
    task = make_plan(config_of(files, tmp_path / "run", **given, label="s", val_fraction=0.3), try_out=False).tasks[
        "own"
    ]
    assert [len(each.texts) for each in task.val] == [2] * 3 and task.is_scored
    assert all(each.label is None for each in task.train)


def test_prompts_are_read_before_texts_and_their_words_are_kept(files, texts, tmp_path):
    plan = make_plan(config_of(files, tmp_path / "run"), try_out=False)
    assert plan.tasks["own"].train[0].texts == ((f"ab . {texts[0]}", None),)
    assert {"ab", "."} <= set(plan.config.vocabulary.keep_words)
    assert plan.tasks["own"].task.max_length == 64  # as its folder says


def test_a_folder_without_pooling_is_given_one(tiny, files, tmp_path, trusting):
    save_encoder(tmp_path / "bare", tiny.teacher, pooling=None)
    config = config_of(
        files, tmp_path / "run", f"teacher={tmp_path / 'bare'}", "task_soft_labels.max_steps=1", pooling="cls"
    )
    run(config)
    student = tmp_path / "run/tasks/own/seed-0/task_soft_labels/student"
    assert json.loads((student / "1_Pooling/config.json").read_text())["pooling_mode_cls_token"]
    assert len(json.loads((student / "modules.json").read_text())) == 2


def test_what_cannot_be_learned_of_sentences_is_refused_in_one_line(tiny, files, tmp_path, write):
    bare = save_encoder(tmp_path / "bare", tiny.teacher, pooling=None)
    mse = write("mse.yaml", "task_soft_labels: [{signal: sentence_embeddings, loss: mse}]\n")
    sts = str(files / "sts.csv")
    told = (
        "{name: own, fields: [a], text: '{a}', metrics: [spearman], max_length: 9, problem_type: sentence_similarity}"
    )
    yaml = write("own.yaml", told)
    for overrides, given, says in (
        (("method=glmd", f"data.corpus=[{tiny.corpus}]"), {}, "compares them in .*; give method=embeddings"),
        (("method=soft-labels",), {}, "task_logits.kl_divergence compares answers, and own is of sentences"),
        (("controls.hard_labels=true",), {}, "controls.hard_labels: the sentences of own have no labels; give"),
        (("casting=cloze",), {}, "casting cloze: .* predicts no tokens; remove it"),
        ((f"teacher={bare}",), {}, "own.pooling is missing: .* has no modules.json"),
        ((), {"pooling": "mean"}, "pooling has no effect: .*1_Pooling/config.json says it"),
        ((), {"pooling": "max"}, "pooling must be one of mean, cls, last; got 'max'"),
        ((), {"val": sts, "label": "score"}, "own.label score: how similar two texts are, and val has one column"),
        ((), {"val": sts, **STS, "label": "scores"}, "sts.csv:1: there is no column 'scores'"),
        ((), {"val": sts, **STS, "label": "sentence1", "val_text": ["sentence1", "sentence2"]}, "must be a number"),
        ((), {"val_text": ["a", "b"]}, "own.val_text has no effect: val is a share of train"),
        ((), {"inputs": sts}, "own.inputs has no effect"),
        ((), {"text": "sentence"}, "field 'sentence' is missing"),
        (
            (f"tasks={{own: {{definition: {yaml}, train: a, val: b}}}}",),
            {},
            "own.definition: a task of sentences has none",
        ),
        (("task_soft_labels.gradient_accumulation_steps=2",), {}, "compares the examples of a batch with each other"),
        (
            (f"method={mse}", "student.initialization=scratch", "student.config.hidden_size=8"),
            {},
            "sentence_embeddings.mse: the student's hidden_size is 8, the teacher's 16; give a student as wide, or",
        ),
        ((f"teacher={tiny.teacher}",), {}, "own.label is missing: the column of the answers; without labels"),
        (
            (f"teacher={tiny.teacher}",),
            {"prompt": "a"},
            "own.prompt has no effect: teacher.model is no sentence encoder",
        ),
    ):
        with pytest.raises(GlmdError, match=says):
            make_plan(config_of(files, tmp_path / "run", *overrides, **given), try_out=False)


def test_flags_make_a_student_of_an_encoder(files, tmp_path, capsys):
    command = ["check", "--teacher", str(files / "encoder"), "--data", str(files / "train.txt")]
    assert main([*command, "--output", str(tmp_path / "run"), "task_soft_labels.max_steps=2"]) == 0
    said = capsys.readouterr()
    assert "method    embeddings" in said.out
    assert main([*command, "--base", "x"]) == 2
    assert "--base has no effect: " in capsys.readouterr().err
