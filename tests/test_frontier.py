"""The law p_base exp(lambda R) of base samples, against closed forms."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from scipy.special import expit, logsumexp
from scipy.stats import norm

from flow_grpo import frontier
from flow_grpo.diversity.rke import rke_score
from flow_grpo.diversity.vendi import cosine_kernel, vendi_score
from flow_grpo.errors import ConfigError
from flow_grpo.frontier import (
    Draws,
    diversity,
    expectation,
    of_features,
    of_kernels,
    point,
    strength_for_kl,
    strength_for_reward,
    strength_for_share,
    weights,
)

GENERATOR = np.random.default_rng(0)
REWARDS = GENERATOR.normal(size=(3, 50))  # (P, N)
RIGHT, ALL = np.array([8, 3]), 20  # right images of each prompt, of so many
BINARY = np.array([[1.0] * right + [0.0] * (ALL - right) for right in RIGHT])


def gaussian(mean, std, n=400_000):
    """(1, n) evenly spaced quantiles."""
    return norm.ppf((np.arange(n) + 0.5) / n, mean, std)[None]


# --- weighted means -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.5, 1.0, 4.0])
def test_gaussian_rewards_move_by_lambda_s2_and_cost_half_its_square(strength):
    mean, std = 0.3, 0.25
    found = point(gaussian(mean, std), strength)
    assert found.reward == pytest.approx(mean + strength * std**2, rel=1e-4)
    assert found.kl == pytest.approx(strength**2 * std**2 / 2, rel=2e-3)
    assert found.effective == pytest.approx(400_000 * math.exp(-(strength**2) * std**2), rel=2e-3)


def test_binary_rewards_have_the_law_of_the_right_and_the_wrong_ones():
    p, strength = RIGHT / ALL, 1.7
    pi = p * np.exp(strength) / (1 - p + p * np.exp(strength))
    found = point(BINARY, strength)
    assert found.reward == pytest.approx(pi.mean(), rel=1e-12)
    kl = pi * np.log(pi / p) + (1 - pi) * np.log((1 - pi) / (1 - p))
    assert found.kl == pytest.approx(kl.mean(), rel=1e-12)


def test_kl_is_the_legendre_transform_of_the_log_mean():
    """KL = lambda E R - log mean exp(lambda R): written without the weights' logarithms."""
    for strength in (-2.0, 0.0, 0.1, 30.0):
        found = point(REWARDS, strength)
        log_mean = logsumexp(strength * REWARDS, axis=1).mean() - math.log(REWARDS.shape[1])
        assert found.kl == pytest.approx(strength * found.reward - log_mean, rel=1e-9, abs=1e-12)


def test_a_small_strength_is_the_base_and_an_infinite_one_the_best_samples():
    base, best = point(REWARDS, 0.0), point(REWARDS, math.inf)
    assert (base.reward, base.kl, base.effective) == pytest.approx((REWARDS.mean(), 0.0, 50))
    assert (best.reward, best.kl, best.effective) == pytest.approx((REWARDS.max(1).mean(), math.log(50), 1))
    near, far = point(REWARDS, 1e-6), point(REWARDS, 1e6)
    assert near.reward - base.reward == pytest.approx(1e-6 * REWARDS.var(1).mean(), rel=1e-4)
    assert (far.reward, far.kl) == pytest.approx((best.reward, best.kl))


def test_best_samples_that_tie_share_the_weight():
    assert weights(BINARY, math.inf)[0].tolist() == [1 / 8] * 8 + [0.0] * 12


def test_another_figure_of_the_images_is_its_weighted_mean():
    w = weights(BINARY, 0.4)
    assert expectation(w, BINARY) == pytest.approx(point(BINARY, 0.4).reward, rel=1e-14)
    assert expectation(w, np.ones_like(BINARY)) == pytest.approx(1.0, rel=1e-14)
    with pytest.raises(ConfigError, match=r"shape \(2, 3\).*must agree"):
        expectation(w, np.ones((2, 3)))


def test_large_strengths_neither_overflow_nor_underflow_to_nothing():
    assert np.isfinite(weights(1e6 * REWARDS, 1e6)).all()


# --- the strength ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [0.3, 0.6, 0.999])
def test_the_strength_for_a_reward_is_that_of_the_closed_form(wanted):
    """One accuracy for all prompts: logit pi = logit p + lambda."""
    p = 0.25
    strength = strength_for_reward(np.array([[1.0, 0, 0, 0]] * 3), wanted)
    assert expit(math.log(p / (1 - p)) + strength) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize(("find", "of"), [(strength_for_reward, "reward"), (strength_for_kl, "kl")])
def test_the_strength_found_is_that_of_the_figure_wanted(find, of):
    for strength in (1e-3, 0.7, 12.0):
        assert find(REWARDS, getattr(point(REWARDS, strength), of)) == pytest.approx(strength, rel=1e-6)
    assert find(REWARDS, getattr(point(REWARDS, 0.0), of)) == 0.0


