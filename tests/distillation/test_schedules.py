"""Schedules as functions of progress."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmd.distillation.schedules import KINDS, is_scheduled, learning_rate_factor, scheduled
from glmd.errors import ConfigError

shares = st.floats(0, 1, allow_subnormal=False)
# Half of the smallest number of all is 0.
weights = st.floats(0, 1e6, allow_subnormal=False)


@given(shares, st.sampled_from(KINDS), shares, shares)
def test_the_factor_stays_in_zero_to_one(progress: float, kind: str, warmup: float, least: float) -> None:
    factor = learning_rate_factor(progress, kind=kind, warmup_ratio=warmup, min_ratio=least)
    assert 0 <= factor <= 1
    if progress >= warmup:
        assert factor >= least - 1e-12


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_factor_rises_to_one_and_falls_to_the_minimum(kind: str) -> None:
    at = [learning_rate_factor(i / 100, kind=kind, warmup_ratio=0.2, min_ratio=0.1) for i in range(101)]
    assert at[0] == 0
    assert at[10] == pytest.approx(0.5)
    assert at[20] == 1
    assert at[60] == pytest.approx(0.55)
    assert at[100] == pytest.approx(0.1)
    assert at[:21] == sorted(at[:21])
    assert at[20:] == sorted(at[20:], reverse=True)


def test_cosine_is_the_half_period_of_a_cosine() -> None:
    assert learning_rate_factor(0.25, kind="cosine") == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate_factor(0.25, kind="linear") == pytest.approx(0.75)


def test_constant_stays_at_one_after_the_warmup() -> None:
    assert learning_rate_factor(0.05, kind="constant", warmup_ratio=0.1) == pytest.approx(0.5)
    assert {learning_rate_factor(p, kind="constant", warmup_ratio=0.1, min_ratio=0.1) for p in (0.1, 0.5, 1.0)} == {1.0}


def test_a_warmup_over_the_whole_stage_ends_at_one() -> None:
    assert learning_rate_factor(1.0, warmup_ratio=1.0) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cosin"}, "one of linear, cosine, constant, got 'cosin'"),
        ({"warmup_ratio": 1.5}, r"warmup_ratio must be in \[0, 1\], got 1.5"),
        ({"min_ratio": -0.1}, r"min_ratio must be in \[0, 1\], got -0.1"),
    ],
)
def test_a_wrong_schedule_is_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        learning_rate_factor(0.5, **options)


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan])
def test_progress_outside_the_stage_is_refused(progress: float) -> None:
    with pytest.raises(ConfigError, match="progress must be in"):
        learning_rate_factor(progress)


@given(shares, weights, weights)
def test_a_weight_goes_straight_from_one_number_to_the_other(progress: float, start: float, end: float) -> None:
    weight = {"from": start, "to": end}
    assert scheduled(start, progress) == start
    assert scheduled(weight, 0.0) == start
    assert scheduled(weight, 1.0) == end
    assert scheduled(weight, 0.5) == pytest.approx((start + end) / 2)
    assert min(start, end) * (1 - 1e-9) <= scheduled(weight, progress) <= max(start, end) * (1 + 1e-9)


def test_a_weight_without_both_ends_is_refused() -> None:
    with pytest.raises(ConfigError, match="a schedule must be a number or"):
        scheduled({"from": 1.0, "until": 0.0}, 0.5)


def test_a_number_is_no_schedule_and_the_others_are() -> None:
    assert [is_scheduled(each) for each in (2, 2.0, {"from": 1.0, "to": 2.0}, ((0.0, 1.0),), None)] == [0, 0, 1, 1, 0]


def test_points_are_joined_by_lines_and_the_second_of_two_at_one_place_holds_from_there():
    points = ((0.2, 1.0), (0.6, 3.0), (0.6, 0.0), (0.8, 1.0))
    found = [scheduled(points, at) for at in (0.0, 0.2, 0.4, 0.6 - 1e-9, 0.6, 0.7, 0.8, 1.0)]
    assert found == pytest.approx([1, 1, 2, 3, 0, 0.5, 1, 1], abs=1e-6)
