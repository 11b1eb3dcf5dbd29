"""A teacher's answers on disk: a further epoch, or a further student, needs no teacher.

    cache = TeacherCache(folder, ((blocks, 4), (held_out_blocks, 1)), width=768, dtype="float32", made_from=...)
    missing = cache.missing()
    cache.begin()
    for number in missing:
        cache.write_shard(number, teacher, collate, batch_size=64)      # of an OnlineTeacher
    cache.finish()
    teacher = CachedTeacher(cache.open(), language_model, vocabulary)    # batch -> TeacherOutputs, as the live one

Stored is what the final linear map sees: any temperature, vocabulary and student can be served from it. Of tasks also
the task logits, as they are. How an example is found again is told in `cached_teacher.py`.

folder: manifest.json, and shard-00000.safetensors with `digests` (R, 16), `hidden_states` (N, H), `offsets` (R + 1,),
of tasks `task_logits` and `logit_offsets` (R + 1,).
"""

import bisect
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from glmd import storage
from glmd.config_file import differences
from glmd.data.batches import Batch, Collate
from glmd.distillation.cached_teacher import DIGEST, CachedOutputs, digests, example_spans
from glmd.distillation.teacher import AllOutputs, TeacherOutputs, unsound_examples
from glmd.errors import DiskError, ModelError, RunError
from glmd.losses.finite import not_finite
from glmd.storage import file_sha256, locked, write_atomically, write_problem
from glmd.tasks.dataset import TaskDataset, TrainingData

logger = logging.getLogger(__name__)

VERSION = 2
MANIFEST = "manifest.json"
TASKS = "tasks"  # the folder, in that of the corpus, of the caches of tasks
LESS = "give another disk, fewer num_maskings, fewer teacher.cached_stages, or no teacher.cache"
SHARD_BYTES = 256 << 20  # a shard is held in memory twice while it is written
NARROW = 1024  # an H by which shards without hidden states are cut: what a kill loses is the teacher's time
READERS = 8  # threads that compare shards: one core takes a sha256 of less than a disk gives
# bfloat16 has 8 bits and the range of float32: kept as it is. float16 rounds float32 to 11 bits, eight times finer.
STORED = {"float32": torch.float16, "float16": torch.float16, "bfloat16": torch.bfloat16}
# float16 rounds by 2**-11 at most; more is overflow, or values so small that its steps are coarse.
ROUNDING = 1e-3


