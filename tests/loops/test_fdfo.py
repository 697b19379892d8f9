"""MATH 8, FDFO: pairs of images from one noise, on a random tiny SD3."""

from __future__ import annotations

import pytest
import torch

from flow_grpo.errors import ConfigError, TrainingStopped
from flow_grpo.loops import fdfo
from flow_grpo.loops.collect import epoch_prompts, sample_images, sampling_minibatches
from flow_grpo.metrics import MeanMetrics
from flow_grpo.rewards.building import WeightedReward
from flow_grpo.settings import resolve
from flow_grpo.shaping import entropy_bonus


def cps(config):
    config.train.method, config.sample.sde_type, config.sample.noise_level = "fdfo", "cps", 0.3
    return config


def perturb(policy, scale=0.02):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def images_of(parts):
    batch = epoch_prompts(parts.prompts, parts.settings.plan, parts.settings.config.seed, 0, 0)
    chunks = sampling_minibatches(parts.settings, len(batch), recorded=True)
    arguments = parts.policy, batch, parts.reward, parts.settings, parts.run, MeanMetrics(), chunks
    return sample_images(*arguments, starts=batch.sample_ids // 2, keep_means=True)


def pairs_of(parts, floor=1e-4):
    return fdfo.paired(parts.policy, images_of(parts), floor, MeanMetrics())


def gradient(parts):
    parts.policy.optimizer.step = parts.policy.optimizer.zero_grad = lambda: None
    metrics = parts.train(fdfo)
    return torch.cat([p.grad.flatten() for p in parts.policy.trainable]), metrics


def test_the_members_of_a_pair_begin_alike_part_and_know_their_half_differences(config, build):
    parts = build(cps(config))
    pairs = pairs_of(parts)
    ends, rewards = pairs.images.trajectory.final_latents, pairs.images.rewards
    assert torch.equal(*(pairs.images.trajectory.latents[side::2, 0] for side in (0, 1)))
    torch.testing.assert_close(pairs.delta[0::2], (ends[0::2] - ends[1::2]) / 2)
    torch.testing.assert_close(pairs.delta[0::2], -pairs.delta[1::2])
    torch.testing.assert_close(pairs.gain[1::2], (rewards[1::2] - rewards[0::2]) / 2)
    assert not pairs.close.any()


def test_the_bonus_of_both_members_counts(config, build):
    config.shaping.kind, config.shaping.weight, config.sample.num_image_per_prompt = "entropy", 0.5, 4
    config.sample.groups_per_epoch = 2
    pairs = pairs_of(build(cps(config)))
    images = pairs.images
    shaped = entropy_bonus(images.rewards, images.batch.group_ids, images.features, 0.5, config.shaping.bandwidth)
    torch.testing.assert_close(pairs.gain[0::2], ((shaped[0::2] - shaped[1::2]) / 2).float())
    torch.testing.assert_close(pairs.gain[0::2], -pairs.gain[1::2])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_rollouts_velocity_is_found_again_and_the_ratio_is_one_at_every_step(config, build, guidance):
    cps(config).sample.guidance_scale = guidance
    parts = build(config)
    perturb(parts.policy)
    pairs = pairs_of(parts)
    trajectory = pairs.images.trajectory
    velocity = parts.policy.velocity(parts.policy.encode(pairs.images.batch.prompts), guidance)
    for step in range(4):
        with torch.no_grad():
            v = velocity(trajectory.latents[:, step], trajectory.sigmas[step].item())
        dt = (trajectory.sigmas[step] - trajectory.sigmas[step + 1]).item()
        torch.testing.assert_close(fdfo.rollout_velocity(trajectory, step, 0.3), v, rtol=0, atol=1e-6 / dt)
        terms = fdfo.step_loss(parts.policy, pairs, torch.arange(8), step, parts.settings)
        assert terms["ratio_error"] < 1e-4
    with torch.no_grad():
        v = velocity(trajectory.latents[:, 0], trajectory.sigmas[0].item())
    assert abs(fdfo.rollout_velocity(trajectory, 0, 0.2) - v).max() > 1e-2  # the broken twin: another noise level
    perturb(parts.policy)
    assert fdfo.step_loss(parts.policy, pairs, torch.arange(8), 1, parts.settings)["ratio_error"] > 1e-4


def test_the_gradient_is_that_of_the_finite_difference_summed_over_steps(config, build):
    """At ratio 1: the mean over images and steps of 2 dR <Delta, v> / |Delta|^2, by autograd from the velocities."""
    parts = build(cps(config))
    perturb(parts.policy)
    pairs = pairs_of(parts)
    found, metrics = gradient(parts)
    found = found * max(1.0, metrics["grad_norm"])
    for parameter in parts.policy.trainable:
        parameter.grad = None
    trajectory = pairs.images.trajectory
    velocity = parts.policy.velocity(parts.policy.encode(pairs.images.batch.prompts), 1.0)
    estimate = pairs.gain[:, None, None, None] * pairs.delta
    estimate = estimate / pairs.delta.square().flatten(1).mean(1)[:, None, None, None]
    total = sum(
        2 * (estimate * velocity(trajectory.latents[:, i], trajectory.sigmas[i].item())).flatten(1).mean(1).mean() / 4
        for i in range(4)
    )
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in parts.policy.trainable])
    assert ((found - expected).norm() / expected.norm()).item() < 2e-3
    assert ((found + expected).norm() / expected.norm()).item() > 1  # the broken twin


