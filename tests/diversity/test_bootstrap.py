"""MATH 6: bootstrap intervals of diversity scores: they cover, and their fast paths are the slow one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import scipy.linalg

from flow_grpo.diversity.bootstrap import (
    Interval,
    RkeScore,
    Score,
    VendiScore,
    grouped_interval,
    interval,
    replicates,
)
from flow_grpo.diversity.rke import rke_score
from flow_grpo.diversity.vendi import vendi_score
from flow_grpo.errors import ConfigError

Draw = Callable[[int, np.random.Generator], np.ndarray]  # so many sets (sets, n, 16)
CENTRES = scipy.linalg.qr(np.random.default_rng(5).normal(size=(16, 16)))[0]


def cloud(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


# --- coverage -----------------------------------------------------------------------------------------


def modes(n: int, shares: Sequence[float], spread: float = 0.1) -> Draw:
    """n points around orthogonal centres of length 1, each centre drawn with its share."""

    def draw(sets: int, rng: np.random.Generator) -> np.ndarray:
        centre = rng.choice(len(shares), size=(sets, n), p=shares)
        return CENTRES[centre] + spread * rng.normal(size=(sets, n, 16))

    return draw


def diffuse(n: int) -> Draw:
    return lambda sets, rng: rng.normal(size=(sets, n, 16))


def vendi_scores(x: np.ndarray) -> np.ndarray:
    """Vendi_1 of each of the sets (sets, n, d), n >= d."""
    u = x / np.linalg.norm(x, axis=2, keepdims=True)
    p = np.linalg.eigvalsh(u.transpose(0, 2, 1) @ u / x.shape[1])
    return np.exp(-(p * np.log(np.maximum(p, 1e-300))).sum(1))


def rke_scores(x: np.ndarray, h: float) -> np.ndarray:
    """RKE of each of the sets (sets, n, d)."""
    square = (x**2).sum(2)
    distances = square[:, :, None] + square[:, None] - 2 * x @ x.transpose(0, 2, 1)
    return 1 / np.exp(-distances / h**2).mean((1, 2))


def truth(draws: Sequence[Draw], score: Score, sets: int) -> float:
    """The mean over groups of the expected score, from so many sets of each."""
    rng = np.random.default_rng(99)
    means = []
    for draw in draws:
        chunks = [draw(500, rng) for _ in range(sets // 500)]
        scores = [vendi_scores(x) if isinstance(score, VendiScore) else rke_scores(x, score.bandwidth) for x in chunks]
        means.append(np.concatenate(scores).mean())
    return float(np.mean(means))


def coverage(draws: Sequence[Draw], score: Score, repetitions: int, sets: int, seed: int = 1) -> float:
    target, rng = truth(draws, score, sets), np.random.default_rng(seed)
    groups = [draw(repetitions, rng) for draw in draws]
    found = [grouped_interval([x[i] for x in groups], score, draws=500, seed=i) for i in range(repetitions)]
    return float(np.mean([f.low <= target <= f.high for f in found]))


SITUATIONS = {
    "clustered": (modes(64, [1 / 8] * 8), 0.5),
    "concentrated": (modes(64, [0.8] + [0.2 / 7] * 7), 0.5),
    "diffuse": (diffuse(32), 4.0),
}


@pytest.mark.parametrize(
    ("situation", "kind"), [("concentrated", "vendi"), *((situation, "rke") for situation in SITUATIONS)]
)
def test_95_percent_intervals_cover_in_93_to_97_percent_of_1000_repetitions(situation, kind):
    draw, h = SITUATIONS[situation]
    score = VendiScore() if kind == "vendi" else RkeScore(h)
    found = coverage([draw], score, repetitions=1000, sets=10_000)
    print(f"{situation} {kind}: {found:.3f}")
    assert 0.93 <= found <= 0.97


@pytest.mark.parametrize("score", [VendiScore(), RkeScore(0.5)])
def test_intervals_of_a_mean_over_10_prompts_cover(score):
    prompts = [modes(16, [0.25] * 4, 0.15), modes(16, [0.7, 0.2, 0.1], 0.15)] * 5
    found = coverage(prompts, score, repetitions=400, sets=4000)
    print(f"10 prompts {type(score).__name__}: {found:.3f}")
    assert 0.93 <= found <= 0.97


def test_resampling_the_images_themselves_does_not_cover():
    """The broken twin: a duplicate is no new image, so that every replicate lies below the score."""
    draw, rng = diffuse(32), np.random.default_rng(3)
    target = truth([draw], VendiScore(), 5000)
    hits = []
    for x in draw(100, rng):
        naive = vendi_scores(x[rng.integers(32, size=(200, 32))])
        low, high = np.quantile(naive, [0.025, 0.975])
        hits.append(low <= target <= high)
        assert naive.mean() < vendi_score(x)
    assert np.mean(hits) < 0.1


# --- the fast paths -----------------------------------------------------------------------------------

FAST = [
    VendiScore(),
    VendiScore(0.5),
    VendiScore(2, "gaussian", 2.0),
    VendiScore(math.inf),
    RkeScore(2.0),
]


@pytest.mark.parametrize("score", FAST)
@pytest.mark.parametrize(("n", "d"), [(20, 6), (6, 20), (70, 5), (131, 200)])
def test_the_fast_path_is_the_score_of_what_is_left(score, n, d):
    """Also with blocks of several images, and images in no block (131 = 43 blocks of 3 and 2)."""
    x = cloud(n, d) + 1
    anything = lambda rows: score(rows)  # noqa: E731  a plain function: no fast path
    fast = grouped_interval([x], score, draws=50, seed=3)
    slow = grouped_interval([x], anything, draws=50, seed=3)
    assert fast.estimate == score(x)
    np.testing.assert_allclose([fast.low, fast.high], [slow.low, slow.high], rtol=1e-8)


def test_rke_in_tiles_is_rke(monkeypatch):
    x = cloud(150, 4)
    whole = replicates(x, RkeScore(1.0), 20)
    monkeypatch.setattr("flow_grpo.diversity.bootstrap.BLOCK", 16)
    np.testing.assert_allclose(replicates(x, RkeScore(1.0), 20), whole, rtol=1e-10)


# --- properties ---------------------------------------------------------------------------------------


def test_the_spread_of_a_mean_is_its_standard_error():
    """A linear score: no interactions, J = V = variance / n."""
    x = 5 + cloud(50, 1)
    values = replicates(x, lambda rows: float(rows.mean()), 20_000, log=False)
    # t* of 50 draws is wider than a normal by sqrt(n / (n - 3)) or so
    assert values.std() == pytest.approx(math.sqrt(x.var(ddof=1) / 50), rel=0.08)
    assert values.mean() == pytest.approx(float(x.mean()), abs=0.01)


def test_interactions_are_counted_once():
    """A purely quadratic score, balanced +-1: the jackknife alone doubles its variance."""
    n, rng = 40, np.random.default_rng(0)

    def quadratic(rows: np.ndarray) -> float:  # mean of x_i . x_j over pairs, expectation 0, variance 2 / (n (n - 1)) d
        total = rows.sum(0)
        return float((total @ total - (rows**2).sum()) / (len(rows) * (len(rows) - 1)))

    sets = rng.choice([-1.0, 1.0], size=(60, n, 12))
    true_variance = 2 * 12 / (n * (n - 1))
    spreads = [replicates(x, quadratic, 300, log=False).var() for x in sets]
    assert np.mean(spreads) == pytest.approx(1.25 * true_variance, rel=0.25)
    alone = [(n - 1) * np.var([quadratic(np.delete(x, i, axis=0)) for i in range(n)]) for x in sets]
    assert np.mean(alone) > 1.8 * true_variance  # the broken twin: the jackknife alone


def test_the_mean_over_groups_is_the_estimate_and_many_groups_narrow_it():
    groups = [cloud(16, 8, seed) for seed in range(20)]
    found = grouped_interval(groups, VendiScore())
    assert found.estimate == pytest.approx(np.mean([vendi_score(x) for x in groups]), rel=1e-15)
    assert found.low < found.estimate < found.high
    one = grouped_interval(groups[:1], VendiScore())
    ratio = math.log(one.high / one.low) / math.log(found.high / found.low)
    assert 3 < ratio < 8  # about sqrt(20)


def test_the_same_seed_gives_the_same_replicates():
    x = cloud(30, 4)
    score = RkeScore(1.0)
    np.testing.assert_array_equal(replicates(x, score, 100, seed=1), replicates(x, score, 100, seed=1))
    assert not np.array_equal(replicates(x, score, 100, seed=1), replicates(x, score, 100, seed=2))


def test_identical_images_have_an_interval_of_no_width():
    found = grouped_interval([np.ones((8, 3))], RkeScore(1.0))
    assert found == Interval(1.0, 1.0, 1.0, 0.95)


def test_the_interval_is_symmetric_on_its_scale():
    draws = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    found = interval(4.0, draws, level=0.5)  # |log| in units of log 2: 0, 1, 1, 2, 2
    assert (found.low, found.high) == (pytest.approx(2), pytest.approx(8))
    assert interval(4.0, draws, level=0.5, log=False) == Interval(4.0, 1.0, 7.0, 0.5)


# --- bad input ----------------------------------------------------------------------------------------


def test_bad_input_is_refused():
    x = cloud(10, 3)
    with pytest.raises(ConfigError, match="features has 3 rows; an interval needs at least 4"):
        grouped_interval([x, x[:3]], VendiScore())
    with pytest.raises(ConfigError, match="0 groups"):
        grouped_interval([], VendiScore())
    with pytest.raises(ConfigError, match="0 draws"):
        replicates(x, VendiScore(), 0)
    with pytest.raises(ConfigError, match="level is 95"):
        grouped_interval([x], rke_of_1, level=95)
    with pytest.raises(ConfigError, match="no logarithm; pass log=False"):
        grouped_interval([x], lambda rows: 0.0)


def rke_of_1(rows: np.ndarray) -> float:
    return rke_score(rows, 1.0)
