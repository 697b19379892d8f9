"""MATH 1: one step's outcome and log-probability."""

import math

import pytest
import torch

from flow_grpo.diffusers_patch.sd3_sde_with_logprob import sde_step_with_logprob, step_log_prob
from flow_grpo.diffusers_patch.step import step_coefficients

SHAPE = (3, 4, 8, 8)


def draw(seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("kind", ["sde", "dance"])
def test_log_prob_equals_torchs_normal_averaged_over_dimensions(kind):
    x, v, z = draw()
    step = sde_step_with_logprob(x, v, 0.6, 0.5, noise_level=0.7, sde_type=kind, noise=z)
    expected = torch.distributions.Normal(step.mean, step.std).log_prob(step.latents).flatten(1).mean(1)
    torch.testing.assert_close(step.log_prob, expected, rtol=1e-12, atol=1e-12)


def test_log_prob_of_cps_is_minus_the_mean_squared_noise():
    x, v, z = draw()
    step = sde_step_with_logprob(x, v, 0.6, 0.5, noise_level=0.7, sde_type="cps", noise=z)
    torch.testing.assert_close(step.log_prob, -(step.std * z).square().flatten(1).mean(1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["sde", "dance", "cps"])
def test_the_outcome_is_a_x_plus_b_v_plus_s_z(kind):
    x, v, z = draw()
    step = step_coefficients(kind, 0.6, 0.5, 0.7)
    result = sde_step_with_logprob(x, v, 0.6, 0.5, noise_level=0.7, sde_type=kind, noise=z)
    torch.testing.assert_close(result.latents, step.a * x + step.b * v + step.s * z, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["sde", "dance", "cps"])
def test_scoring_a_drawn_outcome_gives_its_log_prob_exactly(kind):
    x, v, z = draw(dtype=torch.float32)
    drawn = sde_step_with_logprob(x, v, 0.6, 0.5, noise_level=0.7, sde_type=kind, noise=z)
    scored = sde_step_with_logprob(x, v, 0.6, 0.5, noise_level=0.7, sde_type=kind, next_latents=drawn.latents)
    assert torch.equal(drawn.log_prob, scored.log_prob)


@pytest.mark.parametrize("kind", ["sde", "dance", "cps"])
def test_gradient_of_log_prob_in_the_velocity_equals_the_closed_form(kind):
    """d log p / d v = b (x' - mean) / (s^2 D); for cps, without the variance, 2 b (x' - mean) / D."""
    x, v, z = draw()
    v.requires_grad_()
    step = step_coefficients(kind, 0.6, 0.5, 0.7)
    target = (step.a * x + step.b * v + step.s * z).detach()
    result = sde_step_with_logprob(x, v, 0.6, 0.5, noise_level=0.7, sde_type=kind, next_latents=target)
    (gradient,) = torch.autograd.grad(result.log_prob.sum(), v)
    scale = 2.0 if kind == "cps" else 1 / step.s**2
    torch.testing.assert_close(gradient, scale * step.b * step.s * z / x[0].numel(), rtol=1e-10, atol=1e-14)


def test_bfloat16_inputs_are_computed_in_float32():
    x, v, z = (t.bfloat16() for t in draw())
    low = sde_step_with_logprob(x, v, 0.6, 0.5, noise_level=0.7, noise=z)
    high = sde_step_with_logprob(x.float(), v.float(), 0.6, 0.5, noise_level=0.7, noise=z.float())
    assert low.mean.dtype == torch.float32
    assert torch.equal(low.mean, high.mean)


@pytest.mark.parametrize(("kind", "sigma_next"), [("ode", 0.5), ("cps", 0.0)])
def test_a_step_without_noise_has_no_log_prob(kind, sigma_next):
    x, v, z = draw()
    with pytest.raises(ValueError, match="no log-probability"):
        sde_step_with_logprob(x, v, 0.6, sigma_next, noise_level=0.7, sde_type=kind, noise=z)


def test_noise_and_next_latents_exclude_each_other():
    x, v, z = draw()
    for given in ({}, {"noise": z, "next_latents": x}):
        with pytest.raises(ValueError, match="exactly one"):
            sde_step_with_logprob(x, v, 0.6, 0.5, noise_level=0.7, **given)


def test_log_prob_is_a_mean_not_a_sum():
    x, mean, _ = draw()
    per_dimension = -0.5 * (x - mean).square() / 0.3**2 - math.log(0.3) - 0.5 * math.log(2 * math.pi)
    value = step_log_prob(x, mean, 0.3, "sde")
    torch.testing.assert_close(value, per_dimension.flatten(1).mean(1), rtol=1e-12, atol=0)
    assert not torch.allclose(value, per_dimension.flatten(1).sum(1))
