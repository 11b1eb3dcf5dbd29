"""Systems beside each other: means, paired intervals and ranks against plain loops, and what each format shows."""

import csv
import dataclasses
import io
import itertools
import json
import math
import random
import statistics

import pytest

from glmd.errors import ConfigError
from glmd.reporting.comparison import Comparison, Row, Scored, System, compared, t_quantile
from glmd.reporting.comparison_picture import COLORS, draw
from glmd.reporting.comparison_tables import NONE, as_json, costs_markdown, csv_text, latex, markdown

B = 400
NOISE = {task: [random.Random(task).gauss(0, 0.03) for _ in range(B)] for task in ("RTE", "CB", "WiC", "COPA", "WSC")}


def scored(task: str, value: float, seed: int = 0, metric: str = "accuracy", *, own: float = 0.01) -> Scored:
    """A score whose resamples share the task's noise, and have some of their own."""
    mine = random.Random(f"{task} {value} {seed} {metric}")
    resamples = [value + each + mine.gauss(0, own) for each in NOISE[task]]
    return Scored(task, metric, seed, value, resamples, stage="task_soft_labels")


def system(name: str, *scores: Scored, kind: str = "method", **more) -> System:
    return System(name, kind, list(scores), **more)


def row(c: Comparison, name: str) -> Row:
    return next(each for each in c.rows if each.system.name == name)


