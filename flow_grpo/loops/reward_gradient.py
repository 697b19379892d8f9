"""The epoch of every method that follows the gradient of a differentiable reward.

Each update draws how its gradient is found (which steps are trained, where the reward is read), the same on every
process; each microbatch accumulates that gradient. The methods differ in nothing but this `Gradient`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flow_grpo.diffusers_patch.velocity import VelocityFn
from flow_grpo.loops.collect import epoch_prompts
from flow_grpo.loops.shaped import group_diversity
from flow_grpo.loops.update import apply_update
from flow_grpo.losses import kl_weight, reward_losses, velocity_kl
from flow_grpo.metrics import MeanMetrics
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.randomness import keyed_generator, sample_generators
from flow_grpo.rewards.building import WeightedReward
from flow_grpo.runs.run import Run
from flow_grpo.settings import Settings
from flow_grpo.types import PromptBatch, RewardBatch

# J^T a of the base velocity at (x, sigma), and the velocity itself: (x, sigma, a) -> (v, J^T a), each (B, C, h, w)
VelocityProduct = Callable[[Tensor, float, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Objective:
    """What is minimised on one microbatch of B images, and the velocities that make them."""

    velocity: VelocityFn
    losses: Callable[[Tensor], Tensor]  # x_0 (B, C, h, w) -> (B,): -R, or with a hinge relu(c - R)
    reference: VelocityFn | None = None  # of the base model, without gradient
    reference_product: VelocityProduct | None = None
    beta: float = 0.0  # weight of the squared difference from the reference
    kl_min_sigma: float = 0.0  # noise level from which on that counts
    backward: Callable[[Tensor], None] = torch.Tensor.backward

    def image_gradient(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of x_0 (B,), and the gradient of each image's own loss at it (B, C, h, w): -dR/dx_0."""
        x0 = x0.detach().requires_grad_()
        with torch.enable_grad():
            losses = self.losses(x0)
            (gradient,) = torch.autograd.grad(losses.sum(), x0)
        return losses.detach(), gradient

    def penalty(self, x: Tensor, sigma: float, v: Tensor) -> Tensor:
        """beta mean((v - v_ref)^2) at one trained step: scalar. 0 without a penalty."""
        beta = kl_weight(self.beta, sigma, self.kl_min_sigma)
        if beta == 0 or self.reference is None:
            return v.new_zeros(())
        return beta * velocity_kl(v, self.reference(x.detach(), sigma))


@dataclass(frozen=True)
class Value:
    """What one microbatch was worth: detached scalars."""

    loss: Tensor  # mean over images of `Objective.losses`, or the error of a regression
    terms: Mapping[str, Tensor] = field(default_factory=dict)  # what is minimised besides, by the name that is logged
    shares: Mapping[str, Tensor] = field(default_factory=dict)  # what is logged and not minimised


# Accumulates the objective's gradient from x_1 (B, C, h, w) and a generator per image, which draws all that is random
# about that image.
Gradient = Callable[[Objective, Tensor, list[torch.Generator]], Value]
# The gradient of one update: drawn from a generator that is the same on every process.
DrawGradient = Callable[[Policy, Settings, torch.Generator], Gradient]


def train_by(
    draw: DrawGradient, policy: Policy, prompts: PromptDataset, reward: WeightedReward, settings: Settings, run: Run
) -> dict[str, float]:
    """One epoch: `plan.updates` updates, each on fresh images of the epoch's prompts. Returns what is logged."""
    config, plan = settings.config, settings.plan
    epoch = run.counters.epoch
    batch = epoch_prompts(prompts, plan, config.seed, run.counters.groups, policy.accelerator.process_index)
    policy.encode_ahead(batch.prompts)
    metrics = MeanMetrics()
    for update in run.progress(range(plan.updates), "updates"):
        gradient = draw(policy, settings, keyed_generator(config.seed, "drtune", epoch, update))
        loss, rewards = torch.zeros((), device=policy.device), []
        for chunk in plan.update_indices(update).split(config.train.batch_size):
            run.check_stop()
            weight = len(chunk) / plan.images_per_update
            value, scores = _train_microbatch(policy, batch, chunk, gradient, reward, settings, epoch, weight)
            loss += weight * sum(value.terms.values(), start=value.loss)
            rewards.append(scores.total)
            metrics.add({**value.terms, **value.shares}, weight=len(chunk))
            metrics.add({f"reward/{name}": score.mean() for name, score in scores.terms.items()}, weight=len(chunk))
        all_rewards = policy.accelerator.gather(torch.cat(rewards))
        metrics.add({"reward": all_rewards.mean(), "reward_std": all_rewards.std(correction=0)})
        run.counters.images += plan.images_per_update * settings.num_processes
        metrics.add(apply_update(policy, loss, run))
    return metrics.result(policy.accelerator)


def _train_microbatch(
    policy: Policy,
    batch: PromptBatch,
    chunk: Tensor,
    gradient: Gradient,
    reward: WeightedReward,
    settings: Settings,
    epoch: int,
    weight: float,
) -> tuple[Value, RewardBatch]:
    """Accumulate the gradient of the images at positions `chunk` of the epoch, times `weight`; what it was made of."""
    config, guidance = settings.config, settings.config.sample.guidance_scale
    prompts = [batch.prompts[i] for i in chunk.tolist()]
    metadata = [batch.metadata[i] for i in chunk.tolist()]
    generators = sample_generators(config.seed, "noise", epoch, batch.sample_ids[chunk])
    embeds = policy.encode(prompts)
    groups, scores, diversity = batch.group_ids[chunk], [], []

    def losses(x0: Tensor) -> Tensor:
        images = policy.decode(x0)
        scores.append(reward(images, prompts, metadata))
        found = reward_losses(scores[-1].total, config.drtune.hinge)
        if config.shaping.kind:
            diversity.append(group_diversity(images, groups, config))
            found = found - config.shaping.weight * diversity[-1]
        return found

    objective = Objective(
        velocity=policy.velocity(embeds, guidance, config.drtune.detach_unconditional),
        losses=losses,
        reference=policy.reference_velocity(embeds, guidance),
        reference_product=policy.reference_product(embeds, guidance),
        beta=config.train.beta,
        kl_min_sigma=config.train.kl_min_sigma,
        backward=lambda value: policy.accelerator.backward(weight * value),
    )
    value = gradient(objective, policy.noise(generators), generators)
    if diversity:
        value = replace(value, shares={**value.shares, "log_diversity": diversity[0].detach().mean()})
    terms = {name: score.detach() for name, score in scores[0].terms.items()}
    return value, RewardBatch(scores[0].total.detach(), terms)
