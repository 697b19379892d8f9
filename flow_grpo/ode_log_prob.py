"""Log-densities and differential entropy of a policy's samples, with common random numbers.

Image s of prompt p starts from the same noise, and meets the same probes, at every checkpoint of every run: keyed by
(eval.seed, p, s) and (eval.seed, p, s, evaluation). Differences between checkpoints are therefore those of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object
from ml_collections import FrozenConfigDict
from torch import Tensor

from flow_grpo.entropy import (
    DivergenceEstimator,
    EntropyEstimate,
    OdeLogDensity,
    ProbeGenerators,
    differential_entropy,
    ode_log_density,
)
from flow_grpo.policy import Policy
from flow_grpo.randomness import evaluation_generators, keyed_generator
from flow_grpo.settings import Settings
from flow_grpo.tracking import Run
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


def estimator_of(config: FrozenConfigDict) -> DivergenceEstimator:
    """The divergence estimator that `config.entropy` describes."""
    return DivergenceEstimator(num_probes=config.entropy.num_probes, distribution=config.entropy.distribution)


def probe_generators(seed: int, ids: Sequence[tuple[int, int]]) -> ProbeGenerators:
    """Generators of the probes of images (prompt, sample): evaluation index -> one for each image."""
    return lambda evaluation: [keyed_generator(seed, "probe", *image, evaluation) for image in ids]


def sample_log_density(policy: Policy, prompts: Sequence[str], ids: Sequence[tuple[int, int]]) -> OdeLogDensity:
    """Sample images (prompt index, sample index) of `prompts` by the evaluation's ODE, with their log-densities."""
    config = policy.settings.config
    velocity = policy.velocity(policy.encode([prompts[p] for p, _ in ids]), config.eval.guidance_scale)
    noise = policy.noise(evaluation_generators(config.eval.seed, ids))
    return ode_log_density(
        velocity,
        noise,
        policy.sigmas(config.eval.num_steps),
        estimator_of(config),
        probe_generators(config.eval.seed, ids),
        solver=config.entropy.solver,
    )


def prompt_log_densities(policy: Policy, prompts: Sequence[str], run: Run) -> PromptLogDensities:
    """`config.entropy.num_image_per_prompt` samples of each prompt; processes share them, every one gets all."""
    config = policy.settings.config.entropy
    ids = [(p, s) for p in range(len(prompts)) for s in range(config.num_image_per_prompt)]
    positions = list(range(len(ids)))[policy.accelerator.process_index :: policy.settings.num_processes]
    batches = [positions[i : i + config.batch_size] for i in range(0, len(positions), config.batch_size)]
    found: list[tuple[int, float, float]] = []
    for batch in run.progress(batches, "log-densities"):
        density = sample_log_density(policy, prompts, [ids[i] for i in batch])
        found += zip(batch, density.log_prob.tolist(), density.probe_variance.tolist(), strict=True)
    values = torch.tensor([value for _, *value in sorted(gather_object(found))], dtype=torch.float64)
    log_prob, variance = values.view(len(prompts), config.num_image_per_prompt, 2).unbind(2)
    side = policy.settings.config.resolution // policy.pipeline.vae_scale_factor
    return PromptLogDensities(tuple(prompts), log_prob, variance, policy.transformer.config.in_channels * side**2)


def entropy_metrics(densities: PromptLogDensities) -> dict[str, float]:
    """What is logged: means over prompts of within-prompt figures, and the pooled spread.

    `entropy/nats` is the entropy of an image given its prompt, averaged over the prompts. `ode_log_prob/std` is the
    within-prompt standard deviation of log p_0; `std_corrected` is without the probes' share; `std_pooled` also holds
    the differences between prompts.
    """
    estimates, pooled = densities.per_prompt, densities.log_prob.flatten()
    count = len(estimates)

    def mean(name: str) -> float:
        return float(np.mean([getattr(estimate, name) for estimate in estimates]))

    def error(name: str) -> float:
        """Standard error of a mean over prompts, whose samples are independent."""
        return float(np.sqrt(np.sum([getattr(estimate, name) ** 2 for estimate in estimates])) / count)

    return {
        "entropy/nats": mean("entropy"),
        "entropy/nats_per_dim": mean("nats_per_dim"),
        "entropy/bits_per_dim": mean("bits_per_dim"),
        "entropy/standard_error": error("standard_error"),
        "entropy/sample_part": error("sample_part"),
        "entropy/probe_part": error("probe_part"),
        "ode_log_prob/mean": pooled.mean().item(),
        "ode_log_prob/std": mean("log_prob_std"),
        "ode_log_prob/std_corrected": mean("log_prob_std_corrected"),
        "ode_log_prob/std_pooled": pooled.std().item(),
        "ode_log_prob/min": pooled.min().item(),
        "ode_log_prob/median": pooled.median().item(),
        "ode_log_prob/max": pooled.max().item(),
    }


class OdeLogProbEvaluator:
    """`entropy/...` and `ode_log_prob/...` of the first `config.entropy.num_prompts` evaluated prompts."""

    name, collective, request = "ode_log_prob", True, None

    def __init__(self, policy: Policy, settings: Settings, run: Run) -> None:
        self.policy, self.run = policy, run
        self.freq, self.num_prompts = settings.config.eval_ode_log_prob_freq, settings.config.entropy.num_prompts

    def evaluate(self, samples: Samples) -> dict[str, float]:
        """Of the weights that the policy has now; on every process."""
        prompts = tuple(dict.fromkeys(samples.prompts))[: self.num_prompts]
        return entropy_metrics(prompt_log_densities(self.policy, prompts, self.run))
