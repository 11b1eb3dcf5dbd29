"""Assistants between teacher and student: each learns from the one before it, with all tokens or the student's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from glmd.cli import main
from glmd.pipeline.run import prepared_run, run
from glmd.pipeline.teachers import live_teacher
from glmd.planning.plan import make_plan
from glmd.planning.stages import stages
from glmd.reporting.report import results_table
from glmd.training.trainer import Trainer

TWO = "assistants=[{num_hidden_layers: 2}, {num_hidden_layers: 1, vocabulary: student}]"
QUICK = ("controls.hard_labels=false", "task_lm.num_train_epochs=1")


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("model.safetensors"))}


@pytest.fixture(scope="module")
def chain(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of two assistants, and its results."""
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("assistants") / "run"
    patch.setattr("glmd.pipeline.exports.check_exports", lambda folders: None)
    config = tiny.config(folder, TWO, *QUICK)
    results = run(config)
    patch.undo()
    return config, folder, results


@pytest.mark.slow
def test_each_learns_from_the_one_before_it_and_the_student_from_the_last(chain) -> None:
    config, folder, results = chain
    with prepared_run(config) as context:
        found = {stage.path: stage for stage in context.stages}
        taught = {path: stage.teachers for path, stage in found.items() if stage.teacher and "task_teacher" not in path}
    task = "tasks/RTE/seed-0"
    assert taught == {
        "vocabulary": ("teacher",),
        "assistants/1/pretraining": ("teacher",),
        f"assistants/1/{task}/task_lm": ("tasks/RTE/task_teacher",),
        f"assistants/1/{task}/task_soft_labels": ("tasks/RTE/task_teacher",),
        "assistants/2/pretraining": ("assistants/1/pretraining",),
        f"assistants/2/{task}/task_lm": (f"assistants/1/{task}/task_soft_labels",),
        f"assistants/2/{task}/task_soft_labels": (f"assistants/1/{task}/task_soft_labels",),
        "pretraining": ("assistants/2/pretraining",),
        f"{task}/task_lm": (f"assistants/2/{task}/task_soft_labels",),
        f"{task}/task_soft_labels": (f"assistants/2/{task}/task_soft_labels",),
    }
    words = [AutoTokenizer.from_pretrained(folder / f"assistants/{i}/pretraining/student").vocab_size for i in (1, 2)]
    kept = AutoTokenizer.from_pretrained(folder / "pretraining/student").vocab_size
    assert words[0] > words[1] == kept
    systems = [row["system"] for row in results["rows"] if row["task"] == "RTE"]
    assert systems == ["teacher", *["assistant 1"] * 2, *["assistant 2"] * 2, *["student"] * 2]
    cells = [line.split("|")[1].strip() for line in results_table(results).splitlines() if line.startswith("| ")]
    assert cells[2:6] == ["teacher", "assistant 1", "assistant 2", "student (distilled)"]


