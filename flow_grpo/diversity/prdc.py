"""Precision, recall, density and coverage against a reference set, and the mean pairwise distance.

Legend: reference X (N, d), judged Y (M, d), B_k(x) the closed ball around x that reaches its k-th nearest neighbour in
its own set, x itself not counted.

    precision = share of y in some B_k(x)          recall   = share of x in some B_k(y)         arXiv 1904.06991
    density   = mean over y of #{x: y in B_k(x)} / k     coverage = share of B_k(x) with some y    arXiv 2002.09797

One outlier's ball is wide: in X it lifts precision, in Y recall. Density counts balls rather than asking for one, and
coverage takes balls of the reference alone. Density is 1 in expectation for sets of one distribution and can exceed 1;
for Y = X without ties it is (k + 1) / k, because every x is also in its own ball.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flow_grpo.diversity.vendi import check_features, row_blocks
from flow_grpo.errors import ConfigError

Array = NDArray[np.float64]
BLOCK = 1024  # rows of distances held at once
TIE = 1e-12  # balls are wider by this share of |x|^2 and of their squared radius, so that rounding decides no tie


@dataclass(frozen=True)
class PRDC:
    """All in [0, 1] but density, which is in [0, N / k]."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(features: np.ndarray, reference: np.ndarray, k: int = 5, block: int = BLOCK) -> PRDC:
    """Precision, recall, density and coverage of `features` (M, d) against `reference` (N, d).

    Memory O((N + M) (block + d)), time O((N + M)^2 d). Both sets need more than k rows.

    Raises:
        ConfigError: for features that are no finite matrices of one width, and for k out of range.
    """
    y, x = check_features(features), check_features(reference, "reference")
    if y.shape[1] != x.shape[1]:
        raise ConfigError(f"features have {y.shape[1]} columns and reference has {x.shape[1]}; they must agree.")
    _check_k(k, len(y), len(x))
    centre = x.mean(0)
    x, y = x - centre, y - centre  # keeps the products below small, and with them their rounding
    x_radii, y_radii = _squared_radii(x, k, block), _squared_radii(y, k, block)  # (N,), (M,)
    precise, in_balls, recalled, covered = 0, 0, np.zeros(len(x), bool), np.zeros(len(x), bool)
    for rows, squared in _squared_distances(y, x, block):
        in_x = squared <= x_radii  # (b, N)
        precise += int(in_x.any(1).sum())
        in_balls += int(in_x.sum())
        covered |= in_x.any(0)
        recalled |= (squared <= y_radii[rows, None]).any(0)
    return PRDC(precise / len(y), float(recalled.mean()), in_balls / (k * len(y)), float(covered.mean()))


def mean_pairwise_distance(features: np.ndarray, block: int = BLOCK) -> float:
    """Mean Euclidean distance over the n (n - 1) / 2 pairs of rows of (n, d), in the features' units.

    The distance of equal rows among different ones comes out as up to 1e-7 of the largest norm, not as 0.

    Raises:
        ConfigError: for features that are no finite matrix of at least 2 rows.
    """
    x = check_features(features)
    total = sum(float(np.sqrt(squared).sum()) for _, squared in _squared_distances(x - x.mean(0), None, block))
    return total / (len(x) * (len(x) - 1))


def _check_k(k: int, judged: int, reference: int) -> None:
    if not 1 <= k < min(judged, reference):
        raise ConfigError(
            f"k is {k}; it must be at least 1 and below the rows of each set: {judged} features, {reference} reference."
        )


def _squared_radii(points: Array, k: int, block: int) -> Array:
    """Squared distance to the k-th nearest other point, and the margin for ties: (n,)."""
    radii = [np.partition(squared, k, axis=1)[:, k] for _, squared in _squared_distances(points, None, block)]
    return np.concatenate(radii) * (1 + TIE) + TIE * np.square(points).sum(1)  # place k: 0 is the point itself


def _squared_distances(points: Array, others: Array | None, block: int) -> Iterator[tuple[slice, Array]]:
    """|a - b|^2 for a block of points at a time: (b, m). Without others, to the points; then its own distance is 0."""
    if block < 1:
        raise ConfigError(f"block is {block}; it must be at least 1.")
    targets = points if others is None else others
    norms, target_norms = np.square(points).sum(1), np.square(targets).sum(1)
    for rows in row_blocks(len(points), block):
        squared = points[rows] @ targets.T  # (b, m)
        squared *= -2
        squared += target_norms
        squared += norms[rows, None]
        np.maximum(squared, 0, out=squared)
        if others is None:
            squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = 0
        yield rows, squared
