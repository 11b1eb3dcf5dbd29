"""Scores of resamples against those of resamples that are literally made."""

import dataclasses
import time

import numpy as np
import pytest

from glmd.errors import DataError
from glmd.evaluation.metrics import METRICS, score
from glmd.evaluation.resampling import resampled_scores, resamples
from glmd.tasks.examples import TaskExample
from glmd.tasks.tasks import Task

SHARED = {"name": "Read", "folder": "Read", "hub_name": "read", "max_length": 64, "text_pair": None}
CLASSES = Task(
    **SHARED,
    fields=("text",),
    text="{text}",
    labels=(0, 1, 2, 3),
    metrics=("accuracy", "macro_f1", "matthews_correlation"),
)
BINARY = dataclasses.replace(
    CLASSES, labels=(0, 1), metrics=("f1_binary", "accuracy", "macro_f1", "matthews_correlation")
)
QUESTIONS = Task(
    **SHARED,
    fields=("question", "answer"),
    text="{question} {answer}",
    labels=(0, 1),
    metrics=("f1_binary", "group_exact_match", "accuracy"),
    group_by=("question",),
)
PAIRS = dataclasses.replace(QUESTIONS, metrics=("gender_parity", "accuracy"))
QUERIES = Task(
    **SHARED,
    fields=("query",),
    text="{query} {choice}",
    choices_from="entities",
    metrics=("record_f1", "record_exact_match"),
)
NUMBERS = Task(**SHARED, fields=("text",), text="{text}", metrics=("pearson", "spearman"), problem_type="regression")
SEVERAL = dataclasses.replace(
    CLASSES,
    metrics=("subset_accuracy", "labels_micro_f1", "labels_macro_f1"),
    problem_type="multi_label_classification",
)
WORDS = Task(
    **SHARED,
    fields=("text",),
    text="{text}",
    labels=("O", "B-X", "I-X"),
    metrics=("entity_f1", "word_accuracy"),
    problem_type="token_classification",
)
NAMES = ("Paris", "the City of Paris", "Rome", "Hague, Holland", "The Hague", "Oslo")


def examples(labels, groups=None) -> list[TaskExample]:
    groups = groups or [None] * len(labels)
    pairs = zip(labels, groups, strict=True)
    return [TaskExample(i, (("t", None),), int(y), group=g and (g,)) for i, (y, g) in enumerate(pairs)]


