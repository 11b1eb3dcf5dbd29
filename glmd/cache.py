"""A teacher's last hidden states on disk: a further epoch, or a further student, asks the teacher nothing.

    cache = TeacherCache(folder, ((blocks, 4), (held_out_blocks, 1)), width=768, dtype="float32", made_from=...)
    missing = cache.missing()
    cache.begin()
    for number in missing:
        cache.write_shard(number, language_model, collate, batch_size=64)
    cache.finish()
    teacher = CachedTeacher(cache.open(), language_model, vocabulary)    # batch -> TeacherOutputs, as the live one

Stored is what the final linear map sees: any temperature, vocabulary and student can be served from it. A text's rows
are found by its ids, never by a position or a number, so that no order of the data, split of a batch or resumption can
give a token the teacher of another: a text that is not there is an error.

folder: manifest.json, and shard-00000.safetensors with `hidden_states` (N, H), `offsets` (R + 1,), `digests` (R, 16).
"""

import bisect
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from glmd.checkpoint import file_sha256, sync_to_disk, write_atomically, write_problem
from glmd.config import differences
from glmd.data.batches import BlockDataset, Collate
from glmd.errors import DataError, DiskError, ModelError, NumericsError, RunError
from glmd.heads import hidden_before_final_linear, logit_scaling, run_backbone
from glmd.teacher import TeacherOutputs, model_inputs, sliced_head
from glmd.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

VERSION = 1
MANIFEST = "manifest.json"
SHARD_BYTES = 256 << 20  # a shard is held in memory twice while it is written
# bfloat16 has 8 bits and the range of float32: kept as it is. float16 rounds float32 to 11 bits, eight times finer.
STORED = {"float32": torch.float16, "float16": torch.float16, "bfloat16": torch.bfloat16}
# float16 rounds by 2**-11 at most; more is overflow, or values so small that its steps are coarse.
ROUNDING = 1e-3
DIGEST = 16  # bytes


