"""Intervals, the same ones everywhere: Student's t of a mean, of a difference, of any number with a standard error.

    low, high = estimate -+ t_{(1 + level) / 2, freedom} * standard error

NumPy and SciPy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm
from scipy.stats import t as student_t

LEVEL = 0.95
NORMAL_95 = 1.96  # standard errors to either side, where nothing but the error is known

Size = TypeVar("Size", float, np.ndarray)


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval at `level`; nan: there is no interval."""

    estimate: float
    low: float = math.nan
    high: float = math.nan
    level: float = LEVEL

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def above(self, value: float) -> bool:
        """The whole interval is."""
        return self.low > value

    def below(self, value: float) -> bool:
        """The whole interval is."""
        return self.high < value

    def holds(self, value: float) -> bool:
        """Whether the value lies in it."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class CountedInterval(Interval):
    """The interval of a mean over `count` values; there is none of a single one."""

    count: int = 0


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, which is known with so many degrees of freedom."""

    value: float
    standard_error: float
    freedom: float

    def half_width(self, level: float = LEVEL) -> float:
        """Of the interval."""
        return half_width(self.standard_error, self.freedom, level)

    def interval(self, level: float = LEVEL) -> Interval:
        """Symmetric about the number."""
        half = self.half_width(level)
        return Interval(self.value, self.value - half, self.value + half, level)


def half_width(error: Size, freedom: float, level: float = LEVEL) -> Size:
    """Student's t of `freedom` degrees of freedom times standard errors."""
    return float(student_t.ppf((1 + level) / 2, freedom)) * error


def normal_half_width(error: float, level: float = LEVEL) -> float:
    """The normal distribution's, for errors that are not estimated from a spread."""
    return float(norm.ppf((1 + level) / 2)) * error


def half_widths(values: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """Of the mean over the last axis, of independent values (..., n) -> (...); nan if there is only one."""
    count = values.shape[-1]
    if count < 2:
        return np.full(values.shape[:-1], np.nan)
    return half_width(values.std(-1, ddof=1) / math.sqrt(count), count - 1, level)


def mean_interval(values: Iterable[float], level: float = LEVEL) -> CountedInterval:
    """Mean of the finite values, with Student's t interval."""
    return _about_the_mean(values, level, lambda count: 1 / count)


def prediction_interval(values: Iterable[float], level: float = LEVEL) -> CountedInterval:
    """Mean of the finite values, with the interval that a further one falls into: mean +- t s sqrt(1 + 1 / n)."""
    return _about_the_mean(values, level, lambda count: 1 + 1 / count)


def _about_the_mean(values: Iterable[float], level: float, share: Callable[[int], float]) -> CountedInterval:
    """With half the width t s sqrt(share of n), of the n values that are finite."""
    finite = np.array([value for value in values if math.isfinite(value)])
    count = len(finite)
    mean = float(finite.mean()) if count else math.nan
    if count < 2:
        return CountedInterval(mean, level=level, count=count)
    half = half_width(float(finite.std(ddof=1)) * math.sqrt(share(count)), count - 1, level)
    return CountedInterval(mean, mean - half, mean + half, level, count)


def difference_interval(first: ArrayLike, second: ArrayLike) -> Interval:
    """Mean of the first (n,) minus that of the second (m,), both independent, n and m >= 2: Welch's interval."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    variances = [float(x.var(ddof=1)) / len(x) for x in (a, b)]
    freedom = satterthwaite(variances, [len(a) - 1, len(b) - 1])
    return Estimate(float(a.mean() - b.mean()), math.sqrt(sum(variances)), freedom).interval()


def satterthwaite(variances: Sequence[float], freedoms: Sequence[float]) -> float:
    """Degrees of freedom of a sum of independent variances, each with its own (Biometrika 34, 28)."""
    total = sum(variances)
    if total <= 0:  # no spread: none of the interval, whatever the freedom
        return float(sum(freedoms))
    return total**2 / sum(variance**2 / freedom for variance, freedom in zip(variances, freedoms, strict=True))
