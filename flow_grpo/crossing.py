"""When a curve first comes to a level, as a reward does: for the study, the demo and whoever compares two runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import isotonic_regression


def first_at_least(values: Sequence[float] | np.ndarray, level: float) -> int | None:
    """The place of the first value that is no lower than the level; None: there is none. A nan is never."""
    reached = np.flatnonzero(np.asarray(values, dtype=np.float64) >= level)
    return int(reached[0]) if len(reached) else None


def first_crossing(x: np.ndarray, y: np.ndarray, level: float) -> float | None:
    """Where the piecewise linear curve through the points (x, y), both (n,), first reaches a level; None: never."""
    after = first_at_least(y, level)
    if after is None:
        return None
    if after == 0:
        return float(x[0])
    before = after - 1
    return float(x[before] + (x[after] - x[before]) * (level - y[before]) / (y[after] - y[before]))


def rising(values: np.ndarray) -> np.ndarray:
    """The rising curve nearest to the values (n,) after the first, in least squares, and from the first one on.

    Isotonic regression: where a noisy curve first touches a level it does so by an upward fluctuation; this one does
    not. The first value, of the base model, is kept.
    """
    return np.concatenate([values[:1], np.maximum(isotonic_regression(values[1:]).x, values[0])])