@pytest.mark.parametrize(
    ("find", "wanted", "what"),
    [
        (strength_for_reward, REWARDS.max(1).mean(), "mean reward"),
        (strength_for_reward, REWARDS.mean() - 0.01, "mean reward"),
        (strength_for_kl, math.log(50), "KL divergence"),
        (strength_for_kl, math.nan, "KL divergence"),
    ],
)
def test_what_no_base_sample_reaches_is_refused_with_what_would_do(find, wanted, what):
    with pytest.raises(ConfigError, match=f"a {what} of .* is out of reach of these 50 base samples"):
        find(REWARDS, wanted)


@pytest.mark.parametrize("bad", [[1.0, 2.0], [[1.0]], [[1.0, math.nan]], np.zeros((0, 4))])
def test_rewards_of_another_shape_or_not_finite_are_refused(bad):
    with pytest.raises(ConfigError, match="they must be finite and"):
        point(bad, 1.0)


@pytest.mark.parametrize("broken", [lambda r, s: weights(-r, s), lambda r, s: weights(r, s / 2)])
def test_a_sign_or_a_factor_that_is_wrong_fails_the_closed_form(monkeypatch, broken):
    monkeypatch.setattr(frontier, "weights", broken)
    with pytest.raises(AssertionError):
        test_gaussian_rewards_move_by_lambda_s2_and_cost_half_its_square(1.0)
    with pytest.raises(AssertionError):
        test_binary_rewards_have_the_law_of_the_right_and_the_wrong_ones()


# --- diversity ------------------------------------------------------------------------------------------

FEATURES = GENERATOR.normal(size=(3, 50, 6))  # (P, N, d)


def test_images_are_drawn_as_often_as_their_weights_say():
    rewards = np.array([[0.0, 1.0, 3.0]])
    places = Draws.of(rewards, n=100, repeats=400, seed=0).at(0.8).ravel()
    shares = np.bincount(places, minlength=3) / len(places)
    assert shares == pytest.approx(np.exp(0.8 * rewards[0]) / np.exp(0.8 * rewards[0]).sum(), abs=0.01)


def test_no_image_drawn_has_less_reward_at_more_strength():
    draws = Draws.of(REWARDS, n=8, repeats=5, seed=0)
    rewards = [np.take_along_axis(REWARDS[:, None], draws.at(strength), 2) for strength in (0.0, 0.5, 2.0, 50.0)]
    assert all((more >= less).all() for less, more in pairwise(rewards))


def test_draws_are_keyed_by_prompt_and_repeat():
    few, many = Draws.of(REWARDS[:2], 8, 2, seed=1), Draws.of(REWARDS, 8, 5, seed=1)
    assert (few.uniform == many.uniform[:2, :2]).all()
    assert (few.uniform != Draws.of(REWARDS[:2], 8, 2, seed=2).uniform).any()


def test_features_and_their_kernel_have_one_score():
    draws = Draws.of(REWARDS, n=6, repeats=3, seed=0)
    kernels = np.stack([cosine_kernel(features) for features in FEATURES])
    of_both = (diversity(draws, 0.3, score)[0] for score in (of_features(FEATURES, vendi_score), of_kernels(kernels)))
    assert next(of_both) == pytest.approx(next(of_both), rel=1e-9)


def test_the_diversity_of_two_kinds_is_that_of_a_binomial():
    """Orthogonal features of right and wrong: RKE of n images, k of them right, is n^2 / (k^2 + (n - k)^2)."""
    n, strength = 4, 0.9
    features = np.stack([BINARY, 1 - BINARY], -1) * 100.0  # far apart for a bandwidth of 1
    draws = Draws.of(BINARY, n, repeats=4000, seed=0)
    found, half = diversity(draws, strength, of_features(features, partial(rke_score, bandwidth=1.0)))
    p = RIGHT / ALL
    pi = p * np.exp(strength) / (1 - p + p * np.exp(strength))
    chance = [[math.comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(n + 1)] for q in pi]
    exact = np.mean(np.array(chance) @ [n**2 / (k**2 + (n - k) ** 2) for k in range(n + 1)])
    assert 0 < half < 0.03
    assert found == pytest.approx(exact, abs=2 * half)


@pytest.mark.parametrize("share", [1.0, 0.9, 0.6])
def test_the_strength_for_a_share_is_where_the_curve_crosses_it(share):
    draws, score = Draws.of(REWARDS, n=8, repeats=20, seed=0), of_features(FEATURES, vendi_score)
    base, strength = diversity(draws, 0.0, score)[0], strength_for_share(draws, share, score)
    after = strength + 2 * frontier.PRECISION * max(strength, 1 / REWARDS.std(1).max())
    assert diversity(draws, strength, score)[0] >= share * base > diversity(draws, after, score)[0]


def test_a_share_that_only_fewer_images_have_is_refused():
    draws, score = Draws.of(REWARDS, n=8, repeats=2, seed=0), of_features(FEATURES, vendi_score)
    for share in (0.1, 1.1):
        with pytest.raises(ConfigError, match=f"a share of {share} of the base's diversity is out of reach"):
            strength_for_share(draws, share, score)


def test_a_set_of_one_is_refused():
    with pytest.raises(ConfigError, match="n = 1 and repeats = 2"):
        Draws.of(REWARDS, n=1, repeats=2, seed=0)
