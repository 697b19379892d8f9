"""Log-densities of a policy's samples: the same noise and probes at every checkpoint, and what is logged of them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from flow_grpo.entropy import DivergenceEstimator, NonFiniteError, differential_entropy, ode_log_density
from flow_grpo.errors import ConfigError
from flow_grpo.evaluators.diversity import build_diversity_evaluators
from flow_grpo.evaluators.entropy import (
    OdeLogProbEvaluator,
    PromptLogDensities,
    entropy_metrics,
    mean_over_prompts,
    prompt_log_densities,
    sample_log_density,
)
from flow_grpo.evaluators.evaluation import draw_samples
from flow_grpo.evaluators.registry import build_evaluators
from flow_grpo.loops import drtune
from flow_grpo.randomness import keyed_generator
from tests import forked
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
    assert metrics["entropy/nats"] == -7.0
    assert metrics["entropy/nats_per_dim"] == -3.5
    assert metrics["entropy/bits_per_dim"] == pytest.approx(-3.5 / math.log(2))
    assert metrics["ode_log_prob/mean"] == 7.0
    assert metrics["ode_log_prob/std"] == pytest.approx(math.sqrt((2 + 8) / 2))
    assert metrics["ode_log_prob/std_corrected"] == pytest.approx(math.sqrt(5 - 0.5))
    assert metrics["ode_log_prob/std_pooled"] == pytest.approx(log_prob.std().item())
    assert metrics["ode_log_prob/std_pooled_corrected"] == pytest.approx(math.sqrt(log_prob.var().item() - 0.5))
    assert metrics["entropy/standard_error"] == pytest.approx(math.sqrt(2 / 2 + 8 / 2) / 2)
    assert metrics["entropy/probe_part"] == pytest.approx(math.sqrt(2 * 0.5 / 2) / 2)
    assert metrics["entropy/sample_part"] == pytest.approx(math.sqrt((1.5 + 7.5) / 2) / 2)
    assert (metrics["ode_log_prob/min"], metrics["ode_log_prob/max"]) == (1.0, 14.0)
    assert metrics["ode_log_prob/median"] == 6.5  # between 3 and 10
    assert metrics["ode_log_prob/quantile_0.25"] == 2.5
    assert metrics["ode_log_prob/quantile_0.75"] == 11.0


def test_variances_are_averaged_over_prompts_before_the_probes_share_is_taken_out():
    """Prompts of variance 2, less than the probes' 3, and 8: a root of each alone would give (0 + sqrt 5) / 2."""
    log_prob = torch.tensor([[1.0, 3.0], [10.0, 14.0]], dtype=torch.float64)
    densities = PromptLogDensities(("a", "b"), log_prob, torch.full((2, 2), 3.0).double(), dims=2)
    assert entropy_metrics(densities)["ode_log_prob/std_corrected"] == pytest.approx(math.sqrt(5 - 3))
    assert densities.pooled == differential_entropy(log_prob.flatten(), torch.full((4,), 3.0), 2)


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 1.0, 1.0, 1.0), (1.0, 2.0, 5.0)])
def test_the_interval_of_a_mean_over_prompts_of_few_samples_covers_in_95_percent_of_repetitions(scales):
    """4,000 repetitions of 5 samples of each prompt, whose standard deviations differ."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor(scales, dtype=torch.float64)[:, None]
    draws = scale * torch.randn(4000, len(scales), 5, generator=generator, dtype=torch.float64)
    found = [mean_over_prompts(values) for values in draws]
    assert 0.93 <= sum(abs(estimate.value) < estimate.half_width() for estimate in found) / 4000 <= 0.97
    assert sum(abs(estimate.value) < 1.96 * estimate.standard_error for estimate in found) / 4000 < 0.94  # the twin


def test_the_configuration_says_how_densities_are_found(config, build):
    """Every setting differs from its default and from the sampler's of training."""
    config.eval.guidance_scale, config.eval.num_steps, config.sample.num_steps = 3.0, 3, 4
    config.entropy.solver, config.entropy.num_probes, config.entropy.distribution = "heun", 3, "gaussian"
    config.eval.seed = 5
    policy, ids = build(config).policy, [(0, 1), (2, 0)]
    found = sample_log_density(policy, PROMPTS, ids)
    expected = ode_log_density(
        policy.velocity(policy.encode([PROMPTS[0], PROMPTS[2]]), 3.0),
        policy.noise([keyed_generator(5, "eval", p, s) for p, s in ids]),
        policy.sigmas(3),
        DivergenceEstimator(num_probes=3, distribution="gaussian"),
        lambda evaluation: [keyed_generator(5, "probe", p, s, evaluation) for p, s in ids],
        solver="heun",
    )
    assert torch.equal(found.log_prob, expected.log_prob)
    assert torch.equal(found.probe_variance, expected.probe_variance)


