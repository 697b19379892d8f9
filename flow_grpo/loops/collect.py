"""An epoch's images: which prompts they are of, how they are sampled and scored, and what their rewards are worth.

The order of the prompts is an infinite stream: one keyed permutation of the dataset after another. An epoch takes the
next `groups` entries, from a position that checkpoints keep, whatever the number of processes; every prompt is used
once before any is used again, also where the number of groups changes on the way. Weights and categories of prompts
make another stream, of the same kind (flow_grpo/randomness.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flow_grpo.advantages import apply_advantage_mode, group_advantages, zero_std_fraction
from flow_grpo.batching import BatchPlan
from flow_grpo.diffusers_patch.sd3_pipeline_with_logprob import pipeline_with_logprob
from flow_grpo.diffusers_patch.velocity import VelocityFn
from flow_grpo.loops.scores import EpochScores
from flow_grpo.loops.shaped import (
    densities_of,
    extractor_of,
    features_of,
    shaped_advantages,
    shaped_rewards,
)
from flow_grpo.metrics import MeanMetrics
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.randomness import balanced_stream, keyed_generator, keyed_stream, sample_generators, weighted_stream
from flow_grpo.rewards.building import WeightedReward
from flow_grpo.runs.run import Run
from flow_grpo.settings import Settings
from flow_grpo.shaping import density_bonus, disagreement, gate
from flow_grpo.types import PromptBatch, Trajectory

# --- prompts --------------------------------------------------------------------------------------------


def epoch_prompts(dataset: PromptDataset, plan: BatchPlan, seed: int, start: int, rank: int) -> PromptBatch:
    """The prompts of the images that process `rank` makes in an epoch: each of its prompts `group_size` times.

    A group may be split between processes; its members share `group_ids`.

    Args:
        start: position in the stream, the number of prompts that the epochs before have drawn.
    """
    sample_ids = torch.arange(plan.images)[plan.process_slice(rank)]  # (N,)
    group_ids = sample_ids // plan.group_size  # (N,)
    drawn = _drawn(dataset, seed, start, plan.groups)
    rows = [drawn[group] for group in group_ids.tolist()]
    return PromptBatch(
        prompts=tuple(dataset.prompts[row] for row in rows),
        metadata=tuple(dataset.metadata[row] for row in rows),
        sample_ids=sample_ids,
        group_ids=group_ids,
    )


def _drawn(dataset: PromptDataset, seed: int, start: int, count: int) -> list[int]:
    """The places of the prompts at positions start ... start + count - 1 of the stream."""
    if dataset.weights is not None:
        return weighted_stream(dataset.weights, seed, "prompts", start, count)
    if dataset.categories is not None:
        return balanced_stream(dataset.categories, seed, "prompts", start, count)
    return keyed_stream(len(dataset), seed, "prompts", start, count)


# --- images and their rewards ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """What one process keeps of an epoch's rollouts: N images, in the order of their sample ids."""

    batch: PromptBatch  # of the N
    epoch: int
    trajectory: Trajectory  # of the N
    rewards: Tensor  # (N,) float32
    features: Tensor | None = None  # (N, d) float32, of `config.shaping`; None: it asks for none
    density: Tensor | None = None  # (N,) float64: log p(x_0) / D under the sampling weights; None: likewise
    held_out: Tensor | None = None  # (N, M) float32: the rewards of `shaping.gate_rewards`; None: there is no gate


