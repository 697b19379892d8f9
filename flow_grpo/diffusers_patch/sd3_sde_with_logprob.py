"""One stochastic step of the sampler and the log-probability of its outcome."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flow_grpo.diffusers_patch.step import StepCoefficients, step_coefficients


@dataclass(frozen=True)
class StepResult:
    """One step x -> x' of a batch."""

    latents: Tensor  # (B, C, h, w): x'
    mean: Tensor  # (B, C, h, w): a x + b v
    log_prob: Tensor  # (B,): of x', averaged over the C h w dimensions
    std: float  # s


def step_mean(latents: Tensor, velocity: Tensor, step: StepCoefficients) -> Tensor:
    """a x + b v, in at least float32: (B, C, h, w)."""
    dtype = torch.promote_types(latents.dtype, torch.float32)
    return step.a * latents.to(dtype) + step.b * velocity.to(dtype)


def step_log_prob(next_latents: Tensor, mean: Tensor, std: float, sde_type: str) -> Tensor:
    """Log-probability of a step's outcome, averaged (not summed) over the dimensions: (B,), nats per dimension.

    `sde`, `dance`: mean over dimensions of log N(x'; mean, std^2 I). `cps`: -mean((x' - mean)^2), without the variance
    and the constants, which is the convention of its authors (arXiv 2509.05952): it is not a log-density, and a
    clip range for it is not comparable with one for `sde`.

    Raises:
        ValueError: std is 0 (an ODE step, or the last step of `cps`): the outcome has no density.
    """
    if not std > 0:
        raise ValueError(f"a step of kind {sde_type!r} with std {std} has no log-probability")
    squared = (next_latents.to(mean.dtype) - mean).square().flatten(1).mean(1)
    if sde_type == "cps":
        return -squared
    return -squared / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)


def sde_step_with_logprob(
    latents: Tensor,
    velocity: Tensor,
    sigma: float,
    sigma_next: float,
    *,
    noise_level: float,
    sde_type: str = "sde",
    noise: Tensor | None = None,
    next_latents: Tensor | None = None,
) -> StepResult:
    """Take, or score, one stochastic step.

    Args:
        latents: x, (B, C, h, w).
        velocity: v(x, sigma), (B, C, h, w).
        sigma, sigma_next: noise levels before and after, 0 <= sigma_next < sigma <= 1.
        noise_level: eta of MATH 1.
        sde_type: "sde", "dance" or "cps".
        noise: z, (B, C, h, w): draw x' = a x + b v + s z. Give exactly one of `noise` and `next_latents`.
        next_latents: a stored x' whose log-probability under this velocity is wanted.

    Raises:
        ValueError: both or neither of `noise` and `next_latents`; a deterministic step; see `step_coefficients`.
    """
    if (noise is None) == (next_latents is None):
        raise ValueError("give exactly one of noise and next_latents")
    step = step_coefficients(sde_type, sigma, sigma_next, noise_level)
    mean = step_mean(latents, velocity, step)
    if noise is not None:
        next_latents = mean + step.s * noise
    assert next_latents is not None
    return StepResult(next_latents, mean, step_log_prob(next_latents, mean, step.s, sde_type), step.s)
