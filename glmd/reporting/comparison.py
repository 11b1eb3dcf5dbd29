"""Systems that were scored on the same examples, and how far each is from one of them.

    comparison = compared(systems, "glmd")
    print(markdown(comparison))    # of glmd.reporting.comparison_tables

A difference has two intervals, for two sources of chance. Over examples: the bootstrap, paired, of means over seeds.
Over seeds: Student's t of the differences at seeds that both have. Neither holds what the other does.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from glmd.errors import ConfigError

RANKED = ("method", "control")  # kinds that have a rank among each other


@dataclass(frozen=True)
class Scored:
    """A model's score on a task. resamples: (B,) of the same resamples of examples for all models, or empty."""

    task: str
    metric: str
    seed: int
    value: float
    resamples: Sequence[float] = ()
    stage: str = ""  # whose model it is: task_soft_labels


@dataclass(frozen=True)
class System:
    """A row of the table: what was scored, what it is and what it cost."""

    name: str  # "glmd", "kd, keep_ratio 0.25", "hard labels from the distilled start"
    kind: Literal["teacher", "method", "control", "constant"]
    scores: list[Scored]  # empty where it failed
    method: str = ""
    examples: dict[str, int] = field(default_factory=dict)  # n of val of each task
    parameters: int | None = None  # of the model that is scored
    vocabulary: int | None = None  # of these in the vocabulary
    updates: int | None = None  # of the student, over all stages, of one seed
    tokens: int | None = None  # as updates, with padding: what batches of full length hold
    seconds: float | None = None
    latency: dict[str, float] = field(default_factory=dict)  # ms by batch: "1", "32"
    glmd: str = ""
    commit: str = ""
    problems: dict[str, str] = field(default_factory=dict)  # task, or "" for all: why there is no score
    folder: Path | None = None  # of one of the models that are scored


@dataclass(frozen=True)
class Mean:
    """Over seeds. sd: the standard deviation, None of one seed."""

    mean: float
    sd: float | None
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """A system's mean minus the reference's; seeds: those that both have. Intervals are None where not measured."""

    mean: float
    over_examples: tuple[float, float] | None
    over_seeds: tuple[float, float] | None
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """A system's means. tasks, differences, ranks: by task, where it has all metrics of one."""

    system: System
    metrics: dict[tuple[str, str], Mean]
    tasks: dict[str, Mean]
    average: Mean | None  # None where a task is missing, as are difference and rank
    differences: dict[str, Difference]
    difference: Difference | None
    ranks: dict[str, float]
    rank: float | None  # mean over tasks; 1 is the best


@dataclass(frozen=True)
class Comparison:
    """columns: (task, metric) of all systems. tasks: those of the average, the reference's."""

    rows: tuple[Row, ...]
    reference: str
    confidence: float
    columns: tuple[tuple[str, str], ...]
    tasks: tuple[str, ...]
    resamples: int  # how many each interval over examples is of; 0 without any
    notes: tuple[str, ...] = ()  # of its conditions, in sentences


@dataclass(frozen=True)
class _Sample:
    """What a difference is made of: a task's scores, or the averages over tasks."""

    mean: float
    by_seed: dict[int, float]
    resamples: np.ndarray | None  # (B,) of the mean over seeds


def compared(
    systems: Sequence[System], reference: str, *, confidence: float = 0.95, notes: Sequence[str] = ()
) -> Comparison:
    """Means over seeds, differences to the reference with their intervals, and ranks.

    reference: the name of a system. Its tasks make the average; where it has no scores those of all do. notes: what
        the table is to say of its conditions.
    Raises ConfigError for a reference that is not there, two systems of one name, and two scores of one thing.
    """
    names = [system.name for system in systems]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"two systems are called {line(twice[0])!r}; give each a name of its own")
    if reference not in names:
        there = "; ".join(map(line, names)) or "none"
        raise ConfigError(f"reference {line(reference)!r} is none of the systems; there are: {there}")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must be between 0 and 1, got {confidence:g}")
    origin = systems[names.index(reference)]
    of_reference = dict.fromkeys((each.task, each.metric) for each in origin.scores)
    columns = dict.fromkeys([*of_reference, *((s.task, s.metric) for system in systems for s in system.scores)])
    # Of a task that the reference has, its metrics count.
    metrics: dict[str, list[str]] = {}
    for task, metric in columns:
        if (task, metric) in of_reference or all(task != each for each, _ in of_reference):
            metrics.setdefault(task, []).append(metric)
    tasks = tuple(dict.fromkeys(task for task, _ in of_reference or columns))
    samples = {system.name: _samples(system, metrics) for system in systems}
    ranks = {task: _ranks(_ranked(systems, samples, task)) for task in metrics}
    rows = tuple(
        _row(system, samples[system.name], origin, samples[reference], tasks, ranks, confidence) for system in systems
    )
    count = max((len(each.resamples) for system in systems for each in system.scores), default=0)
    return Comparison(rows, reference, confidence, tuple(columns), tasks, count, tuple(notes))


