"""Run the methods of a comparison one after another, each in a folder of its own, and write the table.

    compare("configs/runs/quickstart.yaml", "compare.methods=[glmd, kd]", output_dir="runs/compared")

comparison folder: comparison.yaml, runs/METHOD/..., failures/METHOD.json, table.md, table.tex, scores.csv,
comparison.json, costs.md, table.png. What two runs make from the same is made once: see `RunFolder.complete`.
"""

import gc
import json
import logging
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glmd.config import RunConfig
from glmd.config_file import config_of, differences
from glmd.errors import ConfigError, DataError, DiskError, GlmdError, ModelError, NumericsError, RankError, RunError
from glmd.evaluation.latency import measured_latency
from glmd.pipeline.run import run_beside
from glmd.pipeline.run_folder import COMPARISON, GROWING_KEYS, with_dtype_of
from glmd.planning.comparison import Arm, Comparison, load_comparison, method_name, record_of
from glmd.planning.limits import require_sizes_and_room
from glmd.planning.plan import Plan, make_plan
from glmd.planning.stages import LENGTH_KEYS
from glmd.reporting.comparison import Comparison as Compared
from glmd.reporting.comparison import System, compared
from glmd.reporting.comparison_tables import as_json, costs_markdown, csv_text, latex, markdown
from glmd.reporting.conditions import conditions, differing
from glmd.reporting.joined import systems_of
from glmd.reporting.report import load_results
from glmd.runtime.processes import ranks_kept
from glmd.storage import locked, write_atomically, write_problem
from glmd.strict_yaml import dump_yaml, load_yaml

logger = logging.getLogger(__name__)
ORDER = ("teacher", "constant", "method", "control")  # of kinds in the table
# Refusals of one method, or of a task by it. Others are of the folder, the disk or the launch.
OF_THE_METHOD = (ConfigError, DataError, ModelError, NumericsError, RunError)


def compare(config: str | Path | Mapping[str, Any] | None = None, *overrides: str, **changes: Any) -> Compared:
    """Run every arm of a comparison that is not complete, and return the table, which is also in its folder.

    config, overrides, changes: as `run` takes them, with a group `compare`.
    A method that fails is a row that says why; it is tried again by the next call. Raises GlmdError with one line
    where nothing can be compared: the reference fails, the folder holds another comparison, conditions differ.
    """
    return run_comparison(load_comparison(config, overrides, **changes))


def run_comparison(comparison: Comparison) -> Compared:
    """`compare` of what `load_comparison` gives."""
    with _held(comparison), ranks_kept():
        arms = {arm.folder: arm for arm in comparison.arms}
        failed = _failures(comparison)
        # Those that failed before come last: a process that one of them ends has done the others.
        for arm in sorted(comparison.arms, key=lambda arm: arm.folder.name in failed):
            done = _complete(comparison, arm)
            if done is not None:
                arms[arm.folder] = done
        ordered = [arms[arm.folder] for arm in comparison.arms]
        return write_table(comparison, ordered)


def _complete(comparison: Comparison, arm: Arm) -> Arm | None:
    """Run an arm, if need be without the tasks that its method cannot do; None where it failed."""
    siblings = [other.folder for other in comparison.arms if other.folder != arm.folder and other.folder.is_dir()]
    logger.info("%s", arm.name)
    try:
        try:
            run_beside(arm.config, siblings)
        except OF_THE_METHOD as error:
            narrowed = None if isinstance(error, (NumericsError, RunError)) else _narrowed(arm)
            if narrowed is None:
                raise
            arm = narrowed
            run_beside(arm.config, siblings)
    except (DiskError, RankError):
        raise
    except OF_THE_METHOD as error:
        if arm.is_reference and arm.point == comparison.arms[0].point:
            raise
        _record_failure(comparison, arm, str(error))
        return None
    except GlmdError:
        raise
    except Exception as error:
        if arm.is_reference and arm.point == comparison.arms[0].point:
            raise
        _record_failure(comparison, arm, f"{type(error).__name__}: {error}", traceback.format_exc())
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise  # other processes wait for this one; the next call begins with the others
        error.__traceback__ = None  # whose frames hold models
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None
    if _is_first():
        with suppress(OSError):  # a folder of this name, perhaps
            _failure_file(comparison, arm).unlink(missing_ok=True)
    return arm


