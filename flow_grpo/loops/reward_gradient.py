"""DRTune: fine-tuning by the gradient of a differentiable reward (arXiv 2405.00760).

The network's input is detached at every step, so the sampler is a linear chain x' = a x + b v + s z in the velocities,
and K of its steps carry gradient:

    dR/dtheta = sum over trained steps i of c_i <dR/dx_0, dv_i/dtheta>,   c_i = b_i prod_{j > i} a_j.

`one_pass` lets autograd find that sum, keeping K graphs. `two_pass` takes dR/dx_0 once and then re-runs one trained
step at a time: the same gradient with the memory of one step, for K more forwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flow_grpo.diffusers_patch.rollout import rollout
from flow_grpo.diffusers_patch.step import StepCoefficients, step_coefficients
from flow_grpo.diffusers_patch.velocity import VelocityFn
from flow_grpo.loops.collect import epoch_prompts
from flow_grpo.loops.update import apply_update
from flow_grpo.losses import reward_loss, velocity_kl
from flow_grpo.metrics import MeanMetrics
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.randomness import keyed_generator, sample_generators
from flow_grpo.rewards import WeightedReward
from flow_grpo.runs.run import Run
from flow_grpo.settings import Settings
from flow_grpo.types import PromptBatch, RewardBatch


@dataclass(frozen=True)
class Chain:
    """The n steps that are executed, and which of them carry gradient."""

    sigmas: tuple[float, ...]  # (n,): noise level at which each executed step evaluates the network
    steps: tuple[StepCoefficients, ...]  # (n,)
    train_steps: tuple[int, ...]  # K indices among the executed steps, ascending

    def weight(self, i: int) -> float:
        """c_i = b_i prod_{j > i} a_j: how much of the velocity of step i arrives in the decoded latents."""
        return self.steps[i].b * math.prod(step.a for step in self.steps[i + 1 :])


def draw_chain(
    sigmas: Sequence[float],
    *,
    sde_type: str,
    noise_level: float,
    num_train_steps: int,
    early_stop: int,
    generator: torch.Generator,
) -> Chain:
    """Draw where sampling stops and which K = `num_train_steps` steps are trained.

    With `early_stop` m > 0 the last executed step is uniform on the last m; there x0_hat = x - sigma v is decoded,
    itself an affine step with a = 1, b = -sigma. The trained steps are {o + i floor(n / K)} among the n executed ones,
    the offset o uniform over all that fit.

    Args:
        sigmas: T + 1 noise levels, decreasing to 0.
    """
    n = len(sigmas) - 1
    if early_stop > 0:
        n -= int(torch.randint(early_stop, (), generator=generator))
    steps = [step_coefficients(sde_type, sigmas[i], sigmas[i + 1], noise_level) for i in range(n)]
    if early_stop > 0:
        steps[-1] = StepCoefficients(a=1.0, b=-sigmas[n - 1], s=0.0)
    stride = n // num_train_steps
    last_offset = n - 1 - (num_train_steps - 1) * stride
    offset = int(torch.randint(last_offset + 1, (), generator=generator))
    return Chain(tuple(sigmas[:n]), tuple(steps), tuple(offset + i * stride for i in range(num_train_steps)))


@dataclass(frozen=True)
class ChainState:
    """An executed chain."""

    x0: Tensor  # (B, C, h, w): the latents to decode
    inputs: dict[int, Tensor]  # trained step -> the network's input, (B, C, h, w), detached
    velocities: dict[int, Tensor]  # trained step -> v, (B, C, h, w)


def run_chain(
    velocity: VelocityFn,
    latents: Tensor,
    chain: Chain,
    generators: list[torch.Generator] | None = None,
    enable_grad: bool = False,
) -> ChainState:
    """Execute the chain from x_1 = `latents` (B, C, h, w); with `enable_grad` its trained steps carry gradient."""
    x0, inputs, velocities = latents, {}, {}
    for taken in rollout(
        velocity, latents, chain.sigmas, chain.steps,
        generators=generators, enable_grad=enable_grad, trained_steps=chain.train_steps, detach=True,
    ):  # fmt: skip
        if taken.index in chain.train_steps:
            inputs[taken.index], velocities[taken.index] = taken.latents.detach(), taken.velocity
        x0 = taken.next_latents
    return ChainState(x0, inputs, velocities)


@dataclass(frozen=True)
class Objective:
    """What is minimised for one microbatch: loss_fn(x_0) + mean over trained steps of penalty_fn."""

    velocity: VelocityFn
    loss_fn: Callable[[Tensor], Tensor]  # x_0 (B, C, h, w) -> scalar
    penalty_fn: Callable[[Tensor, float, Tensor], Tensor] | None = None  # (x, sigma, v) -> scalar
    backward: Callable[[Tensor], None] = torch.Tensor.backward

    def penalty(self, x: Tensor, sigma: float, v: Tensor) -> Tensor:
        """The penalty of one trained step; 0 without a penalty."""
        return v.new_zeros(()) if self.penalty_fn is None else self.penalty_fn(x, sigma, v)


@dataclass(frozen=True)
class ObjectiveValue:
    """The two terms of an objective, detached scalars."""

    loss: Tensor
    penalty: Tensor


def one_pass(
    objective: Objective, latents: Tensor, chain: Chain, generators: list[torch.Generator] | None = None
) -> ObjectiveValue:
    """Accumulate the objective's gradient through one rollout that stores the K graphs."""
    state = run_chain(objective.velocity, latents, chain, generators, enable_grad=True)
    loss = objective.loss_fn(state.x0)
    penalties = [objective.penalty(state.inputs[i], chain.sigmas[i], v) for i, v in state.velocities.items()]
    penalty = torch.stack(penalties).mean()
    objective.backward(loss + penalty)
    return ObjectiveValue(loss.detach(), penalty.detach())


