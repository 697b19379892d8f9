"""Precision, recall, density, coverage and the mean pairwise distance: by hand, by double loops, by what they miss."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from flow_grpo.diversity import prdc as module
from flow_grpo.diversity.prdc import PRDC, mean_pairwise_distance, prdc
from flow_grpo.errors import ConfigError


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)[:, None]


def cloud(seed: int, n: int, dims: int = 4, centre: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dims)) + centre


def radius(points: np.ndarray, i: int, k: int) -> float:
    return sorted(math.dist(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]


def by_loops(y: np.ndarray, x: np.ndarray, k: int) -> PRDC:
    """The definitions, pair by pair."""
    x_radii, y_radii = ([radius(points, i, k) for i in range(len(points))] for points in (x, y))
    hits = [[math.dist(a, b) <= r for b, r in zip(x, x_radii, strict=True)] for a in y]
    recalled = [any(math.dist(a, b) <= r for a, r in zip(y, y_radii, strict=True)) for b in x]
    return PRDC(
        precision=sum(any(row) for row in hits) / len(y),
        recall=sum(recalled) / len(x),
        density=sum(sum(row) for row in hits) / (k * len(y)),
        coverage=sum(any(ball) for ball in zip(*hits, strict=True)) / len(x),
    )


def close(found: PRDC, expected: PRDC) -> None:
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-12), name


def test_by_hand():
    """Reference radii 1, 1, 2, 7 reach [-1, 1], [0, 2], [1, 5], [3, 17]; judged radii 0.5, 0.5, 18.5."""
    found = prdc(column(1.5, 2.0, 20.5), column(0, 1, 3, 10), k=1)
    close(found, PRDC(precision=2 / 3, recall=3 / 4, density=4 / 3, coverage=2 / 4))


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_its_definition(seed, k):
    y, x = cloud(seed, 40, centre=0.4), cloud(seed + 10, 55) * 1.3
    found = prdc(y, x, k)
    close(found, by_loops(y, x, k))
    assert 0.1 < found.recall < 0.95, "the sets are too easy to tell anything"


def test_counting_a_point_as_its_own_neighbour_is_not_its_definition(monkeypatch):
    y, x, right = cloud(0, 40, centre=0.4), cloud(10, 55) * 1.3, module._squared_radii
    monkeypatch.setattr(module, "_squared_radii", lambda points, k, block: right(points, k - 1, block))
    assert prdc(y, x, 3).density < by_loops(y, x, 3).density - 0.05


def test_a_set_against_itself_is_perfect():
    x = cloud(0, 60, dims=20)
    close(prdc(x, x, 5), PRDC(1, 1, 6 / 5, 1))


def test_sets_of_one_distribution_have_density_one():
    found = [prdc(cloud(seed, 200), cloud(seed + 100, 200)).density for seed in range(20)]
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - 1) < 4 * error < 0.1


def test_disjoint_sets_far_apart_share_nothing():
    close(prdc(cloud(0, 30), cloud(1, 30, centre=1e3)), PRDC(0, 0, 0, 0))


def test_dropping_a_mode_lowers_recall_and_coverage_but_not_precision():
    x = np.concatenate([cloud(0, 100), cloud(1, 100, centre=50)])
    full, dropped = np.concatenate([cloud(2, 100), cloud(3, 100, centre=50)]), cloud(2, 200)
    kept, lost = prdc(full, x), prdc(dropped, x)
    assert lost.precision > kept.precision - 0.05
    assert kept.recall > 0.85
    assert kept.coverage > 0.85
    assert lost.recall <= 0.5
    assert lost.coverage <= 0.5


def test_collapse_onto_one_reference_sample_keeps_precision_alone():
    x = cloud(0, 50)
    found = prdc(np.repeat(x[:1], 50, axis=0), x)
    assert found.precision == 1
    assert found.recall == 1 / 50
    assert found.coverage < 0.4


def test_one_outlier_of_the_reference_fools_precision_and_not_density():
    x, y = np.concatenate([cloud(0, 100), np.full((1, 4), 100.0)]), cloud(1, 100, centre=40)
    found = prdc(y, x)
    assert found.precision == 1
    assert found.density == pytest.approx(1 / 5)  # one ball of the five that are expected


def test_outliers_of_the_judged_set_fool_recall_and_not_coverage():
    x = cloud(0, 100)
    y = np.concatenate([cloud(1, 94, centre=500), np.full((1, 4), 30.0)])
    found = prdc(y, x)
    assert found.recall == 1
    assert found.coverage == 0


def test_duplicates_of_the_reference_are_in_its_balls_of_no_radius():
    """Rounding must not decide: the squared distances of equal rows need not come out as 0."""
    x = np.repeat(cloud(0, 10, dims=50) * 1e3, 6, axis=0)
    close(prdc(x, x, 5), PRDC(1, 1, 6 / 5, 1))


def test_neither_order_nor_block_nor_place_matters():
    y, x, shuffle = cloud(0, 40, 8, centre=0.3), cloud(1, 55, 8), np.random.default_rng(2)
    expected = prdc(y, x, 3)
    assert prdc(shuffle.permutation(y), shuffle.permutation(x), 3) == expected
    assert prdc(y, x, 3, block=7) == expected
    assert prdc(y * 4 + 1e4, x * 4 + 1e4, 3) == expected


@pytest.mark.parametrize(("k", "rows"), [(0, 10), (-1, 10), (10, 10), (12, 10)])
def test_a_k_that_some_set_cannot_have_is_refused(k, rows):
    for y, x in ((cloud(0, rows), cloud(1, 50)), (cloud(0, 50), cloud(1, rows))):
        with pytest.raises(ConfigError, match=f"k is {k}; "):
            prdc(y, x, k)


@pytest.mark.parametrize(
    ("y", "x", "named"),
    [
        (cloud(0, 9, 3), cloud(0, 9, 4), "3 columns and reference has 4"),
        (cloud(0, 9) * np.nan, cloud(0, 9), "features has 9 rows that are not finite"),
        (cloud(0, 9), cloud(0, 9) * np.inf, "reference has 9 rows that are not finite"),
    ],
)
def test_bad_features_are_named(y, x, named):
    with pytest.raises(ConfigError, match=named):
        prdc(y, x)


# --- mean pairwise distance ------------------------------------------------------------------------------


def test_the_mean_distance_by_hand():
    assert mean_pairwise_distance(column(0, 1, 3)) == pytest.approx(2, abs=1e-14)  # 1, 2, 3
    assert mean_pairwise_distance(np.array([[0, 0], [3, 4]])) == pytest.approx(5, abs=1e-14)
    assert mean_pairwise_distance(np.full((9, 3), 0.1)) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_the_mean_distance_is_the_mean_over_pairs(block):
    x = cloud(3, 50, 6, centre=10)
    expected = np.mean([math.dist(a, b) for a, b in combinations(x, 2)])
    assert mean_pairwise_distance(x, block) == pytest.approx(expected, rel=1e-12)


def test_counting_pairs_of_a_sample_with_itself_would_show():
    x = cloud(3, 50, 6)
    with_self = np.mean([math.dist(a, b) for a in x for b in x])
    assert mean_pairwise_distance(x) == pytest.approx(with_self * 50 / 49, rel=1e-12)


def test_the_mean_distance_needs_two_rows_and_a_block():
    with pytest.raises(ConfigError, match="at least 2"):
        mean_pairwise_distance(cloud(0, 1))
    with pytest.raises(ConfigError, match="block is 0"):
        mean_pairwise_distance(cloud(0, 4), block=0)
