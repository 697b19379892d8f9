"""MATH 6: the Vendi score, against closed forms, an independent eigendecomposition and the vendi-score package."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.distance import cdist
from vendi_score import vendi as package

from flow_grpo.diversity.vendi import (
    check_features,
    cosine_kernel,
    eigenvalues,
    gaussian_kernel,
    gram,
    unit_rows,
    vendi_from_eigenvalues,
    vendi_from_kernel,
    vendi_score,
)
from flow_grpo.errors import ConfigError

ORDERS = [0, 0.5, 1, 2, 5, math.inf]


def cloud(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def independent(k: np.ndarray, order: float) -> float:
    """Vendi_q by its formula, from scipy's eigenvalues of K / n; K of full rank."""
    p = scipy.linalg.eigh(k / len(k))[0]
    if order == 1:
        return math.exp(-sum(x * math.log(x) for x in p))
    if order == math.inf:
        return 1 / max(p)
    return sum(x**order for x in p) ** (1 / (1 - order))


# --- closed forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_identical_rows_score_1(order):
    assert vendi_score(np.tile(cloud(1, 7), (20, 1)), order) == pytest.approx(1, abs=1e-12)
    assert vendi_score(np.tile(cloud(1, 40), (20, 1)), order) == pytest.approx(1, abs=1e-12)
    assert vendi_score(np.tile(cloud(1, 7), (20, 1)), order, "gaussian", 1.0) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_orthogonal_rows_score_n_whatever_their_lengths(order):
    rows = scipy.linalg.qr(cloud(12, 12))[0] * np.arange(1, 13)[:, None]
    assert vendi_score(rows, order) == pytest.approx(12, rel=1e-12)
    assert vendi_score(rows * 1e4, order, "gaussian", 1.0) == pytest.approx(12, rel=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_m_balanced_orthogonal_groups_score_m(order):
    rows = np.tile(np.eye(5, 9), (6, 1)) * 3.0
    assert vendi_score(rows, order) == pytest.approx(5, rel=1e-12)


def test_unbalanced_groups_score_what_the_hand_finds():
    rows = np.repeat(np.eye(3, 4), [5, 3, 2], axis=0)  # l = 0.5, 0.3, 0.2
    assert vendi_score(rows, 0) == 3
    assert vendi_score(rows, 0.5) == pytest.approx((math.sqrt(0.5) + math.sqrt(0.3) + math.sqrt(0.2)) ** 2, rel=1e-12)
    assert vendi_score(rows, 1) == pytest.approx(0.5**-0.5 * 0.3**-0.3 * 0.2**-0.2, rel=1e-12)
    assert vendi_score(rows, 2) == pytest.approx(1 / 0.38, rel=1e-12)
    assert vendi_score(rows, math.inf) == pytest.approx(2, rel=1e-12)
    # the broken twin forgets 1 / (1 - q): for q = 2 the sum itself comes out
    assert abs(0.38 - vendi_score(rows, 2)) > 1


def test_two_rows_at_an_angle_score_what_the_hand_finds():
    cosine = 0.6
    rows = np.array([[1, 0], [cosine, 0.8]])  # l = (1 +- cosine) / 2
    assert vendi_score(rows, 1) == pytest.approx(0.8**-0.8 * 0.2**-0.2, rel=1e-12)
    assert vendi_score(rows, 2) == pytest.approx(2 / (1 + cosine**2), rel=1e-12)


# --- against others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0.5, 1, 2, 5, math.inf])
@pytest.mark.parametrize(("n", "d"), [(12, 30), (30, 12)])
def test_orders_agree_with_an_independent_eigendecomposition(order, n, d):
    x = cloud(n, d)
    lengths = np.array([math.sqrt(sum(v * v for v in row)) for row in x])
    u = x / lengths[:, None]
    k = u @ u.T
    if n > d:  # rank d: the non-zero eigenvalues alone
        values = scipy.linalg.eigh(k / n)[0][-d:]
        expected = independent(np.diag(values) * d, order)
    else:
        expected = independent(k, order)
    assert vendi_score(x, order) == pytest.approx(expected, rel=1e-10)
    if order != 1:  # the broken twin ignores the order, as the package's score_X does
        assert abs(vendi_score(x, 1) / expected - 1) > 1e-3


@pytest.mark.parametrize("order", [0.5, 1, 2, math.inf])
def test_gaussian_orders_agree_with_an_independent_eigendecomposition(order):
    x = cloud(25, 6)
    k = np.exp(-(cdist(x, x) ** 2) / (2 * 0.8**2))
    assert vendi_score(x, order, "gaussian", 0.8) == pytest.approx(independent(k, order), rel=1e-10)
    assert vendi_from_kernel(k, order) == pytest.approx(independent(k, order), rel=1e-10)
    broken = independent(np.exp(-(cdist(x, x) ** 2) / 0.8**2), order)  # the 2 dropped
    assert abs(vendi_score(x, order, "gaussian", 0.8) / broken - 1) > 1e-2


@pytest.mark.parametrize("order", [0.5, 1, 2, "inf"])
def test_the_score_is_the_packages(order):
    q = math.inf if order == "inf" else order
    wide, tall = cloud(20, 50), cloud(50, 20)
    k = cosine_kernel(wide)
    assert vendi_score(wide, q) == pytest.approx(package.score_K(k, q=order), rel=1e-10)
    assert vendi_from_kernel(k, q) == pytest.approx(package.score_K(k, q=order), rel=1e-10)
    assert vendi_score(tall, q) == pytest.approx(package.score_dual(tall, q=order), rel=1e-10)


@pytest.mark.parametrize("order", [1, 2, math.inf])
def test_primal_and_dual_agree(order):
    x = cloud(40, 11)
    assert vendi_from_kernel(cosine_kernel(x), order) == pytest.approx(vendi_score(x, order), rel=1e-12)
    assert len(eigenvalues(x)) == 11


def test_blockwise_is_whole():
    x = cloud(101, 7).astype(np.float32)
    np.testing.assert_allclose(gram(x, block=10), gram(x, block=1000), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gaussian_kernel(x, 1.5, 10), gaussian_kernel(x, 1.5, 1000), rtol=1e-12, atol=1e-300)


def test_distances_survive_a_far_away_cloud():
    x = cloud(30, 8)
    exact = np.exp(-(cdist(x, x) ** 2) / 2)
    far = gaussian_kernel(x + 1e4, 1.0)
    np.testing.assert_allclose(far, exact, rtol=1e-9)  # what x + 1e4 itself rounds away is 1e-12
    square = ((x + 1e4) ** 2).sum(1)
    careless = np.exp(-(square[:, None] + square - 2 * (x + 1e4) @ (x + 1e4).T) / 2)
    assert np.abs(careless / exact - 1).max() > 1e-7  # the broken twin does not centre


# --- properties ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["cosine", "gaussian"])
def test_the_order_of_the_rows_does_not_matter(kernel):
    x = cloud(30, 9)
    shuffled = x[np.random.default_rng(1).permutation(30)]
    assert vendi_score(shuffled, 1, kernel, 1.0) == pytest.approx(vendi_score(x, 1, kernel, 1.0), rel=1e-12)


@pytest.mark.parametrize("kernel", ["cosine", "gaussian"])
def test_the_score_never_rises_with_q_and_lies_between_1_and_n(kernel):
    scores = [vendi_score(cloud(30, 9), q, kernel, 2.0) for q in [0, 0.1, 0.5, 0.99, 1, 1.01, 2, 10, 1000, math.inf]]
    assert all(a >= b for a, b in itertools.pairwise(scores))
    assert 1 <= scores[-1] <= scores[0] <= 30


def test_rounding_counts_as_zero_at_small_orders():
    rows = np.repeat(scipy.linalg.qr(cloud(8, 8))[0][:3], 40, axis=0)  # 5 of the 8 eigenvalues are rounding
    assert vendi_score(rows, 0.1) == pytest.approx(3, rel=1e-12)
    spectrum = np.abs(eigenvalues(rows)) + 1e-17
    assert (spectrum**0.1).sum() ** (1 / 0.9) > 3.01  # the broken twin keeps it


def test_large_float32_features_are_not_copied():
    x = cloud(20_000, 256).astype(np.float32)
    tracemalloc.start()
    score = vendi_score(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.75 * 8 * x.size  # of the float64 copy, 41 MB: a few blocks of 4096 x 256 are 8 MB each
    assert score == pytest.approx(vendi_score(x.astype(np.float64)), rel=1e-12)


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.int64])
def test_the_least_integer_counts_as_what_it_is(kind):
    """Minus the least value of an integer type is no value of that type."""
    least = np.iinfo(kind).min
    x = np.array([[least, 0], [least, 1], [0, 1]], dtype=kind)
    assert vendi_score(x) == pytest.approx(vendi_score(x.astype(np.float64)), rel=1e-12)


