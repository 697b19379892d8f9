"""Log-densities of a policy's samples: the same noise and probes at every checkpoint, and what is logged of them."""

from __future__ import annotations

import math

import pytest
import torch

from flow_grpo import drtune
from flow_grpo.entropy import DivergenceEstimator, ode_log_density
from flow_grpo.evaluation import build_evaluators, draw_samples
from flow_grpo.ode_log_prob import (
    OdeLogProbEvaluator,
    PromptLogDensities,
    entropy_metrics,
    prompt_log_densities,
    sample_log_density,
)
from tests.conftest import PROMPTS


@pytest.fixture
def parts(config, build):
    config.use_reward_gradient = config.eval_ode_log_prob = True
    config.entropy.num_prompts, config.entropy.num_image_per_prompt = 2, 3
    config.entropy.batch_size = 4
    return build(config)


def test_the_samples_are_the_evaluations(parts):
    density = sample_log_density(parts.policy, PROMPTS, [(0, 0), (0, 1), (1, 0)])
    samples = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run)
    torch.testing.assert_close(density.x_0, samples.latents[[0, 1, 2]], rtol=1e-4, atol=1e-4)


def test_the_log_density_agrees_with_the_exact_trace_within_its_stated_error(parts):
    ids = [(0, s) for s in range(4)]
    found = sample_log_density(parts.policy, PROMPTS, ids)
    velocity = parts.policy.velocity(parts.policy.encode([PROMPTS[0]] * 4), 1.0)
    exact = ode_log_density(velocity, found.x_1, parts.policy.sigmas(4), DivergenceEstimator(exact=True))
    z_scores = (found.log_prob - exact.log_prob) / found.probe_standard_error
    assert z_scores.abs().max() < 5
    assert found.probe_standard_error.min() > 0


def test_twice_the_same_weights_give_the_same_numbers(parts):
    first, second = (prompt_log_densities(parts.policy, PROMPTS[:2], parts.run) for _ in range(2))
    assert torch.equal(first.log_prob, second.log_prob)


def test_a_sample_does_not_depend_on_its_batch(parts):
    whole = prompt_log_densities(parts.policy, PROMPTS[:2], parts.run)  # batches of 4 and 2
    alone = sample_log_density(parts.policy, PROMPTS, [(1, 2)])
    assert whole.log_prob[1, 2].item() == pytest.approx(alone.log_prob.item(), abs=1e-2)


def test_training_changes_the_density_on_the_same_noise(parts):
    before = prompt_log_densities(parts.policy, PROMPTS[:2], parts.run)
    for _ in range(3):
        parts.train(drtune)
    after = prompt_log_densities(parts.policy, PROMPTS[:2], parts.run)
    assert (after.log_prob - before.log_prob).abs().min() > 0


def test_metrics_are_means_over_prompts_and_pooled_where_they_say_so():
    log_prob = torch.tensor([[1.0, 3.0], [10.0, 14.0]], dtype=torch.float64)
    metrics = entropy_metrics(PromptLogDensities(("a", "b"), log_prob, torch.full((2, 2), 0.5).double(), dims=2))
    stds = [math.sqrt(2), math.sqrt(8)]
    assert metrics["entropy/nats"] == -7.0
    assert metrics["entropy/nats_per_dim"] == -3.5
    assert metrics["ode_log_prob/std"] == pytest.approx(sum(stds) / 2)
    assert metrics["ode_log_prob/std_corrected"] == pytest.approx((math.sqrt(1.5) + math.sqrt(7.5)) / 2)
    assert metrics["ode_log_prob/std_pooled"] == pytest.approx(log_prob.std().item())
    assert metrics["entropy/standard_error"] == pytest.approx(math.sqrt(2 / 2 + 8 / 2) / 2)
    assert (metrics["ode_log_prob/min"], metrics["ode_log_prob/max"]) == (1.0, 14.0)


def test_the_evaluator_measures_the_first_prompts_on_every_process(parts):
    (evaluator,) = [
        e for e in build_evaluators(parts.policy, parts.reward, parts.settings, parts.run) if e.name == "ode_log_prob"
    ]
    assert isinstance(evaluator, OdeLogProbEvaluator)
    assert evaluator.collective
    samples = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run)
    direct = entropy_metrics(prompt_log_densities(parts.policy, PROMPTS[:2], parts.run))
    assert evaluator.evaluate(samples) == direct
