"""The folder of a run, in process: what a kill leaves behind is cleared, and a full disk is one line."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glmd.errors import DiskError, RunError
from glmd.pipeline.run_folder import RunFolder
from glmd.storage import full_disk_refused


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


class Killed(BaseException):
    """Nothing may catch it, as nothing catches SIGKILL."""


def test_a_kill_between_a_stages_end_and_the_removal_of_its_checkpoints_leaves_none_for_ever(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder.path / "pretraining"

    def work() -> dict[str, Any]:
        (place / "checkpoints" / "step-000002").mkdir(parents=True)
        return {}

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", die)
        with pytest.raises(Killed):
            folder.complete(place, {"seed": 0}, work)
    assert (place / "checkpoints").exists()
    folder.complete(place, {"seed": 0}, lambda: pytest.fail("the stage is complete"))
    assert not (place / "checkpoints").exists()


@pytest.mark.parametrize(
    "text",
    ["{", "", "{}", "[]", "7", "\xff", '{"complete": true, "inputs": {}}', '{"complete": false, "inputs": 3}',
     '{"complete": true, "inputs": {}, "result": {}, "files": {"student/config.json": 1}}'],
)  # fmt: skip
def test_an_unreadable_record_of_a_stage_is_refused_with_the_folder_to_delete(folder: RunFolder, text: str) -> None:
    path = folder.path / "vocabulary/stage.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError) as refused:
        folder.complete(path.parent, {}, lambda: pytest.fail("its record is unknown"))
    message = str(refused.value)
    assert message.startswith(f"{path} cannot be read (") and "\n" not in message
    assert message.endswith(f"; delete {path.parent} to make the stage again")


STEADY = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("stage", "weight", "steps", "is_allowed"),
    [
        (STEADY, 1.0, (5, 7), True),
        (STEADY, 1.0, (5, 4), False),  # a checkpoint may lie beyond
        (STEADY, {"from": 1.0, "to": 0.5}, (5, 7), False),
        (STEADY | {"lr_scheduler_type": "linear"}, 1.0, (5, 7), False),
        (STEADY | {"warmup_ratio": 0.1}, 1.0, (5, 7), False),
    ],
)
def test_an_interrupted_stage_may_get_longer_where_no_step_knows_how_many_there_are(
    folder: RunFolder, stage: dict[str, Any], weight: Any, steps: tuple[int, int], is_allowed: bool
) -> None:
    def interrupted() -> dict[str, Any]:
        raise Killed

    def train(max_steps: int, work: Callable[[], dict[str, Any]], **changes: float) -> None:
        settings = stage | {"max_steps": max_steps} | changes
        inputs = {"stage": settings, "terms": [{"weight": weight}], "selection": "last"}
        folder.complete(folder.path / "pretraining", inputs, work)

    folder.path.mkdir()
    (folder.path / "pretraining").mkdir()
    with pytest.raises(Killed):
        train(steps[0], interrupted)
    with pytest.raises(RunError, match=r"learning_rate: 0.1 -> 0.2"):
        train(steps[1], dict, learning_rate=0.2)
    if not is_allowed:
        with pytest.raises(RunError, match=f"stage.max_steps: {steps[0]} -> {steps[1]}"):
            train(steps[1], dict)
        return
    train(steps[1], dict)
    with pytest.raises(RunError, match=r"stage.max_steps: 7 -> 9"):  # what is complete stays
        train(9, dict)


def test_a_kill_while_the_world_is_made_leaves_no_part_of_it_for_ever(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmd.data import synthetic as world
    from glmd.pipeline.run import _build_synthetic

    (folder.path / ".synthetic-x1y2z3" / "superglue").mkdir(parents=True)  # what a kill -9 leaves
    monkeypatch.setattr(world, "build_synthetic", Path.mkdir)
    assert _build_synthetic(folder.path) == folder.path / "synthetic"
    assert [path.name for path in folder.path.iterdir()] == ["synthetic"]


def test_the_lock_names_process_and_host(folder: RunFolder) -> None:
    with folder.lock(), pytest.raises(RunError) as refused, folder.lock():
        pass
    assert str(refused.value).endswith(f"is in use by process {os.getpid()} on {socket.gethostname()}")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(27, "File too large"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line_with_code_4_whoever_met_it(error: Exception) -> None:
    with (
        pytest.raises(DiskError, match=r"^runs/a: the disk takes no more .*make room, and the same") as refused,
        full_disk_refused(Path("runs/a")),
    ):
        raise error
    assert refused.value.exit_code == 4 and "\n" not in str(refused.value)


@pytest.mark.parametrize("error", [OSError(2, "No such file"), RuntimeError("os error of mine"), RunError("full")])
def test_another_error_is_not_taken_for_a_full_disk(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, full_disk_refused(Path("runs/a")):
        raise error
    assert raised.value is error


def make_stage(run: Path, inputs: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """The work of a stage that leaves two files."""

    def work() -> dict[str, Any]:
        place = run / "tasks/RTE/task_teacher"
        (place / "model").mkdir(parents=True, exist_ok=True)
        (place / "model/weights").write_bytes(f"made in {run.name}".encode())
        (place / "model/README.md").write_text("A card.")
        return {"loss": 1.0, **inputs}

    return work


@pytest.mark.parametrize("links", [True, False])
def test_a_stage_that_a_sibling_made_from_the_same_is_taken_over_with_a_card_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    name, one, other = Path("tasks/RTE/task_teacher"), tmp_path / "one", tmp_path / "other"
    RunFolder(one).complete(one / name, {"seed": 0}, make_stage(one, {}))
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    folder = RunFolder(other, [one])
    result = folder.complete(other / name, {"seed": 0}, lambda: pytest.fail("it is made already"))
    assert result["loss"] == 1.0
    assert (other / name / "model/weights").read_bytes() == b"made in one"
    assert (other / name / "model/weights").samefile(one / name / "model/weights") == links
    assert not (other / name / "model/README.md").samefile(one / name / "model/README.md")
    alone = RunFolder(other)  # which needs its sibling no more
    shutil.rmtree(one)
    assert alone.complete(other / name, {"seed": 0}, lambda: pytest.fail("it is complete")) == result


@pytest.mark.parametrize("harm", ["other inputs", "changed file", "missing file", "damaged record", "not complete"])
def test_a_siblings_stage_that_is_not_the_same_or_not_whole_is_made_anew(tmp_path: Path, harm: str) -> None:
    name, one, other = Path("tasks/RTE/task_teacher"), tmp_path / "one", tmp_path / "other"
    RunFolder(one).complete(one / name, {"seed": 1 if harm == "other inputs" else 0}, make_stage(one, {}))
    if harm == "changed file":
        (one / name / "model/weights").write_bytes(b"made in oen")
    if harm == "missing file":
        (one / name / "model/weights").unlink()
    if harm == "damaged record":
        (one / name / "stage.json").write_text("{")
    if harm == "not complete":
        (one / name / "stage.json").write_text('{"complete": false, "inputs": {"seed": 0}}')
    RunFolder(other, [one]).complete(other / name, {"seed": 0}, make_stage(other, {}))
    assert (other / name / "model/weights").read_bytes() == b"made in other"
