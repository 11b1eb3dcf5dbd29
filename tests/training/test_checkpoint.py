"""Checkpoints under damage: what was whole before is loadable after."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import glmd.storage
import glmd.training.checkpoint as module
from glmd.errors import RunError
from glmd.storage import MANIFEST, manifest_problem, write_atomically
from glmd.training.checkpoint import load_checkpoint, save_checkpoint

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", MANIFEST]


@pytest.fixture(autouse=True)
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names in the order in which they were flushed or renamed. The disk itself is spared; it may take seconds."""
    seen: list[str] = []
    rename = os.rename

    def note_rename(source: Path, target: Path) -> None:
        seen.append(f"{source.name} -> {target.name}")
        rename(source, target)

    monkeypatch.setattr(glmd.storage, "sync_to_disk", lambda path: seen.append(path.name))
    monkeypatch.setattr(os, "rename", note_rename)
    return seen


def save(folder: Path, step: int, keep: int = 2) -> Path:
    """A checkpoint whose every value is its step."""
    tensors = {
        "model": {"weight": torch.full((3, 4), float(step)), "bias": torch.full((4,), float(step))},
        "optimizer": {"weight.step": torch.tensor(float(step))},
    }
    return save_checkpoint(folder, step, tensors, {"progress": {"step": step}}, keep=keep)


def loaded_step(folder: Path) -> int:
    """The step of the checkpoint that is loaded, after looking at every value of it."""
    found = load_checkpoint(folder)
    assert found is not None
    step: int = found.state["progress"]["step"]
    assert {name: sorted(group) for name, group in found.tensors.items()} == {
        "model": ["bias", "weight"],
        "optimizer": ["weight.step"],
    }
    assert all((tensor == step).all() for group in found.tensors.values() for tensor in group.values())
    return step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Saving and loading


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "wide": torch.randn(5, 3, generator=generator, dtype=torch.float64),
        "narrow": torch.randn(7, generator=generator).to(torch.bfloat16),
        "strided": torch.randn(4, 6, generator=generator).t(),
        "step": torch.tensor(3.0),
        "special": torch.tensor([float("inf"), -0.0, 1e-45]),
    }
    state = {"progress": {"step": 7, "seconds": 0.1 + 0.2, "best_score": None}, "models": {"name": "größer"}}
    folder = save_checkpoint(tmp_path, 7, {"model": tensors}, state, keep=1)
    assert folder.name == "step-000007" and names(folder) == sorted(["model.safetensors", "state.json", MANIFEST])
    found = load_checkpoint(tmp_path)
    assert found is not None and found.state == state and found.path == folder
    for name, tensor in tensors.items():
        again = found.tensors["model"][name]
        assert again.dtype == tensor.dtype
        assert again.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_every_file_is_on_disk_before_the_rename_and_the_rename_before_the_end(
    tmp_path: Path, flushed: list[str]
) -> None:
    save(tmp_path / "checkpoints", 3)
    moment = flushed.index("step-000003.tmp -> step-000003")
    assert sorted(flushed[:moment]) == sorted([*FILES, "step-000003.tmp"])
    assert flushed[moment + 1 :] == ["checkpoints"]


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None and load_checkpoint(tmp_path / "absent") is None


def test_the_newest_is_loaded_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=2)
        assert loaded_step(tmp_path) == step
    assert names(tmp_path) == ["step-000006", "step-000008"]


def test_steps_are_ordered_as_numbers_also_above_a_million(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save(tmp_path, step, keep=2)
        assert loaded_step(tmp_path) == step
    assert names(tmp_path) == ["step-1000000", "step-1000001"]


def test_a_damaged_later_checkpoint_does_not_count_among_those_kept(tmp_path: Path) -> None:
    save(tmp_path, 2, keep=1)
    damaged = save(tmp_path, 8, keep=2)
    (damaged / "state.json").unlink()
    assert loaded_step(tmp_path) == 2
    save(tmp_path, 4, keep=1)
    assert loaded_step(tmp_path) == 4 and names(tmp_path) == ["step-000004"]


# A kill in the middle of a save


class Killed(BaseException):
    """Nothing in the code under test may catch it, as nothing catches SIGKILL."""


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, function: str, call: int, owner: Any = module) -> Iterator[None]:
    """Let the `call`-th call of a function die before it does anything."""
    real, calls = getattr(owner, function), count()

    def dies(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, function, dies)
        with pytest.raises(Killed):
            yield


MOMENTS = [
    *(("save_file", call, module) for call in (0, 1)),  # before each file of tensors
    ("write_manifest", 0, module),  # after state.json
    *(("sync_to_disk", call, glmd.storage) for call in range(5)),  # at each file, the manifest, the folder
    ("rename", 0, os),
]


@pytest.mark.parametrize(("function", "call", "owner"), MOMENTS)
def test_a_kill_at_any_file_of_a_save_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int, owner: Any
) -> None:
    save(tmp_path, 2, keep=1)
    with killed_at(monkeypatch, function, call, owner):
        save(tmp_path, 4, keep=1)
    assert loaded_step(tmp_path) == 2
    assert "step-000004" not in names(tmp_path)
    save(tmp_path, 4, keep=1)
    assert loaded_step(tmp_path) == 4 and names(tmp_path) == ["step-000004"], "nothing of the torn one is left"


