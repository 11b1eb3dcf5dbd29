"""Losses on relations of tokens, across layers and on scores, against loops in float64: values and gradients."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glmd.errors import ConfigError
from glmd.losses.features import HIDDEN_LOSSES, RELATION_LOSSES, attention_kl, normalized_mse, score_mse
from glmd.losses.logits import annealed_mse, margin_mse
from glmd.losses.relations import relation_kl

L, R, S, H = 3, 3, 5, 4
LENGTHS = (5, 3, 1)
VALID = torch.arange(S) < torch.tensor(LENGTHS)[:, None]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def require_same(function: Callable[[Tensor], Tensor], twin: Callable[[Tensor], Tensor], at: Tensor) -> None:
    """Values, and gradients of a sum in which each value counts otherwise."""
    ours, theirs = (at.clone().requires_grad_() for _ in range(2))
    found, expected = function(ours), twin(theirs)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(1, 2, found.numel(), dtype=torch.float64).view(found.shape)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.abs().max() > 1e-6


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()


def rows(value: Callable[[int, int, int], Tensor]) -> Tensor:
    """(R, S) from a value of each valid token, given row, place and length."""
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack(
        [torch.stack([value(r, s, n) if s < n else zero for s in range(S)]) for r, n in enumerate(LENGTHS)]
    )


def test_states_at_length_1_are_compared_by_their_difference() -> None:
    teacher = drawn(6, H, seed=1)

    def plain(x: Tensor) -> Tensor:
        pairs = [(a / (a @ a).sqrt(), b / (b @ b).sqrt()) for a, b in zip(x, teacher, strict=True)]
        return torch.stack([((a - b) ** 2).mean() for a, b in pairs])

    require_same(lambda x: normalized_mse(x, teacher), plain, drawn(6, H, seed=0))


def test_scores_are_compared_where_a_key_exists() -> None:
    student, teacher = drawn(R, 2, S, seed=0), drawn(R, 2, S, seed=1)
    hidden = ~VALID[:, None, :].expand(R, 2, S)

    def plain(x: Tensor) -> Tensor:
        return torch.stack([((x[r, :, :n] - teacher[r, :, :n]) ** 2).mean() for r, n in enumerate(LENGTHS)])

    shown = teacher.masked_fill(hidden, -math.inf)
    require_same(lambda x: score_mse(x.masked_fill(hidden, -math.inf), shown), plain, student)


def test_a_second_softmax_is_over_the_keys_that_exist() -> None:
    ours, teacher = drawn(R, 2, S, seed=0), drawn(R, 2, S, seed=1)
    hidden = ~VALID[:, None, :].expand(R, 2, S)
    probabilities = teacher.masked_fill(hidden, -math.inf).softmax(-1)

    def plain(x: Tensor) -> Tensor:
        values = []
        for r, n in enumerate(LENGTHS):
            q, p = (each[r, :, :n].softmax(-1).log_softmax(-1) for each in (x, teacher))
            values.append((p.exp() * (p - q)).sum(-1).mean())
        return torch.stack(values)

    def found(x: Tensor) -> Tensor:
        return attention_kl(x.masked_fill(hidden, -math.inf).softmax(-1), probabilities, double_softmax=True)

    require_same(found, plain, ours)


@pytest.mark.parametrize("heads", [None, 1, 4])
def test_relations_of_tokens_are_those_of_the_row_without_its_pads(heads: int | None) -> None:
    teacher = drawn(R, S, 2, 4, seed=1)
    count = heads or 2

    def relation(x: Tensor, r: int, s: int, n: int, head: int) -> Tensor:
        split = x[r, :n].reshape(n, count, -1)[:, head]
        return (split @ split[s] / math.sqrt(split.shape[1])).log_softmax(0)

    def plain(x: Tensor) -> Tensor:
        def value(r: int, s: int, n: int) -> Tensor:
            logs = [(relation(x, r, s, n, h), relation(teacher, r, s, n, h)) for h in range(count)]
            return torch.stack([(p.exp() * (p - q)).sum() for q, p in logs]).mean()

        return rows(value)

    require_same(lambda x: relation_kl(x, teacher, VALID, relation_heads=heads), plain, drawn(R, S, 2, 4, seed=0))


def test_relations_need_as_many_heads_or_a_number_that_divides_both() -> None:
    ours, theirs = drawn(R, S, 2, 4, seed=0), drawn(R, S, 4, 4, seed=1)
    with pytest.raises(ValueError, match="2 and 4 heads; give relation_heads"):
        relation_kl(ours, theirs, VALID)
    with pytest.raises(ValueError, match="a width of 8 cannot be divided into 3"):
        relation_kl(ours, theirs, VALID, relation_heads=3)
    assert relation_kl(ours, theirs, VALID, relation_heads=8).shape == (R, S)


def test_energies_of_tokens_are_compared_as_shares_of_the_row() -> None:
    teacher = drawn(R, S, 7, seed=1)  # of another width

    def plain(x: Tensor) -> Tensor:
        def value(r: int, s: int, n: int) -> Tensor:
            maps = [torch.stack([(each[r, t] ** 2).mean() for t in range(n)]) for each in (x, teacher)]
            shares = [each[s] / (each @ each).sqrt() for each in maps]
            return (shares[0] - shares[1]) ** 2

        return rows(value)

    require_same(lambda x: HIDDEN_LOSSES["energy_mse"](x, teacher, VALID), plain, drawn(R, S, H, seed=0))


def test_similarities_of_tokens_are_a_distribution_over_the_others() -> None:
    teacher = drawn(R, S, 7, seed=1)

    def plain(x: Tensor) -> Tensor:
        def value(r: int, s: int, n: int) -> Tensor:
            if n == 1:
                return torch.zeros((), dtype=torch.float64)
            others = [t for t in range(n) if t != s]
            q, p = (
                torch.stack([cosine(each[r, s], each[r, t]) for t in others]).log_softmax(0) for each in (x, teacher)
            )
            return (p.exp() * (p - q)).sum() / n

        return rows(value)

    require_same(lambda x: HIDDEN_LOSSES["token_similarity_kl"](x, teacher, VALID), plain, drawn(R, S, H, seed=0))


def test_angles_at_a_token_are_between_its_neighbors() -> None:
    teacher = drawn(R, S, 7, seed=1)

    def plain(x: Tensor) -> Tensor:
        def value(r: int, s: int, n: int) -> Tensor:
            near = [t for t in range(max(0, s - 1), min(n, s + 2)) if t != s]
            pairs = [[cosine(e[r, a] - e[r, s], e[r, b] - e[r, s]) for e in (x, teacher)] for a in near for b in near]
            found = [(ours - theirs) ** 2 for ours, theirs in pairs]
            return torch.stack(found).mean() if found else torch.zeros((), dtype=torch.float64)

        return rows(value)

    loss = HIDDEN_LOSSES["token_angle_mse"]
    require_same(lambda x: loss(x, teacher, VALID, window=3), plain, drawn(R, S, H, seed=0))
    with pytest.raises(ConfigError, match="window must be odd"):
        loss(teacher, teacher, VALID, window=4)


def test_equal_states_of_two_tokens_give_no_gradient_that_is_not_finite() -> None:
    same = drawn(R, S, H, seed=0)
    same[:, 1] = same[:, 0]
    student = same.clone().requires_grad_()
    HIDDEN_LOSSES["token_angle_mse"](student, drawn(R, S, H, seed=1), VALID).sum().backward()
    assert student.grad.isfinite().all() and student.grad.abs().max() < 100


def test_each_student_layer_learns_from_the_mixture_of_teacher_layers_that_it_attends_to() -> None:
    teacher = drawn(4, R, H, seed=1)

    def mixtures(x: Tensor, n: int) -> list[Tensor]:
        shares = [torch.stack([x[layer, n] @ each for each in teacher[:, n]]).softmax(0) for layer in range(L)]
        return [sum(share * each for share, each in zip(of, teacher[:, n], strict=True)) for of in shares]  # type: ignore[misc]

    def squares(x: Tensor) -> Tensor:
        values = [[((x[i, n] - m) ** 2).mean() for i, m in enumerate(mixtures(x, n))] for n in range(R)]
        return torch.stack([torch.stack(each).mean() for each in values])

    def divergences(x: Tensor) -> Tensor:
        values = []
        for n in range(R):
            pairs = [(m.log_softmax(0), x[i, n].log_softmax(0)) for i, m in enumerate(mixtures(x, n))]
            values.append(torch.stack([(p.exp() * (p - q)).sum() for p, q in pairs]).sum())
        return torch.stack(values)

    require_same(lambda x: HIDDEN_LOSSES["attended_mse"](x, teacher), squares, drawn(L, R, H, seed=0))
    require_same(lambda x: HIDDEN_LOSSES["attended_kl"](x, teacher), divergences, drawn(L, R, H, seed=0))


def test_layers_side_by_side_are_projected_and_compared_at_length_1() -> None:
    """The sum of each layer's own projection is one projection of the layers side by side."""
    maps, states, teacher = drawn(L, 6, H, seed=2), drawn(L, R, H, seed=0), drawn(4, R, 6, seed=1)

    def plain(x: Tensor) -> Tensor:
        wide = torch.cat([*maps], dim=1)  # (6, L * H)
        found = [wide @ torch.cat([*x[:, n]]) for n in range(R)]
        theirs = [teacher[:, n].sum(0) for n in range(R)]
        return torch.stack([((a / a.norm() - b / b.norm()) ** 2).sum() for a, b in zip(found, theirs, strict=True)])

    loss = HIDDEN_LOSSES["concatenated_mse"]
    require_same(lambda x: loss(torch.einsum("luh,lnh->lnu", maps, x), teacher), plain, states)


