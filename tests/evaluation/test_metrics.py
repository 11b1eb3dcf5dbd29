"""Scores of tasks against scikit-learn or the plainest twin, and the benchmark's average against hand arithmetic."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmd.errors import ConfigError, DataError
from glmd.evaluation.leaderboard import SUPERGLUE, superglue_average
from glmd.evaluation.metrics import (
    METRICS,
    Metric,
    accuracy,
    f1_binary,
    gender_parity,
    group_exact_match,
    macro_f1,
    matthews_correlation,
    normalize_answer,
    record_exact_match,
    record_f1,
    require_metrics,
    score,
)
from glmd.tasks.examples import TaskExample
from glmd.tasks.tasks import Task, load_task, task_names

OVER_LABELS = [accuracy, macro_f1, f1_binary, matthews_correlation]
READING = {"name": "Read", "folder": "Read", "hub_name": "read", "max_length": 64}
QUESTIONS = Task(
    **READING,
    fields=("question", "answer"),
    text="{question}",
    text_pair="{answer}",
    labels=(0, 1),
    metrics=("f1_binary", "group_exact_match"),
    group_by=("question",),
)
PAIRS = dataclasses.replace(QUESTIONS, metrics=("gender_parity", "accuracy"))
ALTERNATIVES = Task(
    **READING,
    fields=("premise", "first", "second", "third"),
    text="{premise}",
    text_pair="{choice}",
    choices=("{first}", "{second}", "{third}"),
    metrics=("accuracy",),
)
QUERIES = Task(
    **READING,
    fields=("passage", "query"),
    text="{passage}",
    text_pair="{query} {choice}",
    choices_from="entities",
    metrics=("record_f1", "record_exact_match"),
)


def refusal(error, call, *arguments) -> str:
    with pytest.raises(error) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def examples(labels, *, groups=None, idx=None) -> list[TaskExample]:
    """Classification examples with these labels."""
    return [
        TaskExample(i, (("text", None),), label, idx=idx and idx[i], group=groups and (groups[i],))
        for i, label in enumerate(labels)
    ]


def query(choices, answers, label: int | None = 0, example_id: int = 0) -> TaskExample:
    texts = tuple(("passage", choice) for choice in choices)
    return TaskExample(example_id, texts, label, choices=tuple(choices), answers=tuple(answers))


@st.composite
def rows(draw, num_classes=None):
    """(predictions, labels, number of classes)"""
    num_classes = num_classes or draw(st.integers(2, 5))
    ids = st.integers(0, num_classes - 1)
    rows = draw(st.lists(st.tuples(ids, ids), min_size=1, max_size=30))
    return [p for p, _ in rows], [y for _, y in rows], num_classes


# --- Over labels -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(rows())
@pytest.mark.filterwarnings("ignore")  # scikit-learn warns of one class only
def test_metrics_over_labels_equal_those_of_scikit_learn(case):
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predictions, labels, _ = case
    assert accuracy(predictions, labels) == pytest.approx(accuracy_score(labels, predictions), abs=1e-15)
    assert macro_f1(predictions, labels) == pytest.approx(f1_score(labels, predictions, average="macro"), abs=1e-12)
    assert matthews_correlation(predictions, labels) == pytest.approx(matthews_corrcoef(labels, predictions), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(rows(num_classes=2))
@pytest.mark.filterwarnings("ignore")
def test_f1_binary_is_that_of_the_positive_class_in_scikit_learn(case):
    from sklearn.metrics import f1_score

    predictions, labels, _ = case
    assert f1_binary(predictions, labels) == pytest.approx(f1_score(labels, predictions), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(rows(), st.randoms(use_true_random=False))
@pytest.mark.parametrize("metric", [accuracy, macro_f1, matthews_correlation])
def test_order_and_class_names_do_not_change_a_score(metric, case, random):
    predictions, labels, num_classes = case
    value = metric(predictions, labels)
    assert (-1 if metric is matthews_correlation else 0) <= value <= 1
    assert type(value) is float
    order = random.sample(range(len(labels)), len(labels))
    renamed = np.array(random.sample(range(num_classes), num_classes))
    assert metric(renamed[predictions][order], renamed[labels][order]) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("metric", OVER_LABELS)
def test_a_perfect_score_is_exactly_one(metric):
    for labels in ([0, 1], [0, 1] * 3 + [1], [1, 0, 0] * 1000):
        assert metric(labels, labels) == 1.0


def test_macro_f1_weighs_a_rare_class_like_a_common_one():
    labels = [0] * 8 + [1] * 2
    # All 0: F1 of class 0 is 2*8/(10+8), of class 1 it is 0.
    assert macro_f1([0] * 10, labels) == pytest.approx((16 / 18 + 0) / 2)
    assert accuracy([0] * 10, labels) == 0.8


def test_f1_binary_counts_the_positive_class_only():
    # 2 of 3 predicted positives are right, and 2 of 4 positives are found: P 2/3, R 1/2.
    assert f1_binary([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0]) == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert f1_binary([0, 0, 0], [0, 0, 0]) == 0.0  # as the official score: nothing positive, nothing found
    assert f1_binary([1, 0], [0, 0]) == 0.0
    assert "f1_binary knows classes 0 and 1, got class 2" in refusal(DataError, f1_binary, [0, 2], [0, 1])


def test_matthews_correlation_of_a_hand_computed_table():
    # TP 6, TN 3, FP 1, FN 2: (6*3 - 1*2) / sqrt(7 * 8 * 4 * 5)
    predictions, labels = [1] * 6 + [0] * 3 + [1] + [0] * 2, [1] * 6 + [0] * 3 + [0] + [1] * 2
    assert matthews_correlation(predictions, labels) == pytest.approx((6 * 3 - 1 * 2) / math.sqrt(7 * 8 * 4 * 5))
    assert matthews_correlation([1, 0, 1], [0, 1, 0]) == -1.0


@pytest.mark.parametrize(("predictions", "labels"), [([1, 1], [0, 1]), ([0, 1], [0, 0]), ([1, 1], [1, 1]), ([0], [0])])
def test_matthews_correlation_of_one_class_only_is_zero(predictions, labels):
    assert matthews_correlation(predictions, labels) == 0.0


def test_matthews_correlation_counts_in_whole_numbers_of_any_size():
    labels = np.arange(300_000) % 2  # its variances multiply to more than 64 bits hold
    assert matthews_correlation(labels, labels) == 1.0
    assert matthews_correlation(labels.astype(np.uint64), 1 - labels) == -1.0


@pytest.mark.parametrize("metric", OVER_LABELS)
@pytest.mark.parametrize(
    ("predictions", "labels", "says"),
    [
        ([], [], "no examples to score"),
        ([0, 1], [0, None], "labels must be one row of class ids"),
        ([0.1, 0.9], [0, 1], "predictions must be one row of class ids"),
        ([float("nan")], [0], "predictions must be one row of class ids"),
        ([[0, 1]], [[0, 1]], "predictions must be one row of class ids"),
        ([True], [False], "predictions must be one row of class ids"),
        ([0, 1], [0, -100], "labels: class -100 (classes count from 0"),
        ([-1, 1], [0, 1], "predictions: class -1 (classes count from 0"),
    ],
)
def test_what_is_no_row_of_class_ids_is_refused(metric, predictions, labels, says):
    assert says in refusal(DataError, metric, predictions, labels)


def test_as_many_predictions_as_labels_are_needed():
    assert refusal(ValueError, accuracy, [0, 1], [0]) == "2 predictions for 1 labels"
    assert refusal(ValueError, gender_parity, [0, 1], ["a"]) == "2 predictions for the groups of 1"
    assert "1 predictions for the choices of 1 and answers of 0" in refusal(ValueError, record_f1, [0], [("a",)], [])


# --- Over groups -------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 5)), min_size=1, max_size=30))
def test_exact_match_of_groups_equals_a_loop_over_every_group(case):
    predictions, labels, groups = (list(column) for column in zip(*case, strict=True))
    right = []
    for group in sorted(set(groups)):
        members = [i for i in range(len(groups)) if groups[i] == group]
        right.append([predictions[i] for i in members] == [labels[i] for i in members])
    assert group_exact_match(predictions, labels, groups) == pytest.approx(sum(right) / len(right))


def test_a_group_is_right_when_every_answer_is():
    groups = [("p", 0), ("p", 0), ("p", 1), ("q", 0), ("p", 1)]
    # (p, 0) has one wrong answer; (p, 1) stands in two places and is right; (q, 0) is one answer, and wrong.
    assert group_exact_match([1, 0, 1, 1, 0], [1, 1, 1, 0, 0], groups) == pytest.approx(1 / 3)
    assert group_exact_match([1, 1, 1, 0, 0], [1, 1, 1, 0, 0], groups) == 1.0


def test_groups_of_one_answer_make_exact_match_the_accuracy():
    predictions, labels = [0, 1, 1, 0], [0, 1, 0, 0]
    assert group_exact_match(predictions, labels, range(4)) == accuracy(predictions, labels) == 0.75


def test_gender_parity_is_the_share_of_pairs_with_equal_predictions():
    assert gender_parity([0, 1, 1, 1, 0, 0], ["a", "a", "b", "c", "b", "c"]) == pytest.approx(0 / 3)
    assert gender_parity([0, 0, 1, 1, 1, 0], ["a", "a", "b", "b", "c", "c"]) == pytest.approx(2 / 3)
    assert gender_parity([1] * 6, ["a", "a", "b", "b", "c", "c"]) == 1.0  # whatever the labels are


@pytest.mark.parametrize("groups", [["a", "a", "a"], ["a", "a", "b"]])
def test_a_pair_of_other_than_two_examples_is_refused(groups):
    message = refusal(DataError, gender_parity, [0, 0, 1], groups)
    assert message in (
        "gender_parity: a pair has two examples; 'a' has 3",
        "gender_parity: a pair has two examples; 'b' has 1",
    )


def test_no_groups_are_refused():
    assert "no examples to score" in refusal(DataError, group_exact_match, [], [], [])
    assert "no examples to score" in refusal(DataError, gender_parity, [], [])
    assert "no examples to score" in refusal(DataError, record_f1, [], [], [])


# --- Over texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("The Ministry of  Sound", "ministry of sound"),
        ("a an the", ""),
        ("U.S.-led", "usled"),  # punctuation leaves no space
        ("Mary's", "marys"),
        ("  tab\tand\nline ", "tab and line"),
        ("Theatre in Athens", "theatre in athens"),  # articles are whole words
        ("A-Team", "ateam"),  # punctuation goes before the articles
        ("the (a) House", "house"),
        ("São Paulo", "são paulo"),  # accents stay
        ("“Quoted” – so", "“quoted” – so"),  # and so does punctuation beyond ASCII
        ("bread–a–butter", "bread– –butter"),  # beside which an article still is a word
    ],
)
def test_texts_are_compared_in_the_official_normal_form(text, bare):
    assert normalize_answer(text) == bare


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="aAnNtThHeE.,' -", max_size=20))
def test_the_normal_form_of_a_normal_form_has_the_same_words(text):
    bare = normalize_answer(text)
    assert normalize_answer(bare) == bare


def official_f1(prediction: str, answer: str) -> float:
    """By precision and recall, word by word."""
    ours, theirs = normalize_answer(prediction).split(), normalize_answer(answer).split()
    left, same = list(theirs), 0
    for word in ours:
        if word in left:
            left.remove(word)
            same += 1
    if same == 0:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


phrases = st.lists(st.sampled_from(["The", "a", "red", "Red.", "house", "mouse"]), max_size=4).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.lists(phrases, min_size=1, max_size=4), st.lists(phrases, max_size=3)), min_size=1))
def test_scores_of_queries_equal_a_loop_over_every_gold_answer(case):
    choices, answers = [row[0] for row in case], [row[1] for row in case]
    predictions = [len(row) // 2 for row in choices]
    f1 = exact = 0.0
    for position, candidates, gold in zip(predictions, choices, answers, strict=True):
        f1 += max([official_f1(candidates[position], answer) for answer in gold], default=0)
        exact += any(normalize_answer(candidates[position]) == normalize_answer(answer) for answer in gold)
    assert record_f1(predictions, choices, answers) == pytest.approx(f1 / len(case))
    assert record_exact_match(predictions, choices, answers) == pytest.approx(exact / len(case))


def test_a_candidate_counts_by_its_best_gold_answer():
    choices = [("Paris", "the City of Paris, France", "Rome")]
    answers = [("Rome", "City of Paris")]
    # "city of paris france" against "city of paris": P 3/4, R 1.
    assert record_f1([1], choices, answers) == pytest.approx(6 / 7)
    assert record_exact_match([1], choices, answers) == 0.0
    assert record_f1([2], choices, answers) == record_exact_match([2], choices, answers) == 1.0
    assert record_f1([0], choices, answers) == pytest.approx(2 * 1 * (1 / 3) / (1 + 1 / 3))


def test_a_word_is_shared_as_often_as_both_have_it():
    assert record_f1([0], [("York York York",)], [("New York York",)]) == pytest.approx(2 / 3)


def test_a_query_without_gold_answers_scores_zero_and_counts():
    choices, answers = [("Paris",), ("Rome",)], [("Paris",), ()]
    assert record_f1([0, 0], choices, answers) == record_exact_match([0, 0], choices, answers) == 0.5


def test_texts_of_articles_alone_are_equal_but_share_no_word():
    assert record_exact_match([0], [("The",)], [("a",)]) == 1.0
    assert record_f1([0], [("The",)], [("a",)]) == 0.0


@pytest.mark.parametrize("position", [-1, 2])
def test_a_position_without_a_candidate_is_refused(position):
    message = refusal(DataError, record_f1, [0, position], [("a", "b"), ("c", "d")], [("a",), ("d",)])
    assert message == f"query 1: prediction {position} is none of its 2 candidates"


# --- A task's score ----------------------------------------------------------------------------------------------


def test_a_task_is_scored_by_its_own_metrics_in_its_order():
    assert score(load_task("CB"), np.array([0, 1, 1]), examples([0, 1, 2])) == {
        "accuracy": pytest.approx(2 / 3),
        "macro_f1": pytest.approx((1 + 2 / 3 + 0) / 3),
    }
    assert list(score(load_task("CB"), [0], examples([0]))) == ["accuracy", "macro_f1"]
    assert list(score(load_task("RTE"), [0], examples([0]))) == ["accuracy"]


def test_every_metric_is_scored_through_a_task_as_by_its_function():
    predictions, labels, groups = [1, 0, 1, 1], [1, 0, 0, 1], ["p", "p", "q", "q"]
    task = dataclasses.replace(QUESTIONS, metrics=("matthews_correlation", "accuracy", "gender_parity"))
    assert score(QUESTIONS, predictions, examples(labels, groups=groups)) == {
        "f1_binary": f1_binary(predictions, labels),
        "group_exact_match": 0.5,
    }
    assert score(task, predictions, examples(labels, groups=groups)) == {
        "matthews_correlation": matthews_correlation(predictions, labels),
        "accuracy": 0.75,
        "gender_parity": 0.5,
    }
    queries = [query(["Paris", "The Hague"], ["Hague"], 1), query(["Rome"], ["Paris", "Rome"])]
    assert score(QUERIES, [1, 0], queries) == {"record_f1": 1.0, "record_exact_match": 1.0}
    near = [query(["The Hague, Holland"], ["Hague"])]
    assert score(QUERIES, [0], near) == {"record_f1": pytest.approx(2 / 3), "record_exact_match": 0.0}
    tested = {*QUESTIONS.metrics, *task.metrics, *QUERIES.metrics, *load_task("CB").metrics}
    assert tested == {name for name, metric in METRICS.items() if not {*metric.needs} & OTHER_ANSWERS}


OTHER_ANSWERS = {"a number", "several labels", "labels of words"}  # test_label_metrics


def test_choices_may_differ_in_number():
    task = dataclasses.replace(QUERIES, metrics=("accuracy",))
    queries = [query(["a", "b"], ["a"], 0), query("abcdefghijkl", ["l"], 11), query(["a"], ["a"], 0)]
    assert score(task, [1, 11, 0], queries) == {"accuracy": pytest.approx(2 / 3)}
    message = refusal(DataError, score, task, [2, 11, 0], queries)
    assert message == "Read example 0: prediction 2 is none of its 2 candidates, counted from 0"


def test_what_is_no_class_of_the_task_is_refused_at_its_example():
    message = refusal(DataError, score, load_task("RTE"), [0, 2], examples([0, 1], idx=[7, 9]))
    assert message == "RTE example 1 (idx 9): prediction 2 is none of its 2 classes, counted from 0"
    message = refusal(DataError, score, load_task("RTE"), [0, 1], examples([-1, 1]))
    assert message == "RTE example 0: label -1 is none of its 2 classes, counted from 0"


@pytest.mark.parametrize(
    ("task", "unlabeled", "says"),
    [
        (
            load_task("RTE"),
            examples([1, None], idx=[7, 9]),
            "RTE example 1 (idx 9) has no label, which accuracy needs; score a split whose labels are public",
        ),
        (
            QUESTIONS,
            examples([1, None], groups=["p", "p"], idx=[0, {"paragraph": 0, "answer": 1}]),
            "Read example 1 (idx {'paragraph': 0, 'answer': 1}) has no label, which f1_binary needs; "
            "score a split whose labels are public",
        ),
        (PAIRS, examples([1, 0]), "Read example 0 has no group, which gender_parity needs"),
        (
            QUERIES,
            [query(["a"], ["a"]), query(["a"], [], None, example_id=1)],
            "Read example 1 has no answers, which record_f1 needs; score a split whose labels are public",
        ),
    ],
)
def test_an_example_without_what_a_metric_needs_is_refused_by_name(task, unlabeled, says):
    assert refusal(DataError, score, task, [0, 0], unlabeled) == says


def test_parity_needs_no_labels():
    task = dataclasses.replace(PAIRS, metrics=("gender_parity",))
    assert score(task, [1, 1], examples([None, None], groups=["p", "p"])) == {"gender_parity": 1.0}


def test_an_answer_that_no_candidate_is_counts_as_wrong():
    missed = query(["Paris", "Rome"], ["Oslo"], None)
    assert score(QUERIES, [0], [missed]) == {"record_f1": 0.0, "record_exact_match": 0.0}


def test_as_many_predictions_as_examples_are_needed():
    assert refusal(ValueError, score, load_task("RTE"), [0, 1], examples([0])) == "2 predictions for 1 examples"
    assert "no examples to score" in refusal(DataError, score, load_task("RTE"), [], [])


@pytest.mark.parametrize(
    ("task", "changes", "says"),
    [
        (load_task("CB"), {"metrics": ("accuracy", "macro_f")}, "'macro_f' is unknown; did you mean macro_f1?"),
        (load_task("CB"), {"metrics": ("f1_binary",)}, "'f1_binary' needs two labels, got 3; macro_f1 would work"),
        (QUERIES, {"metrics": ("macro_f1",)}, "'macro_f1' needs classes, and the task has candidates"),
        (QUESTIONS, {"group_by": ()}, "'group_exact_match' needs group_by"),
        (PAIRS, {"group_by": ()}, "'gender_parity' needs group_by"),
        (load_task("RTE"), {"metrics": ("record_f1",)}, "'record_f1' needs choices_from"),
    ],
)
def test_a_metric_that_cannot_score_a_task_is_refused_before_it_is_trained(task, changes, says):
    message = refusal(ConfigError, require_metrics, dataclasses.replace(task, **changes))
    assert message.startswith(f"task {task.name}: metric {says}")
    assert refusal(ConfigError, score, dataclasses.replace(task, **changes), [0], examples([0])) == message


def test_a_new_metric_is_one_function_and_one_row(tmp_path, monkeypatch):
    """It reads a field that no other metric reads, is scored, kept by `evaluate`, and asks what its row says."""

    def right_of_first(predictions, labels, ids):
        return float(np.mean([p == y for p, y, name in zip(predictions, labels, ids, strict=True) if name == "first"]))

    monkeypatch.setitem(METRICS, "right_of_first", Metric(right_of_first, ("label", "idx"), ("two labels",)))
    task = dataclasses.replace(load_task("RTE"), metrics=("accuracy", "right_of_first"))
    rows = examples([0, 1, 1, 0], idx=["first", "first", "second", "first"])
    expected = {"accuracy": 0.75, "right_of_first": pytest.approx(2 / 3)}
    assert score(task, [0, 1, 1, 1], rows) == expected
    metric = evaluate_metric(task, tmp_path)
    assert metric.compute(predictions=[0, 1, 1, 1], references=metric.references(rows)) == expected
    with pytest.raises(DataError, match="RTE example 0 has no idx, which right_of_first needs"):
        score(task, [0], examples([0]))
    with pytest.raises(ConfigError, match="metric 'right_of_first' needs two labels, got 3"):
        require_metrics(dataclasses.replace(load_task("CB"), metrics=("right_of_first",)))


# --- The benchmark's average -------------------------------------------------------------------------------------


def test_two_metrics_of_a_task_count_as_one():
    scores = {"CB": {"accuracy": 0.9, "macro_f1": 0.5}, "RTE": {"accuracy": 0.6}}
    average, missing = superglue_average(scores)
    assert average == pytest.approx((0.7 + 0.6) / 2)
    assert missing == ["BoolQ", "COPA", "MultiRC", "ReCoRD", "WiC", "WSC"]


def test_a_full_benchmark_misses_nothing():
    scores = {task: {f"metric_{i}": 0.25 + i / 2 for i in range(count)} for task, count in SUPERGLUE.items()}
    average, missing = superglue_average(scores)
    assert missing == []
    assert average == pytest.approx((3 * 0.5 + 5 * 0.25) / 8)  # CB, MultiRC and ReCoRD have two


@pytest.mark.parametrize("name", sorted(set(task_names()) & set(SUPERGLUE)))
def test_a_built_in_task_has_the_benchmarks_number_of_metrics(name):
    assert len(load_task(name).metrics) == SUPERGLUE[name]


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ({}, "no scores are given"),
        ({"CB": {"accuracy": 0.9}}, "CB has 2 metrics there; got accuracy"),
        ({"RTE": {}}, "RTE has 1 metrics there; got none"),
        ({"RTE": {"accuracy": 66.1}}, "RTE accuracy must be a fraction"),
        ({"RTE": {"accuracy": float("nan")}}, "RTE accuracy must be a fraction"),
        ({"boolq": {"accuracy": 0.5}}, "'boolq' is no task of it; did you mean BoolQ?"),
    ],
)
def test_an_average_is_not_guessed(scores, says):
    assert says in refusal(DataError, superglue_average, scores)


# --- For users of `evaluate` -------------------------------------------------------------------------------------


def evaluate_metric(task, cache_dir, **settings):
    from glmd.evaluation.evaluate_metric import SuperGlueMetric

    return SuperGlueMetric(task, cache_dir=str(cache_dir), **settings)


@pytest.mark.parametrize(
    ("task", "predictions", "rows"),
    [
        (load_task("CB"), [0, 1, 1, 2], examples([0, 1, 2, 2])),
        (QUESTIONS, [1, 0, 1, 1], examples([1, 0, 0, 1], groups=["p", "p", "q", "q"])),
        (PAIRS, [1, 0, 1, 1], examples([1, 0, 0, 1], groups=[("p", 1), ("p", 1), ("q", 1), ("q", 1)])),
        (dataclasses.replace(PAIRS, metrics=("gender_parity",)), [0, 0], examples([None, None], groups=["p", "p"])),
        (QUERIES, [1, 0], [query(["Paris", "The Hague"], ["Hague"], 1), query(["Rome"], ["Paris"], None)]),
        (ALTERNATIVES, [2, 0], [query("abc", (), 2), query("def", (), 1, example_id=1)]),
        (dataclasses.replace(QUERIES, metrics=("accuracy",)), [2, 0], [query("abc", "c", 2), query("de", "e", 1)]),
    ],
    ids=lambda each: "-".join(each.metrics) if isinstance(each, Task) else "",
)
def test_a_metric_of_evaluate_gives_the_tasks_score_over_any_batches(task, predictions, rows, tmp_path):
    metric = evaluate_metric(task, tmp_path)
    references = metric.references(rows)
    metric.add_batch(predictions=np.array(predictions[:1]), references=references[:1])
    metric.add_batch(predictions=predictions[1:], references=references[1:])
    assert metric.compute() == score(task, predictions, rows)
    assert metric.compute(predictions=predictions, references=references) == score(task, predictions, rows)


def test_a_metric_of_evaluate_takes_plain_labels_where_no_more_is_read(tmp_path):
    assert evaluate_metric("RTE", tmp_path).compute(predictions=[0, 1], references=[0, 0]) == {"accuracy": 0.5}


def test_a_metric_of_evaluate_refuses_what_the_score_refuses(tmp_path):
    metric = evaluate_metric(QUESTIONS, tmp_path)
    references = metric.references(examples([1, None], groups=["p", "p"]))
    with pytest.raises(DataError, match="Read example 1 has no label, which f1_binary needs"):
        metric.compute(predictions=[1, 1], references=references)
    with pytest.raises(DataError, match="prediction 2 is none of its 2 classes"):
        evaluate_metric("RTE", tmp_path).compute(predictions=[2], references=[0])
    with pytest.raises(ConfigError, match="metric 'acc' is unknown"):
        evaluate_metric(dataclasses.replace(QUESTIONS, metrics=("acc",)), tmp_path)


def test_a_metric_of_evaluate_asks_no_network(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    metric = evaluate_metric("BoolQ", tmp_path)
    assert metric.compute(predictions=[1, 0], references=[1, 1]) == {"accuracy": 0.5}