class TeacherCache:
    """What a cache holds and how it is made, shard by shard; which process does what is the caller's matter.

    parts: data sets, and how many of their maskings are kept. width: H. dtype: the teacher's.
    made_from: everything that the hidden states depend on; a cache of something else is refused by these names.
    """

    def __init__(
        self,
        folder: Path,
        parts: Sequence[tuple[BlockDataset, int]],
        *,
        width: int,
        dtype: str,
        made_from: Mapping[str, Any],
    ) -> None:
        self.folder, self.parts, self.width, self.dtype = folder, parts, width, dtype
        self.made_from = json.loads(json.dumps({**made_from, "dtype": dtype, "hidden_size": width}))
        self.ends = list(accumulate(len(data) * maskings for data, maskings in parts))
        self.num_tokens = sum(data.num_tokens * maskings for data, maskings in parts)
        # The longest text of all, so that no shard outgrows its bound.
        self.rows_per_shard = max(1, SHARD_BYTES // (max(data.max_length for data, _ in parts) * width * 2))

    @property
    def num_bytes(self) -> int:
        """On disk, but for some hundred bytes a shard."""
        return self.num_tokens * self.width * 2 + self.ends[-1] * (DIGEST + 8)

    @property
    def num_shards(self) -> int:
        return -(-self.ends[-1] // self.rows_per_shard)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder, after whoever else is making the same cache. For one process of a run."""
        self._require_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("teacher.cache %s: waits for the run that is making it", self.folder)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def missing(self, *, whole: bool = True) -> list[int]:
        """The shards that are not there, or not as they were written; none when the cache is complete.

        whole: compare every byte, by sha256, and say what the disk will hold; else the files' sizes. Raises RunError
        for a cache of something else, naming what differs, and for a disk without room for the rest.
        """
        self._require_folder()
        manifest = self._manifest()
        if manifest is not None:
            changed = differences(manifest["made_from"], self.made_from)
            if changed:
                found = re.sub(r"'([0-9a-f]{8})[0-9a-f]{56}'", r"\1...", "; ".join(changed))
                remedy = "name another folder, change them back, or delete it"
                raise RunError(f"teacher.cache {self.folder} was made from something else ({found}); {remedy}")
            self.rows_per_shard = manifest["rows_per_shard"]
        records = (manifest or {}).get("shards")
        wanted = []
        for number in range(self.num_shards):
            record = _read_json(self._record(number)) if records is None else records.get(_shard_name(number))
            problem = _shard_problem(self.folder / _shard_name(number), record, whole=whole)
            if problem is not None:
                wanted.append(number)
                if record is not None:
                    logger.warning("teacher.cache %s: %s; it is made again", self.folder, problem)
        if wanted:
            self._require_room(len(wanted), say=whole)
        return wanted

    def begin(self) -> None:
        """Say on disk what the cache is to hold, before the first shard."""
        manifest = self._manifest()
        if manifest is not None and "shards" in manifest:  # complete once, damaged since: keep what is known of shards
            for name, record in manifest["shards"].items():
                write_atomically(self.folder / f"{name}.json", json.dumps(record))
        self._write_manifest({})

    def write_shard(self, number: int, language_model: nn.Module, collate: Collate, *, batch_size: int) -> None:
        """Ask the teacher for the texts of one shard. It is on disk whole, or not at all.

        Raises ModelError where 16 bits cannot hold the hidden states, RunError where the disk refuses.
        """
        first = number * self.rows_per_shard
        rows = range(first, min(first + self.rows_per_shard, self.ends[-1]))
        hidden: list[Tensor] = []
        digests: list[bytes] = []
        lengths: list[int] = []
        for start in range(0, len(rows), batch_size):
            batch = collate([self._example(row) for row in rows[start : start + batch_size]])
            digests += _digests(batch)
            lengths += batch["attention_mask"].sum(1).tolist()
            hidden.append(self._stored(_last_hidden(language_model, batch)))
        offsets = torch.tensor([0, *accumulate(lengths)])
        tensors = {
            "hidden_states": torch.cat(hidden),
            "offsets": offsets,
            "digests": torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, DIGEST),
        }
        path = self.folder / _shard_name(number)
        temporary = path.with_name(path.name + ".tmp")
        try:
            save_file(tensors, temporary)
            sync_to_disk(temporary)
            record = {"size": temporary.stat().st_size, "sha256": file_sha256(temporary)}
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            reason = f"cannot be written ({error})"
            raise DiskError(f"{path}: {reason}; make room, and the same command completes the cache") from error
        write_atomically(self._record(number), json.dumps(record))

    def finish(self) -> None:
        """Gather the records of all shards into the manifest, which makes the cache complete."""
        sync_to_disk(self.folder)
        records = {_shard_name(number): _read_json(self._record(number)) for number in range(self.num_shards)}
        assert all(records.values()), "every shard was written"
        self._write_manifest({"shards": records})
        for path in [*self.folder.glob("shard-*.json"), *self.folder.glob("*.tmp")]:
            path.unlink()

    def open(self) -> "HiddenStates":
        """The complete cache, to read from."""
        return HiddenStates([self.folder / _shard_name(number) for number in range(self.num_shards)])

    def _example(self, row: int) -> dict[str, Any]:
        """A text as a batch of an epoch would have it; masking after masking of one data set after the other."""
        part = bisect.bisect_right(self.ends, row)
        data, _ = self.parts[part]
        masking, example = divmod(row - (self.ends[part - 1] if part else 0), len(data))
        return data[masking, example]

    def _stored(self, hidden: Tensor) -> Tensor:
        """(N, H) as it is kept, proved to lose no more than rounding."""
        kept = hidden.to(STORED[self.dtype])
        exact = hidden.float()
        # Of each token, so that one of large values hides nobody's loss.
        lengths = exact.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        error = ((kept.float() - exact).norm(dim=-1) / lengths).max()
        if error > ROUNDING or torch.isnan(error):
            if not torch.isfinite(exact).all():
                raise NumericsError("teacher.cache: the teacher's hidden states are not finite; check the teacher")
            largest = exact.abs().max().item()
            found = f"the teacher's hidden states reach {largest:.3g} and lose {error.item():.1e} of their length"
            raise ModelError(
                f"teacher.cache: {found} in float16, which ends at 65504; give teacher.dtype=bfloat16, whose "
                "hidden states are kept as they are, or remove teacher.cache"
            )
        return kept.cpu()

    def _require_folder(self) -> None:
        problem = write_problem(self.folder)
        if problem is None and self.folder.is_dir() and not (self.folder / MANIFEST).exists():
            is_empty = all(path.name == "lock" for path in self.folder.iterdir())
            problem = None if is_empty else "is not empty and holds no cache"
        if problem is not None:
            raise RunError(f"teacher.cache {self.folder} {problem}; choose another folder")

    def _require_room(self, missing: int, *, say: bool) -> None:
        """Refuse a disk that cannot hold what is missing, before any of it is made."""
        needed = self.num_bytes * missing / self.num_shards
        existing = next(each for each in (self.folder, *self.folder.absolute().parents) if each.exists())
        free = shutil.disk_usage(existing).free
        sizes = f"{_gigabytes(needed)} are needed and {_gigabytes(free)} free"
        if say:
            whole = f"{self.num_tokens:,} tokens of {self.width * 2} bytes, {_gigabytes(self.num_bytes)} in all"
            shards = f"{missing} of {self.num_shards} shards are missing"
            logger.info("teacher.cache %s: %s; %s, %s", self.folder, whole, shards, sizes)
        if needed > free:
            raise RunError(
                f"teacher.cache {self.folder}: {sizes}; give another disk, fewer pretraining.num_maskings, or no cache"
            )

    def _manifest(self) -> dict[str, Any] | None:
        """What the cache is of, or None before it was begun. Raises RunError where it cannot be told."""
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        manifest = _read_json(path)
        if manifest is None or manifest.get("version") != VERSION or not isinstance(manifest.get("made_from"), dict):
            raise RunError(f"{path} is no manifest of version {VERSION} of a cache; delete the folder to make it anew")
        return manifest

    def _write_manifest(self, more: dict[str, Any]) -> None:
        manifest = {"version": VERSION, "made_from": self.made_from, "rows_per_shard": self.rows_per_shard, **more}
        write_atomically(self.folder / MANIFEST, json.dumps(manifest, indent=1))

    def _record(self, number: int) -> Path:
        return self.folder / f"{_shard_name(number)}.json"


class HiddenStates:
    """The hidden states of many texts, memory-mapped, found by the texts' digests."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = shards
        digests, offsets, first_rows, count = [], [], [0], 0
        for path in shards:
            header = _Header(path)
            digests.append(header.array("digests", np.uint8).reshape(-1, DIGEST))
            offsets.append(header.array("offsets", np.int64))
            count += len(digests[-1])
            first_rows.append(count)
        self.offsets, self.first_rows = offsets, first_rows
        names = np.ascontiguousarray(np.concatenate(digests)).view(f"S{DIGEST}").reshape(-1)
        # Of texts that are equal the first one is taken.
        self.order = np.argsort(names, kind="stable")
        self.names = names[self.order]

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def maps(self) -> list[np.ndarray]:
        """(N, H) of each shard, 16 bits a number, read as they are used."""
        return [_Header(path).map() for path in self.shards]

    @cached_property
    def dtype(self) -> torch.dtype:
        return {"F16": torch.float16, "BF16": torch.bfloat16}[_Header(self.shards[0]).fields["hidden_states"]["dtype"]]

    def __getitem__(self, digest: bytes) -> np.ndarray:
        """(S, H) bits of a text's hidden states. Raises KeyError for a text that is not there."""
        name = np.array([digest], dtype=self.names.dtype)
        place = int(np.searchsorted(self.names, name)[0])
        if place == len(self.names) or self.names[place] != name[0]:
            raise KeyError(digest)
        row = int(self.order[place])
        shard = bisect.bisect_right(self.first_rows, row) - 1
        start, stop = self.offsets[shard][row - self.first_rows[shard] :][:2]
        return self.maps[shard][start:stop]


class CachedTeacher:
    """A teacher that reads what it said: the same call as `OnlineTeacher`, without a forward.

    Its hidden states come in the dtype of the language model's head, which is cut to the vocabulary once; the model
    itself is not kept.
    """

    def __init__(
        self,
        hidden_states: HiddenStates,
        language_model: nn.Module,
        vocabulary: Vocabulary,
        *,
        merge_dropped: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.hidden_states = hidden_states
        self.scaling = logit_scaling(language_model.config)
        parts = sliced_head(language_model, vocabulary, merge_dropped=merge_dropped)
        self.weight, self.bias, self.merged_into = (None if part is None else part.to(device) for part in parts)

    def __call__(self, batch: Mapping[str, Tensor]) -> TeacherOutputs:
        """Look up each text of `input_ids` (B, S). Raises DataError for one that the cache has not."""
        assert self.weight is not None, "a language model has a head"
        rows = []
        for i, digest in enumerate(_digests(batch)):
            try:
                rows.append(self.hidden_states[digest])
            except KeyError:
                text = f"example {int(batch['example_id'][i])}"
                raise DataError(f"teacher.cache holds no text that is {text} of this batch; delete it") from None
        bits = np.concatenate(rows).view(np.int16)
        hidden = torch.from_numpy(bits).view(self.hidden_states.dtype)
        hidden = hidden.to(self.weight.device, non_blocking=True).to(self.weight.dtype)
        return TeacherOutputs(hidden, self.weight, self.bias, self.merged_into, head_scaling=self.scaling)


@torch.no_grad()
def _last_hidden(language_model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(N, H) what the final linear map sees of the batch's tokens."""
    device = next(language_model.parameters()).device
    inputs = {name: each.to(device) for name, each in model_inputs(batch).items()}
    hidden = hidden_before_final_linear(language_model, run_backbone(language_model, inputs))
    return hidden[inputs["attention_mask"].bool()]


def _digests(batch: Mapping[str, Tensor]) -> list[bytes]:
    """The name of each text: a hash of its ids without padding, that is, of the words and of the masking."""
    assert "token_type_ids" not in batch, "a block of the corpus is one sentence"
    ids = batch["input_ids"].cpu().numpy().astype("<i4")
    lengths = batch["attention_mask"].sum(1).tolist()
    return [
        hashlib.blake2b(row[:length].tobytes(), digest_size=DIGEST).digest()
        for row, length in zip(ids, lengths, strict=True)
    ]


class _Header:
    """Where the tensors of a safetensors file lie. safetensors itself keeps a file open for each one it maps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.fields = json.loads(file.read(length))
        self.start = 8 + length

    def array(self, name: str, dtype: type) -> np.ndarray:
        """A tensor, read into memory."""
        begin, end = self.fields[name]["data_offsets"]
        count = (end - begin) // np.dtype(dtype).itemsize
        return np.fromfile(self.path, dtype=dtype, count=count, offset=self.start + begin)

    def map(self) -> np.ndarray:
        """(N, H) uint16, the hidden states' bits, memory-mapped."""
        field = self.fields["hidden_states"]
        offset = self.start + field["data_offsets"][0]
        return np.memmap(self.path, dtype=np.uint16, mode="r", offset=offset, shape=tuple(field["shape"]))


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


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
