"""Losses at noised images: points x_t = (1 - t) x_0 + t e of the forward process, of images that any sampler has made.

The velocity that flow matching regresses on at such a point is u = e - x_0. Nothing of the sampler's trajectory is
needed, and no likelihood of it: -w |v - u|^2 takes the place of log p (MATH 9). Velocities v are those of the trained
weights, v_old those of older ones that stay as they are during an epoch.

B images, D = C h w latent dimensions; |.|^2 is the mean over D, so that a log-probability is per dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flow_grpo.losses import PolicyLoss, policy_loss

LEAST_ERROR = 1e-5  # of the adaptive weight's denominator


def stratified_times(count: int, generator: torch.Generator) -> list[float]:
    """`count` times, rising, one uniform within each [k / count, (k + 1) / count)."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    return ((torch.arange(count) + uniform) / count).tolist()


@dataclass(frozen=True)
class Point:
    """B images at one time of the forward process."""

    latents: Tensor  # (B, C, h, w): x_t
    t: float
    target: Tensor  # (B, C, h, w): u = e - x_0


def noised(x_0: Tensor, noise: Tensor, t: float) -> Point:
    """x_t = (1 - t) x_0 + t e of latents and noise, each (B, C, h, w)."""
    return Point((1 - t) * x_0 + t * noise, t, noise - x_0)


@dataclass(frozen=True)
class Velocities:
    """What two sets of weights say of a point, and what is true; each (B, C, h, w)."""

    velocity: Tensor  # v, differentiable
    old: Tensor  # v_old
    target: Tensor  # u
    t: float


def error_weight(error: Tensor, t: float, weight: str) -> Tensor:
    """w of an error (B, C, h, w) of a velocity: (B,), detached.

    "1"; "t"; "adaptive": t / mean |error|, by which w |error|^2 is the squared error of x_0_hat = x_t - t v over the
    mean of its absolute value (DiffusionNFT, arXiv 2509.16117).
    """
    if weight == "adaptive":
        return t / error.detach().abs().flatten(1).mean(1).clamp(min=LEAST_ERROR)
    return error.new_full((len(error),), t if weight == "t" else 1.0)


def nft_loss(at: Velocities, optimality: Tensor, beta: float, weight: str = "1") -> Tensor:
    """DiffusionNFT (arXiv 2509.16117): rho w |v_plus - u|^2 + (1 - rho) w |v_minus - u|^2, mean over images: scalar.

    v_plus/minus = v_old +- beta (v - v_old). With w = 1 or t it is, but for a constant,
    w beta^2 |v - v_old - (2 rho - 1) / beta (u - v_old)|^2: a good image draws the velocity to itself, a bad one pushes
    it away, as far and no farther.

    Args:
        optimality: rho, (B,) in [0, 1].
    """
    change, missing = at.velocity - at.old, at.old - at.target
    plus, minus = (
        error_weight(error, at.t, weight) * error.square().flatten(1).mean(1)
        for error in (missing + beta * change, missing - beta * change)
    )
    return (optimality * plus + (1 - optimality) * minus).mean()


def log_probs(at: Velocities, weight: str) -> tuple[Tensor, Tensor]:
    """-w |v - u|^2 under the trained and under the old weights, (B,) each, with one w, that of the old error."""
    w = error_weight(at.old - at.target, at.t, weight)
    new, old = (-w * (v - at.target).square().flatten(1).mean(1) for v in (at.velocity, at.old))
    return new, old.detach()


def awm_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float) -> PolicyLoss:
    """Advantage-weighted matching (arXiv 2509.25050) under PPO's clip.

    At the old weights its gradient is that of A w |v - u|^2. That quadratic form has no lower bound where A < 0; the
    ratio's clip ends its pull.
    """
    return policy_loss(log_prob - old_log_prob, advantages, clip_range)


def pepg_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Tensor:
    """Proximal policy gradient of the tilt (PEPG, arXiv 2602.04663): -mean (A - log sg r) sg r log p, scalar.

    r = p / p_old. Over samples of p_old its gradient is that of KL(p || p_old exp(A) / Z), so it is at rest there.
    """
    ratio = (log_prob - old_log_prob).detach()
    return -((advantages - ratio) * ratio.exp() * log_prob).mean()


def par_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Tensor:
    """The same by regression (PAR, arXiv 2602.04663): mean of sg r (A - log r)^2 / 2, scalar.

    Its gradient is PEPG's, term by term; its value says how far log r is from A.
    """
    log_ratio = log_prob - old_log_prob
    return (log_ratio.detach().exp() * (advantages - log_ratio).square()).mean() / 2