class TeacherCache:
    """What a cache holds and how it is made, shard by shard; which process does what is the caller's matter.

    parts: data sets, and how many of their maskings are kept. width: H, None where no hidden states are kept.
    num_classes: C of task logits, 0 where each choice has one; None where no task logits are kept. dtype: the
    teacher's. made_from: everything that the answers depend on; a cache of something else is refused by these names.
    """

    def __init__(
        self,
        folder: Path,
        parts: Sequence[tuple[TrainingData, int]],
        *,
        width: int | None,
        dtype: str,
        made_from: Mapping[str, Any],
        num_classes: int | None = None,
    ) -> None:
        self.folder, self.parts, self.width, self.num_classes = folder, parts, width, num_classes
        self.stored = STORED[dtype]
        kept = {"hidden_size": width, "bits": 16 if width else None, "num_classes": num_classes}
        self.made_from = json.loads(json.dumps({**made_from, "dtype": dtype, "kept": kept}))
        self.ends = list(accumulate(len(data) * maskings for data, maskings in parts))
        self.num_tokens = sum(data.num_tokens * maskings for data, maskings in parts)
        self.num_logits = sum(_num_logits(data, num_classes) * maskings for data, maskings in parts)
        # The longest text of all, so that no shard outgrows its bound.
        longest = max((data.longest for data, _ in parts), default=1)
        self.rows_per_shard = max(1, SHARD_BYTES // (longest * (width or NARROW) * 2))

    @property
    def token_bytes(self) -> int:
        """Of a token's hidden state on disk."""
        return 0 if self.width is None else self.width * 2

    @property
    def num_bytes(self) -> int:
        """On disk, but for some hundred bytes a shard."""
        offsets = 8 * ((self.width is not None) + (self.num_classes is not None))
        return self.num_tokens * self.token_bytes + self.num_logits * 4 + self.ends[-1] * (DIGEST + offsets)

    @property
    def num_shards(self) -> int:
        return -(-self.ends[-1] // self.rows_per_shard)

    @property
    def bytes_to_come(self) -> int:
        """What the disk has still to take, by the sizes of the files that are there."""
        there = sum(path.stat().st_size for path in self.folder.glob("shard-*.safetensors"))
        return max(0, self.num_bytes - there)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder, after whoever else is making the same cache. For one process of a run."""
        self._require_folder()
        self.folder.mkdir(parents=True, exist_ok=True)

        def wait(holder: str) -> None:
            logger.info("teacher.cache %s: waits for %s, which is making it", self.folder, holder)

        with locked(self.folder / "lock", wait):
            yield

    def missing(self, *, whole: bool = True) -> list[int]:
        """The shards that are not there, or not as they were written; none when the cache is complete.

        whole: compare every byte, by sha256, and say what the disk will hold; else the files' sizes. A complete cache
        is only read: its disk may be one that cannot be written. Raises RunError for a cache of something else,
        naming what differs, and for a disk that cannot take the rest.
        """
        manifest = self._manifest()
        if manifest is not None:
            changed = differences(manifest["made_from"], self.made_from)
            if changed:
                raise RunError(stale(self.folder, changed))
            self.rows_per_shard = manifest["rows_per_shard"]
        known = {} if manifest is None else manifest.get("shards")  # without it nobody knows what shards are of

        def problem(number: int) -> tuple[str | None, bool]:
            record = _read_json(self._record(number)) if known is None else known.get(_shard_name(number))
            return _shard_problem(self.folder / _shard_name(number), record, whole=whole), record is not None

        with ThreadPoolExecutor(READERS) as readers:
            problems = list(readers.map(problem, range(self.num_shards)))
        wanted = [number for number, (found, _) in enumerate(problems) if found is not None]
        for found, was_finished in problems:
            if found is not None and was_finished:
                logger.warning("teacher.cache %s: %s; it is made again", self.folder, found)
        if wanted:
            self._require_folder()
            self._require_room(len(wanted), say=whole)
        return wanted

    def begin(self) -> None:
        """Say on disk what the cache is to hold, before the first shard."""
        manifest = self._manifest()
        if manifest is not None and "shards" in manifest:  # complete once, damaged since: keep what is known of shards
            for name, record in manifest["shards"].items():
                write_atomically(self.folder / f"{name}.json", json.dumps(record))
        self._write_manifest({})

    def batches(self, number: int, batch_size: int) -> int:
        """How often the teacher is asked for one shard."""
        return -(-len(self._rows(number)) // batch_size)

    def batch(self, first: int, last: int, collate: Collate) -> Batch:
        """The examples of rows of the cache."""
        return collate([self._example(row) for row in range(first, last)])

    def write_shard(
        self,
        number: int,
        teacher: Callable[[Batch], AllOutputs],
        collate: Collate,
        *,
        batch_size: int,
        name: str = "the teacher",
    ) -> None:
        """Ask the teacher, of this name, for the examples of one shard. It is on disk whole, or not at all.

        Raises ModelError where 16 bits cannot hold the hidden states, RunError where the disk refuses.
        """
        rows = self._rows(number)
        names: list[bytes] = []
        said: dict[str, list[Tensor]] = {}
        counts: dict[str, list[int]] = {}
        for start in rows[::batch_size]:
            batch = self.batch(start, min(start + batch_size, rows.stop), collate)
            names += digests(batch)
            outputs = teacher(batch)
            assert isinstance(outputs, TeacherOutputs), "several teachers are not kept"
            parts, numbers = self._kept(outputs, batch, name)
            for key, part in parts.items():
                said.setdefault(key, []).append(part.cpu())
            for key, each in numbers.items():
                counts.setdefault(key, []).extend(each)
        tensors = {key: torch.cat(each) for key, each in said.items()}
        tensors |= {key: torch.tensor([0, *accumulate(each)]) for key, each in counts.items()}
        tensors["digests"] = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8).view(-1, DIGEST)
        self._write_file(number, tensors)

    def finish(self) -> None:
        """Gather the records of all shards into the manifest, which makes the cache complete."""
        storage.sync_to_disk(self.folder)
        records = {_shard_name(number): _read_json(self._record(number)) for number in range(self.num_shards)}
        assert all(records.values()), "every shard was written"
        self._write_manifest({"shards": records})
        for path in [*self.folder.glob("shard-*.json"), *self.folder.glob("*.tmp")]:
            path.unlink()

    def open(self) -> CachedOutputs:
        """The complete cache, to read from."""
        return CachedOutputs([self.folder / _shard_name(number) for number in range(self.num_shards)])

    def _rows(self, number: int) -> range:
        """The examples of one shard."""
        first = number * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.ends[-1]))

    def _example(self, row: int) -> dict[str, Any]:
        """An example as a batch of an epoch would have it; masking after masking of one data set after the other."""
        part = bisect.bisect_right(self.ends, row)
        data, _ = self.parts[part]
        masking, example = divmod(row - (self.ends[part - 1] if part else 0), len(data))
        found = data[masking, example]
        found.pop("lm_labels", None)  # which clean texts have not that share a batch with masked ones
        return found

    def _kept(self, outputs: TeacherOutputs, batch: Batch, name: str) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """Of a batch's answers what is kept, and how many tokens or logits each example has of it.

        name: the teacher's. Raises NumericsError where an output is not finite.
        """
        unsound = unsound_examples(outputs, batch)
        if unsound:
            raise not_finite(f"teacher.cache: {name}", unsound, "the outputs")
        parts: dict[str, Tensor] = {}
        counts: dict[str, list[int]] = {}
        if self.width is not None:
            assert outputs.hidden_states is not None, "the teacher has an LM head"
            parts["hidden_states"] = self._stored(outputs.hidden_states)
            tokens = batch["predicts"].sum(1).tolist()
            counts["offsets"] = [sum(tokens[first:stop]) for first, stop in example_spans(batch)]
        if self.num_classes is not None:
            assert outputs.task_logits is not None, "the teacher has a task head"
            logits = outputs.task_logits.float().cpu()
            numbers = batch.get("num_choices", torch.full((len(batch["example_id"]),), logits.shape[1]))
            if "num_decisions" in batch:
                parts["task_logits"] = logits.flatten()
                counts["logit_offsets"] = (batch["num_decisions"] * logits.shape[1]).tolist()
            else:
                exists = torch.arange(logits.shape[1]) < numbers[:, None]
                parts["task_logits"], counts["logit_offsets"] = logits[exists], numbers.tolist()
        return parts, counts

    def _stored(self, hidden: Tensor) -> Tensor:
        """(N, H) as they are kept, proved to lose no more than rounding."""
        kept, exact = hidden.to(self.stored), hidden.float()
        # Of each token, so that one of large values hides nobody's loss.
        lengths = exact.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        error = ((kept.float() - exact).norm(dim=-1) / lengths).max()
        if error > ROUNDING or torch.isnan(error):
            largest = exact.abs().max().item()
            found = f"the teacher's hidden states reach {largest:.3g} and lose {error.item():.1e} of their length"
            raise ModelError(
                f"teacher.cache: {found} in float16, which ends at 65504; give teacher.dtype=bfloat16, whose "
                "hidden states are kept as they are, or remove teacher.cache"
            )
        return kept

    def _write_file(self, number: int, tensors: dict[str, Tensor]) -> None:
        path = self.folder / _shard_name(number)
        temporary = path.with_name(path.name + ".tmp")
        try:
            save_file(tensors, temporary)
            storage.sync_to_disk(temporary)
            record = {"size": temporary.stat().st_size, "sha256": file_sha256(temporary)}
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            reason = f"cannot be written ({error})"
            raise DiskError(f"{path}: {reason}; make room, and the same command completes the cache") from error
        write_atomically(self._record(number), json.dumps(record))

    def _require_folder(self) -> None:
        problem = folder_problem(self.folder)
        if problem is not None:
            raise RunError(f"teacher.cache {self.folder} {problem}; choose another folder")

    def _require_room(self, missing: int, *, say: bool) -> None:
        """Refuse a disk that cannot hold what is missing, before any of it is made."""
        needed, free = self.num_bytes * missing / self.num_shards, free_bytes(self.folder)
        sizes = f"{gigabytes(needed)} are needed and {gigabytes(free)} free"
        if say:
            items = (self.num_tokens, self.token_bytes, "tokens") if self.width else (self.num_logits, 4, "task logits")
            whole = f"{items[0]:,} {items[2]} of {items[1]} bytes, {gigabytes(self.num_bytes)} in all"
            shards = f"{missing} of {self.num_shards} shards are missing"
            logger.info("teacher.cache %s: %s; %s, %s", self.folder, whole, shards, sizes)
        if needed > free:
            raise RunError(f"teacher.cache {self.folder}: {sizes}; {LESS}")

    def _manifest(self) -> dict[str, Any] | None:
        return read_manifest(self.folder)

    def _write_manifest(self, more: dict[str, Any]) -> None:
        manifest = {"version": VERSION, "made_from": self.made_from, "rows_per_shard": self.rows_per_shard, **more}
        write_atomically(self.folder / MANIFEST, json.dumps(manifest, indent=1))

    def _record(self, number: int) -> Path:
        return self.folder / f"{_shard_name(number)}.json"


def folder_problem(folder: Path) -> str | None:
    """Why a cache cannot be made or completed there; None where it can."""
    problem = write_problem(folder)
    if problem is None and folder.is_dir() and not (folder / MANIFEST).exists():
        # Caches of tasks lie below that of the corpus, and may have come first.
        is_empty = all(path.name in ("lock", TASKS) for path in folder.iterdir())
        problem = None if is_empty else "is not empty and holds no cache"
    return problem


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a cache is of, or None before it was begun. Raises RunError where it cannot be told."""
    path = folder / MANIFEST
    try:
        if not path.exists():
            return None
    except OSError:  # no folder that can be: what writes to it says why
        return None
    manifest = _read_json(path)
    wanted = {"made_from": dict, "rows_per_shard": int}
    is_sound = manifest is not None and all(isinstance(manifest.get(name), kind) for name, kind in wanted.items())
    if manifest is None or not is_sound or manifest.get("version") != VERSION or not _is_table(manifest.get("shards")):
        raise RunError(f"{path} is no manifest of version {VERSION} of a cache; delete the folder to make it again")
    return manifest


def _is_table(shards: Any) -> bool:
    """Whether these can be the records of shards; None before a cache was complete."""
    return shards is None or (isinstance(shards, dict) and all(isinstance(each, dict) for each in shards.values()))


def stale(folder: Path, changed: Sequence[str]) -> str:
    """The refusal of a cache by what differs."""
    found = re.sub(r"'([0-9a-f]{8})[0-9a-f]{56}'", r"\1...", "; ".join(changed))
    remedy = "name another folder, change them back, or delete it"
    return f"teacher.cache {folder} was made from something else ({found}); {remedy}"


def free_bytes(folder: Path) -> int:
    """What the disk of a folder, made or not, can take."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(existing).free


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _num_logits(data: TrainingData, num_classes: int | None) -> int:
    """Of one masking; a choice has one, which is a row."""
    if num_classes is None:
        return 0
    assert isinstance(data, TaskDataset), "a block of the corpus has no task"
    return data.num_decisions * num_classes if num_classes else len(data.rows)


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _shard_problem(path: Path, record: dict[str, Any] | None, *, whole: bool) -> str | None:
    """Why a shard is not what its record says; None when it is."""
    if record is None:
        return f"{path.name} was not finished"
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != record.get("size"):
        return f"{path.name} has {path.stat().st_size} bytes, not {record.get('size')}"
    if whole and file_sha256(path) != record.get("sha256"):
        return f"{path.name} has changed"
    return None


def _read_json(path: Path) -> dict[str, Any] | None:
    """A small file of our own, or None where it is absent or torn."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
