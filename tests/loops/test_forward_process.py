"""MATH 9: NFT, AWM, PEPG and PAR on a random tiny SD3."""

from __future__ import annotations

import pytest
import torch

from flow_grpo import policy as policy_module
from flow_grpo.errors import ConfigError
from flow_grpo.forward_process import Point, Velocities, nft_loss, noised, stratified_times
from flow_grpo.loops import forward_process
from flow_grpo.loops.collect import advantages_of, epoch_prompts, sample_images
from flow_grpo.loops.forward_process import old_decay, point_loss
from flow_grpo.metrics import MeanMetrics
from flow_grpo.randomness import keyed_generator
from flow_grpo.rewards.building import WeightedReward
from flow_grpo.settings import resolve
from flow_grpo.training import checkpoint
from tests.training.saving import train

METHODS = pytest.mark.parametrize("method", ["nft", "awm", "pepg", "par"])


def forward(config, method, old="snapshot"):
    """`config` for a method: the ODE's images, two points of each."""
    config.train.method, config.sample.sde_type = method, "ode"
    config.forward.draws, config.forward.old, config.forward.weight = 2, old, "adaptive"
    return config


def perturb(policy, scale=0.02):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def weights(parts):
    return torch.cat([p.detach().flatten() for p in parts.policy.trainable])


def gradient(parts):
    """Of one epoch's only update."""
    parts.policy.optimizer.step = parts.policy.optimizer.zero_grad = lambda: None
    parts.train(forward_process)
    return torch.cat([p.grad.flatten() for p in parts.policy.trainable])


@METHODS
@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_an_epoch_changes_every_lora_parameter_and_no_frozen_one(config, build, method, sampler):
    forward(config, method).sample.sde_type = sampler
    parts = build(config)
    modules = (parts.policy.transformer, parts.policy.vae, parts.policy.pipeline.text_encoder_3)
    frozen = {n: p.detach().clone() for m in modules for n, p in m.named_parameters() if not p.requires_grad}
    before = [p.detach().clone() for p in parts.policy.trainable]
    metrics = [parts.train(forward_process) for _ in range(2)]  # LoRA's A moves from the second update on
    after = {n: p for m in modules for n, p in m.named_parameters() if not p.requires_grad}
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert all(not torch.equal(a, b) for a, b in zip(parts.policy.trainable, before, strict=True))
    assert all(epoch["skipped_updates"] == 0 for epoch in metrics)
    assert parts.policy.network_evaluations == 2 * 8 * (4 + 2 * 2)  # sampler's steps; two draws, both sides


@METHODS
def test_the_microbatch_size_does_not_change_the_update(config, build, method):
    forward(config, method)
    config.train.beta, config.forward.eta = 0.1, 0.1
    found = []
    for size in (8, 3):
        config.train.batch_size, config.run_name = size, f"run-{size}"
        parts = build(config)
        perturb(parts.policy)
        found.append(gradient(parts))
    assert ((found[1] - found[0]).norm() / found[0].norm()).item() < 1e-4


@METHODS
def test_an_epochs_gradient_is_the_mean_over_images_and_draws_of_the_points_losses(config, build, method):
    """Images, times and noises by their keys; all by autograd, on a second policy of the same weights."""
    forward(config, method)
    config.forward.eta, config.train.learning_rate = 0.3, 1e-4
    parts = build(config)
    perturb(parts.policy)
    found = gradient(parts)
    config.run_name = "again"
    parts = build(config)
    perturb(parts.policy)
    plan, policy, seed = parts.settings.plan, parts.policy, config.seed
    batch = epoch_prompts(parts.prompts, plan, seed, 0, 0)
    images = sample_images(policy, batch, parts.reward, parts.settings, parts.run, MeanMetrics())
    advantages = advantages_of(policy, images, parts.settings, MeanMetrics())
    policy.keep_old()
    minibatch = forward_process._minibatch(policy, images, advantages, None, torch.arange(8), parts.settings.config)
    generators = [keyed_generator(seed, "forward noise", 0, i, 0) for i in range(8)]
    times = stratified_times(2, keyed_generator(seed, "forward time", 0, 0, 0))
    for t in times:
        point = noised(images.trajectory.final_latents, policy.noise(generators), t)
        (point_loss(minibatch, point, parts.settings.config)["loss"] / 2).backward()
    expected = torch.cat([p.grad.flatten() for p in policy.trainable])
    assert ((found - expected).norm() / expected.norm()).item() < 1e-4


