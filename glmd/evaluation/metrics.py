"""Scores of tasks, computed as the SuperGLUE benchmark computes them: fractions in [0, 1], Matthews' in [-1, 1].

score(load_task("CB"), predictions, examples)    # {"accuracy": 0.82, "macro_f1": 0.71}

A metric is a function of predictions and of what it reads of the examples; METRICS says what that is. Predictions
are class ids, or positions of the chosen candidates.
"""

import itertools
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

from glmd.errors import ConfigError, DataError, suggestion
from glmd.evaluation.label_metrics import (
    entity_f1,
    entity_marks,
    f1_of,
    label_marks,
    labels_macro_f1,
    labels_micro_f1,
    macro_of,
    micro_of,
    number_marks,
    pearson,
    pearson_of,
    spearman,
    subset_accuracy,
    word_accuracy,
    word_marks,
)
from glmd.tasks.examples import TaskExample
from glmd.tasks.tasks import SENTENCES, Task


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Share of right predictions. predictions, labels: (B,) class ids or positions of candidates."""
    return float(_right(predictions, labels).mean())


def macro_f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Mean of the classes' F1. predictions, labels: (B,) class ids.

    A class that neither predictions nor labels hold has no F1 and is left out, as in the official score;
    counted as 0 it would make a perfect model imperfect.
    """
    return float(_macro_f1(_counts(predictions, labels)))


def f1_binary(predictions: ArrayLike, labels: ArrayLike) -> float:
    """F1 of class 1 over all examples, MultiRC's F1a. predictions, labels: (B,) class ids 0 and 1.

    0 where neither predictions nor labels hold class 1, as in the official score.
    """
    counts = _counts(predictions, labels)
    if counts.shape[-1] > 2:
        raise DataError(f"f1_binary knows classes 0 and 1, got class {counts.shape[-1] - 1}")
    return float(_f1_binary(counts))


