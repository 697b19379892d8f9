"""LeapAlign (arXiv 2604.15311): the reward's gradient through two Euler leaps k -> j -> 0, in place of the rollout."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flow_grpo.diffusers_patch.rollout import rollout
from flow_grpo.loops.draft import checkpointed
from flow_grpo.loops.drtune import Chain, drawn_chain
from flow_grpo.loops.reward_gradient import Gradient, Objective, Value, train_by
from flow_grpo.policy import Policy
from flow_grpo.settings import Settings


def leap_gradient(
    objective: Objective,
    latents: Tensor,
    generators: list[torch.Generator] | None = None,
    *,
    chain: Chain,
    first: int,
    second: int,
    alpha: float,
    tau: float,
) -> Value:
    """Accumulate the gradient of the weighted mean loss through the leaps from step `first` and from step `second`.

    With x_k, x_j the rollout's own states at these steps and x_0 its end,

        y_j = x_k + (sigma_j - sigma_k) v(x_k),   x_j' = y_j + sg(x_j - y_j),
        y_0 = x_j' - sigma_j v(alpha x_j' + (1 - alpha) sg x_j),   x_0' = y_0 + sg(x_0 - y_0):

    the values are those of the rollout, and the gradients those of the leaps. An image counts with
    1 / (max(|x_j - y_j|, tau) + max(|x_0 - y_0|, tau)), of absolute errors averaged over its dimensions.
    """
    states, x0 = {}, latents
    with torch.no_grad():
        for taken in rollout(objective.velocity, latents, chain.sigmas, chain.steps, generators=generators):
            if taken.index in (first, second):
                states[taken.index] = taken.latents
            x0 = taken.next_latents
    losses, gradient = objective.image_gradient(x0)

    velocity, sigma_k, sigma_j = checkpointed(objective.velocity), chain.sigmas[first], chain.sigmas[second]
    x_k, x_j = states[first], states[second]
    v_k = velocity(x_k, sigma_k)
    y_j = x_k + (sigma_j - sigma_k) * v_k
    through = y_j + (x_j - y_j).detach()
    v_j = velocity(alpha * through + (1 - alpha) * x_j, sigma_j)
    y_0 = through - sigma_j * v_j
    weights = 1 / (_error(x_j, y_j).clamp(min=tau) + _error(x0, y_0).clamp(min=tau))  # (B,)
    penalty = (objective.penalty(x_k, sigma_k, v_k) + objective.penalty(x_j, sigma_j, v_j)) / 2
    objective.backward(((gradient * y_0).flatten(1).sum(1) * weights).mean() + penalty)
    return Value(losses.mean(), {"kl_penalty": penalty.detach()})


def _error(x: Tensor, leapt: Tensor) -> Tensor:
    """Mean absolute difference of each image, (B,), without gradient."""
    return (x - leapt).detach().abs().flatten(1).mean(1)


def _leapalign(policy: Policy, settings: Settings, generator: torch.Generator) -> Gradient:
    """Two different steps, every pair as likely."""
    keys, chain = settings.config.leapalign, drawn_chain(policy, settings, generator)
    first, second = torch.randperm(len(chain.steps), generator=generator)[:2].sort().values.tolist()
    return partial(leap_gradient, chain=chain, first=first, second=second, alpha=keys.alpha, tau=keys.tau)


train_epoch = partial(train_by, _leapalign)