def refusal(*arguments, **keywords) -> str:
    with pytest.raises(ConfigError) as caught:
        compared(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cells(text: str, first: str) -> list[str]:
    """The cells of the first table row that begins with `first`."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {first} ")]
    return [cell.strip() for cell in lines[0].strip("|").split(" | ")][1:]


def percentile(values: list[float], share: float) -> float:
    """Between the two nearest in order, as far as `share` is between them."""
    ordered, place = sorted(values), share * (len(values) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


TWO_TASKS = [
    system(
        "glmd",
        *(scored("RTE", value, seed) for seed, value in enumerate((0.70, 0.72, 0.74))),
        *(scored("CB", value, seed, m) for m in ("accuracy", "macro_f1") for seed, value in enumerate((0.8, 0.7, 0.9))),
        examples={"RTE": 277, "CB": 56},
        parameters=66_000_000,
        vocabulary=23_440_000,
        updates=12_000,
        tokens=9_500_000,
        seconds=1234.5,
        latency={"1": 3.25, "32": 20.0},
        glmd="0.3.0",
        commit="abc",
        method="glmd",
    ),
    system(
        "kd",
        *(scored("RTE", value, seed) for seed, value in enumerate((0.69, 0.73, 0.68))),
        *(scored("CB", 0.6 + seed / 50, seed) for seed in range(3)),
        *(scored("CB", 0.5 + seed / 40, seed, "macro_f1") for seed in range(3)),
        examples={"RTE": 277, "CB": 56},
    ),
    system("hard labels", scored("RTE", 0.6), scored("CB", 0.6), scored("CB", 0.4, metric="macro_f1"), kind="control"),
    system("broken", scored("RTE", 0.9), problems={"CB": "its loss was\nnot finite"}),
    system("teacher", scored("RTE", 0.8), scored("CB", 0.9), scored("CB", 0.9, metric="macro_f1"), kind="teacher"),
]


# --- Means, differences, ranks -----------------------------------------------------------------------------------


def test_a_tasks_score_is_the_mean_of_its_metrics_and_the_average_that_of_tasks():
    of = row(compared(TWO_TASKS, "glmd"), "kd")
    assert of.metrics["CB", "macro_f1"].mean == pytest.approx((0.5 + 0.525 + 0.55) / 3)
    assert of.metrics["CB", "macro_f1"].sd == pytest.approx(0.025)
    assert of.metrics["RTE", "accuracy"].seeds == (0, 1, 2)
    by_seed = [(0.6 + seed / 50 + 0.5 + seed / 40) / 2 for seed in range(3)]
    assert of.tasks["CB"].mean == pytest.approx(statistics.mean(by_seed))
    assert of.tasks["CB"].sd == pytest.approx(statistics.stdev(by_seed))
    averages = [(rte + cb) / 2 for rte, cb in zip((0.69, 0.73, 0.68), by_seed, strict=True)]
    assert of.average.mean == pytest.approx(statistics.mean(averages))
    assert of.average.sd == pytest.approx(statistics.stdev(averages))
    assert row(compared(TWO_TASKS, "glmd"), "teacher").average.sd is None


def test_an_average_without_a_task_of_the_reference_is_none_and_one_beyond_them_does_not_enter():
    more = system(
        "more", scored("RTE", 0.7), scored("CB", 0.8), scored("CB", 0.8, metric="macro_f1"), scored("WiC", 0.1)
    )
    half = system("half", scored("RTE", 0.7), scored("CB", 0.8))
    c = compared([*TWO_TASKS, more, half], "glmd")
    assert c.tasks == ("RTE", "CB") and c.columns[-1] == ("WiC", "accuracy")
    for name in ("broken", "half"):  # of half a metric is missing
        of = row(c, name)
        assert of.average is of.difference is of.rank is None and set(of.tasks) == set(of.differences) == {"RTE"}
    assert row(c, "more").average.mean == pytest.approx((0.7 + 0.8) / 2)
    assert set(row(c, "more").differences) == {"RTE", "CB"}


def test_a_metric_that_the_reference_lacks_is_shown_and_counts_nowhere():
    systems = [
        system("base", scored("RTE", 0.7)),
        system("ours", scored("RTE", 0.8), scored("RTE", 0.1, metric="f1_binary")),
    ]
    c = compared(systems, "base")
    assert row(c, "base").average.mean == 0.7 and row(c, "ours").average.mean == 0.8
    assert cells(markdown(c), "base")[1] == NONE and cells(markdown(c), "ours")[1] == "0.100"


def test_a_reference_that_failed_leaves_means_and_no_differences():
    c = compared([system("glmd", problems={"": "no disk"}), *TWO_TASKS[1:3]], "glmd")
    assert row(c, "kd").average and row(c, "kd").difference is None and not row(c, "kd").differences
    assert "difference" not in markdown(c).split("\n\n")[1].lower() and "No score of glmd: no disk" in markdown(c)
    assert "Seeds (mean ± standard deviation): 0, 1, 2; but hard labels: 0.\n" in markdown(c)


def test_a_system_is_exactly_nothing_from_itself_and_from_its_equal():
    twin = dataclasses.replace(TWO_TASKS[0], name="twin", scores=TWO_TASKS[0].scores[::-1])
    c = compared([*TWO_TASKS, twin], "glmd")
    for name in ("glmd", "twin"):
        of = row(c, name)
        for each in (of.difference, *of.differences.values()):
            assert each.mean == 0 and each.over_examples == each.over_seeds == (0, 0) and each.seeds == (0, 1, 2)
    assert row(c, "twin").ranks["RTE"] == row(c, "glmd").ranks["RTE"]
    assert cells(markdown(c), "twin")[-3:-1] == ["0.000 [0.000, 0.000]", "[0.000, 0.000]"]


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_the_interval_over_examples_is_that_of_a_loop_over_resamples(confidence):
    c = compared(TWO_TASKS, "glmd", confidence=confidence)
    tails = (1 - confidence) / 2, (1 + confidence) / 2

    def resampled(name: str, task: str, b: int) -> float:
        found = [each.resamples[b] for each in row(c, name).system.scores if each.task == task]
        return sum(found) / len(found)

    for name in ("kd", "hard labels"):
        of_tasks = {t: [resampled(name, t, b) - resampled("glmd", t, b) for b in range(B)] for t in ("RTE", "CB")}
        for task, values in of_tasks.items():
            expected = [percentile(values, tail) for tail in tails]
            assert row(c, name).differences[task].over_examples == pytest.approx(expected, abs=1e-12)
        # The tasks are drawn independently: a resample of one goes with the next of the other.
        averages = [(of_tasks["RTE"][b] + of_tasks["CB"][(b - 1) % B]) / 2 for b in range(B)]
        expected = [percentile(averages, tail) for tail in tails]
        assert row(c, name).difference.over_examples == pytest.approx(expected, abs=1e-12)


def width(ends: tuple[float, float]) -> float:
    return ends[1] - ends[0]


def test_what_both_share_in_a_resample_is_no_part_of_the_interval():
    pair = [system(name, scored("RTE", value, own=0.001)) for name, value in (("a", 0.6), ("b", 0.7))]
    ends = row(compared(pair, "a"), "b").difference.over_examples
    assert width(ends) < 0.01 < width((-0.03, 0.03)) and ends[0] < 0.1 < ends[1]


def test_tasks_whose_examples_were_drawn_alike_stay_independent_in_the_average():
    """Of two tasks with one noise the average's interval is narrower by the root of two, as of any two."""
    noise = [random.Random(b).gauss(0, 0.03) for b in range(4000)]
    flat = system("flat", *(Scored(task, "accuracy", 0, 0.5, [0.5] * 4000) for task in ("RTE", "CB")))
    loud = [Scored(task, "accuracy", 0, 0.5, [0.5 + each for each in noise]) for task in ("RTE", "CB")]
    of = row(compared([flat, system("loud", *loud)], "flat"), "loud")
    assert width(of.difference.over_examples) * 2**0.5 == pytest.approx(
        width(of.differences["RTE"].over_examples), rel=0.1
    )


def test_the_interval_over_seeds_is_students_of_the_seeds_that_both_have():
    ours = system("ours", *(scored("RTE", value, seed) for seed, value in ((1, 0.71), (2, 0.75), (3, 0.9))))
    theirs = system("theirs", *(scored("RTE", value, seed) for seed, value in ((0, 0.5), (1, 0.70), (2, 0.72))))
    c = compared([ours, theirs], "theirs")
    found = row(c, "ours").difference
    assert found.seeds == (1, 2)
    assert found.mean == pytest.approx((0.71 + 0.75 + 0.9) / 3 - (0.5 + 0.70 + 0.72) / 3)
    half = 12.7062 * statistics.stdev([0.01, 0.03]) / math.sqrt(2)
    assert found.over_seeds == pytest.approx((0.02 - half, 0.02 + half), abs=1e-6)
    unequal = "Where a system's are not the reference's"
    assert f"1, 2, 3; but theirs: 0, 1, 2. {unequal}" in markdown(c)
    elsewhere = compared([ours, system("other", scored("CB", 0.5, 7))], "ours")
    assert "1, 2, 3; but other: 7." in markdown(elsewhere) and unequal not in markdown(elsewhere)
    one = system("one", scored("RTE", 0.6, 1))
    assert row(compared([one, theirs], "theirs"), "one").difference.over_seeds is None


@pytest.mark.parametrize(
    ("confidence", "degrees", "published"),
    [
        (0.95, 1, 12.706),
        (0.95, 2, 4.303),
        (0.95, 3, 3.182),
        (0.95, 4, 2.776),
        (0.95, 9, 2.262),
        (0.95, 30, 2.042),
        (0.95, 120, 1.980),
        (0.90, 2, 2.920),
        (0.90, 5, 2.015),
        (0.99, 1, 63.657),
        (0.99, 7, 3.499),
        (0.99, 10, 3.169),
        (0.50, 6, 0.718),
    ],
)
def test_quantiles_of_students_t_are_those_of_published_tables(confidence, degrees, published):
    assert t_quantile(confidence, degrees) == pytest.approx(published, abs=5.1e-4)


def test_without_the_same_resamples_there_is_no_interval_over_examples():
    base = system("base", scored("RTE", 0.7), examples={"RTE": 277})
    others = {
        "bare": Scored("RTE", "accuracy", 0, 0.6),
        "fewer": Scored("RTE", "accuracy", 0, 0.6, [0.6] * (B - 1)),
    }
    c = compared([base, *(system(name, each) for name, each in others.items())], "base")
    for name in others:
        found = row(c, name).difference
        assert found.mean == pytest.approx(-0.1) and found.over_examples is found.over_seeds is None
    assert "without an interval: they may be chance alone" in markdown(c)


def test_scores_on_another_number_of_examples_are_not_paired_and_it_is_said():
    base = system("base", scored("RTE", 0.7), scored("CB", 0.7), examples={"RTE": 277, "CB": 56})
    cut = system("cut", scored("RTE", 0.6), scored("CB", 0.6), examples={"RTE": 100, "CB": 56})
    c = compared([base, cut, system("same", scored("RTE", 0.6), scored("CB", 0.6))], "base")
    assert row(c, "cut").differences["RTE"].over_examples is row(c, "cut").difference.over_examples is None
    assert row(c, "cut").differences["CB"].over_examples and row(c, "same").difference.over_examples
    assert "Scored on another number of examples than base, so not paired: cut (RTE)." in markdown(c)
    assert "Examples of val: RTE 277, CB 56." in markdown(
        compared([cut, dataclasses.replace(cut, name="too"), base], "base")
    )


def test_ranks_are_among_methods_and_controls_and_ties_share_their_mean_place():
    values = {"a": (0.7, 0.5), "b": (0.7, 0.6), "c": (0.9, 0.4)}
    systems = [system(name, scored("RTE", rte), scored("CB", cb)) for name, (rte, cb) in values.items()]
    systems.append(system("control", scored("RTE", 0.7), scored("CB", 0.7), kind="control"))
    systems += [system(kind, scored("RTE", 0.8), scored("CB", 0.1), kind=kind) for kind in ("teacher", "constant")]
    c = compared(systems, "a")
    ranks = {each.system.name: each.ranks for each in c.rows}
    assert {name: each.get("RTE") for name, each in ranks.items()} == {
        "a": 3, "b": 3, "c": 1, "control": 3, "teacher": None, "constant": None
    }  # fmt: skip
    assert [ranks[name]["CB"] for name in ("control", "b", "a", "c")] == [1, 2, 3, 4]
    assert [row(c, name).rank for name in ("a", "b", "c", "control", "teacher")] == [3, 2.5, 2.5, 2, None]


def test_what_cannot_be_compared_is_refused_in_a_line():
    assert refusal(TWO_TASKS, "glm") == (
        "reference 'glm' is none of the systems; there are: glmd; kd; hard labels; broken; teacher"
    )
    assert refusal([], "glmd") == "reference 'glmd' is none of the systems; there are: none"
    assert "two systems are called 'kd'" in refusal([*TWO_TASKS, TWO_TASKS[1]], "glmd")
    assert "kd has two scores of RTE accuracy with seed 0" in refusal(
        [system("kd", scored("RTE", 0.1), scored("RTE", 0.2))], "kd"
    )
    for confidence in (0, 1, 95):
        assert f"confidence must be between 0 and 1, got {confidence}" in refusal(
            TWO_TASKS, "kd", confidence=confidence
        )


# --- Renderings --------------------------------------------------------------------------------------------------

RENDERINGS = [markdown, latex, csv_text, as_json]


@pytest.mark.parametrize("render", RENDERINGS)
def test_equal_input_gives_equal_text_and_times_do_not_enter(render):
    slower = [dataclasses.replace(each, seconds=7.0, latency={"4": 1.0}) for each in TWO_TASKS]
    assert (
        render(compared(TWO_TASKS, "glmd"))
        == render(compared([*TWO_TASKS], "glmd"))
        == render(compared(slower, "glmd"))
    )


def test_times_are_a_table_of_their_own():
    text = costs_markdown(compared(TWO_TASKS, "glmd"))
    assert cells(text, "glmd") == ["1,234", "3.25", "20.00"] and len(text.splitlines()) == 3
    assert "ms, batch of 1 | ms, batch of 32" in text
    assert costs_markdown(compared(TWO_TASKS[1:], "kd")) == ""


def test_the_table_shows_means_deviations_differences_and_ranks():
    c = compared(TWO_TASKS, "glmd")
    text = markdown(c)
    lines = text.splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "system", "RTE accuracy", "CB accuracy", "CB macro_f1", "average", "difference to glmd", "[over seeds]", "rank"
    ]  # fmt: skip
    assert len({len(line) for line in lines[:7]}) == 1  # they line up
    assert cells(text, "glmd")[0] == "0.720 ± 0.020" and cells(text, "glmd")[4:] == ["reference", NONE, "1.5"]
    found = row(c, "kd").difference
    low, high = found.over_examples
    assert cells(text, "kd")[4:] == [
        f"{found.mean:+.3f} [{low:+.3f}, {high:+.3f}]", "[{:+.3f}, {:+.3f}]".format(*found.over_seeds), "2.5"
    ]  # fmt: skip
    assert cells(text, "broken") == ["0.900", *[NONE] * 6]
    assert cells(text, "teacher")[5:] == [NONE, NONE]
    assert "No score of broken on CB: its loss was not finite" in text
    assert "Examples of val: RTE 277, CB 56." in text
    assert "Seeds (mean ± standard deviation): 0; but glmd, kd: 0, 1, 2." in text
    assert "Beside each: the 95% bootstrap interval over the examples" in text and "same 400 resamples" in text
    assert "[over seeds]: the 95% t interval over the seeds that both have" in text
    assert "an interval holds 0 shows nothing" in text
    assert cells(text.split("| system ")[2], "glmd") == ["66.00 M", "23.44 M", "12,000", "9,500,000"]
    assert "| kd " not in text.split("| system ")[2]  # of which nothing is known


