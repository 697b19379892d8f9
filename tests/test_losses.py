"""MATH 2 and 3: the losses, against closed forms, values and gradients."""

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from flow_grpo.losses import (
    finite_difference_log_ratio,
    finite_difference_loss,
    gaussian_kl,
    normalized_log_ratio,
    policy_loss,
    reward_losses,
    velocity_kl,
)

GENERATOR = torch.Generator().manual_seed(0)
MEAN, MEAN_OLD, Z = (torch.randn(3, 4, 8, 8, generator=GENERATOR, dtype=torch.float64) for _ in range(3))


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_policy_loss_equals_the_clipped_formula_case_by_case():
    """Ratio above and below the clip range, advantage of either sign: which branch the maximum takes."""
    log_ratio, advantages = numbers(1.3, 0.5, 1.3, 0.5, 1.05).log(), numbers(2.0, 2.0, -2.0, -2.0, 1.0)
    expected = numbers(-2 * 1.1, -2 * 0.5, 2 * 1.3, 2 * 0.9, -1.05).mean()
    torch.testing.assert_close(policy_loss(log_ratio, advantages, 0.1).loss, expected, rtol=1e-12, atol=0)


def test_policy_gradient_is_minus_a_r_where_not_clipped_and_zero_where_clipped():
    log_ratio = numbers(1.3, 0.5, 1.3, 0.5).log().requires_grad_()
    policy_loss(log_ratio, numbers(2.0, 2.0, -2.0, -2.0), 0.1).loss.backward()
    torch.testing.assert_close(log_ratio.grad, numbers(0.0, -2 * 0.5, 2 * 1.3, 0.0) / 4, rtol=1e-12, atol=1e-15)


def test_taking_the_minimum_instead_of_the_maximum_differs():
    log_ratio, advantages = numbers(1.3, 0.5).log(), numbers(2.0, -2.0)
    ratio = log_ratio.exp()
    broken = torch.minimum(-advantages * ratio, -advantages * ratio.clamp(0.9, 1.1)).mean()
    assert abs(policy_loss(log_ratio, advantages, 0.1).loss - broken) > 0.1


def test_policy_statistics():
    result = policy_loss(numbers(1.3, 1.0, 0.5).log(), numbers(1.0, 1.0, 1.0), 0.1)
    assert result.clip_fraction.item() == pytest.approx(2 / 3)
    assert result.ratio_mean.item() == pytest.approx(2.8 / 3)
    torch.testing.assert_close(result.approx_kl, 0.5 * numbers(1.3, 1.0, 0.5).log().square().mean())


def test_gaussian_kl_equals_torchs_per_dimension():
    exact = kl_divergence(Independent(Normal(MEAN, 0.3), 3), Independent(Normal(MEAN_OLD, 0.3), 3)) / MEAN[0].numel()
    torch.testing.assert_close(gaussian_kl(MEAN, MEAN_OLD, 0.3), exact.mean(), rtol=1e-12, atol=0)


def test_gaussian_kl_has_its_gradient_in_the_mean():
    mean = MEAN.clone().requires_grad_()
    gaussian_kl(mean, MEAN_OLD, 0.3).backward()
    torch.testing.assert_close(mean.grad, (MEAN - MEAN_OLD) / 0.3**2 / MEAN.numel(), rtol=1e-12, atol=1e-15)


def test_upstreams_kl_without_dt_weighs_differently():
    """With s = g sqrt(-dt), upstream divides by 2 g^2 only: -dt times our value."""
    g, dt = 0.9, -0.1
    upstream = (MEAN - MEAN_OLD).square().mean() / (2 * g**2)
    torch.testing.assert_close(upstream, -dt * gaussian_kl(MEAN, MEAN_OLD, g * (-dt) ** 0.5), rtol=1e-12, atol=0)


def test_velocity_kl_is_the_mean_squared_difference():
    torch.testing.assert_close(velocity_kl(MEAN, MEAN_OLD), ((MEAN - MEAN_OLD) ** 2).mean(), rtol=1e-12, atol=0)


