"""The exact frontier: what a reward itself asks of a base model, from the base model's samples alone (MATH 11).

Of all laws of a mean reward, the one nearest to the base model, by KL divergence, is p_lambda ~ p_base exp(lambda R).
R is (P, N): rewards of N base images of each of P prompts. An image's weight under p_lambda is

    w = softmax(lambda R)  over its prompt's N,     E f = sum w f,     KL(p_lambda, p_base) = sum w log(N w),

and 1 / sum w^2 is the number of images that the estimate rests on: near 1, it says nothing. One lambda serves all
prompts; figures are means over prompts. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import softmax, xlogy

from flow_grpo.diversity.vendi import vendi_from_kernel
from flow_grpo.errors import ConfigError
from flow_grpo.randomness import keyed_generator
from flow_grpo.statistics import mean_interval

Score = Callable[[int, np.ndarray], float]  # of a prompt's images, by their places (n,)

PRECISION = 1e-4  # relative, of a strength that is found by bisection


@dataclass(frozen=True)
class Point:
    """The law of one strength, as means over prompts."""

    strength: float  # lambda
    reward: float
    kl: float  # to the base, nats
    effective: float  # samples, of the prompt that has least: 1 / sum w^2


@dataclass(frozen=True)
class Draws:
    """`repeats` sets of n images of each prompt, for every strength from the same uniform numbers.

    An image is the quantile of a uniform number among its prompt's images in the order of their rewards, so that none
    drawn has less reward at more strength: curves are smooth, and nearly monotone, in the strength. Images are drawn
    with replacement, as independent samples of the law are: where few are effective, the same one comes more than once
    and the diversity is that of the pool, below the law's own.
    """

    rewards: np.ndarray  # (P, N)
    uniform: np.ndarray  # (P, repeats, n) in [0, 1)

    @classmethod
    def of(cls, rewards: ArrayLike, n: int, repeats: int, seed: int) -> Draws:
        """Keyed by (seed, prompt, repeat)."""
        r = _checked(rewards)
        if n < 2 or repeats < 1:
            raise ConfigError(f"n = {n} and repeats = {repeats}; diversity needs at least 2 images, drawn once.")
        uniform = [
            [_uniform(keyed_generator(seed, "frontier", prompt, repeat), n) for repeat in range(repeats)]
            for prompt in range(len(r))
        ]
        return cls(r, np.array(uniform))

    def at(self, strength: float) -> np.ndarray:
        """Places of the images drawn at this strength, (P, repeats, n)."""
        order = self.rewards.argsort(1, kind="stable")  # (P, N), rewards rising
        cumulative = np.take_along_axis(weights(self.rewards, strength), order, 1).cumsum(1)
        places = [
            row[np.minimum(np.searchsorted(sums / sums[-1], u, side="right"), len(row) - 1)]
            for row, sums, u in zip(order, cumulative, self.uniform, strict=True)
        ]
        return np.array(places)


def weights(rewards: ArrayLike, strength: float) -> np.ndarray:
    """softmax(lambda R) of each prompt's rewards (P, N) -> (P, N); a strength of inf: the best ones, alike."""
    r = _checked(rewards)
    if math.isnan(strength):
        raise ConfigError("the strength is nan; it takes a number, inf included.")
    if math.isinf(strength):
        best = r == (r.max(1, keepdims=True) if strength > 0 else r.min(1, keepdims=True))
        return best / best.sum(1, keepdims=True)
    return softmax(strength * (r - r.max(1, keepdims=True)), axis=1)


def point(rewards: ArrayLike, strength: float) -> Point:
    """Mean reward, KL divergence and effective samples of p_lambda; rewards (P, N)."""
    w = weights(rewards, strength)
    return Point(strength, expectation(w, rewards), _kl(w), float((1 / np.square(w).sum(1)).min()))


def expectation(w: np.ndarray, values: ArrayLike) -> float:
    """The mean under weights (P, N) of any figure of the images (P, N), such as being right to a judge."""
    f = np.asarray(values, dtype=np.float64)
    if f.shape != w.shape:
        raise ConfigError(f"the values have shape {f.shape}, the weights {w.shape}; they must agree.")
    return float((w * f).sum(1).mean())


# --- the strength ---------------------------------------------------------------------------------------


