"""Adjoint Matching (arXiv 2409.08861): the law p_base exp(lambda R), by regression onto the lean adjoint.

Images are drawn with the memoryless sampler, under which the optimal velocity of the reward-tilted law is that of any
other sampler, too. The lean adjoint starts as -lambda dR/dx_0 at the image and runs back through the base model alone,

    a_i = (da/dx' of the base's step)^T a_{i+1} = a a_{i+1} + b J_base(x_i)^T a_{i+1},

and the velocity is regressed onto v_base + (g^2 / 2) a_i, g^2 / 2 = sigma / (1 - sigma).

Departure from the paper: the steps are ancestral (`diffusers_patch.step.memoryless`), not Euler-Maruyama with a
regularised g. For Gaussian data and a linear reward the target is then exact at any number of steps, except at
sigma = 1, where g is infinite and a_0 is 0: there the step's own optimum, -(s^2 / b) a_1, is taken.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flow_grpo.diffusers_patch.step import StepCoefficients
from flow_grpo.loops.drtune import Chain, drawn_chain, run_chain
from flow_grpo.loops.reward_gradient import Gradient, Objective, Value, train_by
from flow_grpo.policy import Policy
from flow_grpo.settings import Settings


def adjoint_gradient(
    objective: Objective,
    latents: Tensor,
    generators: list[torch.Generator] | None = None,
    *,
    chain: Chain,
    strength: float,
    largest: float = 0.0,
) -> Value:
    """Accumulate the gradient of the mean over images and trained steps of |(2 / g) (v - v_base) - g a|^2.

    The squares are summed over the dimensions.

    Args:
        chain: memoryless steps, and which of them are trained.
        strength: lambda.
        largest: terms above this times lambda^2 are cut and teach nothing; 0: none.
    """
    every = replace(chain, train_steps=tuple(range(len(chain.steps))))
    with torch.no_grad():
        state = run_chain(objective.velocity, latents, every, generators)
    _, gradient = objective.image_gradient(state.x0)
    adjoint = strength * gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    most = largest * strength**2 if largest > 0 else math.inf
    errors, cut = [], []
    for i in reversed(range(chain.train_steps[0], len(chain.steps))):
        x, sigma = state.inputs[i], chain.sigmas[i]
        v_base, pulled = _pull(objective, x, sigma, adjoint)
        before = chain.steps[i].a * adjoint + chain.steps[i].b * pulled
        if i in chain.train_steps:
            change, g = _optimal_change(sigma, chain.steps[i], before, adjoint)
            error = objective.velocity(x, sigma) - v_base - change
            term = (2 / g) ** 2 * error.square().flatten(1).sum(1)  # (B,)
            objective.backward(term.clamp(max=most).mean() / len(chain.train_steps))
            errors.append(term.detach().clamp(max=most).mean())
            cut.append((term.detach() > most).to(term.dtype).mean())
        adjoint = before
    error = torch.stack(errors).mean()
    return Value(error, shares={"adjoint_error": error, "adjoint_cut": torch.stack(cut).mean()})


def _pull(objective: Objective, x: Tensor, sigma: float, adjoint: Tensor) -> tuple[Tensor, Tensor]:
    """v_base and J_base^T a at x, in the adjoint's precision."""
    assert objective.reference_product is not None, "the method asks for the base model"
    v_base, pulled = objective.reference_product(x, sigma, adjoint)
    return v_base.to(adjoint.dtype), pulled.to(adjoint.dtype)


def _optimal_change(sigma: float, step: StepCoefficients, before: Tensor, after: Tensor) -> tuple[Tensor, float]:
    """v - v_base of the tilted law at one step, and g, from the adjoint before and after the step."""
    if sigma < 1:
        return sigma / (1 - sigma) * before, math.sqrt(2 * sigma / (1 - sigma))
    half_square = step.s**2 / -step.b  # g^2 / 2 of the step as it is taken
    return half_square * after, math.sqrt(2 * half_square)


def trained_steps(steps: int, count: int, generator: torch.Generator) -> tuple[int, ...]:
    """All of the last `count` / 2 steps, rounded up, and as many early ones as are missing, each as likely."""
    late = steps - (count + 1) // 2
    early = torch.randperm(late, generator=generator)[: count // 2].sort().values.tolist()
    return (*early, *range(late, steps))


def _adjoint_matching(policy: Policy, settings: Settings, generator: torch.Generator) -> Gradient:
    chain = drawn_chain(policy, settings, generator)
    chosen = trained_steps(len(chain.steps), settings.config.drtune.num_train_steps, generator)
    adjoint = settings.config.adjoint
    return partial(
        adjoint_gradient,
        chain=replace(chain, train_steps=chosen),
        strength=adjoint.strength,
        largest=adjoint.largest_term,
    )


train_epoch = partial(train_by, _adjoint_matching)
