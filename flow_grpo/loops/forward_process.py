"""NFT, AWM, PEPG and PAR: rewards turned into regressions at noised images (MATH 9, flow_grpo/forward_process.py).

An epoch's images are made by any sampler. Each is then noised a few times, afresh in every pass, and the velocity there
is drawn to the image or pushed away from it, by its advantage. There are three sets of weights: the trained ones; the
old ones, which do not change during an epoch; the pretrained ones, to which `train.beta` holds.

The old weights are those of the epoch's start ("snapshot"), or their average over epochs ("ema"), which then also makes
the images. An average that does not move at all (decay 1) would learn nothing; one that follows at once (decay 0) is a
snapshot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from ml_collections import FrozenConfigDict
from torch import Tensor

from flow_grpo.diffusers_patch.velocity import VelocityFn
from flow_grpo.forward_process import (
    Point,
    Velocities,
    awm_loss,
    log_probs,
    nft_loss,
    noised,
    par_loss,
    pepg_loss,
    stratified_times,
)
from flow_grpo.loops.collect import Images, advantages_of, epoch_prompts, penalised_of, sample_images
from flow_grpo.loops.update import apply_update
from flow_grpo.losses import kl_weight, velocity_kl
from flow_grpo.metrics import MeanMetrics
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.randomness import keyed_generator
from flow_grpo.rewards.building import WeightedReward
from flow_grpo.runs.run import Run
from flow_grpo.settings import Settings


def train_epoch(
    policy: Policy, prompts: PromptDataset, reward: WeightedReward, settings: Settings, run: Run
) -> dict[str, float]:
    """One epoch: sample the groups, `num_inner_epochs` passes of `plan.updates` updates, move the old weights."""
    config, plan = settings.config, settings.plan
    batch = epoch_prompts(prompts, plan, config.seed, run.counters.groups, policy.accelerator.process_index)
    metrics = MeanMetrics()
    policy.keep_old()
    with policy.old_weights():
        images = sample_images(policy, batch, reward, settings, run, metrics, precision=config.forward.rollout)
    run.counters.images += plan.images
    advantages = advantages_of(policy, images, settings, metrics)
    penalised = penalised_of(policy, images, settings, metrics)
    updates = [(inner, update) for inner in range(config.train.num_inner_epochs) for update in range(plan.updates)]
    for inner, update in run.progress(updates, "updates"):
        _train_update(policy, images, advantages, penalised, settings, run, metrics, inner, update)
    if config.forward.old == "ema":
        policy.move_old(old_decay(config.forward, run.counters.epoch))
    else:
        policy.old = None
    return metrics.result(policy.accelerator)


def old_decay(forward: FrozenConfigDict, epoch: int) -> float:
    """Of the old weights' average after epoch `epoch`, counted from 0: constant, or rising to `old_decay`."""
    if forward.old_decay_ramp == 0:
        return forward.old_decay
    return min(forward.old_decay_ramp * epoch, forward.old_decay)


# --- training ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Minibatch:
    """B images of an epoch with the velocities that are compared at their points."""

    velocity: VelocityFn
    old: VelocityFn
    reference: VelocityFn | None  # None: no KL
    advantages: Tensor  # (B,)
    penalised: Tensor | None = None  # (B,) bool: whose KL counts; None: everybody's


def _train_update(
    policy: Policy,
    images: Images,
    advantages: Tensor,
    penalised: Tensor | None,
    settings: Settings,
    run: Run,
    metrics: MeanMetrics,
    inner: int,
    update: int,
) -> None:
    """One optimizer step, on points of this update's images: their times in common, each image's noises its own."""
    config, plan = settings.config, settings.plan
    times = stratified_times(
        config.forward.draws, keyed_generator(config.seed, "forward time", images.epoch, inner, update)
    )
    loss = torch.zeros((), device=policy.device)
    for chunk in run.progress(plan.update_indices(update).split(config.train.batch_size), "training"):
        run.check_stop()
        minibatch = _minibatch(policy, images, advantages, penalised, chunk, config)
        x_0 = images.trajectory.final_latents[chunk.to(policy.device)]
        ids = images.batch.sample_ids[chunk].tolist()
        generators = [keyed_generator(config.seed, "forward noise", images.epoch, i, inner) for i in ids]
        weight = len(chunk) / plan.images_per_update / len(times)
        for t in times:
            terms = point_loss(minibatch, noised(x_0, policy.noise(generators), t), config)
            policy.accelerator.backward(weight * terms["loss"])
            loss += weight * terms.pop("loss").detach()
            metrics.add(terms, weight=len(chunk))
    metrics.add(apply_update(policy, loss, run))


