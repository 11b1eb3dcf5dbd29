"""The results of a run as one table, for a terminal and as Markdown.

    print(results_table(load_results("runs/quickstart")))

Reads results.json alone. Several seeds become mean and standard deviation; nothing that was not measured is filled in.
"""

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from glmd.errors import RunError
from glmd.public import public

NEAREST = "nearest to the teacher on val inputs"  # how a checkpoint was chosen, where labels were not looked at
SYSTEMS = ("teacher", "student", "hard labels", "full vocabulary", "trim only", "trim after")


@public
def load_results(folder: str | Path) -> dict[str, Any]:
    """results.json of a run folder. Raises RunError when the run has none, or it is of 0.1 or something else."""
    path = Path(folder) / "results.json"
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (Path(folder) / "comparison.yaml").is_file():
            raise RunError(f"{folder} holds a comparison; its runs lie in {Path(folder) / 'runs'}") from None
        raise RunError(f"{folder}: no results.json; `glmd run` writes it when all stages are complete") from None
    except NotADirectoryError:
        raise RunError(f"{folder} is a file; give the folder of a run") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error})") from None
    version = str(results.get("glmd", "")) if isinstance(results, dict) else ""
    if version.startswith("0.1."):
        remedy = f"read it with glmd {version}, or run again with this one into a new folder"
        raise RunError(f"{path}: was made by glmd {version}, whose results have other names; {remedy}")
    keys = {"system", "stage", "task", "seed"}
    if not (
        isinstance(results, dict)
        and isinstance(results.get("rows"), list)
        and isinstance(results.get("parameters"), dict)
        and all(isinstance(row, dict) and keys <= row.keys() and _is_scored_row(row) for row in results["rows"])
    ):
        raise RunError(f"{path}: holds no results of a run; `glmd run` with the run's config writes them again")
    return results


def _is_scored_row(row: dict[str, Any]) -> bool:
    """Whether a row's scores, if it has any, are numbers, and what stands beside them is there."""
    numbers = [row.get("metrics", {}), row.get("budget", {}), {key: row[key] for key in ("agreement",) if key in row}]
    if not all(isinstance(each, dict) for each in numbers):
        return False
    if any(type(value) not in (int, float) or value != value for each in numbers for value in each.values()):
        return False
    return "metrics" not in row or {"examples", "selection", "casting", "split"} <= row.keys()


