"""The epoch of every method that follows the gradient of a differentiable reward.

Each update draws how its gradient is found (which steps are trained, where the reward is read), the same on every
process; each microbatch accumulates that gradient. The methods differ in nothing but this `Gradient`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from flow_grpo.diffusers_patch.velocity import VelocityFn
from flow_grpo.loops.collect import epoch_prompts
from flow_grpo.loops.scores import composed, gathered, joined
from flow_grpo.loops.shaped import group_diversity
from flow_grpo.loops.update import apply_update
from flow_grpo.losses import kl_weight, reward_losses, velocity_kl
from flow_grpo.metrics import MeanMetrics
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.randomness import keyed_generator, sample_generators
from flow_grpo.rewards.building import WeightedReward
from flow_grpo.rewards.composition import gradient_shares
from flow_grpo.runs.run import Run
from flow_grpo.settings import Settings
from flow_grpo.types import PromptBatch, PromptEmbeds, RewardBatch

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
        chunks = plan.update_indices(update).split(config.train.batch_size)
        if run.composition.lacks_scale:
            images = [Microbatch(policy, batch, chunk, gradient, reward, settings, run) for chunk in chunks]
            run.composition.see(gathered(policy, joined([part.scores_without_gradient() for part in images])))
        loss = torch.zeros((), device=policy.device)
        scored: list[RewardBatch] = []
        base: list[RewardBatch] = []
        for chunk in chunks:
            run.check_stop()
            weight = len(chunk) / plan.images_per_update
            microbatch = Microbatch(policy, batch, chunk, gradient, reward, settings, run)
            if run.composition.rates:
                base.append(microbatch.scores_without_gradient(of_base=True))
            value, scores = microbatch.train(weight, with_shares=update == 0)
            loss += weight * sum(value.terms.values(), start=value.loss)
            scored.append(scores)
            metrics.add({**value.terms, **value.shares}, weight=len(chunk))
            metrics.add({f"reward/{name}": score.mean() for name, score in scores.terms.items()}, weight=len(chunk))
        scores = joined(scored)
        all_rewards = policy.accelerator.gather(scores.total)
        metrics.add({"reward": all_rewards.mean(), "reward_std": all_rewards.std(correction=0)})
        composed(policy, scores, joined(base) if base else None, run, metrics)
        run.counters.images += plan.images_per_update * settings.num_processes
        metrics.add(apply_update(policy, loss, run))
    return metrics.result(policy.accelerator)


@dataclass(frozen=True)
class Microbatch:
    """The images at positions `chunk` of the epoch, and how the gradient of their objective is found."""

    policy: Policy
    batch: PromptBatch
    chunk: Tensor
    gradient: Gradient
    reward: WeightedReward
    settings: Settings
    run: Run

    def train(self, weight: float, with_shares: bool) -> tuple[Value, RewardBatch]:
        """Accumulate the gradient of these images, times `weight`; what it was made of.

        `with_shares`: also how much of the gradient at the images is each reward's.
        """
        policy, config = self.policy, self.settings.config
        groups, scores, diversity = self.batch.group_ids[self.chunk], [], []
        shares: list[dict[str, Tensor]] = []

        def losses(x0: Tensor) -> Tensor:
            images = policy.decode(x0)
            scores.append(self._score(images))
            if with_shares and not shares and len(scores[0].terms) > 1:
                shares.append(gradient_shares(images, scores[0].terms, self.run.composition.factors()))
            found = reward_losses(scores[-1].total, config.drtune.hinge)
            if config.shaping.kind:
                diversity.append(group_diversity(images, groups, config))
                found = found - config.shaping.weight * diversity[-1]
            return found

        velocity = policy.velocity(self._embeds, config.sample.guidance_scale, config.drtune.detach_unconditional)
        value = self._by(velocity, losses, lambda value: policy.accelerator.backward(weight * value))
        if diversity:
            value = replace(value, shares={**value.shares, "log_diversity": diversity[0].detach().mean()})
        if shares:
            named = {f"reward/{name}/gradient_share": share for name, share in shares[0].items()}
            value = replace(value, shares={**value.shares, **named})
        terms = {name: score.detach() for name, score in scores[0].terms.items()}
        return value, RewardBatch(scores[0].total.detach(), terms)

    def scores_without_gradient(self, of_base: bool = False) -> RewardBatch:
        """The rewards of these images, or of those that the base model makes in the same way from the same noise."""
        policy, config = self.policy, self.settings.config
        found: list[RewardBatch] = []
        kind = policy.reference_velocity if of_base else policy.velocity
        velocity = kind(self._embeds, config.sample.guidance_scale)

        def held(x: Tensor, sigma: float) -> Tensor:
            with torch.no_grad():
                return velocity(x, sigma)

        def losses(x0: Tensor) -> Tensor:
            if not found:
                with torch.no_grad():
                    found.append(self._score(policy.decode(x0)))
            return x0.flatten(1).sum(1)  # whose gradient costs nothing, and is not used

        self._by(held, losses, lambda value: None)
        return found[0]

    def _by(
        self, velocity: VelocityFn, losses: Callable[[Tensor], Tensor], backward: Callable[[Tensor], None]
    ) -> Value:
        """What the method's gradient makes of these images."""
        policy, config, ids = self.policy, self.settings.config, self.batch.sample_ids[self.chunk]
        generators = sample_generators(config.seed, "noise", self.run.counters.epoch, ids)
        objective = Objective(
            velocity=velocity,
            losses=losses,
            reference=policy.reference_velocity(self._embeds, config.sample.guidance_scale),
            reference_product=policy.reference_product(self._embeds, config.sample.guidance_scale),
            beta=config.train.beta,
            kl_min_sigma=config.train.kl_min_sigma,
            backward=backward,
        )
        return self.gradient(objective, policy.noise(generators), generators)

    def _score(self, images: Tensor) -> RewardBatch:
        metadata, ids = [self.batch.metadata[i] for i in self.chunk.tolist()], self.batch.sample_ids[self.chunk]
        epoch, composition = self.run.counters.epoch, self.run.composition
        return composition.score(self.reward, images, self._prompts, metadata, epoch, ids)

    @property
    def _prompts(self) -> list[str]:
        return [self.batch.prompts[i] for i in self.chunk.tolist()]

    @cached_property
    def _embeds(self) -> PromptEmbeds:
        return self.policy.encode(self._prompts)
