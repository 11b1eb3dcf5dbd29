"""The results table: means and deviations over seeds, dashes for what was not measured, nothing else."""

import json
import statistics

import pytest

from glmd.errors import RunError
from glmd.reporting.report import load_results, markdown_table, results_table


def scored(system: str, seed: int, accuracy: float, **more) -> dict:
    stage = {"teacher": "task_teacher", "hard labels": "hard_labels"}.get(system, "task_soft_labels")
    row = {"system": system, "task": "RTE", "stage": stage, "seed": seed, "split": "val", "selection": "last"} | {
        "casting": "head"
    }
    return (
        row | {"constant": {"accuracy": 0.53}, "metrics": {"accuracy": accuracy}, "examples": 12, "seconds": 1.5} | more
    )


PARAMETERS = {
    "teacher": {"total": 110_000_000, "vocabulary": 23_400_000, "body": 86_600_000},
    "student": {"total": 55_000_000, "vocabulary": 12_000_000, "body": 43_000_000},
}


def cells(text: str, first: str) -> list[str]:
    """The cells of the table row that begins with `first`."""
    found = [line for line in text.splitlines() if line.startswith(f"| {first} ")]
    assert len(found) == 1, text
    return [cell.strip() for cell in found[0].strip("|").split("|")][1:]


def test_seeds_become_mean_and_standard_deviation():
    accuracies = [0.61, 0.64, 0.70]
    rows = [scored("teacher", 0, 0.8)]
    rows += [scored("student", seed, value, agreement=value + 0.1) for seed, value in enumerate(accuracies)]
    rows += [scored("hard labels", seed, 0.55) for seed in range(3)]
    text = results_table({"rows": rows, "parameters": PARAMETERS})
    assert cells(text.split("\n\n")[0], "teacher") == ["0.800"]
    assert cells(text, "student (distilled)") == [f"0.650 ± {statistics.stdev(accuracies):.3f}"]
    assert cells(text, "control: same student, hard labels only") == ["0.550 ± 0.000"]
    assert cells(text, "student's agreement with the teacher") == [f"0.750 ± {statistics.stdev(accuracies):.3f}"]
    assert cells(text, "best constant answer") == ["0.530"]
    assert "Scores on val; casting: head; checkpoint: last; seeds: 0, 1, 2 (mean ± standard deviation)" in text


def test_a_stage_before_the_last_that_leaves_a_model_of_the_task_is_no_seed_of_the_student():
    rows = [scored("student", 0, 0.1, agreement=0.1, stage="task_average"), scored("student", 0, 0.7, agreement=0.8)]
    text = results_table({"rows": rows, "parameters": PARAMETERS})
    assert cells(text, "student (distilled)") == ["0.700"]
    assert cells(text, "student's agreement with the teacher") == ["0.800"]


@pytest.mark.parametrize("passes", [1, 2])
def test_the_controls_updates_are_told_by_the_passes_that_there_are(passes):
    rows = [scored("student", 0, 0.6), scored("hard labels", 0, 0.6)]
    words = {"system": "student", "task": "RTE", "stage": "task_lm", "seed": 0, "seconds": 1.0}
    text = results_table({"rows": [*rows, *([words] if passes == 2 else [])], "parameters": PARAMETERS})
    assert ("as many updates as both its passes together" in text) == (passes == 2)
    assert ("as many updates as its pass over the task" in text) == (passes == 1)


def test_a_teacher_no_better_than_a_constant_answer_is_warned_of():
    for accuracy in (0.53, 0.2):
        text = results_table({"rows": [scored("teacher", 0, accuracy)], "parameters": PARAMETERS})
        assert f"Warning: RTE: the teacher's accuracy of {accuracy:.3f} is no better than" in text
        assert "classes in another order" in text and "id2label" in text
    assert "Warning" not in results_table({"rows": [scored("teacher", 0, 0.54)], "parameters": PARAMETERS})


def test_a_student_far_below_its_control_is_warned_of_unless_examples_are_few():
    rows = [scored("teacher", 0, 0.9), *(scored("student", seed, 0.6 + seed / 50) for seed in (0, 1))]
    for control, examples, warned in ((0.75, 1000, True), (0.75, 12, False), (0.65, 1000, False), (0.5, 1000, False)):
        of_control = scored("hard labels", 0, control)
        given = [row | {"examples": examples} for row in [*rows, of_control]]
        text = results_table({"rows": given, "parameters": PARAMETERS})
        assert ("Warning: RTE: the student's accuracy is 0.140 below that of its control" in text) == warned