def test_an_epoch_changes_every_lora_parameter_and_no_frozen_one(config, build):
    parts = build(cps(config))
    modules = (parts.policy.transformer, parts.policy.vae, parts.policy.pipeline.text_encoder_3)
    frozen = {n: p.detach().clone() for m in modules for n, p in m.named_parameters() if not p.requires_grad}
    before = [p.detach().clone() for p in parts.policy.trainable]
    metrics = [parts.train(fdfo) for _ in range(2)]  # LoRA's A moves from the second update on
    after = {n: p for m in modules for n, p in m.named_parameters() if not p.requires_grad}
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert all(not torch.equal(a, b) for a, b in zip(parts.policy.trainable, before, strict=True))
    assert all((epoch["skipped_updates"], epoch["close_fraction"]) == (0, 0) for epoch in metrics)
    assert parts.policy.network_evaluations == 2 * 8 * (4 + 4)


def test_the_microbatch_size_does_not_change_the_update(config, build):
    cps(config).train.beta = 0.1
    found = []
    for size in (8, 3):
        config.train.batch_size, config.run_name = size, f"run-{size}"
        parts = build(config)
        perturb(parts.policy)
        found.append(gradient(parts)[0])
    assert ((found[1] - found[0]).norm() / found[0].norm()).item() < 1e-4


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_equal_rewards_train_nothing_and_a_non_finite_one_skips_the_update(config, build, value):
    parts = build(cps(config))
    scores = {"pickscore": lambda images, *_: torch.tensor([0.3 + value] + [0.3] * (len(images) - 1))}
    parts.reward = WeightedReward(scores, {"pickscore": 1.0})
    metrics = parts.train(fdfo)
    assert metrics["skipped_updates"] == float(value != 0)
    assert metrics["trained_fraction"] == (0.25 if value != 0 else 0.0)
    assert ("ratio_mean" in metrics) == (value != 0)


def test_pairs_that_are_too_close_are_skipped_and_counted(config, build):
    parts = build(cps(config))
    distances = pairs_of(parts).delta.square().flatten(1).mean(1)
    config.fdfo.floor, config.run_name = distances.median().item(), "floor"
    parts = build(config)
    pairs = pairs_of(parts, config.fdfo.floor)
    assert 0 < pairs.close.sum() < 8
    assert (pairs.gain[pairs.close] == 0).all()
    parts.policy.network_evaluations = 0
    _, metrics = gradient(parts)
    assert metrics["close_fraction"] == pairs.close.float().mean().item() == 1 - metrics["trained_fraction"]
    assert parts.policy.network_evaluations == 8 * 4 + 4 * int((~pairs.close).sum())


def test_with_a_kl_pairs_that_are_too_close_are_held_to_the_base(config, build):
    cps(config).fdfo.floor, config.train.beta = 1e9, 0.1
    parts = build(config)
    perturb(parts.policy)
    found, metrics = gradient(parts)
    assert found.norm() > 0
    assert (metrics["close_fraction"], metrics["trained_fraction"], metrics["ratio_error"]) == (1.0, 1.0, 0.0)
    assert metrics["kl"] > 0


def test_in_bf16_the_velocity_of_the_rollout_is_the_one_of_training(config, build):
    cps(config).mixed_precision, config.train.batch_size, config.train.updates_per_epoch = "bf16", 3, 2
    parts = build(config)
    perturb(parts.policy, 0.1)
    assert gradient(parts)[1]["ratio_error"] < 1e-3


def test_a_ratio_off_by_rounding_names_the_epsilon_and_the_floor_that_would_bear_it(config, build):
    cps(config).fdfo.epsilon, config.fdfo.floor = 1e-9, 0.0
    parts = build(config)
    perturb(parts.policy)
    with pytest.raises(TrainingStopped) as error:
        parts.train(fdfo)
    for part in ("max_ratio_error = 1.0", "rounding", "fdfo.epsilon than 1e-09", "fdfo.floor than 0.0"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"sample.num_image_per_prompt": 3}, ["num_image_per_prompt = 3", "even"]),
        ({"sample.sde_type": "sde"}, ['sde_type = "sde"', '"cps"']),
        ({"sample.noise_level": 0.0}, ["noise_level = 0.0", "above 0"]),
        ({"sample.sde_window_size": 2}, ["sde_window_size = 2", "takes 0"]),
        (
            {"train.advantage_mode": "negative"},
            ["advantage_mode = 'negative'", "'grpo' or 'nft'", "'fdfo' it takes 'all'"],
        ),
        ({"shaping.kind": "distance"}, ['shaping.kind = "distance"', "'fdfo'", '"vendi"']),
        ({"train.method": "grpo", "fdfo.floor": 0.5}, ["fdfo.floor = 0.5", "'fdfo'"]),
    ],
)
def test_settings_that_contradict_each_other_are_one_sentence(config, changes, parts):
    cps(config).update_from_flattened_dict(changes)
    with pytest.raises(ConfigError) as error:
        resolve(config, num_processes=1, cuda=False)
    assert [part for part in parts if part not in str(error.value)] == []