def _minibatch(
    policy: Policy,
    images: Images,
    advantages: Tensor,
    penalised: Tensor | None,
    chunk: Tensor,
    config: FrozenConfigDict,
) -> Minibatch:
    """The images at positions `chunk` of this process's epoch."""
    embeds, guidance_scale = (
        policy.encode([images.batch.prompts[i] for i in chunk.tolist()]),
        config.sample.guidance_scale,
    )
    return Minibatch(
        velocity=policy.velocity(embeds, guidance_scale),
        old=policy.old_velocity(embeds, guidance_scale),
        reference=policy.reference_velocity(embeds, guidance_scale) if config.train.beta > 0 else None,
        advantages=advantages[chunk.to(policy.device)],
        penalised=None if penalised is None else penalised[chunk.to(policy.device)],
    )


def point_loss(minibatch: Minibatch, point: Point, config: FrozenConfigDict) -> dict[str, Tensor]:
    """Loss of one point of each image of a minibatch, and what is logged of it: scalars."""
    at = Velocities(
        velocity=minibatch.velocity(point.latents, point.t),
        old=minibatch.old(point.latents, point.t),
        target=point.target,
        t=point.t,
    )
    terms = LOSSES[config.train.method](at, minibatch.advantages, config)
    held = velocity_kl(at.velocity, at.old)
    terms |= {"loss": terms["loss"] + config.forward.eta * held, "old_kl": held.detach()}
    beta = kl_weight(config.train.beta, point.t, config.train.kl_min_sigma)
    if minibatch.reference is not None and beta > 0:
        kl = velocity_kl(at.velocity, minibatch.reference(point.latents, point.t), minibatch.penalised)
        terms |= {"loss": terms["loss"] + beta * kl, "kl": kl.detach()}
    return terms


# --- the methods' own terms ----------------------------------------------------------------------------


def _nft(at: Velocities, advantages: Tensor, config: FrozenConfigDict) -> dict[str, Tensor]:
    """rho = 1/2 + A / (2 adv_clip_max): the clamp of the advantages is that of rho to [0, 1]."""
    optimality = 0.5 + advantages / (2 * config.train.adv_clip_max)
    return {"loss": nft_loss(at, optimality, config.forward.beta, config.forward.weight)}


def _awm(at: Velocities, advantages: Tensor, config: FrozenConfigDict) -> dict[str, Tensor]:
    clipped = awm_loss(*log_probs(at, config.forward.weight), advantages, config.train.clip_range)
    return {"loss": clipped.loss, "ratio_mean": clipped.ratio_mean, "clip_fraction": clipped.clip_fraction}


def _pepg(at: Velocities, advantages: Tensor, config: FrozenConfigDict) -> dict[str, Tensor]:
    log_prob, old = log_probs(at, config.forward.weight)
    loss = pepg_loss(log_prob, old, config.forward.strength * advantages)
    return {"loss": loss, "ratio_mean": (log_prob.detach() - old).exp().mean()}


def _par(at: Velocities, advantages: Tensor, config: FrozenConfigDict) -> dict[str, Tensor]:
    log_prob, old = log_probs(at, config.forward.weight)
    loss = par_loss(log_prob, old, config.forward.strength * advantages)
    return {"loss": loss, "ratio_mean": (log_prob.detach() - old).exp().mean()}


# By config.train.method: the loss of a point, with its gradient, under "loss"; what is logged of it.
LOSSES: dict[str, Callable[[Velocities, Tensor, FrozenConfigDict], dict[str, Tensor]]] = {
    "nft": _nft,
    "awm": _awm,
    "pepg": _pepg,
    "par": _par,
}
