"""Intervals of changes: closed forms, independent references, and that they cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from flow_grpo.diversity.bootstrap import interval, replicates
from flow_grpo.diversity.paired import (
    Change,
    change_of_means,
    change_of_reach,
    change_of_shares,
    change_of_vendi,
    reached,
)
from flow_grpo.diversity.vendi import vendi_score
from flow_grpo.errors import ConfigError


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def models(prompts: int, n: int, d: int, seed: int, rho: float = 0.0, shift: float = 1.0) -> tuple[np.ndarray, ...]:
    """Unit features (prompts, n, d) of two equal models."""
    z, e = np.random.default_rng(seed).normal(size=(2, prompts, n, d))
    return unit(z + shift), unit(rho * z + math.sqrt(1 - rho**2) * e + shift)


def distances(x, y) -> list[np.ndarray]:
    return [cdist(a, b) for a, b in zip(x, y, strict=True)]


def vendi_change(old, new, **options) -> Change | None:
    return change_of_vendi(distances(old, old), distances(new, new), **options)


def reach_change(old, new, **options) -> Change | None:
    return change_of_reach(distances(old, old), distances(new, new), distances(old, new), **options)


# --- means --------------------------------------------------------------------------------------------


def test_paired_means_of_one_prompt_are_students_interval():
    old, new = np.random.default_rng(0).normal(size=(2, 12))
    found = change_of_means(old, new, np.zeros(12))
    expected = stats.ttest_rel(new, old).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert (found.old, found.new, found.images, found.paired) == (
        pytest.approx(old.mean()),
        pytest.approx(new.mean()),
        12,
        True,
    )


def test_unpaired_means_of_one_prompt_are_welchs_interval():
    old, new = np.random.default_rng(0).normal(size=(2, 12)) * [[1], [3]]
    found = change_of_means(old, new, np.zeros(12), paired=False)
    expected = stats.ttest_ind(new, old, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_prompts_are_fixed_their_differences_widen_nothing():
    groups = np.repeat([0, 1], [4, 8])
    noise = np.random.default_rng(1).normal(size=12)
    near = change_of_means(np.zeros(12), noise, groups)
    far = change_of_means(np.zeros(12), noise + 100 * groups, groups)
    assert far.high - far.low == pytest.approx(near.high - near.low, rel=1e-9)
    a, b = noise[:4].var(ddof=1) / 4 * (4 / 12) ** 2, noise[4:].var(ddof=1) / 8 * (8 / 12) ** 2
    half = stats.t.ppf(0.975, (a + b) ** 2 / (a**2 / 3 + b**2 / 7)) * math.sqrt(a + b)
    assert near.high - near.difference == pytest.approx(half, rel=1e-12)


def test_the_formula_of_independent_images_is_far_too_wide_for_pairs():
    """The broken twin."""
    z, e = np.random.default_rng(2).normal(size=(2, 160))
    groups = np.repeat(np.arange(10), 16)
    right, wrong = (change_of_means(z, z + 0.1 * e, groups, paired=p) for p in (True, False))
    assert wrong.high - wrong.low > 8 * (right.high - right.low)


def test_prompts_of_one_image_are_one_stratum():
    old, new = np.random.default_rng(3).normal(size=(2, 20))
    found, whole = change_of_means(old, new, np.arange(20)), change_of_means(old, new, np.zeros(20))
    assert (found.low, found.high) == pytest.approx((whole.low, whole.high), rel=1e-12)
    assert change_of_means(old[:5], new[:5], [0, 0, 1, 1, 2]) is not None  # the single one joins another prompt


def test_rewards_that_all_change_alike_have_an_interval_of_no_width():
    found = change_of_means([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [0, 0, 0])
    assert (found.difference, found.low, found.high) == (0, 0, 0)


# --- shares -------------------------------------------------------------------------------------------


def test_paired_shares_are_agresti_and_mins():
    old, new = np.array([1] * 20 + [0] * 10, bool), np.array([1] * 15 + [0] * 5 + [1] * 2 + [0] * 8, bool)
    found = change_of_shares(old, new)
    gained, lost, n = 2.5, 5.5, 32
    centre = (gained - lost) / n
    half = 1.959963984540054 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), rel=1e-12)
    assert (found.old, found.new, found.difference) == pytest.approx((20 / 30, 17 / 30, -0.1))


def test_unpaired_shares_are_agresti_and_caffos():
    found = change_of_shares([1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0], paired=False)
    half = 1.959963984540054 * math.sqrt(0.2 * 0.8 / 10 + 0.7 * 0.3 / 10)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-12)


def test_images_judged_alike_leave_a_doubt_of_about_two_images():
    for value in (True, False):
        found = change_of_shares([value] * 98, [value] * 98)
        assert (found.difference, found.low, found.high) == (0, pytest.approx(-0.0196, rel=1e-3), -found.low)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("n", [1, 3, 10])
def test_shares_stay_between_minus_1_and_1_and_hold_what_was_seen(paired, n):
    found = change_of_shares([1] * n, [0] * n, paired)
    assert -1 == found.difference == found.low < found.high < 1


# --- Vendi --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize(("n", "d"), [(16, 64), (16, 5), (80, 20)])
def test_old_and_new_are_the_scores_of_the_features(order, n, d):
    old, new = models(3, n, d, seed=0)
    found = vendi_change(old, new, order=order)
    expected = [np.mean([vendi_score(x, order) for x in side]) for side in (old, new)]
    assert (found.old, found.new) == pytest.approx(expected, abs=1e-6)
    assert found.difference == found.new - found.old


def test_six_digits_of_the_distances_are_enough():
    old, new = models(3, 16, 5, seed=1)
    rounded = [[np.vectorize(lambda v: float(f"{v:.6g}"))(d) for d in distances(x, x)] for x in (old, new)]
    found, exact = change_of_vendi(*rounded), vendi_change(old, new)
    assert (found.old, found.new, found.low) == pytest.approx((exact.old, exact.new, exact.low), abs=3e-5)


def test_the_paired_interval_is_that_of_the_difference_as_one_score():
    """The same machinery, asked for a score of rows that hold both images of a noise: other random numbers."""
    old, new = models(1, 14, 6, seed=2, rho=0.7)
    found = vendi_change(old, new)
    both = np.concatenate([old[0], new[0]], axis=1)
    score = lambda rows: vendi_score(rows[:, 6:]) - vendi_score(rows[:, :6])  # noqa: E731
    expected = interval(score(both), replicates(both, score, 20_000, log=False), log=False)
    assert found.difference == pytest.approx(expected.estimate, abs=1e-9)
    assert found.high - found.low == pytest.approx(14 / 13 * (expected.high - expected.low), rel=0.05)


def test_pairs_that_are_alike_give_a_narrower_interval():
    old, new = models(5, 16, 12, seed=3, rho=0.95)
    paired, unpaired = vendi_change(old, new), vendi_change(old, new, paired=False)
    assert paired.high - paired.low < 0.6 * (unpaired.high - unpaired.low)
    assert not unpaired.paired


def test_the_same_images_differ_by_exactly_0():
    old, _ = models(3, 16, 12, seed=4)
    for found in (vendi_change(old, old), reach_change(old, old)):
        assert found.difference == 0
        assert found.low <= 0 <= found.high
        assert found.high - found.low < 0.1


def test_a_collapsed_model_makes_one_image_and_reaches_none():
    old, new = models(3, 16, 12, seed=5)
    new = np.repeat(new[:, :1], 16, axis=1)
    vendi, reach = vendi_change(old, new), reach_change(old, new)
    assert (vendi.new, reach.new) == (1, 0)
    assert vendi.high < 0
    assert reach.high < 0
    both = vendi_change(new, new)
    assert (both.old, both.new, both.low, both.high) == (1, 1, 0, 0)


# --- reach --------------------------------------------------------------------------------------------


def brute_reach(to_set: np.ndarray, within: np.ndarray, k: int) -> list[float]:
    """Image by image, with the set written out that is left without the image's own."""
    n, found = len(within), []
    for i in range(n):
        members = [j for j in range(n) if j != i]
        radii = {j: sorted(within[j, m] for m in members if m != j)[k - 1] for j in members}
        found.append(float(any(to_set[i, j] <= radii[j] for j in members)))
    return found


