"""Intervals are those of SciPy, and hold what they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flow_grpo.statistics import (
    Estimate,
    Interval,
    difference_interval,
    half_widths,
    mean_interval,
    prediction_interval,
    satterthwaite,
)


def test_the_interval_of_a_mean_is_students() -> None:
    values = [1.0, 2.5, 3.0, 7.0, math.nan]
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values[:4]), scale=stats.sem(values[:4]))
    assert (found.estimate, found.low, found.high, found.count) == pytest.approx((np.mean(values[:4]), low, high, 4))


@pytest.mark.parametrize(("interval", "of_a_mean"), [(mean_interval, True), (prediction_interval, False)])
def test_intervals_hold_what_they_are_for_95_times_in_100(interval: Callable[..., Any], of_a_mean: bool) -> None:
    generator, held, repetitions = np.random.default_rng(0), 0, 4000
    for _ in range(repetitions):
        *seen, new = generator.standard_normal(6)
        found = interval(seen)
        held += found.low <= (0.0 if of_a_mean else new) <= found.high
    assert held / repetitions == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / repetitions))


def test_one_seed_has_no_interval_and_no_verdict() -> None:
    found = mean_interval([3.0])
    assert (found.estimate, found.count) == (3.0, 1)
    assert not found.above(0)
    assert not found.below(5)
    assert mean_interval([]).count == 0


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_interval_of_a_number_is_its_error_times_students_quantile(level: float) -> None:
    found = Estimate(2.0, 0.5, 7).interval(level)
    low, high = stats.t.interval(level, 7, loc=2.0, scale=0.5)
    assert (found.estimate, found.low, found.high, found.level) == pytest.approx((2.0, low, high, level))
    assert Estimate(2.0, 0.5, 7).half_width(level) == pytest.approx(high - 2.0)


def test_the_interval_of_a_difference_is_welchs() -> None:
    a, b = [1.0, 2.5, 3.0, 7.0], [0.5, 0.6, 0.8]
    found, expected = difference_interval(a, b), stats.ttest_ind(a, b, equal_var=False)
    low, high = expected.confidence_interval(0.95)
    assert (found.estimate, found.low, found.high) == pytest.approx((np.mean(a) - np.mean(b), low, high))
    assert satterthwaite([np.var(x, ddof=1) / len(x) for x in (a, b)], [3, 2]) == pytest.approx(expected.df)
    exact = difference_interval([1.0, 1.0], [0.5, 0.5])
    assert (exact.low, exact.high) == (0.5, 0.5)  # no spread, no width


def test_half_widths_along_an_axis_are_those_of_each_mean() -> None:
    values = np.random.default_rng(1).normal(size=(3, 5))
    expected = [mean_interval(row).high - row.mean() for row in values]
    assert half_widths(values) == pytest.approx(expected, rel=1e-12)


def test_without_an_interval_nothing_is_known_and_nothing_is_beyond_it() -> None:
    bare, whole = Interval(1.0), Interval(1.0, 0.5, 1.5)
    assert not bare.known
    assert (bare.above(0), bare.below(2), bare.holds(1.0)) == (False, False, False)
    assert whole.known
    assert (whole.above(0.4), whole.above(0.5), whole.below(1.6), whole.holds(1.5)) == (True, False, True, True)
