"""The anchored gradient: regression of the velocity onto the base model's, moved along the reward's gradient.

    minimise |v(x, sigma) - sg(v_base(x, sigma) - lambda w(sigma) G)|^2   at K of the sampler's own points,

G = dR/dx_0 at the final image, or at x0_hat of the step. After VGG-Flow (arXiv 2512.05116), without its value net. For
Gaussian data of variance s2 and a linear reward the velocity of p_base exp(lambda R) is v_base - lambda kappa G with

    kappa(sigma) = s2 sigma / ((1 - sigma)^2 s2 + sigma^2),

so that w = kappa aims at that law. The anchor holds every update to the base model: where R asks for no more, training
stands still, and diversity is not spent beyond what lambda says.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from flow_grpo.loops.base_samples import Tilt, tilt_of
from flow_grpo.loops.drtune import Chain, detached_gradient, drawn_chain, equally_spaced
from flow_grpo.loops.reward_gradient import Gradient, Objective, Value, train_by
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.rewards.building import WeightedReward
from flow_grpo.runs.run import Run
from flow_grpo.settings import Settings


def weight(kind: str, sigma: float, variance: float = math.nan) -> float:
    """w(sigma): "1", "1-sigma", "(1-sigma)^2", or "kappa" of data of this variance."""
    if kind == "kappa":
        return variance * sigma / ((1 - sigma) ** 2 * variance + sigma**2)
    return {"1": 1.0, "1-sigma": 1 - sigma, "(1-sigma)^2": (1 - sigma) ** 2}[kind]


def anchored_gradient(
    objective: Objective,
    latents: Tensor,
    generators: list[torch.Generator] | None = None,
    *,
    chain: Chain,
    strength: float,
    weights: dict[int, float],
    per_step: bool,
    largest: float,
    two_pass: bool,
) -> Value:
    """Accumulate the gradient of the regression, the mean over trained steps, images and dimensions.

    Args:
        strength: lambda.
        weights: w(sigma_i) by trained step.
        per_step: take G at x0_hat = x_i - sigma_i v_i, the network's Jacobian left out; else at the final image.
        largest: an image's shift lambda w G is scaled down to this root mean square; 0: never.
    """
    assert objective.reference is not None, "the method asks for the base model"
    reference, errors = objective.reference, []

    def step_loss(i: int, x: Tensor, v: Tensor, gradient: Tensor) -> Tensor:
        sigma = chain.sigmas[i]
        if per_step:
            _, gradient = objective.image_gradient(x - sigma * v)
        shift = strength * weights[i] * gradient  # of a loss, -R: with this sign R rises
        target = reference(x, sigma) + _at_most(shift, largest)
        error = (v - target).square().mean() / len(chain.train_steps)
        errors.append(error.detach())
        return error

    detached_gradient(objective, latents, generators, chain=chain, step_loss=step_loss, two_pass=two_pass)
    error = torch.stack(errors).sum()
    return Value(error, shares={"anchor_error": error})


def _at_most(shift: Tensor, largest: float) -> Tensor:
    """Each image's shift (B, ...), scaled down where its root mean square is larger than that."""
    if largest == 0:
        return shift
    size = shift.flatten(1).square().mean(1).sqrt().clamp(min=largest)
    return shift * (largest / size).view(-1, *[1] * (shift.dim() - 1))


def _anchored(tilt: Tilt, epoch: int, policy: Policy, settings: Settings, generator: torch.Generator) -> Gradient:
    config = settings.config
    chain = equally_spaced(drawn_chain(policy, settings, generator), config.drtune.num_train_steps, generator)
    ramp = config.anchored.ramp_epochs
    return partial(
        anchored_gradient,
        chain=chain,
        strength=tilt.strength * (min(1.0, (epoch + 1) / ramp) if ramp else 1.0),
        weights={i: weight(config.anchored.weight, chain.sigmas[i], tilt.variance) for i in chain.train_steps},
        per_step=config.anchored.gradient_at == "step",
        largest=config.anchored.largest_shift,
        two_pass=config.drtune.two_pass,
    )


def train_epoch(
    policy: Policy, prompts: PromptDataset, reward: WeightedReward, settings: Settings, run: Run
) -> dict[str, float]:
    """One epoch; before a run's first, what is needed of the base model is measured. Returns what is logged."""
    tilt = tilt_of(policy, prompts, reward, settings, run)
    metrics = train_by(partial(_anchored, tilt, run.counters.epoch), policy, prompts, reward, settings, run)
    return metrics | {"strength": tilt.strength}
