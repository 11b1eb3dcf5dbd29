"""Texts as ids of a tokenizer, without its special tokens, and what says that two tokenizers read alike."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any


def reading_fingerprint(tokenizer: Any) -> str:
    """sha256 of every token with its id, and of how probes are cut (case, accents, white space, merges).

    Not of the tokenizer's files: truncation settings and library versions change those and no token.
    """
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    # Its own words, because a small closed vocabulary cuts every foreign text to unknown tokens alike.
    own = " ".join(word for word, _ in words[:: -(-len(words) // 1000)])
    foreign = "Größe naïve ÀÉ don't 3.14 CamelCase  two\tspaces\nnew line 東京 привет \U0001f600 unhappily re-doing"
    probes = encode_texts(tokenizer, [own, own.lower(), own.upper(), foreign])
    return hashlib.sha256(json.dumps([words, probes]).encode()).hexdigest()


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids without special tokens: a text that writes [MASK] or </s> means these letters, not the token."""
    if not texts:
        return []
    if _encodes_as_its_backend(tokenizer):
        # The same without offsets, which nobody asks for and which one core alone would turn into Python's lists.
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        found = [each.ids for each in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        return _without_spelled(tokenizer, found)
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # longer than the model's input is what a document may be
    )
    return _without_spelled(tokenizer, encoded["input_ids"])


def _without_spelled(tokenizer: Any, texts: list[list[int]]) -> list[list[int]]:
    """The unknown token in the place of a special one that a text spells, where the model of a tokenizer has it as a
    piece, as T5's has </s> and its sentinels.
    """
    unknown = tokenizer.unk_token_id
    # Added tokens that are not special, as runs of spaces, are texts of their own.
    added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    special = {*tokenizer.all_special_ids, *added} - {unknown}
    if unknown is None or not special:
        return texts
    return [[unknown if i in special else i for i in ids] if not special.isdisjoint(ids) else ids for ids in texts]


def _encodes_as_its_backend(tokenizer: Any) -> bool:
    """Whether no code of a tokenizer's own stands between a text and its Rust tokenizer."""
    from transformers import PreTrainedTokenizerFast

    plain, own = PreTrainedTokenizerFast, type(tokenizer)
    return issubclass(own, plain) and (own.__call__, own._encode_plus) == (plain.__call__, plain._encode_plus)
