"""Diversity inside the objective, wired: features follow their images, bonuses their groups."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flow_grpo import shaping
from flow_grpo.advantages import group_advantages
from flow_grpo.diversity.rke import rke_score
from flow_grpo.diversity.vendi import vendi_score
from flow_grpo.loops import collect, policy_gradient
from flow_grpo.loops.shaped import features_of, group_diversity
from flow_grpo.metrics import MeanMetrics
from tests.conftest import by_method
from tests.loops.tiny_net import relative


def sampled(parts, metrics=None):
    """An epoch's images, sampled in chunks out of order."""
    batch = collect.epoch_prompts(parts.prompts, parts.settings.plan, parts.settings.config.seed, 0, 0)
    chunks = [torch.tensor([5, 0, 3]), torch.tensor([1, 7, 2, 4, 6])]
    return collect.sample_images(
        parts.policy, batch, parts.reward, parts.settings, parts.run, metrics or MeanMetrics(), chunks
    )


def test_features_are_those_of_the_images_in_their_order(config, build):
    config.shaping.kind = "distance"
    parts = build(config)
    images = sampled(parts)
    with torch.no_grad():
        pixels = parts.policy.decode(images.trajectory.final_latents)
    expected = torch.nn.functional.adaptive_avg_pool2d((255 * pixels).round() / 255, 8).flatten(1) - 0.5
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(images.features, expected, rtol=0, atol=1e-3)  # an eight-bit step, of another batch
    assert (images.features[0] - expected[1]).abs().max() > 1e-3


def test_without_shaping_no_features_are_made_and_rewards_are_as_they_are(config, build):
    parts = build(config)
    images = sampled(parts)
    assert images.features is None
    rewards, _ = collect.gathered_rewards(parts.policy, images, MeanMetrics())
    assert torch.equal(rewards, images.rewards)


BONUSES = {
    "cluster": lambda *images: shaping.cluster_bonus(*images, 0.5, 0.1),
    "entropy": lambda *images: shaping.entropy_bonus(*images, 0.5, 0.3),
    "vendi": lambda *images: shaping.vendi_bonus(*images, 0.5),
}


@pytest.mark.parametrize("kind", BONUSES)
def test_a_bonus_is_added_before_the_advantage_and_logged_apart_from_the_reward(config, build, kind):
    config.shaping.kind, config.shaping.weight, config.train.adv_clip_max = kind, 0.5, 100.0
    parts = build(config)
    metrics = MeanMetrics()
    images = sampled(parts)
    found = collect.advantages_of(parts.policy, images, parts.settings, metrics)
    groups = images.batch.group_ids
    shaped = BONUSES[kind](images.rewards, groups, images.features)
    torch.testing.assert_close(found, group_advantages(shaped, groups).float())
    logged = metrics.result(parts.accelerator)
    assert logged["reward"] == pytest.approx(images.rewards.mean().item())
    assert logged["bonus"] == pytest.approx((shaped - images.rewards).mean().item(), rel=1e-4)


def test_distances_weigh_the_advantages(config, build):
    config.shaping.kind, config.train.adv_clip_max, config.sample.num_image_per_prompt = "distance", 100.0, 4
    config.sample.groups_per_epoch = 2
    parts = build(config)
    images = sampled(parts)
    found = collect.advantages_of(parts.policy, images, parts.settings, MeanMetrics())
    groups = images.batch.group_ids
    plain = group_advantages(images.rewards, groups)
    torch.testing.assert_close(found, shaping.distance_weighted(plain, groups, images.features).float())
    assert not torch.allclose(found, plain.float())


@pytest.mark.parametrize("kind", ["distance", *BONUSES])
def test_an_epoch_of_grpo_trains_with_each(config, build, kind):
    config.shaping.kind, config.shaping.weight = kind, 0.0 if kind == "distance" else 0.1
    config.sample.num_image_per_prompt, config.sample.groups_per_epoch = 4, 2
    metrics = build(config).train(policy_gradient)
    assert math.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0


def test_an_image_that_is_not_finite_does_not_end_the_run(config, build):
    config.shaping.kind = "distance"
    parts = build(config)
    extractor = collect.extractor_of(parts.settings.config, parts.policy.device)
    images = torch.full((2, 3, 32, 32), 0.25)
    images[0, 0, 0, 0] = float("nan")
    assert features_of(extractor, images).isfinite().all()


def test_the_encoder_is_loaded_once(config, build):
    config.shaping.kind = "distance"
    parts = build(config)
    first, second = (collect.extractor_of(parts.settings.config, parts.policy.device) for _ in range(2))
    assert first is second


# --- by gradient -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bandwidth"), [("log_vendi", None), ("log_rke", 0.3)])
def test_the_gradient_of_a_groups_diversity_is_that_of_finite_differences(config, kind, bandwidth):
    config.use_reward_gradient, config.shaping.kind, config.shaping.weight = True, kind, 1.0
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    group_diversity(images, groups, config).mean().backward()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))

    def value(step):
        with torch.no_grad():
            x = images.detach() + step * direction
            f = F.normalize((F.adaptive_avg_pool2d(x, 8) - 0.5).flatten(1).double(), dim=1)
            scores = [vendi_score(f[g].numpy()) if bandwidth is None else rke_score(f[g].numpy(), bandwidth)
                      for g in (groups == 0, groups == 1)]  # fmt: skip
            return np.mean(np.log(scores))

    difference = (value(1e-3) - value(-1e-3)) / 2e-3
    assert (images.grad * direction).sum().item() == pytest.approx(difference, rel=2e-3)
    assert (images.grad != 0).all()


def test_a_set_objective_is_the_same_in_any_microbatches_of_whole_groups(config, build):
    config.shaping.kind, config.shaping.weight = "log_vendi", 0.5
    by_method(config, "drtune")
    config.sample.num_image_per_prompt = 4
    gradients = []
    for name, size, weight in (("whole", 16, 0.5), ("parts", 4, 0.5), ("plain", 16, 1e-9)):
        config.train.batch_size, config.run_name, config.shaping.weight = size, name, weight
        parts = build(config)
        parts.policy.optimizer.step = parts.policy.optimizer.zero_grad = lambda: None
        metrics = parts.train()
        gradients.append(torch.cat([p.grad.flatten() for p in parts.policy.trainable]))
    assert relative(gradients[1], gradients[0]) < 1e-4
    assert relative(gradients[2], gradients[0]) > 0.1
    assert 0 < metrics["log_diversity"] < math.log(4)