def test_the_normalised_ratio_is_centred_noise_times_drift():
    """x' = mu_old + s z: the per-dimension log-ratio becomes mean(z (mu - mu_old)), whatever s."""
    for s in (0.05, 0.3, 0.9):
        outcome = MEAN_OLD + s * Z
        log_ratio = Normal(MEAN, s).log_prob(outcome) - Normal(MEAN_OLD, s).log_prob(outcome)
        value = normalized_log_ratio(log_ratio.flatten(1).mean(1), MEAN, MEAN_OLD, s)
        torch.testing.assert_close(value, (Z * (MEAN - MEAN_OLD)).flatten(1).mean(1), rtol=1e-9, atol=1e-12)


def test_the_normalised_ratio_without_its_drift_term_is_biased():
    s = 0.05
    log_ratio = (Normal(MEAN, s).log_prob(MEAN_OLD) - 0 * MEAN).flatten(1).mean(1)  # z = 0: the centred value is 0
    log_ratio = log_ratio - Normal(MEAN_OLD, s).log_prob(MEAN_OLD).flatten(1).mean(1)
    torch.testing.assert_close(normalized_log_ratio(log_ratio, MEAN, MEAN_OLD, s), torch.zeros(3).double())
    assert (s * log_ratio).abs().min() > 1


def test_an_images_loss_is_its_negative_reward():
    rewards = numbers(0.2, 0.6, 1.0).requires_grad_()
    losses = reward_losses(rewards)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([-0.2, -0.6, -1.0])
    assert rewards.grad.tolist() == [-1.0] * 3


def test_the_hinge_stops_at_its_reward():
    rewards = numbers(0.2, 0.6, 1.0).requires_grad_()
    losses = reward_losses(rewards, hinge=0.7)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0.5, 0.1, 0.0])
    assert rewards.grad.tolist() == [-1.0, -1.0, 0.0]


# --- FDFO ------------------------------------------------------------------------------------------------


def fdfo_reference(velocity, gain, epsilon, side=-1.0):
    """With v* and both squared distances written out: v* = MEAN_OLD - Z / mean(Z^2)."""
    total = torch.zeros((), dtype=torch.float64)
    for v, old, delta, d_reward in zip(velocity, MEAN_OLD, Z, gain, strict=True):
        goal = old + side * delta / delta.square().mean()
        r = (-(v - goal).square().mean() + (old - goal).square().mean()).exp()
        total = total - d_reward * r + abs(d_reward) / (2 * epsilon) * (r - 1) ** 2
    return total


def with_gradient(function, velocity):
    v = velocity.clone().requires_grad_()
    value = function(v)
    return value.detach(), torch.autograd.grad(value, v)[0]


@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_the_finite_difference_loss_equals_its_formula(scale):
    gain, velocity = numbers(0.3, -0.2, 0.1), MEAN_OLD + scale * MEAN
    found = with_gradient(
        lambda v: finite_difference_loss(finite_difference_log_ratio(v, MEAN_OLD, Z), gain, 0.03).sum(), velocity
    )
    for a, b in zip(found, with_gradient(lambda v: fdfo_reference(v, gain, 0.03), velocity), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    _, broken = with_gradient(lambda v: fdfo_reference(v, gain, 0.03, side=1.0), velocity)
    assert (broken - found[1]).abs().max() > 1e-3 * found[1].abs().max()


def test_at_the_old_velocity_the_ratio_is_exactly_one_and_the_gradient_is_the_finite_difference():
    """dR Delta / mean(Delta^2) per dimension, doubled by the square: raising the reward lowers v along Delta."""
    gain = numbers(0.3, -0.2, 0.1)
    assert (finite_difference_log_ratio(MEAN_OLD, MEAN_OLD, Z) == 0).all()
    _, found = with_gradient(
        lambda v: finite_difference_loss(finite_difference_log_ratio(v, MEAN_OLD, Z), gain, 0.03).sum(), MEAN_OLD
    )
    estimate = gain[:, None, None, None] * Z / Z.square().flatten(1).mean(1)[:, None, None, None]
    torch.testing.assert_close(found, 2 * estimate / Z[0].numel(), rtol=1e-9, atol=1e-15)


def test_the_finite_difference_loss_is_at_rest_at_one_plus_or_minus_epsilon():
    log_ratio = numbers(1.03, 0.97).log().requires_grad_()
    finite_difference_loss(log_ratio, numbers(0.5, -0.5), 0.03).sum().backward()
    assert log_ratio.grad.abs().max() < 1e-12
