"""Files that are whole or absent: atomic writes, hashes, manifests, and disks that are full."""

import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from glmd.errors import DiskError, GlmdError, RunError, disk_error

MANIFEST = "MANIFEST.json"


MAKE_ROOM = "make room, and the same command continues the run"


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


def link_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Have files of one folder in another too: the same ones where the file system can, else copies. Raises OSError."""
    for name in names:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        try:
            os.link(source / name, path)
        except OSError:  # no links there, or no more of this file
            shutil.copyfile(source / name, path)


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


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it: a reader sees the old one or the new one, whole.

    The temporary name is the same for all writers, so that the next one clears what a kill leaves. Raises DiskError.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync_to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise DiskError(f"{path}: cannot be written ({error.strerror}); {MAKE_ROOM}") from None


@contextmanager
def locked(path: Path, taken: Callable[[str], None]) -> Iterator[None]:
    """Hold a file's lock. It is free when the process has ended, in whatever way.

    taken: called with the name of the process that holds it, if one does; it may raise, else that one is waited for.
    Raises RunError where the file cannot be locked.
    """
    lock = FileLock(path)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            taken(_holder(path))
            lock.acquire()
    except OSError as error:
        raise RunError(f"{path} cannot be locked ({error.strerror})") from None
    try:
        if not SoftFileLock(path).is_lock_held_by_us:
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    found = path.read_text(encoding="utf-8").split()
    if found[:1] == ["process"]:
        return " ".join(found)
    # Where a file system has no locks, a mark of filelock's stands in their place: a process, its host, its start.
    return f"process {found[0]} on {found[1]}" if len(found) > 1 else "another process"


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
