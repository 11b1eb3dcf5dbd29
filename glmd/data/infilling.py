"""Texts with spans left out for an encoder, and what its decoder is to say of them.

    infilling = infilling_for(tokenizer, probability=None, seed=0)
    examples = infilling.corrupt(examples, keys)        # input_ids for the encoder; target_ids and lm_labels beside it

With sentinel tokens as T5 was pretrained (arXiv:1910.10683, section 3.1.4): each span becomes a sentinel of its own,
and the decoder says the sentinels, each before its span. With a mask token as BART (arXiv:1910.13461, section 2.2): a
span of any length, also of none, becomes one mask, and the decoder says the whole text. As with masking every draw is a
function of seed, epoch, example and position alone.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from glmd.data.batches import Examples, Grid
from glmd.data.blank_infilling import BlankInfilling, blank_infilling_for
from glmd.data.blocks import block_frame
from glmd.data.masking import Corruption, draw, masking_for, row_states
from glmd.errors import ConfigError
from glmd.losses.labels import IGNORED_LABEL

SCHEME = 1  # raised by hand whenever other spans are drawn: a cache of teachers' outputs is of one
SPAN = 3  # tokens of a span on average, in both papers
SENTINEL_SHARE, MASK_SHARE = 0.15, 0.3  # of tokens that are in spans, likewise
# P(a span has at most so many tokens), by Poisson's law.
POISSON = np.cumsum([math.exp(-SPAN) * SPAN**n / math.factorial(n) for n in range(20)])


def sentinel_ids(tokenizer: Any) -> np.ndarray:
    """Ids of `<extra_id_0>`, `<extra_id_1>` and so on, as T5's tokenizers have them; none where one is missing."""
    vocabulary = tokenizer.get_vocab()
    found = {}
    for token, i in vocabulary.items():
        match = re.fullmatch(r"▁?<extra_id_(\d+)>", token)
        if match:
            found[int(match[1])] = i
    return np.array([found[n] for n in range(len(found)) if found.keys() == set(range(len(found)))], dtype=np.int64)


