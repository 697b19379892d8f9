"""The law p_base exp(lambda R) from base images: reward, judge, KL, diversity and modes, with intervals (MATH 11).

A set is n images of one prompt, drawn from the law without replacement: keys log w + g, g standard Gumbel, and the n
largest (Efraimidis and Spirakis, 2006), the same g at every strength. A figure of sets is the mean over `REPEATS` of
them and over prompts.

Intervals are 95 %, of two kinds. `images`: over the base images that were drawn, the prompts fixed. Each of `HALVES`
random halves of a prompt's images gives the figure anew; the variance of a half about the mean of the halves is that of
the whole (the delete-d jackknife with d = N / 2: Shao and Wu, 1989), less what only the choice of sets adds. Images
drawn twice, as a bootstrap would have them, are no more diverse, so none is. `prompts`: Student's t over the prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import xlogy

from flow_grpo import frontier
from flow_grpo.diversity.rke import median_bandwidth
from flow_grpo.diversity.vendi import cosine_kernel, vendi_of_spectra
from flow_grpo.randomness import keyed_generator
from flow_grpo.scenes.captions import CELLS, COLOURS, OPEN_COLOURS, parse
from flow_grpo.statistics import Interval, mean_interval, normal_half_width
from scripts.study.base_images import EMPTY, BaseImages

SET_SIZE = 16
REPEATS, HALVES = 200, 40
LEAST_EFFECTIVE = 50  # images that an estimate rests on, of the prompt that has least

# Of one prompt: places of the images of sets (R, n) -> a figure of each set (R,).
SetFigure = Callable[[int, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Figure:
    """One figure of the law."""

    estimate: float
    images: Interval
    prompts: Interval


@dataclass(frozen=True)
class LawPoint:
    """The law of one strength."""

    strength: float  # lambda
    effective: float  # 1 / sum w^2, of the prompt that has least
    figures: Mapping[str, Figure]  # reward, judge, kl, and those of sets


def curve(images: BaseImages, strengths: Sequence[float], seed: int = 0, repeats: int = REPEATS) -> list[LawPoint]:
    """The law at each strength; those at which fewer than `LEAST_EFFECTIVE` images remain are left out."""
    figures = set_figures(images)
    found = []
    for strength in strengths:
        effective = frontier.point(images.reward, strength).effective
        if effective >= LEAST_EFFECTIVE or strength == 0:
            found.append(LawPoint(strength, effective, figures_at(images, strength, figures, seed, repeats)))
    return found


def is_binary(reward: np.ndarray) -> bool:
    """Whether a reward is 0 or 1: then the law at lambda = inf is the base's own right images."""
    return bool(np.isin(reward, (0, 1)).all())


def can_be_right(images: BaseImages) -> np.ndarray:
    """Of a reward of 0 or 1: which prompts have enough right images for the curve's end; of others, all. (P,) bool.

    More than `LEAST_EFFECTIVE`: of just so many, rounding would decide whether the end is left out.
    """
    if not is_binary(images.reward):
        return np.ones(len(images.prompts), bool)
    return images.reward.sum(1) > LEAST_EFFECTIVE


def strengths_of(reward: np.ndarray, points: int = 12) -> list[float]:
    """From 0 on, in about equal steps of mean reward, as far as `LEAST_EFFECTIVE` images remain."""
    low, high = 0.0, 1 / reward.std(1).max()
    if is_binary(reward):
        last = math.inf
    else:
        while frontier.point(reward, high).effective >= LEAST_EFFECTIVE:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if frontier.point(reward, middle).effective >= LEAST_EFFECTIVE else (low, middle)
        last = low
    least, most = (frontier.point(reward, strength).reward for strength in (0.0, last))
    between = [frontier.strength_for_reward(reward, level) for level in np.linspace(least, most, points)[1:-1]]
    return [0.0, *between, last]


# --- figures of one strength ----------------------------------------------------------------------------


