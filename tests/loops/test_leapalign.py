"""MATH 8: the gradient through two leaps, against autograd with straight-through values written out."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from flow_grpo.loops.leapalign import leap_gradient
from tests.loops.test_drtune import executed
from tests.loops.tiny_net import BASE, SIGMAS, TinyNet, gradient_by, losses, noise, relative


class Replaced(torch.autograd.Function):
    """The value of the second, the gradient of the first."""

    @staticmethod
    def forward(ctx, leapt, value):
        return value.clone()

    @staticmethod
    def backward(ctx, slope):
        return slope, None


class Scaled(torch.autograd.Function):
    """The value as it is, the gradient times alpha."""

    @staticmethod
    def forward(ctx, value, alpha):
        ctx.alpha = alpha
        return value.clone()

    @staticmethod
    def backward(ctx, slope):
        return ctx.alpha * slope, None


def reference(k, j, *, alpha=0.3, tau=0.1, beta=0.0):
    net, states = TinyNet(), [noise()]
    with torch.no_grad():
        for i in range(6):
            states.append(states[-1] + (SIGMAS[i + 1] - SIGMAS[i]) * net(states[-1], SIGMAS[i]))
    v_k = net(states[k], SIGMAS[k])
    leapt_j = states[k] + (SIGMAS[j] - SIGMAS[k]) * v_k
    x_j = Replaced.apply(leapt_j, states[j])
    v_j = net(Scaled.apply(x_j, alpha), SIGMAS[j])
    leapt_0 = x_j - SIGMAS[j] * v_j
    x_0 = Replaced.apply(leapt_0, states[6])
    errors = [(a - b).detach().abs().mean(1).clamp(min=tau) for a, b in ((states[j], leapt_j), (states[6], leapt_0))]
    total = (losses(x_0) / sum(errors)).mean()
    for v, i in ((v_k, k), (v_j, j)):
        total = total + beta / 2 * (v - BASE(states[i], SIGMAS[i])).square().mean()
    total.backward()
    return net.gradient()


def leap(k, j, *, alpha=0.3, tau=0.1, beta=0.0):
    method = partial(leap_gradient, chain=executed("ode"), first=k, second=j, alpha=alpha, tau=tau)
    return gradient_by(method, beta)[0]


@pytest.mark.parametrize(("k", "j"), itertools.combinations(range(6), 2))
def test_the_gradient_is_that_of_the_two_leaps_at_the_rollouts_values(k, j):
    assert relative(leap(k, j), reference(k, j)) < 1e-9


def test_the_penalty_is_that_of_the_two_velocities():
    """Held at the rollout's states in the reference; here v_j is seen through the second leap's input."""
    assert relative(leap(1, 3, alpha=0.0, beta=0.4), reference(1, 3, alpha=0.0, beta=0.4)) < 1e-9


@pytest.mark.parametrize("broken", [{"alpha": 1.0}, {"alpha": 0.0}, {"tau": 10.0}])
def test_another_share_of_the_second_input_or_another_floor_of_the_errors_is_another_gradient(broken):
    assert relative(reference(1, 3, **broken), leap(1, 3)) > 0.01
