"""What `glmd compare`, and `glmd report` of several runs, print.

table, notes = join_runs(["runs/glmd", "runs/kd"])
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from glmd.commands.check import synthetic_data
from glmd.errors import ConfigError, GlmdError, RunError, counted
from glmd.pipeline.compare import ORDER, planned, require_free
from glmd.planning.comparison import Comparison, load_comparison
from glmd.public import public
from glmd.reporting.comparison import Comparison as Compared
from glmd.reporting.comparison import compared
from glmd.reporting.comparison_tables import as_json, csv_text, latex, markdown
from glmd.reporting.conditions import conditions, differing
from glmd.reporting.joined import answers_of, systems_of
from glmd.reporting.report import load_results

FORMATS: dict[str, Callable[[Compared], str]]
FORMATS = {"markdown": markdown, "latex": latex, "csv": csv_text, "json": as_json}
TABLES = {"markdown": "table.md", "latex": "table.tex", "csv": "scores.csv", "json": "comparison.json"}


@public
def join_runs(runs: Sequence[str | Path], *, reference: str | None = None) -> tuple[Compared, list[str]]:
    """The table of runs that were made apart, and in which conditions they differ, in sentences.

    A run is called by its method, or by its folder where methods are alike. reference: one of these names; None: the
    first run's. Raises GlmdError, one line.
    """
    folders = [Path(each) for each in runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("a run is named twice; name each once")
    results = [load_results(folder) for folder in folders]
    methods = [next((str(row.get("method", "")) for row in each["rows"]), "") for each in results]
    names = [
        method if method and methods.count(method) == 1 else folder.as_posix()
        for method, folder in zip(methods, folders, strict=True)
    ]
    systems = []
    for i, (folder, name, each) in enumerate(zip(folders, names, results, strict=True)):
        found = systems_of(each, folder, name, with_teacher=i == 0)
        if not any(system.name == name for system in found):
            raise RunError(f"{folder}: its student has no scores on a task; `glmd report {folder}` shows what it has")
        systems += found
    _require_same_examples(folders, names, results)
    found_by = {name: conditions(folder, each) for name, folder, each in zip(names, folders, results, strict=True)}
    notes = [
        f"Conditions differ: {what} ({', '.join(f'{run} {value}' for run, value in by_run.items())})."
        for what, by_run in differing(found_by).items()
    ]
    systems.sort(key=lambda system: ORDER.index(system.kind))
    return compared(systems, reference or names[0]), notes


def _require_same_examples(folders: Sequence[Path], names: Sequence[str], results: Sequence[dict[str, Any]]) -> None:
    """Refuse scores on other examples: they have no difference and no rank."""
    known: dict[str, tuple[str, Any]] = {}
    for folder, name, found in zip(folders, names, results, strict=True):
        for row in (row for row in found["rows"] if row["system"] == "student" and "metrics" in row):
            val = row["examples"], answers_of(folder, row).get("val")
            other, theirs = known.setdefault(row["task"], (name, val))
            is_same = val[0] == theirs[0] and (None in (val[1], theirs[1]) or val[1] == theirs[1])
            if not is_same:
                raise ConfigError(
                    f"{row['task']}: {name} was scored on other examples than {other} (val of {val[0]}, {theirs[0]}); "
                    "runs that share their val can be joined"
                )


def report_comparison(runs: Sequence[Path], reference: str | None, form: str, picture: Path | None = None) -> str:
    """What `glmd report` prints of several runs, or of a comparison's folder. Raises GlmdError, one line."""
    folder, *others = runs
    if not others:
        for name, given in (("reference", reference), ("picture", picture)):
            if given is not None:
                raise ConfigError(
                    f"--{name} has no effect on a comparison, whose folder has it; give compare.reference, or its runs"
                )
        path = folder / TABLES[form]
        try:
            text = path.read_text(encoding="utf-8")
            if form == "json":
                json.loads(text)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "damaged"
            raise RunError(f"{path}: {reason}; `glmd compare` with the comparison's config writes it again") from None
        return text
    table, notes = join_runs(runs, reference=reference)
    if picture is not None:
        from glmd.reporting.comparison_picture import draw

        try:
            draw(table, picture)
        except (OSError, ValueError) as error:  # also a form that there is not
            raise ConfigError(f"--picture {picture}: cannot be written ({error})") from None
    told = "".join(f"\n{note}\n" for note in notes) if form == "markdown" else ""
    return FORMATS[form](table) + told


def check_comparison(path: str | None, overrides: Iterable[str]) -> str:
    """The arms for a person to read, and why one is refused; nothing is trained.

    Raises GlmdError where the reference is refused, one line.
    """
    comparison = load_comparison(path, overrides)
    require_free(comparison)
    lines = []
    with synthetic_data(comparison.arms[0].config) as synthetic:
        for arm in comparison.arms:
            try:
                plan = planned(arm.config, synthetic, processes=int(os.environ.get("WORLD_SIZE", "1")))
            except GlmdError as error:
                if arm is comparison.arms[0]:
                    raise
                lines.append(f"{arm.kind:<8} {arm.name}: refused, {error}")
                continue
            size, controls = plan.parameters["student"]["total"], vars(arm.config.controls)
            beside = [name for name, on in controls.items() if on]
            lines.append(
                f"{arm.kind:<8} {arm.name}: a student of {size:,} parameters, stages {', '.join(plan.method)}"
                + (f"; controls {', '.join(beside)}" if beside else "")
            )
    settings, config = comparison.settings, comparison.arms[0].config
    budget = "over each task all have as many updates as the reference" if settings.budget == "matched" else "own"
    head = [
        f"comparison {comparison.folder}: {counted(len(comparison.arms), 'run')}",
        f"reference  {comparison.reference}",
        f"seeds      {', '.join(map(str, config.seeds))}",
        f"tasks      {', '.join(config.tasks) or 'none'}",
        f"budget     {budget}",
        "",
    ]
    return "\n".join([*head, *lines])


def describe_table(comparison: Comparison, table: Compared) -> str:
    """What `glmd compare` says at its end."""
    names = ", ".join([*TABLES.values(), "costs.md"])
    return f"{markdown(table)}\n{comparison.folder}: {names}; `glmd report {comparison.folder}` prints the table again."
