"""The stages of a plan: each once, after all that it needs, and shared by all seeds and grid points that can."""

import pytest

from glmd.planning.plan import make_plan
from glmd.planning.stages import TEACHER, lines, stages

AXES = "sweep={task_lm: {learning_rate: [1e-3, 1e-2], max_steps: [1, 2]}, task_soft_labels: {num_train_epochs: [1, 2]}}"


@pytest.fixture(scope="module")
def planned(tiny, tmp_path_factory):
    def plan(*overrides):
        return make_plan(tiny.config(tmp_path_factory.mktemp("stages") / "run", *overrides), try_out=False)

    return plan


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("method=kd", "data.corpus=[]"),
        ("tasks={}",),
        (AXES, "seeds=[0,1]", "controls.full_vocabulary=true"),
    ],
)
def test_each_stage_comes_once_and_after_those_that_it_needs(planned, overrides):
    known = {TEACHER}
    for stage in stages(planned(*overrides), 1):
        assert stage.path not in known
        assert {stage.start, stage.teacher} - {None} <= known
        known.add(stage.path)


def test_the_stages_of_a_run_are_the_folders_that_it_leaves(planned, finished):
    found = {path.parent.relative_to(finished.folder).as_posix() for path in finished.folder.rglob("stage.json")}
    assert {stage.path for stage in stages(planned(), 1)} == found


def of_kind(plan, kind):
    return [stage for stage in stages(plan, 1) if stage.kind == kind]


def test_grid_points_share_what_does_not_depend_on_them(planned):
    plan = planned(AXES, "seeds=[0,1]")
    first, second, control = (of_kind(plan, kind) for kind in ("task_lm", "task_soft_labels", "hard_labels"))
    assert (len(first), len(second)) == (4 * 2, 8 * 2)
    for stage in second:
        start = next(each for each in first if each.path == stage.start)
        assert start.seed == stage.seed and start.grid_point.items() <= stage.grid_point.items()
    # Of the first pass the control has but the number of updates, in which it equals both passes.
    assert len(control) == 2 * 2 * 2
    assert {tuple(stage.grid_point) for stage in control} == {
        ("task_lm.max_steps", "task_soft_labels.num_train_epochs")
    }
    assert {stage.training.max_steps for stage in control} == {1 + 3, 1 + 6, 2 + 3, 2 + 6}


def test_a_line_stands_for_the_stages_that_train_alike(planned):
    plan = planned(AXES, "seeds=[0,1]", "controls.full_vocabulary=true")
    found = [(line[0].name, line[0].swept, len(line)) for line in lines(plan, 1)]
    assert found[:2] == [("RTE task_teacher", "", 1), ("pretraining", "", 1)]
    assert found[2:6] == [
        ("RTE task_lm", f"learning_rate={rate},max_steps={steps}", 2) for rate in (0.001, 0.01) for steps in (1, 2)
    ]
    assert found[6:8] == [("RTE task_soft_labels", f"num_train_epochs={n}", 4 * 2) for n in (1.0, 2.0)]
    assert sum(number for name, _, number in found[8:] if name == "RTE hard_labels") == 8


def test_a_named_teacher_is_scored_and_trains_nothing(planned, finished):
    named = finished.folder / "tasks/RTE/task_teacher/model"
    (stage,) = of_kind(planned(f"teacher.tasks.RTE={named}"), "task_teacher")
    assert stage.settings is None
    assert not any(line[0].kind == "task_teacher" for line in lines(planned(f"teacher.tasks.RTE={named}"), 1))


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        ("kd", {"task_soft_labels": {"task_logits.cross_entropy", "task_labels.hard_cross_entropy"}}),
        ("pd", {"pretraining": {"lm_labels.hard_cross_entropy"}, "task_soft_labels": {"task_logits.cross_entropy"}}),
        ("glmd-masked-only", {stage: {"lm_logits.kl_divergence"} for stage in ("pretraining", "task_lm")}),
        ("glmd-mse", {stage: {"lm_logits.mse"} for stage in ("pretraining", "task_lm")}),
    ],
)
def test_every_method_has_its_stages_and_terms(planned, method, terms):
    found = {stage.kind: stage.objective for stage in stages(planned(f"method={method}"), 1)}
    assert ("task_lm" in found) == method.startswith("glmd") and (found["pretraining"] is None) == (method == "kd")
    assert {kind: {term.name for term in found[kind].terms} for kind in terms} == terms
