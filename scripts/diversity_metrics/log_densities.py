"""Log-densities of a policy's samples and of given images, of every model on the same noise and probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from ml_collections import ConfigDict
from torch import Tensor

from flow_grpo.diversity.images import stack
from flow_grpo.entropy import NonFiniteError, ProbeGenerators, ode_log_density
from flow_grpo.errors import ConfigError
from flow_grpo.evaluators.entropy import (
    PromptLogDensities,
    entropy_metrics,
    estimator_of,
    mean_over_prompts,
    prompt_log_densities,
)
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.randomness import keyed_generator
from flow_grpo.runs.progress import Bars
from flow_grpo.runs.run import Run
from flow_grpo.statistics import Estimate
from flow_grpo.training.weights import Model, load_weights
from scripts.diversity_metrics.given_images import ImageFile


@dataclass(frozen=True)
class Measured:
    """What one model gave."""

    model: Model
    densities: PromptLogDensities
    metrics: dict[str, float]  # of flow_grpo.evaluators.entropy.entropy_metrics
    images: list[dict[str, Any]] = field(default_factory=list)


# --- what to measure ----------------------------------------------------------------------------------------


def evaluated_prompts(config: ConfigDict) -> tuple[str, ...]:
    """The first `entropy.num_prompts` distinct prompts that the run's evaluation uses."""
    evaluated = PromptDataset.load(config.prompts.test).prompts[: config.eval.num_prompts or None]
    return tuple(dict.fromkeys(evaluated))[: config.entropy.num_prompts]


# --- measuring ----------------------------------------------------------------------------------------------


def encode_images(policy: Policy, pixels: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> latents (B, C, h, w) float32, at the scale of the transformer."""
    with torch.no_grad():
        return policy.family.encode_image(pixels)


def image_probes(seed: int, indices: Sequence[int]) -> ProbeGenerators:
    """Generators of the probes of given images, by their place in the order: the same for every model."""
    return lambda evaluation: [keyed_generator(seed, "image probe", i, evaluation) for i in indices]


def data_log_densities(policy: Policy, latents: Tensor, prompts: Sequence[str]) -> list[dict[str, float]]:
    """log p_0 of latents (N, C, h, w), each given its prompt, from data to noise."""
    config, found = policy.settings.config, []
    for start in range(0, len(latents), config.entropy.batch_size):
        part = range(start, min(start + config.entropy.batch_size, len(latents)))
        with policy.eager():
            density = ode_log_density(
                policy.velocity(policy.encode([prompts[i] for i in part]), config.eval.guidance_scale),
                latents[part.start : part.stop],
                policy.sigmas(config.eval.num_steps).flip(0),
                estimator_of(policy),
                image_probes(config.eval.seed, part),
                solver=config.entropy.solver,
            )
        columns = (density.log_prob, density.nats_per_dim, density.bits_per_dim, density.probe_standard_error)
        names = ("log_prob", "nats_per_dim", "bits_per_dim", "probe_standard_error")
        rows = zip(*(column.tolist() for column in columns), strict=True)
        found += [dict(zip(names, row, strict=True)) for row in rows]
    return found


def measure(
    policy: Policy, models: Sequence[Model], prompts: Sequence[str], images: Sequence[ImageFile], ema: bool
) -> list[Measured]:
    """Every model on the same noise and probes; afterwards the policy has the weights of the last."""
    base = [parameter.detach().clone() for parameter in policy.trainable]
    paths, size = [image.path for image in images], policy.settings.config.entropy.batch_size
    parts = [encode_images(policy, stack(paths[start : start + size])) for start in range(0, len(paths), size)]
    latents = torch.cat(parts) if parts else None
    bars, texts = Bars(), [image.prompt for image in images]
    measured = []
    for model in bars.progress(models, "models"):
        load_weights(policy, model, base, ema)
        try:
            densities = prompt_log_densities(policy, prompts, cast("Run", bars))
            values = [] if latents is None else data_log_densities(policy, latents, texts)
        except NonFiniteError as error:
            raise ConfigError(f"{model.name} has no log-density: {error}") from error
        rows = [{"file": i.path.name, "prompt": i.prompt, **v} for i, v in zip(images, values, strict=True)]
        measured.append(Measured(model, densities, entropy_metrics(densities), rows))
    return measured


def entropy_change(first: PromptLogDensities, other: PromptLogDensities) -> Estimate:
    """Entropy of `other` minus that of `first`, mean over prompts; nats.

    Noise and probes are common, so the samples are compared in pairs: the error is that of the difference.
    """
    return mean_over_prompts(first.log_prob - other.log_prob)
