"""GRPO on a stochastic sampler: policy gradient of a black-box reward (Flow-GRPO, arXiv 2505.05470).

Each sampler step is a Gaussian action, so the trajectory has a likelihood ratio r between the current and the sampling
weights at every stochastic step; the clipped objective weighs it with the image's group-relative advantage. Other
likelihoods of the same rollout can take that place (`config.train.ratio`, flow_grpo/likelihood_ratio.py): this loop
knows only that an image has slots, and a log-probability of each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from ml_collections import FrozenConfigDict
from torch import Tensor

from flow_grpo.advantages import apply_advantage_mode, group_advantages, zero_std_fraction
from flow_grpo.diffusers_patch.sd3_pipeline_with_logprob import pipeline_with_logprob
from flow_grpo.diffusers_patch.sd3_sde_with_logprob import step_mean
from flow_grpo.diffusers_patch.step import step_coefficients
from flow_grpo.diffusers_patch.velocity import VelocityFn
from flow_grpo.errors import TrainingStopped
from flow_grpo.likelihood_ratio import Action, Likelihood, RatioKeys, Score, likelihood_of
from flow_grpo.loops.collect import epoch_prompts
from flow_grpo.loops.update import apply_update
from flow_grpo.losses import gaussian_kl, normalized_log_ratio, policy_loss, velocity_kl
from flow_grpo.metrics import MeanMetrics
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.randomness import keyed_generator, sample_generators
from flow_grpo.rewards import WeightedReward
from flow_grpo.runs.run import Run
from flow_grpo.settings import Settings
from flow_grpo.types import PromptBatch, Trajectory


@dataclass(frozen=True)
class Experience:
    """What one process keeps of an epoch's rollouts: N images."""

    prompts: tuple[str, ...]  # N
    sample_ids: Tensor  # (N,) int64: positions in the epoch, over all processes
    epoch: int
    trajectory: Trajectory  # of the N images
    rewards: Tensor  # (N,) float32
    advantages: Tensor  # (N,) float32, clamped
    old_log_probs: Tensor  # (N, slots): under the sampling weights, per dimension; nan where no update asks for it


def train_epoch(
    policy: Policy, prompts: PromptDataset, reward: WeightedReward, settings: Settings, run: Run
) -> dict[str, float]:
    """One epoch: sample the groups, then `num_inner_epochs` passes of `plan.updates` updates."""
    config, plan = settings.config, settings.plan
    batch = epoch_prompts(prompts, plan, config.seed, run.counters.groups, policy.accelerator.process_index)
    metrics = MeanMetrics()
    experience = collect(policy, batch, reward, settings, run, metrics)
    run.counters.images += plan.images
    updates = [(inner, update) for inner in range(config.train.num_inner_epochs) for update in range(plan.updates)]
    for inner, update in run.progress(updates, "GRPO updates"):
        _train_update(policy, experience, settings, run, metrics, inner, update)
    return _with_ratio_std(metrics.result(policy.accelerator))


# --- sampling ------------------------------------------------------------------------------------------


def collect(
    policy: Policy, batch: PromptBatch, reward: WeightedReward, settings: Settings, run: Run, metrics: MeanMetrics
) -> Experience:
    """Sample this process's images, score them, normalise the rewards within groups over all processes.

    The images' likelihoods under these weights, the old side of the ratio, are kept with them.
    """
    config, epoch = settings.config, run.counters.epoch
    window = sde_window(settings, epoch)
    trajectories, totals = [], []
    chunks = sampling_minibatches(settings, len(batch))
    for chunk in run.progress(chunks, "sampling"):
        run.check_stop()
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
    rewards, trajectory = torch.cat(totals), Trajectory.cat(trajectories)
    order = torch.cat(chunks).argsort().to(policy.device)  # back to that of the sample ids
    if (order.diff() != 1).any():
        rewards, trajectory = rewards[order], trajectory[order]
    advantages = _advantages(policy, batch, rewards, settings, metrics)
    experience = Experience(
        batch.prompts, batch.sample_ids, epoch, trajectory, rewards, advantages, old_log_probs=trajectory.log_probs
    )
    return experience if likelihood_of(config).recorded else _with_old_log_probs(policy, experience, settings, run)


def sampling_minibatches(settings: Settings, count: int) -> list[Tensor]:
    """Which of a process's `count` images are sampled together: each once, int64.

    In float32 `sample.batch_size` consecutive ones. Below it an image's velocity depends a little on how many are
    computed with it, and a ratio that should be 1 is not: the very minibatches of training are then sampled.
    """
    config, plan = settings.config, settings.plan
    exact = config.mixed_precision == "no" or not likelihood_of(config).recorded
    if exact or count != plan.images_per_process:
        return list(torch.arange(count).split(config.sample.batch_size))
    return [chunk for u in range(plan.updates) for chunk in plan.update_indices(u).split(config.train.batch_size)]


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


def _with_old_log_probs(policy: Policy, experience: Experience, settings: Settings, run: Run) -> Experience:
    """The likelihoods that the rollout does not give, in the very minibatches of training: the ratio is then exactly 1.

    Only of the slots that some pass of the epoch trains.
    """
    config, plan = settings.config, settings.plan
    slots = likelihood_of(config).slots(experience.trajectory)
    old = experience.advantages.new_full((len(experience.prompts), slots), math.nan, dtype=torch.float64)
    experience = replace(experience, old_log_probs=old)
    for update in run.progress(range(plan.updates), "likelihoods"):
        passes = (_trained_slots(experience, settings, inner, update) for inner in range(config.train.num_inner_epochs))
        asked_for = sorted(set().union(*passes))
        for chunk in plan.update_indices(update).split(config.train.batch_size):
            run.check_stop()
            minibatch = _minibatch(policy, experience, chunk, config)
            for slot in asked_for:
                with torch.no_grad():
                    old[chunk.to(old.device), slot] = minibatch.score(slot).log_prob.to(old.dtype)
    return experience


