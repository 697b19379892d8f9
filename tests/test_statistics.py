"""Intervals are those of SciPy, and hold what they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flow_grpo.statistics import mean_interval, prediction_interval


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
