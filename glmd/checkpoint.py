"""Atomic, verified run state: tensors in safetensors, the rest in JSON, no pickle.

    save_checkpoint(folder, step, {"model": tensors, "optimizer": tensors}, {"step": step}, keep=2)
    found = load_checkpoint(folder)       # the newest valid one, or None

A checkpoint is written under a temporary name, every file is flushed to disk and listed in MANIFEST.json with
size and sha256, and the folder is renamed: a kill at any moment leaves the previous checkpoint as it was.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from glmd.errors import DiskError, GlmdError, RunError, disk_error
from glmd.processes import is_main, on_main, together

logger = logging.getLogger(__name__)
MANIFEST = "MANIFEST.json"
MAKE_ROOM = "make room, and the same command continues the run"
VISIBLE = 60.0  # seconds until what one machine wrote must be seen by another


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: named groups of tensors, and plain values."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], *, keep: int
) -> Path:
    """Write `folder/step-NNNNNN` and remove all but the newest `keep` checkpoints."""
    final = folder / f"step-{step:06d}"
    temporary = folder / f"{final.name}.tmp"
    for leftover in (temporary, final):
        # A checkpoint of this very step is only met when a damaged one was skipped on resume.
        _remove(leftover)
    temporary.mkdir(parents=True)
    try:
        for name, group in tensors.items():
            contiguous = {key: value.detach().cpu().contiguous() for key, value in group.items()}
            save_file(contiguous, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        write_manifest(temporary)
        os.rename(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DiskError(f"{final}: could not be written ({error}); the previous checkpoint is intact") from error
    sync_to_disk(folder)
    found = _checkpoints(folder)
    # A later one was damaged and skipped on resume; it must not count among those kept.
    later = [path for path in found if _step(path) > step]
    for path in [*later, *found[: len(found) - len(later)][:-keep]]:
        _remove(path)
    return final


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are what its manifest says; None if there is none at all.

    Damaged ones are named in a warning and skipped. Raises RunError when all are damaged: starting anew
    without a word would throw the run away.
    """
    path = newest_checkpoint(folder)
    return None if path is None else read_checkpoint(path)


def load_agreed_checkpoint(folder: Path) -> Checkpoint | None:
    """The same for all ranks: the main one compares and chooses, the others read what it names.

    Raises RunError, on all of them, where one cannot see it.
    """
    path = on_main(lambda: newest_checkpoint(folder))
    return None if path is None else together(lambda: _read_when_visible(path))


def _read_when_visible(path: Path) -> Checkpoint:
    until = time.monotonic() + VISIBLE
    while True:
        try:
            return read_checkpoint(path)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            if time.monotonic() > until or is_main():
                found = f"{path}, which the main process chose, cannot be read by another ({error})"
                raise RunError(f"{found}; output_dir must lie on storage that all machines see") from None
        time.sleep(1)


def read_checkpoint(path: Path) -> Checkpoint:
    """What a whole checkpoint holds."""
    listed = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]  # others are not ours
    files = [path / name for name in sorted(listed) if name.endswith(".safetensors")]
    tensors = {file.stem: load_file(file) for file in files}
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(path, tensors, state)


def newest_checkpoint(folder: Path) -> Path | None:
    """Where the newest valid one lies. Warns and raises as `load_checkpoint`."""
    found = _checkpoints(folder)
    for path in reversed(found):
        problem = manifest_problem(path)
        if problem is None:
            return path
        logger.warning("%s is damaged (%s) and is skipped", path, problem)
    if found:
        raise RunError(
            f"{folder}: all {len(found)} checkpoints are damaged; delete the folder to begin this stage anew"
        )
    return None


def write_manifest(folder: Path) -> None:
    """Flush every file of `folder` to disk and list them with size and sha256 in MANIFEST.json."""
    paths = sorted(folder.iterdir())
    for path in paths:
        sync_to_disk(path)
    files = describe_files(folder, paths)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"version": 1, "files": files}, indent=1), encoding="utf-8")
    sync_to_disk(manifest)
    sync_to_disk(folder)


def manifest_problem(folder: Path) -> str | None:
    """Why the folder is not what its manifest says, or None when it is."""
    if folder.is_symlink():
        return "it is a link"
    try:
        return files_problem(folder, json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or unreadable"


def describe_files(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of files below `folder`, by their names in it."""
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
    }


def files_problem(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """The first file that is not what `describe_files` found, and why; None when all are. Others may lie beside."""
    listed = {name: (each["size"], each["sha256"]) for name, each in files.items()}
    for name, (size, sha256) in listed.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            # Nothing that glmd writes is a link, and what lies outside may change unseen.
            if not path.resolve().is_relative_to(folder.resolve()):
                return f"{name} leads out of the folder"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            if file_sha256(path) != sha256:
                return f"{name} has changed"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_to_disk(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file under a temporary name and rename it. Raises RunError where the disk refuses."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        sync_to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise DiskError(f"{path}: cannot be written ({error.strerror}); {MAKE_ROOM}") from None


@contextmanager
def full_disk_refused(folder: Path) -> Iterator[None]:
    """Say in one line that a disk took no more, wherever below `folder` it was. Raises DiskError."""
    try:
        yield
    except GlmdError:
        raise
    except Exception as error:  # safetensors and tokenizers have errors of their own, which end in (os error 28)
        number = disk_error(error)
        if number is None:
            raise
        raise DiskError(f"{folder}: the disk takes no more ({os.strerror(number)}); {MAKE_ROOM}") from error


def write_problem(folder: Path) -> str | None:
    """Why nothing can be written to a folder, made if need be; None when it can. Leaves nothing behind."""
    if "\0" in str(folder):
        return "holds a NUL character"
    try:
        existing = next(each for each in (folder, *folder.parents) if each.exists())
        for part in folder.parts[len(existing.parts) :]:
            (existing / part).exists()  # fails for a name too long, which behind a missing folder is not looked at
        if existing != folder:
            # Written to, because permissions say nothing of /proc and little to root.
            tempfile.TemporaryFile(dir=existing).close()
        elif not folder.is_dir():
            return "is a file"
        elif not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            return "cannot be written (Permission denied)"
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return None


def _remove(path: Path) -> None:
    """Remove a folder, or a link where one should be; not what the link leads to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, whole or not, from the oldest to the newest."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