def test_layers_of_a_token_relate_to_each_other() -> None:
    teacher = drawn(L, R, 7, seed=1)

    def similarities(x: Tensor) -> Tensor:
        values = []
        for n in range(R):
            total = torch.zeros((), dtype=torch.float64)
            for a in range(L):
                others = [b for b in range(L) if b != a]
                q, p = (
                    torch.stack([cosine(each[a, n], each[b, n]) for b in others]).log_softmax(0)
                    for each in (x, teacher)
                )
                total = total + (p.exp() * (p - q)).sum()
            values.append(total / L**2)
        return torch.stack(values)

    def angles(x: Tensor) -> Tensor:
        def at(each: Tensor, a: int, b: int, c: int, n: int) -> Tensor:
            return cosine(each[a, n] - each[b, n], each[a, n] - each[c, n])

        values = []
        for n in range(R):
            triples = [(a, b, c) for a in range(L) for b in range(L) for c in range(L) if a not in (b, c)]
            squares = [(at(x, *each, n) - at(teacher, *each, n)) ** 2 for each in triples]
            values.append(torch.stack(squares).sum() / L**3)
        return torch.stack(values)

    require_same(lambda x: HIDDEN_LOSSES["layer_similarity_kl"](x, teacher), similarities, drawn(L, R, H, seed=0))
    require_same(lambda x: HIDDEN_LOSSES["layer_angle_mse"](x, teacher), angles, drawn(L, R, H, seed=0))


