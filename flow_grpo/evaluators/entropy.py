"""Log-densities and differential entropy of a policy's samples, with common random numbers.

Image s of prompt p starts from the same noise, and meets the same probes, at every checkpoint of every run: keyed by
(eval.seed, p, s) and (eval.seed, p, s, evaluation). Differences between checkpoints are therefore those of the weights.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from flow_grpo.entropy import (
    DivergenceEstimator,
    EntropyEstimate,
    NonFiniteError,
    OdeLogDensity,
    ProbeGenerators,
    differential_entropy,
    ode_log_density,
)
from flow_grpo.errors import ConfigError
from flow_grpo.evaluators.base import Evaluator, Measured
from flow_grpo.policy import Policy
from flow_grpo.randomness import evaluation_generators, keyed_generator
from flow_grpo.rewards.building import WeightedReward
from flow_grpo.runs.run import Run
from flow_grpo.settings import Settings
from flow_grpo.statistics import Estimate
from flow_grpo.types import Samples


@dataclass(frozen=True)
class PromptLogDensities:
    """log p_0 of the samples of each prompt under the guided ODE (P prompts, S samples of each); nats."""

    prompts: tuple[str, ...]
    log_prob: Tensor  # (P, S) float64
    probe_variance: Tensor  # (P, S) float64; nan with one probe
    dims: int  # D

    @property
    def per_prompt(self) -> list[EntropyEstimate]:
        """The entropy of each prompt's distribution."""
        pairs = zip(self.log_prob, self.probe_variance, strict=True)
        return [differential_entropy(log_prob, variance, self.dims) for log_prob, variance in pairs]

    @property
    def pooled(self) -> EntropyEstimate:
        """Of all samples together: their spread and quantiles (their entropy is not that of the mixture)."""
        return differential_entropy(self.log_prob.flatten(), self.probe_variance.flatten(), self.dims)


def mean_over_prompts(values: Tensor) -> Estimate:
    """Of values (P, S), S >= 2, each prompt with a variance of its own; samples are independent.

    The degrees of freedom are Welch's and Satterthwaite's (Biometrika 34, 28): S - 1 for one prompt, up to P (S - 1)
    for prompts of equal variance.
    """
    count, samples = values.shape
    variances = values.double().var(1) / samples  # of each prompt's mean
    total = variances.sum().item()
    freedom = (samples - 1) * total**2 / variances.square().sum().item() if total > 0 else samples - 1.0
    return Estimate(values.double().mean().item(), math.sqrt(total) / count, freedom)


def latent_dims(policy: Policy) -> int:
    """D of one image."""
    return math.prod(policy.latent_shape)


def estimator_of(policy: Policy) -> DivergenceEstimator:
    """The divergence estimator that `config.entropy` describes; ConfigError for more orthogonal probes than D."""
    config, dims = policy.settings.config.entropy, latent_dims(policy)
    if config.distribution == "orthogonal" and config.num_probes > dims:
        raise ConfigError(
            f"config.entropy.num_probes = {config.num_probes} is not allowed with config.entropy.distribution = "
            f"'orthogonal'; latents have {dims} dimensions, in which at most so many directions are orthogonal."
        )
    return DivergenceEstimator(num_probes=config.num_probes, distribution=config.distribution, agreed=policy.agreed)


def probe_generators(seed: int, ids: Sequence[tuple[int, int]]) -> ProbeGenerators:
    """Generators of the probes of images (prompt, sample): evaluation index -> one for each image."""
    return lambda evaluation: [keyed_generator(seed, "probe", *image, evaluation) for image in ids]


def sample_log_density(policy: Policy, prompts: Sequence[str], ids: Sequence[tuple[int, int]]) -> OdeLogDensity:
    """Sample images (prompt index, sample index) of `prompts` by the evaluation's ODE, with their log-densities."""
    config = policy.settings.config
    velocity = policy.velocity(policy.encode([prompts[p] for p, _ in ids]), config.eval.guidance_scale)
    noise = policy.noise(evaluation_generators(config.eval.seed, ids))
    with policy.eager():
        return ode_log_density(
            velocity,
            noise,
            policy.sigmas(config.eval.num_steps),
            estimator_of(policy),
            probe_generators(config.eval.seed, ids),
            solver=config.entropy.solver,
        )


