"""What is measured of the base model once, and kept: the variance of the latents, and the strength."""

from __future__ import annotations

import json
import math

import pytest
import torch

from flow_grpo import frontier
from flow_grpo.diffusers_patch.sd3_pipeline_with_logprob import pipeline_with_logprob
from flow_grpo.errors import ConfigError
from flow_grpo.loops import anchored
from flow_grpo.loops.base_samples import TILT_FILE, draw_base_samples, tilt_of
from flow_grpo.randomness import keyed_generator


@pytest.fixture
def anchored_config(config):
    config.use_reward_gradient, config.train.method, config.sample.sde_type = True, "anchored", "ode"
    config.anchored.base_images, config.anchored.base_prompts = 12, 3
    return config


def tilt(parts):
    return tilt_of(parts.policy, parts.prompts, parts.reward, parts.settings, parts.run)


def base_latents(parts, prompt):
    """By hand, under weights that were never touched."""
    noise = parts.policy.noise([keyed_generator(parts.settings.config.seed, "base", prompt, n) for n in range(12)])
    velocity = parts.policy.velocity(parts.policy.encode([parts.prompts.prompts[prompt]] * 12), 1.0)
    with torch.no_grad():
        return pipeline_with_logprob(velocity, noise, parts.policy.sigmas(4)).final_latents


def test_the_variance_is_that_of_the_base_models_latents_of_one_prompt(anchored_config, build):
    parts = build(anchored_config)
    expected = [base_latents(parts, prompt).double().var(0).mean().item() for prompt in range(3)]
    with torch.no_grad():
        for p in parts.policy.trainable:
            p += 0.05  # the weights that train do not matter
    assert tilt(parts).variance == pytest.approx(sum(expected) / 3, rel=1e-5)
    pooled = torch.cat([base_latents(parts, prompt) for prompt in range(3)]).double().var(0).mean().item()
    assert abs(pooled / tilt(parts).variance - 1) > 1e-3


def test_it_is_measured_once_and_kept_with_the_run(anchored_config, build):
    parts = build(anchored_config)
    first = tilt(parts)
    spent = parts.policy.network_evaluations
    parts.run.counters.epoch = 1
    assert tilt(parts) == first
    assert parts.policy.network_evaluations == spent == 3 * 12 * 4
    assert json.loads((parts.run.folder / TILT_FILE).read_text())["variance"] == first.variance


def test_a_first_epoch_that_is_begun_again_pays_for_it_again_as_nothing_of_it_was_counted(anchored_config, build):
    parts = build(anchored_config)
    first = tilt(parts)
    parts.policy.network_evaluations = 0
    assert tilt(parts) == first
    assert parts.policy.network_evaluations == 3 * 12 * 4


def test_a_damaged_file_or_one_of_another_question_is_measured_anew(anchored_config, build):
    parts = build(anchored_config)
    first = tilt(parts)
    path = parts.run.folder / TILT_FILE
    kept, parts.run.counters.epoch = json.loads(path.read_text()), 1
    broken = [json.dumps(kept | change) for change in ({"variance": "x"}, {"variance": None}, {"strength": -5.0})]
    for content in ("{", json.dumps({"asked_for": {}, "strength": 3.0, "variance": 1.0}), *broken):
        path.write_text(content)
        assert tilt(parts) == first


def test_one_of_before_precision_was_noted_is_kept_and_one_of_another_precision_is_not(anchored_config, build):
    parts = build(anchored_config)
    first, parts.run.counters.epoch = tilt(parts), 1
    path = parts.run.folder / TILT_FILE
    kept = json.loads(path.read_text())
    spent = parts.policy.network_evaluations
    old = {name: value for name, value in kept["asked_for"].items() if name != "drawn"}
    path.write_text(json.dumps(kept | {"asked_for": old}))
    assert tilt(parts) == first
    assert parts.policy.network_evaluations == spent
    other = kept["asked_for"] | {"drawn": kept["asked_for"]["drawn"] | {"mixed_precision": "bf16"}}
    path.write_text(json.dumps(kept | {"asked_for": other}))
    assert tilt(parts) == first
    assert parts.policy.network_evaluations > spent