def test_a_kill_after_the_rename_keeps_the_new_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2, keep=1)
    with killed_at(monkeypatch, "sync_to_disk", 5, glmd.storage):  # the folder above
        save(tmp_path, 4, keep=1)
    assert loaded_step(tmp_path) == 4


def test_a_kill_while_an_old_checkpoint_is_removed_does_not_matter(tmp_path: Path) -> None:
    save(tmp_path, 2)
    old = save(tmp_path, 4)
    save(tmp_path, 6, keep=3)
    (old / MANIFEST).unlink()
    assert loaded_step(tmp_path) == 6


def test_a_full_disk_is_one_line_and_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    save(tmp_path, 2)
    with monkeypatch.context() as patched:
        patched.setattr(module, "save_file", full)
        with pytest.raises(RunError, match=r"step-000004: could not be written .*No space left.*previous"):
            save(tmp_path, 4)
    assert loaded_step(tmp_path) == 2 and names(tmp_path) == ["step-000002"]


# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, empty, flip, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_skipped_with_a_warning_that_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Any
) -> None:
    save(tmp_path, 2)
    newest = save(tmp_path, 4)
    damage(newest / name)
    with caplog.at_level(logging.WARNING):
        assert loaded_step(tmp_path) == 2
    (record,) = caplog.records
    assert str(newest) in record.getMessage() and "damaged" in record.getMessage()
    assert newest.exists(), "reading removes nothing"


def test_no_flipped_bit_of_a_manifest_is_more_than_damage(tmp_path: Path) -> None:
    path = save(tmp_path, 2) / MANIFEST
    whole = path.read_bytes()
    silent = 0
    for position in range(len(whole)):
        changed = bytes([whole[position] ^ (1 << position % 7)])
        path.write_bytes(whole[:position] + changed + whole[position + 1 :])
        silent += manifest_problem(path.parent) is None
    # The letters of the word version and its number say nothing about the files.
    assert silent <= 8
    path.write_bytes(whole)
    assert manifest_problem(path.parent) is None


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": []}', '{"files": {"state.json": {}}}', '{"files": null}', "7"])
def test_a_manifest_of_another_form_is_damage(tmp_path: Path, text: str) -> None:
    save(tmp_path, 2)
    (save(tmp_path, 4) / MANIFEST).write_text(text, encoding="utf-8")
    assert loaded_step(tmp_path) == 2


def test_a_checkpoint_with_a_link_out_of_its_folder_is_damage(tmp_path: Path) -> None:
    """What lies outside has the same bytes today; nothing that glmd writes is a link."""
    folder = tmp_path / "checkpoints"
    save(folder, 2)
    newest = save(folder, 4)
    (newest / "model.safetensors").rename(tmp_path / "elsewhere")
    (newest / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert manifest_problem(newest) == "model.safetensors leads out of the folder"
    assert loaded_step(folder) == 2


def test_a_checkpoint_that_is_a_link_is_damage_and_what_it_leads_to_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 2, keep=1)
    theirs = save(tmp_path / "theirs", 4)
    (folder / theirs.name).symlink_to(theirs)
    assert loaded_step(folder) == 2
    save(folder, 4, keep=1)
    assert names(folder) == ["step-000004"] and not (folder / theirs.name).is_symlink()
    assert manifest_problem(theirs) is None and loaded_step(folder) == 4


@pytest.mark.parametrize("name", ["../theirs.json", "/etc/hostname"])
def test_a_manifest_that_names_a_file_outside_is_damage(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 2)
    (folder / "theirs.json").write_text("{}", encoding="utf-8")
    path = save(folder, 4) / MANIFEST
    files = glmd.storage.describe_files(folder, [])
    outside = path.parent / name
    files[name] = {"size": outside.stat().st_size, "sha256": glmd.storage.file_sha256(outside)}
    path.write_text(json.dumps({"version": 1, "files": files}), encoding="utf-8")
    assert manifest_problem(path.parent) is not None and loaded_step(folder) == 2


def test_a_file_that_the_manifest_does_not_list_is_not_loaded(tmp_path: Path) -> None:
    (save(tmp_path, 2) / "more.safetensors").write_bytes(b"not even tensors")
    (tmp_path / "step-of-mine").mkdir()
    assert loaded_step(tmp_path) == 2


def test_when_all_are_damaged_the_run_is_refused_not_begun_anew(tmp_path: Path) -> None:
    for step in (2, 4):
        truncate(save(tmp_path, step) / "model.safetensors")
    with pytest.raises(RunError, match="all 2 checkpoints are damaged; delete the folder"):
        load_checkpoint(tmp_path)
    assert names(tmp_path) == ["step-000002", "step-000004"]


# Small files


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "results.json"
    write_atomically(path, json.dumps({"größe": 1}, ensure_ascii=False))
    assert json.loads(path.read_text(encoding="utf-8")) == {"größe": 1} and names(path.parent) == ["results.json"]
    for function, owner in (("sync_to_disk", glmd.storage), ("replace", os)):
        with killed_at(monkeypatch, function, 0, owner):
            write_atomically(path, "torn")
        assert json.loads(path.read_text(encoding="utf-8")) == {"größe": 1}
    write_atomically(path, "second")
    assert path.read_text(encoding="utf-8") == "second" and names(path.parent) == ["results.json"]
