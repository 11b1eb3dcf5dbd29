"""Masked inputs as pure functions of (seed, epoch, example id)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from glmd.losses.labels import IGNORED_LABEL


def random_generator(*counters: int) -> np.random.Generator:
    """A generator that is a function of its counters alone, each in [0, 2**64)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(counters)))


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

    def __call__(self, input_ids: np.ndarray, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(S,) ids -> (S,) masked ids, (S,) labels: the original id where a token was chosen, else -100."""
        epoch, *example = key
        generator = random_generator(1, self.seed, epoch % self.num_maskings if self.num_maskings else epoch, *example)
        chosen = generator.random(len(input_ids)) < self.probability
        chosen &= ~np.isin(input_ids, self.special_ids)
        action = generator.random(len(input_ids))
        random_ids = self.replacement_ids[generator.integers(0, len(self.replacement_ids), len(input_ids))]
        masked = np.where(chosen & (action < 0.8), self.mask_id, input_ids)
        masked = np.where(chosen & (action >= 0.9), random_ids, masked)
        return masked, np.where(chosen, input_ids, IGNORED_LABEL)


def masking_for(tokenizer: Any, probability: float, seed: int, num_maskings: int | None = None) -> Masking | None:
    """The masking of a tokenizer's ids; None at probability 0."""
    if probability == 0:
        return None
    special = np.unique(np.array(tokenizer.all_special_ids, dtype=np.int64))
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), special)
    return Masking(probability, tokenizer.mask_token_id, special, ordinary, seed, num_maskings)


def apply_masking(example: dict[str, Any], key: tuple[int, ...], masking: Masking | None) -> dict[str, Any]:
    if masking is not None:
        example["input_ids"], example["lm_labels"] = masking(example["input_ids"], key)
    return example