def test_where_nothing_was_resampled_the_interval_beside_the_difference_is_that_over_seeds():
    bare = [
        dataclasses.replace(each, scores=[dataclasses.replace(s, resamples=[]) for s in each.scores])
        for each in TWO_TASKS[:2]
    ]
    c = compared(bare, "glmd")
    low, high = row(c, "kd").difference.over_seeds
    text = markdown(c)
    assert f"[{low:+.3f}, {high:+.3f}]" in cells(text, "kd")[4]
    assert "Beside each: the 95% t interval over the seeds that both have" in text
    assert "bootstrap" not in text and "[over seeds]" not in text


def test_names_break_no_table():
    name = "a|b\n\\c_d & 50% $x$ #1 {e} ~^"
    c = compared([system(name, scored("RTE", 0.7)), system("[odd]", scored("RTE", 0.6))], name)
    text = markdown(c)
    assert "a\\|b \\\\c_d & 50% $x$ #1 {e} ~^" in text
    table = text.split("\n\n")[0].splitlines()
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1 and len(table) == 4
    tex = latex(c)
    assert (
        "a\\textbar{}b \\textbackslash{}c\\_d \\& 50\\% \\$x\\$ \\#1 \\{e\\} \\textasciitilde{}\\textasciicircum{}"
        in tex
    )
    assert "\n{}[odd] & " in tex
    body = [line for line in tex.splitlines() if line.endswith("\\\\")]
    assert {line.replace("\\&", "").count("&") for line in body} == {4}


