"""Signals as `timeout`, Slurm and a terminal send them: to every process of the group."""

import contextlib
import logging
import os
import pty
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

import glmd.cli
import glmd.data.token_store
import glmd.distillation.teacher_cache
import glmd.pipeline.exports
import glmd.pipeline.run
import glmd.reporting.report
import glmd.runtime.interrupts
import glmd.training.trainer
from glmd.runtime.interrupts import begin_worker, held_back

SECONDS = 60  # within which a process must have ended, on a busy machine


class Session:
    """`glmd` with these words in a session of its own, forked from this process; what it says goes to a file."""

    def __init__(self, words: list[str], said: Path, prepare: Callable[[], Any] = lambda: None) -> None:
        self.said = said
        self.process, self.terminal = pty.fork()  # whose Ctrl-C the whole session hears
        if self.process == 0:
            code = 1
            with said.open("w", buffering=1) as file:
                try:
                    os.dup2(file.fileno(), 2)
                    sys.stdout = sys.stderr = file
                    logging.getLogger().handlers.clear()  # those of pytest
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    prepare()
                    code = glmd.cli.main(words)
                except SystemExit as ended:
                    code = int(ended.code or 0)
                except BaseException:
                    traceback.print_exc()
            os._exit(code)

    def wait_for(self, happened: Callable[[], bool]) -> None:
        until = time.monotonic() + SECONDS
        while not happened():
            assert time.monotonic() < until, self.said.read_text()
            time.sleep(0.02)

    def end(self, how: str) -> int:
        """Tell the whole group; the exit code, once nothing of it is left."""
        if how == "Ctrl-C":
            os.write(self.terminal, b"\x03")
        else:
            os.killpg(self.process, signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        until = time.monotonic() + SECONDS
        done = status = 0
        while not done:
            assert time.monotonic() < until, f"it did not end: {self.said.read_text()}"
            done, status = os.waitpid(self.process, os.WNOHANG)
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            for _ in range(500):  # workers may outlive their parent by a moment
                os.killpg(self.process, 0)
                time.sleep(0.02)
            raise AssertionError("a process of the group is left")
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(status)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "pretraining" / "checkpoints").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("SIGTERM", 143), ("Ctrl-C", 130)])
def test_a_signal_to_the_group_saves_the_step_with_loader_workers(
    tiny: Any, tmp_path: Path, how: str, code: int
) -> None:
    run, log = tmp_path / "run", tmp_path / "run/log.jsonl"
    words = ["run", str(tiny.root / "run.yaml"), f"output_dir={run}", "dataloader_num_workers=2"]
    words += ["pretraining.max_steps=100000", "pretraining.save_steps=50000", "pretraining.logging_steps=1"]
    session = Session(words, tmp_path / "said")
    session.wait_for(lambda: log.exists() and '"stage": "pretraining"' in log.read_text())
    assert session.end(how) == code
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said and said.count("the step is being finished and saved") == 1
    assert len(checkpoints(run)) == 1 and not list(run.rglob("*.tmp"))


PLACES: dict[str, tuple[Any, str]] = {
    "tokenizing": (glmd.data.token_store, "encode_texts"),
    "vocabulary": (glmd.pipeline.run_stage, "build_vocabulary"),
    "caching": (glmd.distillation.teacher_cache, "save_file"),
    "scoring": (glmd.pipeline.scores, "score_lm"),
    "exporting": (glmd.pipeline.exports, "export_model"),
    "proving": (glmd.pipeline.exports, "check_exports"),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_where_no_step_is_made_is_one_line_and_the_run_goes_on(
    tiny: Any, tmp_path: Path, trusting: None, place: str
) -> None:
    marker, run = tmp_path / "here", tmp_path / "run"
    how, code = ("Ctrl-C", 130) if place in ("caching", "proving") else ("SIGTERM", 143)

    def stand_still() -> None:
        module, name = PLACES[place]

        def stand(*_: Any, **__: Any) -> None:
            marker.touch()
            time.sleep(2 * SECONDS)

        setattr(module, name, stand)

    words = ["run", str(tiny.root / "run.yaml"), f"output_dir={run}", f"teacher.cache={tmp_path / 'cache'}"]
    words += ["pretraining.num_maskings=1", "tasks={}", "pretraining.max_steps=2"]
    session = Session(words, tmp_path / "said", stand_still)
    session.wait_for(marker.exists)
    assert session.end(how) == code
    lines = [line for line in (tmp_path / "said").read_text().splitlines() if line.startswith("glmd: ")]
    said = (tmp_path / "said").read_text()
    assert lines == [f"glmd: {'interrupted' if code == 130 else 'terminated'}"] and "Traceback" not in said, said
    assert Session(words, tmp_path / "again").wait() == 0, (tmp_path / "again").read_text()
    assert (run / "results.json").exists() and not list(run.rglob("*.tmp"))


def test_an_end_that_a_library_swallows_is_an_end_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def swallow(_: Path) -> Any:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return {"rows": [], "parameters": {}}

    monkeypatch.setattr("glmd.reporting.report.load_results", swallow)
    monkeypatch.setattr("glmd.reporting.report.results_table", lambda _: "")
    assert glmd.cli.main(["report", str(tmp_path)]) == 143
    timers = [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
    assert all(each.finished.is_set() for each in timers), "what has ended need not be ended"


def test_what_neither_ends_nor_hears_is_ended(tmp_path: Path) -> None:
    """A library that swallows the end and goes on; the others of the group would wait for it."""

    def deaf() -> None:
        def swallow(_: Path) -> None:
            while True:
                with contextlib.suppress(BaseException):
                    (tmp_path / "here").touch()
                    time.sleep(2 * SECONDS)

        glmd.runtime.interrupts.GRACE = 0.5
        glmd.reporting.report.load_results = swallow  # type: ignore[assignment]

    session = Session(["report", str(tmp_path)], tmp_path / "said", deaf)
    session.wait_for((tmp_path / "here").exists)
    assert session.end("SIGTERM") == 143


def test_what_a_signal_broke_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank has gone, and what this one waits for fails."""

    def fail(_: Path) -> None:
        with contextlib.suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("glmd.reporting.report.load_results", fail)
    assert glmd.cli.main(["report", str(tmp_path)]) == 143


class Rows:
    """Where a loader's worker tells what it hears."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[int, bool]:
        deaf = all(signal.getsignal(number) is signal.SIG_IGN for number in (signal.SIGTERM, signal.SIGINT))
        return os.getpid(), deaf


def test_workers_are_deaf_and_die_with_their_parent(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with held_back():
            loader = iter(DataLoader(Rows(), num_workers=1, batch_size=None, worker_init_fn=begin_worker))
        process, deaf = next(loader)
        (tmp_path / "worker").write_text(f"{process} {int(deaf)}")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    process, deaf = map(int, (tmp_path / "worker").read_text().split())
    assert deaf
    for _ in range(500 if sys.platform != "linux" else 150):  # torch's own watch looks every five seconds
        state = Path(f"/proc/{process}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("the worker outlived its parent")
