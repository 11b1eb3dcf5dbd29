"""A comparison as Markdown, LaTeX, CSV and JSON; the same comparison gives the same text.

What differs from run to run, times, is in a table of its own, and nowhere else.
"""

import csv
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from glmd.errors import counted
from glmd.reporting.comparison import Comparison, Difference, Mean, Row, line, other_examples
from glmd.reporting.report import markdown_table

NONE = "–"  # not measured
SCORE_FIELDS = ("method", "system", "kind", "task", "metric", "seed", "stage", "value", "examples", "glmd", "commit")


def markdown(c: Comparison) -> str:
    """Scores, differences and ranks, what they mean, and sizes; for a terminal too."""
    notes = "\n".join(f"- {note}" for note in _notes(c))
    scores = _markdown_table(_score_header(c), [_score_cells(c, row) for row in c.rows])
    return "\n\n".join(part for part in (scores, notes, _size_table(c)) if part) + "\n"


def costs_markdown(c: Comparison) -> str:
    """Seconds and latencies, which differ from run to run and from machine to machine; empty where there are none."""
    systems = [row.system for row in c.rows if row.system.seconds is not None or row.system.latency]
    batches = sorted({batch for system in systems for batch in system.latency}, key=lambda b: (len(b), b))
    body = [
        [
            system.name,
            _of(system.seconds, "{:,.0f}"),
            *(_of(system.latency.get(batch), "{:.2f}") for batch in batches),
        ]
        for system in systems
    ]
    header = ["system", "seconds", *(f"ms, batch of {batch}" for batch in batches)]
    return _markdown_table(header, body) + "\n" if body else ""


