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
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glmd.errors import ModelError
from glmd.selection import byte_ids, choose_kept_ids, must_keep_ids, parts_to_keep, source_size_of, unknown_id

logger = logging.getLogger(__name__)

MAPPINGS = ("inner_product", "cosine", "euclidean", "unk")
ARRAYS_FILE = "vocabulary.safetensors"
SUMMARY_FILE = "vocabulary.json"
FORMAT_VERSION = 1
# One target that takes more than this share of the dropped tokens is a hub that says nothing about them.
HUB_SHARE = 0.05
HUB_SIZE = 10  # of a few dropped tokens some share one by chance
UNSEEN_SHARE = 0.1  # of kept tokens that are kept by nothing but their low ids, because the corpus has none of them
UNKNOWN_SHARE = 0.01  # of counted tokens; well-suited tokenizers meet a tenth of it


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
        _replace(folder / ARRAYS_FILE, save(arrays))
        _replace(folder / SUMMARY_FILE, (json.dumps(_summary(self), indent=2) + "\n").encode())

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


def in_degrees(vocabulary: Vocabulary, *, top: int = 10) -> InDegrees:
    """Statistics of the map, with its `top` largest hubs."""
    taken = np.bincount(vocabulary.token_map[vocabulary.dropped_ids], minlength=vocabulary.size)
    order = np.argsort(-taken, kind="stable")[:top]
    hubs = tuple((int(vocabulary.kept_ids[i]), int(taken[i])) for i in order if taken[i])
    return InDegrees(dropped=int(taken.sum()), targets=int((taken > 0).sum()), hubs=hubs)


def map_tokens(
    embeddings: Any,
    kept_ids: np.ndarray,
    *,
    method: str = "inner_product",
    forbidden_targets: Iterable[int] = (),
    unk_id: int | None = None,
    classes: np.ndarray | None = None,
    chunk_size: int = 4096,
) -> np.ndarray:
    """Send each dropped token to the kept token whose embedding is nearest. Returns (V,) student ids.

    embeddings: (V, H) array or tensor; the teacher's, as they are, neither centred nor normalised.
    kept_ids: (K,) ascending.
    method: "inner_product" (the paper's best), "cosine", "euclidean", or "unk": all to the unknown token.
    forbidden_targets: source ids no token is sent to: a special token inside a text would change its meaning.
    unk_id: source id of the unknown token, for "unk".
    classes: (V,) of `token_classes`; a token is sent to one of its own class, where one is kept.
    Equal scores: the lower id.
    """
    if method not in MAPPINGS:
        raise ModelError(f"mapping must be one of {', '.join(MAPPINGS)}, got {method!r}")
    matrix = _as_array(embeddings)
    kept_ids = np.asarray(kept_ids, dtype=np.int64)
    token_map = np.full(len(matrix), -1, dtype=np.int64)
    token_map[kept_ids] = np.arange(len(kept_ids))
    dropped = np.flatnonzero(token_map < 0)
    if method == "unk":
        if unk_id is None or token_map[unk_id] < 0:
            raise ModelError("mapping unk needs an unknown token that is kept; the tokenizer has none")
        token_map[dropped] = token_map[unk_id]
        return token_map
    candidates = np.flatnonzero(~np.isin(kept_ids, list(forbidden_targets)))
    if len(dropped) and not len(candidates):
        raise ModelError("every kept token is a special one; no token is left to map the others onto")
    if not np.isfinite(matrix).all():
        raise ModelError("the embeddings hold values that are not finite; no nearest token can be found")
    for ids, own in _by_class(dropped, candidates, kept_ids, classes):
        targets = matrix[kept_ids[own]]
        for start in range(0, len(ids), chunk_size):
            chunk = ids[start : start + chunk_size]
            token_map[chunk] = own[_similarity(matrix[chunk], targets, method).argmax(axis=1)]
    return token_map