def velocities(seed=0):
    generator = torch.Generator().manual_seed(seed)
    v, old, target = (torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    return Velocities(v, old, target, 0.4)


@pytest.mark.parametrize(("sign", "rho"), [(1.0, 1.0), (-1.0, 0.0), (0.0, 0.5)])
def test_nfts_optimality_is_1_at_the_largest_advantage_and_0_at_the_smallest(config, sign, rho):
    config.train.method, config.train.adv_clip_max = "nft", 5.0
    advantages = torch.full((3,), sign * 5.0, dtype=torch.float64)
    found = forward_process.LOSSES["nft"](velocities(), advantages, config)["loss"]
    expected = nft_loss(velocities(), torch.full((3,), rho, dtype=torch.float64), config.forward.beta, "1")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_eta_weighs_the_distance_from_the_old_velocity(config):
    config.train.method, at = "nft", velocities()
    minibatch = forward_process.Minibatch(
        lambda x, t: at.velocity, lambda x, t: at.old, None, torch.ones(3, dtype=torch.float64)
    )
    point = Point(latents=at.target, t=at.t, target=at.target)
    losses = []
    for eta in (0.0, 0.7):
        config.forward.eta = eta
        losses.append(point_loss(minibatch, point, config)["loss"])
    expected = 0.7 * (at.velocity - at.old).square().mean()
    torch.testing.assert_close(losses[1] - losses[0], expected, rtol=1e-12, atol=0)


def test_old_weights_are_not_those_of_a_setting_that_is_gone(config, build):
    """An average over epochs is kept by checkpoints; a snapshot, or another method, does not go on from it."""
    forward(config, "nft", old="ema").save_freq = 1
    first = train(config, build)
    config.resume_from, config.num_epochs = str(first.run.folder), 3
    kept = build(config)
    checkpoint.resume(kept.policy, kept.run, kept.settings)
    assert kept.policy.old is not None
    grpo = {"train.method": "grpo", "sample.sde_type": "sde", "forward.draws": 4, "forward.weight": "1"}
    for change in ({"forward.old": "snapshot"}, grpo):
        config.update_from_flattened_dict(change)
        parts = build(config)
        checkpoint.resume(parts.policy, parts.run, parts.settings)
        assert parts.policy.old is None


@METHODS
def test_the_old_velocity_is_that_of_the_epochs_start_and_the_ratio_there_is_one(config, build, method):
    parts = build(forward(config, method))
    perturb(parts.policy)
    parts.policy.keep_old()
    embeds, x = parts.policy.encode(["a bag"]), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    point = noised(x, x.flip(0), 0.4)
    minibatch = forward_process.Minibatch(
        parts.policy.velocity(embeds, 1.0), parts.policy.old_velocity(embeds, 1.0), None, torch.tensor([0.5])
    )
    terms = point_loss(minibatch, point, parts.settings.config)
    assert terms["old_kl"].item() == 0.0
    assert terms.get("ratio_mean", torch.tensor(1.0)).item() == 1.0
    before = minibatch.old(x, 0.4)
    perturb(parts.policy)
    assert torch.equal(minibatch.old(x, 0.4), before)
    terms = point_loss(minibatch, point, parts.settings.config)
    assert terms["old_kl"].item() > 0.0
    assert terms.get("ratio_mean", torch.tensor(2.0)).item() != 1.0


@METHODS
def test_an_image_of_a_better_reward_is_drawn_nearer(config, build, method):
    """A small step down the loss lowers the error of the images with an advantage, and raises that of the others."""
    parts = build(forward(config, method))
    perturb(parts.policy)
    parts.policy.keep_old()
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    point, embeds = noised(x_0, noise, 0.6), parts.policy.encode(["a bag", "a boot"])
    velocity, old = parts.policy.velocity(embeds, 1.0), parts.policy.old_velocity(embeds, 1.0)
    scale = 1e-3 if method in ("pepg", "par") else 1.0
    minibatch = forward_process.Minibatch(velocity, old, None, scale * torch.tensor([1.0, -1.0]))
    point_loss(minibatch, point, parts.settings.config)["loss"].backward()
    norm = torch.cat([p.grad.flatten() for p in parts.policy.trainable]).norm()
    with torch.no_grad():
        for parameter in parts.policy.trainable:
            parameter -= 1e-3 * parameter.grad / norm
    error = [(v(point.latents, point.t) - point.target).square().flatten(1).mean(1) for v in (velocity, old)]
    assert (error[0] - error[1])[0] < 0 < (error[0] - error[1])[1]


def test_each_pass_draws_points_of_its_own(config, build, monkeypatch):
    forward(config, "nft").train.num_inner_epochs = 2
    seen = []

    def spy(minibatch, point, settings):
        seen.append(point)
        return point_loss(minibatch, point, settings)

    monkeypatch.setattr(forward_process, "point_loss", spy)
    build(config).train(forward_process)
    assert len(seen) == 4
    assert len({point.t for point in seen}) == 4
    assert [int(point.t * 2) for point in seen] == [0, 1, 0, 1]
    noises = [point.latents + (1 - point.t) * point.target for point in seen]
    assert all(not torch.allclose(a, b, atol=0.1) for i, a in enumerate(noises) for b in noises[:i])


@METHODS
def test_a_non_finite_reward_skips_the_update(config, build, method):
    parts = build(forward(config, method))
    model, spoil = parts.reward.models["pickscore"], torch.tensor([torch.nan] + [0.0] * 7)
    parts.reward = WeightedReward({"pickscore": lambda *arguments: model(*arguments) + spoil}, {"pickscore": 1.0})
    before = weights(parts)
    assert parts.train(forward_process)["skipped_updates"] == 1.0
    assert torch.equal(weights(parts), before)


# --- old weights -----------------------------------------------------------------------------------------


def test_an_average_that_follows_at_once_is_a_snapshot_bit_for_bit(config, build):
    found = {}
    for old, decay in (("snapshot", 0.5), ("ema", 0.0), ("ema", 0.9)):
        forward(config, "nft", old)
        config.run_name, config.forward.old_decay = f"{old}-{decay}", decay
        parts = build(config)
        for _ in range(3):
            parts.train(forward_process)
        found[old, decay] = weights(parts)
    assert torch.equal(found["snapshot", 0.5], found["ema", 0.0])
    assert not torch.equal(found["snapshot", 0.5], found["ema", 0.9])


def test_the_average_moves_after_every_epoch_by_its_decay_and_a_snapshot_is_dropped(config, build):
    forward(config, "nft", "ema").forward.old_decay = 0.75
    parts = build(config)
    start = weights(parts)
    parts.train(forward_process)
    old = torch.cat([value.flatten() for value in parts.policy.old])
    torch.testing.assert_close(old, 0.75 * start + 0.25 * weights(parts), rtol=1e-6, atol=1e-9)
    config.forward.old, config.forward.old_decay, config.run_name = "snapshot", 0.5, "snapshot"
    parts = build(config)
    parts.train(forward_process)
    assert parts.policy.old is None


def test_the_averaged_old_weights_sample_the_images(config, build):
    """Two epochs' second: trained weights moved away, with an average that stands still the images are the base's."""
    forward(config, "nft", "ema").forward.old_decay = 0.999999
    parts = build(config)
    parts.policy.keep_old()
    batch = epoch_prompts(parts.prompts, parts.settings.plan, parts.settings.config.seed, 0, 0)
    seen = []

    def spy(*arguments, **keywords):
        images = sample_images(*arguments, **keywords)
        seen.append(images.trajectory.final_latents)
        return images

    base = sample_images(parts.policy, batch, parts.reward, parts.settings, parts.run, MeanMetrics())
    perturb(parts.policy)
    moved = sample_images(parts.policy, batch, parts.reward, parts.settings, parts.run, MeanMetrics())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_process, "sample_images", spy)
        parts.train(forward_process)
    assert torch.equal(seen[0], base.trajectory.final_latents)
    assert not torch.equal(seen[0], moved.trajectory.final_latents)