def _narrowed(arm: Arm) -> Arm | None:
    """The arm without the tasks that its method cannot do; None where that is not what is wrong."""
    tasks = list(arm.config.tasks)
    if len(tasks) < 2 or arm.is_reference:
        return None
    problems, synthetic = {}, arm.folder / "synthetic" if arm.config.data.synthetic else None
    for task in tasks:
        others = [each for each in tasks if each != task]
        try:
            planned(replace(arm.config, untrained_tasks=others), synthetic)
        except OF_THE_METHOD as refusal:
            problems[task] = str(refusal)
    if not problems or len(problems) == len(tasks):
        return None
    for task, why in problems.items():
        logger.warning("%s: %s is left out: %s", arm.name, task, why)
    return arm.without(problems)


def planned(config: RunConfig, synthetic: Path | None, *, processes: int | None = None) -> Plan:
    """The checked plan of an arm. synthetic: where the embedded world lies. processes: to look at batch sizes too."""
    plan = make_plan(with_dtype_of(config), synthetic=synthetic, hash_corpus=False)
    if processes is not None:
        require_sizes_and_room(plan, synthetic, processes)
    return plan


def write_table(comparison: Comparison, arms: list[Arm]) -> Compared:
    """The table of what is complete, into the comparison's folder too. Raises RunError where conditions differ."""
    failed, systems = _failures(comparison), []
    teachers: list[System] = []
    by_point: dict[str, dict[str, Any]] = {}
    for arm in arms:
        if arm.folder.name in failed or not (arm.folder / "results.json").is_file():
            why = failed.get(arm.folder.name, "it has not been run yet")
            systems.append(System(arm.name, arm.kind, [], method=arm.config.method, problems={"": why}))
            continue
        results = load_results(arm.folder)
        for system in systems_of(results, arm.folder, arm.name, kind=arm.kind, problems=arm.problems):
            if system.kind not in ("teacher", "constant"):
                systems.append(system)
            elif arm.is_reference and all(_scores(system) != _scores(other) for other in teachers):
                teachers.append(system if all(system.name != each.name for each in teachers) else _renamed(system, arm))
        by_point.setdefault(json.dumps(arm.point), {})[arm.name] = conditions(arm.folder, results)
    for of_point in by_point.values():
        require_alike(comparison, of_point)
    systems = sorted([*teachers, *systems], key=lambda system: ORDER.index(system.kind))  # as they are otherwise
    table = compared(systems, comparison.reference, notes=_notes(comparison))
    if _is_first():
        _write(comparison, table, systems)
    return table


def _sweeps_lengths(comparison: Comparison) -> bool:
    """Whether points of a sweep have other numbers of updates."""
    return any(key in LENGTH_KEYS for key in comparison.settings.sweep)


def _scores(system: System) -> tuple[str, Any]:
    """What tells a teacher from that of another point of the grid."""
    return system.kind, [(each.task, each.metric, each.seed, each.value, each.resamples) for each in system.scores]


def _renamed(system: System, arm: Arm) -> System:
    point = arm.name.partition(", ")[2]
    return replace(system, name=f"{system.name}, {point}")


def _notes(comparison: Comparison) -> list[str]:
    """What the table says of how its rows came about."""
    settings, name = comparison.settings, comparison.arms[0].config.method
    notes = [
        f"Over each task all methods have as many updates as {method_name(name)}."
        if settings.budget == "matched"
        else "Each method has the updates that the settings of its stages say."
    ]
    if settings.sweep:
        count = len(comparison.arms[0].config.grid_points)
        swept = ", ".join(f"{key} {values}" for key, values in settings.sweep.items())
        notes.append(
            f"Each row is, for each task, the best of {count} points of its last stage on val ({swept}), which "
            "flatters all of them."
            + (" Updates are equal at each point, and not at best ones." if _sweeps_lengths(comparison) else "")
        )
    return notes


def require_alike(comparison: Comparison, of_point: dict[str, Any]) -> None:
    """Refuse arms that were made under other conditions than those before them."""
    is_free = comparison.settings.budget == "own" or _sweeps_lengths(comparison)
    for name, runs in differing(of_point).items():
        if is_free and name.endswith(": updates"):
            continue
        if name == "updates on the corpus":
            runs = {run: value for run, value in runs.items() if value != "0"}
            if len(set(runs.values())) < 2:
                continue
        (first, value), *others = runs.items()
        other, theirs = next((run, each) for run, each in others if each != value)
        raise RunError(
            f"{comparison.folder}: {other} had another {name} than {first} ({theirs}, {value}): they cannot be "
            "compared; delete its folder in runs, or take it out of compare.methods"
        )


