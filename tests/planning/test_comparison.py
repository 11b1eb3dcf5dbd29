"""Comparisons as runs: which arms there are, what they share, how updates are matched, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmd.config import RunConfig
from glmd.errors import ConfigError, RunError
from glmd.pipeline.compare import require_alike
from glmd.planning.comparison import load_comparison
from glmd.planning.plan import make_plan
from glmd.planning.stages import _shared_out, stages
from glmd.reporting.conditions import differing
from glmd.stage_config import StageConfig


def compared(tiny, *overrides: str, methods: str = "[glmd, kd]"):
    return load_comparison(tiny.root / "run.yaml", ["output_dir=out", f"compare.methods={methods}", *overrides])


def task_updates(config: RunConfig) -> int:
    return sum(
        stage.training.steps(len(stage.examples), 1)
        for stage in stages(make_plan(config, try_out=False), processes=1)
        if stage.task is not None and stage.variant == "student" and not stage.is_control
    )


def test_every_arm_is_a_run_of_its_own_folder_and_the_reference_has_the_controls(tiny):
    comparison = compared(tiny)
    assert [(arm.name, arm.kind) for arm in comparison.arms] == [
        ("glmd", "method"),
        ("kd", "method"),
        ("hard labels, pretrained without distillation", "control"),
        ("hard labels, not pretrained", "control"),
    ]
    assert [arm.config.output_dir for arm in comparison.arms] == [
        f"out/runs/{name}" for name in ("glmd", "kd", "hard", "hard-no-pretraining")
    ]
    first, *others = comparison.arms
    assert all(vars(first.config.controls).values()) and first.config.updates_of is None
    assert not any(on for arm in others for on in vars(arm.config.controls).values())
    assert {arm.config.updates_of for arm in others} == {"glmd"}


def test_controls_that_are_turned_off_stay_off_and_methods_of_labels_too(tiny):
    comparison = compared(tiny, "controls.full_vocabulary=false", "compare.control_methods=[]")
    assert [arm.name for arm in comparison.arms] == ["glmd", "kd"]
    assert vars(comparison.arms[0].config.controls) == {
        "hard_labels": True,
        "full_vocabulary": False,
        "trim_only": True,
        "trim_after": False,
    }


def test_a_grid_repeats_all_at_every_point_and_names_its_values(tiny):
    overrides = ("vocabulary.keep_ratio=null", "compare.grid={vocabulary.keep_ratio: [1, 0.5], seed_of: [1]}")
    with pytest.raises(ConfigError, match=r"compare.grid.seed_of must list two or more values, got \[1\]"):
        compared(tiny, *overrides)
    comparison = compared(tiny, "compare.grid.vocabulary.keep_ratio=[1, 0.5]", "compare.control_methods=[]")
    assert [arm.name for arm in comparison.arms] == [
        "glmd, keep_ratio 1",
        "kd, keep_ratio 1",
        "glmd, keep_ratio 0.5",
        "kd, keep_ratio 0.5",
    ]
    assert comparison.reference == "glmd, keep_ratio 1"
    assert [arm.config.vocabulary.keep_ratio for arm in comparison.arms] == [1, 1, 0.5, 0.5]
    assert [arm.config.controls.trim_only for arm in comparison.arms] == [False, False, True, False]


def test_two_teachers_of_one_name_have_folders_of_their_own(tiny):
    grid = "compare.grid={teacher: [a/model, b/model]}"
    arms = compared(tiny, grid).arms
    assert len({arm.folder for arm in arms}) == len({arm.name for arm in arms}) == 8
    assert arms[0].name == "glmd, teacher a/model"


def test_settings_of_a_stage_in_a_grid_reach_the_methods_that_have_it(tiny):
    grid = "compare.grid={stages.task_hard_labels.learning_rate: [0.001, 0.05]}"
    arms = compared(tiny, grid, "compare.control_methods=[]", methods="[theseus]").arms
    assert [arm.config.stage("task_hard_labels").learning_rate for arm in arms] == [0.001, 0.05]


@pytest.mark.parametrize("method", ["kd", "tinybert", "universal-kd", "hard", "glmd-no-task-lm"])
def test_over_a_task_all_have_the_updates_of_the_reference(tiny, method):
    arms = compared(tiny, "compare.control_methods=[]", "task_lm.num_train_epochs=3", methods=f"[glmd, {method}]").arms
    ours, theirs = (task_updates(arm.config) for arm in arms)
    assert ours == theirs == 12
    own = compared(tiny, "compare.budget=own", "compare.control_methods=[]", methods=f"[glmd, {method}]").arms
    assert task_updates(own[1].config) == 3 * len([name for name in load(method) if name != "pretraining"])


def load(method: str):
    from glmd.distillation.methods import load_method

    return load_method(method)


def test_at_each_point_of_swept_lengths_all_passes_have_the_updates_of_the_reference(tiny):
    swept = "compare.sweep={num_train_epochs: [1, 9]}"
    arms = compared(tiny, swept, "compare.control_methods=[]", methods="[kd, tinybert]").arms
    by_path = {stage.path: stage for stage in stages(make_plan(arms[1].config, try_out=False), processes=1)}
    updates = {}
    for stage in by_path.values():
        if stage.kind == "task_soft_labels":
            steps = [each.training.steps(len(each.examples), 1) for each in (by_path[stage.start], stage)]
            updates[stage.grid_point["task_soft_labels.num_train_epochs"]] = steps
    assert updates == {1: [2, 1], 9: [3, 24]}  # kd alone has 3, and 27


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(1, 500))
def test_updates_are_shared_out_whole_and_every_stage_has_one(own, total):
    settings = {f"task_{i}": StageConfig(max_steps=steps) for i, steps in enumerate(own)}
    shared = [each.max_steps for each in _shared_out(total, settings, 10, 1).values()]
    assert all(steps >= 1 for steps in shared)
    assert sum(shared) == max(total, len(own))
    if total == sum(own):
        assert shared == own


def test_what_is_swept_of_one_last_stage_is_swept_of_each_ones(tiny):
    swept = "compare.sweep={learning_rate: [1e-3, 1e-4]}"
    for given_as in (swept, "sweep={task_soft_labels: {learning_rate: [1e-3, 1e-4]}}"):
        arms = compared(tiny, given_as, methods="[glmd, theseus]").arms
        assert [list(arm.config.sweep) for arm in arms[:2]] == [["task_soft_labels"], ["task_hard_labels"]]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["compare.methods=[]"], "compare.methods is missing; name them"),
        (["compare.methods=[glmd, kd, KD]"], "compare.methods has two of the name kd"),
        (["compare.methods=[glmd, hard]"], "methods and control_methods name hard twice"),
        (["compare.methods=[glmd, glmdd]"], "method 'glmdd' is unknown; did you mean glmd"),
        (["compare.reference=pkd"], "reference pkd is none of methods; did you mean kd"),
        (["compare.grid={seeds: [0, 1]}"], "grid.seeds cannot vary; give seeds"),
        (["compare.grid={vocabulary.keep_ratio: [0.5, 0.5]}"], "grid.vocabulary.keep_ratio has a value twice"),
        (["compare.budgt=own"], "compare.budgt is unknown; did you mean budget"),
        (["compare.budget=equal"], "budget"),
        (["compare.grid={data.superglue: [a, b]}"], "grid.data.superglue cannot vary"),
        (["compare.grid={stages: [{}, {task_lyers: {}}]}"], "stages.task_lyers is a stage of none of the methods"),
        (["compare.grid={vocabulary: [1, 2]}"], "compare.grid at vocabulary=1"),
        (
            ["compare.grid={stages.task_hard_labels.learning_rate: [1, 2]}", "compare.methods=[glmd, theseus]"],
            "stages.task_hard_labels.learning_rate=2 changes nothing for glmd",
        ),
        (["tasks={}"], "tasks is empty"),
        (["tasks={RTE: 3}"], "tasks"),
        (["vocabulary=3"], "vocabulary"),
        (["stages=3"], "stages must be a mapping"),
        (["controls=false"], "controls must be a mapping"),
        (["sweep={task_soft_labels: 3}"], "sweep"),
        (["compare.methods=[glmd, '']"], "methods names ''"),
        (["method=kd"], "method has no effect in a comparison; give compare.methods"),
        (["updates_of=kd"], "updates_of has no effect in a comparison; give compare.budget"),
        (["sweep={task_lm: {learning_rate: [1, 2]}}"], "sweep is of stages that not all methods have"),
        (["stages={task_layres: {max_steps: 3}}"], "stages.task_layres is a stage of none of the methods"),
        (["seeds=[1, 1]"], "seeds has a value twice"),
        (["compare=ablation"], "did you mean ablations"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tiny, words, found):
    given_words = ["output_dir=out", "compare.methods=[glmd, kd]", *words]
    with pytest.raises(ConfigError) as refusal:
        load_comparison(
            tiny.root / "run.yaml", given_words if words != ["compare=ablation"] else ["output_dir=out", *words]
        )
    assert found in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["updates_of=glmd"], "updates_of glmd has no effect: it is the method itself"),
        (["updates_of=kd", "tasks={}"], "updates_of kd has no effect: there are no tasks"),
        (["controls.trim_after=true"], "controls.trim_after trims the student of controls.full_vocabulary"),
        (["controls.trim_only=true", "vocabulary.keep_ratio=1"], "controls.trim_only has no effect"),
        (["controls.trim_only=true", "tasks={}"], "controls.trim_only has no effect without tasks"),
        (["untrained_tasks=[RTE]"], "untrained_tasks names all tasks"),
        (["untrained_tasks=[RTEE]"], "untrained_tasks: RTEE is not among tasks; did you mean RTE"),
    ],
)
def test_keys_of_a_run_that_have_no_effect_are_refused(tiny, tmp_path, words, found):
    with pytest.raises(ConfigError) as refusal:
        make_plan(tiny.config(tmp_path, *words), try_out=False)
    assert found in str(refusal.value)


def test_runs_under_other_conditions_are_refused_but_for_what_may_differ(tiny):
    matched = compared(tiny)
    alike = {"teacher": "a" * 64, "RTE: updates": [6], "updates on the corpus": 6}
    require_alike(matched, {"glmd": alike, "kd": alike | {"updates on the corpus": 0}})
    for name, value, shown in (("teacher", "b" * 64, "bbbbbbbb"), ("RTE: updates", [7], "7")):
        with pytest.raises(RunError, match=f"kd had another {name} than glmd \\({shown}"):
            require_alike(matched, {"glmd": alike, "hard": alike, "kd": alike | {name: value}})
    require_alike(compared(tiny, "compare.budget=own"), {"glmd": alike, "kd": alike | {"RTE: updates": [7]}})
    assert differing({"a": alike, "b": {"teacher": "a" * 64}}) == {}
