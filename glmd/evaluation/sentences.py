"""How near the vectors of two sentence encoders are, and how similar the two texts of a pair are by one.

similarities(vectors)                # (B, 2, H) -> (B,)
nearness(ours, theirs)               # {"teacher_cosine": 0.98, "teacher_spearman": 0.97}
"""

import numpy as np

from glmd.evaluation.label_metrics import spearman

PARTNERS = 8  # other texts that each is compared with


def similarities(vectors: np.ndarray) -> np.ndarray:
    """(B,) cosines of the two texts of each example, from (B, 2, H); of single texts, (B, 1, H), of each and the next
    one."""
    first, second = (vectors[:, 0], vectors[:, -1])
    return _cosines(first, np.roll(first, -1, axis=0) if vectors.shape[1] == 1 else second)


def nearness(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How near the vectors (B, T, H) of a student are to its teacher's, of the same texts; widths may differ.

    teacher_cosine: mean cosine of both vectors of a text, where both are as wide. teacher_spearman: Spearman's
    correlation of how similar texts are by one and by the other, over pairs of each text with some others, in the order
    of the file.
    """
    ours, theirs = (each.reshape(-1, each.shape[-1]) for each in (ours, theirs))
    found = {}
    if ours.shape == theirs.shape:
        found["teacher_cosine"] = float(_cosines(ours, theirs).mean())
    # Of a few texts each other one once.
    places = range(1, min(PARTNERS, max(1, len(ours) // 2)) + 1)
    pairs = [
        np.concatenate([_cosines(each, np.roll(each, -place, axis=0)) for place in places]) for each in (ours, theirs)
    ]
    return found | {"teacher_spearman": spearman(*pairs)}


def _cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    first, second = (np.asarray(each, dtype=np.float64) for each in (first, second))
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    found: np.ndarray = (first * second).sum(-1) / np.where(lengths > 0, lengths, 1.0)
    return found
