"""Layer mappings."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmd.errors import ConfigError
from glmd.models.layers import LAYER_CHOICES, layer_indices


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("first", [0, 1, 2, 3, 4, 5]),
        ("last", [6, 7, 8, 9, 10, 11]),
        ("uniform", [1, 3, 5, 7, 9, 11]),
        ("even", [0, 2, 4, 6, 8, 10]),
        ([0, 2, 4, 7, 9, 11], [0, 2, 4, 7, 9, 11]),
    ],
)
def test_twelve_layers_map_to_six(how: str | list[int], expected: list[int]) -> None:
    assert layer_indices(how, 6, 12) == expected


@given(st.sampled_from(LAYER_CHOICES), st.integers(1, 40), st.integers(0, 40))
def test_every_mapping_takes_distinct_teacher_layers_in_order(how: str, n: int, more: int) -> None:
    total = n + more
    layers = layer_indices(how, n, total)
    assert len(layers) == n
    assert layers == sorted(set(layers))
    assert layers[0] >= 0
    assert layers[-1] < total
    if how in ("last", "uniform"):
        assert layers[-1] == total - 1
    if how in ("first", "even"):
        assert layers[0] == 0
    if how == "uniform":
        assert layers == [math.ceil((i + 1) * total / n) - 1 for i in range(n)]


@pytest.mark.parametrize("how", LAYER_CHOICES)
def test_a_student_as_deep_as_its_teacher_maps_to_itself(how: str) -> None:
    assert layer_indices(how, 7, 7) == list(range(7))


@pytest.mark.parametrize(
    ("how", "n", "message"),
    [
        ("middle", 3, "one of first, last, uniform, even or a list of numbers, got 'middle'"),
        ("uniform", 13, r"1 to 12 layers \(the teacher's\), got 13"),
        ("first", 0, "1 to 12 layers"),
        ([0, 1], 3, "2 given, but the student has 3"),
        ([0, 1, 12], 3, "12 is no teacher layer; they count 0 to 11"),
        ([-1, 1, 2], 3, "-1 is no teacher layer"),
        ([0, 1, 2.0], 3, "2.0 is no teacher layer"),
        ([0, 1, True], 3, "True is no teacher layer"),
        ([3, 1, 2], 3, "must be 3 different layers in increasing order"),
        ([1, 1, 2], 3, "must be 3 different layers in increasing order"),
    ],
)
def test_a_wrong_mapping_is_refused_by_name(how: str | list[int], n: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer_indices(how, n, 12)