def case(task: Task, size: int, seed: int = 0) -> tuple[np.ndarray, list[TaskExample]]:
    random = np.random.default_rng(seed)
    if task is QUERIES:
        texts = tuple(("q", name) for name in NAMES)
        golds = [tuple(random.choice(NAMES, random.integers(1, 3), replace=False)) for _ in range(size)]
        queries = [TaskExample(i, texts, 0, choices=NAMES, answers=gold) for i, gold in enumerate(golds)]
        return random.integers(len(NAMES), size=size), queries
    if not task.has_one_answer:
        width = {"regression": (), "token_classification": (6,)}.get(task.problem_type, (4,))
        gold, said = random.integers(2 if task is SEVERAL else 3, size=(2, size, *width))
        said = np.where(random.random((size, *(1 for _ in width))) < 0.5, gold, said)
        rows = [tuple(row) if width else float(row) for row in gold.tolist()]
        return said, [TaskExample(i, (("t", None),), row) for i, row in enumerate(rows)]
    labels = random.integers(len(task.labels), size=size)
    predictions = np.where(random.random(size) < 0.7, labels, random.integers(len(task.labels), size=size))
    # Pairs whose members stand apart; questions of one to many answers.
    groups = {
        "Pairs": [i % (size // 2) for i in range(size)],
        "Questions": random.integers(size // 3, size=size).tolist(),
    }
    name = "Pairs" if "gender_parity" in task.metrics else "Questions"
    return predictions, examples(labels, [f"g{g}" for g in groups[name]] if task.group_by else None)


def literal(task: Task, predictions, examples, count: int) -> dict[str, list[float]]:
    """By `score` of examples that are drawn and copied; a group that is drawn again is another group."""
    groups = [[i] for i in range(len(examples))]
    if task.group_by:
        names = list(dict.fromkeys(each.group for each in examples))
        groups = [[i for i, each in enumerate(examples) if each.group == name] for name in names]
    found: dict[str, list[float]] = {name: [] for name in task.metrics}
    for drawn in resamples(len(groups), count):
        places = [(copy, i) for copy, unit in enumerate(drawn) for i in groups[unit]]
        copies = [dataclasses.replace(examples[i], group=(copy,)) for copy, i in places]
        for name, value in score(task, np.array([predictions[i] for _, i in places]), copies).items():
            found[name].append(value)
    return found


TASKS = [CLASSES, BINARY, QUESTIONS, PAIRS, QUERIES, NUMBERS, SEVERAL, WORDS]
IDS = ["classes", "binary", "questions", "pairs", "queries", "numbers", "several", "words"]


@pytest.mark.parametrize("task", TASKS, ids=IDS)
@pytest.mark.parametrize("size", [6, 40])
def test_scores_of_resamples_are_those_of_examples_drawn_and_copied(task, size):
    predictions, drawn_from = case(task, size)
    found, twin = resampled_scores(task, predictions, drawn_from, count=60), literal(task, predictions, drawn_from, 60)
    assert list(found) == list(task.metrics)
    for name in task.metrics:
        np.testing.assert_allclose(found[name], twin[name], rtol=0, atol=1e-12)
        assert len(set(found[name])) > 1 and all(type(value) is float for value in found[name])


def test_every_metric_is_resampled():
    assert {name for task in TASKS for name in task.metrics} == set(METRICS)
    assert [name for name, metric in METRICS.items() if metric.statistics is None] == ["spearman"]  # drawn and ranked


@pytest.mark.parametrize("task", TASKS, ids=IDS)
@pytest.mark.parametrize("size", [6, 100])
def test_a_metric_is_what_its_sums_over_all_examples_give(task, size):
    predictions, scored = case(task, size, seed=1)
    for name, value in score(task, predictions, scored).items():
        metric = METRICS[name]
        if metric.statistics is None:
            continue
        sums = metric.statistics(predictions, *metric.columns(scored, task)).sum(axis=0)
        assert metric.of_sums(sums) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(("predictions", "labels"), [([0, 0], [0, 0]), ([1, 1], [1, 1]), ([0, 1], [0, 0]), ([1], [0])])
def test_a_resample_of_one_class_gives_what_score_gives_there(predictions, labels):
    found = resampled_scores(BINARY, predictions, examples(labels), count=20)
    assert found == literal(BINARY, predictions, examples(labels), 20)
    if labels == predictions:
        assert set(found["matthews_correlation"]) == {0.0} and set(found["accuracy"]) == {1.0}


def test_resamples_depend_on_their_number_and_that_of_the_units_alone():
    labels = [0, 1, 2, 3] * 5
    right = resampled_scores(CLASSES, labels, examples(labels), count=30)
    assert set(right["accuracy"]) == set(right["macro_f1"]) == {1.0}
    # A wrong answer at one place and one at another: where a resample has both places alike, the scores are equal.
    drawn = [np.bincount(each, minlength=20) for each in resamples(20, 30)]
    for place in (3, 11):
        given = [label if i != place else (label + 1) % 4 for i, label in enumerate(labels)]
        wrong = resampled_scores(CLASSES, given, examples(labels), count=30)["accuracy"]
        np.testing.assert_allclose(wrong, [1 - times[place] / 20 for times in drawn], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(next(resamples(5, 1)), PINNED)
    assert [each.tolist() for each in resamples(7, 3)] == [each.tolist() for each in resamples(7, 5)][:3]


PINNED = [4, 1, 0, 0, 3]  # a change of it unpairs what was scored before


def test_groups_are_drawn_whole():
    """One group of 30 wrong answers, nine of one right answer: accuracy is a share of 30 x + (10 - x)."""
    groups = ["big"] * 30 + list("abcdefghi")
    found = resampled_scores(QUESTIONS, [1] * 30 + [0] * 9, examples([0] * 39, groups), count=200)
    possible = [(10 - x) / (30 * x + 10 - x) for x in range(11)]
    for value in found["accuracy"]:
        assert min(abs(value - each) for each in possible) < 1e-12
    np.testing.assert_allclose(np.mean(found["group_exact_match"]), 0.9, atol=0.03)


def test_the_spread_is_that_of_the_mean_of_independent_examples():
    predictions, scored = case(BINARY, 400)
    accuracy = score(BINARY, predictions, scored)["accuracy"]
    found = resampled_scores(BINARY, predictions, scored, count=4000)["accuracy"]
    assert np.std(found) == pytest.approx((accuracy * (1 - accuracy) / 400) ** 0.5, rel=0.05)
    assert np.mean(found) == pytest.approx(accuracy, abs=0.002)


def test_ten_thousand_queries_take_seconds():
    predictions, scored = case(QUERIES, 10_000)
    before = time.process_time()
    found = resampled_scores(QUERIES, predictions, scored)
    assert time.process_time() - before < 10
    assert len(found["record_f1"]) == 1000


def test_what_score_refuses_is_refused():
    with pytest.raises(DataError, match="prediction 4 is none of its 4 classes"):
        resampled_scores(CLASSES, [4], examples([0]))
