"""Diversity inside the objective, wired: features follow their images, bonuses their groups."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flow_grpo import shaping
from flow_grpo.advantages import group_advantages
from flow_grpo.diversity.rke import rke_score
from flow_grpo.diversity.vendi import vendi_score
from flow_grpo.entropy import DivergenceEstimator, NonFiniteError, draw_probes
from flow_grpo.loops import collect, policy_gradient
from flow_grpo.loops.shaped import features_of, group_diversity
from flow_grpo.metrics import MeanMetrics
from flow_grpo.randomness import keyed_generator
from flow_grpo.rewards.building import WeightedReward
from tests.conftest import by_method
from tests.loops.tiny_net import relative


@pytest.fixture
def config(config):
    """2 groups of 4 images: of two, either is as far from the other, and no bonus changes anything."""
    config.sample.groups_per_epoch, config.sample.num_image_per_prompt = 2, 4
    return config


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


@pytest.mark.parametrize("kind", ["distance", *BONUSES, "density"])
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


# --- by density ------------------------------------------------------------------------------------------


def density_by_hand(parts, images, i, guidance):
    """log p(x_0) / D of one image from velocities and products with its Jacobian alone."""
    policy = parts.policy
    velocity = policy.velocity(policy.encode([images.batch.prompts[i]]), guidance)
    x, total = images.trajectory.final_latents[i : i + 1], 0.0
    sigmas = images.trajectory.sigmas.tolist()[::-1]
    for evaluation, (sigma, after) in enumerate(pairwise(sigmas)):
        generator = keyed_generator(parts.settings.config.seed, "density probe", 0, i, evaluation)
        probe = draw_probes(x, DivergenceEstimator(), [generator])[0]
        x = x.detach().requires_grad_()
        v = velocity(x, sigma)
        (product,) = torch.autograd.grad(v, x, probe)
        total += (after - sigma) * (product * probe).double().sum().item()
        x = x + (after - sigma) * v
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(x.detach().double()).sum().item()
    return (prior + total) / x[0].numel()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_density_is_that_of_the_guided_ode_found_by_hand_and_a_dense_image_is_worth_less(config, build, guidance):
    config.shaping.kind, config.shaping.weight, config.sample.guidance_scale = "density", 0.5, guidance
    config.train.batch_size = 2
    parts, metrics = build(config), MeanMetrics()
    images = sampled(parts)
    expected = torch.tensor([density_by_hand(parts, images, i, guidance) for i in range(8)], dtype=torch.float64)
    torch.testing.assert_close(images.density, expected, rtol=1e-4, atol=1e-5)
    shaped, _ = collect.gathered_rewards(parts.policy, images, metrics)
    torch.testing.assert_close(shaped, images.rewards.double() - 0.5 * expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(shaped, images.rewards.double() + 0.5 * expected, atol=1e-2)  # the broken twin
    assert metrics.result(parts.accelerator)["density"] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_an_image_whose_density_is_not_finite_skips_the_update(config, build, monkeypatch):
    config.shaping.kind, config.shaping.weight = "density", 0.5

    def broken(*_, **__):
        raise NonFiniteError("the velocity is not finite")

    monkeypatch.setattr("flow_grpo.loops.shaped.ode_log_density", broken)
    assert build(config).train(policy_gradient)["skipped_updates"] == 1.0


@pytest.mark.parametrize("method", ["nft", "fdfo"])
def test_other_black_box_methods_train_with_densities(config, build, method):
    by_method(config, method)
    config.shaping.kind, config.shaping.weight = "density", 0.5
    metrics = build(config).train()
    assert math.isfinite(metrics["density"])
    assert metrics["grad_norm"] > 0


# --- the gate on the KL ----------------------------------------------------------------------------------


class ByTurn:
    """A reward that gives each prompt's images these scores, in turn."""

    def __init__(self, *values):
        self.values, self.seen = values, 0

    def __call__(self, images, prompts, metadata):
        self.seen += len(images)
        return torch.tensor([self.values[i % len(self.values)] for i in range(self.seen - len(images), self.seen)])


def two_tastes():
    """The training reward says 0 > 1 > 2 of each prompt's three images, the other one 1 > 2 > 0."""
    tastes = {"pickscore": ByTurn(3.0, 2.0, 1.0), "jpeg_compressibility": ByTurn(1.0, 3.0, 2.0)}
    return WeightedReward(tastes, {"pickscore": 1.0})


def gated(config, method, share):
    by_method(config, method)
    config.sample.num_image_per_prompt, config.train.beta = 3, 0.5
    config.shaping.gate_share, config.shaping.gate_rewards = share, ("jpeg_compressibility",)
    return config