def brute_independent(to_set: np.ndarray, within: np.ndarray, k: int) -> list[float]:
    n, found = len(within), []
    for row in to_set:
        hits = []
        for out in range(n):
            members = [j for j in range(n) if j != out]
            radii = {j: sorted(within[j, m] for m in members if m != j)[k - 1] for j in members}
            hits.append(any(row[j] <= radii[j] for j in members))
        found.append(np.mean(hits))
    return found


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("seed", range(5))
def test_reach_is_what_a_loop_counts(k, seed):
    (old,), (new,) = models(1, 12, 3, seed, shift=0.3)
    old[3], new[4], new[5] = old[7], new[6], new[6]  # ties
    a, b, c = cdist(old, old), cdist(new, new), cdist(old, new)
    np.testing.assert_array_equal(reached(a, a, k), brute_reach(a, a, k))
    np.testing.assert_array_equal(reached(c, b, k), brute_reach(c, b, k))
    np.testing.assert_allclose(reached(c, b, k, independent=True), brute_independent(c, b, k), rtol=1e-12)


@pytest.mark.parametrize("paired", [True, False])
def test_an_equal_model_reaches_as_much_as_the_base_itself(paired):
    old, new = models(600, 16, 8, seed=6, rho=0.9 if paired else 0.0)
    found = reach_change(old, new, paired=paired)
    assert found.old == pytest.approx(0.82, abs=0.02)
    assert found.difference == pytest.approx(0, abs=0.012)  # 0.004 is the spread


