"""How much each of several teachers counts for a row: against the plainest loops, in float64."""

import math

import pytest
import torch
from torch import Tensor

from glmd.losses.head import Head
from glmd.losses.teacher_weights import WEIGHTINGS, linear_weights

N, K = 9, 5
PLAIN = [name for name, each in WEIGHTINGS.items() if each.function is not None]


def rows(teachers: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(T, N, K) and (N, K) logits, (N,) labels; the last choice of the first two rows does not exist."""
    generator = torch.Generator().manual_seed(seed)
    theirs = 3 * torch.randn(teachers, N, K, generator=generator, dtype=torch.float64)
    ours = 3 * torch.randn(N, K, generator=generator, dtype=torch.float64)
    theirs[:, :2, -1] = ours[:2, -1] = -math.inf
    return theirs, ours, torch.randint(0, K - 1, (N,), generator=generator)


def probabilities(logits: Tensor) -> list[float]:
    weights = [math.exp(each) for each in logits.tolist()]
    return [each / sum(weights) for each in weights]


def entropy_share(logits: Tensor) -> float:
    """Of the largest entropy that so many choices have."""
    found = [each for each in probabilities(logits) if each]
    return -sum(each * math.log(each) for each in found) / math.log(sum(each > -math.inf for each in logits.tolist()))


def twin(name: str, theirs: Tensor, ours: Tensor, labels: Tensor) -> list[list[float]]:
    count = len(theirs)
    if name == "mean":
        return [[1 / count] * N] * count
    if name == "sum":
        return [[1.0] * N] * count
    if name == "first":
        return [[float(t == 0)] * N for t in range(count)]
    if name == "label_loss":
        return [[1 / (1 - math.log(probabilities(theirs[t, n])[labels[n]])) for n in range(N)] for t in range(count)]
    shares = [entropy_share(each) for each in ours]
    if name == "uncertainty_rank":
        found = [[0.0] * N for _ in range(count)]
        for rank, n in enumerate(sorted(range(N), key=lambda n: shares[n])):  # the surest come first
            rank_from_unsure = N - 1 - rank
            found[count - 1 - rank_from_unsure * count // N][n] = 1.0
        return found
    assert name == "uncertainty"
    found = []
    for t in range(count):
        found.append([max(0.0, 1 - abs(t - share * (count - 1))) for share in shares])
    return found


@pytest.mark.parametrize("teachers", [1, 2, 3])
@pytest.mark.parametrize("name", PLAIN)
def test_the_weights_are_those_of_a_loop(name: str, teachers: int) -> None:
    theirs, ours, labels = rows(teachers)
    found = WEIGHTINGS[name].function(theirs, ours, labels)  # type: ignore[misc]
    assert found.shape == (teachers, N) and not found.requires_grad
    torch.testing.assert_close(found, torch.tensor(twin(name, theirs, ours, labels), dtype=torch.float64))


@pytest.mark.parametrize("name", ["mean", "first", "uncertainty", "uncertainty_rank"])
def test_they_sum_to_one_for_each_row(name: str) -> None:
    found = WEIGHTINGS[name].function(*rows(3))  # type: ignore[misc]
    torch.testing.assert_close(found.sum(0), torch.ones(N, dtype=torch.float64))


def test_an_unsure_student_learns_from_the_last_teacher_and_a_sure_one_from_the_first() -> None:
    ours = torch.zeros(2, 4)
    ours[1, 0] = 200.0
    for name in ("uncertainty", "uncertainty_rank"):
        found = WEIGHTINGS[name].function(torch.zeros(2, 2, 4), ours, None)  # type: ignore[misc]
        assert found.tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_a_teacher_who_is_right_counts_more_and_extreme_logits_stay_finite() -> None:
    theirs = torch.tensor([[[1e4, -1e4]], [[-1e4, 1e4]]])
    found = WEIGHTINGS["label_loss"].function(theirs, torch.zeros(1, 2), torch.tensor([0]))  # type: ignore[misc]
    assert found[0].item() == 1 and 0 < found[1].item() < 1e-4
    for name in ("uncertainty", "uncertainty_rank"):
        assert WEIGHTINGS[name].function(theirs, theirs[0], None).isfinite().all()  # type: ignore[misc]


def test_the_weights_of_tokens_are_those_of_whole_logits_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def side(width: int) -> tuple[Tensor, Head]:
        drawn = [torch.randn(*shape, generator=generator) for shape in ((N, width), (K, width), (K,))]
        return drawn[0], Head(drawn[1], drawn[2])

    (ours, head), teachers = side(4), [side(6), side(3)]
    theirs = torch.stack([each.logits(states) for states, each in teachers])
    whole = WEIGHTINGS["uncertainty"].function(theirs, head.logits(ours), None)  # type: ignore[misc]
    for size in (2, N, 64):
        monkeypatch.setattr("glmd.losses.teacher_weights.chunk_tokens", lambda *_, size=size: size)
        torch.testing.assert_close(linear_weights(WEIGHTINGS["uncertainty"], ours, head, teachers), whole)
    assert linear_weights(WEIGHTINGS["uncertainty"], ours[:0], head, [(s[:0], h) for s, h in teachers]).shape == (2, 0)
