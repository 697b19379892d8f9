"""The flow-matching loss on base images: 0 above the base's at the base, by hand elsewhere, told where it has risen."""

from __future__ import annotations

import pytest
import torch

from flow_grpo.evaluators import forward_kl
from flow_grpo.evaluators.evaluation import draw_samples
from flow_grpo.evaluators.registry import build_evaluators
from flow_grpo.forward_process import stratified_times
from flow_grpo.randomness import keyed_generator


@pytest.fixture(params=[True, False])
def parts(config, build, request):
    config.use_lora, config.eval_forward_kl, config.eval_freq = request.param, True, 1
    config.eval.num_prompts, config.eval.batch_size, config.forward_kl.draws = 2, 3, 2
    config.eval.guidance_scale = 3.0  # which plays no part
    return build(config)


def evaluator_of(parts):
    found = build_evaluators(parts.policy, parts.reward, parts.settings, parts.run)
    return next(evaluator for evaluator in found if evaluator.name == "forward_kl")


def samples_of(parts):
    return draw_samples(parts.policy, parts.prompts, parts.settings, parts.run)


def perturb(policy, scale=0.05):
    with torch.no_grad():
        for number, parameter in enumerate(policy.trainable):
            parameter += scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))


def loss_by_hand(policy, velocity_of, samples, x_0):
    """Image by image, over 2 times of 2 noises."""
    times, losses = stratified_times(2, keyed_generator(0, "forward KL times")), []
    for i, (prompt, sample) in enumerate(zip(samples.prompt_ids.tolist(), samples.sample_ids.tolist(), strict=True)):
        velocity = velocity_of(policy.encode([samples.prompts[i]]), 1.0)
        for draw, t in enumerate(times):
            e = policy.noise([keyed_generator(0, "forward KL", prompt, sample, draw)])
            v = velocity((1 - t) * x_0[i : i + 1] + t * e, t)
            losses.append((v - (e - x_0[i : i + 1])).double().square().mean().item())
    return sum(losses) / len(losses)


def test_the_base_has_not_risen_and_moved_weights_have_by_what_is_found_by_hand(parts, config, build, capsys):
    policy, evaluator, samples = parts.policy, evaluator_of(parts), samples_of(parts)
    before = evaluator.evaluate(samples).metrics
    assert before["forward_kl/rise"] == pytest.approx(0.0, abs=1e-6)
    base = evaluator._base.clone()
    perturb(policy)
    after = evaluator.evaluate(samples).metrics
    assert torch.equal(evaluator._base, base)  # drawn once
    with torch.no_grad():
        loss = loss_by_hand(policy, policy.velocity, samples, base)
        of_base = loss_by_hand(policy, policy.reference_velocity, samples, base)
        own = loss_by_hand(policy, policy.velocity, samples, samples_of(parts).latents)  # the twin: on its own images
    assert after["forward_kl/loss"] == pytest.approx(loss, rel=1e-5)
    assert after["forward_kl/rise"] == pytest.approx(loss / of_base - 1, rel=1e-3)
    assert after["forward_kl/loss"] != pytest.approx(own, rel=1e-3)


def test_after_resuming_the_same_is_measured(parts):
    samples = samples_of(parts)
    unbroken = evaluator_of(parts)
    unbroken.evaluate(samples)  # of the base
    perturb(parts.policy)
    found = [evaluator.evaluate(samples).metrics for evaluator in (unbroken, evaluator_of(parts))]
    assert found[0] == found[1]


def test_a_rise_by_a_tenth_is_told_once(parts, capsys, monkeypatch):
    evaluator, samples = evaluator_of(parts), samples_of(parts)
    evaluator.evaluate(samples)
    monkeypatch.setattr(evaluator, "_base_loss", evaluator._base_loss / 1.2)
    for _ in range(2):
        evaluator.evaluate(samples)
    assert capsys.readouterr().err.count("has risen by 20%") == 1
    assert forward_kl.ALARM == 0.1


def test_it_is_not_measured_unless_it_is_asked_for(config, build):
    config.eval_freq = 1
    parts = build(config)
    names = [e.name for e in build_evaluators(parts.policy, parts.reward, parts.settings, parts.run)]
    assert "forward_kl" not in names