def two_pass(
    objective: Objective, latents: Tensor, chain: Chain, generators: list[torch.Generator] | None = None
) -> ObjectiveValue:
    """Accumulate the same gradient in the memory of one step: dR/dx_0 first, then one trained step at a time."""
    with torch.no_grad():
        state = run_chain(objective.velocity, latents, chain, generators)
    x0 = state.x0.requires_grad_()
    loss = objective.loss_fn(x0)
    (grad_x0,) = torch.autograd.grad(loss, x0)
    penalties = []
    for i in chain.train_steps:
        v = objective.velocity(state.inputs[i], chain.sigmas[i])
        penalty = objective.penalty(state.inputs[i], chain.sigmas[i], v) / len(chain.train_steps)
        objective.backward(chain.weight(i) * (grad_x0 * v).sum() + penalty)
        penalties.append(penalty.detach())
    return ObjectiveValue(loss.detach(), torch.stack(penalties).sum())


def train_epoch(
    policy: Policy, prompts: PromptDataset, reward: WeightedReward, settings: Settings, run: Run
) -> dict[str, float]:
    """One epoch: `plan.updates` updates, each on fresh images of the epoch's prompts. Returns what is logged."""
    config, plan = settings.config, settings.plan
    epoch = run.counters.epoch
    batch = epoch_prompts(prompts, plan, config.seed, run.counters.groups, policy.accelerator.process_index)
    metrics = MeanMetrics()
    for update in run.progress(range(plan.updates), "DRTune updates"):
        chain = _epoch_chain(policy, settings, epoch, update)
        loss, rewards = torch.zeros((), device=policy.device), []
        for chunk in plan.update_indices(update).split(config.train.batch_size):
            run.check_stop()
            weight = len(chunk) / plan.images_per_update
            value, scores = _train_microbatch(policy, batch, chunk, chain, reward, settings, epoch, weight)
            loss += weight * (value.loss + value.penalty)
            rewards.append(scores.total)
            metrics.add({"kl_penalty": value.penalty}, weight=len(chunk))
            metrics.add({f"reward/{name}": score.mean() for name, score in scores.terms.items()}, weight=len(chunk))
        all_rewards = policy.accelerator.gather(torch.cat(rewards))
        metrics.add({"reward": all_rewards.mean(), "reward_std": all_rewards.std(correction=0)})
        run.counters.images += plan.images_per_update * settings.num_processes
        metrics.add(apply_update(policy, loss, run))
    return metrics.result(policy.accelerator)


def _epoch_chain(policy: Policy, settings: Settings, epoch: int, update: int) -> Chain:
    """The chain of one update, the same on every process."""
    sample, drtune = settings.config.sample, settings.config.drtune
    return draw_chain(
        policy.sigmas(sample.num_steps).tolist(),
        sde_type=sample.sde_type,
        noise_level=sample.noise_level,
        num_train_steps=drtune.num_train_steps,
        early_stop=drtune.early_stop,
        generator=keyed_generator(settings.config.seed, "drtune", epoch, update),
    )


def _train_microbatch(
    policy: Policy,
    batch: PromptBatch,
    chunk: Tensor,
    chain: Chain,
    reward: WeightedReward,
    settings: Settings,
    epoch: int,
    weight: float,
) -> tuple[ObjectiveValue, RewardBatch]:
    """Accumulate the gradient of the images at positions `chunk` of the epoch, times `weight`; what it was made of."""
    config = settings.config
    prompts = [batch.prompts[i] for i in chunk.tolist()]
    metadata = [batch.metadata[i] for i in chunk.tolist()]
    generators = sample_generators(config.seed, "noise", epoch, batch.sample_ids[chunk])
    embeds = policy.encode(prompts)
    scores: list[RewardBatch] = []

    def loss_fn(x0: Tensor) -> Tensor:
        scores.append(reward(policy.decode(x0), prompts, metadata))
        return reward_loss(scores[-1].total, config.drtune.hinge)

    reference = policy.reference_velocity(embeds, config.sample.guidance_scale)

    def kl(x: Tensor, sigma: float, v: Tensor) -> Tensor:
        return config.train.beta * velocity_kl(v, reference(x, sigma))

    objective = Objective(
        velocity=policy.velocity(embeds, config.sample.guidance_scale),
        loss_fn=loss_fn,
        penalty_fn=kl if config.train.beta > 0 else None,
        backward=lambda value: policy.accelerator.backward(weight * value),
    )
    gradient = two_pass if config.drtune.two_pass else one_pass
    value = gradient(objective, policy.noise(generators), chain, generators)
    terms = {name: score.detach() for name, score in scores[-1].terms.items()}
    return value, RewardBatch(scores[-1].total.detach(), terms)