def figures_at(
    images: BaseImages, strength: float, of_sets: Mapping[str, SetFigure], seed: int, repeats: int
) -> dict[str, Figure]:
    """All figures of the law of one strength."""
    whole: dict[str, list[float]] = {}  # of each prompt
    variance: dict[str, list[float]] = {}
    for prompt in range(len(images.prompts)):
        reward, right = images.reward[prompt], images.right[prompt]
        generator = np.random.default_rng(keyed_generator(seed, "exact law", prompt).initial_seed())
        gumbel = generator.gumbel(size=(repeats, len(reward)))
        everything = _prompt_figures(prompt, np.arange(len(reward)), reward, right, strength, of_sets, gumbel)
        halves = [
            _prompt_figures(prompt, half, reward, right, strength, of_sets, gumbel)
            for half in (np.sort(generator.permutation(len(reward))[: len(reward) // 2]) for _ in range(HALVES))
        ]
        for name, (value, _) in everything.items():
            values = np.array([half[name][0] for half in halves])
            chosen = np.mean([half[name][1] for half in halves])  # what the choice of sets adds
            whole.setdefault(name, []).append(value)
            variance.setdefault(name, []).append(max(values.var(ddof=1) - chosen, 0.0) + everything[name][1])
    return {name: _figure(whole[name], variance[name]) for name in whole}


def _figure(values: Sequence[float], variances: Sequence[float]) -> Figure:
    """The mean over prompts, whose errors are independent."""
    mean = float(np.mean(values))
    half = normal_half_width(math.sqrt(sum(variances)) / len(values))
    return Figure(mean, Interval(mean, mean - half, mean + half), mean_interval(values))


def _prompt_figures(
    prompt: int,
    kept: np.ndarray,
    reward: np.ndarray,
    right: np.ndarray,
    strength: float,
    of_sets: Mapping[str, SetFigure],
    gumbel: np.ndarray,
) -> dict[str, tuple[float, float]]:
    """By name: a figure of the law on these images of a prompt, and the variance that the choice of sets gives it."""
    w = frontier.weights(reward[kept][None], strength)[0]
    found = {
        "reward": (float(w @ reward[kept]), 0.0),
        "judge": (float(w @ right[kept]), 0.0),
        "kl": (float(xlogy(w, len(w) * w).sum()), 0.0),
    }
    sets = kept[draw_sets(w, gumbel[:, kept], SET_SIZE)]
    for name, figure in of_sets.items():
        values = figure(prompt, sets)
        found[name] = (float(values.mean()), float(values.var(ddof=1)) / len(values))
    return found


def draw_sets(w: np.ndarray, gumbel: np.ndarray, n: int) -> np.ndarray:
    """Places of n images for each row of Gumbel numbers (R, N), without replacement, by weights (N,): (R, n)."""
    with np.errstate(divide="ignore"):
        keys = np.log(w) + gumbel
    assert np.isfinite(keys).sum(1).min() >= n, "fewer images than a set has"
    return np.argpartition(-keys, n - 1, axis=1)[:, :n]


def set_figures(images: BaseImages, bandwidth: float | None = None) -> dict[str, SetFigure]:
    """Vendi and RKE of sets, and of scenes the entropies of what captions leave open; a bandwidth of None: theirs."""
    h = bandwidth_of(images) if bandwidth is None else bandwidth

    @lru_cache(maxsize=1)  # prompts come one after another
    def cosines(prompt: int) -> np.ndarray:
        return cosine_kernel(images.features[prompt])  # (N, N)

    def kernel(prompt: int, sets: np.ndarray) -> np.ndarray:
        return cosines(prompt)[sets[:, :, None], sets[:, None, :]]  # (R, n, n)

    def vendi(prompt: int, sets: np.ndarray) -> np.ndarray:
        return vendi_of_spectra(np.linalg.eigvalsh(kernel(prompt, sets)), 1.0)

    def rke(prompt: int, sets: np.ndarray) -> np.ndarray:
        squares = np.exp(-np.maximum(2 - 2 * kernel(prompt, sets), 0) / h**2)
        return sets.shape[1] ** 2 / squares.sum((1, 2))

    found: dict[str, SetFigure] = {"vendi": vendi, "rke": rke}
    return found | (_mode_figures(images) if images.labels is not None else {})


def bandwidth_of(images: BaseImages) -> float:
    """Of RKE: the median one, of some of the images."""
    return median_bandwidth([features[:200] for features in images.features])


def _mode_figures(images: BaseImages) -> dict[str, SetFigure]:
    """As `flow_grpo.evaluators.scenes.SceneModes` has them, of each set."""
    assert images.labels is not None
    assert images.colours is not None
    full = images.labels != EMPTY  # (P, N, 4)
    shown = images.colours[..., None] == np.arange(len(COLOURS))  # (P, N, 4, 8)
    colours = (shown & full[..., None]).sum(2)  # (P, N, 8)
    layouts = np.eye(2**CELLS, dtype=int)[(full << np.arange(CELLS)).sum(-1)]  # (P, N, 16)
    is_open = [parse(prompt).kind in OPEN_COLOURS for prompt in images.prompts]

    def entropy(counts: np.ndarray) -> Callable[[int, np.ndarray], np.ndarray]:
        def figure(prompt: int, sets: np.ndarray) -> np.ndarray:
            total = counts[prompt][sets].sum(1).astype(np.float64)  # (R, kinds)
            shares = total / np.maximum(total.sum(1, keepdims=True), 1)
            return -xlogy(shares, shares).sum(1)

        return figure

    colour, cell, layout = entropy(colours), entropy(full), entropy(layouts)

    def modes(prompt: int, sets: np.ndarray) -> np.ndarray:
        return cell(prompt, sets) + (colour(prompt, sets) if is_open[prompt] else 0)

    return {"modes": modes, "cells": cell, "layouts": layout}
