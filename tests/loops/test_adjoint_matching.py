"""MATH 8: Adjoint Matching, against independent autograd and the closed form of Gaussian data."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from flow_grpo.loops.adjoint_matching import _adjoint_matching, adjoint_gradient, trained_steps
from flow_grpo.loops.reward_gradient import Objective
from tests.conftest import by_method
from tests.loops.test_anchored import Shifted
from tests.loops.test_drtune import executed
from tests.loops.tiny_net import BASE, TinyNet, generators, gradient_by, losses, noise, relative, step_noise

STRENGTH = 0.4


def chain_of(*trained):
    return replace(executed("memoryless"), train_steps=trained)


def adjoint(chain, largest=0.0):
    return gradient_by(partial(adjoint_gradient, chain=chain, strength=STRENGTH, largest=largest))


def reference(chain, *, largest=float("inf"), sign=-1.0, tuned=False):
    """The adjoint of each state is the gradient of lambda * loss through the base's own steps, by one autograd call."""
    net, x, draws, states, drawn = TinyNet(), noise(), generators(), [], []
    with torch.no_grad():
        for sigma, step in zip(chain.sigmas, chain.steps, strict=True):
            states.append(x)
            drawn.append(step.s * step_noise(draws) if step.s > 0 else 0.0)
            x = step.a * x + step.b * net(x, sigma) + drawn[-1]
    image = x.requires_grad_()
    (slope,) = torch.autograd.grad(losses(image).sum(), image)
    adjoints, total = [-sign * STRENGTH * slope], 0.0
    for i in reversed(range(6)):
        state = states[i].clone().requires_grad_()
        after = chain.steps[i].a * state + chain.steps[i].b * (net if tuned else BASE)(state, chain.sigmas[i])
        adjoints.insert(0, torch.autograd.grad((after * adjoints[0]).sum(), state)[0])
    for i in chain.train_steps:
        sigma, step = chain.sigmas[i], chain.steps[i]
        change = sigma / (1 - sigma) * adjoints[i] if sigma < 1 else -(step.s**2) / step.b * adjoints[i + 1]
        g = (2 * sigma / (1 - sigma)) ** 0.5 if sigma < 1 else (2 * step.s**2 / -step.b) ** 0.5
        terms = ((2 / g) * (net(states[i], sigma) - BASE(states[i], sigma)) - (2 / g) * change).square().sum(1)
        total = total + terms[terms < largest * STRENGTH**2].sum() / 5 / len(chain.train_steps)
    total.backward()
    return net.gradient()


@pytest.mark.parametrize("trained", [(0, 1, 2, 3, 4, 5), (1, 4, 5), (0, 5), (2,)])
def test_the_gradient_is_that_of_the_regression_onto_the_lean_adjoint(trained):
    assert relative(adjoint(chain_of(*trained))[0], reference(chain_of(*trained))) < 1e-9


@pytest.mark.parametrize("broken", [{"sign": 1.0}, {"tuned": True}])
def test_a_turned_sign_or_an_adjoint_through_the_tuned_model_is_another_gradient(broken):
    chain = chain_of(1, 4, 5)
    assert relative(reference(chain, **broken), adjoint(chain)[0]) > 0.01


def test_terms_that_are_too_large_teach_nothing_and_their_share_is_told():
    chain = chain_of(1, 4, 5)
    found, value = adjoint(chain, largest=60.0)
    assert 0 < value.shares["adjoint_cut"] < 1
    assert relative(found, reference(chain, largest=60.0)) < 1e-9
    assert relative(found, adjoint(chain)[0]) > 0.01


def _product(velocity):
    def product(x, sigma, cotangent):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            v = velocity(x, sigma)
            return v.detach(), torch.autograd.grad(v, x, cotangent)[0]

    return product


def test_its_target_is_the_exact_tilted_velocity_of_gaussian_data_at_six_steps():
    """Data N(0, s2 I), R = c.x: v_base - lambda kappa c at every level but 1, where the step's own optimum stands."""
    s2, strength, c = 0.6, 2.0, torch.linspace(-1, 1, 8, dtype=torch.float64)
    net, chain = Shifted(s2), chain_of(*range(6))
    objective = Objective(net, lambda x0: -(x0 @ c), net.base, _product(net.base))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.985**step
        optimizer.zero_grad()
        adjoint_gradient(objective, noise(), generators(), chain=chain, strength=strength)
        optimizer.step()
    for i, sigma in enumerate(chain.sigmas):
        kappa = s2 * sigma / ((1 - sigma) ** 2 * s2 + sigma**2)
        found = -net.shift[i].detach() / (strength * c)
        expected = torch.full_like(c, kappa)
        torch.testing.assert_close(found, expected, rtol=0.03 if i == 0 else 5e-3, atol=0)


def test_all_late_steps_and_some_early_ones_are_trained():
    seen = set()
    for seed in range(50):
        steps = trained_steps(10, 5, torch.Generator().manual_seed(seed))
        assert steps[2:] == (7, 8, 9)
        assert len(set(steps)) == 5
        assert list(steps) == sorted(steps)
        seen |= set(steps)
    assert seen == set(range(10))


def test_the_settings_reach_the_gradient(config, build):
    by_method(config, "adjoint_matching")
    config.adjoint.strength, config.adjoint.largest_term, config.drtune.num_train_steps = 7.0, 0.9, 2
    parts = build(config)
    found = _adjoint_matching(parts.policy, parts.settings, torch.Generator().manual_seed(0)).keywords
    assert (found["strength"], found["largest"], len(found["chain"].train_steps)) == (7.0, 0.9, 2)
