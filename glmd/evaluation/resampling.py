"""How much scores depend on which examples happened to be in a split: the bootstrap.

resampled_scores(load_task("MultiRC"), predictions, examples)    # {"f1_binary": [0.71, ...], "group_exact_match": ...}
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from glmd.evaluation.metrics import METRICS, score
from glmd.tasks.examples import TaskExample
from glmd.tasks.tasks import Task

SEED = 2019  # a change of it unpairs what was scored before


def resampled_scores(
    task: Task, predictions: ArrayLike, examples: Sequence[TaskExample], *, count: int = 1000
) -> dict[str, list[float]]:
    """Every metric of the task on `count` bootstrap resamples of the examples, of whole groups where the task has any.

    The resamples are the same for all models that are scored on the same examples: differences of their scores on
    each are those of a paired bootstrap. Takes and refuses what `score` does.
    """
    score(task, predictions, examples)
    units = _units(task, examples)
    number = int(units.max()) + 1
    given = np.asarray(predictions)
    metrics = {name: METRICS[name] for name in task.metrics}
    of_units = {}
    for name, metric in metrics.items():
        if metric.statistics is None:
            continue
        of_examples = metric.statistics(given, *metric.columns(examples, task))
        of_units[name] = np.zeros((number, *of_examples.shape[1:]))
        np.add.at(of_units[name], units, of_examples)
    sums: dict[str, list[np.ndarray]] = {name: [] for name in of_units}
    whole: dict[str, list[float]] = {name: [] for name in metrics if name not in of_units}
    for drawn in resamples(number, count):
        times = np.bincount(drawn, minlength=number)
        for name, each in of_units.items():
            sums[name].append(np.tensordot(times, each, 1))
        for name, values in whole.items():
            again = np.repeat(np.arange(len(examples)), times[units])
            values.append(metrics[name](given[again], [examples[i] for i in again.tolist()], task))
    found = {name: metrics[name].of_sums(np.stack(each)).tolist() for name, each in sums.items()}
    return {name: found[name] if name in found else whole[name] for name in metrics}


def resamples(units: int, count: int) -> Iterator[np.ndarray]:
    """`count` times (units,) positions drawn with replacement; by these two numbers alone, whatever the machine."""
    # Numpy promises never to change the stream of RandomState; that of its newer generators it may.
    random = np.random.RandomState([SEED, units])
    for _ in range(count):
        yield random.randint(units, size=units, dtype=np.int64)


def _units(task: Task, examples: Sequence[TaskExample]) -> np.ndarray:
    """(B,) what is drawn as one: the number of each example's group, or of the example itself."""
    if not task.group_by:
        return np.arange(len(examples))
    numbers = {group: number for number, group in enumerate(dict.fromkeys(each.group for each in examples))}
    return np.array([numbers[each.group] for each in examples])