def test_unit_rows_neither_overflow_nor_vanish():
    rows = unit_rows(np.array([[3e200, 4e200], [3e-200, 4e-200]]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.6, 0.8]], rtol=1e-15)


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "sentence"),
    [
        (np.ones((1, 3)), r"^features has 1 rows; diversity needs at least 2\.$"),
        (np.ones(3), r"features has shape \(3,\)"),
        (np.ones((3, 0)), "no columns"),
        (np.array([[1.0], [np.nan], [np.inf]]), "features has 2 rows that are not finite, the first of them row 1"),
        (np.array([["a"], ["b"]]), "dtype"),
    ],
)
def test_bad_features_are_refused(features, sentence):
    with pytest.raises(ConfigError, match=sentence):
        vendi_score(features)
    with pytest.raises(ConfigError, match=sentence):
        check_features(features)


def test_checked_features_are_float64():
    assert check_features(np.ones((2, 3), dtype=np.float16)).dtype == np.float64


@pytest.mark.parametrize(("n", "d"), [(5000, 2), (3, 5)])
def test_a_row_of_zeros_has_no_direction(n, d):
    x = np.ones((n, d))
    x[n - 1] = 0
    with pytest.raises(ConfigError, match=f"Row {n - 1} "):
        vendi_score(x)