def latex(c: Comparison) -> str:
    """The table of scores as a tabular with the rules of booktabs, the best of the methods bold."""
    bests = _bests(c)
    lines = [
        "% \\usepackage{booktabs}",
        *(f"% {line(note)}" for note in c.notes),
        "\\begin{tabular}{l" + "r" * (len(_score_header(c)) - 1) + "}",
        "\\toprule",
        " & ".join(map(_tex, _score_header(c))) + " \\\\",
        "\\midrule",
    ]
    for row in c.rows:
        cells = [_tex(cell) for cell in _score_cells(c, row)]
        if row.system.kind == "method":
            values = [_thousandths(mean) for mean in _means(c, row)]
            for i, (value, best) in enumerate(zip(values, bests, strict=True), start=1):
                cells[i] = f"\\textbf{{{cells[i]}}}" if value is not None and value == best else cells[i]
        # A name in brackets would be an option of the command before it.
        lines.append(("{}" if cells[0].startswith(("[", "*")) else "") + " & ".join(cells) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def csv_text(c: Comparison) -> str:
    """A line for each score, and for each problem one without a value."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [*SCORE_FIELDS, "problem"], restval="", lineterminator="\n")
    writer.writeheader()
    for row in c.rows:
        writer.writerows(_score_rows(row))
        for task, problem in row.system.problems.items():
            writer.writerow({**_identity(row), "task": task, "problem": problem})
    return file.getvalue()


def as_json(c: Comparison) -> str:
    """All that a comparison holds but times and the resamples themselves."""
    content = {
        "schema": 1,
        "reference": c.reference,
        "confidence": c.confidence,
        "resamples": c.resamples,
        "columns": [{"task": task, "metric": metric} for task, metric in c.columns],
        "tasks": list(c.tasks),
        "notes": list(c.notes),
        "systems": [_system_json(row) for row in c.rows],
        "rows": [score for row in c.rows for score in _score_rows(row)],
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


# --- Cells -------------------------------------------------------------------------------------------------------


def _score_header(c: Comparison) -> list[str]:
    columns = [f"{task} {metric}" for task, metric in c.columns]
    further = [f"[{INTERVALS[kind]}]" for kind in intervals(c)[1:]]
    return ["system", *columns, "average", f"difference to {c.reference}", *further, "rank"]


def _score_cells(c: Comparison, row: Row) -> list[str]:
    """A row of the main table. Each cell is as a reader sees it, escaped by no language yet."""
    kinds = intervals(c)
    difference = [NONE] * max(1, len(kinds))
    if row.system.name == c.reference:
        difference[0] = "reference"
    elif row.difference:
        ends = [_interval(getattr(row.difference, kind)) for kind in kinds]
        difference = [
            f"{_signed(row.difference.mean)} {''.join(ends[:1])}".strip(),
            *(i or NONE for i in ends[1:]),
        ]
    rank = NONE if row.rank is None else f"{row.rank:.1f}"
    return [row.system.name, *map(_mean_cell, _means(c, row)), *difference, rank]


INTERVALS = {"over_examples": "over examples", "over_seeds": "over seeds"}


def intervals(c: Comparison) -> list[str]:
    """The kinds of intervals that there are of the averages, the one beside the difference first."""
    found = [row.difference for row in c.rows if row.difference and row.system.name != c.reference]
    return [kind for kind in INTERVALS if any(getattr(each, kind) for each in found)]


def _means(c: Comparison, row: Row) -> list[Mean | None]:
    return [*(row.metrics.get(column) for column in c.columns), row.average]


def _mean_cell(mean: Mean | None) -> str:
    if mean is None:
        return NONE
    return f"{mean.mean:.3f}" + (f" ± {mean.sd:.3f}" if mean.sd is not None else "")


def _interval(ends: tuple[float, float] | None) -> str:
    return f"[{_signed(ends[0])}, {_signed(ends[1])}]" if ends else ""


def _signed(value: float) -> str:
    """+0.012; what rounds to nothing has no sign."""
    return f"{value:+.3f}" if round(value, 3) else "0.000"


def _of(value: float | None, shape: str) -> str:
    return NONE if value is None else shape.format(value)


def _markdown_table(header: list[str], body: list[list[str]]) -> str:
    return markdown_table([_escaped(cell) for cell in header], [[_escaped(cell) for cell in row] for row in body])


def _escaped(text: str) -> str:
    return line(text).replace("\\", "\\\\").replace("|", "\\|")


_TEX = {each: f"\\{each}" for each in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    "±": "$\\pm$",
    NONE: "--",
}


def _tex(text: str) -> str:
    escaped = "".join(_TEX.get(each, each) for each in line(text))
    return re.sub(r"(?<![\w.-])-(?=\d)", "$-$", escaped)  # a minus, not a hyphen


def _thousandths(mean: Mean | None) -> int | None:
    """What is shown of a mean, so that two that look equal are."""
    return None if mean is None else int(f"{mean.mean:.3f}".replace(".", ""))


def _bests(c: Comparison) -> list[int | None]:
    """The highest shown mean of the methods in each column of scores."""
    methods = [[_thousandths(mean) for mean in _means(c, row)] for row in c.rows if row.system.kind == "method"]
    columns = zip(*methods, strict=True) if methods else [()] * (len(c.columns) + 1)
    return [max((value for value in column if value is not None), default=None) for column in columns]


# --- Notes and sizes ---------------------------------------------------------------------------------------------


def _notes(c: Comparison) -> list[str]:
    origin = _reference(c).system
    kinds = intervals(c)
    notes = [
        *c.notes,
        f"A task's score is the mean of its metrics, the average the mean of the scores of {_listed(c.tasks)}."
        if c.tasks
        else "There are no scores.",
        _examples_note(c),
        _seeds_note(c),
    ]
    share = f"{100 * c.confidence:g}%"
    meaning = {
        "over_examples": f"{share} bootstrap interval over the examples of val: both systems on the same "
        f"{counted(c.resamples, 'resample')} of them, means over seeds. What other seeds would change is not in it",
        "over_seeds": f"{share} t interval over the seeds that both have, on the same examples. What other examples "
        "would change is not in it",
    }
    if kinds:
        notes += [
            f"Differences are of averages. Beside each: the {meaning[kinds[0]]}.",
            *(f"[{INTERVALS[kind]}]: the {meaning[kind]}." for kind in kinds[1:]),
            "A difference of which an interval holds 0 shows nothing: neither which is better nor that both are equal.",
        ]
    elif any(row.difference and row.system.name != c.reference for row in c.rows):
        notes.append("Differences are of averages, and without an interval: they may be chance alone.")
    if any(row.rank is not None for row in c.rows):
        notes.append("Rank: among methods and controls, 1 the best, ties their mean place; the mean over tasks.")
    others = [
        f"{line(row.system.name)} ({', '.join(tasks)})"
        for row in c.rows
        if (tasks := [task for task in row.tasks if other_examples(row.system, origin, task)])
    ]
    if others:
        notes.append(
            f"Scored on another number of examples than {line(c.reference)}, so not paired: {'; '.join(others)}."
        )
    for row in c.rows:
        for task, problem in row.system.problems.items():
            where = f"{line(row.system.name)} on {task}" if task else line(row.system.name)
            notes.append(f"No score of {where}: {line(problem)}")
    return [note for note in notes if note]


def _examples_note(c: Comparison) -> str:
    """Of each task how many the reference was scored on, or the first that says it; others have a note of their own."""
    numbers: dict[str, int] = {}
    for row in (_reference(c), *c.rows):
        numbers = row.system.examples | numbers
    parts = [f"{task} {numbers[task]:,}" for task in dict.fromkeys(task for task, _ in c.columns) if task in numbers]
    return f"Examples of val: {', '.join(parts)}." if parts else ""


def _seeds_note(c: Comparison) -> str:
    """Who has which seeds, and that they differ from the reference's where they do."""
    having: dict[str, list[str]] = {}
    for row in c.rows:
        by_task = {task: ", ".join(map(str, mean.seeds)) for task, mean in row.tasks.items()}
        texts = dict.fromkeys(by_task.values())
        text = "".join(texts) if len(texts) < 2 else "; ".join(f"{task} {seeds}" for task, seeds in by_task.items())
        if text:
            having.setdefault(text, []).append(line(row.system.name))
    if not having:
        return ""
    is_several = any(mean.sd is not None for row in c.rows for mean in row.metrics.values())
    spread = " (mean ± standard deviation)" if is_several else ""
    if len(having) == 1:
        return f"Seeds of all: {next(iter(having))}{spread}."
    most = max(having, key=lambda text: len(having[text]))
    parts = [f"{', '.join(names)}: {text}" for text, names in having.items() if text != most]
    unequal = " Where a system's are not the reference's, the difference is that of the means of each one's own."
    theirs = _reference(c).tasks
    is_unequal = any(row.tasks[task].seeds != theirs[task].seeds for row in c.rows for task in row.differences)
    return f"Seeds{spread}: {most}; but {'; '.join(parts)}.{unequal if is_unequal else ''}"


def _size_table(c: Comparison) -> str:
    """Parameters of what is scored, and what the student took to train."""
    body = []
    for system in (row.system for row in c.rows):
        cells = [_millions(system.parameters), _millions(system.vocabulary)]
        cells += [_of(system.updates, "{:,}"), _of(system.tokens, "{:,}")]
        body += [[system.name, *cells]] if set(cells) != {NONE} else []
    header = ["system", "parameters", "of them vocabulary", "student updates", "tokens at most"]
    note = (
        "Parameters are of the model that is scored; updates and tokens are of one seed, over all stages, tokens as "
        "many as batches of full length hold, padding among them."
    )
    return f"{_markdown_table(header, body)}\n\n{note}" if body else ""


def _millions(count: int | None) -> str:
    return NONE if count is None else f"{count / 1e6:.2f} M"


def _reference(c: Comparison) -> Row:
    return next(row for row in c.rows if row.system.name == c.reference)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]