@dataclass(frozen=True)
class SpanInfilling:
    """Spans of a text for a decoder to say.

    probability: share of tokens in spans. sentinels: (n,) ids, or none: then each span becomes a mask token.
    special_ids: never in a span. end: what the tokenizer puts behind a text, which ends what is said of sentinels.
    num_maskings: as of Masking.
    """

    probability: float
    sentinels: np.ndarray
    mask_id: int  # unused beside sentinels
    special_ids: np.ndarray
    end: np.ndarray
    seed: int
    num_maskings: int | None = None

    def corrupt(self, examples: Examples, keys: np.ndarray) -> Examples:
        """Rows of a text each, with spans left out, and targets. keys: (R, k) as of Masking."""
        ends = np.cumsum(examples.lengths)[:-1]
        rows, states = np.split(examples.tokens["input_ids"], ends), row_states(keys, self.seed, self.num_maskings)
        made = [self._of_row(row, state) for row, state in zip(rows, states, strict=True)]
        read, said, labels = zip(*made, strict=True)
        targets = {"target_ids": np.concatenate(said), "lm_labels": np.concatenate(labels)}
        return replace(
            examples,
            lengths=np.array([len(each) for each in read]),
            tokens={"input_ids": np.concatenate(read)},
            targets=Grid(np.array([len(each) for each in said]), targets),
        )

    def num_targets(self, length: int) -> int:
        """Tokens that are said of a text of so many, at most."""
        noise, spans = self._noise(length)
        return noise + spans + len(self.end) if len(self.sentinels) else length

    def require_length(self, length: int, key: str) -> None:
        """Refuse texts with more spans than there are sentinels. Raises ConfigError."""
        spans, most = self._noise(length)[1], len(self.sentinels)
        if most and spans > most:
            raise ConfigError(
                f"{key} is {length}: its {spans} spans are more than the tokenizer's {most} sentinel tokens; give a "
                "smaller one, or a smaller mlm_probability"
            )

    def _noise(self, length: int) -> tuple[int, int]:
        """How many of so many tokens are in spans, and in how many."""
        if length < 2:
            return 0, 0
        noise = min(max(round(length * self.probability), 1), length - 1)
        return noise, min(max(round(noise / SPAN), 1), length - noise)

    def _of_row(self, row: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is read and said of a text, and the labels: of what was in spans, elsewhere -100."""
        places = np.flatnonzero(~np.isin(row, self.special_ids))
        chosen, inserted = (self._spans if len(self.sentinels) else self._poisson_spans)(len(places), state)
        noise = np.zeros(len(row), dtype=bool)
        noise[places[chosen]] = True
        starts = np.flatnonzero(noise & ~np.r_[False, noise[:-1]])
        if not len(self.sentinels):
            labels = np.where(noise, row, IGNORED_LABEL)
            read, kept = row.copy(), ~noise
            read[starts], kept[starts] = self.mask_id, True
            before = np.r_[places, places[-1:] + 1][inserted]  # a place, or behind the last one
            return np.insert(read, before, self.mask_id)[np.insert(kept, before, True)], row, labels
        # A special token divides a span: of more spans than there are sentinels the last ones stay.
        if len(starts) > len(self.sentinels):
            noise[starts[len(self.sentinels)] :] = False
            starts = starts[: len(self.sentinels)]
        names = self.sentinels[: len(starts)]
        read, kept = row.copy(), ~noise
        read[starts], kept[starts] = names, True
        is_said = np.insert(noise, starts, True)
        said = np.r_[np.insert(row, starts, names)[is_said], self.end]
        labels = np.r_[np.insert(row, starts, IGNORED_LABEL)[is_said], np.full(len(self.end), IGNORED_LABEL)]
        return read[kept], said, labels

    def _spans(self, count: int, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of so many tokens are in spans, and none that are inserted: text and span take turns, text first."""
        noise, spans = self._noise(count)
        if not spans:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        texts, lengths = (_parts(total, spans, draw(state, i)) for i, total in enumerate((count - noise, noise)))
        is_noise = np.repeat(np.tile([False, True], spans), np.stack([texts, lengths], axis=1).ravel())
        return np.flatnonzero(is_noise), np.empty(0, dtype=np.int64)

    def _poisson_spans(self, count: int, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of so many tokens are in spans, no two of which touch, and before which a span of none stands."""
        noise, spans = self._noise(count)
        if not spans:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        of_lengths, of_slots = draw(state, 0), draw(state, 1)
        lengths = np.searchsorted(POISSON, _fractions(of_lengths, 2 * noise + 8)).clip(0, len(POISSON) - 1)
        total = np.cumsum(lengths)
        lengths = lengths[: np.searchsorted(total, noise) + 1]  # no further span once there are so many tokens
        lengths[-1:] -= max(0, int(lengths.sum()) - noise)
        slots = np.argsort(draw(of_slots, np.arange(count - noise + 1)), kind="stable")  # before tokens, and at the end
        lengths = np.r_[lengths[lengths > 0], lengths[lengths == 0]][: len(slots)]
        slots = slots[: len(lengths)]
        here = np.zeros(count - noise + 1, dtype=np.int64)
        here[slots] = lengths
        # Token t of the text has the spans of all slots up to its own before it.
        first = np.arange(len(here)) + np.cumsum(here) - here
        chosen = np.concatenate([np.arange(first[s], first[s] + here[s]) for s in slots] or [np.empty(0)])
        return np.sort(chosen).astype(np.int64), np.sort(first[slots[lengths == 0]])


def _parts(total: int, count: int, state: np.ndarray) -> np.ndarray:
    """(count,) numbers of at least 1 that are `total` together, all such equally likely."""
    cuts = np.sort(np.argsort(draw(state, np.arange(total - 1)), kind="stable")[: count - 1]) + 1
    return np.diff(np.r_[0, cuts, total])


def _fractions(state: np.ndarray, count: int) -> np.ndarray:
    """(count,) in [0, 1), each a function of state and place."""
    return (draw(state, np.arange(count)) >> 11) * 2.0**-53


def infilling_for(
    tokenizer: Any, probability: float | None, seed: int, num_maskings: int | None = None
) -> SpanInfilling:
    """The infilling that a tokenizer is made for. probability: None for that of its paper.

    Raises ConfigError for a tokenizer that has neither sentinel tokens nor a mask token.
    """
    sentinels = sentinel_ids(tokenizer)
    if not len(sentinels) and tokenizer.mask_token_id is None:
        raise ConfigError(
            f"teacher: {type(tokenizer).__name__} has neither sentinel tokens (<extra_id_0> and on) nor a mask token, "
            "so no span can be left out for an encoder-decoder; give the tokenizer that it was pretrained with"
        )
    special = np.unique(np.array([*tokenizer.all_special_ids, *sentinels], dtype=np.int64))
    share = SENTINEL_SHARE if len(sentinels) else MASK_SHARE
    return SpanInfilling(
        share if probability is None else probability,
        sentinels,
        -1 if tokenizer.mask_token_id is None else tokenizer.mask_token_id,
        special,
        block_frame(tokenizer)[1],
        seed,
        num_maskings,
    )


Infilling = SpanInfilling | BlankInfilling


def corruption_for(
    tokenizer: Any, kind: str, probability: float, seed: int, num_maskings: int | None = None
) -> Corruption | None:
    """What becomes of a text before a model of a kind (`models.heads.LMKind`) reads it; None at probability 0."""
    if kind == "encoder-decoder" and probability:
        return infilling_for(tokenizer, probability, seed, num_maskings)
    if kind == "blank-infilling" and probability:
        return blank_infilling_for(tokenizer, seed, ratio=probability, num_maskings=num_maskings)
    return masking_for(tokenizer, probability, seed, num_maskings)