def strength_for_reward(rewards: ArrayLike, reward: float) -> float:
    """The lambda >= 0 at which the mean reward is this; ConfigError unless base samples of R (P, N) reach it."""
    r = _checked(rewards)
    return _root(r, lambda w: expectation(w, r), reward, "mean reward")


def strength_for_kl(rewards: ArrayLike, kl: float) -> float:
    """The lambda >= 0 at which the KL to the base, nats, mean over prompts, is this; ConfigError if out of reach."""
    return _root(_checked(rewards), _kl, kl, "KL divergence")


def _root(r: np.ndarray, figure: Callable[[np.ndarray], float], wanted: float, what: str) -> float:
    """Where a figure of the weights, which rises with the strength, has the wanted value."""
    lowest, highest = figure(weights(r, 0.0)), figure(weights(r, math.inf))
    if wanted == lowest:
        return 0.0
    if not lowest < wanted < highest:
        raise ConfigError(
            f"a {what} of {wanted:g} is out of reach of these {r.shape[1]} base samples a prompt; it takes "
            f"{lowest:g} (the base's) to below {highest:g} (the best sample's alone)."
        )

    def excess(strength: float) -> float:
        return figure(weights(r, strength)) - wanted

    high = 1 / r.std(1).max()
    while excess(high) < 0:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-14 * high, rtol=1e-14))


# --- diversity ------------------------------------------------------------------------------------------


def of_features(features: np.ndarray, score: Callable[[np.ndarray], float]) -> Score:
    """A score of features (n, d), as `vendi_score` or `rke_score` with its bandwidth, of images that have (P, N, d)."""
    return lambda prompt, places: score(features[prompt][places])


def of_kernels(kernels: np.ndarray, order: float = 1.0) -> Score:
    """Vendi_q from kernel matrices (P, N, N)."""
    return lambda prompt, places: vendi_from_kernel(kernels[prompt][np.ix_(places, places)], order)


def diversity(draws: Draws, strength: float, score: Score) -> tuple[float, float]:
    """Of n images of one prompt: the mean over draws and prompts, and half its 95 % interval over draws (nan of one).

    The interval is that of drawing from these base samples; that there are N of them, and P prompts, is not in it.
    """
    found = [[score(prompt, places) for places in sets] for prompt, sets in enumerate(draws.at(strength))]
    interval = mean_interval(np.mean(found, axis=0))  # (repeats,): prompts are fixed
    return interval.estimate, (interval.high - interval.low) / 2


def strength_for_share(draws: Draws, share: float, score: Score) -> float:
    """The strength at which the diversity falls to a share of the base's, in (0, 1]: bisection to `PRECISION`.

    On common random numbers the curve is a step function, nearly but not exactly falling: what is returned is one of
    its crossings, from the side where the share is still at least the wanted one.

    Raises:
        ConfigError: n copies of the best base sample are more diverse than that.
    """
    base, last = (diversity(draws, strength, score)[0] for strength in (0.0, math.inf))
    if not last / base < share <= 1:
        raise ConfigError(
            f"a share of {share:g} of the base's diversity is out of reach; it takes more than {last / base:g} (the "
            "best samples' alone), and at most 1."
        )
    spread = draws.rewards.std(1).max()
    low, high = 0.0, 1 / spread
    while diversity(draws, high, score)[0] >= share * base:
        low, high = high, 2 * high
    while high - low > PRECISION * max(high, 1 / spread):
        middle = (low + high) / 2
        if diversity(draws, middle, score)[0] >= share * base:
            low = middle
        else:
            high = middle
    return low


def _kl(w: np.ndarray) -> float:
    return float(xlogy(w, w.shape[1] * w).sum(1).mean())


def _checked(rewards: ArrayLike) -> np.ndarray:
    r = np.asarray(rewards, dtype=np.float64)
    if r.ndim != 2 or r.shape[1] < 2 or not len(r) or not np.isfinite(r).all():
        raise ConfigError(
            f"rewards have shape {r.shape}{'' if np.isfinite(r).all() else ', and some are not finite'}; they must be "
            "finite and (P, N), those of N >= 2 base images of each of P prompts."
        )
    return r


def _uniform(generator: torch.Generator, n: int) -> np.ndarray:
    """(n,) float64 in [0, 1)."""
    return torch.rand(n, generator=generator, dtype=torch.float64).numpy()