# --- training ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Minibatch:
    """B images of an epoch with the velocities that score them."""

    velocity: VelocityFn
    reference: VelocityFn | None  # None: no KL
    likelihood: Likelihood
    keys: RatioKeys
    trajectory: Trajectory
    advantages: Tensor  # (B,)
    old_log_probs: Tensor  # (B, slots)

    def score(self, slot: int) -> Score:
        """The likelihood of one slot under the current weights."""
        return self.likelihood.score(self.velocity, self.trajectory, self.keys, slot)


def _train_update(
    policy: Policy,
    experience: Experience,
    settings: Settings,
    run: Run,
    metrics: MeanMetrics,
    inner: int,
    update: int,
) -> None:
    """One optimizer step on this update's images and slots; before an epoch's first, the ratio must be 1."""
    config, plan = settings.config, settings.plan
    slots = _trained_slots(experience, settings, inner, update)
    loss, ratio_error = torch.zeros((), device=policy.device), torch.zeros((), device=policy.device)
    chunks = plan.update_indices(update).split(config.train.batch_size)
    for chunk in run.progress(chunks, "training"):
        run.check_stop()
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


def _trained_slots(experience: Experience, settings: Settings, inner: int, update: int) -> list[int]:
    """Which slots this update trains: `timestep_fraction` of them, the same on every process."""
    total = experience.old_log_probs.shape[1]
    count = max(1, round(settings.config.train.timestep_fraction * total))
    generator = keyed_generator(settings.config.seed, "timesteps", experience.epoch, inner, update)
    return sorted(torch.randperm(total, generator=generator)[:count].tolist())


def _minibatch(policy: Policy, experience: Experience, chunk: Tensor, config: FrozenConfigDict) -> Minibatch:
    """The images at positions `chunk` of this process's epoch, all of one update."""
    embeds, guidance_scale = (
        policy.encode([experience.prompts[i] for i in chunk.tolist()]),
        config.sample.guidance_scale,
    )
    sample_ids = tuple(experience.sample_ids[chunk].tolist())
    index = chunk.to(policy.device)
    return Minibatch(
        velocity=policy.velocity(embeds, guidance_scale),
        reference=policy.reference_velocity(embeds, guidance_scale) if config.train.beta > 0 else None,
        likelihood=likelihood_of(config),
        keys=RatioKeys(config.seed, experience.epoch, sample_ids[0] % config.train.updates_per_epoch, sample_ids),
        trajectory=experience.trajectory[index],
        advantages=experience.advantages[index],
        old_log_probs=experience.old_log_probs[index],
    )


def step_loss(minibatch: Minibatch, slot: int, config: FrozenConfigDict) -> dict[str, Tensor]:
    """Loss of one slot of a minibatch, of a stochastic step or of the image, and what is logged of it: scalars."""
    train, score = config.train, minibatch.score(slot)
    log_ratio = (score.log_prob - minibatch.old_log_probs[:, slot]).to(minibatch.advantages.dtype)
    terms = {"ratio_error": log_ratio.detach().expm1().abs().max()}
    scale = 1.0
    if train.ratio_normalization:
        log_ratio, scale = _normalized(log_ratio, minibatch.trajectory.means[:, slot], score.action)
    clipped = policy_loss(log_ratio, minibatch.advantages, train.clip_range)
    terms |= {
        "loss": scale * clipped.loss,
        "ratio_mean": clipped.ratio_mean,
        "clip_fraction": clipped.clip_fraction,
        "approx_kl": clipped.approx_kl,
        "log_ratio_mean": clipped.log_ratio_mean,
    }
    if minibatch.reference is not None:
        kl = _reference_kl(minibatch.reference, score.action, config)
        terms |= {"loss": terms["loss"] + train.beta * kl, "kl": kl.detach()}
    return terms


def _normalized(log_ratio: Tensor, mean_old: Tensor, action: Action | None) -> tuple[Tensor, float]:
    """GRPO-Guard's normalised log-ratio of a step, (B,), and the scale 1 / -dt of its loss."""
    assert action is not None, "settings.resolve refuses this option for every other likelihood"
    sigma, sigma_next = action.levels
    return normalized_log_ratio(log_ratio, action.step.mean, mean_old, action.step.std), 1 / (sigma - sigma_next)


def _reference_kl(reference: VelocityFn, action: Action | None, config: FrozenConfigDict) -> Tensor:
    """KL of a step to the reference model's, in the space that `train.kl_space` names: scalar, per dimension."""
    assert action is not None, "settings.resolve refuses this option for every other likelihood"
    velocity_ref = reference(action.latents, action.levels[0])
    if config.train.kl_space == "velocity":
        return velocity_kl(action.velocity, velocity_ref)
    coefficients = step_coefficients(config.sample.sde_type, *action.levels, config.sample.noise_level)
    return gaussian_kl(action.step.mean, step_mean(action.latents, velocity_ref, coefficients), action.step.std)


def _with_ratio_std(metrics: dict[str, float]) -> dict[str, float]:
    """Add `ratio_std`, the standard deviation of log r over the epoch's images and slots, from its moments."""
    variance = 2 * metrics["approx_kl"] - metrics["log_ratio_mean"] ** 2
    return metrics | {"ratio_std": math.sqrt(variance) if variance > 0 else 0.0}


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
            f"sampler differ; what was saved is intact"
        )
    return error
