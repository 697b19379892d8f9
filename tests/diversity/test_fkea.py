"""FKEA: closed forms, its biases as derived, agreement with the exact scores within its own error, and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flow_grpo.diversity import fkea
from flow_grpo.diversity.fkea import draw_frequencies, feature_moment, fkea_scores
from flow_grpo.diversity.rke import rke_score
from flow_grpo.diversity.vendi import vendi_score
from flow_grpo.errors import ConfigError

RNG = np.random.default_rng(0)
CLOUD = RNG.standard_normal((8, 6))[RNG.integers(0, 8, 120)] * 2 + 0.3 * RNG.standard_normal((120, 6))
ORDERS = (0.5, 1.0, 2.0, math.inf)


def standard_scores(order: float, exact: float, plug_in: bool = False, seeds: int = 12) -> np.ndarray:
    """(estimate - exact) / standard error for several seeds; r and h such that value and plug-in differ."""
    found = [fkea_scores(CLOUD, 2.0, (order,), 128, repeats=16, seed=seed)[order] for seed in range(seeds)]
    return np.array([((s.plug_in if plug_in else s.value) - exact) / s.standard_error for s in found])


def exact_scores() -> dict[float, float]:
    return {2.0: rke_score(CLOUD, 2.0), 1.0: vendi_score(CLOUD, 1.0, "gaussian", 2.0)}


# --- closed forms ---------------------------------------------------------------------------------------


def test_identical_samples_are_one_at_every_order_without_error():
    for score in fkea_scores(np.full((7, 3), 1e6), 0.5, ORDERS, 16, repeats=3).values():
        assert score.value == pytest.approx(1, abs=1e-10)
        assert score.plug_in == pytest.approx(1, abs=1e-10)
        assert score.error == pytest.approx(0, abs=1e-10)


def test_balanced_groups_far_apart_count_as_their_number():
    """Not at q = inf: their equal eigenvalues part by O(1 / sqrt(r)), and the largest is the one that grew."""
    groups = np.repeat(np.eye(5) * 100, 4, axis=0)
    for score in fkea_scores(groups, 1.0, (0.5, 1.0, 2.0, 8.0), 512, repeats=4).values():
        assert score.value == pytest.approx(5, rel=0.01)


def test_the_moment_holds_the_kernel_of_its_frequencies():
    """Trace 1, and the eigenvalues of (1/r) sum_k cos w_k . (x - y) / n."""
    w = draw_frequencies(6, 2.0, 10, seed=0, repeat=0)
    rho = feature_moment(CLOUD, w)
    differences = CLOUD[:, None] - CLOUD[None]  # (n, n, d)
    kernel = np.cos(differences @ w).mean(-1)
    assert np.trace(rho) == pytest.approx(1, abs=1e-12)
    expected = np.linalg.eigvalsh(kernel / len(CLOUD))[-20:]
    np.testing.assert_allclose(np.linalg.eigvalsh(rho), expected, rtol=0, atol=1e-12)


# --- bias and error --------------------------------------------------------------------------------------


def test_the_purity_is_inflated_as_derived_and_its_correction_is_not():
    r, h = 4, 3.0
    k = np.exp(-np.square(CLOUD[:, None] - CLOUD[None]).sum(-1) / (2 * h**2))
    true, inflation = np.square(k).mean(), np.square(1 - k**2).mean() / (2 * r)
    moments = [feature_moment(CLOUD, draw_frequencies(6, h, r, 1, i)) for i in range(4000)]
    plain = np.array([np.square(rho).sum() for rho in moments])
    corrected = np.array([fkea._purity(rho)[0] for rho in moments])
    for found, expected in ((plain, true + inflation), (corrected, true)):
        error = found.std() / math.sqrt(len(found))
        assert abs(found.mean() - expected) < 4 * error
    assert abs(plain.mean() - true) > 20 * plain.std() / math.sqrt(len(plain))


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_it_agrees_with_the_exact_score_within_its_standard_error(order):
    scores = standard_scores(order, exact_scores()[order])
    assert np.abs(scores).max() < 4
    assert abs(scores.mean()) < 3 / math.sqrt(len(scores)), "biased"
    assert 0.4 < scores.std() < 1.8, "the error is not of its stated size"


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_the_uncorrected_score_does_not_agree(order):
    scores = standard_scores(order, exact_scores()[order], plug_in=True)
    assert scores.mean() < -3, "its mean would be within 0.9 of 0"


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_frequencies_of_the_inverse_bandwidth_do_not_agree(order, monkeypatch):
    right = draw_frequencies
    monkeypatch.setattr(fkea, "draw_frequencies", lambda d, h, r, seed, repeat: right(d, 1 / h, r, seed, repeat))
    assert np.abs(standard_scores(order, exact_scores()[order], seeds=3)).min() > 10


@pytest.mark.parametrize("order", ORDERS)
def test_the_error_covers_the_exact_score_at_every_order(order):
    exact = vendi_score(CLOUD, order, "gaussian", 2.0)
    found = [fkea_scores(CLOUD, 2.0, (order,), 128, repeats=16, seed=seed)[order] for seed in range(6)]
    assert all(abs(s.value - exact) < 4 * s.error for s in found)


def test_the_error_of_rke_falls_as_the_root_of_the_frequencies():
    exact, errors = rke_score(CLOUD, 3.0), []
    for r in (32, 512):
        found = [fkea_scores(CLOUD, 3.0, (2.0,), r, repeats=1, seed=seed)[2.0].value for seed in range(150)]
        errors.append(math.sqrt(np.square(np.array(found) - exact).mean()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)


def test_the_bias_of_the_plug_in_falls_as_the_frequencies():
    exact, biases = vendi_score(CLOUD, 1.0, "gaussian", 4.0), []
    for r in (64, 256):
        biases.append(fkea_scores(CLOUD, 4.0, (1.0,), r, repeats=64)[1.0].plug_in - exact)
    assert biases[0] < biases[1] < 0
    assert biases[0] / biases[1] == pytest.approx(4, rel=0.35)


# --- the computation -------------------------------------------------------------------------------------


def test_blocks_of_rows_change_nothing():
    whole, blocks = (fkea_scores(CLOUD, 2.0, ORDERS, 32, repeats=2, block=block) for block in (120, 7))
    for order in ORDERS:
        assert whole[order].value == pytest.approx(blocks[order].value, rel=1e-12)
        assert whole[order].plug_in == pytest.approx(blocks[order].plug_in, rel=1e-12)


def test_orders_do_not_change_one_another():
    together = fkea_scores(CLOUD, 2.0, ORDERS, 32, repeats=2)
    for order in ORDERS:
        assert fkea_scores(CLOUD, 2.0, (order,), 32, repeats=2)[order] == together[order]


def test_the_seed_decides_the_draw():
    one, same, other = (fkea_scores(CLOUD, 2.0, num_frequencies=32, seed=seed)[1.0].value for seed in (3, 3, 4))
    assert one == same != other


def test_float32_features_give_the_score_of_their_values():
    narrow = CLOUD.astype(np.float32)
    found, expected = (fkea_scores(x, 2.0, num_frequencies=32)[1.0] for x in (narrow, narrow.astype(np.float64)))
    assert found.value == pytest.approx(expected.value, rel=1e-12)


def test_one_repeat_has_no_standard_error():
    score = fkea_scores(CLOUD, 2.0, (2.0,), 8, repeats=1)[2.0]
    assert math.isnan(score.standard_error)
    assert (score.r, score.repeats, score.order) == (8, 1, 2.0)


def test_the_score_stays_between_one_and_the_number_of_samples():
    scattered = RNG.standard_normal((10, 3)) * 1e3
    for order in ORDERS:
        scores = [fkea_scores(scattered, 1.0, (order,), 2, repeats=1, seed=seed)[order].value for seed in range(20)]
        assert min(scores) >= 1 - 1e-12
        assert max(scores) <= 10 + 1e-12


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_frequencies": 0}, "num_frequencies is 0"),
        ({"num_frequencies": -2}, "num_frequencies is -2"),
        ({"num_frequencies": 7}, "num_frequencies is 7"),
        ({"repeats": 0}, "repeats is 0"),
        ({"block": 0}, "block is 0"),
        ({"bandwidth": 0.0}, "bandwidth is 0"),
        ({"bandwidth": math.nan}, "bandwidth is nan"),
        ({"orders": (-1.0,)}, "order is -1"),
        ({"features": np.full((4, 2), np.nan)}, "not finite"),
        ({"features": np.zeros(4)}, "shape"),
    ],
)
def test_bad_input_is_named(change, named):
    with pytest.raises(ConfigError, match=named):
        fkea_scores(**{"features": CLOUD, "bandwidth": 1.0, "num_frequencies": 4} | change)


def test_too_few_frequencies_for_a_spectrum_with_a_long_tail_are_admitted():
    """A diffuse cloud has many small eigenvalues, which 2r features cannot hold; a narrow one has few."""
    rng = np.random.default_rng(0)
    diffuse, narrow = rng.standard_normal((400, 64)) / 8, rng.standard_normal((400, 2)) / 8
    few, enough = (fkea_scores(x, 1.0, (1.0, 2.0), 128, 16) for x in (diffuse, narrow))
    exact = vendi_score(diffuse, 1.0, "gaussian", 1.0)
    assert abs(few[1.0].value - exact) > 0.02 * exact
    assert not few[1.0].resolved
    assert enough[1.0].resolved
    assert abs(enough[1.0].value - vendi_score(narrow, 1.0, "gaussian", 1.0)) < 4 * enough[1.0].error
