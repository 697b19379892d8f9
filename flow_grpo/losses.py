"""Losses of both training loops: pure functions of tensors.

Log-probabilities, means and divergences are averaged over the D latent dimensions (see `step_log_prob`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped objective of one step of a batch, and what is logged of it (scalars, detached but `loss`)."""

    loss: Tensor
    ratio_mean: Tensor
    clip_fraction: Tensor  # share of ratios outside [1 - c, 1 + c]
    approx_kl: Tensor  # mean of (log r)^2 / 2
    log_ratio_mean: Tensor  # mean of log r


def policy_loss(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> PolicyLoss:
    """PPO's clipped loss (arXiv 1707.06347, eq. 7): mean of max(-A r, -A clip(r, 1 - c, 1 + c)), r = exp(log_ratio).

    Args:
        log_ratio: (B,), differentiable.
        advantages: (B,), already clamped.
        clip_range: c.
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
    with torch.no_grad():
        return PolicyLoss(
            loss=loss,
            ratio_mean=ratio.mean(),
            clip_fraction=((ratio - 1).abs() > clip_range).to(ratio.dtype).mean(),
            approx_kl=0.5 * log_ratio.square().mean(),
            log_ratio_mean=log_ratio.mean(),
        )


def normalized_log_ratio(log_ratio: Tensor, mean: Tensor, mean_old: Tensor, std: float) -> Tensor:
    """GRPO-Guard's ratio normalisation (arXiv 2510.22319): log r <- s log r + |mu - mu_old|^2 / (2 s D), (B,).

    Derivation: x' = mu_old + s z, so with d = mu - mu_old the per-dimension log r is (z d) / s - d^2 / (2 s^2).
    Its second term pulls the ratio below 1 and its first grows as s shrinks. The normalised form is mean(z d): centred,
    and on one scale at every step. The caller divides the loss by -dt to even out the steps' gradients.

    Args:
        log_ratio: (B,), of `sde` or `dance` steps (of `cps` there is no variance in it to undo).
        mean, mean_old: (B, C, h, w), under the current and the sampling weights.
        std: s of the step.
    """
    drift = (mean - mean_old).square().flatten(1).mean(1)
    return std * log_ratio + drift / (2 * std)


def gaussian_kl(mean: Tensor, mean_ref: Tensor, std: float) -> Tensor:
    """KL(N(mean, s^2 I) || N(mean_ref, s^2 I)) / D = mean((mu - mu_ref)^2) / (2 s^2), averaged over the batch: scalar.

    s holds the factor sqrt(-dt). Flow-GRPO's code leaves that factor out of this formula, so that its `beta` weighs
    differently: there the term is -dt times the one here.
    """
    return (mean - mean_ref).square().mean() / (2 * std**2)


def velocity_kl(velocity: Tensor, velocity_ref: Tensor) -> Tensor:
    """mean((v - v_ref)^2), averaged over batch and dimensions: scalar. The form for steps without noise."""
    return (velocity - velocity_ref).square().mean()


def kl_weight(beta: float, sigma: float, least: float) -> float:
    """The weight of the KL divergence at a noise level: beta at levels of at least `least`, the early steps; else 0."""
    return beta if sigma >= least else 0.0


def reward_losses(rewards: Tensor, hinge: float = 0.0) -> Tensor:
    """-R, or with a hinge c > 0 relu(c - R), which stops pushing an image once its reward is c: (B,) of (B,)."""
    return torch.relu(hinge - rewards) if hinge > 0 else -rewards


def finite_difference_log_ratio(velocity: Tensor, velocity_old: Tensor, delta: Tensor) -> Tensor:
    """log r = -|v - v*|^2 + |v_old - v*|^2, v* = v_old - Delta / |Delta|^2 (FDFO, arXiv 2603.12893): (B,).

    |.|^2 is the mean over dimensions. Written out, -|v - v_old|^2 - 2 <v - v_old, Delta> / |Delta|^2, without the
    rounding of two large terms that cancel: exactly 0 at v_old.

    Args:
        velocity, velocity_old: (B, C, h, w).
        delta: (B, C, h, w), half the difference of an image's final latents from its partner's; not 0.
    """
    change = velocity - velocity_old
    along = (change * delta).flatten(1).mean(1) / delta.square().flatten(1).mean(1)
    return -change.square().flatten(1).mean(1) - 2 * along


def finite_difference_loss(log_ratio: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """-dR r + |dR| (r - 1)^2 / (2 epsilon) of each image: (B,). At rest where r is 1 + epsilon sign(dR).

    Args:
        log_ratio: (B,), differentiable.
        gain: dR, (B,): half the difference of an image's reward from its partner's.
    """
    ratio = log_ratio.exp()
    return -gain * ratio + gain.abs() * (ratio - 1).square() / (2 * epsilon)