def test_one_seed_has_no_deviation_and_what_was_not_measured_is_a_dash():
    rows = [
        scored("student", 0, 0.6),
        scored("student", 0, 0.9, task="CB", constant={"accuracy": 0.5, "macro_f1": 0.222}, agreement=0.7)
        | {"metrics": {"accuracy": 0.9, "macro_f1": 0.8}},
    ]
    text = results_table({"rows": rows, "parameters": PARAMETERS})
    assert cells(text, "student (distilled)") == ["0.600", "0.900", "0.800"]
    assert cells(text, "student's agreement with the teacher") == ["–", "0.700", "–"]
    assert cells(text, "best constant answer") == ["0.530", "0.500", "0.222"]
    assert "hard-label control" not in text, "there is none to speak of"
    assert "±" not in text and "hard labels only" not in text and "full vocabulary" not in text


@pytest.mark.parametrize(
    ("labeled", "says"),
    [(0, "16 examples without labels."), (16, "16 examples of its own, all labeled."),
     (3, "16 examples of its own, 3 of them labeled.")],
)  # fmt: skip
def test_inputs_of_the_student_alone_are_told_with_their_labels(labeled, says):
    rows = [scored("student", 0, 0.6, agreement=0.7, inputs={"examples": 16, "labeled": labeled})]
    assert f"RTE: the student learned from {says}" in results_table({"rows": rows, "parameters": PARAMETERS})


def test_the_table_of_a_run_holds_its_results(finished):
    text = results_table(finished.results)
    by_stage = {row["stage"]: row for row in finished.results["rows"]}
    for stage, name in (
        ("task_soft_labels", "student (distilled)"),
        ("hard_labels", "control: same student, hard labels only"),
    ):
        assert cells(text, name) == [f"{by_stage[stage]['metrics']['accuracy']:.3f}"]
    words = by_stage["pretraining"]
    kl = f"{words['lm_scores_before']['kl_divergence']:.3f} → {words['lm_scores']['kl_divergence']:.3f}"
    assert cells(text, "student: pretraining, held-out corpus")[0] == kl
    # Inputs of the task pass are whole: there are no masked tokens to guess.
    assert cells(text, "student: RTE LM pass, val inputs")[2:] == ["–", "–"]
    (sentence,) = [line for line in text.splitlines() if line.startswith("Seconds of the last start: ")]
    assert all(f"{name} {taken:.1f}" in sentence for name, taken in finished.results["seconds"].items())
    assert text.endswith(f"|\n\n{sentence}\n") and "nan" not in text


def test_a_run_without_tasks_has_no_task_table(finished):
    rows = [row for row in finished.results["rows"] if row["stage"] == "pretraining"]
    text = results_table({"rows": rows, "parameters": PARAMETERS})
    assert "constant" not in text and "held-out corpus" in text
    assert "110.00 M" in text


def test_markdown_tables_line_up():
    text = markdown_table(["a", "long header"], [["a long cell", "1"], ["b", "±2"]])
    assert len({len(line) for line in text.splitlines()}) == 1
    assert text.splitlines()[1].count("|") == 3 and text.splitlines()[1].endswith(": |")


def test_results_that_are_not_there_or_broken_are_refused(tmp_path):
    with pytest.raises(RunError, match=r"no results.json; `glmd run` writes it when all stages are complete"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(RunError, match=r"results.json: cannot be read"):
        load_results(tmp_path)
    empty = {"rows": [], "parameters": {}}
    (tmp_path / "results.json").write_text(json.dumps(empty))
    assert load_results(tmp_path) == empty


@pytest.mark.parametrize(
    "text", ["[]", "{}", "3", '{"rows": {}, "parameters": {}}', '{"rows": []}', '{"rows": [{}], "parameters": {}}']
)
def test_a_file_that_holds_no_results_is_refused_by_name(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(RunError) as refused:
        load_results(tmp_path)
    found = f"{tmp_path / 'results.json'}: holds no results of a run; "
    assert str(refused.value) == found + "`glmd run` with the run's config writes them again"


def test_results_of_0_1_are_refused_with_their_version_and_what_would_work(tmp_path):
    """Their rows have the keys of today's, and other names below."""
    row = {"system": "student", "stage": "task_words", "task": "RTE", "seed": 0, "words": {}, "cell": {}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"glmd": "0.1.0", "parameters": {}, "rows": [row]}))
    with pytest.raises(RunError) as refused:
        load_results(tmp_path)
    assert str(refused.value) == (
        f"{path}: was made by glmd 0.1.0, whose results have other names; "
        "read it with glmd 0.1.0, or run again with this one into a new folder"
    )
