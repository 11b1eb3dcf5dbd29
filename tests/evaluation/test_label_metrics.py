"""Scores of numbers, several labels and labels of words are those of scipy, scikit-learn and seqeval."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from seqeval.metrics import f1_score
from seqeval.metrics.sequence_labeling import get_entities
from sklearn import metrics

from glmd.errors import ConfigError, DataError
from glmd.evaluation.label_metrics import (
    entities,
    entity_f1,
    labels_macro_f1,
    labels_micro_f1,
    pearson,
    spearman,
    subset_accuracy,
    word_accuracy,
)
from glmd.evaluation.metrics import require_metrics, score
from glmd.tasks.examples import TaskExample
from glmd.tasks.tasks import Task

TAGS = ("O", "B-PER", "I-PER", "E-PER", "S-PER", "B-LOC", "I-LOC")
numbers = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=30)
tags = st.lists(st.sampled_from(TAGS), min_size=1, max_size=12)


@given(numbers, st.floats(-1e6, 1e6))
def test_correlations_are_scipys_with_ties_and_far_from_zero(pairs, offset):
    ours, theirs = (np.array(each, dtype=float) for each in zip(*pairs, strict=True))
    for found, twin in ((pearson, stats.pearsonr), (spearman, stats.spearmanr)):
        if len(set(ours)) == 1 or len(set(theirs)) == 1:
            assert found(ours + offset, theirs) == 0.0
        else:
            expected = twin(ours, theirs).statistic
            assert found(ours + offset, theirs) == pytest.approx(expected, abs=1e-7)


def test_a_perfect_correlation_is_1():
    values = [0.1, 0.2, 0.7, 5.5]
    assert pearson(values, values) == spearman(values, values) == 1.0
    assert pearson(values, [-each for each in values]) == pytest.approx(-1.0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(2, 5))
def test_scores_of_several_labels_are_scikit_learns(seed, size, count):
    random = np.random.default_rng(seed)
    given_labels, gold = random.integers(2, size=(2, size, count))
    options = {"zero_division": 0}
    assert labels_micro_f1(given_labels, gold) == pytest.approx(
        metrics.f1_score(gold, given_labels, average="micro", **options)
    )
    assert labels_macro_f1(given_labels, gold) == pytest.approx(
        metrics.f1_score(gold, given_labels, average="macro", **options)
    )
    assert subset_accuracy(given_labels, gold) == pytest.approx(metrics.accuracy_score(gold, given_labels))


@given(tags)
def test_entities_are_seqevals(sequence):
    assert list(entities(sequence)) == get_entities(sequence)


@given(st.lists(st.tuples(tags, st.randoms(use_true_random=False)), min_size=1, max_size=8))
def test_the_f1_of_entities_is_seqevals(rows):
    gold = [sequence for sequence, _ in rows]
    said = [[tag if random.random() < 0.6 else random.choice(TAGS) for tag in sequence] for sequence, random in rows]
    width = max(map(len, said))
    ids = np.array([[*map(TAGS.index, row), *[-1] * (width - len(row))] for row in said])
    labels = [tuple(map(TAGS.index, row)) for row in gold]
    assert entity_f1(ids, labels, TAGS) == pytest.approx(float(f1_score(gold, said, zero_division=0)))
    right, given_tags = (list(itertools.chain.from_iterable(each)) for each in (gold, said))
    assert word_accuracy(ids, labels) == pytest.approx(metrics.accuracy_score(right, given_tags))


def test_a_word_that_was_not_read_is_no_entity_and_not_right():
    labels = [(1, 2, 0, 0)]
    assert entity_f1(np.array([[1, 2, -1]]), labels, TAGS) == 1.0
    assert word_accuracy(np.array([[1, 2, -1]]), labels) == 0.5


SHARED = {"name": "T", "fields": ("text",), "text": "{text}", "max_length": 16}


def test_a_metric_of_other_answers_is_refused():
    for problem, labels, metric, says in (
        ("regression", (), "accuracy", "needs one class or candidate for each example"),
        ("regression", (), "entity_f1", "needs labels of words"),
        ("multi_label_classification", ("a", "b"), "macro_f1", "needs one class or candidate"),
        ("token_classification", ("NOUN", "VERB"), "entity_f1", "needs labels as O, B-PER and I-PER"),
    ):
        task = Task(**SHARED, labels=labels, metrics=(metric,), problem_type=problem)
        with pytest.raises(ConfigError, match=says):
            require_metrics(task)


def test_a_task_of_numbers_is_scored_by_both_correlations():
    task = Task(**SHARED, metrics=("pearson", "spearman"), problem_type="regression")
    examples = [TaskExample(i, (("t", None),), value) for i, value in enumerate((0.0, -1.0, 2.5))]
    found = score(task, [0.2, -3.0, 1.0], examples)
    twin = stats.pearsonr([0.2, -3, 1], [0, -1, 2.5]).statistic
    assert found == {"pearson": pytest.approx(twin), "spearman": 1.0}


def test_what_is_no_answer_is_refused():
    words = {"labels": ("O", "B-X"), "problem_type": "token_classification", "metrics": ("word_accuracy",)}
    several = {"labels": ("a", "b"), "problem_type": "multi_label_classification", "metrics": ("subset_accuracy",)}
    numbers = {"problem_type": "regression", "metrics": ("pearson",)}
    for task, labels, predictions, wanted in (
        (several, ((0, 1), (1, 1)), [0, 1], r"\(2, 2\) of 0 and 1"),
        (several, ((0, 1), (1, 1)), [[0, 2], [1, 1]], r"\(2, 2\) of 0 and 1"),
        (words, ((0, 1), (1,)), [[0, 2], [1, -1]], r"\(2, words\) ids of 2 labels"),
        (numbers, (0.5, 1.5), [[0.5], [1.5]], r"\(2,\) finite numbers"),
        (numbers, (0.5, 1.5), [0.5, math.nan], r"\(2,\) finite numbers"),
    ):
        examples = [TaskExample(i, (("t", None),), label) for i, label in enumerate(labels)]
        with pytest.raises(DataError, match=f"T: predictions must be {wanted}"):
            score(Task(**SHARED, **task), predictions, examples)
