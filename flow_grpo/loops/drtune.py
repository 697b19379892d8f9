"""Reward gradients through a detached chain: DRTune (arXiv 2405.00760), FlowBP (arXiv 2606.11075), ReFL (2304.05977).

The network's input is detached at every step, so the sampler is a linear chain x' = a x + b v + s z in the velocities,
and K of its steps carry gradient:

    dR/dtheta = sum over trained steps i of w_i <dR/dx_0, dv_i/dtheta>.

The methods differ in which steps these are and in w_i. The chain itself has w_i = c_i = b_i prod_{j > i} a_j. In one
pass the K graphs are kept; in two, dR/dx_0 is taken first and then one trained step is run again at a time: the same
gradient with the memory of one step, for K more forwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from flow_grpo.diffusers_patch.rollout import rollout
from flow_grpo.diffusers_patch.step import StepCoefficients, step_coefficients
from flow_grpo.diffusers_patch.velocity import VelocityFn
from flow_grpo.loops.reward_gradient import Gradient, Objective, Value, train_by
from flow_grpo.policy import Policy
from flow_grpo.settings import Settings


@dataclass(frozen=True)
class Chain:
    """The n steps that are executed, and which of them carry gradient."""

    sigmas: tuple[float, ...]  # (n,): noise level at which each executed step evaluates the network
    steps: tuple[StepCoefficients, ...]  # (n,)
    train_steps: tuple[int, ...]  # K indices among the executed steps, ascending
    gains: tuple[float, ...] | None = None  # (K,): w_i / c_i of the trained steps; None: 1

    def weight(self, i: int) -> float:
        """w_i of a trained step; without gains c_i: how much of its velocity arrives in the decoded latents."""
        gain = 1.0 if self.gains is None else self.gains[self.train_steps.index(i)]
        return gain * self.steps[i].b * math.prod(step.a for step in self.steps[i + 1 :])


def executed_steps(
    sigmas: Sequence[float],
    *,
    sde_type: str,
    noise_level: float,
    early_stop: int = 0,
    generator: torch.Generator,
) -> Chain:
    """The steps of a sampler, none trained yet.

    With `early_stop` m > 0 the last executed step is uniform on the last m; there x0_hat = x - sigma v is decoded,
    itself an affine step with a = 1, b = -sigma.

    Args:
        sigmas: T + 1 noise levels, decreasing to 0.
    """
    n = len(sigmas) - 1
    if early_stop > 0:
        n -= int(torch.randint(early_stop, (), generator=generator))
    steps = [step_coefficients(sde_type, sigmas[i], sigmas[i + 1], noise_level) for i in range(n)]
    if early_stop > 0:
        steps[-1] = StepCoefficients(a=1.0, b=-sigmas[n - 1], s=0.0)
    return Chain(tuple(sigmas[:n]), tuple(steps), ())


# --- which steps are trained, and with which weights -----------------------------------------------------


def equally_spaced(chain: Chain, num_train_steps: int, generator: torch.Generator) -> Chain:
    """DRTune: the K steps {o + i floor(n / K)}, the offset o uniform over all that fit; w_i = c_i."""
    n = len(chain.steps)
    stride = n // num_train_steps
    last_offset = n - 1 - (num_train_steps - 1) * stride
    offset = int(torch.randint(last_offset + 1, (), generator=generator))
    return replace(chain, train_steps=tuple(offset + i * stride for i in range(num_train_steps)))


def last_step(chain: Chain) -> Chain:
    """ReFL: the step whose x0_hat is decoded; w = -sigma."""
    return replace(chain, train_steps=(len(chain.steps) - 1,))


def sparse(chain: Chain, num_train_steps: int, bias: float, gain: float, generator: torch.Generator) -> Chain:
    """FlowBP-Sparse: K steps drawn without replacement, step i with a weight of (i + 1)^bias; w_i = g c_i.

    g = 1 + gain (sum of b over all steps / sum of b over the trained ones - 1), b = dt of an ODE step: with gain 1 the
    trained steps stand for the whole way, with 0 for themselves.
    """
    train_steps = _drawn(len(chain.steps), num_train_steps, bias, generator)
    way, trained = sum(step.b for step in chain.steps), sum(chain.steps[i].b for i in train_steps)
    g = 1 + gain * (way / trained - 1)
    return replace(chain, train_steps=train_steps, gains=(g,) * num_train_steps)


def lagrange(chain: Chain, num_supports: int, num_train_steps: int, bias: float, generator: torch.Generator) -> Chain:
    """FlowBP-Lagrange: a leap from the first support to the image, along the polynomial through the velocities there.

    The supports are drawn as those of `sparse`, and K of them are trained, each as likely. w_i is the integral of the
    support's Lagrange polynomial over the leap. Where the leap begins and which supports are trained is our reading.
    """
    supports = _drawn(len(chain.steps), num_supports, bias, generator)
    chosen = torch.randperm(num_supports, generator=generator)[:num_train_steps].sort().values.tolist()
    weights = lagrange_weights([chain.sigmas[i] for i in supports], chain.sigmas[supports[0]], 0.0)
    train_steps = tuple(supports[j] for j in chosen)
    plain = replace(chain, train_steps=train_steps)
    return replace(plain, gains=tuple(weights[j] / plain.weight(i) for j, i in zip(chosen, train_steps, strict=True)))


def lagrange_weights(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """The integrals from start to end of the polynomials that are 1 at one node and 0 at the others, in float64."""
    weights = []
    for j, node in enumerate(nodes):
        others = [other for i, other in enumerate(nodes) if i != j]
        basis = Polynomial.fromroots(others) if others else Polynomial([1.0])
        integral = basis.integ()
        weights.append(float((integral(end) - integral(start)) / basis(node)))
    return weights


def _drawn(n: int, count: int, bias: float, generator: torch.Generator) -> tuple[int, ...]:
    """`count` of n steps without replacement, one after another, step i with a weight of (i + 1)^bias; ascending."""
    weights = torch.arange(1, n + 1, dtype=torch.float64).pow(bias)
    return tuple(sorted(torch.multinomial(weights, count, generator=generator).tolist()))


# --- the gradient ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChainState:
    """An executed chain."""

    x0: Tensor  # (B, C, h, w): the latents to decode
    inputs: dict[int, Tensor]  # trained step -> the network's input, (B, C, h, w), detached
    velocities: dict[int, Tensor]  # trained step -> v, (B, C, h, w)


def run_chain(
    velocity: VelocityFn,
    latents: Tensor,
    chain: Chain,
    generators: list[torch.Generator] | None = None,
    enable_grad: bool = False,
) -> ChainState:
    """Execute the chain from x_1 = `latents` (B, C, h, w); with `enable_grad` its trained steps carry gradient."""
    x0, inputs, velocities = latents, {}, {}
    for taken in rollout(
        velocity, latents, chain.sigmas, chain.steps,
        generators=generators, enable_grad=enable_grad, trained_steps=chain.train_steps, detach=True,
    ):  # fmt: skip
        if taken.index in chain.train_steps:
            inputs[taken.index], velocities[taken.index] = taken.latents.detach(), taken.velocity
        x0 = taken.next_latents
    return ChainState(x0, inputs, velocities)


# The loss of one trained step: (its index, its input x, its velocity v, the images' loss gradient at x_0) -> scalar.
StepLoss = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def detached_gradient(
    objective: Objective,
    latents: Tensor,
    generators: list[torch.Generator] | None,
    *,
    chain: Chain,
    step_loss: StepLoss,
    two_pass: bool,
) -> Tensor:
    """Accumulate the gradient of the mean of `step_loss` over the trained steps; the images' losses, (B,).

    The step losses see the gradient at the decoded latents, so that one backward pass through decoder and reward serves
    all steps.
    """
    state = run_chain(objective.velocity, latents, chain, generators, enable_grad=not two_pass)
    losses, gradient = objective.image_gradient(state.x0)
    for i in chain.train_steps:
        x = state.inputs[i]
        v = objective.velocity(x, chain.sigmas[i]) if two_pass else state.velocities.pop(i)
        objective.backward(step_loss(i, x, v, gradient))
    return losses


def chain_gradient(
    objective: Objective,
    latents: Tensor,
    generators: list[torch.Generator] | None = None,
    *,
    chain: Chain,
    two_pass: bool,
) -> Value:
    """Accumulate sum_i w_i <dL/dx_0, dv_i/dtheta> of the mean loss L, and the gradient of the penalty."""
    penalties = []

    def step_loss(i: int, x: Tensor, v: Tensor, gradient: Tensor) -> Tensor:
        penalty = objective.penalty(x, chain.sigmas[i], v) / len(chain.train_steps)
        penalties.append(penalty.detach())
        return chain.weight(i) * (gradient * v).sum() / len(x) + penalty

    losses = detached_gradient(objective, latents, generators, chain=chain, step_loss=step_loss, two_pass=two_pass)
    return Value(losses.mean(), {"kl_penalty": torch.stack(penalties).sum()})


# --- the epochs ------------------------------------------------------------------------------------------


def drawn_chain(policy: Policy, settings: Settings, generator: torch.Generator) -> Chain:
    """The executed steps of one update."""
    sample = settings.config.sample
    return executed_steps(
        policy.sigmas(sample.num_steps).tolist(),
        sde_type=sample.sde_type,
        noise_level=sample.noise_level,
        early_stop=settings.config.drtune.early_stop,
        generator=generator,
    )


def _drtune(policy: Policy, settings: Settings, generator: torch.Generator) -> Gradient:
    drtune, chain = settings.config.drtune, drawn_chain(policy, settings, generator)
    chain = equally_spaced(chain, drtune.num_train_steps, generator)
    return partial(chain_gradient, chain=chain, two_pass=drtune.two_pass)


def _refl(policy: Policy, settings: Settings, generator: torch.Generator) -> Gradient:
    chain = last_step(drawn_chain(policy, settings, generator))
    return partial(chain_gradient, chain=chain, two_pass=settings.config.drtune.two_pass)


def _flowbp(policy: Policy, settings: Settings, generator: torch.Generator) -> Gradient:
    drtune, flowbp = settings.config.drtune, settings.config.flowbp
    chain = drawn_chain(policy, settings, generator)
    chain = sparse(chain, drtune.num_train_steps, flowbp.bias, flowbp.gain, generator)
    return partial(chain_gradient, chain=chain, two_pass=drtune.two_pass)


def _flowbp_lagrange(policy: Policy, settings: Settings, generator: torch.Generator) -> Gradient:
    drtune, flowbp = settings.config.drtune, settings.config.flowbp
    chain = drawn_chain(policy, settings, generator)
    chain = lagrange(chain, flowbp.num_supports, drtune.num_train_steps, flowbp.bias, generator)
    return partial(chain_gradient, chain=chain, two_pass=drtune.two_pass)


train_epoch = partial(train_by, _drtune)
train_epoch_refl = partial(train_by, _refl)
train_epoch_flowbp = partial(train_by, _flowbp)
train_epoch_flowbp_lagrange = partial(train_by, _flowbp_lagrange)
