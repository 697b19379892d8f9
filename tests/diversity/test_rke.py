"""MATH 6: RKE, relative RKE and the bandwidth, against definitions and dense computations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.distance import cdist

from flow_grpo.diversity.rke import median_bandwidth, relative_rke, rke_score
from flow_grpo.diversity.vendi import vendi_score
from flow_grpo.errors import ConfigError


def cloud(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def by_definition(x: np.ndarray, h: float, power: int = 2) -> float:
    total = 0.0
    for a in x:
        for b in x:
            total += math.exp(-sum((a - b) ** 2) / (2 * h**2)) ** power
    return len(x) ** 2 / total


# --- RKE ----------------------------------------------------------------------------------------------


def test_rke_is_its_definition():
    x = cloud(17, 5)
    assert rke_score(x, 1.3) == pytest.approx(by_definition(x, 1.3), rel=1e-12)
    assert abs(rke_score(x, 1.3) / by_definition(x, 1.3, power=1) - 1) > 0.1  # the broken twin does not square k


def test_rke_is_vendi_of_order_2():
    x = cloud(60, 8)
    assert rke_score(x, 2.0) == pytest.approx(vendi_score(x, 2, "gaussian", 2.0), rel=1e-12)


@pytest.mark.parametrize("block", [1, 7, 40, 1000])
def test_blockwise_is_whole(block):
    x = cloud(101, 6).astype(np.float32)
    assert rke_score(x, 1.5, block) == pytest.approx(rke_score(x, 1.5), rel=1e-12)


def test_far_apart_groups_count_as_modes():
    points = 50 * np.eye(6)
    assert rke_score(np.tile(points, (4, 1)), 1.0) == pytest.approx(6, rel=1e-12)
    assert rke_score(points, 1.0) == pytest.approx(6, rel=1e-12)
    assert rke_score(np.ones((9, 3)), 1.0) == 1
    assert rke_score(np.repeat(points[:3], [5, 3, 2], axis=0), 1.0) == pytest.approx(1 / 0.38, rel=1e-12)


def test_the_order_of_the_rows_does_not_matter():
    x = cloud(50, 4)
    assert rke_score(x[::-1], 1.0) == pytest.approx(rke_score(x, 1.0), rel=1e-12)


def test_a_frozen_bandwidth_sees_a_collapse_and_one_chosen_again_does_not():
    spreads = [1.0, 0.5, 0.2, 0.1, 0.05, 0.01]
    shrinking = [spread * cloud(150, 8) for spread in spreads]
    frozen = median_bandwidth(shrinking[:1])
    scores = [rke_score(x, frozen) for x in shrinking]
    assert all(later < earlier for earlier, later in itertools.pairwise(scores))
    assert scores[0] > 3
    assert scores[-1] < 1.001
    retuned = [rke_score(x, median_bandwidth([x])) for x in shrinking]  # the broken twin
    np.testing.assert_allclose(retuned, retuned[0], rtol=1e-12)


# --- the bandwidth ------------------------------------------------------------------------------------


def test_the_bandwidth_is_the_median_distance_within_groups_over_root_2():
    groups = [np.array([[0.0], [1.0]]), np.array([[100.0], [103.0], [108.0]])]  # distances 1; 3, 5, 8
    h = median_bandwidth(groups)
    assert h == pytest.approx(4 / math.sqrt(2), rel=1e-15)
    assert math.exp(-(4**2) / (2 * h**2)) ** 2 == pytest.approx(math.exp(-2), rel=1e-14)
    assert median_bandwidth([np.concatenate(groups)]) > 10 * h  # the broken twin pools the groups


def test_a_bandwidth_of_duplicates_or_nothing_is_refused():
    with pytest.raises(ConfigError, match="median distance within groups is 0"):
        median_bandwidth([np.ones((4, 2))])
    with pytest.raises(ConfigError, match="empty"):
        median_bandwidth([])
    with pytest.raises(ConfigError, match=r"features_by_group\[1\] has 1 rows"):
        median_bandwidth([np.eye(2), np.ones((1, 2))])


# --- relative RKE -------------------------------------------------------------------------------------


def dense_divergence(x: np.ndarray, y: np.ndarray, h: float) -> float:
    """-2 log tr sqrt(sqrt(rho) sigma sqrt(rho)) in coordinates of the span of all feature maps."""
    both = np.concatenate([x, y])
    values, vectors = scipy.linalg.eigh(np.exp(-(cdist(both, both) ** 2) / (2 * h**2)))
    phi = vectors * np.sqrt(np.maximum(values, 0))  # (n + m, n + m), phi phi^T = K
    a, b = phi[: len(x)], phi[len(x) :]
    rho, sigma = a.T @ a / len(x), b.T @ b / len(y)
    values, vectors = scipy.linalg.eigh(rho)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    inner = scipy.linalg.eigh(root @ sigma @ root)[0]
    return -2 * math.log(np.sqrt(np.maximum(inner, 0)).sum())


def test_relative_rke_is_the_fidelity_of_the_two_density_matrices():
    x, y = cloud(12, 3), 0.5 + cloud(20, 3, seed=1)
    expected = dense_divergence(x, y, 1.0)
    assert relative_rke(x, y, 1.0) == pytest.approx(expected, abs=1e-6)  # the dense roots cost half the digits
    assert relative_rke(x, y, 1.0, block=5) == pytest.approx(relative_rke(x, y, 1.0), rel=1e-12)
    frobenius = np.sqrt((np.exp(-(cdist(x, y) ** 2) / 2) ** 2).sum() / 240)
    assert abs(-2 * math.log(frobenius) - expected) > 0.1  # the broken twin takes another norm


def test_relative_rke_of_two_points_is_known():
    x, y = np.zeros((2, 1)), np.full((3, 1), 1.5)  # rank one each: fidelity k(0, 1.5)
    assert relative_rke(x, y, 0.8) == pytest.approx(1.5**2 / 0.8**2, rel=1e-12)


def test_relative_rke_is_0_for_the_same_points_symmetric_and_grows_with_separation():
    x, y = cloud(40, 4), cloud(30, 4, seed=1)
    assert relative_rke(x, x[::-1], 1.0) == pytest.approx(0, abs=1e-12)
    assert relative_rke(np.tile(x, (2, 1)), x, 1.0) == pytest.approx(0, abs=1e-12)
    assert relative_rke(x, y, 1.0) == pytest.approx(relative_rke(y, x, 1.0), rel=1e-12)
    found = [relative_rke(x, y + shift, 1.0) for shift in (0, 1, 2, 4)]
    assert all(later > earlier for earlier, later in itertools.pairwise(found))
    assert relative_rke(x, y + 1e3, 1.0) == math.inf


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bandwidth", [0, -1.0, math.nan, math.inf])
def test_a_bad_bandwidth_is_refused(bandwidth):
    with pytest.raises(ConfigError, match="bandwidth is"):
        rke_score(cloud(4, 2), bandwidth)
    with pytest.raises(ConfigError, match="bandwidth is"):
        relative_rke(cloud(4, 2), cloud(4, 2), bandwidth)


def test_bad_features_are_refused():
    with pytest.raises(ConfigError, match="features has 1 rows"):
        rke_score(np.ones((1, 2)), 1.0)
    with pytest.raises(ConfigError, match="reference has 1 rows that are not finite, the first of them row 2"):
        relative_rke(cloud(3, 1), np.array([[0.0], [1.0], [np.nan]]), 1.0)
    with pytest.raises(ConfigError, match="2 columns, the reference 3"):
        relative_rke(cloud(4, 2), cloud(4, 3), 1.0)