def _by_class(
    dropped: np.ndarray, candidates: np.ndarray, kept_ids: np.ndarray, classes: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(source ids of dropped tokens, student ids of those that they may be sent to), one pair a class."""
    if classes is None:
        yield dropped, candidates
        return
    for each in np.unique(classes[dropped]):
        own = candidates[classes[kept_ids[candidates]] == each]
        yield dropped[classes[dropped] == each], own if len(own) else candidates


def token_classes(tokenizer: Any) -> np.ndarray:
    """(V,) whether a token is a byte (2), begins a word or stands alone (1), or goes on within one (0).

    By the signs that the families know: ## of WordPiece, Ġ of byte-level BPE, ▁ of sentencepiece.
    """
    classes = np.zeros(source_size_of(tokenizer), dtype=np.int64)
    prefix = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("continuing_subword_prefix") or ""
    for token, i in tokenizer.get_vocab().items():
        classes[i] = not token.startswith(prefix) if prefix else token.startswith(("Ġ", "▁"))
    classes[[*byte_ids(tokenizer)]] = 2
    return classes


def _similarity(rows: np.ndarray, targets: np.ndarray, method: str) -> np.ndarray:
    """(N, H), (C, H) -> (N, C), the larger the nearer. What is equal for a whole row is left out."""
    if method == "cosine":
        targets = targets / np.maximum(np.linalg.norm(targets, axis=1, keepdims=True), np.finfo(targets.dtype).tiny)
    scores: np.ndarray = rows @ targets.T
    if method == "euclidean":
        scores -= (targets**2).sum(axis=1) / 2
    return scores


def _as_array(embeddings: Any) -> np.ndarray:
    """(V, H) float32, or float64 if it was. Half precision is widened: a product in it would decide by rounding."""
    if hasattr(embeddings, "detach"):
        tensor = embeddings.detach().cpu()
        embeddings = (tensor if str(tensor.dtype) == "torch.float64" else tensor.float()).numpy()
    matrix = np.asarray(embeddings)
    return matrix if matrix.dtype == np.float64 else matrix.astype(np.float32)


def build_vocabulary(
    tokenizer: Any,
    embeddings: Any,
    counts: np.ndarray,
    *,
    keep_ratio: float | None = None,
    size: int | None = None,
    multiple_of: int | None = None,
    selection: str = "closed",
    mapping: str = "inner_product",
    within_class: bool = False,
    keep_words: Iterable[str] = (),
    keep_texts: Iterable[str] = (),
    keep_ids: Iterable[int] = (),
) -> Vocabulary:
    """Choose the kept tokens by count and map the others by embedding.

    embeddings: (V or more, H) the teacher's, of its input or output; rows beyond the tokenizer are dropped.
    counts: (V,) how often each token of `tokenizer` was seen.
    selection: "closed" keeps a token of byte-pair encoding together with what it is merged from; "free" by count alone.
    within_class: map beginnings of words onto such, what goes on within a word likewise.
    keep_texts, keep_ids: texts of which every piece is kept, and source ids that are (`named_ids`).
    """
    source_size = source_size_of(tokenizer)
    if len(counts) != source_size:
        raise ModelError(f"{len(counts)} counts for a tokenizer of {source_size} tokens; count with this tokenizer")
    if len(embeddings) < source_size:
        raise ModelError(
            f"the embeddings have {len(embeddings)} rows, the tokenizer has {source_size} tokens; they do not match"
        )
    if len(embeddings) > source_size:
        logger.info("%d embedding rows beyond the tokenizer are dropped", len(embeddings) - source_size)
    unknown = unknown_id(tokenizer)
    counts = _counts_of_text(tokenizer, counts, unknown)
    required = must_keep_ids(tokenizer, words=keep_words, texts=keep_texts, ids=keep_ids)
    kept_ids = choose_kept_ids(
        counts,
        required,
        keep_ratio=keep_ratio,
        size=size,
        multiple_of=multiple_of,
        parts=parts_to_keep(tokenizer, selection),
    )
    _report_unseen(counts, kept_ids, required)
    if unknown is not None and counts.any():
        report_unknown(tokenizer, float(counts[unknown] / counts.sum()))
    if len(kept_ids) == source_size:
        return Vocabulary.identity(source_size, counts=counts, unknown_id=unknown)
    token_map = map_tokens(
        embeddings[:source_size],
        kept_ids,
        method=mapping,
        forbidden_targets=forbidden_targets(tokenizer),
        unk_id=tokenizer.unk_token_id,
        classes=token_classes(tokenizer) if within_class else None,
    )
    vocabulary = Vocabulary(kept_ids, token_map, mapping, counts, unknown)
    _report_map(tokenizer, vocabulary)
    return vocabulary


def forbidden_targets(tokenizer: Any) -> set[int]:
    """Tokens that no other is mapped onto: special ones, and bytes that are a part of a character or invisible."""
    parts = {i for i, byte in byte_ids(tokenizer).items() if not 0x20 < byte < 0x7F}
    return {int(i) for i in (*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder)} | parts


def _counts_of_text(tokenizer: Any, counts: np.ndarray, unknown: int | None) -> np.ndarray:
    """(V,) counts without special tokens, which stand between documents and are no text; the unknown one is."""
    text = np.array(counts)
    text[[i for i in tokenizer.all_special_ids if i != unknown and i < len(text)]] = 0
    return text


def _report_unseen(counts: np.ndarray, kept_ids: np.ndarray, required: set[int]) -> None:
    unseen = sum(i not in required for i in kept_ids[counts[kept_ids] == 0].tolist())
    if counts.any() and unseen > UNSEEN_SHARE * len(kept_ids):
        logger.warning(
            "vocabulary: %d of %d kept tokens stand nowhere in the text, which uses %d of %d; "
            "count more text, or keep fewer",
            unseen,
            len(kept_ids),
            np.count_nonzero(counts),
            len(counts),
        )


def report_unknown(tokenizer: Any, share: float) -> None:
    """Warn of a text of which the tokenizer cannot spell a notable share."""
    if share > UNKNOWN_SHARE:
        logger.warning(
            "vocabulary: %.2f %% of the text are unknown to the tokenizer (%s), which no keep ratio covers; "
            "give text in its own language and script, or another teacher",
            100 * share,
            tokenizer.unk_token or "the unknown token",
        )


def _report_map(tokenizer: Any, vocabulary: Vocabulary) -> None:
    degrees = in_degrees(vocabulary)
    logger.info(
        "vocabulary: %d of %d tokens kept, coverage %s, unknown %.4f, dropped tokens share %d targets",
        vocabulary.size,
        vocabulary.source_size,
        "not counted" if vocabulary.coverage is None else f"{vocabulary.coverage:.4f}",
        vocabulary.unknown_share,
        degrees.targets,
    )
    hub, taken = degrees.hubs[0] if degrees.hubs else (0, 0)
    if vocabulary.mapping != "unk" and degrees.largest_share > HUB_SHARE and taken >= HUB_SIZE:
        logger.warning(
            "vocabulary: %r takes %d of %d dropped tokens (%.1f %%); another mapping may spread them better",
            tokenizer.convert_ids_to_tokens(hub),
            taken,
            degrees.dropped,
            100 * degrees.largest_share,
        )


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


def _replace(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: a reader sees the old file or the new one."""
    # One name for all writers, so that the next one clears what a kill leaves.
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
