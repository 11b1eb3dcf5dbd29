"""Choose a vocabulary by counts and embeddings, and report what it drops."""

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np

from glmd.errors import ModelError
from glmd.vocabulary.mapping import forbidden_targets, map_tokens, token_classes
from glmd.vocabulary.selection import choose_kept_ids, must_keep_ids, parts_to_keep, source_size_of, unknown_id
from glmd.vocabulary.vocabulary import Vocabulary, in_degrees

logger = logging.getLogger(__name__)


# One target that takes more than this share of the dropped tokens is a hub that says nothing about them.
HUB_SHARE = 0.05


HUB_SIZE = 10  # of a few dropped tokens some share one by chance


UNSEEN_SHARE = 0.1  # of kept tokens that are kept by nothing but their low ids, because the corpus has none of them


UNKNOWN_SHARE = 0.01  # of counted tokens; well-suited tokenizers meet a tenth of it


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
    keep_texts, keep_ids: texts of which every piece is kept, and source ids that are (`ids_to_keep`).
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
