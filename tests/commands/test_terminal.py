"""Commands end in one line and an exit code, on terminals of any encoding and on full disks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from glmd.cli import main
from glmd.commands.terminal import ended


def glmd(*words: object, stdout: object = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "glmd", *map(str, words)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env={**os.environ, **environment})


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_a_table_is_printed_in_what_the_terminal_can_show(finished, encoding):
    done = glmd("report", finished.folder, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode(encoding)
    assert "before -> after" in text and "?" not in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", [["report"], ["--help"], ["report", "--help"]])
def test_a_full_stdout_is_one_line_and_a_code(finished, words):
    with open("/dev/full", "wb") as full:
        done = glmd(*words, *([finished.folder] if words == ["report"] else []), stdout=full)
    assert done.returncode == 4
    assert done.stderr.decode().splitlines() == [
        "glmd: DiskError: the output cannot be written (No space left on device); what was done before stays so"
    ]


def test_a_closed_pipe_is_no_error(finished):
    read, write = os.pipe()
    os.close(read)
    done = glmd("report", finished.folder, stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_stderr_changes_no_exit_code():
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "glmd", "report", "absent"]
        assert subprocess.run(command, stderr=full, stdout=subprocess.PIPE).returncode == 2


def test_a_fault_of_our_own_is_one_line_with_the_place_of_its_traceback(monkeypatch, capsys, tmp_path):
    def broken(folder):
        raise KeyError("rows")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("glmd.reporting.report.load_results", broken)
    assert main(["report", "x"]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("glmd: KeyError: 'rows'; this was not foreseen, its traceback is in ")
    assert "raise KeyError" in Path(line.rpartition(" in ")[2]).read_text()
    monkeypatch.setenv("GLMD_TRACEBACK", "1")
    main(["report", "x"])
    assert "Traceback" in capsys.readouterr().err


def test_a_library_that_refuses_is_code_2_and_glmd_itself_code_1(capsys, monkeypatch, tmp_path):
    from glmd.reporting.report import results_table

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ended(lambda: int("x")) == ended(lambda: __import__("json").loads("{")) == 2
    assert ended(lambda: results_table({})) == 1


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_memory_that_does_not_suffice_is_one_line_with_a_cure(capsys, error):
    def fails():
        raise error

    assert ended(fails) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the memory does not suffice" in line and "smaller per_device_train_batch_size" in line


def test_a_file_that_cannot_be_read_is_one_line(capsys, tmp_path):
    assert ended(lambda: open(tmp_path / "absent")) == 2  # noqa: SIM115
    assert f"FileNotFoundError: {tmp_path / 'absent'}: No such file" in capsys.readouterr().err
