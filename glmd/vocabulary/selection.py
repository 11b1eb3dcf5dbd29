"""Which of a tokenizer's tokens a student keeps: the most frequent, those it cannot do without, what they are made of.

    kept_ids = choose_kept_ids(counts, must_keep_ids(tokenizer), keep_ratio=0.5)

V source tokens, K kept tokens.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from glmd.data.infilling import sentinel_ids
from glmd.errors import ModelError

SELECTIONS = ("closed", "free")


def must_keep_ids(
    tokenizer: Any, *, words: Iterable[str] = (), texts: Iterable[str] = (), ids: Iterable[int] = ()
) -> set[int]:
    """Source ids that no budget may drop.

    These are special, added and sentinel tokens, the unknown token, bytes, every piece of each of `words` (label words,
    names of classes), of `texts` (what a folder itself puts before an input) and of what its chat template writes, and,
    where there are no bytes to spell with, every one-character piece: with them in place the stock tokenizer of the
    exported folder spells a rare word out where it would else give up.

    ids: that the model's configs name, which would be stale if they were dropped; those out of range are left to
        `renumber_config`, which refuses them by their field.
    """
    vocabulary = tokenizer.get_vocab()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    keep_bytes = byte_ids(tokenizer)
    others = (*tokenizer.added_tokens_decoder, *sentinel_ids(tokenizer))
    keep = {int(i) for i in (*tokenizer.all_special_ids, *others, *keep_bytes)}
    if tokenizer.unk_token_id is not None:
        keep.add(int(tokenizer.unk_token_id))
    if model.get("unk_token") in vocabulary:
        keep.add(vocabulary[model["unk_token"]])
    if model.get("unk_id") is not None:
        keep.add(model["unk_id"])
    prefix = model.get("continuing_subword_prefix") or ""
    for token, i in vocabulary.items():
        piece = token[len(prefix) :] if prefix and token.startswith(prefix) else token
        if not keep_bytes and len(piece) == 1:
            keep.add(i)
    for word in words:
        keep |= _word_ids(tokenizer, word)
    keep |= {i for i in ids if 0 <= i < len(tokenizer)}
    for text in (*texts, *template_texts(tokenizer)):
        for spaced in (text, f" {text}", text.strip()):
            keep |= set(tokenizer(spaced, add_special_tokens=False, verbose=False)["input_ids"])
    return keep


def template_texts(tokenizer: Any) -> list[str]:
    """What the chat templates of a tokenizer write themselves: their plain text, and the strings that they put out."""
    template = getattr(tokenizer, "chat_template", None)
    sources = list(template.values()) if isinstance(template, dict) else [template] if template else []
    if not sources:
        return []
    import jinja2
    from jinja2 import nodes

    # As transformers opens them: with {% break %}, and {% generation %}, which jinja2 alone does not know.
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], trim_blocks=True, lstrip_blocks=True)
    found: dict[str, None] = {}
    for source in sources:
        try:
            parsed = environment.parse(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", source))
        except jinja2.TemplateError:  # it cannot be used, and so writes nothing
            continue
        for node in (*parsed.find_all(nodes.Output), *parsed.find_all(nodes.Assign)):  # {% set start = "[INST]" %}
            found |= dict.fromkeys(_strings(node))
    return [text for text in found if text.strip()]


def _strings(node: Any) -> Iterator[str]:
    """The strings that a part of a template may put out; not the names of fields, nor what is compared with."""
    from jinja2 import nodes

    if isinstance(node, nodes.TemplateData):
        yield node.data
    elif isinstance(node, nodes.Const) and isinstance(node.value, str):
        yield node.value
    elif not isinstance(node, nodes.Compare):
        for child in [node.node] if isinstance(node, nodes.Getitem) else node.iter_child_nodes():
            yield from _strings(child)


def byte_ids(tokenizer: Any) -> dict[int, int]:
    """Token id -> the byte it stands for, in tokenizers that spell what they do not know in bytes."""
    vocabulary = tokenizer.get_vocab()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    found: dict[int, int] = {}
    if '"ByteLevel"' in json.dumps([backend.get("pre_tokenizer"), backend.get("decoder")]):
        # Bytes that are visible letters stand for themselves, the others for letters from 256 on, in their order.
        visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
        hidden = [byte for byte in range(256) if byte not in visible]
        letters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
        found |= {vocabulary[letter]: byte for byte, letter in letters.items() if letter in vocabulary}
    if backend["model"].get("byte_fallback"):
        found |= {i: int(token[3:5], 16) for token, i in vocabulary.items() if re.fullmatch("<0x[0-9A-F]{2}>", token)}
    return found


def unknown_id(tokenizer: Any) -> int | None:
    """Source id of what a text gives where the tokenizer cannot spell it; None where bytes spell everything."""
    if len(set(byte_ids(tokenizer).values())) == 256:
        return None
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    found = model.get("unk_id")
    return tokenizer.get_vocab().get(model.get("unk_token")) if found is None else int(found)


def _word_ids(tokenizer: Any, word: str) -> set[int]:
    """Ids of all pieces of a word, at the start of a text and after a space."""
    unknown = tokenizer.unk_token_id
    ids: set[int] = set()
    for text in (word, f" {word}"):
        pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not pieces or (unknown in pieces and word != tokenizer.unk_token):
            raise ModelError(f"keep_words: the tokenizer does not know {word!r}; remove it or spell it otherwise")
        ids.update(pieces)
    return ids


def merge_parts(model: dict[str, Any]) -> dict[int, tuple[int, int]]:
    """The two tokens that a token of byte-pair encoding is merged from last; {} for other models.

    model: of a tokenizer.json. A token has one derivation: what the merges make of its own characters. Within a longer
    text they do the same, as no merge across the borders of a token that is there can have happened. A token that they
    do not make at all has no parts.
    """
    if model.get("type") != "BPE":
        return {}
    if model.get("continuing_subword_prefix"):
        raise ModelError("tokenizer.json: byte-pair encoding with a continuing_subword_prefix is not supported")
    ids: dict[str, int] = model["vocab"]
    suffix = model.get("end_of_word_suffix") or ""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    ranks = {(left, right): rank for rank, (left, right) in enumerate(pairs)}
    found = {}
    for token, i in ids.items():
        parts = _last_merge(token, ranks, suffix)
        if parts is not None:
            found[i] = (ids[parts[0]], ids[parts[1]])
    return found


def _last_merge(token: str, ranks: dict[tuple[str, str], int], suffix: str) -> tuple[str, str] | None:
    symbols = list(token)
    if suffix and token.endswith(suffix):
        symbols = [*token[: -len(suffix)]]
        symbols[-1:] = [symbols[-1] + suffix] if symbols else [suffix]
    while len(symbols) > 2:
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(symbols)))
        if rank == len(ranks):
            return None
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return (symbols[0], symbols[1]) if len(symbols) == 2 and (symbols[0], symbols[1]) in ranks else None


# GPUs multiply by a matrix of another number of rows three to six times slower, in training and in use; in a small
# vocabulary that is nothing beside what is asked for.
ALIGNED, SMALL = 64, 4096


def choose_kept_ids(
    counts: np.ndarray,
    must_keep: Iterable[int],
    *,
    keep_ratio: float | None = None,
    size: int | None = None,
    multiple_of: int | None = None,
    parts: Mapping[int, Sequence[int]] | None = None,
) -> np.ndarray:
    """The K most frequent tokens, those of `must_keep` first. Equal counts: the lower id.

    counts: (V,) how often each source token was seen.
    parts: of `merge_parts`; a token is then kept together with all that it is merged from, and passed over where these
        are more than the budget has left.
    Exactly one of keep_ratio (a share of V) and size; multiple_of rounds their K up, that of a ratio to a multiple of
        ALIGNED where it is not given and V is at least SMALL. Returns (K,) ascending ids.
    """
    parts = parts or {}
    counts = np.asarray(counts)
    if counts.ndim != 1 or not len(counts) or not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
        raise ModelError(f"counts must be a row of integers of at least 0, got {counts.dtype} {counts.shape}")
    kept_size = _kept_size(len(counts), keep_ratio, size, multiple_of)
    required = np.unique(np.fromiter(must_keep, dtype=np.int64))
    if len(required) and not 0 <= required[0] <= required[-1] < len(counts):
        raise ModelError(f"must_keep holds ids outside 0 to {len(counts) - 1}")
    closed: set[int] = set()
    for i in required.tolist():
        closed |= _with_parts(i, parts, closed)
    required = np.array(sorted(closed), dtype=np.int64)
    if kept_size < len(required):
        found = f"{kept_size} of {len(counts)} tokens would be kept, but {len(required)} must be"
        what = "special tokens, bytes, single characters, keep_words" + (", all they are merged from" if parts else "")
        least = math.ceil(len(required) / len(counts) * 10_000) / 10_000
        remedy = f"keep_ratio to at least {least:.4f}" if size is None else f"size to at least {len(required)}"
        raise ModelError(f"{found} ({what}); raise {remedy}")
    is_required = np.zeros(len(counts), dtype=bool)
    is_required[required] = True
    # The last key sorts first: required, then frequent, then low ids.
    order = np.lexsort((np.arange(len(counts)), -counts.astype(np.int64), ~is_required))
    if not parts:
        return np.sort(order[:kept_size]).astype(np.int64)
    kept = closed
    # Some token always has all its parts kept, so every round finds one more until the budget is used up.
    while len(kept) < kept_size:
        for i in order.tolist():
            needed = _with_parts(i, parts, kept)
            if len(kept) + len(needed) <= kept_size:
                kept |= needed
    return np.array(sorted(kept), dtype=np.int64)


def _with_parts(token_id: int, parts: Mapping[int, Sequence[int]], kept: set[int]) -> set[int]:
    """The token and all that it is merged from, but for those that are kept already."""
    needed: set[int] = set()
    to_visit = [token_id]
    while to_visit:
        i = to_visit.pop()
        if i not in kept and i not in needed:
            needed.add(i)
            to_visit += parts.get(i, ())
    return needed


def _kept_size(source_size: int, keep_ratio: float | None, size: int | None, multiple_of: int | None) -> int:
    if (keep_ratio is None) == (size is None):
        raise ModelError(f"give exactly one of keep_ratio and size, got keep_ratio={keep_ratio}, size={size}")
    if keep_ratio is not None:
        if not 0 < keep_ratio <= 1:
            raise ModelError(f"keep_ratio must be in (0, 1], got {keep_ratio}")
        # As a fraction of the number as written: 0.29 of 100 is 29, while int(0.29 * 100) is 28.
        kept_size = int(Fraction(str(keep_ratio)) * source_size)
    else:
        assert size is not None
        if size > source_size:
            raise ModelError(f"size is {size}, but there are {source_size} tokens; give at most as many")
        kept_size = size
    if kept_size < 1:
        raise ModelError(f"at least one token must be kept, got keep_ratio={keep_ratio}, size={size} of {source_size}")
    if multiple_of is None and keep_ratio is not None and source_size >= SMALL:
        multiple_of = ALIGNED
    if multiple_of is not None:
        if multiple_of < 1:
            raise ModelError(f"multiple_of must be at least 1, got {multiple_of}")
        if multiple_of > source_size:
            raise ModelError(f"multiple_of is {multiple_of}, more than the {source_size} tokens there are")
        kept_size = -(-kept_size // multiple_of) * multiple_of
    return min(kept_size, source_size)


def parts_to_keep(tokenizer: Any, selection: str) -> dict[int, tuple[int, int]]:
    """What `choose_kept_ids` needs for a selection. Raises ModelError for one that there is not or does nothing."""
    if selection not in SELECTIONS:
        raise ModelError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if selection == "free" and model["type"] != "BPE":
        raise ModelError(f"selection free has no effect: tokens of {model['type']} are not merged; remove it")
    return merge_parts(model) if selection == "closed" else {}


def source_size_of(tokenizer: Any) -> int:
    """V. Ids must be 0..V-1: a hole would be a row that no token owns."""
    size = len(tokenizer)
    largest = max(tokenizer.get_vocab().values())
    if largest != size - 1:
        raise ModelError(f"the tokenizer has {size} tokens but ids up to {largest}; ids with holes are not supported")
    return size
