"""GRPO on a stochastic sampler: policy gradient of a black-box reward (Flow-GRPO, arXiv 2505.05470).

Each sampler step is a Gaussian action, so the trajectory has a likelihood ratio r between the current and the sampling
weights at every stochastic step; the clipped objective weighs it with the image's group-relative advantage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ml_collections import FrozenConfigDict
from torch import Tensor

from flow_grpo.advantages import apply_advantage_mode, group_advantages, zero_std_fraction
from flow_grpo.diffusers_patch.sd3_pipeline_with_logprob import pipeline_with_logprob
from flow_grpo.diffusers_patch.sd3_sde_with_logprob import StepResult, sde_step_with_logprob, step_mean
from flow_grpo.diffusers_patch.step import step_coefficients
from flow_grpo.diffusers_patch.velocity import VelocityFn
from flow_grpo.errors import TrainingStopped
from flow_grpo.losses import gaussian_kl, normalized_log_ratio, policy_loss, velocity_kl
from flow_grpo.metrics import MeanMetrics
from flow_grpo.optimization import apply_update
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset, epoch_prompts
from flow_grpo.randomness import keyed_generator, sample_generators
from flow_grpo.rewards import WeightedReward
from flow_grpo.settings import Settings
from flow_grpo.tracking import Run
from flow_grpo.types import PromptBatch, Trajectory


@dataclass(frozen=True)
class Experience:
    """What one process keeps of an epoch's rollouts: N images."""

    prompts: tuple[str, ...]  # N
    trajectory: Trajectory  # of the N images
    rewards: Tensor  # (N,) float32
    advantages: Tensor  # (N,) float32, clamped


def train_epoch(
    policy: Policy, prompts: PromptDataset, reward: WeightedReward, settings: Settings, run: Run
) -> dict[str, float]:
    """One epoch: sample the groups, then `num_inner_epochs` passes of `plan.updates` updates."""
    config, plan = settings.config, settings.plan
    batch = epoch_prompts(prompts, plan, config.seed, run.counters.epoch, policy.accelerator.process_index)
    metrics = MeanMetrics()
    experience = collect(policy, batch, reward, settings, run, metrics)
    run.counters.images += plan.images
    updates = [(inner, update) for inner in range(config.train.num_inner_epochs) for update in range(plan.updates)]
    for inner, update in run.progress(updates, "GRPO updates"):
        _train_update(policy, experience, settings, run, metrics, inner, update)
    return metrics.result(policy.accelerator)


# --- sampling ------------------------------------------------------------------------------------------


def collect(
    policy: Policy, batch: PromptBatch, reward: WeightedReward, settings: Settings, run: Run, metrics: MeanMetrics
) -> Experience:
    """Sample this process's images, score them, and normalise the rewards within groups over all processes."""
    config, epoch = settings.config, run.counters.epoch
    window = sde_window(settings, epoch)
    trajectories, totals = [], []
    chunks = torch.arange(len(batch)).split(config.sample.batch_size)
    for chunk in run.progress(chunks, "sampling"):
        prompts = [batch.prompts[i] for i in chunk.tolist()]
        generators = sample_generators(config.seed, "noise", epoch, batch.sample_ids[chunk])
        trajectory = pipeline_with_logprob(
            policy.velocity(policy.encode(prompts), config.sample.guidance_scale),
            policy.noise(generators),
            policy.sigmas(config.sample.num_steps),
            sde_type=config.sample.sde_type,
            noise_level=config.sample.noise_level,
            window=window,
            generators=generators,
        )
        with torch.no_grad():
            images = policy.decode(trajectory.final_latents)
            scores = reward(images, prompts, [batch.metadata[i] for i in chunk.tolist()])
        trajectories.append(trajectory)
        totals.append(scores.total)
        metrics.add({f"reward/{name}": score.mean() for name, score in scores.terms.items()}, weight=len(chunk))
    rewards = torch.cat(totals)
    advantages = _advantages(policy, batch, rewards, settings, metrics)
    return Experience(batch.prompts, Trajectory.cat(trajectories), rewards, advantages)


def sde_window(settings: Settings, epoch: int) -> range:
    """The steps that are stochastic in this epoch: all, or a window placed at random (Flow-GRPO-Fast, MixGRPO)."""
    sample = settings.config.sample
    if sample.sde_window_size == 0:
        return range(sample.num_steps)
    first, end = sample.sde_window_range if any(sample.sde_window_range) else (0, sample.num_steps)
    generator = keyed_generator(settings.config.seed, "window", epoch)
    start = first + int(torch.randint(end - first - sample.sde_window_size + 1, (), generator=generator))
    return range(start, start + sample.sde_window_size)


def _advantages(
    policy: Policy, batch: PromptBatch, rewards: Tensor, settings: Settings, metrics: MeanMetrics
) -> Tensor:
    """Advantages of this process's images, (N,), from the rewards of all processes."""
    train = settings.config.train
    all_rewards = policy.accelerator.gather(rewards)
    all_groups = policy.accelerator.gather(batch.group_ids.to(policy.device))
    advantages = group_advantages(all_rewards, all_groups, train.global_std)
    advantages = apply_advantage_mode(advantages, train.advantage_mode).clamp(-train.adv_clip_max, train.adv_clip_max)
    metrics.add(
        {
            "reward": all_rewards.mean(),
            "reward_std": all_rewards.std(correction=0),
            "zero_std_fraction": zero_std_fraction(all_rewards, all_groups),
        }
    )
    return advantages[settings.plan.process_slice(policy.accelerator.process_index)].to(rewards.dtype)


# --- training ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Minibatch:
    """B images of an epoch with the velocities that score their steps."""

    velocity: VelocityFn
    reference: VelocityFn | None  # None: no KL
    trajectory: Trajectory
    advantages: Tensor  # (B,)


