"""The rollout: from latents along a sampler's steps. Every walk of the code base is this one."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flow_grpo.diffusers_patch.sd3_sde_with_logprob import step_mean
from flow_grpo.diffusers_patch.step import StepCoefficients
from flow_grpo.diffusers_patch.velocity import VelocityFn


@dataclass(frozen=True)
class RolloutStep:
    """One executed step, x -> x' = a x + b v + s z."""

    index: int
    sigma: float  # noise level at which the network was evaluated
    coefficients: StepCoefficients
    latents: Tensor  # (B, ...): x
    velocity: Tensor  # (B, ...): v
    mean: Tensor  # (B, ...): a x + b v
    next_latents: Tensor  # (B, ...): x'


def rollout(
    velocity: VelocityFn,
    latents: Tensor,
    sigmas: Sequence[float],
    steps: Sequence[StepCoefficients],
    *,
    generators: list[torch.Generator] | None = None,
    enable_grad: bool = False,
    trained_steps: Collection[int] | None = None,
    detach: bool = False,
) -> Iterator[RolloutStep]:
    """Walk the steps one by one. Nothing is kept: who walks keeps what he needs.

    Args:
        velocity: v(x, sigma), already guided and bound to the prompts.
        latents: (B, ...): where the walk begins.
        sigmas: noise level at which each step evaluates the network; those beyond the steps are not read.
        steps: what each step does.
        generators: one per image, from which the noise of steps with s > 0 is drawn in order.
        enable_grad: keep the autograd graph; else no step has one.
        trained_steps: indices of the steps whose velocity carries gradient; None: all.
        detach: cut the graph in front of the network, so that only the linear path x' = a x + b v carries it.

    Yields:
        Each step when it has been taken, in float32 (float64 if the latents are).
    """
    x = latents.to(torch.promote_types(latents.dtype, torch.float32))
    for i, step in enumerate(steps):
        with torch.set_grad_enabled(enable_grad and (trained_steps is None or i in trained_steps)):
            v = velocity(x.detach() if detach else x, sigmas[i])
        with torch.set_grad_enabled(enable_grad):  # not around the yield: it would hold for the caller, too
            mean = after = step_mean(x, v, step)
            if step.s > 0:
                after = mean + step.s * randn_tensor(x.shape, generator=generators, device=x.device, dtype=x.dtype)
        yield RolloutStep(i, sigmas[i], step, x, v, mean, after)
        x = after


def ode_steps(sigmas: Sequence[float]) -> list[StepCoefficients]:
    """Euler's steps of dx/dsigma = v between noise levels that fall or rise: one less than there are levels."""
    return [StepCoefficients(1.0, after - now, 0.0) for now, after in itertools.pairwise(sigmas)]
