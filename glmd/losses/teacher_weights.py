"""How much each of several teachers counts for each row (a token or an example): their outputs in, (T, N) out.

    weights = WEIGHTINGS["label_loss"].function(teachers, student, labels)     # (T, N), constants
    total = (weights * losses).sum()                                           # losses: (T, N), to each teacher

teachers: (T, N, K) logits, the first teacher's first; student: (N, K); labels: (N,) int64, None where rows have none.
A choice that is -inf (padding) does not exist.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glmd.losses.head import Head
from glmd.losses.linear import chunk_tokens


@dataclass(frozen=True)
class Weighting:
    """A row of the table.

    function: (teachers, student, labels) -> (T, N); None where the weights are learned or drawn. survival: the chance
        of each teacher to count 1 for a row, and not 0. constant: the same weight of
        every teacher for all rows, so that no logits need be made for it. needs_labels: of the rows. least_texts:
        how many texts of a batch it needs; where these are more than one, the weight of each depends on the others.
    """

    function: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None
    constant: bool = False
    needs_labels: bool = False
    least_texts: int = 1
    survival: float | None = None

    @property
    def is_learned(self) -> bool:
        """Whether a policy that is trained with the student gives the weights."""
        return self.function is None and self.survival is None


def mean(teachers: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:
    """All alike, 1 / T. For the forward KL this has the gradient of the KL to the teachers' mean probability."""
    return teachers.new_full(teachers.shape[:2], 1 / len(teachers))


def add(teachers: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:
    """All alike, 1."""
    return teachers.new_ones(teachers.shape[:2])


def first(teachers: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:
    """The first teacher alone."""
    return torch.eye(len(teachers), 1, dtype=teachers.dtype, device=teachers.device).expand(teachers.shape[:2])


def label_loss(teachers: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:
    """1 / (1 + cross-entropy of the label): who is right counts more, as in MT-BERT (arXiv:2106.01023)."""
    return 1 / (1 + label_losses(teachers, labels))


def label_losses(logits: Tensor, labels: Tensor | None) -> Tensor:
    """(..., N) cross-entropy of the labels (N,) for (..., N, K) logits."""
    assert labels is not None, "rows with labels"
    places = labels.expand(logits.shape[:-1])[..., None]
    return -logits.log_softmax(-1).gather(-1, places)[..., 0]


def uncertainty(teachers: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:
    """The last teacher counts by the student's entropy over its largest, and the first by what is left to 1.

    As the soft selection by instance of Dynamic KD (arXiv:2109.11295, section 3): the teachers stand from the largest
    to the smallest, and an unsure student learns from the smallest. With more than two the weight lies between the
    two teachers nearest to that place, in proportion.
    """
    place = _uncertainty(student) * (len(teachers) - 1)
    numbers = torch.arange(len(teachers), dtype=place.dtype, device=place.device)
    return (1 - (numbers[:, None] - place).abs()).clamp(min=0)


def uncertainty_rank(teachers: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:
    """One teacher for each row, by the rank of the student's entropy in the batch.

    As the hard selection of Dynamic KD (arXiv:2109.11295, section 3): the rows are divided evenly, and the most
    uncertain ones learn from the last teacher, which is the smallest.
    """
    order = _uncertainty(student).argsort(descending=True, stable=True)
    rows, count = len(order), len(teachers)
    chosen = torch.empty_like(order)
    chosen[order] = count - 1 - torch.arange(rows, device=order.device) * count // max(1, rows)
    return (torch.arange(count, device=order.device)[:, None] == chosen).to(teachers.dtype)


def _uncertainty(logits: Tensor) -> Tensor:
    """(N,) the entropy of a softmax, divided by that of equal probabilities: in [0, 1]."""
    log_probabilities = _widened(logits).log_softmax(-1)
    probabilities = log_probabilities.exp()
    entropy = -(probabilities * log_probabilities.masked_fill(probabilities == 0, 0.0)).sum(-1)
    choices = (logits > -math.inf).sum(-1).clamp(min=2)
    return (entropy / choices.log()).clamp(0, 1)


WEIGHTINGS = {
    "mean": Weighting(mean, constant=True),
    "sum": Weighting(add, constant=True),
    "first": Weighting(first, constant=True),
    "label_loss": Weighting(label_loss, needs_labels=True),
    "uncertainty": Weighting(uncertainty),
    "uncertainty_rank": Weighting(uncertainty_rank, least_texts=2),
    "dropout": Weighting(None, survival=0.75),  # as in DGKD (arXiv:2009.08825)
    "policy": Weighting(None, needs_labels=True),  # `distillation.teacher_policy`
}


@torch.no_grad()
def linear_weights(weighting: Weighting, hidden: Tensor, head: Head, teachers: Sequence[tuple[Tensor, Head]]) -> Tensor:
    """(T, N) the weights of tokens, from hidden states before the final linear maps, chunk by chunk.

    hidden: (N, H) of the student, teachers: (N, H of it) and head of each. Costs their products once more.
    """
    assert weighting.function is not None, "not learned"
    size = chunk_tokens(len(hidden), len(head.weight), hidden.device.type)
    found = [hidden.new_empty(len(teachers), 0, dtype=torch.promote_types(hidden.dtype, torch.float32))]
    for start in range(0, len(hidden), size):
        chunk = slice(start, start + size)
        theirs = torch.stack([_widened(each.logits(states[chunk])) for states, each in teachers])
        found.append(weighting.function(theirs, _widened(head.logits(hidden[chunk])), None))
    return torch.cat(found, 1)


def _widened(logits: Tensor) -> Tensor:
    """In float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
