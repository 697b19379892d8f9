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

from flow_grpo.diffusers_patch.sd3_sde_with_logprob import step_mean
from flow_grpo.diffusers_patch.step import step_coefficients
from flow_grpo.diffusers_patch.velocity import VelocityFn
from flow_grpo.likelihood_ratio import Action, Likelihood, RatioKeys, Score, likelihood_of
from flow_grpo.loops.collect import (
    Chunk,
    advantages_of,
    epoch_prompts,
    in_step,
    penalised_of,
    sample_images,
    sampling_minibatches,
    training_minibatches,
)
from flow_grpo.loops.update import apply_update, check_ratio
from flow_grpo.losses import gaussian_kl, kl_weight, normalized_log_ratio, policy_loss, velocity_kl
from flow_grpo.metrics import MeanMetrics
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.randomness import keyed_generator
from flow_grpo.rewards.building import WeightedReward
from flow_grpo.runs.run import Run
from flow_grpo.settings import Settings
from flow_grpo.types import PromptBatch, Trajectory

LOGGED = ("ratio_mean", "clip_fraction", "approx_kl", "log_ratio_mean")  # of each slot that is trained
WHY_OFF = (
    "sampling and training compute different velocities, as they do when their guidance, precision or sampler differ, "
    "or config.train.clip_range = {clip_range} is below the rounding of a log-probability"
)


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
    penalised: Tensor | None = None  # (N,) bool: whose KL counts; None: everybody's


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
    recorded = likelihood_of(settings.config).recorded
    chunks = sampling_minibatches(settings, len(batch), recorded)
    keep_means = settings.config.train.ratio_normalization
    images = sample_images(policy, batch, reward, settings, run, metrics, chunks, keep_means=keep_means)
    experience = Experience(
        batch.prompts,
        batch.sample_ids,
        images.epoch,
        images.trajectory,
        images.rewards,
        advantages_of(policy, images, settings, metrics),
        old_log_probs=images.trajectory.log_probs,
        penalised=penalised_of(policy, images, settings, metrics),
    )
    return experience if recorded else _with_old_log_probs(policy, experience, settings, run)


def _with_old_log_probs(policy: Policy, experience: Experience, settings: Settings, run: Run) -> Experience:
    """The likelihoods that the rollout does not give, in the very minibatches of training: the ratio is then exactly 1.

    Only of the slots, and of the images, that some pass of the epoch trains.
    """
    config, plan = settings.config, settings.plan
    slots = likelihood_of(config).slots(experience.trajectory)
    old = experience.advantages.new_full((len(experience.prompts), slots), math.nan, dtype=torch.float64)
    experience = replace(experience, old_log_probs=old)
    for update in run.progress(range(plan.updates), "likelihoods"):
        passes = (_trained_slots(experience, settings, inner, update) for inner in range(config.train.num_inner_epochs))
        asked_for = sorted(set().union(*passes))
        for chunk in _taught(policy, experience, settings, update):
            run.check_stop()
            if len(chunk.positions) == 0:
                continue
            minibatch = _minibatch(policy, experience, chunk.positions, config)
            for slot in asked_for:
                with torch.no_grad():
                    old[chunk.positions.to(old.device), slot] = minibatch.score(slot).log_prob.to(old.dtype)
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
    penalised: Tensor | None = None  # (B,) bool: whose KL counts; None: everybody's

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
    chunks = _taught(policy, experience, settings, update)
    metrics.add({"trained_fraction": sum(chunk.counted for chunk in chunks) / plan.images_per_update})
    logged = (*LOGGED, "kl") if config.train.beta > 0 else LOGGED
    metrics.add(dict.fromkeys(logged, 0.0), weight=0)  # other processes may train where this one does not
    if not any(len(chunk.positions) for chunk in chunks):
        policy.accelerator.backward(0 * policy.trainable[0].sum())  # fp16's loss scaler must have seen a loss
    for chunk in run.progress(chunks, "training"):
        run.check_stop()
        if len(chunk.positions) == 0:
            continue
        minibatch = _minibatch(policy, experience, chunk.positions, config)
        weight = chunk.counted / plan.images_per_update / len(slots)
        for slot in slots:
            terms = step_loss(minibatch, slot, config)
            policy.accelerator.backward(weight * terms["loss"])
            loss += weight * terms.pop("loss").detach()
            ratio_error = torch.maximum(ratio_error, terms.pop("ratio_error"))
            metrics.add(terms, weight=chunk.counted)
    if inner == update == 0:
        bound = config.train.max_ratio_error * config.train.clip_range
        why = WHY_OFF.format(clip_range=config.train.clip_range)
        metrics.add({"ratio_error": check_ratio(policy, ratio_error, bound, why)})
    metrics.add(apply_update(policy, loss, run))


