"""MATH 9: losses at noised images, in float64 against references written out element by element."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flow_grpo.forward_process import (
    Velocities,
    awm_loss,
    log_probs,
    nft_loss,
    noised,
    par_loss,
    pepg_loss,
    stratified_times,
)
from flow_grpo.randomness import keyed_generator

GENERATOR = torch.Generator().manual_seed(0)
V, OLD, TARGET = (torch.randn(3, 2, 2, 2, generator=GENERATOR, dtype=torch.float64) for _ in range(3))
T, BETA, CLIP = 0.3, 0.7, 0.2
RHO = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
A = torch.tensor([0.4, 0.1, -0.6], dtype=torch.float64)
WEIGHTS = pytest.mark.parametrize("weight", ["1", "t", "adaptive"])


def at(velocity: Tensor) -> Velocities:
    return Velocities(velocity, OLD, TARGET, T)


def value_and_gradient(loss):
    """Of a function of the trained velocity, at V."""
    v = V.clone().requires_grad_()
    value = loss(v)
    return value.detach(), torch.autograd.grad(value, v)[0]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def differs(found, expected) -> bool:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)) > 1e-3


def weighted(error: Tensor, scale: Tensor, weight: str) -> Tensor:
    """w |error|^2 of one image, the adaptive w from the numbers of `scale`."""
    squares = sum(e**2 for e in error.flatten()) / error.numel()
    if weight == "adaptive":
        size = sum(abs(e.item()) for e in scale.flatten()) / scale.numel()
        return (T * T) * squares / (T * size)
    return squares * (T if weight == "t" else 1.0)


# --- NFT -------------------------------------------------------------------------------------------------


def nft_reference(v: Tensor, weight: str, sign: float = 1.0) -> Tensor:
    """Image by image, from the interpolated velocities."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        plus = (1 - BETA) * OLD[i] + BETA * v[i] - TARGET[i]
        minus = (1 + sign * BETA) * OLD[i] - sign * BETA * v[i] - TARGET[i]
        total = total + RHO[i] * weighted(plus, plus, weight) + (1 - RHO[i]) * weighted(minus, minus, weight)
    return total / 3


@WEIGHTS
def test_nft_equals_its_two_weighted_regressions(weight):
    found = value_and_gradient(lambda v: nft_loss(at(v), RHO, BETA, weight))
    assert_same(found, value_and_gradient(lambda v: nft_reference(v, weight)))
    assert differs(found, value_and_gradient(lambda v: nft_reference(v, weight, sign=-1.0)))  # the broken twin


@pytest.mark.parametrize("weight", ["1", "t"])
def test_nft_is_one_regression_of_the_change_and_a_constant(weight):
    """beta^2 |dv - ((2 rho - 1) / beta) d|^2, d = u - v_old: the same gradient, and values apart by a constant."""
    w, d = {"1": 1.0, "t": T}[weight], TARGET - OLD

    def square(v, power=2):
        goal = ((2 * RHO - 1) / BETA)[:, None, None, None] * d
        return w * BETA**power * (v - OLD - goal).square().mean()

    found = value_and_gradient(lambda v: nft_loss(at(v), RHO, BETA, weight))
    expected = value_and_gradient(square)
    assert_same(found[1:], expected[1:])
    there, here = (nft_loss(at(v), RHO, BETA, weight) - square(v) for v in (V, OLD))
    torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-12)
    assert differs(found[1:], value_and_gradient(lambda v: square(v, power=1))[1:])


def test_an_image_of_no_advantage_holds_nft_to_the_old_velocity():
    half = torch.full((3,), 0.5, dtype=torch.float64)
    v = OLD.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nft_loss(at(v), half, BETA), v)
    assert gradient.abs().max() < 1e-15


# --- AWM, PEPG, PAR --------------------------------------------------------------------------------------


def log_prob_reference(v: Tensor, weight: str, sign: float = -1.0) -> Tensor:
    return torch.stack([sign * weighted(v[i] - TARGET[i], OLD[i] - TARGET[i], weight) for i in range(3)])


@WEIGHTS
def test_log_probs_are_weighted_errors_and_equal_at_the_old_velocity(weight):
    found = value_and_gradient(lambda v: (A * log_probs(at(v), weight)[0]).sum())
    assert_same(found, value_and_gradient(lambda v: (A * log_prob_reference(v, weight)).sum()))
    assert differs(found, value_and_gradient(lambda v: (A * log_prob_reference(v, weight, sign=1.0)).sum()))
    new, old = log_probs(at(OLD), weight)
    assert torch.equal(new, old)


