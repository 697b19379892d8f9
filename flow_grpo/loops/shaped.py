"""`config.shaping`: features or densities of images, what they do to rewards, to advantages, or to the gradient.

The functions of MATH 10 themselves are in flow_grpo/shaping.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from ml_collections import FrozenConfigDict
from torch import Tensor

from flow_grpo.divergence import DivergenceEstimator, NonFiniteError
from flow_grpo.diversity.features import FeatureExtractor, load_extractor, pixel_extractor
from flow_grpo.entropy import ode_log_density
from flow_grpo.policy import Policy
from flow_grpo.randomness import keyed_generator
from flow_grpo.shaping import cluster_bonus, distance_weighted, entropy_bonus, log_diversities, vendi_bonus
from flow_grpo.types import Trajectory


def extractor_of(config: FrozenConfigDict, device: torch.device) -> FeatureExtractor | None:
    """The encoder that `config.shaping` names; None: nothing is asked of features.

    Raises:
        ConfigError: it cannot be loaded.
    """
    shaping = config.shaping
    if shaping.kind in ("", "density"):
        return None
    black_box = not config.use_reward_gradient  # else the features need a gradient
    return _load(shaping.extractor, shaping.model, shaping.pretrained, device, config.sample.batch_size, black_box)


@lru_cache(maxsize=1)  # once a run, not once an epoch
def _load(
    kind: str, model: str, pretrained: str, device: torch.device, batch_size: int, eight_bit: bool
) -> FeatureExtractor:
    if kind == "pixels":
        return pixel_extractor(device, batch_size, eight_bit=eight_bit)
    return load_extractor(kind, model, pretrained, device, batch_size, eight_bit)


def features_of(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) -> (B, d) on their device. What is not finite is black: its reward is not finite either."""
    return torch.from_numpy(extractor(images.nan_to_num(0.0))).to(images.device)


def densities_of(
    policy: Policy, prompts: Sequence[str], sample_ids: Tensor, trajectory: Trajectory, epoch: int
) -> Tensor:
    """log p(x_0) / D of B images under the guided ODE of the present weights: (B,) float64, without gradient.

    By Euler on the sampler's own noise levels, with probes keyed by image and evaluation: not those of the ratio, on
    whose gradient a bonus of the same probes would not be an independent factor. Where a velocity or its divergence is
    not finite, neither is the answer: such an update is skipped.
    """
    config, found = policy.settings.config, []
    estimator = DivergenceEstimator(num_probes=config.shaping.probes, agreed=policy.agreed)
    for chunk in torch.arange(len(prompts)).split(config.train.batch_size):
        velocity = policy.velocity(policy.encode([prompts[i] for i in chunk.tolist()]), config.sample.guidance_scale)
        x_0, ids = trajectory.final_latents[chunk.to(policy.device)], sample_ids[chunk].tolist()

        def probes(evaluation: int, ids: Sequence[int] = ids) -> list[torch.Generator]:
            return [keyed_generator(config.seed, "density probe", epoch, image, evaluation) for image in ids]

        try:
            with policy.eager():
                density = ode_log_density(velocity, x_0, trajectory.sigmas.flip(0), estimator, probes).nats_per_dim
        except NonFiniteError:
            density = x_0.new_full((len(x_0),), math.nan, dtype=torch.float64)
        found.append(density)
    return torch.cat(found)


def shaped_rewards(rewards: Tensor, group_ids: Tensor, features: Tensor, config: FrozenConfigDict) -> Tensor:
    """Rewards (N,) of all processes with the bonus of their groups; float64 where there is one."""
    shaping = config.shaping
    if shaping.kind == "cluster":
        return cluster_bonus(rewards, group_ids, features, shaping.weight, shaping.cluster_distance)
    if shaping.kind == "entropy":
        return entropy_bonus(rewards, group_ids, features, shaping.weight, shaping.bandwidth)
    if shaping.kind == "vendi":
        return vendi_bonus(rewards, group_ids, features, shaping.weight)
    return rewards


def shaped_advantages(advantages: Tensor, group_ids: Tensor, features: Tensor, config: FrozenConfigDict) -> Tensor:
    """Advantages (N,) of all processes, weighted where `config.shaping` weighs them."""
    return distance_weighted(advantages, group_ids, features) if config.shaping.kind == "distance" else advantages


def group_diversity(images: Tensor, group_ids: Tensor, config: FrozenConfigDict) -> Tensor:
    """The log of its group's Vendi score or RKE, of each image, differentiable: (B, 3, H, W) -> (B,) float32.

    Its mean over the images of whole groups is the set objective's, and so is that mean's gradient.
    """
    shaping, extractor = config.shaping, extractor_of(config, images.device)
    assert extractor is not None, "the configuration asks for it"
    features = extractor.differentiable(images)
    bandwidth = shaping.bandwidth if shaping.kind == "log_rke" else None
    return log_diversities(features, group_ids.to(images.device), bandwidth).float()