def test_flows_between_layers_are_means_over_the_tokens_of_a_text() -> None:
    teacher = drawn(L, R, S, H, seed=1)

    def plain(x: Tensor) -> Tensor:
        values = []
        for r, n in enumerate(LENGTHS):
            flows = [
                [sum(torch.outer(each[i, r, s], each[i + 1, r, s]) for s in range(n)) / n for i in range(L - 1)]
                for each in (x, teacher)
            ]
            values.append(torch.stack([((a - b) ** 2).mean() for a, b in zip(*flows, strict=True)]).mean())
        return torch.stack(values)

    require_same(lambda x: HIDDEN_LOSSES["gram_mse"](x, teacher, VALID), plain, drawn(L, R, S, H, seed=0))


def test_a_text_is_contrasted_with_the_others_of_its_batch() -> None:
    teacher = drawn(L, R, S, H, seed=1)

    def plain(x: Tensor) -> Tensor:
        def g(i: int, j: int) -> Tensor:
            places = range(min(LENGTHS[i], LENGTHS[j]))
            found = [cosine(x[layer, i, s], teacher[layer, j, s]) for layer in range(L) for s in places]
            return 1 - torch.stack(found).mean()

        values = []
        for i in range(R):
            others = torch.stack([g(i, j) - g(i, i) for j in range(R) if j != i]).mean()
            values.append(L * (1 + g(i, i) - others / 2))
        return torch.stack(values)

    loss = HIDDEN_LOSSES["batch_contrast"]
    require_same(lambda x: loss(x, teacher, VALID), plain, drawn(L, R, S, H, seed=0))
    alone = loss(teacher[:, :1], teacher[:, :1], VALID[:1])
    torch.testing.assert_close(alone, torch.tensor([float(L)], dtype=torch.float64))