LOSSES = {
    "awm": (
        lambda v, w: awm_loss(*log_probs(at(v), w), A, CLIP).loss,
        lambda p, o: sum(
            max(-a * (x - y).exp(), -a * (x - y).exp().clamp(1 - CLIP, 1 + CLIP), key=lambda z: z.item())
            for x, y, a in zip(p, o, A, strict=True)
        ),
    ),
    "pepg": (
        lambda v, w: pepg_loss(*log_probs(at(v), w), A),
        lambda p, o: sum(-(a - (x - y).item()) * math.exp((x - y).item()) * x for x, y, a in zip(p, o, A, strict=True)),
    ),
    "par": (
        lambda v, w: par_loss(*log_probs(at(v), w), A),
        lambda p, o: sum(0.5 * math.exp((x - y).item()) * (a - (x - y)) ** 2 for x, y, a in zip(p, o, A, strict=True)),
    ),
}


@WEIGHTS
@pytest.mark.parametrize("method", list(LOSSES))
def test_every_loss_equals_its_formula_image_by_image(method, weight):
    loss, formula = LOSSES[method]

    def reference(v, sign=-1.0):
        return formula(log_prob_reference(v, weight, sign), log_prob_reference(OLD, weight, sign)) / 3

    found = value_and_gradient(lambda v: loss(v, weight))
    assert_same(found, value_and_gradient(reference))
    assert differs(found, value_and_gradient(lambda v: reference(v, sign=1.0)))  # the broken twin


@WEIGHTS
@pytest.mark.parametrize("method", list(LOSSES))
def test_at_the_old_velocity_every_gradient_is_that_of_the_advantage_weighted_error(method, weight):
    """A w |v - u|^2, the plain form of AWM."""
    v = OLD.clone().requires_grad_()
    (found,) = torch.autograd.grad(LOSSES[method][0](v, weight), v)
    (expected,) = torch.autograd.grad(-(A * log_prob_reference(v, weight)).mean(), v)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_pepg_and_par_have_the_same_gradient():
    found = [value_and_gradient(lambda v, m=m: LOSSES[m][0](v, "1"))[1] for m in ("pepg", "par")]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-15)


def test_with_the_ratio_not_detached_par_would_have_another():
    def broken(v):
        new, old = log_probs(at(v), "1")
        return ((new - old).exp() * (A - (new - old)).square()).mean() / 2

    assert differs(value_and_gradient(broken)[1:], value_and_gradient(lambda v: LOSSES["par"][0](v, "1"))[1:])


# --- where they come to rest -----------------------------------------------------------------------------

COUNTS = torch.tensor([1, 2, 3, 2])  # samples of four states: p_old to the letter
REWARD = torch.tensor([1.0, 0.2, -0.5, 0.3], dtype=torch.float64)


def gradient_in_logits(loss, logits: Tensor) -> Tensor:
    """Of the loss over the samples of p_old, for the law softmax(logits) of four states."""
    states = torch.arange(4).repeat_interleave(COUNTS)
    logits = logits.clone().requires_grad_()
    old = (COUNTS / COUNTS.sum()).double().log()
    reward = REWARD - (COUNTS * REWARD).sum() / COUNTS.sum()
    value = loss(logits.log_softmax(0)[states], old[states], reward[states])
    return torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("loss", [pepg_loss, par_loss])
def test_pepg_and_par_are_at_rest_at_the_tilted_law_and_come_there(loss):
    """Four states: p_old exp(A), normalised, without a normaliser in the loss."""
    tilted = (COUNTS.double().log() + REWARD).softmax(0)
    assert gradient_in_logits(loss, tilted.log()).abs().max() < 1e-12
    assert gradient_in_logits(loss, COUNTS.double().log()).abs().max() > 1e-2
    logits = torch.zeros(4, dtype=torch.float64)
    for _ in range(400):
        logits -= 2.0 * gradient_in_logits(loss, logits)
    torch.testing.assert_close(logits.softmax(0), tilted, rtol=1e-6, atol=0)


def test_a_plain_policy_gradient_is_not_at_rest_there():
    """The broken twin: without log r in it the law goes on to the best state."""

    def plain(log_prob, old, advantages):
        return -(advantages * (log_prob - old).exp()).mean()

    assert gradient_in_logits(plain, COUNTS.double().log() + REWARD).abs().max() > 1e-2


# --- points ----------------------------------------------------------------------------------------------


def test_a_point_mixes_image_and_noise_and_knows_the_velocity_between_them():
    point = noised(V, OLD, 0.25)
    torch.testing.assert_close(point.latents, 0.75 * V + 0.25 * OLD)
    torch.testing.assert_close(point.latents - 0.25 * point.target, V, rtol=1e-12, atol=1e-14)


def test_times_fill_their_strata():
    times = stratified_times(8, keyed_generator(0, "test"))
    assert all(k / 8 <= t < (k + 1) / 8 for k, t in enumerate(times))
