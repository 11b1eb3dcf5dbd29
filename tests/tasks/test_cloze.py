"""Tasks asked as a cloze: the model stays a masked LM, from fine-tuning to the exported student."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from glmd.cli import main
from glmd.pipeline.run import run
from glmd.tasks.examples import read_split
from glmd.tasks.tasks import load_task
from glmd.vocabulary.tokenizer import load_tokenizer
from glmd.vocabulary.vocabulary import Vocabulary

RTE = """
name: RTE
folder: RTE
hub_name: rte
fields: [premise, hypothesis]
text: "{{premise}}"
text_pair: "{{hypothesis}}"
labels: [entailment, not_entailment]
metrics: [accuracy]
max_length: 32
cloze:
  text: "{{hypothesis}} {{blank}} ."
  text_pair: "{{premise}}"
  verbalizers: [{words}]
"""


@pytest.fixture(scope="module")
def rare_words(tiny) -> list[str]:
    """Two words that a count would drop: they stand nowhere in corpus and inputs."""
    tokenizer = load_tokenizer(tiny.teacher)
    seen = set(tiny.corpus.read_text().split()) | set((tiny.superglue / "RTE/train.jsonl").read_text().split())
    rare = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and len(word) == 4 and word not in seen)
    assert len(rare) >= 2, "the tiny world has a tail"
    return rare[-2:]


@pytest.fixture(scope="module")
def cloze_run(tiny, rare_words, tmp_path_factory):
    """(folder, results, definition) of a whole run, its exports proved in a fresh process."""
    root = tmp_path_factory.mktemp("cloze")
    definition = root / "rte.yaml"
    definition.write_text(RTE.format(words=", ".join(rare_words)))
    config = tiny.config(root / "run", "casting=cloze", f"tasks.RTE.definition={definition}", "seeds=[0]")
    return root / "run", run(config), definition


def stock_answers(folder: Path, examples, words: list[str]) -> list[int]:
    """What a stock masked LM says of the words at the mask, one example at a time."""
    from transformers import AutoModelForMaskedLM

    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), load_tokenizer(folder)
    ids = tokenizer.convert_tokens_to_ids(words)
    answers = []
    for example in examples:
        text, pair = (part.replace("\ufdd0", "[MASK]") for part in example.texts[0])
        inputs = tokenizer(text, pair, truncation="only_second", max_length=32, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        at = tokenizer.mask_token_id == inputs["input_ids"][0]
        answers.append(int(logits[at][0, ids].argmax()))
    return answers


def row_of(results: dict, system: str, stage: str) -> dict:
    return next(row for row in results["rows"] if (row["system"], row["stage"]) == (system, stage))


@pytest.mark.slow
def test_every_model_of_a_cloze_run_is_a_stock_masked_lm_with_the_scores_of_the_table(cloze_run, tiny, rare_words):
    folder, results, definition = cloze_run
    examples = read_split(load_task(definition, "cloze"), str(tiny.superglue), "val", require_labels=True)
    labels = np.array([example.label for example in examples])
    answers = {}
    for (system, stage), place in {
        ("teacher", "task_teacher"): "task_teacher/model",
        ("student", "task_soft_labels"): "seed-0/task_soft_labels/student",
        ("hard labels", "hard_labels"): "seed-0/hard_labels/student",
    }.items():
        given = answers[system] = np.array(stock_answers(folder / "tasks/RTE" / place, examples, rare_words))
        row = row_of(results, system, stage)
        assert row["metrics"] == {"accuracy": pytest.approx((given == labels).mean())}
        assert row["casting"] == "cloze"
    agreement = (answers["student"] == answers["teacher"]).mean()
    assert row_of(results, "student", "task_soft_labels")["agreement"] == pytest.approx(agreement)
    assert "lm_scores" in row_of(results, "student", "task_lm")


@pytest.mark.slow
def test_the_words_of_the_labels_are_kept_though_nothing_holds_them(cloze_run, tiny, rare_words):
    folder, _, _ = cloze_run
    vocabulary = Vocabulary.load(folder / "vocabulary")
    ids = load_tokenizer(tiny.teacher).convert_tokens_to_ids(rare_words)
    assert set(ids) <= set(vocabulary.kept_ids.tolist())
    free = tiny.config(folder.parent / "head")
    run_without = Vocabulary.load(Path(run_head(free)) / "vocabulary")
    assert not set(ids) <= set(run_without.kept_ids.tolist()), "else this shows nothing"


def run_head(config) -> str:
    from dataclasses import replace

    run(replace(config, tasks={}))
    return config.output_dir


def test_evaluate_asks_a_masked_lm_in_a_blank(cloze_run, tiny, capsys):
    folder, results, definition = cloze_run
    student = folder / "tasks/RTE/seed-0/task_soft_labels/student"
    assert main(["evaluate", str(student), "--task", str(definition), "--data", str(tiny.superglue)]) == 0
    accuracy = row_of(results, "student", "task_soft_labels")["metrics"]["accuracy"]
    scores = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert scores["casting"] == "cloze" and scores["accuracy"] == f"{accuracy:.4f}"


def test_a_word_that_the_students_vocabulary_dropped_is_refused(cloze_run, tiny, rare_words, tmp_path, capsys):
    """It would be read, and scored, as the token it is mapped to."""
    folder, _, _ = cloze_run
    tokenizer = load_tokenizer(tiny.teacher)
    kept = set(Vocabulary.load(folder / "vocabulary").kept_ids.tolist())
    gone = next(
        word for word, i in tokenizer.get_vocab().items() if word.isalpha() and len(word) == 4 and i not in kept
    )
    definition = tmp_path / "rte.yaml"
    definition.write_text(RTE.format(words=f"{gone}, {rare_words[0]}"))
    student = folder / "tasks/RTE/seed-0/task_soft_labels/student"
    assert main(["evaluate", str(student), "--task", str(definition), "--data", str(tiny.superglue)]) == 2
    assert f"cloze.verbalizers: '{gone}' was dropped from this vocabulary, which reads '" in capsys.readouterr().err
    teacher = folder / "tasks/RTE/task_teacher/model"
    assert main(["evaluate", str(teacher), "--task", str(definition), "--data", str(tiny.superglue)]) == 0


@pytest.mark.slow
def test_candidates_fill_the_blank_of_a_masked_lm(tiny, trusting, tmp_path):
    """Multi-token candidates of unequal length, scored by the sum of their tokens' log-probabilities."""
    from transformers import AutoModelForMaskedLM

    words = sorted({word for line in tiny.corpus.read_text().splitlines() for word in line.split()} - {"."})[:12]
    rows = [
        {
            "premise": f"{words[i % 12]} {words[(i + 3) % 12]} .",
            "question": ("cause", "effect")[i % 2],
            "choice1": words[i % 12],
            "choice2": f"{words[(i + 5) % 12]} {words[(i + 7) % 12]} .",
            "label": i % 2,
            "idx": i,
        }
        for i in range(16)
    ]
    copa = tmp_path / "copa.jsonl"
    copa.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = run(
        tiny.config(
            tmp_path / "run",
            "casting=cloze",
            f"tasks={{COPA: {{train: {copa}, val: {copa}}}}}",
            "pretraining.max_steps=2",
            *(f"{stage}.max_length=64" for stage in ("task_teacher", "task_lm", "task_soft_labels")),
        )
    )
    folder = tmp_path / "run/tasks/COPA/seed-0/task_soft_labels/student"
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), load_tokenizer(folder)
    right = 0
    for row, example in zip(
        rows, read_split(load_task("COPA", "cloze"), str(copa), "val", require_labels=True), strict=True
    ):
        scores = []
        for (text, _), candidate in zip(example.texts, (row["choice1"], row["choice2"]), strict=True):
            ids = tokenizer(candidate, add_special_tokens=False)["input_ids"]
            inputs = tokenizer(text.replace("\ufdd0", " ".join(["[MASK]"] * len(ids))), return_tensors="pt")
            with torch.no_grad():
                log_probabilities = model(**inputs).logits[0].log_softmax(-1)
            at = tokenizer.mask_token_id == inputs["input_ids"][0]
            scores.append(log_probabilities[at].gather(1, torch.tensor(ids)[:, None]).sum().item())
        right += int(np.argmax(scores)) == row["label"]
    assert row_of(results, "student", "task_soft_labels")["metrics"]["accuracy"] == pytest.approx(right / 16)