def test_a_variance_that_is_given_is_taken_whether_base_images_are_drawn_or_not(anchored_config, build):
    anchored_config.anchored.variance = 3.0
    assert tilt(build(anchored_config)).variance == 3.0
    anchored_config.anchored.target_kl, anchored_config.run_name = 0.3, "other"
    assert tilt(build(anchored_config)).variance == 3.0


def test_without_a_measured_kappa_or_a_target_nothing_is_sampled(anchored_config, build):
    anchored_config.anchored.weight = "1"
    parts = build(anchored_config)
    assert tilt(parts).strength == 100.0
    assert parts.policy.network_evaluations == 0
    assert not (parts.run.folder / TILT_FILE).exists()


def test_the_strength_for_a_kl_is_that_of_the_exact_law_on_the_base_samples(anchored_config, build):
    anchored_config.anchored.target_kl = 0.3
    parts = build(anchored_config)
    found = tilt(parts).strength
    rewards = draw_base_samples(parts.policy, parts.prompts, parts.reward, parts.settings, parts.run).rewards
    assert frontier.point(rewards, found).kl == pytest.approx(0.3, rel=1e-9)


def test_the_strength_for_a_share_of_diversity_leaves_that_share(anchored_config, build):
    anchored_config.anchored.target_diversity = 0.995
    parts = build(anchored_config)
    assert 0 < tilt(parts).strength < math.inf


def test_a_share_that_the_base_samples_cannot_tell_from_one_is_refused_with_one_that_they_can(anchored_config, build):
    anchored_config.anchored.target_diversity = 0.9999
    parts = build(anchored_config)
    with pytest.raises(
        ConfigError, match=r"target_diversity = 0\.9999: .* near to 1 .* takes at most (0\.\d+)"
    ) as error:
        tilt(parts)
    most = float(str(error.value).rstrip(".").split()[-1])
    anchored_config.anchored.target_diversity, anchored_config.run_name = most, "other"
    assert tilt(build(anchored_config)).strength > 0


@pytest.mark.parametrize(("target", "value"), [("target_kl", 0.3), ("target_diversity", 0.995), ("variance", 0.0)])
def test_the_strength_and_what_the_exact_law_makes_of_it_are_told(anchored_config, build, target, value, capsys):
    anchored_config.anchored[target] = value
    parts = build(anchored_config)
    found = tilt(parts).strength
    samples = draw_base_samples(parts.policy, parts.prompts, parts.reward, parts.settings, parts.run)
    law, base = (frontier.point(samples.rewards, at) for at in (found, 0.0))
    said = (
        f"lambda {found:.3g}: the exact law has reward {law.reward:.4f} (base {base.reward:.4f}), at {law.kl:.3g} nats"
    )
    told = capsys.readouterr()
    assert said in told.out + told.err
    assert ("different images of 16" in told.out + told.err) == (target == "target_diversity")


def test_a_target_that_the_base_samples_cannot_reach_is_told(anchored_config, build):
    anchored_config.anchored.target_diversity = 1e-6
    parts = build(anchored_config)
    with pytest.raises(
        ConfigError,
        match=r"target_diversity = 1e-06: a share of 1e-06 .* is out of reach",
    ):
        tilt(parts)


def test_the_ramp_raises_the_strength_over_its_epochs(anchored_config, build):
    anchored_config.anchored.ramp_epochs = 4
    parts = build(anchored_config)
    strengths = []
    for epoch in range(6):
        found = anchored._anchored(tilt(parts), epoch, parts.policy, parts.settings, torch.Generator().manual_seed(0))
        strengths.append(found.keywords["strength"])
    assert strengths == [25.0, 50.0, 75.0, 100.0, 100.0, 100.0]


def test_each_trained_step_has_the_weight_of_its_own_level(anchored_config, build):
    parts = build(anchored_config)
    target = tilt(parts)
    found = anchored._anchored(target, 0, parts.policy, parts.settings, torch.Generator().manual_seed(0)).keywords
    assert len(found["weights"]) == 2
    for i, w in found["weights"].items():
        sigma, s2 = found["chain"].sigmas[i], target.variance
        assert w == pytest.approx(s2 * sigma / ((1 - sigma) ** 2 * s2 + sigma**2))