def test_in_latex_the_best_methods_are_bold_and_nothing_else():
    systems = [
        system("first", scored("RTE", 0.7001), scored("CB", 0.5)),
        system("second", scored("RTE", 0.6999), scored("CB", 0.6)),
        system("control", scored("RTE", 0.7), scored("CB", 0.9), kind="control"),
        system("teacher", scored("RTE", 0.9), scored("CB", 0.6), kind="teacher"),
    ]
    text = latex(compared(systems, "second"))
    found = {line.split(" & ")[0]: line.split(" & ")[1:4] for line in text.splitlines() if " & " in line}
    assert found["first"] == ["\\textbf{0.700}", "0.500", "0.600"]  # what looks equal is as good
    assert found["second"] == ["\\textbf{0.700}", "\\textbf{0.600}", "\\textbf{0.650}"]
    assert text.count("textbf") == 4
    assert text.splitlines()[1:3] == ["\\begin{tabular}{lrrrrr}", "\\toprule"] and "$-$0.050 [$-$0.0" in text
    assert text.endswith("\\bottomrule\n\\end{tabular}\n")


def test_csv_has_a_line_for_each_score_and_each_problem():
    c = compared(TWO_TASKS, "glmd")
    lines = list(csv.DictReader(io.StringIO(csv_text(c))))
    scores = [(each.system.name, score) for each in c.rows for score in each.system.scores]
    assert len(lines) == len(scores) + 1
    found = [line for line in lines if line["value"]]
    for line, (name, score) in zip(found, scores, strict=True):
        assert (line["system"], line["task"], line["metric"], line["seed"]) == (
            name,
            score.task,
            score.metric,
            str(score.seed),
        )
        assert float(line["value"]) == score.value and line["problem"] == ""
    assert found[0] == {
        "method": "glmd", "system": "glmd", "kind": "method", "task": "RTE", "metric": "accuracy", "seed": "0",
        "stage": "task_soft_labels", "value": "0.7", "examples": "277", "glmd": "0.3.0", "commit": "abc", "problem": "",
    }  # fmt: skip
    problem = next(line for line in lines if not line["value"])
    assert (problem["system"], problem["task"], problem["metric"]) == ("broken", "CB", "")
    assert problem["problem"] == "its loss was\nnot finite"
    assert "\r" not in csv_text(c)