def matthews_correlation(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Matthews' correlation of predictions with labels, in [-1, 1]. predictions, labels: (B,) class ids.

    For more than two classes it is R_K of Gorodkin (2004). 0 where either holds one class only, also where all
    is right: there is nothing to correlate.
    """
    return float(_matthews_correlation(_counts(predictions, labels)))


def group_exact_match(predictions: ArrayLike, labels: ArrayLike, groups: Sequence[Hashable]) -> float:
    """Share of groups whose every prediction is right: MultiRC's exact match, with the questions as groups.

    predictions, labels: (B,) class ids. groups: (B,) the group of each example; its members may stand anywhere.
    """
    rights = _by_group(_right(predictions, labels).tolist(), groups)
    return sum(map(all, rights.values())) / len(rights)


def gender_parity(predictions: ArrayLike, groups: Sequence[Hashable]) -> float:
    """Share of pairs whose two predictions agree, AX-g's parity score; it needs no labels.

    predictions: (B,) class ids. groups: (B,) the pair of each example, two texts that differ in a pronoun's gender.
    A model that answers always the same has parity 1: read it beside the accuracy.
    """
    pairs = _by_group(_class_ids(predictions, "predictions").tolist(), groups)
    for pair, members in pairs.items():
        if len(members) != 2:
            raise DataError(f"gender_parity: a pair has two examples; {pair!r} has {len(members)}")
    return sum(first == second for first, second in pairs.values()) / len(pairs)


def record_f1(predictions: ArrayLike, choices: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> float:
    """ReCoRD's F1 of the words of the chosen candidate against its best gold answer, the mean over queries.

    predictions: (B,) positions of the chosen candidates. choices: the candidates of each query. answers: the gold
    answers of each query; a query without any scores 0.
    """
    best = _best_answers(_word_f1, predictions, choices, answers)
    return sum(best) / len(best)


def record_exact_match(
    predictions: ArrayLike, choices: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]
) -> float:
    """Share of ReCoRD's queries whose chosen candidate is a gold answer in its normal form; see record_f1."""
    best = _best_answers(_same_text, predictions, choices, answers)
    return sum(best) / len(best)


def normalize_answer(text: str) -> str:
    """The form in which ReCoRD and SQuAD compare texts: no capitals, punctuation, articles, or further spaces.

    Punctuation is ASCII's and leaves no space: "the U.S.-led" is "usled".
    """
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _mean(sums: np.ndarray) -> np.ndarray:
    """(..., 2) a sum and a number to its mean."""
    mean: np.ndarray = sums[..., 0] / sums[..., 1]
    return mean


def _macro_f1(counts: np.ndarray) -> np.ndarray:
    """(..., 3, C) counts to (...)."""
    both, given, gold = np.moveaxis(counts, -2, 0)
    f1 = 2 * both / np.maximum(given + gold, 1)
    mean: np.ndarray = f1.sum(axis=-1) / (given + gold > 0).sum(axis=-1)
    return mean


def _f1_binary(counts: np.ndarray) -> np.ndarray:
    """(..., 3, C) counts to (...)."""
    both, given, gold = np.moveaxis(counts[..., 1], -1, 0)
    f1: np.ndarray = 2 * both / np.maximum(given + gold, 1)
    return f1


def _matthews_correlation(counts: np.ndarray) -> np.ndarray:
    """(..., 3, C) counts to (...)."""
    both, given, gold = np.moveaxis(counts, -2, 0)
    total = gold.sum(axis=-1)
    # In whole numbers up to the one root and division: a perfect score is 1 and not 1.0000000000000002.
    covariance = total * both.sum(axis=-1) - (given * gold).sum(axis=-1)
    of_given, of_gold = (total**2 - (each * each).sum(axis=-1) for each in (given, gold))
    # Of one class only both are 0.
    correlation: np.ndarray = covariance / np.sqrt(np.maximum(np.multiply(of_given, of_gold, dtype=np.float64), 1))
    return correlation


def _class_marks(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(B, 3, C) whose sum over examples is _counts."""
    given, gold = _pairs(predictions, labels)
    classes = np.arange(max(2, 1 + given.max(), 1 + gold.max()))
    is_given, is_gold = given[:, None] == classes, gold[:, None] == classes
    return np.stack([is_given & is_gold, is_given, is_gold], axis=1)


def _marks(values: ArrayLike) -> np.ndarray:
    """(B, 2) of values that a mean is made of, each beside a 1."""
    row = np.asarray(values, dtype=np.float64)
    return np.stack([row, np.ones_like(row)], axis=1)


def _group_marks(values: ArrayLike, groups: Sequence[Hashable], mark: Callable[[list[Any]], bool]) -> np.ndarray:
    """(B, 2) the mark of each group's values beside a 1, at its first example; zeros at its others."""
    members = {group: iter([(mark(each), 1)]) for group, each in _by_group(np.asarray(values).tolist(), groups).items()}
    return np.array([next(members[group], (0, 0)) for group in groups], dtype=np.float64)


@dataclass(frozen=True)
class Metric:
    """A function of predictions and these fields of the examples, each a list with an entry for an example.

    It is also `of_sums` of the sum of `statistics`, a function of the same arguments to an array of an entry for each
    example; what is of a group stands at its first example. Of any resample the sums alone give it. None for a metric
    of which no sums do.
    """

    function: Callable[..., float]
    fields: tuple[str, ...]  # of TaskExample
    needs: tuple[str, ...] = ()  # of the task, keys of NEEDS
    statistics: Callable[..., np.ndarray] | None = None
    of_sums: Callable[[np.ndarray], np.ndarray] = _mean
    reads_names: bool = False  # of the task's labels, as a last argument

    def __call__(self, predictions: np.ndarray, examples: Sequence[TaskExample], task: Task) -> float:
        return self.function(predictions, *self.columns(examples, task))

    def columns(self, examples: Sequence[TaskExample], task: Task) -> list[Any]:
        found: list[Any] = [[getattr(each, field) for each in examples] for field in self.fields]
        return [*found, [str(label) for label in task.labels]] if self.reads_names else found


# All that says which metrics there are: a new one is a function, its statistics and a row here.
METRICS = {
    "accuracy": Metric(accuracy, ("label",), ("one answer",), lambda *columns: _marks(_right(*columns))),
    "macro_f1": Metric(macro_f1, ("label",), ("one answer", "classes"), _class_marks, _macro_f1),
    "f1_binary": Metric(f1_binary, ("label",), ("one answer", "classes", "two labels"), _class_marks, _f1_binary),
    "matthews_correlation": Metric(
        matthews_correlation, ("label",), ("one answer", "classes"), _class_marks, _matthews_correlation
    ),
    "group_exact_match": Metric(
        group_exact_match,
        ("label", "group"),
        ("groups",),
        lambda given, labels, groups: _group_marks(_right(given, labels), groups, all),
    ),
    "gender_parity": Metric(
        gender_parity,
        ("group",),
        ("groups",),
        lambda given, groups: _group_marks(given, groups, lambda both: both[0] == both[1]),
    ),
    "record_f1": Metric(
        record_f1,
        ("choices", "answers"),
        ("candidates",),
        lambda *columns: _marks(_best_answers(_word_f1, *columns)),
    ),
    "record_exact_match": Metric(
        record_exact_match,
        ("choices", "answers"),
        ("candidates",),
        lambda *columns: _marks(_best_answers(_same_text, *columns)),
    ),
    "pearson": Metric(pearson, ("label",), ("a number",), number_marks, pearson_of),
    "spearman": Metric(spearman, ("label",), ("a number",)),
    "subset_accuracy": Metric(
        subset_accuracy,
        ("label",),
        ("several labels",),
        lambda given, labels: _marks((given == np.asarray(labels)).all(-1)),
    ),
    "labels_micro_f1": Metric(labels_micro_f1, ("label",), ("several labels",), label_marks, micro_of),
    "labels_macro_f1": Metric(labels_macro_f1, ("label",), ("several labels",), label_marks, macro_of),
    "word_accuracy": Metric(word_accuracy, ("label",), ("labels of words",), word_marks),
    "entity_f1": Metric(entity_f1, ("label",), ("labels of words", "entities"), entity_marks, f1_of, reads_names=True),
}

# Of a task, by name: whether it has what a metric needs, and what is said where it has not.
NEEDS: dict[str, tuple[Callable[[Task], bool], str]] = {
    "classes": (lambda task: bool(task.labels), "classes, and the task has candidates; accuracy would work"),
    "one answer": (lambda task: task.has_one_answer, "one class or candidate for each example"),
    "a number": (
        lambda task: task.problem_type in ("regression", SENTENCES),
        "numbers: problem_type regression",
    ),
    "several labels": (
        lambda task: task.problem_type == "multi_label_classification",
        "several labels: problem_type multi_label_classification",
    ),
    "labels of words": (
        lambda task: task.problem_type == "token_classification",
        "labels of words: problem_type token_classification",
    ),
    "entities": (
        lambda task: all(re.fullmatch(r"O|[BIESLU]-.+", str(label)) for label in task.labels),
        "labels as O, B-PER and I-PER; word_accuracy would work",
    ),
    "two labels": (lambda task: len(task.labels) == 2, "two labels, got {}; macro_f1 would work"),
    "groups": (lambda task: bool(task.group_by), "group_by, the fields of a row that make its group"),
    "candidates": (lambda task: bool(task.choices_from), "choices_from, the field of a row that lists its candidates"),
}


def require_metrics(task: Task) -> None:
    """Refuse a metric that there is not, or that cannot score the task: before it is trained, not after."""
    for name in task.metrics:
        where = f"task {task.name}: metric {name!r}"
        if name not in METRICS:
            raise ConfigError(f"{where} is unknown{suggestion(name, METRICS)}")
        for has, what in (NEEDS[need] for need in METRICS[name].needs):
            if not has(task):
                raise ConfigError(f"{where} needs {what.format(len(task.labels))}")
    if task.group_by and not any("group" in METRICS[name].fields for name in task.metrics):
        raise ConfigError(f"task {task.name}: group_by has no effect: no metric is over groups; remove it")


def score(task: Task, predictions: ArrayLike, examples: Sequence[TaskExample]) -> dict[str, float]:
    """Every metric of the task, in its order.

    predictions: (B,) class ids, or positions of the chosen candidates; of several labels (B, C) of 0 and 1; (B,)
        numbers; of words (B, W) class ids, -1 beyond an example's. examples: (B,) of one split.
    Raises DataError naming the example for a prediction that is no class or candidate of it, and for an example
    without what a metric needs: a hidden label is not scored as a wrong one.
    """
    require_metrics(task)
    given = _one_row(predictions, "predictions") if task.has_one_answer else np.asarray(predictions)
    if len(given) != len(examples):
        raise ValueError(f"{len(given)} predictions for {len(examples)} examples")
    (_require_one_answer if task.has_one_answer else _require_answers)(task, given, examples)
    for example, name in itertools.product(examples, task.metrics):
        for field in METRICS[name].fields:
            _require_field(task, example, field, name)
    if task.problem_type in ("regression", SENTENCES) and len({example.label for example in examples}) == 1:
        found = f"all {len(examples)} labels are {examples[0].label:g}, with which nothing correlates"
        raise DataError(f"{task.name}: {found}; score a split whose labels are public, and differ")
    return {name: METRICS[name](given, examples, task) for name in task.metrics}


def _require_one_answer(task: Task, given: np.ndarray, examples: Sequence[TaskExample]) -> None:
    for example, prediction in zip(examples, given.tolist(), strict=True):
        count = len(task.labels) or len(example.texts)
        for value, what in ((prediction, "prediction"), (cast(int | None, example.label), "label")):
            if value is not None and not 0 <= value < count:
                kind = "classes" if task.labels else "candidates"
                raise DataError(
                    f"{_place(task, example)}: {what} {value} is none of its {count} {kind}, counted from 0"
                )


def _require_answers(task: Task, given: np.ndarray, examples: Sequence[TaskExample]) -> None:
    """Refuse what is no answer to a task whose answers are others than one class."""
    count, shape, kind = len(examples), given.shape, given.dtype.kind
    if task.problem_type == "multi_label_classification":
        wanted, fits = f"({count}, {len(task.labels)}) of 0 and 1", shape == (count, len(task.labels)) and kind in "biu"
        fits = fits and bool(np.isin(given, (0, 1)).all())
    elif task.problem_type == "token_classification":
        wanted = f"({count}, words) ids of {len(task.labels)} labels, or -1"
        fits = len(shape) == 2 and kind in "iu" and bool(((given >= -1) & (given < len(task.labels))).all())
    else:
        wanted = f"({count},) finite numbers"
        fits = shape == (count,) and kind in "iuf" and bool(np.isfinite(given).all())
    if not fits:
        raise DataError(f"{task.name}: predictions must be {wanted}; got {given.dtype} {shape}")


def constant_answers(task: Task, examples: Sequence[TaskExample]) -> list[np.ndarray]:
    """Answers that are alike for all examples: a class, a position, of words one label, of numbers 0.

    Of several labels none, the most frequent one, the two most frequent, ...
    """
    count = len(examples)
    if task.problem_type in ("regression", SENTENCES):
        return [np.zeros(count)]
    if task.problem_type == "multi_label_classification":
        frequent = np.argsort(-np.array([each.label for each in examples]).sum(0), kind="stable")
        marks = [np.isin(np.arange(len(frequent)), frequent[: i + 1]) for i in range(-1, len(frequent))]
        return [np.tile(each.astype(np.int64), (count, 1)) for each in marks]
    if task.problem_type == "token_classification":
        width = max(len(each.words) for each in examples)
        return [np.full((count, width), label) for label in range(len(task.labels))]
    return [np.full(count, label) for label in range(len(task.labels) or min(len(each.choices) for each in examples))]


def _place(task: Task, example: TaskExample) -> str:
    return f"{task.name} example {example.example_id}" + (f" (idx {example.idx})" if example.idx is not None else "")


def _require_field(task: Task, example: TaskExample, field: str, metric: str) -> None:
    if getattr(example, field) in (None, ()):
        remedy = "; score a split whose labels are public" if field in ("label", "answers") else ""
        raise DataError(f"{_place(task, example)} has no {field}, which {metric} needs{remedy}")


def _pairs(predictions: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    given, gold = _class_ids(predictions, "predictions"), _class_ids(labels, "labels")
    if len(given) != len(gold):
        raise ValueError(f"{len(given)} predictions for {len(gold)} labels")
    return given, gold


def _right(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(B,) whether each prediction is its label."""
    given, gold = _pairs(predictions, labels)
    return given == gold


def _counts(predictions: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """(3, C): how often a class is predicted rightly, predicted, and a label. C is 2 or more."""
    given, gold = _pairs(predictions, labels)
    num_classes = max(2, 1 + given.max(), 1 + gold.max())
    return np.stack([np.bincount(ids, minlength=num_classes) for ids in (gold[given == gold], given, gold)])


def _class_ids(values: ArrayLike, name: str) -> np.ndarray:
    row = _one_row(values, name)
    if row.min() < 0:
        raise DataError(f"{name}: class {row.min()} (classes count from 0; -100 and -1 mark no label)")
    return row


def _one_row(values: ArrayLike, name: str) -> np.ndarray:
    row: np.ndarray[Any, Any] = np.asarray(values)
    if row.size == 0:
        raise DataError(f"{name}: there are no examples to score")
    if row.ndim != 1 or row.dtype.kind not in "iu":
        raise DataError(
            f"{name} must be one row of class ids (has every example a label?), got {row.dtype} {row.shape}"
        )
    return row.astype(np.int64)  # an older numpy counts no uint64


def _by_group(values: Sequence[Any], groups: Sequence[Hashable]) -> dict[Hashable, list[Any]]:
    if len(values) != len(groups):
        raise ValueError(f"{len(values)} predictions for the groups of {len(groups)}")
    members = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        members[group].append(value)
    return members


def _best_answers(
    compare: Callable[[str, str], float],
    predictions: ArrayLike,
    choices: Sequence[Sequence[str]],
    answers: Sequence[Sequence[str]],
) -> list[float]:
    """Of each query the best comparison of the chosen candidate with a gold answer, both in normal form."""
    given = _one_row(predictions, "predictions").tolist()
    if not len(given) == len(choices) == len(answers):
        raise ValueError(f"{len(given)} predictions for the choices of {len(choices)} and answers of {len(answers)}")
    best = []
    for query, (position, candidates, gold) in enumerate(zip(given, choices, answers, strict=True)):
        if not 0 <= position < len(candidates):
            raise DataError(f"query {query}: prediction {position} is none of its {len(candidates)} candidates")
        chosen = normalize_answer(candidates[position])
        best.append(max((compare(chosen, normalize_answer(answer)) for answer in gold), default=0.0))
    return best


def _same_text(chosen: str, answer: str) -> float:
    return float(chosen == answer)


def _word_f1(chosen: str, answer: str) -> float:
    """F1 of two texts as bags of words; 0 where they share none, also where both are empty."""
    ours, theirs = Counter(chosen.split()), Counter(answer.split())
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0
