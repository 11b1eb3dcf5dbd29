"""Atomic, verified run state: tensors in safetensors, the rest in JSON, no pickle.

    save_checkpoint(folder, step, {"model": tensors, "optimizer": tensors}, {"step": step}, keep=2)
    found = load_checkpoint(folder)       # the newest valid one, or None

A checkpoint is written under a temporary name, every file is flushed to disk and listed in MANIFEST.json with
size and sha256, and the folder is renamed: a kill at any moment leaves the previous checkpoint as it was.
"""

import json
import logging
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from glmd import storage
from glmd.errors import DiskError, RunError
from glmd.runtime.processes import is_main, on_main, together
from glmd.storage import MANIFEST, manifest_problem, write_manifest

logger = logging.getLogger(__name__)
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
    storage.sync_to_disk(folder)
    found = _checkpoints(folder)
    # A later one was damaged and skipped on resume; it must not count among those kept.
    later = [path for path in found if _step(path) > step]
    for path in [*later, *found[: len(found) - len(later)][:-keep]]:
        _remove(path)
    return final


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are what its manifest says; None if there is none at all.

    Damaged ones are named in a warning and skipped. Raises RunError when all are damaged: starting again
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
            f"{folder}: all {len(found)} checkpoints are damaged; delete the folder to begin this stage again"
        )
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