def _row(
    system: System,
    ours: dict[str, _Sample],
    origin: System,
    theirs: dict[str, _Sample],
    tasks: Sequence[str],
    ranks: dict[str, dict[str, float]],
    confidence: float,
) -> Row:
    values: dict[tuple[str, str], dict[int, float]] = {}
    for each in system.scores:
        values.setdefault((each.task, each.metric), {})[each.seed] = each.value
    means = {column: _mean(by_seed) for column, by_seed in values.items()}
    # Resamples of other examples are not paired.
    paired = {task for task in ours if not other_examples(system, origin, task)}
    differences = {
        task: _difference(ours[task], theirs[task], confidence, paired=task in paired) for task in ours.keys() & theirs
    }
    average, base = _average(ours, tasks), _average(theirs, tasks)
    difference = None
    if average and base:
        difference = _difference(average, base, confidence, paired=paired.issuperset(tasks))
    of_tasks = {task: of_task[system.name] for task, of_task in ranks.items() if system.name in of_task}
    return Row(
        system=system,
        metrics=means,
        tasks={task: _mean(sample.by_seed) for task, sample in ours.items()},
        average=Mean(average.mean, _sd(average.by_seed), tuple(average.by_seed)) if average else None,
        differences={task: differences[task] for task in ours if task in differences},
        difference=difference,
        ranks=of_tasks,
        rank=statistics.fmean(of_tasks[t] for t in tasks) if tasks and of_tasks.keys() >= set(tasks) else None,
    )


def other_examples(system: System, origin: System, task: str) -> bool:
    """Whether the two were scored on different numbers of examples, as far as is known."""
    counts = {each.examples[task] for each in (system, origin) if task in each.examples}
    return len(counts) > 1


def _samples(system: System, metrics: Mapping[str, Sequence[str]]) -> dict[str, _Sample]:
    """Of each task that has all its metrics at some seed: a seed's score is their mean, as SuperGLUE's is."""
    there: dict[tuple[str, str, int], Scored] = {}
    for each in system.scores:
        if there.setdefault((each.task, each.metric, each.seed), each) is not each:
            raise ConfigError(f"{line(system.name)} has two scores of {each.task} {each.metric} with seed {each.seed}")
    samples = {}
    for task, names in metrics.items():
        seeds = sorted({seed for of_task, _, seed in there if of_task == task})
        scored = {s: [there[task, m, s] for m in names] for s in seeds if all((task, m, s) in there for m in names)}
        if scored:
            by_seed = {seed: statistics.fmean(each.value for each in of_seed) for seed, of_seed in scored.items()}
            resampled = [each.resamples for of_seed in scored.values() for each in of_seed]
            is_whole = len({len(each) for each in resampled}) == 1 and len(resampled[0]) > 0
            resamples = np.mean(np.array(resampled, dtype=np.float64), axis=0) if is_whole else None
            samples[task] = _Sample(statistics.fmean(by_seed.values()), by_seed, resamples)
    return samples


def _average(samples: dict[str, _Sample], tasks: Sequence[str]) -> _Sample | None:
    """The mean over tasks, or None where one is missing. Of a seed it is known where all tasks have the seed."""
    if not tasks or not samples.keys() >= set(tasks):
        return None
    found = [samples[task] for task in tasks]
    seeds = sorted(set.intersection(*(set(each.by_seed) for each in found)))
    by_seed = {seed: statistics.fmean(each.by_seed[seed] for each in found) for seed in seeds}
    # Splits of one size are drawn from alike: each task is turned by one more resample, so that tasks stay independent.
    turned = [np.roll(each.resamples, turn) for turn, each in enumerate(found) if each.resamples is not None]
    is_whole = len(turned) == len(found) and len({len(each) for each in turned}) == 1
    mean = statistics.fmean(each.mean for each in found)
    return _Sample(mean, by_seed, np.mean(turned, axis=0) if is_whole else None)


def _difference(ours: _Sample, theirs: _Sample, confidence: float, *, paired: bool) -> Difference:
    seeds = tuple(sorted(ours.by_seed.keys() & theirs.by_seed.keys()))
    over_seeds = _t_interval([ours.by_seed[seed] - theirs.by_seed[seed] for seed in seeds], confidence)
    over_examples = None
    of_both = (ours.resamples, theirs.resamples)
    if paired and of_both[0] is not None and of_both[1] is not None and len(of_both[0]) == len(of_both[1]):
        tail = (1 - confidence) / 2
        low, high = np.quantile(of_both[0] - of_both[1], [tail, 1 - tail])
        over_examples = float(low), float(high)
    return Difference(ours.mean - theirs.mean, over_examples, over_seeds, seeds)


def _t_interval(values: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """Of the mean of values that are normally distributed; None of fewer than two."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = t_quantile(confidence, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def t_quantile(confidence: float, degrees: int) -> float:
    """The t between whose negative and itself Student's distribution of so many degrees of freedom has `confidence`."""

    def share(angle: float) -> float:
        """Between -t and t = sqrt(degrees) tan(angle): Abramowitz and Stegun 26.7.3 and 26.7.4."""
        term, total = (math.cos(angle) if degrees % 2 else 1.0), 0.0
        for i in range(1 + degrees % 2, degrees, 2):
            total, term = total + term, term * math.cos(angle) ** 2 * i / (i + 1)
        return (angle + math.sin(angle) * total) * 2 / math.pi if degrees % 2 else math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(100):  # halvings: more than a float has bits
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _ranked(systems: Sequence[System], samples: dict[str, dict[str, _Sample]], task: str) -> dict[str, float]:
    names = [system.name for system in systems if system.kind in RANKED and task in samples[system.name]]
    return {name: samples[name][task].mean for name in names}


def _ranks(values: Mapping[str, float]) -> dict[str, float]:
    """1 for the highest; equal ones share the mean of their places."""
    all_values = list(values.values())
    higher = {name: sum(other > value for other in all_values) for name, value in values.items()}
    return {name: higher[name] + (1 + all_values.count(value)) / 2 for name, value in values.items()}


def _mean(by_seed: Mapping[int, float]) -> Mean:
    return Mean(statistics.fmean(by_seed.values()), _sd(by_seed), tuple(sorted(by_seed)))


def _sd(by_seed: Mapping[int, float]) -> float | None:
    return statistics.stdev(by_seed.values()) if len(by_seed) > 1 else None


def line(text: str) -> str:
    """The text on one line."""
    return " ".join(text.split())
