"""Losses on relations of tokens, runs of them, and texts, against loops in float64: values and gradients."""

from itertools import permutations

import pytest
import torch
from test_layer_losses import LENGTHS, VALID, H, R, S, cosine, drawn, require_same
from torch import Tensor

from glmd.errors import ConfigError
from glmd.losses.features import HIDDEN_LOSSES

PAIRS, TRIPLETS, TEXTS = (HIDDEN_LOSSES[name] for name in ("relation_mse", "triplet_smooth_l1", "text_angle_smooth_l1"))
ZERO = torch.zeros((), dtype=torch.float64)


def runs(states: Tensor, row: int, span: int) -> list[Tensor]:
    """The means of a text's tokens, so many at a time."""
    tokens = states[row, : LENGTHS[row]]
    return [tokens[i : i + span].mean(0) for i in range(0, LENGTHS[row], span)]


def scores(states: list[Tensor], heads: int) -> list[Tensor]:
    """Of each head how each state goes with each."""
    divided = [each.view(heads, -1) for each in states]
    width = len(divided[0][0])
    return [
        torch.stack([torch.stack([a[h] @ b[h] for b in divided]) for a in divided]) / width**0.5 for h in range(heads)
    ]


def smooth(difference: Tensor) -> Tensor:
    size = difference.abs()
    return size**2 / 2 if size < 1 else size - 0.5


@pytest.mark.parametrize(("heads", "span"), [(None, 1), (2, 1), (2, 2), (4, 3)])
def test_pairs_of_tokens_are_compared_by_heads(heads: int | None, span: int) -> None:
    teacher = drawn(R, S, 2 * H, seed=1)

    def plain(x: Tensor) -> Tensor:
        values = []
        for row in range(R):
            ours, theirs = (scores(runs(each, row, span), heads or 1) for each in (x, teacher))
            values.append(torch.stack([(a - b).square().mean() for a, b in zip(ours, theirs, strict=True)]).mean())
        return torch.stack(values)

    require_same(lambda x: PAIRS(x, teacher, VALID, relation_heads=heads, span=span), plain, drawn(R, S, H, seed=0))


@pytest.mark.parametrize(("heads", "span", "vertices", "neighbors"), [(None, 1, 2, 3), (2, 1, 20, 20), (2, 2, 2, 2)])
def test_angles_stand_where_the_teachers_attention_goes(
    heads: int | None, span: int, vertices: int, neighbors: int
) -> None:
    teacher = drawn(R, S, 2 * H, seed=1)

    def plain(x: Tensor) -> Tensor:
        values = []
        for row in range(R):
            ours, theirs = runs(x, row, span), runs(teacher, row, span)
            attention = sum(each.softmax(-1) for each in scores(theirs, heads or 1))
            places, found = range(len(ours)), []
            most = sorted(places, key=lambda i: -float(attention[:, i].sum()))[:vertices]
            for i in most:
                near = sorted((j for j in places if j != i), key=lambda j: -float(attention[i, j]))[:neighbors]
                for j, k in permutations(near, 2):
                    a, b = (cosine(each[j] - each[i], each[k] - each[i]) for each in (ours, theirs))
                    found.append(smooth(a - b))
            values.append(torch.stack(found).mean() if found else ZERO)
        return torch.stack(values)

    require_same(
        lambda x: TRIPLETS(x, teacher, VALID, relation_heads=heads, span=span, vertices=vertices, neighbors=neighbors),
        plain,
        drawn(R, S, H, seed=0),
    )


@pytest.mark.parametrize("heads", [None, 2])
def test_texts_of_a_batch_are_compared_by_the_angles_between_them(heads: int | None) -> None:
    teacher = drawn(R, S, 2 * H, seed=1)

    def plain(x: Tensor) -> Tensor:
        ours, theirs = ([each[r, : LENGTHS[r]].mean(0).view(heads or 1, -1) for r in range(R)] for each in (x, teacher))
        values = []
        for i in range(R):
            found = []
            for h in range(heads or 1):
                for j in range(R):
                    for k in range(R):
                        if i in (j, k):
                            found.append(ZERO)
                            continue
                        a, b = (cosine(t[j][h] - t[i][h], t[k][h] - t[i][h]) for t in (ours, theirs))
                        found.append(smooth(a - b))
            values.append(torch.stack(found).mean())
        return torch.stack(values)

    require_same(lambda x: TEXTS(x, teacher, VALID, relation_heads=heads), plain, drawn(R, S, H, seed=0))


@pytest.mark.parametrize("loss", [PAIRS, TRIPLETS, TEXTS])
def test_relations_equal_to_the_teachers_lose_nothing_and_widths_that_heads_do_not_divide_are_refused(loss) -> None:
    same = drawn(R, S, H, seed=0).requires_grad_()
    found = loss(same, same.detach(), VALID, relation_heads=2)
    found.sum().backward()
    assert found.abs().max() < 1e-12 and same.grad.isfinite().all() and same.grad.abs().max() < 1e-12
    with pytest.raises(ConfigError, match="a width of 4 cannot be divided into 3"):
        loss(same, same, VALID, relation_heads=3)


def test_pads_change_neither_pairs_nor_angles() -> None:
    ours, theirs = drawn(R, S, H, seed=0), drawn(R, S, H, seed=1)
    for loss, span in ((PAIRS, 1), (PAIRS, 2), (TRIPLETS, 1), (TRIPLETS, 2)):
        options = {"relation_heads": 2, "span": span}
        whole, row = loss(ours, theirs, VALID, **options), (slice(1, 2), slice(3))
        torch.testing.assert_close(whole[1:2], loss(ours[row], theirs[row], VALID[row], **options))


def test_neighbors_of_which_there_are_not_two_are_refused() -> None:
    states = drawn(R, S, H, seed=0)
    with pytest.raises(ConfigError, match="neighbors must be at least 2, got 1"):
        TRIPLETS(states, states, VALID, neighbors=1)