@public
def results_table(results: dict[str, Any]) -> str:
    """Markdown: task scores by system, word prediction after each pass, parameters and seconds."""
    rows = results["rows"]
    chosen = best_rows(rows)
    sections = [
        _task_table(chosen, _sweep_note(rows)),
        *(f"Warning: {each}" for each in concerns(chosen)),
        _word_table(chosen),
        _quantization_note(rows),
        _distance_table(rows),
        _sweep_table(rows),
        _size_table(results),
        _time_table(rows),
        _phases(results.get("seconds", {})),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def best_grid_points(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a sweep: system, task and the grid point of each that the table shows."""
    best = _best_of_sweep(results["rows"])
    return [{"system": system, "task": task, "grid_point": point} for (system, task), point in best.items()]


def best_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a sweep the rows of the best grid points; else all."""
    best = _best_of_sweep(rows)
    return [row for row in rows if _is_of(row, best)]


def final_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with scores of each system's last stage on a task; a method may have others that leave such a model."""
    scored = [row for row in rows if "metrics" in row or "agreement" in row]
    last = {(row["system"], row["task"]): row["stage"] for row in scored}
    return [row for row in scored if row["stage"] == last[row["system"], row["task"]]]


def _best_of_sweep(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Of a sweep: for each system and task the grid point whose mean over seeds is the highest; the first of equals."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    points = {}
    for row in final_rows(rows):
        if "grid_point" in row and "agreement" in row:
            name = json.dumps(row["grid_point"])
            points[name] = row["grid_point"]
            values.setdefault((row["system"], row["task"]), {}).setdefault(name, []).append(_merit(row))
    return {key: points[max(scores, key=lambda name: statistics.mean(scores[name]))] for key, scores in values.items()}


def _is_by_agreement(row: dict[str, Any]) -> bool:
    """Whether a grid point is chosen by agreement with the teacher: labels are not looked at, or there are none."""
    return row["selection"] == NEAREST or "metrics" not in row


def _merit(row: dict[str, Any]) -> float:
    """What a grid point is chosen by: agreement, or the task's first metric."""
    return float(row["agreement"] if _is_by_agreement(row) else next(iter(row["metrics"].values())))


def _is_of(row: dict[str, Any], best: dict[tuple[str, str], dict[str, Any]]) -> bool:
    """Whether a row belongs to its system's best grid point; a first pass may be shared by several."""
    chosen = best.get((row["system"], row["task"]), {})
    return row.get("grid_point", {}).items() <= chosen.items()


def _sweep_note(rows: list[dict[str, Any]]) -> str:
    swept = [row for row in final_rows(rows) if "grid_point" in row and "agreement" in row]
    if not swept:
        return ""
    count = len({json.dumps(row["grid_point"]) for row in swept if row["system"] == swept[0]["system"]})
    ways = [_is_by_agreement(row) for row in swept]
    by = "agreement with the teacher" if all(ways) else "score"
    if any(ways) and not all(ways):
        by += ", or by agreement with the teacher where labels are not looked at or not there"
    return f" For each system and task the best of {count} grid points, chosen on val by {by}; below all, it with a *."


def _sweep_table(rows: list[dict[str, Any]]) -> str:
    """Every grid point of a sweep: mean and standard deviation of each system's scores and agreement."""
    swept = [row for row in final_rows(rows) if "grid_point" in row and "agreement" in row]
    best = _best_of_sweep(rows)
    columns = list(dict.fromkeys((row["task"], m) for row in swept for m in (*row.get("metrics", ()), "agreement")))
    body = []
    for system, point in dict.fromkeys((row["system"], json.dumps(row["grid_point"])) for row in swept):
        found = [row for row in swept if (row["system"], json.dumps(row["grid_point"])) == (system, point)]
        cells = []
        for task, metric in columns:
            of_task = [row.get("metrics", {}) | row for row in found if row["task"] == task]
            star = " *" if any(json.dumps(best.get((system, task))) == point for _ in of_task) else ""
            cells.append(_mean([row[metric] for row in of_task if metric in row]) + star)
        settings = ", ".join(f"{key}={value}" for key, value in json.loads(point).items())
        body.append([f"{system}: {settings}", *cells])
    header = ["sweep", *(f"{task} {metric}" for task, metric in columns)]
    return markdown_table(header, body) if body else ""


def _task_table(rows: list[dict[str, Any]], sweep_note: str) -> str:
    scored = final_rows(rows)
    if not scored:
        return ""
    # A split without labels still has answers, and how many are the teacher's.
    columns = list(dict.fromkeys((row["task"], m) for row in scored for m in row.get("metrics", ["(no labels)"])))
    header = ["system", *(f"{task} {metric}" for task, metric in columns)]
    body = []
    # Of several teachers the further ones stand behind the first, and then assistants: teacher 2, assistant 1.
    there, kinds = dict.fromkeys(row["system"] for row in scored), [*SYSTEMS]
    kinds[1:1] = [each for each in there if each.startswith(("teacher ", "assistant "))]
    for system in [each for each in kinds if each in there]:
        cells = []
        for task, metric in columns:
            of_task = [row for row in scored if row["system"] == system and row["task"] == task]
            cells.append(_mean([row["metrics"][metric] for row in of_task if metric in row.get("metrics", {})]))
        body.append([_LABELS.get(system, system), *cells])
        before = [row for row in scored if row["system"] == system and "metrics_before" in row]
        if before:
            found = [[row["metrics_before"].get(m) for row in before if row["task"] == task] for task, m in columns]
            cells = [_mean([value for value in each if value is not None]) for each in found]
            body.append([f"{_LABELS.get(system, system)}, before training", *cells])
    students = [row for row in scored if row["system"] == "student"]
    body.append(["student's agreement with the teacher", *_agreement(students, columns)])
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
        + sweep_note
        + (_control_note(rows) if any(row["system"] == "hard labels" for row in scored) else "")
        + "".join(dict.fromkeys(_inputs_note(row) for row in scored if "inputs" in row))
    )
    return f"{markdown_table(header, body)}\n\n{note}"


def _agreement(students: list[dict[str, Any]], columns: list[tuple[str, str]]) -> list[str]:
    """How often the student's answers are the teacher's, in each task's first column."""
    cells = []
    for column in columns:
        is_first = column == next(each for each in columns if each[0] == column[0])
        found = [row["agreement"] for row in students if row["task"] == column[0] and "agreement" in row]
        cells.append(_mean(found if is_first else []))
    return cells


def _inputs_note(row: dict[str, Any]) -> str:
    examples, labeled = row["inputs"]["examples"], row["inputs"]["labeled"]
    kind = "of its own, all labeled" if labeled == examples else f"of its own, {labeled} of them labeled"
    return f" {row['task']}: the student learned from {examples} examples {kind if labeled else 'without labels'}."


def concerns(rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong with a task's scores, in sentences: a teacher that knows nothing, a student far below its control.

    Far is more than 0.05 and more than two standard errors of the examples' number.
    """
    found = []
    rows = final_rows(rows)
    for task in dict.fromkeys(row["task"] for row in rows if "metrics" in row):
        of_task = [row for row in rows if row["task"] == task and "metrics" in row]
        metric = next(iter(of_task[0]["metrics"]))
        score = {
            system: statistics.mean(row["metrics"][metric] for row in of_task if row["system"] == system)
            for system in dict.fromkeys(row["system"] for row in of_task)
        }
        constant = of_task[0].get("constant", {}).get(metric, float("-inf"))
        poor = [name for name in score if name.startswith("teacher") and score[name] <= constant]
        found += [
            f"{task}: the {name}'s {metric} of {score[name]:.3f} is no better than that of the best constant answer, "
            f"{constant:.3f}. "
            + (
                "A teacher that was named may have its classes in another order than the task: compare id2label of its "
                "config.json. "
                if metric not in ("pearson", "spearman")
                else ""
            )
            + "One that was fine-tuned here needs another task_teacher.learning_rate, or more epochs."
            for name in poor
        ]
        if poor:
            continue
        below = score.get("hard labels", float("-inf")) - score.get("student", float("inf"))
        if below > max(0.05, of_task[0].get("examples", 1) ** -0.5):
            found.append(
                f"{task}: the student's {metric} is {below:.3f} below that of its control, which learned the labels "
                "alone. Try another learning_rate of its last stage or more of its epochs, a longer pretraining, or "
                "a larger "
                "vocabulary.keep_ratio."
            )
    return found


def _control_note(rows: list[dict[str, Any]]) -> str:
    """The control's number of updates, by the passes that the student has."""
    count = len({row["stage"] for row in rows if row["system"] == "student" and row["task"] is not None})
    passes = {1: "its pass over the task", 2: "both its passes together"}.get(count, "all its passes together")
    return f" The hard-label control has the student's start and as many updates as {passes}."


_LABELS = {
    "teacher": "teacher",
    "student": "student (distilled)",
    "hard labels": "control: same student, hard labels only",
    "full vocabulary": "control: student with the full vocabulary",
    "trim only": "control: teacher with fewer tokens, not trained",
    "trim after": "control: full vocabulary, trimmed after training",
}


def _word_table(rows: list[dict[str, Any]]) -> str:
    """Word prediction before and after each pass: how near the student's words are to the teacher's."""
    body = []
    measured = {key for row in rows for key in row.get("lm_scores", ())}
    # Of a decoder nothing is masked, of a masked LM no text is coded: one of both pairs is there.
    columns = {key: title for key, title in _WORD_COLUMNS.items() if key in measured}
    groups = dict.fromkeys((row["system"], row["stage"], row["task"]) for row in rows if "lm_scores" in row)
    for (system, stage, task), (role, whose) in itertools.product(groups, _ROLES.items()):
        found = [row for row in rows if (row["system"], row["stage"], row["task"]) == (system, stage, task)]
        if role and not any(f"{role}kl_divergence" in row["lm_scores"] for row in found):
            continue
        cells = []
        for key, name in ((f"{role}{key}", key) for key in columns):
            before = [row["lm_scores_before"][key] for row in found if key in row["lm_scores_before"]]
            after = [row["lm_scores"][key] for row in found if key in row["lm_scores"]]
            is_changed = after and not name.startswith("teacher_")
            cells.append(f"{_mean(before)} → {_mean(after)}" if is_changed else _mean(after))
        where = "pretraining, held-out corpus" if task is None else f"{task} LM pass, val inputs"
        body.append([f"{system}: {where}{whose}", *cells])
    if not body:
        return ""
    return markdown_table(["word prediction, before → after", *columns.values()], body)


def _distance_table(rows: list[dict[str, Any]]) -> str:
    """How far the student's layers are from the teacher's, and how that goes with the loss on words."""
    found = [row["layer_distances"] for row in rows if "layer_distances" in row and row["system"] == "student"]
    if not found:
        return ""
    distances = {name: value for name, value in found[0].items() if isinstance(value, dict)}
    body = []
    for i in range(max(len(each["before"]) for each in distances.values())):
        cells = [str(i + 1)]
        for each in distances.values():
            correlation = each["spearman"][i]
            shown = "–" if correlation is None else f"{correlation:.2f}"
            cells.append(f"{each['before'][i]:.3g} → {each['after'][i]:.3g} ({shown})")
        body.append(cells)
    header = ["student layer: distance before → after (Spearman with the loss on words)", *distances]
    return markdown_table(header, body)


def _quantization_note(rows: list[dict[str, Any]]) -> str:
    """How far the teacher that was learned from is from the whole one."""
    found = [row["quantization"] for row in rows if "quantization" in row]
    if not found:
        return ""
    kl, agreement = found[0]["kl_divergence"], found[0]["agreement"]
    return (
        f"The quantized teacher, of which the student learned, is {kl:.4f} nats a token (KL) from the whole one on "
        f"held-out text, with the same top token for {agreement:.1%}."
    )


# Of conversations the tokens that an assistant says have scores of their own, and the others.
_ROLES = {"": "", "assistant_": ", assistant's tokens", "others_": ", other tokens"}
_WORD_COLUMNS = {
    "kl_divergence": "KL to teacher (nats/token)",
    "agreement": "same top token",
    "masked_accuracy": "masked accuracy",
    "teacher_masked_accuracy": "teacher's",
    "bits_per_byte": "bits per byte",
    "exact_bits_per_byte": "with the mapped tokenizer",
    "teacher_bits_per_byte": "teacher's",
}


def _size_table(results: dict[str, Any]) -> str:
    body = []
    for name, counts in results["parameters"].items():
        sizes = [f"{counts[key] / 1e6:.2f} M" for key in ("total", "vocabulary", "body")]
        body.append([name, *sizes, str(counts.get("embedding_size", "–"))])
    title = f"parameters ({results.get('parameters_of', 'language model')})"
    return markdown_table([title, "total", "vocabulary", "body", "embedding size"], body)


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
            "/".join(str(steps) for steps in sorted({t["steps"] for t in trained})),
            f"{rate:,.0f}" if rate else "",
        ]
        body.append([f"{system}: {stage}" + (f" {task}" if task else ""), *cells])
    return markdown_table(["stage", "seconds (in all)", "steps", "tokens/s"], body)


def _phases(seconds: dict[str, float]) -> str:
    """What the last start of a run took, in a sentence, the longest first."""
    parts = ", ".join(f"{name} {taken:.1f}" for name, taken in seconds.items())
    return f"Seconds of the last start: {sum(seconds.values()):.1f}, of them {parts}." if parts else ""


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