def sample_images(
    policy: Policy,
    batch: PromptBatch,
    reward: WeightedReward,
    settings: Settings,
    run: Run,
    metrics: MeanMetrics,
    chunks: Sequence[Tensor] | None = None,
    starts: Tensor | None = None,
    keep_means: bool = False,
    precision: str = "",
) -> Images:
    """Sample this process's images by `config.sample` and the present weights, and score them.

    Args:
        chunks: positions in the batch that are sampled together, each once; None: `sample.batch_size` consecutive ones.
        starts: (N,) int64: images of the same number begin at the same noise; None: each at its own.
        keep_means: of the stochastic steps, as large as the latents themselves.
        precision: of the network while it samples, where nothing recorded is compared with; "": that of the run.
    """
    config, epoch = settings.config, run.counters.epoch
    if chunks is None:
        chunks = torch.arange(len(batch)).split(config.sample.batch_size)
    policy.encode_ahead(batch.prompts)
    extractor = extractor_of(config, policy.device)
    scores = EpochScores(reward, config.shaping.gate_rewards, run)
    trajectories, features, densities = [], [], []
    for chunk in run.progress(chunks, "sampling"):
        scores.look()
        run.check_stop()
        prompts = [batch.prompts[i] for i in chunk.tolist()]
        begins = None if starts is None else starts[chunk]
        with run.phase("sampling"), policy.in_precision(precision):
            velocity = policy.velocity(policy.encode(prompts), config.sample.guidance_scale)
            trajectory = _sample(policy, velocity, batch.sample_ids[chunk], settings, epoch, begins, keep_means)
        metadata, ids = [batch.metadata[i] for i in chunk.tolist()], batch.sample_ids[chunk]
        with run.phase("scoring"), torch.no_grad():
            images = policy.decode(trajectory.final_latents)
            scores.begin(images, prompts, metadata, ids)
        if scores.compares:
            with run.phase("sampling"), policy.in_precision(precision):
                velocity = policy.reference_velocity(policy.encode(prompts), config.sample.guidance_scale)
                ends = _sample(policy, velocity, ids, settings, epoch, begins, keep_means=False).final_latents
            with run.phase("scoring"), torch.no_grad():
                scores.begin(policy.decode(ends), prompts, metadata, ids, of_base=True)
        trajectories.append(trajectory)
        if extractor is not None:
            features.append(features_of(extractor, images))
        if config.shaping.kind == "density":
            densities.append(densities_of(policy, prompts, batch.sample_ids[chunk], trajectory, epoch))
    with run.phase("scoring"):
        scores.settle()
    run.check_stop(ended=True)
    trajectory, order = Trajectory.cat(trajectories), torch.cat(list(chunks)).argsort().to(policy.device)
    if (order.diff() != 1).any():  # back to that of the sample ids
        trajectory = trajectory[order]
    found = (torch.cat(part)[order] if part else None for part in (features, densities, scores.held_out))
    return Images(batch, epoch, trajectory, scores.objective(policy, order, metrics), *found)


def _sample(
    policy: Policy,
    velocity: VelocityFn,
    sample_ids: Tensor,
    settings: Settings,
    epoch: int,
    starts: Tensor | None,
    keep_means: bool,
) -> Trajectory:
    """The rollout of some images; their first noise is keyed by `starts` where there are any, all else by image."""
    config = settings.config
    generators = sample_generators(config.seed, "noise", epoch, sample_ids)
    if starts is None:
        noise = policy.noise(generators)
    else:
        noise = policy.noise(sample_generators(config.seed, "start", epoch, starts))
    return pipeline_with_logprob(
        velocity,
        noise,
        policy.sigmas(config.sample.num_steps),
        sde_type=config.sample.sde_type,
        noise_level=config.sample.noise_level,
        window=sde_window(settings, epoch),
        generators=generators,
        keep_means=keep_means,
    )


