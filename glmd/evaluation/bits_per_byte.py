"""Bits per byte: how short a code for a text a causal LM gives, so that models with other vocabularies can be compared.

    scores = evaluate_text("SmolLM2-135M", ["held_out.txt"], max_length=1024)

Total -log2 p of the text's tokens, divided by the bytes of the text in UTF-8. That compares vocabularies only where the
tokens give the text back. The mapped tokenizer of a compressed student does not: many tokens are mapped onto one, whose
probability is that of a class. So a student is measured with the stock tokenizer of its folder, which loses nothing;
with the mapped one, what it takes to name the token of each class is added.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from glmd.data.blocks import block_frame
from glmd.data.conversations import tokens_within
from glmd.data.encoding import encode_texts
from glmd.errors import ModelError
from glmd.losses.finite import not_finite
from glmd.vocabulary.tokenizer import GlmdTokenizer, stock_tokenizer, vocabulary_of


def score_text(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, max_length: int, accelerator: Accelerator
) -> dict[str, float]:
    """Bits per byte of documents, with the model's own tokenizer; the same on every rank.

    tokens_per_byte and bits_per_byte: with the stock tokenizer. restored: share of the documents that the tokenizer
    gives back to the letter; of the others bits_per_byte is no code.
    For the mapped tokenizer of a compressed student also
    exact_bits_per_byte: a code for the same text, from the two that follow;
    mapped_bits_per_byte: of the kept tokens that all tokens were mapped onto, not comparable between vocabularies;
    naming_bits_per_byte: to say which token of its class each was (`naming_bits`);
    dropped: share of the tokens that were mapped onto others.
    """
    size = _bytes(texts)
    start = _start(tokenizer)
    is_exact = isinstance(tokenizer, GlmdTokenizer)
    ordinary = stock_tokenizer(tokenizer) if is_exact else tokenizer
    ids = encode_texts(ordinary, texts)
    given_back = [ordinary.decode(each, clean_up_tokenization_spaces=False) for each in ids]
    restored = sum(back == text for back, text in zip(given_back, texts, strict=True))
    bits = text_bits(model, ids, start=start, max_length=max_length, accelerator=accelerator)
    scores = {
        "tokens_per_byte": sum(map(len, ids)) / size,
        "bits_per_byte": bits / size,
        "restored": restored / len(texts),
    }
    if is_exact:
        vocabulary = vocabulary_of(tokenizer)
        source_ids = encode_texts(tokenizer.source_tokenizer, texts)
        mapped = [vocabulary.token_map[each].tolist() for each in source_ids]
        mapped_bits = text_bits(model, mapped, start=start, max_length=max_length, accelerator=accelerator)
        is_dropped = np.isin(np.arange(vocabulary.source_size), vocabulary.dropped_ids)
        everything = np.concatenate([np.array(each, dtype=np.int64) for each in source_ids])
        naming = naming_bits(vocabulary.token_map, is_dropped, everything)
        scores |= {
            "exact_bits_per_byte": (mapped_bits + naming) / size,
            "mapped_bits_per_byte": mapped_bits / size,
            "naming_bits_per_byte": naming / size,
            "dropped": float(is_dropped[everything].mean()),
        }
    return scores


def score_conversations(
    model: nn.Module,
    tokenizer: Any,
    conversations: Sequence[tuple[str, Sequence[tuple[int, int]]]],
    *,
    max_length: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Bits per byte of conversations as the chat template wrote them, marks of turns included; the same on every rank.

    conversations: of each its text, and from where to where in it an assistant speaks; where that is told of any, there
    are figures for these tokens (`assistant_bits_per_byte`) and for the `others` too. The first token of each
    conversation is not scored, and a compressed student reads by the stock tokenizer of its folder.
    """
    ordinary = stock_tokenizer(tokenizer) if isinstance(tokenizer, GlmdTokenizer) else tokenizer
    texts = [text for text, _ in conversations]
    read = ordinary(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, places = read["input_ids"], read["offset_mapping"]
    said = [tokens_within(each, turns) for each, (_, turns) in zip(places, conversations, strict=True)]
    options: dict[str, Any] = {"start": (), "max_length": max_length, "accelerator": accelerator}
    bits, of_assistant = bits_of(model, ids, said, **options)
    scores = {"tokens_per_byte": sum(map(len, ids)) / _bytes(texts), "bits_per_byte": bits / _bytes(texts)}
    spoken = [text[first:stop] for text, turns in conversations for first, stop in turns]
    if spoken:
        scores["assistant_bits_per_byte"] = of_assistant / _bytes(spoken)
        scores["others_bits_per_byte"] = (bits - of_assistant) / (_bytes(texts) - _bytes(spoken))
    return scores


def text_bits(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    *,
    start: Sequence[int],
    max_length: int,
    accelerator: Accelerator,
) -> float:
    """-log2 of the probability that a causal LM gives to all ids of all texts, summed.

    start: ids that stand before the first id of every window, so that it is predicted too; not scored themselves.
        Without such the first id of a text is not scored.
    Raises NumericsError, alike on every rank, where they are not finite.
    A text longer than max_length is read in overlapping windows, each id scored once.
    """
    chosen = [np.ones(len(each), dtype=bool) for each in texts]
    return bits_of(model, texts, chosen, start=start, max_length=max_length, accelerator=accelerator)[0]


@torch.no_grad()
def bits_of(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    chosen: Sequence[np.ndarray],
    *,
    start: Sequence[int],
    max_length: int,
    accelerator: Accelerator,
) -> tuple[float, float]:
    """The same, and beside it that of the chosen ids alone. chosen: (S,) bool of each text."""
    model.eval()
    room = max_length - len(start)
    total, of_chosen, bad = 0.0, 0.0, set()
    jobs = [(number, text, *window) for number, text in enumerate(texts) for window in windows(len(text), room)]
    mine = jobs[accelerator.process_index :: accelerator.num_processes]
    spare = jobs[: -(-len(jobs) // accelerator.num_processes) - len(mine)]  # a sharded model waits for all at each call
    for place, (number, text, begin, scored, end) in enumerate([*mine, *spare]):
        ids = torch.tensor([*start, *text[begin:end]], device=accelerator.device)
        first = max(1, len(start) + scored - begin)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, first - 1 : -1]
        if place >= len(mine):
            continue
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = nn.functional.cross_entropy(logits, ids[first:], reduction="none")
        wanted = torch.from_numpy(chosen[number][begin + first - len(start) : end])
        total += losses.sum().item() / math.log(2)
        of_chosen += losses[wanted.to(losses.device)].sum().item() / math.log(2)
        if not math.isfinite(total):
            bad.add(number)
            total = 0.0
    found = sorted(set().union(*gather_object([bad])))
    if found:
        raise not_finite(getattr(model, "name_or_path", "") or type(model).__name__, found, "the predictions")
    sums = np.sum(gather_object([np.array([total, of_chosen])]), axis=0)
    return float(sums[0]), float(sums[1])


def windows(length: int, room: int) -> Iterator[tuple[int, int, int]]:
    """(begin, scored, end) of each window over `length` ids: it reads ids[begin:end] and scores ids[scored:end].

    A window has at most `room` ids. All but the first read again the last half of what the one before has read, so no
    id but those of the first window is predicted from less than half a window.
    """
    begin = scored = end = 0
    while end < length:
        end = min(begin + room, length)
        yield begin, scored, end
        begin, scored = end - room // 2, end


def naming_bits(token_map: np.ndarray, is_dropped: np.ndarray, source_ids: np.ndarray) -> float:
    """Bits that say which source tokens a row of mapped ones was, for one who knows the map alone.

    Of the n tokens whose class has more than one member: how many and which of them were dropped ones,
    log2(n + 1) + log2(n over d); and for each of these d which of its class, log2 of their number.
    token_map: (V,) student id of each source id. is_dropped: (V,) bool. source_ids: (N,).
    """
    dropped_in_class = np.bincount(token_map[is_dropped], minlength=token_map.max() + 1)[token_map[source_ids]]
    n, ours = int((dropped_in_class > 0).sum()), dropped_in_class[is_dropped[source_ids]]
    ways = math.lgamma(n + 1) - math.lgamma(len(ours) + 1) - math.lgamma(n - len(ours) + 1)
    return math.log2(n + 1) + ways / math.log(2) + float(np.log2(ours).sum())


def _start(tokenizer: Any) -> list[int]:
    """What stands before a text: what the tokenizer puts there, else its token for the beginning or the end of one."""
    start: list[int] = block_frame(tokenizer)[0].tolist()
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if not start and token_id is not None:
            start = [token_id]
    if not start:
        raise ModelError("the tokenizer has neither a bos_token nor an eos_token to predict the first token from")
    return start


def _bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)
