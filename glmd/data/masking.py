"""Masked inputs as pure functions of (seed, epoch, example id, choice, position).

Every draw is a hash of these counters, computed for all tokens of a batch at once. So nothing about a row depends on
padding, on what else is in its batch, or on what was drawn before.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from glmd.data.batches import Examples, positions_in_rows
from glmd.losses.labels import IGNORED_LABEL

SCHEME = 2  # raised by hand whenever other tokens are masked: a cache of teachers' outputs is of one


def random_generator(*counters: int) -> np.random.Generator:
    """A generator that is a function of its counters alone, each in [0, 2**64)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(counters)))


def draw(states: np.ndarray, counters: np.ndarray | int) -> np.ndarray:
    """(n,) uint64 states and counters -> (n,) uint64: of SplitMix64's stream from each state the output of that number.

    SplitMix64 is that of Steele, Lea and Flood (doi:10.1145/2714064.2660195). An output is a state for further draws.
    """
    z: np.ndarray = states + (np.atleast_1d(np.asarray(counters, dtype=np.uint64)) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


def row_states(keys: np.ndarray, seed: int, num_maskings: int | None) -> np.ndarray:
    """(R, k) of each row the epoch, and the numbers that name it -> (R,) states for the draws of rows."""
    keys = np.atleast_2d(keys).astype(np.uint64)
    epochs = keys[:, 0] % num_maskings if num_maskings else keys[:, 0]
    rows = draw(np.zeros(1, dtype=np.uint64), seed)
    for counter in (epochs, *keys.T[1:]):
        rows = draw(rows, counter)
    return rows


class Corruption(Protocol):
    """What is done to texts before a model reads them, from draws that are functions of (seed, epoch, example)."""

    def corrupt(self, examples: Examples, keys: np.ndarray) -> Examples:
        """Other columns of tokens for the same rows. keys: (R, 3) of each the epoch, example id and choice."""


@dataclass(frozen=True)
class Masking:
    """BERT's masking of inputs (arXiv:1810.04805, section 3.1): 80 % mask, 10 % random, 10 % as it was.

    num_maskings: how many masked copies of a text there are; epochs take them in turn. None: a new one each epoch.
    """

    probability: float
    mask_id: int
    special_ids: np.ndarray  # never chosen
    replacement_ids: np.ndarray  # what a random replacement is drawn from
    seed: int
    num_maskings: int | None = None

    def __call__(
        self, input_ids: np.ndarray, keys: np.ndarray | tuple[int, ...], lengths: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(T,) ids of rows one after another -> (T,) masked ids, (T,) labels: the original of a chosen token or -100.

        keys: (R, k) of each row the epoch, and the numbers that name it. lengths: (R,) tokens of each row; of one row,
        with one key (k,), none.
        """
        lengths = np.array([len(input_ids)]) if lengths is None else lengths
        rows = row_states(np.asarray(keys), self.seed, self.num_maskings)
        tokens = draw(np.repeat(rows, lengths), positions_in_rows(lengths))
        chosen = np.flatnonzero(tokens < np.uint64(int(self.probability * 2**64)))
        chosen = chosen[~np.isin(input_ids[chosen], self.special_ids)]
        originals = input_ids[chosen]
        # Of a further draw the upper half says what becomes of a token, the lower half by which one it is replaced: a
        # fraction of 2**32 times n, whose whole part is as good as equally likely for each of the n.
        fates = draw(tokens[chosen], 0)
        tenths = (fates >> 32) * 10 >> 32
        replacements = self.replacement_ids[(fates & 0xFFFFFFFF) * len(self.replacement_ids) >> 32]
        masked, labels = input_ids.copy(), np.full_like(input_ids, IGNORED_LABEL)
        masked[chosen] = np.where(tenths < 8, self.mask_id, np.where(tenths == 8, originals, replacements))
        labels[chosen] = originals
        return masked, labels

    def corrupt(self, examples: Examples, keys: np.ndarray) -> Examples:
        """The examples with masked ids and `lm_labels`."""
        tokens, found = examples.tokens, self(examples.tokens["input_ids"], keys, examples.lengths)
        return replace(examples, tokens=tokens | dict(zip(("input_ids", "lm_labels"), found, strict=True)))


def masking_for(tokenizer: Any, probability: float, seed: int, num_maskings: int | None = None) -> Masking | None:
    """The masking of a tokenizer's ids; None at probability 0."""
    if probability == 0:
        return None
    special = np.unique(np.array(tokenizer.all_special_ids, dtype=np.int64))
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), special)
    return Masking(probability, tokenizer.mask_token_id, special, ordinary, seed, num_maskings)
