"""FDFO: finite differences in place of the reward's gradient, by pairs of images from one noise (arXiv 2603.12893).

The two images of a pair begin at the same noise and part by small `cps` steps. Half the difference of their rewards
over half the difference of their latents, dR Delta / mean(Delta^2), is an estimate of the reward's gradient along
Delta. At every stored point of its trajectory an image's velocity is drawn towards v* = v_old - Delta / mean(Delta^2),
which would move it on in the direction in which it left its partner, or away from v*, if it is the worse one.

Sample ids 2 k and 2 k + 1 are a pair. A process may make only one of the two: final latents and rewards are therefore
gathered, and each image finds its partner among all. Nothing else of a partner is needed, so the two may also be of
different updates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flow_grpo.diffusers_patch.step import step_coefficients
from flow_grpo.loops.collect import (
    Images,
    epoch_prompts,
    gathered_rewards,
    in_step,
    penalised_of,
    sample_images,
    sampling_minibatches,
    training_minibatches,
)
from flow_grpo.loops.update import apply_update, check_ratio
from flow_grpo.losses import finite_difference_log_ratio, finite_difference_loss, kl_weight, velocity_kl
from flow_grpo.metrics import MeanMetrics
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.rewards.building import WeightedReward
from flow_grpo.runs.run import Run
from flow_grpo.settings import Settings
from flow_grpo.types import Trajectory

LOGGED = ("ratio_mean",)  # of each step that is trained
WHY_OFF = (
    "an image's velocity is known to the rounding of its rollout, and divided by the distance of its pair; a larger "
    "config.fdfo.epsilon than {epsilon}, or config.fdfo.floor than {floor}, bears that, unless sampling and training "
    "differ in guidance, precision or sampler"
)


@dataclass(frozen=True)
class Pairs:
    """N images of one process, each with what it differs by from its partner."""

    images: Images
    delta: Tensor  # (N, C, h, w): half the difference of the final latents
    gain: Tensor  # (N,): half the difference of the rewards, dR; 0 of pairs that are too close
    close: Tensor  # (N,) bool: too close to divide by their distance
    penalised: Tensor | None = None  # (N,) bool: whose KL counts; None: everybody's


def train_epoch(
    policy: Policy, prompts: PromptDataset, reward: WeightedReward, settings: Settings, run: Run
) -> dict[str, float]:
    """One epoch: sample the pairs, then `num_inner_epochs` passes of `plan.updates` updates."""
    config, plan = settings.config, settings.plan
    batch = epoch_prompts(prompts, plan, config.seed, run.counters.groups, policy.accelerator.process_index)
    metrics = MeanMetrics()
    chunks = sampling_minibatches(settings, len(batch), recorded=True)
    starts = batch.sample_ids // 2
    images = sample_images(policy, batch, reward, settings, run, metrics, chunks, starts, keep_means=True)
    run.counters.images += plan.images
    pairs = paired(policy, images, config.fdfo.floor, metrics)
    pairs = replace(pairs, penalised=penalised_of(policy, images, settings, metrics))
    updates = [(inner, update) for inner in range(config.train.num_inner_epochs) for update in range(plan.updates)]
    for inner, update in run.progress(updates, "FDFO updates"):
        _train_update(policy, pairs, settings, run, metrics, inner, update)
    return metrics.result(policy.accelerator)


def paired(policy: Policy, images: Images, floor: float, metrics: MeanMetrics) -> Pairs:
    """Collective: this process's images beside their partners, wherever those were made."""
    rewards, _ = gathered_rewards(policy, images, metrics)
    ends = images.trajectory.final_latents
    partner = (images.batch.sample_ids ^ 1).to(policy.device)
    delta = (ends - policy.accelerator.gather(ends.contiguous())[partner]) / 2
    own = images.batch.sample_ids.to(policy.device)
    gain = ((rewards[own] - rewards[partner]) / 2).to(images.rewards.dtype)
    distance = delta.square().flatten(1).mean(1)
    close = distance <= floor
    metrics.add({"pair_distance": distance.mean(), "close_fraction": close.float().mean()}, weight=len(delta))
    return Pairs(images, delta, gain.masked_fill(close, 0.0), close)


