"""Sampling: from noise to latents, with the log-probability of every stochastic step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from flow_grpo.diffusers_patch.rollout import rollout
from flow_grpo.diffusers_patch.sd3_sde_with_logprob import step_log_prob
from flow_grpo.diffusers_patch.step import step_coefficients
from flow_grpo.diffusers_patch.velocity import VelocityFn
from flow_grpo.types import Trajectory


def stochastic_steps(sigmas: Sequence[float], sde_type: str, noise_level: float) -> tuple[int, ...]:
    """Indices of the steps that draw noise (s > 0): none for `ode`, all but the last for `cps`."""
    pairs = itertools.pairwise(sigmas)
    return tuple(
        i for i, (now, after) in enumerate(pairs) if step_coefficients(sde_type, now, after, noise_level).s > 0
    )


def pipeline_with_logprob(
    velocity: VelocityFn,
    latents: Tensor,
    sigmas: Tensor,
    *,
    sde_type: str = "ode",
    noise_level: float = 0.0,
    window: Sequence[int] | None = None,
    generators: list[torch.Generator] | None = None,
    enable_grad: bool = False,
    keep_means: bool = False,
) -> Trajectory:
    """Sample x_0 from x_1 = `latents`.

    Args:
        velocity: v(x, sigma), already guided and bound to the prompts.
        latents: (B, C, h, w), standard normal noise.
        sigmas: (T + 1,), decreasing, the last is 0.
        sde_type, noise_level: the kind of the stochastic steps, MATH 1.
        window: steps that may be stochastic, the others are ODE steps (Flow-GRPO-Fast, MixGRPO); None: all.
        generators: one per image, from which the noise of its steps is drawn in order.
        enable_grad: keep the autograd graph of the whole rollout.
        keep_means: of the stochastic steps, as large as their latents; else the trajectory has none.

    Returns:
        The trajectory, in float32 (float64 if the latents are): the precision in which its log-probabilities are.
    """
    levels = sigmas.tolist()
    allowed = range(len(levels) - 1) if window is None else window
    noisy = [i for i in stochastic_steps(levels, sde_type, noise_level) if i in allowed]
    kinds = [(sde_type, noise_level) if i in noisy else ("ode", 0.0) for i in range(len(levels) - 1)]
    ends = itertools.pairwise(levels)
    steps = [step_coefficients(kind, *pair, eta) for (kind, eta), pair in zip(kinds, ends, strict=True)]
    x = latents.to(torch.promote_types(latents.dtype, torch.float32))
    states, means, log_probs = [x], [], []
    for taken in rollout(velocity, x, levels, steps, generators=generators, enable_grad=enable_grad):
        states.append(taken.next_latents)
        if taken.index in noisy:
            if keep_means:
                means.append(taken.mean)
            with torch.set_grad_enabled(enable_grad):
                log_probs.append(step_log_prob(taken.next_latents, taken.mean, taken.coefficients.s, sde_type))
    return Trajectory(
        latents=torch.stack(states, 1),
        sigmas=sigmas,
        stochastic_steps=tuple(noisy),
        means=torch.stack(means, 1) if means else None,
        log_probs=torch.stack(log_probs, 1) if log_probs else x.new_zeros(len(x), 0),
    )
