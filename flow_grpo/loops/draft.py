"""Reward gradients by full back-propagation: DRaFT-K and DRaFT-LV (arXiv 2309.17400), AlignProp (arXiv 2310.03739).

From some step on, the network's input carries gradient too, so that autograd sees how one velocity moves the next.
Each trained step is checkpointed: what is kept of it is its input, and it runs again in the backward pass.
"""

from __future__ import annotations

from functools import partial

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flow_grpo.diffusers_patch.rollout import rollout
from flow_grpo.diffusers_patch.velocity import VelocityFn
from flow_grpo.loops.drtune import Chain, drawn_chain
from flow_grpo.loops.reward_gradient import Gradient, Objective, Value, train_by
from flow_grpo.policy import Policy
from flow_grpo.settings import Settings


def checkpointed(velocity: VelocityFn) -> VelocityFn:
    """The same velocity; where it carries gradient, its activations are computed again instead of kept."""

    def recomputed(latents: Tensor, sigma: float) -> Tensor:
        if not torch.is_grad_enabled():
            return velocity(latents, sigma)
        found = checkpoint(velocity, latents, sigma, use_reentrant=False)
        assert isinstance(found, Tensor)
        return found

    return recomputed


def attached_gradient(
    objective: Objective,
    latents: Tensor,
    generators: list[torch.Generator] | None = None,
    *,
    chain: Chain,
    first: int,
) -> Value:
    """Accumulate the gradient of the mean loss through every step from `first` on, and of the penalty there.

    The penalty's gradient runs through the network's input, too; the reference velocity there is held.
    """
    trained, penalties = range(first, len(chain.steps)), []
    x0 = latents
    for taken in rollout(
        checkpointed(objective.velocity), latents, chain.sigmas, chain.steps,
        generators=generators, enable_grad=True, trained_steps=trained,
    ):  # fmt: skip
        if taken.index in trained:
            penalties.append(objective.penalty(taken.latents, taken.sigma, taken.velocity) / len(trained))
        x0 = taken.next_latents
    losses, gradient = objective.image_gradient(x0)
    penalty = torch.stack(penalties).sum()
    objective.backward((gradient * x0).sum() / len(x0) + penalty)
    return Value(losses.mean(), {"kl_penalty": penalty.detach()})


def low_variance_gradient(
    objective: Objective,
    latents: Tensor,
    generators: list[torch.Generator] | None = None,
    *,
    chain: Chain,
    copies: int,
) -> Value:
    """DRaFT-LV: the gradient through the last step, averaged over `copies` of the image that are noised again to it.

    With sigma the level of the last step, x = (1 - sigma) sg x_0 + sigma e, and x0_hat = x - sigma v(x, sigma) is what
    is rewarded. One copy is in memory at a time.
    """
    x0 = latents
    with torch.no_grad():
        for taken in rollout(objective.velocity, latents, chain.sigmas, chain.steps, generators=generators):
            x0 = taken.next_latents
    sigma, losses, penalties = chain.sigmas[-1], [], []
    for _ in range(copies):
        noise = randn_tensor(x0.shape, generator=generators, device=x0.device, dtype=x0.dtype)
        x = (1 - sigma) * x0 + sigma * noise
        v = objective.velocity(x, sigma)
        loss, gradient = objective.image_gradient(x - sigma * v)
        penalty = objective.penalty(x, sigma, v) / copies
        objective.backward(-sigma * (gradient * v).sum() / len(x) / copies + penalty)
        losses.append(loss)
        penalties.append(penalty.detach())
    return Value(torch.stack(losses).mean(), {"kl_penalty": torch.stack(penalties).sum()})


# --- the epochs ------------------------------------------------------------------------------------------


def _draft_k(policy: Policy, settings: Settings, generator: torch.Generator) -> Gradient:
    chain = drawn_chain(policy, settings, generator)
    return partial(attached_gradient, chain=chain, first=len(chain.steps) - settings.config.drtune.num_train_steps)


def _draft_lv(policy: Policy, settings: Settings, generator: torch.Generator) -> Gradient:
    chain = drawn_chain(policy, settings, generator)
    return partial(low_variance_gradient, chain=chain, copies=settings.config.draft.copies)


def _alignprop(policy: Policy, settings: Settings, generator: torch.Generator) -> Gradient:
    """From a step on that is as likely each of all."""
    chain = drawn_chain(policy, settings, generator)
    first = int(torch.randint(len(chain.steps), (), generator=generator))
    return partial(attached_gradient, chain=chain, first=first)


train_epoch_draft_k = partial(train_by, _draft_k)
train_epoch_draft_lv = partial(train_by, _draft_lv)
train_epoch_alignprop = partial(train_by, _alignprop)