# --- Rows --------------------------------------------------------------------------------------------------------


def _identity(row: Row) -> dict[str, Any]:
    system = row.system
    own = {key: getattr(system, key) for key in ("method", "kind", "glmd", "commit")}
    return {"system": system.name, **own}


def _score_rows(row: Row) -> list[dict[str, Any]]:
    """A dict of SCORE_FIELDS for each score; examples is None where their number is not known."""
    found = []
    for each in row.system.scores:
        own = {key: getattr(each, key) for key in ("task", "metric", "seed", "stage", "value")}
        values = _identity(row) | own | {"examples": row.system.examples.get(each.task)}
        found.append({key: values[key] for key in SCORE_FIELDS})
    return found


def _system_json(row: Row) -> dict[str, Any]:
    system = row.system
    sizes = ("examples", "parameters", "vocabulary", "updates", "tokens", "problems")
    tasks = {
        task: {
            **_mean_json(mean),
            "difference": _difference_json(row.differences.get(task)),
            "rank": row.ranks.get(task),
        }
        for task, mean in row.tasks.items()
    }
    return {
        **_identity(row),
        **{key: getattr(system, key) for key in sizes},
        "metrics": [{"task": task, "metric": m, **_mean_json(mean)} for (task, m), mean in row.metrics.items()],
        "tasks": tasks,
        "average": row.average and _mean_json(row.average),
        "difference": _difference_json(row.difference),
        "rank": row.rank,
    }


def _mean_json(mean: Mean) -> dict[str, Any]:
    return {"mean": mean.mean, "sd": mean.sd, "seeds": list(mean.seeds)}


def _difference_json(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {
        "mean": difference.mean,
        "interval_over_examples": difference.over_examples and list(difference.over_examples),
        "interval_over_seeds": difference.over_seeds and list(difference.over_seeds),
        "seeds": list(difference.seeds),
    }