def test_the_image_that_the_training_reward_alone_likes_is_penalised_and_no_other(config, build):
    """By hand, of three: wins (1, 1/2, 0) and (0, 1, 1/2), so U = (1, -1/2, -1/2)."""
    parts = build(gated(config, "grpo", 0.5))
    parts.reward = two_tastes()
    batch = collect.epoch_prompts(parts.prompts, parts.settings.plan, 0, 0, 0)
    experience = policy_gradient.collect(
        parts.policy, batch, parts.reward, parts.settings, parts.run, metrics := MeanMetrics()
    )
    assert experience.penalised.tolist() == [True, False, False] * 2
    assert metrics.result(parts.accelerator)["penalised_fraction"] == pytest.approx(1 / 3)  # U > 0, below the share


@pytest.mark.parametrize("space", ["gaussian", "velocity"])
def test_only_its_kl_counts_in_the_loss_and_in_the_gradient(config, build, space):
    config = gated(config, "grpo", 0.5)
    config.train.kl_space = space
    parts = build(config)
    parts.reward = two_tastes()
    batch = collect.epoch_prompts(parts.prompts, parts.settings.plan, 0, 0, 0)
    experience = policy_gradient.collect(parts.policy, batch, parts.reward, parts.settings, parts.run, MeanMetrics())
    experience.advantages.zero_()
    generator = torch.Generator().manual_seed(5)
    for parameter in parts.policy.trainable:
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)

    def kl_of(chunk, penalised):
        parts.policy.optimizer.zero_grad()
        some = replace(experience, penalised=penalised)
        minibatch = policy_gradient._minibatch(parts.policy, some, torch.tensor(chunk), parts.settings.config)
        terms = policy_gradient.step_loss(minibatch, 1, parts.settings.config)
        terms["loss"].backward()
        return terms["kl"], torch.cat([p.grad.flatten() for p in parts.policy.trainable])

    found, gradient = kl_of([0, 1, 2], experience.penalised)
    alone, expected = kl_of([0], None)
    others, opposite = kl_of([0, 1, 2], ~experience.penalised)
    torch.testing.assert_close(found, alone / 3, rtol=1e-4, atol=0)
    assert relative(gradient, expected / 3) < 1e-4
    assert relative(opposite, gradient) > 0.1  # the opposite sign
    assert others > 0


@pytest.mark.parametrize("method", ["grpo", "nft", "fdfo"])
def test_every_black_box_method_trains_with_a_gate_and_its_kl_is_smaller_than_without(config, build, method):
    config = gated(config, method, 0.25)
    config.sample.num_image_per_prompt, config.train.updates_per_epoch = 4, 2
    config.train.learning_rate = 1e-2
    held = build(config).train()
    assert 0 < held["penalised_fraction"] <= 0.25
    config.run_name, config.shaping.gate_share, config.shaping.gate_rewards = "all", 0.0, ()
    free = build(config).train()
    assert 0 < held["kl"] < free["kl"]


def test_an_image_that_is_neither_rewarded_nor_penalised_pays_for_no_forward(config, build):
    config = gated(config, "grpo", 0.5)
    config.train.advantage_mode = "negative"
    parts = build(config)
    parts.reward = two_tastes()
    assert parts.train()["trained_fraction"] == pytest.approx(2 / 3)  # the worst, and the one that is penalised


def test_an_update_raises_the_diversity_that_it_is_asked_for(config, build):
    """A step down the part of the gradient that the bonus makes, on the same noises; up it, diversity falls."""
    config.shaping.kind = "log_vendi"
    by_method(config, "drtune")
    config.sample.num_image_per_prompt, config.drtune.num_train_steps = 4, 4
    config.train.batch_size = 16
    gradients = []
    for name, weight in (("with", 1.0), ("without", 1e-9)):
        config.shaping.weight, config.run_name = weight, name
        parts = build(config)
        parts.policy.optimizer.step = parts.policy.optimizer.zero_grad = lambda: None
        before = parts.train()["log_diversity"]
        gradients.append([p.grad.clone() for p in parts.policy.trainable])
    bonus = [a - b for a, b in zip(*gradients, strict=True)]
    size = torch.cat([part.flatten() for part in bonus]).norm()
    found = []
    for step in (-1.0, 1.0):
        config.run_name = f"step {step}"
        parts = build(config)
        parts.policy.optimizer.step = parts.policy.optimizer.zero_grad = lambda: None
        with torch.no_grad():
            for p, part in zip(parts.policy.trainable, bonus, strict=True):
                p += step * part / size
        found.append(parts.train()["log_diversity"])
    assert found[0] > before > found[1]