def _train_update(
    policy: Policy,
    experience: Experience,
    settings: Settings,
    run: Run,
    metrics: MeanMetrics,
    inner: int,
    update: int,
) -> None:
    """One optimizer step on this update's images and steps; before an epoch's first, the ratio must be 1."""
    config, plan = settings.config, settings.plan
    slots = _trained_slots(experience.trajectory, settings, run.counters.epoch, inner, update)
    loss, ratio_error = torch.zeros((), device=policy.device), torch.zeros((), device=policy.device)
    chunks = plan.update_indices(update).split(config.train.batch_size)
    for chunk in run.progress(chunks, "training"):
        minibatch = _minibatch(policy, experience, chunk, config)
        weight = len(chunk) / plan.images_per_update / len(slots)
        for slot in slots:
            terms = step_loss(minibatch, slot, config)
            policy.accelerator.backward(weight * terms["loss"])
            loss += weight * terms.pop("loss").detach()
            ratio_error = torch.maximum(ratio_error, terms.pop("ratio_error"))
            metrics.add(terms, weight=len(chunk))
    if inner == update == 0:
        metrics.add(
            {"ratio_error": check_ratio(policy, ratio_error, config.train.max_ratio_error * config.train.clip_range)}
        )
    metrics.add(apply_update(policy, loss, run))


def _trained_slots(trajectory: Trajectory, settings: Settings, epoch: int, inner: int, update: int) -> list[int]:
    """Which of the W stochastic steps this update trains: `timestep_fraction` of them, the same on every process."""
    total = len(trajectory.stochastic_steps)
    count = max(1, round(settings.config.train.timestep_fraction * total))
    generator = keyed_generator(settings.config.seed, "timesteps", epoch, inner, update)
    return sorted(torch.randperm(total, generator=generator)[:count].tolist())


def _minibatch(policy: Policy, experience: Experience, chunk: Tensor, config: FrozenConfigDict) -> Minibatch:
    """The images at positions `chunk` of this process's epoch."""
    embeds, guidance_scale = (
        policy.encode([experience.prompts[i] for i in chunk.tolist()]),
        config.sample.guidance_scale,
    )
    reference = policy.reference_velocity(embeds, guidance_scale) if config.train.beta > 0 else None
    index = chunk.to(policy.device)
    return Minibatch(
        policy.velocity(embeds, guidance_scale), reference, experience.trajectory[index], experience.advantages[index]
    )


def step_loss(minibatch: Minibatch, slot: int, config: FrozenConfigDict) -> dict[str, Tensor]:
    """Loss of the `slot`-th stochastic step of a minibatch, and what is logged of it: scalars."""
    trajectory, train = minibatch.trajectory, config.train
    i = trajectory.stochastic_steps[slot]
    sigma, sigma_next = trajectory.sigmas[i].item(), trajectory.sigmas[i + 1].item()
    velocity = minibatch.velocity(trajectory.latents[:, i], sigma)
    step = sde_step_with_logprob(
        trajectory.latents[:, i],
        velocity,
        sigma,
        sigma_next,
        noise_level=config.sample.noise_level,
        sde_type=config.sample.sde_type,
        next_latents=trajectory.latents[:, i + 1],
    )
    log_ratio = step.log_prob - trajectory.log_probs[:, slot]
    terms = {"ratio_error": log_ratio.detach().expm1().abs().max()}
    scale = 1.0
    if train.ratio_normalization:
        log_ratio = normalized_log_ratio(log_ratio, step.mean, trajectory.means[:, slot], step.std)
        scale = 1 / (sigma - sigma_next)
    clipped = policy_loss(log_ratio, minibatch.advantages, train.clip_range)
    terms |= {
        "loss": scale * clipped.loss,
        "ratio_mean": clipped.ratio_mean,
        "clip_fraction": clipped.clip_fraction,
        "approx_kl": clipped.approx_kl,
    }
    if minibatch.reference is not None:
        velocity_ref = minibatch.reference(trajectory.latents[:, i], sigma)
        kl = _reference_kl(trajectory.latents[:, i], velocity, velocity_ref, (sigma, sigma_next), step, config)
        terms |= {"loss": terms["loss"] + train.beta * kl, "kl": kl.detach()}
    return terms


def _reference_kl(
    latents: Tensor,
    velocity: Tensor,
    velocity_ref: Tensor,
    levels: tuple[float, float],
    step: StepResult,
    config: FrozenConfigDict,
) -> Tensor:
    """KL of a step to the reference model's, in the space that `train.kl_space` names: scalar, per dimension."""
    if config.train.kl_space == "velocity":
        return velocity_kl(velocity, velocity_ref)
    coefficients = step_coefficients(config.sample.sde_type, *levels, config.sample.noise_level)
    return gaussian_kl(step.mean, step_mean(latents, velocity_ref, coefficients), step.std)


def check_ratio(policy: Policy, ratio_error: Tensor, bound: float) -> float:
    """Largest |ratio - 1| over all processes before an epoch's first update, where the weights are the sampling ones.

    Raises:
        TrainingStopped: it exceeds `bound`. A non-finite error is left to the update, which skips and counts it.
    """
    error = policy.accelerator.gather(ratio_error.reshape(1)).max().item()
    if error > bound:
        raise TrainingStopped(
            f"the ratio of unchanged weights is off by {error:.3g}, not within {bound:.3g} (max_ratio_error): "
            f"sampling and training compute different velocities, as they do when their guidance, precision or "
            f"sampler differ, and in bf16 when sample.batch_size and train.batch_size do; what was saved is intact"
        )
    return error