@pytest.mark.parametrize("name", ["energy_mse", "token_similarity_kl", "token_angle_mse", "gram_mse"])
def test_pads_change_neither_values_nor_gradients_of_a_row(name: str) -> None:
    loss, stacked = HIDDEN_LOSSES[name], HIDDEN_LOSSES[name].takes_all_layers
    shape = (L, R, S, H) if stacked else (R, S, H)
    ours, theirs = (drawn(*shape, seed=seed).requires_grad_(seed == 0) for seed in (0, 1))
    cut = (slice(None), slice(1, 2), slice(3)) if stacked else (slice(1, 2), slice(3))
    alone = ours.detach()[cut].clone().requires_grad_()
    whole = loss(ours, theirs, VALID)
    part = loss(alone, theirs[cut], VALID[1:2, :3])
    torch.testing.assert_close(whole[1] if whole.ndim == 1 else whole[1, :3], part[0])
    whole[1].sum().backward()
    part.sum().backward()
    torch.testing.assert_close(ours.grad[cut], alone.grad)
    assert whole.ndim == 1 or whole[1, 3:].eq(0).all()
    masked = ~VALID[..., None].expand(R, S, H)
    assert ours.grad.masked_select(masked.expand(shape)).eq(0).all()


@pytest.mark.parametrize(
    "name",
    ["energy_mse", "token_similarity_kl", "token_angle_mse", "gram_mse", "layer_similarity_kl", "layer_angle_mse"],
)
def test_a_student_equal_to_its_teacher_loses_nothing(name: str) -> None:
    loss = HIDDEN_LOSSES[name]
    shape = (R, S, H) if not loss.takes_all_layers else (L, R, H) if loss.unit == "token" else (L, R, S, H)
    same, more = drawn(*shape, seed=0), () if loss.unit == "token" else (VALID,)
    assert loss(same, same, *more).abs().max() < 1e-12
    values = drawn(R, S, 2, 4, seed=3)
    assert RELATION_LOSSES["relation_kl"](values, values, VALID).abs().max() < 1e-12


def test_annealing_rises_in_whole_steps_of_temperature_and_a_margin_leaves_out_what_is_near() -> None:
    student, teacher = drawn(4, 3, seed=0), drawn(4, 3, seed=1)
    for progress, factor in ((0.0, 1 / 7), (0.1, 1 / 7), (0.2, 2 / 7), (0.5, 4 / 7), (1.0, 1.0)):
        expected = ((student - factor * teacher) ** 2).mean(-1)
        torch.testing.assert_close(annealed_mse(student, teacher, progress=progress), expected)
    factor = 1 - 4 / 10  # temperature 5
    values = ((student - factor * teacher) ** 2).mean(-1)
    margin = float(values.median()) / factor
    kept = margin_mse(student, teacher, progress=0.5, margin=margin)
    torch.testing.assert_close(kept, values * (values > values.median()))
    assert 0 < kept.count_nonzero() < 4
    with pytest.raises(ConfigError, match="max_temperature must be at least 1"):
        annealed_mse(student, teacher, progress=0.5, max_temperature=0.5)
