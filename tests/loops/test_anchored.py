"""MATH 8: the anchored gradient, against an independent regression and the closed form of Gaussian data."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from flow_grpo.loops.anchored import anchored_gradient, weight
from flow_grpo.loops.reward_gradient import Objective
from tests.loops.test_drtune import chain_of, executed
from tests.loops.tiny_net import BASE, SIGMAS, TinyNet, gradient_by, losses, noise, relative

STRENGTH = 0.7


def anchored(chain, *, per_step=False, two_pass=False, largest=0.0, kind="1-sigma"):
    weights = {i: weight(kind, chain.sigmas[i], 0.6) for i in chain.train_steps}
    method = partial(
        anchored_gradient,
        chain=chain, strength=STRENGTH, weights=weights, per_step=per_step, largest=largest, two_pass=two_pass,
    )  # fmt: skip
    return gradient_by(method)


def reference(chain, *, per_step=False, sign=-1.0, largest=0.0, kind="1-sigma"):
    net, x, states, total = TinyNet(), noise(), {}, 0.0
    with torch.no_grad():
        for i, (sigma, step) in enumerate(zip(chain.sigmas, chain.steps, strict=True)):
            states[i] = x
            x = step.a * x + step.b * net(x, sigma)

    def uphill(image):
        image = image.detach().requires_grad_()
        return torch.autograd.grad(-losses(image).sum(), image)[0]

    for i in chain.train_steps:
        sigma, v = chain.sigmas[i], net(states[i], chain.sigmas[i])
        w = {"1-sigma": 1 - sigma, "kappa": 0.6 * sigma / ((1 - sigma) ** 2 * 0.6 + sigma**2)}[kind]
        shift = STRENGTH * w * uphill(states[i] - sigma * v if per_step else x)
        if largest:
            shift = torch.stack([s * min(1.0, largest / max(s.square().mean().sqrt().item(), 1e-9)) for s in shift])
        total = total + ((v - (BASE(states[i], sigma) + sign * shift)) ** 2).mean() / len(chain.train_steps)
    total.backward()
    return net.gradient()


@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("largest", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["1-sigma", "kappa"])
def test_the_gradient_is_that_of_the_regression(two_pass, per_step, largest, kind):
    chain = chain_of("ode", 3)
    found = anchored(chain, per_step=per_step, two_pass=two_pass, largest=largest, kind=kind)[0]
    assert relative(found, reference(chain, per_step=per_step, largest=largest, kind=kind)) < 1e-9


def test_with_the_sign_of_the_shift_turned_it_is_another_gradient():
    assert relative(reference(chain_of("ode", 3), sign=1.0), anchored(chain_of("ode", 3))[0]) > 0.1


@pytest.mark.parametrize("sigma", [1.0, 0.7, 0.2])
def test_the_weights_are_what_their_names_say(sigma):
    assert weight("1", sigma) == 1
    assert weight("1-sigma", sigma) == pytest.approx(1 - sigma)
    assert weight("(1-sigma)^2", sigma) == pytest.approx((1 - sigma) ** 2)
    assert weight("kappa", sigma, 0.3) == pytest.approx(0.3 * sigma / (0.3 * (1 - sigma) ** 2 + sigma**2))


class Shifted(torch.nn.Module):
    """The exact velocity of N(0, s2 I), and a shift of its own for each step: what a linear reward asks for."""

    def __init__(self, variance):
        super().__init__()
        self.variance, self.shift = variance, torch.nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))

    def base(self, x, sigma):
        return (sigma - (1 - sigma) * self.variance) / ((1 - sigma) ** 2 * self.variance + sigma**2) * x

    def forward(self, x, sigma):
        return self.base(x, sigma) + self.shift[SIGMAS.index(sigma)]


@pytest.mark.parametrize(("kind", "reached"), [("kappa", True), ("1", False)])
def test_with_kappa_it_comes_to_rest_at_the_velocity_of_the_tilted_law(kind, reached):
    """Data N(0, s2 I), R = c.x: p exp(lambda R) is N(lambda s2 c, s2 I), whose velocity is exact in closed form."""
    s2, strength, c = 0.6, 2.0, torch.linspace(-1, 1, 8, dtype=torch.float64)
    net, chain = Shifted(s2), chain_of("ode", 6)
    objective = Objective(net, lambda x0: -(x0 @ c), net.base)
    optimizer = torch.optim.SGD(net.parameters(), lr=20.0)
    weights = {i: weight(kind, chain.sigmas[i], s2) for i in chain.train_steps}
    for _ in range(30):
        optimizer.zero_grad()
        anchored_gradient(
            objective, noise(), chain=chain, strength=strength, weights=weights,
            per_step=False, largest=0.0, two_pass=True,
        )  # fmt: skip
        optimizer.step()
    x, mean = noise(), strength * s2 * c
    for sigma in executed("ode").sigmas:
        noisy = x - (1 - sigma) * mean  # the velocity of N(mean, s2 I)
        exact = net.base(noisy, sigma) - mean
        agrees = torch.allclose(net(x, sigma), exact, rtol=1e-6, atol=1e-6)
        assert agrees == reached
