"""MATH 3: full back-propagation, against autograd through an independent rollout without checkpoints."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from flow_grpo.loops.draft import attached_gradient, checkpointed, low_variance_gradient
from tests.loops.test_drtune import KINDS, executed
from tests.loops.tiny_net import BASE, SIGMAS, TinyNet, generators, gradient_by, losses, noise, relative, step_noise


def autograd_gradient(kind, first, *, beta=0.0, detach=False, end=6):
    """Of the mean loss, every step before `first` held."""
    net, x, draws, chain, total = TinyNet(), noise(), generators(), executed(kind), 0.0
    for i, (sigma, step) in enumerate(zip(chain.sigmas, chain.steps, strict=True)):
        v = net(x.detach() if detach else x, sigma)
        if i < first:
            v = v.detach()
        else:
            total = total + beta * (v - BASE(x.detach(), sigma)).square().mean() / (end - first)
        x = step.a * x + step.b * v
        if step.s > 0:
            x = x + step.s * step_noise(draws)
    (losses(x).mean() + total).backward()
    return net.gradient()


def attached(kind, first, beta=0.0):
    return gradient_by(partial(attached_gradient, chain=executed(kind), first=first), beta)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [0, 3, 5])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_gradient_is_autograds_through_every_step_from_the_first_trained_one(kind, first, beta):
    reference = autograd_gradient(kind, first, beta=beta)
    assert relative(attached(kind, first, beta), reference) < 1e-10


def test_with_a_detached_input_it_is_another_gradient():
    assert relative(autograd_gradient("ode", 2, detach=True), attached("ode", 2)) > 0.05


def test_the_expectation_over_alignprops_first_steps_is_their_mean():
    """Every step is as likely to be the first: the mean of the six gradients, which autograd gives too."""
    found = torch.stack([attached("ode", first) for first in range(6)]).mean(0)
    expected = torch.stack([autograd_gradient("ode", first) for first in range(6)]).mean(0)
    assert relative(found, expected) < 1e-10


def test_a_checkpointed_velocity_has_the_same_value_and_gradient():
    plain, kept = TinyNet(), TinyNet()
    plain(noise(), 0.5).square().sum().backward()
    checkpointed(kept)(noise(), 0.5).square().sum().backward()
    assert torch.equal(plain.gradient(), kept.gradient())


def low_variance_reference(copies, level=SIGMAS[5]):
    net, draws, x = TinyNet(), generators(), noise()
    with torch.no_grad():
        for i in range(6):
            x = x + (SIGMAS[i + 1] - SIGMAS[i]) * net(x, SIGMAS[i])
    for _ in range(copies):
        renoised = (1 - level) * x + level * step_noise(draws)
        (losses(renoised - level * net(renoised, level)).mean() / copies).backward()
    return net.gradient()


@pytest.mark.parametrize("copies", [1, 3])
def test_draft_lv_averages_the_last_step_over_copies_that_are_noised_again(copies):
    found = gradient_by(partial(low_variance_gradient, chain=executed("ode"), copies=copies))[0]
    assert relative(found, low_variance_reference(copies)) < 1e-10
    assert relative(low_variance_reference(copies, SIGMAS[4]), found) > 0.05  # the broken twin: another level
