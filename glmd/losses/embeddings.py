"""Losses on the vectors that sentence encoders make of texts: one value per text.

    per_text = cosine(student_vectors, teacher_vectors)                            # (B,)
    per_text = in_batch_similarity(student_vectors, teacher_vectors)               # (B,), each depends on the others

What is used of such vectors are their cosines; `mse` alone looks at their lengths.
"""

import torch
from torch import Tensor

from glmd.losses.feature_loss import FeatureLoss, directions, same_dtype, widened


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos of the two vectors of a text, as for the final vectors in Jasper and Stella (arXiv:2412.19048).

    student, teacher: (B, H). Returns (B,), in [0, 2].
    """
    student, teacher = widened(student, teacher, 2)
    # Half the square of the distance of directions: 1 - cos, without losing digits where they are near.
    return (directions(student) - directions(teacher)).square().sum(-1) / 2


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the numbers of a vector of their squared differences (Reimers and Gurevych, arXiv:2004.09813).

    Of vectors of length 1 it is `cosine` times 2 / H. student, teacher: (B, H). Returns (B,).
    """
    student, teacher = widened(student, teacher, 2)
    return (student - teacher).square().mean(-1)


def in_batch_similarity(student: Tensor, teacher: Tensor, *, temperature: float = 0.05) -> Tensor:
    """KL(teacher || student) of how similar each text of a batch is to the others: CompRess (arXiv:2010.14713).

    Similarity is the cosine over the temperature, softmax over the other texts of the batch; there these are a memory
    of vectors, and the temperature is 0.04. 0.05 is that of contrastive training (SimCSE, arXiv:2104.08821). Widths may
    differ. `cosine` says where each text lies, this one, which is blind to rotations, which texts are near it.
    student: (B, H). teacher: (B, H'). Returns (B,), 0 where there is no other text.
    """
    student, teacher = same_dtype(student, teacher)
    if len(student) < 2:
        return student.sum(-1) * 0
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = (_log_similarities(each, temperature) for each in (student, teacher))
    return (theirs.exp() * (theirs - ours)).masked_fill(_itself(ours), 0.0).sum(-1)


def _log_similarities(vectors: Tensor, temperature: float) -> Tensor:
    """(B, B) log-probabilities of the other texts; of a text itself what does not matter, but finite."""
    unit = directions(vectors)
    near = unit @ unit.T / temperature
    return near.masked_fill(_itself(near), torch.finfo(near.dtype).min).log_softmax(-1)


def _itself(near: Tensor) -> Tensor:
    return torch.eye(len(near), dtype=torch.bool, device=near.device)


EMBEDDING_LOSSES = {
    "cosine": FeatureLoss(cosine),
    "mse": FeatureLoss(mse),
    "in_batch_similarity": FeatureLoss(in_batch_similarity, same_width=False, least_texts=2),
}