def _write(comparison: Comparison, table: Compared, systems: list[System]) -> None:
    folder = comparison.folder
    write_atomically(folder / "table.md", markdown(table))
    write_atomically(folder / "table.tex", latex(table))
    write_atomically(folder / "scores.csv", csv_text(table))
    write_atomically(folder / "comparison.json", as_json(table))
    timed = compared(_with_latency(comparison, systems), comparison.reference)
    write_atomically(folder / "costs.md", costs_markdown(timed))
    try:
        from glmd.reporting.comparison_picture import draw

        draw(table, folder / "table.png")
    except ConfigError:  # without matplotlib there is no picture
        logger.info("table.png is not drawn: pip install 'glmd[plots]'")


def _with_latency(comparison: Comparison, systems: list[System]) -> list[System]:
    """The systems with the time that an answer takes, measured once for models of one shape."""
    record = comparison.folder / "latency.json"
    try:
        known = dict(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    found = [
        system if system.folder is None else replace(system, latency=measured_latency(system.folder, known))
        for system in systems
    ]
    write_atomically(record, json.dumps(known, indent=1, sort_keys=True))
    return found


# The comparison's folder


@contextmanager
def _held(comparison: Comparison) -> Iterator[None]:
    """The folder, for this comparison alone. Raises RunError where it holds another one, or is in use."""
    folder = comparison.folder
    with ExitStack() as held:
        if _is_first():

            def refuse(holder: str) -> None:
                raise RunError(f"output_dir {folder} is in use by {holder}")

            require_free(comparison)
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / "lock", refuse))
            write_atomically(folder / COMPARISON, dump_yaml(comparison.record))
        yield


def require_free(comparison: Comparison) -> None:
    """Refuse a folder of something else. Methods, seeds, controls and points of the grid may be added."""
    folder, recorded = comparison.folder, comparison.folder / COMPARISON
    problem = write_problem(folder)
    if problem is not None:
        raise RunError(f"output_dir {folder} {problem}; choose another".replace("\0", "\\0"))
    if (folder / "failures").exists() and not (folder / "failures").is_dir():
        raise RunError(f"{folder / 'failures'} is no folder; delete it")
    if not folder.exists() or {path.name for path in folder.iterdir()} <= {"lock", f"{COMPARISON}.tmp"}:
        return
    if not recorded.is_file():
        if (folder / "lock").is_file() and (folder / "runs").is_dir():
            return  # a comparison that lost its record: each run has its own
        raise RunError(f"output_dir {folder} is not empty and holds no comparison; choose another output_dir")
    ignore = [f"config.{key}" if "*" not in key else key for key in GROWING_KEYS]
    changed = differences(_recorded(recorded), comparison.record, ignore=ignore)
    if changed:
        raise RunError(
            f"output_dir {folder} holds another comparison ({'; '.join(changed)}); choose another, or change it back"
        )


def _recorded(path: Path) -> dict[str, Any]:
    """What a comparison was begun with, with keys that came later as they are by default."""
    try:
        found = load_yaml(path)
        return {**found, "config": record_of(config_of({**found["config"], "output_dir": "."}, str(path)))}
    except (ConfigError, KeyError, TypeError):
        raise RunError(f"{path} is damaged; delete it, and each run is compared by its own record") from None


def _is_first() -> bool:
    """Whether this process writes: the launcher's first one."""
    return os.environ.get("RANK", "0") == "0"


def _failure_file(comparison: Comparison, arm: Arm) -> Path:
    return comparison.folder / "failures" / f"{arm.folder.name}.json"


def _record_failure(comparison: Comparison, arm: Arm, why: str, trace: str = "") -> None:
    """trace: of a crash, which may be that of one process alone; a refusal is that of all."""
    logger.warning("%s: %s", arm.name, why)
    if trace or _is_first():
        record = json.dumps({"why": " ".join(why.split()), "traceback": trace}, indent=1)
        with suppress(DiskError):  # of two that write at once
            write_atomically(_failure_file(comparison, arm), record)


def _failures(comparison: Comparison) -> dict[str, str]:
    """Name of an arm's folder -> why it failed."""
    found = {}
    for path in sorted((comparison.folder / "failures").glob("*.json")):
        try:
            found[path.stem] = str(json.loads(path.read_text(encoding="utf-8"))["why"])
        except (OSError, ValueError, KeyError, TypeError):  # damaged: it is tried again anyway
            found[path.stem] = "it failed"
    return found