def test_each_evaluator_has_its_own_frequency(config, build):
    config.eval_ode_log_prob = config.visualize_steps = True
    config.eval_freq, config.eval_ode_log_prob_freq, config.visualize_steps_freq = 2, 3, 5
    parts = build(config)
    evaluators = build_evaluators(parts.policy, parts.reward, parts.settings, parts.run)
    frequencies = {evaluator.name: evaluator.freq for evaluator in evaluators}
    assert (frequencies["ode_log_prob"], frequencies["steps"], frequencies["reward"]) == (3, 5, 2)


def test_an_evaluator_without_a_frequency_of_its_own_takes_that_of_the_evaluation(config, build):
    config.eval_ode_log_prob = config.visualize_steps = config.eval_diversity = True
    config.eval_freq = 7
    parts = build(config)
    evaluators = build_evaluators(parts.policy, parts.reward, parts.settings, parts.run)
    evaluators += build_diversity_evaluators(parts.settings, parts.run, parts.policy.device)
    assert {evaluator.freq for evaluator in evaluators} == {7}


@pytest.mark.parametrize("key", ["eval_ode_log_prob", "visualize_steps"])
def test_more_orthogonal_probes_than_dimensions_are_refused_with_the_evaluator(config, build, key):
    config[key], config.entropy.distribution, config.entropy.num_probes = True, "orthogonal", 257
    parts = build(config)
    with pytest.raises(ConfigError, match=r"num_probes = 257 is not allowed.*256 dimensions"):
        build_evaluators(parts.policy, parts.reward, parts.settings, parts.run)


# --- weights that are broken -----------------------------------------------------------------------------


def test_weights_that_are_not_finite_have_nan_for_every_figure(parts):
    evaluator = OdeLogProbEvaluator(parts.policy, parts.settings, parts.run)
    samples = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run)
    names = evaluator.evaluate(samples).metrics.keys()
    with torch.no_grad():
        parts.policy.trainable[0].fill_(math.nan)
    with pytest.warns(UserWarning, match="no log-densities at epoch 0: step 0 of 4: the velocity is not finite"):
        metrics = evaluator.evaluate(samples).metrics
    assert metrics.keys() == names
    assert all(math.isnan(value) for value in metrics.values())
    with pytest.raises(NonFiniteError, match="step 0 of 4"):
        prompt_log_densities(parts.policy, PROMPTS[:2], parts.run)


BROKEN_ON_ONE = """
import json, sys
import torch
from flow_grpo.evaluators.evaluation import draw_samples
from flow_grpo.launch import launch
from flow_grpo.evaluators.entropy import OdeLogProbEvaluator
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.runs.run import Run
from config.base import get_config

config = get_config()
models, out = sys.argv[1:]
config.logdir, config.run_name, config.trackers = f"{out}/logs", "run", ()
config.pretrained.model, config.prompts.train = f"{models}/sd3", f"{models}/prompts.txt"
config.prompts.test = config.prompts.train
config.reward_fn.pickscore, config.reward_model.pickscore = 1.0, f"{models}/clip"
config.eval.judge = config.eval.modes = ""
config.eval.num_steps, config.eval.num_image_per_prompt, config.eval.num_prompts = 3, 1, 2
config.entropy.num_prompts, config.entropy.num_image_per_prompt, config.entropy.batch_size = 2, 4, 1
settings, accelerator = launch(config)
policy, run = Policy.load(settings, accelerator), Run(settings, accelerator)
samples = draw_samples(policy, PromptDataset.load(config.prompts.test), settings, run)
evaluator, rank = OdeLogProbEvaluator(policy, settings, run), accelerator.process_index
whole = evaluator.evaluate(samples).metrics
if rank == 1:
    policy.trainable[0].data.fill_(float("nan"))
broken = evaluator.evaluate(samples).metrics
seconds = torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()
with open(f"{out}/{rank}.json", "w") as file:
    json.dump([whole, broken, seconds], file)
run.finish()
"""


def test_weights_broken_on_one_of_two_processes_give_nan_on_both_and_none_waits_in_vain(random_models, tmp_path):
    done = forked.run("-c", BROKEN_ON_ONE, random_models, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no log-densities at epoch 0") == 1
    (whole, broken, seconds), other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert whole == other[0]
    assert all(math.isfinite(value) for value in whole.values())
    assert all(math.isnan(value) for value in (*broken.values(), *other[1].values()))
    # however long the main process evaluates, the others wait: torch's own time-out is 30 minutes, or 10 on GPUs
    assert seconds == other[2] > 24 * 3600


def test_the_evaluator_measures_the_first_prompts_on_every_process(parts):
    (evaluator,) = [
        e for e in build_evaluators(parts.policy, parts.reward, parts.settings, parts.run) if e.name == "ode_log_prob"
    ]
    assert isinstance(evaluator, OdeLogProbEvaluator)
    assert evaluator.collective
    samples = draw_samples(parts.policy, parts.prompts, parts.settings, parts.run)
    direct = entropy_metrics(prompt_log_densities(parts.policy, PROMPTS[:2], parts.run))
    assert evaluator.evaluate(samples).metrics == direct