def test_json_holds_what_was_compared():
    c = compared(TWO_TASKS, "glmd")
    content = json.loads(as_json(c))
    assert content["schema"] == 1 and content["reference"] == "glmd" and content["resamples"] == B
    assert len(content["rows"]) == sum(len(each.scores) for each in TWO_TASKS)
    assert content["rows"][0] == {
        "method": "glmd", "system": "glmd", "kind": "method", "task": "RTE", "metric": "accuracy", "seed": 0,
        "stage": "task_soft_labels", "value": 0.7, "examples": 277, "glmd": "0.3.0", "commit": "abc",
    }  # fmt: skip
    for each, of in zip(content["systems"], c.rows, strict=True):
        assert each["system"] == of.system.name and each["problems"] == of.system.problems
        assert each["parameters"] == of.system.parameters and each["rank"] == of.rank
        for task, mean in of.tasks.items():
            found = each["tasks"][task]
            assert (found["mean"], found["seeds"], found["rank"]) == (mean.mean, [*mean.seeds], of.ranks.get(task))
            assert found["difference"]["interval_over_examples"] == list(of.differences[task].over_examples)
    kd = content["systems"][1]
    assert kd["difference"]["interval_over_seeds"] == list(row(c, "kd").difference.over_seeds)
    assert kd["average"]["mean"] == row(c, "kd").average.mean
    assert {(m["task"], m["metric"]): m["mean"] for m in kd["metrics"]} == {
        column: mean.mean for column, mean in row(c, "kd").metrics.items()
    }