def test_a_base_that_may_use_each_image_itself_always_reaches_all():
    """The broken twin: image i lies in its own ball, and an equal model seems to have lost some."""
    old, new = models(100, 16, 8, seed=7)
    a, b, c = (np.stack(distances(x, y)) for x, y in ((old, old), (new, new), (old, new)))

    def unfair(to_set: np.ndarray, within: np.ndarray) -> float:
        radii = np.sort(within, axis=2)[:, None, :, 2]
        return (to_set <= radii).any(2).mean()

    assert unfair(a, a) == 1
    assert unfair(c, b) < 0.95


def test_the_variance_of_reach_is_that_of_images_and_members():
    """Written as loops over the images left out."""
    old, new = models(2, 9, 3, seed=8, rho=0.5)
    found = reach_change(old, new)
    points, members = 0.0, 0.0
    for x, y in zip(old, new, strict=True):

        def value(rows: np.ndarray, x=x, y=y) -> np.ndarray:
            a, b, c = (cdist(p[rows], q[rows]) for p, q in ((x, x), (y, y), (x, y)))
            return np.subtract(brute_reach(c, b, 2), brute_reach(a, a, 2))

        whole, effect = value(np.arange(9)), np.zeros((9, 9))
        for out in range(9):
            rows = np.delete(np.arange(9), out)
            effect[out, rows] = whole[rows] - value(rows)
        effect -= effect.sum(0) / 8
        np.fill_diagonal(effect, 0)
        total = effect.sum(1) - effect.sum(1).mean()
        points += whole.var(ddof=1) / 9 / 4
        members += ((total**2).sum() - (effect**2).sum()) / (9 * 8) / 4
    half = stats.t.ppf(0.975, 16) * math.sqrt(points + max(members, 0) + 1 / 20**2)
    assert found.high - found.difference == pytest.approx(half, rel=1e-9)


def test_many_images_are_left_out_in_blocks():
    old, new = models(1, 131, 4, seed=9, rho=0.5)
    for found in (reach_change(old, new), reach_change(old, new, paired=False), vendi_change(old, new)):
        assert found.low < found.difference < found.high
    assert 0.5 < reach_change(old, new).new < 1


# --- both: what gives no interval, and bad input --------------------------------------------------------


def test_independent_sets_are_cut_to_the_smaller():
    old, new = models(2, 16, 8, seed=10)
    for change in (vendi_change, reach_change):
        cut = change(old[:, :10], new[:, :10], paired=False)
        assert change(old, new[:, :10], paired=False) == change(old[:, :10], new, paired=False) == cut
        assert cut.images == 20


