"""Nothing in a rollout or a training microbatch waits for the device.

The network, the decoder and the reward compute on torch's meta device, which has shapes and no numbers: whatever reads
a number back, as `.item()` does, raises there. A GPU would be waited for.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from flow_grpo.diffusers_patch.sd3_pipeline_with_logprob import pipeline_with_logprob
from flow_grpo.likelihood_ratio import RatioKeys, likelihood_of
from flow_grpo.loops import drtune
from flow_grpo.loops.policy_gradient import Minibatch, step_loss
from flow_grpo.loops.reward_gradient import Objective
from flow_grpo.losses import reward_losses
from flow_grpo.metrics import MeanMetrics
from flow_grpo.randomness import keyed_generator, sample_generators

META = torch.device("meta")
BATCH = ["a bag", "a boot", "a red coat"]
IDS = torch.arange(3)


@pytest.fixture
def parts(config, build, monkeypatch):
    """A policy and its reward on the meta device."""
    made = build(config)
    embeds = made.policy.encode(BATCH).to(device=META)
    made.policy.encode = lambda prompts: embeds
    for module in (made.policy.transformer, made.policy.vae):
        module.to(META)
    made.policy.device = META
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # torch has none for this device
    scorer = next(iter(made.reward.models.values())).scorer
    scorer.text_features(BATCH)  # known by now, as in every epoch but the first
    scorer._text_feature = lambda text: torch.zeros(scorer.model.projection_dim, device=META)
    scorer.model.to(META)
    scorer.device = META
    return made


def velocity(parts, guidance_scale=1.0):
    return parts.policy.velocity(parts.policy.encode(BATCH), guidance_scale)


def generators():
    return sample_generators(0, "noise", 0, IDS)


def rollout(parts, **kind):
    sigmas = parts.policy.sigmas(4)
    noise = parts.policy.noise(generators())
    return pipeline_with_logprob(velocity(parts), noise, sigmas, generators=generators(), **kind)


def score(parts, latents):
    return parts.reward(parts.policy.decode(latents), BATCH, [{}] * len(BATCH))


def test_the_device_of_these_tests_refuses_to_be_read():
    with pytest.raises(RuntimeError, match="meta"):
        torch.zeros((), device=META).item()


def test_sampling_and_scoring_wait_for_nothing(parts):
    trajectory = rollout(parts, sde_type="sde", noise_level=0.7)
    total = score(parts, trajectory.final_latents).total
    assert total.shape == (3,)
    assert total.device == META


def test_a_training_microbatch_of_grpo_waits_for_nothing(parts):
    config, trajectory = parts.settings.config, rollout(parts, sde_type="sde", noise_level=0.7)
    minibatch = Minibatch(
        velocity=velocity(parts),
        reference=None,
        likelihood=likelihood_of(config),
        keys=RatioKeys(config.seed, 0, 0, (0, 1, 2)),
        trajectory=trajectory,
        advantages=torch.zeros(3, device=META),
        old_log_probs=trajectory.log_probs,
    )
    metrics, largest = MeanMetrics(), torch.zeros((), device=META)
    for slot in range(4):
        terms = step_loss(minibatch, slot, config)
        parts.policy.accelerator.backward(0.5 * terms["loss"])
        largest = torch.maximum(largest, terms["ratio_error"])
        metrics.add({name: value.detach() for name, value in terms.items()}, weight=3)
    assert largest.device == META


@pytest.mark.parametrize("two_pass", [False, True])
def test_a_training_microbatch_of_drtune_waits_for_nothing(parts, two_pass):
    generator = keyed_generator(0, "test")
    chain = drtune.executed_steps(parts.policy.sigmas(4).tolist(), sde_type="ode", noise_level=0.0, generator=generator)
    objective = Objective(velocity(parts), lambda x0: reward_losses(score(parts, x0).total, 0.0))
    value = drtune.chain_gradient(
        objective,
        parts.policy.noise(generators()),
        generators(),
        chain=drtune.equally_spaced(chain, 2, generator),
        two_pass=two_pass,
    )
    assert value.loss.device == META
