"""The kept tokens of a student, and where the others go (arXiv:2306.06625, section 3.3).

    vocabulary = build_vocabulary(tokenizer, embeddings, counts, keep_ratio=0.5)
    student_ids = vocabulary.token_map[source_ids]

Source ids are the teacher's, student ids count the kept tokens from 0 in the same order. Letters in shapes: V source
tokens, K kept tokens, H hidden size. V is the length of the tokenizer: rows that a model pads its matrices with are
nobody's tokens and are dropped.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glmd.errors import ModelError
from glmd.storage import write_atomically

logger = logging.getLogger(__name__)

ARRAYS_FILE = "vocabulary.safetensors"
SUMMARY_FILE = "vocabulary.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The kept tokens and the map onto them.

    kept_ids: (K,) int64 source ids, ascending.
    token_map: (V,) int64 student id of each source id; `token_map[kept_ids]` is 0..K-1.
    mapping: how the targets of dropped tokens were chosen.
    counts: (V,) int64 how often each source token was seen, if the tokens were counted.
    unknown_id: source id of the unknown token, which covers nothing; None where the tokenizer can spell everything.
    """

    kept_ids: np.ndarray
    token_map: np.ndarray
    mapping: str = "inner_product"
    counts: np.ndarray | None = None
    unknown_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("kept_ids", "token_map", "counts"):
            value = getattr(self, name)
            if value is None and name == "counts":
                continue
            array = np.array(value)
            if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
                raise ModelError(f"vocabulary: {name} must be a row of integers, got {array.dtype} {array.shape}")
            object.__setattr__(self, name, array.astype(np.int64))
        self._validate()

    def _validate(self) -> None:
        kept, token_map = self.kept_ids, self.token_map
        if not 0 < len(kept) <= len(token_map):
            raise ModelError(f"vocabulary: {len(kept)} of {len(token_map)} tokens are kept; at least one must be")
        if kept[0] < 0 or kept[-1] >= len(token_map) or (np.diff(kept) <= 0).any():
            raise ModelError(f"vocabulary: kept_ids must ascend within 0 to {len(token_map) - 1}")
        if not np.array_equal(token_map[kept], np.arange(len(kept))):
            raise ModelError("vocabulary: token_map does not map the kept ids onto 0, 1, 2, ...")
        if token_map.min() < 0 or token_map.max() >= len(kept):
            raise ModelError(f"vocabulary: token_map holds targets outside 0 to {len(kept) - 1}")
        if self.counts is not None and (len(self.counts) != len(token_map) or self.counts.min() < 0):
            raise ModelError(f"vocabulary: counts must be {len(token_map)} numbers of at least 0")

    @classmethod
    def identity(
        cls, source_size: int, *, counts: np.ndarray | None = None, unknown_id: int | None = None
    ) -> "Vocabulary":
        """Keep every token."""
        return cls(np.arange(source_size), np.arange(source_size), "identity", counts, unknown_id)

    @classmethod
    def unmapped(cls, kept_ids: np.ndarray, source_size: int) -> "Vocabulary":
        """For what depends on the kept tokens alone: all others go onto the last one."""
        token_map = np.full(source_size, len(kept_ids) - 1)
        token_map[kept_ids] = np.arange(len(kept_ids))
        return cls(kept_ids, token_map)

    @property
    def size(self) -> int:
        """K, the tokens kept."""
        return len(self.kept_ids)

    @property
    def source_size(self) -> int:
        """V, the tokens of the source tokenizer."""
        return len(self.token_map)

    @property
    def is_identity(self) -> bool:
        return self.size == self.source_size

    @property
    def dropped_ids(self) -> np.ndarray:
        """(V - K,) source ids that were mapped onto a kept one, ascending."""
        return np.setdiff1d(np.arange(self.source_size), self.kept_ids, assume_unique=True)

    @property
    def coverage(self) -> float | None:
        """Share of counted tokens that are kept and known. None without counts."""
        if self.counts is None or not self.counts.sum():
            return None
        known = self.kept_ids[self.kept_ids != self.unknown_id] if self.unknown_id is not None else self.kept_ids
        return float(self.counts[known].sum() / self.counts.sum())

    @property
    def unknown_share(self) -> float:
        """Share of counted tokens that the source tokenizer could not spell; 0 without counts."""
        if self.unknown_id is None or self.counts is None or not self.counts.sum():
            return 0.0
        return float(self.counts[self.unknown_id] / self.counts.sum())

    def is_kept(self, source_id: int) -> bool:
        return bool(self.kept_ids[self.token_map[source_id]] == source_id)

    def fingerprint(self) -> str:
        """sha256 of the two arrays that give ids their meaning."""
        digest = hashlib.sha256()
        for array in (self.kept_ids, self.token_map):
            digest.update(np.int64(len(array)).astype("<i8").tobytes() + array.astype("<i8").tobytes())
        return digest.hexdigest()

    def save(self, folder: Path | str) -> None:
        """Write the arrays and a summary a person can read. A torn pair is refused by `load`."""
        from safetensors.numpy import save

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"kept_ids": self.kept_ids, "token_map": self.token_map}
        if self.counts is not None:
            arrays["counts"] = self.counts
        write_atomically(folder / ARRAYS_FILE, save(arrays))
        write_atomically(folder / SUMMARY_FILE, (json.dumps(_summary(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: Path | str) -> "Vocabulary":
        """Read what `save` wrote. Raises ModelError naming the file that is missing, torn or inconsistent."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        folder = Path(folder)
        for name in (ARRAYS_FILE, SUMMARY_FILE):
            if not (folder / name).is_file():
                raise ModelError(f"{folder / name} is missing; the folder holds no complete vocabulary")
        try:
            summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
            version, mapping, fingerprint = (summary[name] for name in ("version", "mapping", "fingerprint"))
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{folder / SUMMARY_FILE} cannot be read: {error!r}") from error
        if version != FORMAT_VERSION:
            raise ModelError(f"{folder / SUMMARY_FILE}: version {version}, this glmd reads {FORMAT_VERSION}")
        try:
            arrays = load_file(folder / ARRAYS_FILE)
            vocabulary = cls(
                arrays["kept_ids"], arrays["token_map"], mapping, arrays.get("counts"), summary.get("unknown_id")
            )
        except (SafetensorError, KeyError, ModelError) as error:
            raise ModelError(f"{folder / ARRAYS_FILE} cannot be used: {error}") from error
        if vocabulary.fingerprint() != fingerprint:
            raise ModelError(f"{folder}: {ARRAYS_FILE} and {SUMMARY_FILE} do not belong together (fingerprint differs)")
        return vocabulary


def _summary(vocabulary: Vocabulary) -> dict[str, Any]:
    degrees = in_degrees(vocabulary)
    return {
        "version": FORMAT_VERSION,
        "source_size": vocabulary.source_size,
        "size": vocabulary.size,
        "keep_ratio": vocabulary.size / vocabulary.source_size,
        "mapping": vocabulary.mapping,
        "coverage": vocabulary.coverage,
        "unknown_id": vocabulary.unknown_id,
        "unknown_share": vocabulary.unknown_share,
        "dropped": degrees.dropped,
        "targets": degrees.targets,
        "largest_share": degrees.largest_share,
        "hubs": [{"source_id": source_id, "takes": takes} for source_id, takes in degrees.hubs],
        "fingerprint": vocabulary.fingerprint(),
    }


@dataclass(frozen=True)
class InDegrees:
    """How dropped tokens spread over their targets.

    dropped: tokens mapped; targets: distinct kept tokens that take at least one.
    hubs: (source id of the target, tokens it takes), the largest first.
    """

    dropped: int
    targets: int
    hubs: tuple[tuple[int, int], ...]

    @property
    def largest_share(self) -> float:
        """Share of the dropped tokens that the largest hub takes."""
        return self.hubs[0][1] / self.dropped if self.hubs else 0.0


def in_degrees(vocabulary: Vocabulary) -> InDegrees:
    """Statistics of the map, with its ten largest hubs."""
    taken = np.bincount(vocabulary.token_map[vocabulary.dropped_ids], minlength=vocabulary.size)
    order = np.argsort(-taken, kind="stable")[:10]
    hubs = tuple((int(vocabulary.kept_ids[i]), int(taken[i])) for i in order if taken[i])
    return InDegrees(dropped=int(taken.sum()), targets=int((taken > 0).sum()), hubs=hubs)