@pytest.mark.slow
def test_a_task_that_asks_for_its_first_candidate_is_answered_by_yes_where_that_one_scores_best(
    tiny, trusting, tmp_path
):
    """WSC: candidates score the mean of their tokens' log-probabilities; rows labeled no are only scored."""
    from transformers import AutoModelForMaskedLM

    words = sorted({word for line in tiny.corpus.read_text().splitlines() for word in line.split()} - {"."})[:12]
    rows = []
    for i in range(16):
        names = [words[i % 12], f"{words[(i + 5) % 12]} {words[(i + 7) % 12]}", words[(i + 2) % 12]]
        target = {"span1_text": names[0], "span1_index": 0, "span2_text": words[(i + 3) % 12], "span2_index": 1}
        text = " ".join([*names[:1], target["span2_text"], *names[1:]])
        rows.append({"text": text, "target": target, "candidates": names[1:], "label": i % 2 == 0, "idx": i})
    wsc = tmp_path / "wsc.jsonl"
    wsc.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = run(
        tiny.config(
            tmp_path / "run",
            "casting=cloze",
            f"tasks={{WSC: {{train: {wsc}, val: {wsc}}}}}",
            "pretraining.max_steps=2",
            *(f"{stage}.max_length=64" for stage in ("task_teacher", "task_lm", "task_soft_labels")),
        )
    )
    folder = tmp_path / "run/tasks/WSC/seed-0/task_soft_labels/student"
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder), load_tokenizer(folder)
    answers = []
    for example in read_split(load_task("WSC", "cloze"), str(wsc), "val", require_labels=True):
        scores = []
        for (text, pair), candidate in zip(example.texts, example.choices, strict=True):
            ids = tokenizer(candidate, add_special_tokens=False)["input_ids"]
            pair = pair.replace("\ufdd0", " ".join(["[MASK]"] * len(ids)))
            with torch.no_grad():
                log_probabilities = model(**tokenizer(text, pair, return_tensors="pt")).logits[0].log_softmax(-1)
            at = tokenizer.mask_token_id == tokenizer(text, pair, return_tensors="pt")["input_ids"][0]
            scores.append(log_probabilities[at].gather(1, torch.tensor(ids)[:, None]).mean().item())
        answers.append(int(np.argmax(scores)) == 0)
    assert len(set(answers)) == 2, "else this shows little"
    right = np.mean([answer == row["label"] for answer, row in zip(answers, rows, strict=True)])
    assert row_of(results, "student", "task_soft_labels")["metrics"]["accuracy"] == pytest.approx(right)
    output, arguments = tmp_path / "WSC.jsonl", ("--task", "WSC", "--max-length", "64")
    assert main(["predict", str(folder), *arguments, "--file", str(wsc), "--output", str(output)]) == 0
    assert [json.loads(line)["label"] for line in output.read_text().splitlines()] == list(map(str, answers))


