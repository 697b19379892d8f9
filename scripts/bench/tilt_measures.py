"""How far points lie from a law that is known: moments, mode masses, Wasserstein distances, and their reward."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm, wasserstein_distance
from torch import Tensor

from flow_grpo.randomness import keyed_generator
from scripts.bench.tilt_problem import Flow, Problem
from scripts.diversity_metrics.toy_flows import GaussianFlow

DIRECTIONS = 16  # of the sliced distance, evenly over half a turn
QUANTILES = 4000  # midpoints that stand for a law on a line


@dataclass(frozen=True)
class Measures:
    """Distances of n points from a law; all but the reward are 0 at it, but for the noise of n draws."""

    reward: float  # mean of R
    mean: float  # |mean - that of the law|
    covariance: float  # Frobenius norm of the difference, over that of the law's covariance
    modes: float | None  # total variation of the components' masses; None: the law has one
    w1_reward: float  # Wasserstein-1 of c . x / |c|
    w1_sliced: float  # its mean over DIRECTIONS directions


def measure(x: Tensor, law: Flow, problem: Problem) -> Measures:
    """Points (n, 2) against a law; float64."""
    x = x.double()
    covariance = torch.cov(x.T)
    unit = problem.direction / problem.direction.norm()
    return Measures(
        reward=problem.reward(x).mean().item(),
        mean=(x.mean(0) - law.mean).norm().item(),
        covariance=((covariance - law.covariance).norm() / law.covariance.norm()).item(),
        modes=modes_error(x, law),
        w1_reward=w1_along(x, law, unit),
        w1_sliced=float(np.mean([w1_along(x, law, direction) for direction in _directions()])),
    )


def modes_error(x: Tensor, law: Flow) -> float | None:
    """Total variation between the law's weights and the points' mean responsibilities, whose expectation they are."""
    if isinstance(law, GaussianFlow):
        return None
    return 0.5 * (law.responsibilities(x).mean(0) - law.weights).abs().sum().item()


def w1_along(x: Tensor, law: Flow, direction: Tensor) -> float:
    """Wasserstein-1 distance between the points' and the law's projections on a unit vector."""
    return float(wasserstein_distance((x @ direction).numpy(), projected_quantiles(law, direction)))


def projected_quantiles(law: Flow, direction: Tensor) -> np.ndarray:
    """Quantiles of d . x at QUANTILES midpoints of [0, 1]."""
    levels = (np.arange(QUANTILES) + 0.5) / QUANTILES
    weights, means, stds = _projected(law, direction)
    edge = 6 * stds.max()
    grid = np.linspace(means.min() - edge, means.max() + edge, 20_001)
    return np.interp(levels, norm.cdf(grid[:, None], means, stds) @ weights, grid)


def _projected(law: Flow, direction: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, means and standard deviations of the normal components of d . x, d a unit vector: (K,) each."""
    if isinstance(law, GaussianFlow):
        std = math.sqrt((direction @ law.covariance @ direction).item())
        return np.ones(1), np.array([(law.mean @ direction).item()]), np.array([std])
    return law.weights.numpy(), (law.means @ direction).numpy(), law.stds.numpy()


def _directions() -> list[Tensor]:
    """Unit vectors, (2,) each."""
    angles = torch.arange(DIRECTIONS, dtype=torch.float64) * (math.pi / DIRECTIONS)
    return list(torch.stack([angles.cos(), angles.sin()], 1))


def exact_sample(law: Flow, count: int, seed: int) -> Tensor:
    """Draws of a law, (count, 2): what the noise of so many is."""
    return law.sample(count, keyed_generator(seed, "exact sample"))
