"""Locks: one holder at a time, who is named, and none after its process has ended."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import SoftFileLock

from glmd.storage import locked

HOLD = """
import errno, fcntl, sys, time
from pathlib import Path

def flock(file, operation):
    raise OSError(errno.ENOSYS, "Function not implemented")

if "without flock" in sys.argv:
    fcntl.flock = flock
from glmd.storage import locked

with locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


class Taken(Exception):
    """The lock has a holder, whose name this is."""


def refuse(holder: str) -> None:
    raise Taken(holder)


@pytest.fixture(params=[[], ["without flock"]], ids=["flock", "without"])
def holder(request, tmp_path, monkeypatch):
    """A process that holds tmp_path / "lock", on a file system that has locks or none."""
    if request.param:
        monkeypatch.setattr("glmd.storage.FileLock", SoftFileLock)
    command = [sys.executable, "-W", "ignore", "-c", HOLD, str(tmp_path / "lock"), *request.param]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_held_lock_names_its_process_and_host(holder, tmp_path):
    with pytest.raises(Taken) as refused, locked(tmp_path / "lock", refuse):
        pass
    assert str(refused.value) == f"process {holder.pid} on {socket.gethostname()}"


def test_a_killed_process_leaves_no_lock(holder, tmp_path):
    holder.kill()
    holder.wait()
    with locked(tmp_path / "lock", refuse):
        pass


def test_who_is_not_refused_waits_for_the_holder_to_end(holder, tmp_path):
    ended = []

    def end(name: str) -> None:
        holder.kill()
        holder.wait()
        ended.append(name)

    with locked(tmp_path / "lock", end):
        assert ended == [f"process {holder.pid} on {socket.gethostname()}"]


def test_a_child_that_ends_does_not_end_the_lock_of_its_parent(tmp_path):
    """As the processes do that load a run's data."""
    path: Path = tmp_path / "lock"
    with locked(path, refuse):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(Taken), locked(path, refuse):
            pass
    with locked(path, refuse):  # and it ends with the `with`
        pass