def test_candidates_that_become_equal_in_the_students_vocabulary_are_told(tiny, tmp_path, caplog):
    from types import SimpleNamespace

    from glmd.pipeline.data import warn_of_equal_candidates
    from glmd.planning.stages import Stage

    tokenizer = load_tokenizer(tiny.teacher)
    first, second, third = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and len(word) == 4)[:3]
    rows = [
        {"premise": "a .", "question": "cause", "choice1": first, "choice2": other, "label": 0, "idx": i}
        for i, other in enumerate((second, third, first))
    ]
    (tmp_path / "copa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task("COPA", "cloze")
    val = read_split(task, str(tmp_path / "copa.jsonl"), "val", require_labels=True)
    token_map = np.arange(len(tokenizer))
    stage = Stage("task_lm", "a", None, None, 0, task=SimpleNamespace(task=task, val=val))

    def warn() -> None:
        vocabulary = SimpleNamespace(token_map=token_map)
        plan = SimpleNamespace(tokenizer=tokenizer)
        warn_of_equal_candidates(SimpleNamespace(plan=plan, said=set(), vocabulary=lambda stage: vocabulary), stage)

    warn()
    assert not caplog.records
    token_map[tokenizer.convert_tokens_to_ids(second)] = tokenizer.convert_tokens_to_ids(first)
    warn()
    assert "COPA: in 1 of 3 val examples candidates that the teacher tells apart are equal" in caplog.text


@pytest.mark.slow
def test_terms_of_words_and_labels_share_one_masked_lm(tiny, trusting, tmp_path, rare_words):
    method, definition = tmp_path / "both.yaml", tmp_path / "rte.yaml"
    method.write_text(
        "task_lm:\n  - {signal: lm_logits, loss: kl_divergence, temperature: 15}\n"
        "  - {signal: task_logits, loss: kl_divergence}\n"
        "task_soft_labels:\n  - {signal: task_logits, loss: kl_divergence}\n"
        "  - {signal: lm_logits, loss: kl_divergence, weight: 0.1}\n"
    )
    definition.write_text(RTE.format(words=", ".join(rare_words)))
    options = ("casting=cloze", f"tasks.RTE.definition={definition}", f"method={method}", "data.corpus=[]")
    results = run(tiny.config(tmp_path / "run", *options, "controls.hard_labels=false"))
    losses = row_of(results, "student", "task_soft_labels")["training"]["losses"]
    assert set(losses) == {"task_logits.kl_divergence", "lm_logits.kl_divergence"}
    assert all(np.isfinite(value) and value > 0 for value in losses.values())


def test_a_blank_that_does_not_fit_is_refused_before_anything_is_trained(tiny, tmp_path, rare_words, capsys):
    definition = tmp_path / "rte.yaml"
    definition.write_text(RTE.format(words=", ".join(rare_words)))
    arguments = [
        str(tiny.root / "run.yaml"),
        f"output_dir={tmp_path / 'run'}",
        "casting=cloze",
        "task_soft_labels.max_length=8",
    ]
    assert main(["check", *arguments, f"tasks.RTE.definition={definition}"]) == 2
    message = capsys.readouterr().err
    assert "too many for max_length 8; give a larger" in message and "/RTE/train.jsonl:" in message


def test_a_task_without_a_cloze_form_is_refused(tiny, tmp_path, capsys):
    definition = tmp_path / "rte.yaml"
    definition.write_text(RTE.format(words="a, b").partition("cloze:")[0])
    arguments = [str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", "casting=cloze"]
    assert main(["check", *arguments, f"tasks.RTE.definition={definition}"]) == 2
    assert "task RTE has no cloze form; write one" in capsys.readouterr().err
