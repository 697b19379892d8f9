"""Distributions of known entropy, each with the exact velocity field that leads to it from noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from flow_grpo.diffusers_patch.velocity import VelocityFn
from flow_grpo.randomness import keyed_generator
from scripts.diversity_metrics.toy_flows import GaussianFlow, MixtureFlow, UniformFlow

HALF_WIDTH = 1.5  # of the uniform
LAST_SIGMA = 0.01  # where the uniform's exact path stops
RING = {"components": 8, "radius": 2.0, "std": 0.25}
REFERENCE_DRAWS = 1_000_000  # for the entropy of the mixture in 16 dimensions


@dataclass(frozen=True)
class Target:
    """A distribution, its exact velocity field, and how finely to estimate its entropy."""

    name: str
    dims: int
    velocity: VelocityFn
    sample: Callable[[int, Generator], Tensor]  # draws of x_0, (count, D)
    log_density: Callable[[Tensor], Tensor]  # log q, at x_0 = x / (1 - last_sigma) of the exact path's end
    entropy: float  # of x_0
    theory: float  # of what the exact path reaches: the entropy of x_0, if last_sigma is 0
    theory_standard_error: float  # 0, but where the theory itself is sampled
    num_samples: int
    num_probes: int = 0  # Rademacher; 0: the exact trace
    last_sigma: float = 0.0
    learnt: bool = False  # by an MLP too


def gaussian_target(name: str, flow: GaussianFlow, num_samples: int, **options: Any) -> Target:
    """A Gaussian with all that is known of it."""
    law, entropy = flow.distribution, flow.entropy
    return Target(
        name, len(flow.mean), flow.velocity, flow.sample, law.log_prob, entropy, entropy, 0.0, num_samples, **options
    )


def uniform_target(dims: int, num_samples: int, **options: Any) -> Target:
    """The uniform on [-1.5, 1.5]^D."""
    flow = UniformFlow(HALF_WIDTH)
    return Target(
        f"uniform, {dims}-d",
        dims,
        flow.velocity,
        lambda count, generator: flow.sample(count, dims, generator),
        lambda y: flow.log_density(y, LAST_SIGMA),
        flow.entropy(dims),
        flow.entropy(dims, LAST_SIGMA),
        0.0,
        num_samples,
        last_sigma=LAST_SIGMA,
        **options,
    )


def targets(fraction: float, seed: int) -> list[Target]:
    """All of them, with `fraction` of the full numbers of samples."""

    def count(full: int) -> int:
        return max(round(fraction * full), 8)

    isotropic = [
        gaussian_target(f"Gaussian, std {std:g}, 16-d", GaussianFlow.isotropic(16, std), count(4000))
        for std in (0.1, 0.5, 2.0)
    ]
    ring, scattered = MixtureFlow.ring(**RING), MixtureFlow.random(8, 16)  # type: ignore[arg-type] # counts and lengths
    ring_entropy = ring.entropy_by_integration()
    sampled = scattered.entropy_by_sampling(count(REFERENCE_DRAWS), keyed_generator(seed, "reference"))
    return [
        *isotropic,
        gaussian_target("Gaussian, full covariance, 2-d", GaussianFlow.random(2, 1), count(20_000), learnt=True),
        gaussian_target(
            "Gaussian, full covariance, 64-d", GaussianFlow.random(64), count(1500), num_probes=4, learnt=True
        ),
        gaussian_target("Gaussian, full covariance, 1024-d", GaussianFlow.random(1024), count(128), num_probes=2),
        uniform_target(2, count(20_000), learnt=True),
        uniform_target(16, count(1000)),
        Target(
            "mixture of 8, 2-d", 2, ring.velocity, ring.sample, ring.log_density, ring_entropy, ring_entropy, 0.0,
            count(20_000), learnt=True,
        ),
        Target(
            "mixture of 8, 16-d", 16, scattered.velocity, scattered.sample, scattered.log_density, sampled[0],
            *sampled, count(2000), num_probes=4,
        ),
    ]  # fmt: skip