def _taught(policy: Policy, experience: Experience, settings: Settings, update: int) -> list[Chunk]:
    """Collective: the minibatches of one update: of all images whose KL counts, and of those with an advantage.

    An image without either (NSR, PSR, a group of equal rewards) has no gradient, and pays for no forward.
    """
    config = settings.config
    held = config.train.beta > 0 if experience.penalised is None else experience.penalised
    teaches = (experience.advantages != 0) | held  # nan teaches, and is skipped as an update
    chunks = training_minibatches(settings, update, teaches, likelihood_of(config).recorded)
    return in_step(policy, chunks, settings, update)


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
        penalised=None if experience.penalised is None else experience.penalised[index],
    )


def step_loss(minibatch: Minibatch, slot: int, config: FrozenConfigDict) -> dict[str, Tensor]:
    """Loss of one slot of a minibatch, of a stochastic step or of the image, and what is logged of it: scalars."""
    train, score = config.train, minibatch.score(slot)
    log_ratio = (score.log_prob - minibatch.old_log_probs[:, slot]).to(minibatch.advantages.dtype)
    terms = {"ratio_error": log_ratio.detach().expm1().abs().max()}
    scale = 1.0
    if train.ratio_normalization:
        log_ratio, scale = _normalized(log_ratio, minibatch.trajectory.means, slot, score.action)
    clipped = policy_loss(log_ratio, minibatch.advantages, train.clip_range)
    terms |= {
        "loss": scale * clipped.loss,
        "ratio_mean": clipped.ratio_mean,
        "clip_fraction": clipped.clip_fraction,
        "approx_kl": clipped.approx_kl,
        "log_ratio_mean": clipped.log_ratio_mean,
    }
    if minibatch.reference is not None:
        assert score.action is not None, "settings.resolve refuses a KL for every other likelihood"
        beta = kl_weight(train.beta, score.action.levels[0], train.kl_min_sigma)
        kl = _reference_kl(minibatch, score.action, config) if beta > 0 else log_ratio.new_zeros(())
        terms |= {"loss": terms["loss"] + beta * kl, "kl": kl.detach()}
    return terms


def _normalized(log_ratio: Tensor, means: Tensor | None, slot: int, action: Action | None) -> tuple[Tensor, float]:
    """GRPO-Guard's normalised log-ratio of a step, (B,), and the scale 1 / -dt of its loss."""
    assert action is not None, "settings.resolve refuses this option for every other likelihood"
    assert means is not None, "the rollout keeps them"
    sigma, sigma_next = action.levels
    return normalized_log_ratio(log_ratio, action.step.mean, means[:, slot], action.step.std), 1 / (sigma - sigma_next)


def _reference_kl(minibatch: Minibatch, action: Action, config: FrozenConfigDict) -> Tensor:
    """KL of a step to the reference model's, in the space that `train.kl_space` names: scalar, per dimension."""
    assert minibatch.reference is not None, "there is a KL"
    velocity_ref = minibatch.reference(action.latents, action.levels[0])
    if config.train.kl_space == "velocity":
        return velocity_kl(action.velocity, velocity_ref, minibatch.penalised)
    coefficients = step_coefficients(config.sample.sde_type, *action.levels, config.sample.noise_level)
    mean_ref = step_mean(action.latents, velocity_ref, coefficients)
    return gaussian_kl(action.step.mean, mean_ref, action.step.std, minibatch.penalised)


def _with_ratio_std(metrics: dict[str, float]) -> dict[str, float]:
    """Add `ratio_std`, the standard deviation of log r over what the epoch has trained, from its moments."""
    if "approx_kl" not in metrics:  # nothing was trained
        return metrics
    variance = 2 * metrics["approx_kl"] - metrics["log_ratio_mean"] ** 2
    return metrics | {"ratio_std": math.sqrt(variance) if variance > 0 else 0.0}
