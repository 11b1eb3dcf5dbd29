"""The results of a run as one table, for a terminal and as Markdown.

    print(results_table(load_results(Path("runs/quickstart"))))

Reads results.json alone. Several seeds become mean and standard deviation; nothing that was not measured is filled in.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from glmd.errors import RunError

SYSTEMS = ("teacher", "student", "hard labels", "full vocabulary")


def load_results(folder: Path) -> dict[str, Any]:
    """results.json of a run folder. Raises RunError when the run has none, or it holds something else."""
    path = folder / "results.json"
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{folder}: no results.json; `glmd run` writes it when all stages are complete") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error})") from None
    keys = {"system", "stage", "task", "seed"}
    if not (
        isinstance(results, dict)
        and isinstance(results.get("rows"), list)
        and isinstance(results.get("parameters"), dict)
        and all(isinstance(row, dict) and keys <= row.keys() for row in results["rows"])
    ):
        raise RunError(f"{path}: holds no results of a run; `glmd run` with the run's config writes them again")
    return results


def results_table(results: dict[str, Any]) -> str:
    """Markdown: task scores by system, word prediction after each pass, parameters and seconds."""
    rows = results["rows"]
    sections = [_task_table(rows), _word_table(rows), _size_table(results), _time_table(rows)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _task_table(rows: list[dict[str, Any]]) -> str:
    scored = [row for row in rows if "metrics" in row or "agreement" in row]
    if not scored:
        return ""
    # A split without labels still has answers, and how many are the teacher's.
    columns = list(dict.fromkeys((row["task"], m) for row in scored for m in row.get("metrics", ["(no labels)"])))
    header = ["system", *(f"{task} {metric}" for task, metric in columns)]
    body = []
    for system in [name for name in SYSTEMS if any(row["system"] == name for row in scored)]:
        cells = []
        for task, metric in columns:
            of_task = [row for row in scored if row["system"] == system and row["task"] == task]
            cells.append(_mean([row["metrics"][metric] for row in of_task if "metrics" in row]))
        body.append([_LABELS[system], *cells])
    agreement = []
    for task, metric in columns:
        rows_of_task = [row for row in scored if row["system"] == "student" and row["task"] == task]
        is_first = (task, metric) == next(column for column in columns if column[0] == task)
        found = [row["agreement"] for row in rows_of_task if "agreement" in row and is_first]
        agreement.append(_mean(found))
    body.append(["student's agreement with the teacher", *agreement])
    constant = {(row["task"], metric): value for row in scored for metric, value in row.get("constant", {}).items()}
    body.append(["best constant answer", *(_mean([constant[c]] if c in constant else []) for c in columns)])
    seeds = sorted({row["seed"] for row in scored if row["system"] == "student"})
    splits = sorted({row["split"] for row in scored})
    castings = sorted({row["casting"] for row in scored})
    selections = sorted({row["selection"] for row in scored})
    note = (
        f"Scores on {', '.join(splits)}; casting: {', '.join(castings)}; checkpoint: {', '.join(selections)}; "
        f"seeds: {', '.join(map(str, seeds))}"
        + (" (mean ± standard deviation)" if len(seeds) > 1 else "")
        + "."
        + (_CONTROL_NOTE if any(row["system"] == "hard labels" for row in scored) else "")
        + "".join(dict.fromkeys(_inputs_note(row) for row in scored if "inputs" in row))
    )
    return f"{markdown_table(header, body)}\n\n{note}"


def _inputs_note(row: dict[str, Any]) -> str:
    examples, labelled = row["inputs"]["examples"], row["inputs"]["labelled"]
    kind = "of its own, all labelled" if labelled == examples else f"of its own, {labelled} of them labelled"
    return f" {row['task']}: the student learned from {examples} examples {kind if labelled else 'without labels'}."


_CONTROL_NOTE = " The hard-label control has the student's start and as many updates as both its passes."
_LABELS = {
    "teacher": "teacher",
    "student": "student (distilled)",
    "hard labels": "control: same student, hard labels only",
    "full vocabulary": "control: student with the full vocabulary",
}


def _word_table(rows: list[dict[str, Any]]) -> str:
    """Word prediction before and after each pass: how near the student's words are to the teacher's."""
    body = []
    groups = dict.fromkeys((row["system"], row["stage"], row["task"]) for row in rows if "words" in row)
    for system, stage, task in groups:
        found = [row for row in rows if (row["system"], row["stage"], row["task"]) == (system, stage, task)]
        cells = []
        for key in ("kl_divergence", "agreement", "masked_accuracy", "teacher_masked_accuracy"):
            before = [row["words_before"][key] for row in found if key in row["words_before"]]
            after = [row["words"][key] for row in found if key in row["words"]]
            cells.append(
                f"{_mean(before)} → {_mean(after)}" if after and key != "teacher_masked_accuracy" else _mean(after)
            )
        where = "pretraining, held-out corpus" if task is None else f"{task} words pass, val inputs"
        body.append([f"{system}: {where}", *cells])
    if not body:
        return ""
    header = [
        "word prediction, before → after",
        "KL to teacher (nats/token)",
        "same top word",
        "masked accuracy",
        "teacher's",
    ]
    return markdown_table(header, body)


def _size_table(results: dict[str, Any]) -> str:
    body = []
    for name, counts in results["parameters"].items():
        body.append([name, *(f"{counts[key] / 1e6:.2f} M" for key in ("total", "vocabulary", "body"))])
    return markdown_table(["parameters (masked LM)", "total", "vocabulary", "body"], body)


def _time_table(rows: list[dict[str, Any]]) -> str:
    body = []
    groups = dict.fromkeys((row["system"], row["stage"], row["task"]) for row in rows if "seconds" in row)
    for key in groups:
        found = [row for row in rows if (row["system"], row["stage"], row["task"]) == key]
        trained = [row["training"] for row in found if "training" in row]
        rate = statistics.mean(t["tokens_per_second"] for t in trained) if trained else 0.0
        system, stage, task = key
        cells = [
            f"{sum(row['seconds'] for row in found):.0f}",
            str(trained[0]["steps"]) if trained else "",
            f"{rate:,.0f}" if rate else "",
        ]
        body.append([f"{system}: {stage}" + (f" {task}" if task else ""), *cells])
    return markdown_table(["stage", "seconds (all seeds)", "steps", "tokens/s"], body)


def _mean(values: list[float]) -> str:
    """Mean, with the standard deviation over seeds where there are several; a dash where nothing was measured."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def markdown_table(header: list[str], body: list[list[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([line(header), rule, *(line(row) for row in body)])