@pytest.mark.slow
def test_an_assistant_of_the_students_tokens_is_given_them_and_answers_as_its_folder_does(chain) -> None:
    config, folder, _ = chain
    with prepared_run(config) as context:
        stage = next(each for each in context.stages if each.path == "tasks/RTE/seed-0/task_soft_labels")
        vocabulary = context.vocabulary(stage)
        teacher = live_teacher(context, stage, vocabulary)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, len(vocabulary.token_map), (3, 9), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "example_id": torch.arange(3)}
        batch["token_type_ids"] = torch.zeros_like(ids)
        batch["predicts"] = batch["attention_mask"].bool()
        from glmd.data.batches import with_positions

        found = teacher(with_positions(batch)).task_logits
    place = folder / "assistants/2/tasks/RTE/seed-0/task_soft_labels/student"
    model = AutoModelForSequenceClassification.from_pretrained(place).eval()
    mapped = torch.from_numpy(vocabulary.token_map)[ids]
    with torch.no_grad():
        expected = model(mapped, attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(found, expected)
    assert mapped.max() < len(vocabulary.kept_ids) < ids.max(), "other ids would have been another text"


@pytest.mark.slow
def test_a_chain_that_is_killed_ends_in_the_same_bits(chain, tiny, trusting, tmp_path, monkeypatch) -> None:
    step, killed = Trainer._step, []

    def dying(self: Any, *arguments: Any) -> Any:
        mine = self.stage.endswith(("2/pretraining", "2/tasks/RTE/seed-0/task_lm"))
        if mine and arguments[4] == 3 and self.stage not in killed:
            killed.append(self.stage)
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", dying)
    config = tiny.config(tmp_path / "run", TWO, *QUICK)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(config)
    run(config)
    assert len(killed) == 2 and weights(tmp_path / "run") == weights(chain[1])


@pytest.mark.slow
def test_dgkd_learns_from_all_above_and_takd_from_the_last(tiny, trusting, tmp_path) -> None:
    given = ("assistants=[{num_hidden_layers: 2}, {}]", *QUICK[:1], "task_soft_labels.logging_steps=1")
    found = {}
    for method in ("dgkd", "takd"):
        plan = make_plan(tiny.config(tmp_path / method, f"method={method}", *given))
        found[method] = {stage.path: stage.teachers for stage in stages(plan, 1) if stage.kind == "task_soft_labels"}
        run(tiny.config(tmp_path / method, f"method={method}", *given))
    last, chain = (
        "tasks/RTE/seed-0/task_soft_labels",
        [f"assistants/{i}/tasks/RTE/seed-0/task_soft_labels" for i in (1, 2)],
    )
    assert found["takd"] == {chain[0]: ("tasks/RTE/task_teacher",), chain[1]: (chain[0],), last: (chain[1],)}
    above = ("tasks/RTE/task_teacher", *chain)
    assert found["dgkd"] == {chain[0]: above[:1], chain[1]: above[:2], last: above}
    record = json.loads((tmp_path / "dgkd" / last / "stage.json").read_text())["inputs"]
    assert len(set(record["ensemble"])) == 2 and record["terms"][0]["teachers"] == "dropout"


def test_check_shows_assistants_and_counts_them(tiny, tmp_path, capsys) -> None:
    words = [str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", TWO]
    assert main(["check", *words]) == 0
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert [line[0] for line in lines if line and line[0] in ("teacher", "assistant", "student")][1:5] == [
        "teacher", "assistant", "assistant", "student"
    ]  # fmt: skip
    assert "assistant 2 RTE task_lm" in said and "assistant 1 pretraining" in said
    assert main(["plan", *words]) == 0
    assert "assistant 2 RTE task_soft_labels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["assistants=[{}]", "teacher.ensemble=[x]"], "assistants and teacher.ensemble are both given; keep one"),
        (["assistants=[{vocabulary: student}]", "vocabulary.keep_ratio=1"], "assistants[0].vocabulary has no effect"),
        (["assistants=[{}, {vocabulary: student}]", "vocabulary={size: 86}"], "assistants[1].vocabulary has no effect"),
        (["assistants=[{vocabulary: student}]", "controls.full_vocabulary=true"], "cannot teach the control"),
        (["assistants=[{vocabulary: student}, {}]"], "assistants[1].vocabulary full: the assistant before it has"),
        (["assistants=[{num_hidden_layers: 9}]"], "assistants[0].initialization and num_hidden_layers: "),
        (["assistants=[{vocabulary: half}]"], "assistants[0].vocabulary must be one of full, student"),
        (["assistants=[{num_layers: 2}]"], "assistants[0].num_layers is unknown"),
        (["method=takd"], "method takd learns from assistants in task_soft_labels, and there are none; give some"),
        (["method=dgkd"], "or give assistants"),
        (["method=hard", "assistants=[{}]"], "assistants have no effect: method hard asks nothing of a teacher"),
        (
            ["method=theseus", "assistants=[{num_hidden_layers: 1}]", "student.num_hidden_layers=2"],
            "it has 2, the teacher 1; give a student of fewer",
        ),
        (
            ["method=minilm", "assistants=[{config: {num_attention_heads: 4}}]"],
            "assistant 1: attentions.kl_divergence: the student's num_attention_heads is 4, the teacher's 2",
        ),
    ],
)
def test_what_assistants_cannot_be_is_refused_by_check(given, message, tiny, tmp_path, capsys) -> None:
    assert main(["check", str(tiny.root / "run.yaml"), f"output_dir={tmp_path / 'run'}", *given]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1, said