@pytest.mark.parametrize("order", [-1, math.nan])
def test_a_bad_order_is_refused(order):
    with pytest.raises(ConfigError, match="order is"):
        vendi_score(cloud(5, 3), order)


def test_a_bad_kernel_or_bandwidth_is_refused():
    with pytest.raises(ConfigError, match="allowed: cosine, gaussian"):
        vendi_score(cloud(5, 3), kernel="rbf")
    with pytest.raises(ConfigError, match="bandwidth is not given"):
        vendi_score(cloud(5, 3), kernel="gaussian")
    with pytest.raises(ConfigError, match="bandwidth is -1"):
        vendi_score(cloud(5, 3), kernel="gaussian", bandwidth=-1)


def test_a_matrix_that_is_no_kernel_is_refused():
    with pytest.raises(ConfigError, match="square"):
        vendi_from_kernel(np.ones((3, 2)))
    with pytest.raises(ConfigError, match="transpose"):
        vendi_from_kernel(np.array([[1, 0.5], [0, 1]]))
    with pytest.raises(ConfigError, match="diagonal"):
        vendi_from_kernel(2 * np.eye(3))
    with pytest.raises(ConfigError, match="none be negative"):
        vendi_from_kernel(np.array([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ConfigError, match="sum to"):
        vendi_from_eigenvalues(np.array([0.5, 0.4]))


@pytest.mark.parametrize("distance", [1e-7, 1e-12, 1e-14, 3e-16])
def test_an_order_next_to_1_is_order_1_to_rounding(distance):
    p = np.array([0.5, 0.3, 0.2])
    for order in (1 - distance, 1 + distance):
        assert vendi_from_eigenvalues(p, order) == pytest.approx(vendi_from_eigenvalues(p, 1.0), rel=1e-7)