def prompt_log_densities(policy: Policy, prompts: Sequence[str], run: Run) -> PromptLogDensities:
    """`config.entropy.num_image_per_prompt` samples of each prompt; processes share them, every one gets all.

    Raises:
        NonFiniteError: on every process, if the velocity or its divergence is not finite on one of them.
    """
    config = policy.settings.config.entropy
    ids = [(p, s) for p in range(len(prompts)) for s in range(config.num_image_per_prompt)]
    positions = list(range(len(ids)))[policy.accelerator.process_index :: policy.settings.num_processes]
    rounds = -(-len(ids) // (policy.settings.num_processes * config.batch_size))  # of the process that has most
    batches = [positions[i * config.batch_size :][: config.batch_size] for i in range(rounds)]
    found: list[tuple[int, float, float]] = []
    broken: list[str] = []
    for batch in run.progress(batches, "log-densities"):
        drawn = batch or policy.stand_in(range(len(ids)))
        if not drawn:
            continue
        try:
            density = sample_log_density(policy, prompts, [ids[i] for i in drawn])
        except NonFiniteError as error:  # the other processes wait below
            broken.append(str(error))
            break
        if batch:
            found += zip(batch, density.log_prob.tolist(), density.probe_variance.tolist(), strict=True)
    if broken := gather_object(broken):
        raise NonFiniteError(broken[0])
    values = torch.tensor([value for _, *value in sorted(gather_object(found))], dtype=torch.float64)
    log_prob, variance = values.view(len(prompts), config.num_image_per_prompt, 2).unbind(2)
    return PromptLogDensities(tuple(prompts), log_prob, variance, latent_dims(policy))


def entropy_metrics(densities: PromptLogDensities) -> dict[str, float]:
    """What is logged: means over prompts of within-prompt figures, and the pooled spread.

    `entropy/nats` is the entropy of an image given its prompt, averaged over the prompts; `entropy/half_width_95` is of
    its 95 % interval. `ode_log_prob/std` is the within-prompt standard deviation of log p_0: the root of the variance
    averaged over the prompts. `std_corrected` is without the probes' share of that variance. `std_pooled` and
    `std_pooled_corrected` also hold the differences between prompts, as do `min`, `max`, `median` and the quantiles.
    """
    pooled, entropy = densities.pooled, mean_over_prompts(-densities.log_prob)
    observed = densities.log_prob.var(1).mean().item()  # within prompts
    probes = densities.probe_variance.mean().item()
    between = float(np.maximum(observed - probes, 0.0))  # nan stays nan
    share = len(densities.prompts) * densities.log_prob.shape[1]  # of a variance in that of the mean
    return {
        "entropy/nats": entropy.value,
        "entropy/nats_per_dim": entropy.value / densities.dims,
        "entropy/bits_per_dim": entropy.value / densities.dims / math.log(2),
        "entropy/standard_error": entropy.standard_error,
        "entropy/half_width_95": entropy.half_width(),
        "entropy/sample_part": math.sqrt(between / share),
        "entropy/probe_part": math.sqrt(probes / share),
        "ode_log_prob/mean": -entropy.value,
        "ode_log_prob/std": math.sqrt(observed),
        "ode_log_prob/std_corrected": math.sqrt(between),
        "ode_log_prob/std_pooled": pooled.log_prob_std,
        "ode_log_prob/std_pooled_corrected": pooled.log_prob_std_corrected,
        "ode_log_prob/min": pooled.minimum,
        "ode_log_prob/median": pooled.quantiles[0.5],
        "ode_log_prob/max": pooled.maximum,
        **{f"ode_log_prob/quantile_{q:g}": value for q, value in pooled.quantiles.items() if q != 0.5},
    }


class OdeLogProbEvaluator:
    """`entropy/...` and `ode_log_prob/...` of the first `config.entropy.num_prompts` evaluated prompts."""

    name, collective, request = "ode_log_prob", True, None

    def __init__(self, policy: Policy, settings: Settings, run: Run) -> None:
        self.policy, self.run = policy, run
        self.freq = settings.config.eval_ode_log_prob_freq or settings.config.eval_freq
        self.num_prompts = settings.config.entropy.num_prompts
        estimator_of(policy)  # refuses what cannot be

    def evaluate(self, samples: Samples) -> Measured:
        """Of the weights that the policy has now; on every process. All nan where the velocity is not finite."""
        prompts = tuple(dict.fromkeys(samples.prompts))[: self.num_prompts]
        try:
            densities = prompt_log_densities(self.policy, prompts, self.run)
        except NonFiniteError as error:
            if self.run.is_main:
                warnings.warn(f"no log-densities at epoch {self.run.counters.epoch}: {error}", stacklevel=2)
            unknown = torch.full((len(prompts), 2), math.nan, dtype=torch.float64)
            densities = PromptLogDensities(prompts, unknown, unknown, latent_dims(self.policy))
        return Measured(entropy_metrics(densities))


def build(policy: Policy, reward: WeightedReward, settings: Settings, run: Run) -> list[Evaluator]:
    """The evaluator, if the configuration asks for it."""
    return [OdeLogProbEvaluator(policy, settings, run)] if settings.config.eval_ode_log_prob else []
