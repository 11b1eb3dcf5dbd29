"""Where the tokens that are dropped go: to the nearest kept one (arXiv:2306.06625, section 3.3)."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from glmd.errors import ModelError
from glmd.vocabulary.selection import byte_ids, source_size_of

MAPPINGS = ("inner_product", "cosine", "euclidean", "unk")


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

    embeddings: (V, H) array or tensor; the teacher's, as they are, neither centered nor normalized.
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


def forbidden_targets(tokenizer: Any) -> set[int]:
    """Tokens that no other is mapped onto: special ones, and bytes that are a part of a character or invisible."""
    parts = {i for i, byte in byte_ids(tokenizer).items() if not 0x20 < byte < 0x7F}
    return {int(i) for i in (*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder)} | parts