def sde_window(settings: Settings, epoch: int) -> range:
    """The steps that are stochastic in this epoch: all, or a window (Flow-GRPO-Fast; MixGRPO, arXiv 2507.21802).

    A random window is drawn anew each epoch. A sliding one begins with the first, noisiest steps, moves on by
    `sde_window_stride` every `sde_window_epochs` epochs, ends with the last steps, and then begins again.
    """
    sample = settings.config.sample
    if sample.sde_window_size == 0:
        return range(sample.num_steps)
    first, end = sample.sde_window_range if any(sample.sde_window_range) else (0, sample.num_steps)
    room = end - first - sample.sde_window_size  # steps by which it can move
    if sample.sde_window_placement == "sliding":
        places = [*range(0, room, sample.sde_window_stride), room]
        start = first + places[epoch // sample.sde_window_epochs % len(places)]
    else:
        generator = keyed_generator(settings.config.seed, "window", epoch)
        start = first + int(torch.randint(room + 1, (), generator=generator))
    return range(start, start + sample.sde_window_size)


# --- what the rewards are worth -------------------------------------------------------------------------


def advantages_of(policy: Policy, images: Images, settings: Settings, metrics: MeanMetrics) -> Tensor:
    """Advantages of this process's images, (N,) float32, clamped, from the rewards of all processes."""
    train = settings.config.train
    rewards, groups = gathered_rewards(policy, images, metrics)
    advantages = group_advantages(rewards, groups, train.advantage_std)
    if images.features is not None:
        features = policy.accelerator.gather(images.features)
        advantages = shaped_advantages(advantages, groups, features, settings.config)
    advantages = apply_advantage_mode(advantages, train.advantage_mode).clamp(-train.adv_clip_max, train.adv_clip_max)
    return advantages[settings.plan.process_slice(policy.accelerator.process_index)].to(images.rewards.dtype)


def gathered_rewards(policy: Policy, images: Images, metrics: MeanMetrics) -> tuple[Tensor, Tensor]:
    """Collective: the rewards, with the bonus of `config.shaping`, and the group ids, of all processes' images, in the
    order of their sample ids. What is logged as "reward" is without the bonus.
    """
    rewards = policy.accelerator.gather(images.rewards)
    groups = policy.accelerator.gather(images.batch.group_ids.to(policy.device))
    metrics.add(
        {
            "reward": rewards.mean(),
            "reward_std": rewards.std(correction=0),
            "zero_std_fraction": zero_std_fraction(rewards, groups),
        }
    )
    if images.density is not None:
        density = policy.accelerator.gather(images.density)
        metrics.add({"density": density.mean()})
        shaped = density_bonus(rewards, density, policy.settings.config.shaping.weight)
    elif images.features is not None:
        shaped = shaped_rewards(rewards, groups, policy.accelerator.gather(images.features), policy.settings.config)
    else:
        return rewards, groups
    metrics.add({"bonus": (shaped - rewards).mean(), "bonus_std": (shaped - rewards).std(correction=0)})
    return shaped, groups


def penalised_of(policy: Policy, images: Images, settings: Settings, metrics: MeanMetrics) -> Tensor | None:
    """Which of this process's images the KL divergence counts for, (N,) bool; None: for all. Collective.

    By the gate of `config.shaping`, over all processes' images: those that the training reward, without a bonus, ranks
    higher in their group than the held-out rewards do.
    """
    if images.held_out is None:
        return None
    rewards = policy.accelerator.gather(images.rewards)
    groups = policy.accelerator.gather(images.batch.group_ids.to(policy.device))
    unlike = disagreement(rewards, policy.accelerator.gather(images.held_out).T, groups)
    chosen = gate(unlike, settings.config.shaping.gate_share)
    metrics.add({"penalised_fraction": chosen.float().mean()})
    return chosen[settings.plan.process_slice(policy.accelerator.process_index)]


# --- minibatches ----------------------------------------------------------------------------------------


def sampling_minibatches(settings: Settings, count: int, recorded: bool) -> list[Tensor]:
    """Which of a process's `count` images are sampled together: each once, int64.

    Below float32 an image's velocity depends a little on how many are computed with it. Where training compares with
    what the rollout has `recorded`, a ratio that should be 1 would not be: there the very minibatches of training are
    sampled. Else they are `sample.batch_size` consecutive images.
    """
    config, plan = settings.config, settings.plan
    exact = config.mixed_precision == "no" or not recorded
    if exact or count != plan.images_per_process:
        return list(torch.arange(count).split(config.sample.batch_size))
    return [chunk for u in range(plan.updates) for chunk in plan.update_indices(u).split(config.train.batch_size)]


def training_minibatches(settings: Settings, update: int, teaches: Tensor, recorded: bool) -> list[Tensor]:
    """The images of one update that have something to teach, in minibatches: as many on every process, some empty.

    Below float32, where the rollout's records are compared with, a minibatch stays as it was sampled (see
    `sampling_minibatches`): only one that has nothing to teach is left out.

    Args:
        teaches: (N,) bool: of this process's images.
    """
    config, plan = settings.config, settings.plan
    indices, teaches = plan.update_indices(update), teaches.cpu()
    whole = indices.split(config.train.batch_size)
    if config.mixed_precision == "no" or not recorded:
        chunks = list(indices[teaches[indices]].split(config.train.batch_size))
    else:
        chunks = [chunk if teaches[chunk].any() else chunk[:0] for chunk in whole]
    return chunks + [indices[:0]] * (len(whole) - len(chunks))


@dataclass(frozen=True)
class Chunk:
    """Images that go through the network together."""

    positions: Tensor  # (B,) int64, among this process's images
    counted: int  # how many of them teach: all, or none


def in_step(policy: Policy, chunks: Sequence[Tensor], settings: Settings, update: int) -> list[Chunk]:
    """The minibatches of `training_minibatches`, as many; empty ones are to be passed over. Collective.

    Where the network waits for all processes, none is empty that is not so everywhere: an image takes its place, and
    counts for nothing.
    """
    if not policy.sharded:
        return [Chunk(chunk, len(chunk)) for chunk in chunks]
    filled = torch.tensor([[int(len(chunk) > 0) for chunk in chunks]], device=policy.device)
    anywhere = policy.accelerator.gather(filled).any(0).tolist()  # one for each chunk
    spare = settings.plan.update_indices(update)[:1]
    return [
        Chunk(spare if taken and len(chunk) == 0 else chunk, len(chunk))
        for chunk, taken in zip(chunks, anywhere, strict=True)
    ]