def test_the_decay_rises_to_its_end_or_is_constant(config):
    forward(config, "nft", "ema")
    assert [old_decay(config.forward, epoch) for epoch in (0, 100)] == [0.5, 0.5]
    config.forward.old_decay_ramp = 0.125
    assert [old_decay(config.forward, epoch) for epoch in (0, 1, 3, 4, 100)] == [0.0, 0.125, 0.375, 0.5, 0.5]


def test_with_a_rollout_in_bf16_only_the_sampler_computes_in_it(config, build, monkeypatch):
    forward(config, "nft").forward.rollout = "bf16"
    parts = build(config)
    guided, used = policy_module.guided_velocity, []

    def spy(network, latents, *rest):
        used.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        assert latents.dtype == torch.float32
        return guided(network, latents, *rest)

    monkeypatch.setattr(policy_module, "guided_velocity", spy)
    parts.train(forward_process)
    steps = config.sample.num_steps
    assert used[:steps] == [(False, True)] * steps
    assert not any(autocast for _, autocast in used[steps:])
    assert (True, False) in used


# --- settings --------------------------------------------------------------------------------------------

GRPO_IN_BF16 = {
    "forward.draws": 4, "forward.weight": "1", "forward.rollout": "bf16", "sample.sde_type": "sde",
}  # fmt: skip
CONTRADICTIONS = [
    ("nft", {"train.ratio": "cfm"}, ["train.ratio = 'cfm'", "'grpo'", "'sde'"]),
    ("awm", {"train.timestep_fraction": 0.5}, ["train.timestep_fraction = 0.5", "takes 1.0"]),
    ("par", {"sample.num_image_per_prompt": 1}, ["num_image_per_prompt = 1", "at least 2"]),
    ("grpo", GRPO_IN_BF16, ["forward.rollout = 'bf16'"]),
    ("nft", {"sample.sde_window_size": 2}, ["sde_window_size = 2", 'sde_type = "ode"', "takes 0"]),
    ("nft", {"forward.old_decay": 0.9}, ["forward.old_decay = 0.9", 'forward.old = "snapshot"', "takes 0.5"]),
    ("awm", {"forward.beta": 0.5}, ["forward.beta = 0.5", "'nft'", "takes 1.0"]),
    ("pepg", {"forward.beta": 0.5}, ["forward.beta = 0.5", "'nft'", "takes 1.0"]),
    ("nft", {"forward.strength": 2.0}, ["forward.strength = 2.0", "'pepg' or 'par'", "takes 1.0"]),
    ("grpo", {"sample.sde_type": "sde"}, ["forward.draws = 2", "'nft' or 'awm' or 'pepg' or 'par'", "takes 4"]),
]


@pytest.mark.parametrize(("method", "changes", "parts"), CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_one_sentence(config, method, changes, parts):
    forward(config, method).update_from_flattened_dict(changes)
    with pytest.raises(ConfigError) as error:
        resolve(config, num_processes=1, cuda=False)
    assert [part for part in parts if part not in str(error.value)] == []