# --- The picture -------------------------------------------------------------------------------------------------


def drawn(c: Comparison, path, monkeypatch):
    """The figure that is saved."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    kept, save = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *args, **more: (kept.append(self), save(self, *args, **more)))
    draw(c, path)
    assert path.stat().st_size > 5000
    return kept[0]


def test_a_picture_has_the_best_system_on_top_and_bars_that_hold_the_reference_as_their_intervals_hold_0(
    tmp_path, monkeypatch
):
    c = compared(TWO_TASKS, "glmd")
    axes = drawn(c, tmp_path / "picture.png", monkeypatch).axes
    names = [label.get_text() for label in axes[0].get_yticklabels()]
    assert names == ["hard labels", "kd", "glmd", "teacher"]  # from below; what has no average is not there
    assert [axis.get_title() for axis in axes] == ["average", "RTE", "CB"]
    dots = {
        line.get_ydata()[0]: line
        for line in axes[0].lines
        if line.get_linestyle() == "None" or len(line.get_xdata()) == 1
    }
    assert [dots[i].get_xdata()[0] for i in range(4)] == [row(c, name).average.mean for name in names]
    assert dots[0].get_color() == COLORS["control"] != COLORS["method"] == dots[1].get_color()
    bars = {line.get_ydata()[0]: list(line.get_xdata()) for line in axes[0].lines[1:] if len(line.get_xdata()) == 2}
    assert sorted(bars) == [0, 1, 3]
    base, (low, high) = row(c, "glmd").average.mean, row(c, "kd").difference.over_examples
    assert bars[1] == pytest.approx([base + low, base + high])
    assert list(axes[0].lines[0].get_xdata()) == [base, base]


def test_without_intervals_bars_are_deviations(tmp_path, monkeypatch):
    only = system("a", *(Scored("RTE", "accuracy", seed, 0.7 + seed / 10) for seed in range(2)))
    axis = drawn(compared([only], "a"), tmp_path / "picture.svg", monkeypatch).axes[0]
    bars = [list(line.get_xdata()) for line in axis.lines[1:] if len(line.get_xdata()) == 2]
    assert bars == [pytest.approx([0.75 - 0.1 / 2**0.5, 0.75 + 0.1 / 2**0.5])]


def test_thirty_five_systems_have_room_and_many_tasks_no_panels(tmp_path, monkeypatch):
    tasks = ("RTE", "CB", "WiC", "COPA", "WSC")
    systems = [system(f"method $_{i}$", *(scored(task, 0.5 + i / 100) for task in tasks)) for i in range(35)]
    figure = drawn(compared(systems, systems[3].name), tmp_path / "picture.png", monkeypatch)
    assert len(figure.axes) == 1
    assert figure.axes[0].get_yticklabels()[0].get_text() == "method \\$_0\\$"  # no formula
    assert figure.get_figheight() * 72 / 35 > 1.5 * figure.axes[0].get_yticklabels()[0].get_fontsize()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))


def test_a_picture_that_cannot_be_made_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match=r"picture .*odd"):
        draw(compared(TWO_TASKS, "glmd"), tmp_path / "picture.odd")
    with pytest.raises(ConfigError, match="there is none"):
        draw(compared([system("a", problems={"": "failed"})], "a"), tmp_path / "picture.png")