def test_no_interval_is_none():
    old, new = models(2, 3, 8, seed=11)
    more, _ = models(2, 4, 8, seed=11)
    assert vendi_change(old, new) is None
    assert vendi_change(more, more) is not None
    assert reach_change(more, more) is None
    assert change_of_vendi([], []) is None
    assert change_of_means([1.0], [2.0], [0]) is None
    assert change_of_shares([], []) is None


def test_what_is_not_finite_is_none():
    bad = [np.full((6, 6), math.nan)]
    good = [np.zeros((6, 6))]
    assert change_of_vendi(bad, good) is None
    assert change_of_reach(good, good, bad) is None
    assert change_of_means([1.0, math.nan], [1.0, 2.0], [0, 0]) is None
    assert change_of_shares([1.0, 0.0], [math.inf, 0.0]) is None


def test_bad_input_is_refused():
    good, other = [np.zeros((6, 6))], [np.zeros((7, 7))]
    with pytest.raises(ConfigError, match=r"shapes \[\(6, 6\), \(7, 7\)\]; they must be \(n, n\) alike"):
        change_of_vendi(good, other)
    with pytest.raises(ConfigError, match=r"they must be \(n, n\), \(m, m\) and \(n, m\)"):
        change_of_reach(good, other, good, paired=False)
    with pytest.raises(ConfigError, match="of 1, 2 prompts"):
        change_of_vendi(good, good * 2)
    with pytest.raises(ConfigError, match="none of unit features"):
        change_of_vendi([5 * (1 - np.eye(6))], good)
    with pytest.raises(ConfigError, match="neighbours is 0"):
        change_of_reach(good, good, good, neighbours=0)
    with pytest.raises(ConfigError, match=r"groups has shape \(1,\)"):
        change_of_means([1.0, 2.0], [1.0, 2.0], [0])
    with pytest.raises(ConfigError, match="old and new have shapes"):
        change_of_shares([1, 0], [1])


# --- coverage, in short; scripts/bench/verdicts.py says it at length ------------------------------------

CENTRES = np.linalg.qr(np.random.default_rng(5).normal(size=(16, 16)))[0]


def in_modes(z: np.ndarray, shares) -> np.ndarray:
    """Noise (..., 17) -> unit features around orthogonal centres, of which the first noise chooses one."""
    centre = np.searchsorted(np.cumsum(shares)[:-1], stats.norm.cdf(z[..., 0]))
    return unit(CENTRES[centre] + 0.1 * z[..., 1:])


@pytest.mark.parametrize("shares", [[0.25] * 4, [0.7, 0.2, 0.1]])
@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_equal_models_get_a_verdict_in_at_most_8_of_100(shares, rho):
    """5 is asked for, and the bench measures it in 300 repeats; 8 in 100 is two standard errors more than 4."""
    rng, wrong = np.random.default_rng(12), {"vendi": 0, "reach": 0}
    for _ in range(100):
        z, e = rng.normal(size=(2, 5, 16, 17))
        old, new = in_modes(z, shares), in_modes(rho * z + math.sqrt(1 - rho**2) * e, shares)
        for name, found in (("vendi", vendi_change(old, new)), ("reach", reach_change(old, new))):
            wrong[name] += not found.low <= 0 <= found.high
    print(shares, rho, wrong)
    assert max(wrong.values()) <= 8


def test_a_lost_mode_is_shown():
    rng, less = np.random.default_rng(13), 0
    for _ in range(20):
        z = rng.normal(size=(5, 16, 17))
        less += vendi_change(in_modes(z, [0.25] * 4), in_modes(z, [0.5, 0.5])).high < 0
    assert less == 20


def test_shares_that_hardly_differ_cover():
    rng, n, hits = np.random.default_rng(14), 160, 0
    for _ in range(2000):
        change = rng.choice([-1, 0, 1], p=[0.02, 0.97, 0.01], size=n)
        old = np.where(change == 0, rng.random(n) < 0.9, change < 0)
        found = change_of_shares(old, np.where(change == 0, old, change > 0))
        hits += found.low <= -0.01 <= found.high
    assert 0.94 <= hits / 2000 <= 0.99
