"""The loops that start a run again: until it is complete, and not where a restart mends nothing."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
RESTART = str(SCRIPTS / "restart.sh")


@pytest.fixture
def command(tmp_path):
    """`command(137, 0)`: the path of one that ends with these codes, one for each start, and notes its starts."""

    def make(*codes: int) -> str:
        path = tmp_path / "command"
        path.write_text(
            f'#!/usr/bin/env bash\necho "$*" >>{tmp_path}/starts\ncodes=({" ".join(map(str, codes))})\n'
            f"exit ${{codes[$(wc -l <{tmp_path}/starts)-1]}}\n"
        )
        path.chmod(0o755)
        return str(path)

    return make


def starts(folder: Path) -> list[str]:
    return (folder / "starts").read_text().splitlines()


def test_a_run_is_started_again_until_it_is_complete(command, tmp_path):
    done = subprocess.run([RESTART, command(137, 143, 1, 0), "run", "a=b c"], env={**os.environ, "PAUSE": "0"})
    assert done.returncode == 0 and starts(tmp_path) == ["run a=b c"] * 4


@pytest.mark.parametrize("code", [2, 3, 4, 130])
def test_what_a_restart_cannot_mend_ends_the_loop_with_its_code(command, tmp_path, code):
    done = subprocess.run([RESTART, command(137, code, 0)], env={**os.environ, "PAUSE": "0"})
    assert done.returncode == code and len(starts(tmp_path)) == 2


def test_the_loop_gives_up_with_the_last_code(command, tmp_path):
    done = subprocess.run([RESTART, command(137, 1, 137)], env={**os.environ, "PAUSE": "0", "ATTEMPTS": "2"})
    assert done.returncode == 1 and len(starts(tmp_path)) == 2


SAVES_ON_TERM = """#!/usr/bin/env bash
trap 'sleep 0.3; echo saved >>{0}/starts; exit 143' TERM
echo started >>{0}/starts
while :; do sleep 0.05; done
"""


def stop(process: subprocess.Popen[bytes], folder: Path) -> int:
    """Send SIGTERM once the command has started. Returns the exit code of the script."""
    until = time.monotonic() + 20
    while not (folder / "starts").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=20)


def test_a_sigterm_to_the_loop_lets_the_run_save_and_ends_both(tmp_path):
    path = tmp_path / "command"
    path.write_text(SAVES_ON_TERM.format(tmp_path))
    path.chmod(0o755)
    process = subprocess.Popen([RESTART, str(path)], env={**os.environ, "PAUSE": "0"})
    assert stop(process, tmp_path) == 143
    assert starts(tmp_path) == ["started", "saved"]


def slurm(folder: Path, launch: str) -> subprocess.Popen[bytes]:
    """The Slurm script where `launch` stands for the launcher and requeueing writes a file."""
    (folder / "scripts").mkdir()
    for path, text in (
        (folder / "scripts" / "launch.sh", launch),
        (folder / "scontrol", f'#!/usr/bin/env bash\necho "$*" >{folder}/requeued\n'),
    ):
        path.write_text(text)
        path.chmod(0o755)
    environment = {**os.environ, "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7"}
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    return subprocess.Popen([str(SCRIPTS / "slurm_requeue.sh"), "a.yaml"], env=environment)


def test_a_slurm_job_is_requeued_once_the_run_has_saved(tmp_path):
    assert stop(slurm(tmp_path, SAVES_ON_TERM.format(tmp_path)), tmp_path) == 0
    assert starts(tmp_path) == ["started", "saved"] and (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize("code", [0, 1])
def test_a_slurm_job_that_ends_by_itself_is_not_requeued(tmp_path, code):
    assert slurm(tmp_path, f"#!/usr/bin/env bash\nexit {code}\n").wait(timeout=20) == code
    assert not (tmp_path / "requeued").exists()
