"""MATH 2: the GRPO loop on a random tiny SD3."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal

from flow_grpo.advantages import group_advantages
from flow_grpo.diffusers_patch.step import step_coefficients
from flow_grpo.errors import TrainingStopped
from flow_grpo.loops import policy_gradient as grpo
from flow_grpo.loops.collect import Chunk, epoch_prompts
from flow_grpo.metrics import MeanMetrics
from flow_grpo.rewards.building import WeightedReward


def collect(parts):
    batch = epoch_prompts(parts.prompts, parts.settings.plan, parts.settings.config.seed, 0, 0)
    experience = grpo.collect(parts.policy, batch, parts.reward, parts.settings, parts.run, MeanMetrics())
    return batch, experience


def perturb(policy, scale=0.02):
    """Move the weights away from those that sampled."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def minibatch(parts, experience, index=slice(None)):
    chunk = torch.arange(len(experience.prompts))[index]
    return grpo._minibatch(parts.policy, experience, chunk, parts.settings.config)


def accumulated(policy):
    return torch.cat([p.grad.flatten() for p in policy.trainable])


@pytest.mark.parametrize("kind", ["sde", "dance", "cps"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_before_the_first_update_every_ratio_is_exactly_one(config, build, kind, guidance):
    config.sample.sde_type, config.sample.guidance_scale = kind, guidance
    parts = build(config)
    perturb(parts.policy)
    _, experience = collect(parts)
    for slot in range(len(experience.trajectory.stochastic_steps)):
        terms = grpo.step_loss(minibatch(parts, experience), slot, parts.settings.config)
        assert terms["ratio_error"].item() == 0.0


def test_in_another_batch_shape_the_ratio_is_one_within_1e_5(config, build):
    parts = build(config)
    perturb(parts.policy)
    _, experience = collect(parts)
    for slot in range(4):
        terms = grpo.step_loss(minibatch(parts, experience, slice(0, 3)), slot, parts.settings.config)
        assert terms["ratio_error"].item() < 1e-5


def test_after_a_change_of_weights_the_ratio_is_not_one(config, build):
    parts = build(config)
    _, experience = collect(parts)
    perturb(parts.policy)
    assert grpo.step_loss(minibatch(parts, experience), 0, parts.settings.config)["ratio_error"] > 1e-4


def test_the_step_loss_equals_an_independent_float64_computation(config, build):
    """Ratio, clip, advantage and KL of one step from the velocities alone."""
    config.train.beta = 0.3
    parts = build(config)
    _, experience = collect(parts)
    perturb(parts.policy)
    terms = grpo.step_loss(minibatch(parts, experience), 1, parts.settings.config)
    trajectory, embeds = experience.trajectory, parts.policy.encode(experience.prompts)
    sigma, after = trajectory.sigmas[1].item(), trajectory.sigmas[2].item()
    x, outcome = trajectory.latents[:, 1].double(), trajectory.latents[:, 2].double()
    step = step_coefficients("sde", sigma, after, 0.7)
    with torch.no_grad():
        v = parts.policy.velocity(embeds, 1.0)(trajectory.latents[:, 1], sigma).double()
        v_ref = parts.policy.reference_velocity(embeds, 1.0)(trajectory.latents[:, 1], sigma).double()
    mean, mean_ref = step.a * x + step.b * v, step.a * x + step.b * v_ref
    log_prob = Normal(mean, step.s).log_prob(outcome).flatten(1).mean(1)
    ratio = (log_prob - trajectory.log_probs[:, 1].double()).exp()
    a = experience.advantages.double()
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(0.999, 1.001)).mean()
    kl = (mean - mean_ref).square().mean() / (2 * step.s**2)
    torch.testing.assert_close(terms["kl"].double(), kl, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(terms["loss"].detach().double(), loss + 0.3 * kl, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("space", ["gaussian", "velocity"])
def test_the_kl_has_a_gradient(config, build, space):
    """Without advantages the loss is the KL alone, and pulls the weights back to the reference."""
    config.train.beta, config.train.kl_space = 1.0, space
    parts = build(config)
    _, experience = collect(parts)
    batch = minibatch(parts, experience)
    batch.advantages.zero_()
    assert grpo.step_loss(batch, 1, parts.settings.config)["kl"].item() == 0.0
    perturb(parts.policy)
    terms = grpo.step_loss(batch, 1, parts.settings.config)
    terms["loss"].backward()
    gradient = accumulated(parts.policy)
    assert terms["kl"] > 0
    assert gradient.norm() > 0
    with torch.no_grad():
        for parameter in parts.policy.trainable:
            parameter -= 1e-3 * parameter.grad / gradient.norm()
    assert grpo.step_loss(batch, 1, parts.settings.config)["kl"] < terms["kl"]


def test_the_reference_is_the_pretrained_model(config, build):
    parts = build(config)
    embeds = parts.policy.encode(["a bag"])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = parts.policy.velocity(embeds, 1.0)(x, 0.5).detach()
    perturb(parts.policy)
    assert not torch.allclose(parts.policy.velocity(embeds, 1.0)(x, 0.5), before, atol=1e-4)
    assert torch.equal(parts.policy.reference_velocity(embeds, 1.0)(x, 0.5), before)
    assert all(p.requires_grad for p in parts.policy.trainable)


def test_the_first_gradient_is_the_policy_gradient(config, build):
    """At ratio 1 the loss's gradient is -A d log p / d theta, averaged over images and steps."""
    config.train.learning_rate = 1e-12
    parts = build(config)
    perturb(parts.policy)
    _, experience = collect(parts)
    parts.policy.optimizer.step = lambda: None
    parts.policy.optimizer.zero_grad = lambda: None
    parts.train(grpo)
    trained = accumulated(parts.policy)
    for parameter in parts.policy.trainable:
        parameter.grad = None
    total = 0.0
    trajectory = experience.trajectory
    velocity = parts.policy.velocity(parts.policy.encode(experience.prompts), 1.0)
    for i in range(4):
        sigma, after = trajectory.sigmas[i].item(), trajectory.sigmas[i + 1].item()
        step = step_coefficients("sde", sigma, after, 0.7)
        mean = step.a * trajectory.latents[:, i] + step.b * velocity(trajectory.latents[:, i], sigma)
        log_prob = Normal(mean, step.s).log_prob(trajectory.latents[:, i + 1]).flatten(1).mean(1)
        total = total - (experience.advantages * log_prob).mean() / 4
    total.backward()
    expected = accumulated(parts.policy)
    clip = min(1.0, 1.0 / expected.norm().item())
    torch.testing.assert_close(trained, clip * expected, rtol=1e-3, atol=1e-6)


def test_advantages_are_those_of_the_rewards_within_prompts(config, build):
    parts = build(config)
    batch, experience = collect(parts)
    expected = group_advantages(experience.rewards, batch.group_ids).float()
    torch.testing.assert_close(experience.advantages, expected)
    for group in range(4):
        assert (
            len({prompt for prompt, g in zip(batch.prompts, batch.group_ids.tolist(), strict=True) if g == group}) == 1
        )


def test_an_epoch_changes_every_lora_parameter_and_no_frozen_one(config, build):
    parts = build(config)
    modules = (parts.policy.transformer, parts.policy.vae, parts.policy.pipeline.text_encoder_3)
    frozen = {n: p.detach().clone() for m in modules for n, p in m.named_parameters() if not p.requires_grad}
    before = [p.detach().clone() for p in parts.policy.trainable]
    for _ in range(3):
        parts.train(grpo)
    after = {n: p for m in modules for n, p in m.named_parameters() if not p.requires_grad}
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert all(not torch.equal(a, b) for a, b in zip(parts.policy.trainable, before, strict=True))


def test_full_fine_tuning_trains_the_transformer_with_a_frozen_reference(config, build):
    config.use_lora, config.train.beta = False, 0.1
    parts = build(config)
    before = [p.detach().clone() for p in parts.policy.trainable]
    reference = [p.detach().clone() for p in parts.policy._reference.parameters()]
    parts.train(grpo)
    metrics = parts.train(grpo)
    assert metrics["kl"] > 0
    assert sum(not torch.equal(a, b) for a, b in zip(parts.policy.trainable, before, strict=True)) > 0.9 * len(before)
    assert all(torch.equal(a, b) for a, b in zip(parts.policy._reference.parameters(), reference, strict=True))


def test_only_the_steps_of_the_window_are_trained(config, build):
    config.sample.sde_window_size, config.sample.sde_window_range = 1, (1, 3)
    parts = build(config)
    _, experience = collect(parts)
    assert experience.trajectory.log_probs.shape == (8, 1)
    assert parts.train(grpo)["ratio_error"] == 0.0


def test_timestep_fraction_trains_that_share_of_the_steps(config, build):
    config.train.timestep_fraction = 0.5
    parts = build(config)
    _, experience = collect(parts)
    drawn = [tuple(grpo._trained_slots(experience, parts.settings, 0, update)) for update in range(20)]
    assert {len(slots) for slots in drawn} == {2}
    assert len(set(drawn)) > 2


def test_ratio_normalisation_trains_with_the_same_direction_scaled(config, build):
    """At ratio 1 the normalised step's gradient is s / (-dt) times the plain one."""
    grads = {}
    for normalise in (False, True):
        config.train.ratio_normalization, config.run_name = normalise, f"run-{normalise}"
        parts = build(config)
        perturb(parts.policy)
        _, experience = collect(parts)
        grpo.step_loss(minibatch(parts, experience), 1, parts.settings.config)["loss"].backward()
        grads[normalise] = accumulated(parts.policy)
    sigma, after = experience.trajectory.sigmas[1].item(), experience.trajectory.sigmas[2].item()
    s = step_coefficients("sde", sigma, after, 0.7).s
    torch.testing.assert_close(grads[True], s / (sigma - after) * grads[False], rtol=1e-3, atol=1e-7)


def test_a_ratio_that_is_not_one_stops_the_run(config, build):
    """Sampling at another guidance than training is what it is there to catch."""
    parts = build(config)
    original = parts.policy.velocity
    calls = iter(range(1000))
    parts.policy.velocity = lambda embeds, guidance: original(embeds, 3.0 if next(calls) == 0 else guidance)
    with pytest.raises(TrainingStopped, match=r"not within 0\.001"):
        parts.train(grpo)


def test_the_microbatch_size_does_not_change_the_update(config, build):
    grads = []
    for size in (8, 3):
        config.train.batch_size, config.run_name = size, f"run-{size}"
        parts = build(config)
        parts.policy.optimizer.step = lambda: None
        parts.policy.optimizer.zero_grad = lambda: None
        parts.train(grpo)
        grads.append(accumulated(parts.policy))
    assert ((grads[1] - grads[0]).norm() / grads[0].norm()).item() < 1e-4


def bf16_ratio_error(config, build):
    """12 images, sampled 5 at a time, trained as 5 + 1 and 5 + 1: the largest |ratio - 1|."""
    config.mixed_precision, config.train.updates_per_epoch = "bf16", 2
    config.sample.groups_per_epoch, config.sample.num_image_per_prompt = 3, 4
    config.sample.batch_size = config.train.batch_size = 5
    parts = build(config)
    perturb(parts.policy, 0.1)
    _, experience = collect(parts)
    assert experience.sample_ids.tolist() == list(range(12))
    chunks = [chunk for update in range(2) for chunk in parts.settings.plan.update_indices(update).split(5)]
    terms = [
        grpo.step_loss(minibatch(parts, experience, chunk), slot, parts.settings.config)
        for chunk in chunks
        for slot in range(4)
    ]
    return max(term["ratio_error"].item() for term in terms)


def test_in_bf16_minibatches_of_other_sizes_in_training_still_give_a_ratio_of_exactly_one(config, build):
    assert bf16_ratio_error(config, build) == 0.0


def test_sampled_in_other_minibatches_bf16_would_not(config, build, monkeypatch):
    """The broken twin: 5 + 5 + 2."""
    monkeypatch.setattr(
        grpo, "sampling_minibatches", lambda settings, count, recorded: list(torch.arange(count).split(5))
    )
    assert bf16_ratio_error(config, build) > 1e-6


# --- images without an advantage ---------------------------------------------------------------------------


def everything(policy, experience, settings, update):
    """Every image of an update, as if each had an advantage."""
    chunks = settings.plan.update_indices(update).split(settings.config.train.batch_size)
    return [Chunk(chunk, len(chunk)) for chunk in chunks]


def one_epoch(config, build, name):
    """The gradient, the metrics and the network evaluations of one epoch's only update."""
    config.run_name = name
    parts = build(config)
    perturb(parts.policy)
    parts.policy.optimizer.step = lambda: None
    parts.policy.optimizer.zero_grad = lambda: None
    metrics = parts.train(grpo)
    return accumulated(parts.policy), metrics, parts.policy.network_evaluations


@pytest.mark.parametrize(("mode", "ratio"), [("negative", "sde"), ("positive", "sde"), ("negative", "cfm")])
def test_images_without_an_advantage_cost_nothing_and_change_nothing(config, build, monkeypatch, mode, ratio):
    """Groups of two: one of each has an advantage, and 4 steps (or draws) of 4 images are saved, old side included."""
    config.train.advantage_mode, config.train.ratio, config.train.ratio_probes = mode, ratio, 4
    config.train.batch_size = 3
    gradient, metrics, evaluations = one_epoch(config, build, "spared")
    monkeypatch.setattr(grpo, "_taught", everything)
    whole, whole_metrics, whole_evaluations = one_epoch(config, build, "whole")
    assert ((gradient - whole).norm() / whole.norm()).item() < 1e-5
    assert metrics["loss"] == pytest.approx(whole_metrics["loss"], rel=1e-5)
    sides = 1 if ratio == "sde" else 2
    assert (evaluations, whole_evaluations) == (8 * 4 + sides * 4 * 4, 8 * 4 + sides * 8 * 4)
    assert (metrics["trained_fraction"], whole_metrics["trained_fraction"]) == (0.5, 1.0)


def test_leaving_out_images_that_have_an_advantage_would_change_the_gradient(config, build, monkeypatch):
    """The broken twin."""
    whole, *_ = one_epoch(config, build, "whole")
    monkeypatch.setattr(grpo, "_taught", lambda *_: [Chunk(torch.arange(4), 4)])
    broken, *_ = one_epoch(config, build, "broken")
    assert ((broken - whole).norm() / whole.norm()).item() > 0.1


def test_with_a_kl_every_image_is_trained(config, build):
    config.train.advantage_mode, config.train.beta = "negative", 0.1
    _, metrics, evaluations = one_epoch(config, build, "run")
    assert metrics["trained_fraction"] == 1.0
    assert evaluations == 8 * 4 * 3


def test_an_epoch_of_equal_rewards_trains_nothing_and_says_so(config, build):
    parts = build(config)
    parts.reward = WeightedReward({"pickscore": lambda images, *_: torch.full((len(images),), 0.3)}, {"pickscore": 1.0})
    metrics = parts.train(grpo)
    assert (metrics["trained_fraction"], metrics["zero_std_fraction"], metrics["ratio_error"]) == (0.0, 1.0, 0.0)
    assert "ratio_mean" not in metrics
    assert parts.policy.network_evaluations == 8 * 4


def test_in_bf16_the_ratio_of_negative_samples_is_exactly_one(config, build):
    config.mixed_precision, config.train.advantage_mode, config.train.batch_size = "bf16", "negative", 3
    _, metrics, _ = one_epoch(config, build, "run")
    assert metrics["ratio_error"] == 0.0