def _train_update(
    policy: Policy, pairs: Pairs, settings: Settings, run: Run, metrics: MeanMetrics, inner: int, update: int
) -> None:
    """One optimizer step on this update's images at every step; before an epoch's first, the ratio must be 1."""
    config, plan = settings.config, settings.plan
    steps = len(pairs.images.trajectory.sigmas) - 1
    loss, ratio_error = torch.zeros((), device=policy.device), torch.zeros((), device=policy.device)
    teaches = (pairs.gain != 0) | (config.train.beta > 0 if pairs.penalised is None else pairs.penalised)
    chunks = in_step(policy, training_minibatches(settings, update, teaches, recorded=True), settings, update)
    metrics.add({"trained_fraction": sum(chunk.counted for chunk in chunks) / plan.images_per_update})
    logged = (*LOGGED, "kl") if config.train.beta > 0 else LOGGED
    metrics.add(dict.fromkeys(logged, 0.0), weight=0)  # other processes may train where this one does not
    if not any(len(chunk.positions) for chunk in chunks):
        policy.accelerator.backward(0 * policy.trainable[0].sum())  # fp16's loss scaler must have seen a loss
    for chunk in run.progress(chunks, "training"):
        run.check_stop()
        weight = chunk.counted / plan.images_per_update / steps
        for step in range(steps) if len(chunk.positions) else ():
            terms = step_loss(policy, pairs, chunk.positions, step, settings)
            policy.accelerator.backward(weight * terms["loss"])
            loss += weight * terms.pop("loss").detach()
            ratio_error = torch.maximum(ratio_error, terms.pop("ratio_error"))
            metrics.add(terms, weight=chunk.counted)
    if inner == update == 0:
        bound = config.train.max_ratio_error * config.fdfo.epsilon
        why = WHY_OFF.format(epsilon=config.fdfo.epsilon, floor=config.fdfo.floor)
        metrics.add({"ratio_error": check_ratio(policy, ratio_error, bound, why)})
    metrics.add(apply_update(policy, loss, run))


def step_loss(policy: Policy, pairs: Pairs, chunk: Tensor, step: int, settings: Settings) -> dict[str, Tensor]:
    """Loss of one step of the images at positions `chunk`, and what is logged of it: scalars."""
    config, index = settings.config, chunk.to(policy.device)
    trajectory = pairs.images.trajectory[index]
    embeds = policy.encode([pairs.images.batch.prompts[i] for i in chunk.tolist()])
    x, sigma = trajectory.latents[:, step], trajectory.sigmas[step].item()
    velocity = policy.velocity(embeds, config.sample.guidance_scale)(x, sigma)
    old = rollout_velocity(trajectory, step, config.sample.noise_level)
    gain, delta = pairs.gain[index], pairs.delta[index]
    used = ~pairs.close[index]  # the others, there for the KL, have no direction
    log_ratio = finite_difference_log_ratio(velocity[used], old[used], delta[used])
    surrogate = finite_difference_loss(log_ratio, gain[used], config.fdfo.epsilon)
    loss = surrogate.sum() / len(chunk)
    ratio = log_ratio.detach().exp()
    terms = {
        "ratio_error": torch.cat([(ratio - 1).abs(), ratio.new_zeros(1)]).max(),
        "ratio_mean": torch.cat([ratio, ratio.new_ones(len(chunk) - len(ratio))]).mean(),
    }
    if (beta := kl_weight(config.train.beta, sigma, config.train.kl_min_sigma)) > 0:
        reference = policy.reference_velocity(embeds, config.sample.guidance_scale)
        penalised = None if pairs.penalised is None else pairs.penalised[index]
        kl = velocity_kl(velocity, reference(x, sigma), penalised)
        terms["kl"] = kl.detach()
        loss = loss + beta * kl
    return terms | {"loss": loss}


def rollout_velocity(trajectory: Trajectory, step: int, noise_level: float) -> Tensor:
    """v_old of a `cps` step, (B, C, h, w), from what it led to: the mean a x + b v; the last step's is x'.

    To the rounding of the mean over |b|: a part in a million, but 1e-4 in a last step of SD3's, which is short.
    """
    sigma, after = trajectory.sigmas[step].item(), trajectory.sigmas[step + 1].item()
    coefficients = step_coefficients("cps", sigma, after, noise_level)
    if step in trajectory.stochastic_steps:
        assert trajectory.means is not None, "the rollout keeps them"
        mean = trajectory.means[:, trajectory.stochastic_steps.index(step)]
    else:
        mean = trajectory.latents[:, step + 1]
    return (mean - coefficients.a * trajectory.latents[:, step]) / coefficients.b
