"""A curve comes to a level once, at its first crossing, and its rising neighbour does not fluctuate."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flow_grpo.crossing import first_at_least, first_crossing, rising


@pytest.mark.parametrize(
    ("rewards", "level", "expected"),
    [
        ([0.0, 1.0, 0.0, 1.0], 0.5, 5.0),  # the first of several
        ([0.0, 0.5, 0.5], 0.5, 10.0),  # at an evaluation exactly
        ([0.7, 0.8, 0.9], 0.5, 0.0),  # above it from the start
        ([0.0, 0.4, 0.2], 0.5, None),
    ],
)
def test_the_first_crossing_is_taken(rewards: list[float], level: float, expected: float | None) -> None:
    assert first_crossing(10.0 * np.arange(len(rewards)), np.array(rewards), level) == expected


def test_the_first_value_that_is_high_enough_is_found_and_nan_is_not() -> None:
    assert first_at_least([0.0, math.nan, 0.5, 0.4, 0.9], 0.5) == 2
    assert first_at_least([0.0, math.nan], 0.5) is None
    assert first_at_least([], 0.5) is None


def test_the_rising_curve_keeps_its_start_and_averages_what_falls() -> None:
    assert rising(np.array([0.5, 0.7, 0.6, 0.9])) == pytest.approx([0.5, 0.65, 0.65, 0.9])
    assert rising(np.array([0.5, 0.3, 0.4, 0.9])) == pytest.approx([0.5, 0.5, 0.5, 0.9])  # never below the base
