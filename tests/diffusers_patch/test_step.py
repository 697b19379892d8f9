"""MATH 1: the step coefficients, against independent formulas and by what they do to a distribution."""

import itertools
import math

import numpy as np
import pytest

from flow_grpo.diffusers_patch.step import STEPS, StepCoefficients, step_coefficients

LEVELS = [(1.0, 0.9), (0.9, 0.8), (0.5, 0.31), (0.1, 0.0)]


def reference(kind: str, sigma: float, sigma_next: float, eta: float) -> tuple[float, float, float]:
    """x' = a x + b v + s z by applying the update rules to the unit vectors (x, v) = (1, 0) and (0, 1)."""
    dt = np.float64(sigma_next) - np.float64(sigma)

    def update(x: float, v: float) -> float:
        x0_hat, e_hat = x - sigma * v, x + (1 - sigma) * v
        if kind == "cps":
            noise = sigma_next * np.sin(eta * np.pi / 2)
            return (1 - sigma_next) * x0_hat + np.sqrt(sigma_next**2 - noise**2) * e_hat
        score = -e_hat / sigma
        drift = v - 0.5 * diffusion**2 * score
        return x + drift * dt

    diffusion = eta if kind == "dance" else eta * np.sqrt(sigma / (1 - (sigma_next if sigma == 1 else sigma)))
    s = sigma_next * np.sin(eta * np.pi / 2) if kind == "cps" else diffusion * np.sqrt(-dt)
    return update(1.0, 0.0), update(0.0, 1.0), s


@pytest.mark.parametrize("kind", ["sde", "dance", "cps"])
@pytest.mark.parametrize(("sigma", "sigma_next"), LEVELS)
@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_coefficients_equal_a_float64_reference(kind, sigma, sigma_next, eta):
    step = step_coefficients(kind, sigma, sigma_next, eta)
    assert (step.a, step.b, step.s) == pytest.approx(reference(kind, sigma, sigma_next, eta), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("kind", [kind for kind in STEPS if kind != "memoryless"])  # which has no eta
@pytest.mark.parametrize(("sigma", "sigma_next"), LEVELS)
def test_without_noise_every_kind_is_exactly_the_euler_step(kind, sigma, sigma_next):
    assert step_coefficients(kind, sigma, sigma_next, 0.0) == StepCoefficients(1.0, sigma_next - sigma, 0.0)


def test_cps_preserves_the_coefficients():
    """With x = (1 - sigma) x_0 + sigma e and v = e - x_0, x' = (1 - sigma') x_0 + q e + s z, q^2 + s^2 = sigma'^2."""
    for sigma, sigma_next in LEVELS:
        step = step_coefficients("cps", sigma, sigma_next, 0.6)
        signal, noise = step.a * (1 - sigma) - step.b, step.a * sigma + step.b
        assert signal == pytest.approx(1 - sigma_next, abs=1e-12)
        assert noise**2 + step.s**2 == pytest.approx(sigma_next**2, abs=1e-12)


@pytest.mark.parametrize(("sigma", "sigma_next"), LEVELS)
def test_a_memoryless_step_is_gaussian_conditioning_on_the_predicted_image(sigma, sigma_next):
    """x = r x' + noise of variance sigma^2 - r^2 sigma'^2, x' ~ N((1 - sigma') x_0, sigma'^2): a 2-d normal."""
    r = (1 - sigma) / (1 - sigma_next)
    covariance, variance = r * sigma_next**2, sigma**2
    step = step_coefficients("memoryless", sigma, sigma_next, 0.7)
    for x, v in ((1.0, 0.0), (0.0, 1.0)):
        x0 = x - sigma * v
        mean = (1 - sigma_next) * x0 + covariance / variance * (x - (1 - sigma) * x0)
        assert step.a * x + step.b * v == pytest.approx(mean, abs=1e-13)
    assert step.s**2 == pytest.approx(sigma_next**2 - covariance**2 / variance, abs=1e-13)


def test_a_memoryless_step_forgets_pure_noise_and_ends_without_noise():
    first, last = step_coefficients("memoryless", 1.0, 0.9, 0.0), step_coefficients("memoryless", 0.1, 0.0, 0.0)
    assert first.a + first.b == pytest.approx(0, abs=1e-15)  # x' sees only x0_hat = x - v
    assert first.s == pytest.approx(0.9)
    assert last == StepCoefficients(1.0, -0.1, 0.0)


def test_short_memoryless_steps_have_the_noise_of_their_sde():
    for sigma in (0.2, 0.5, 0.9):
        s = step_coefficients("memoryless", sigma, sigma - 1e-7, 0.0).s
        assert s**2 / 1e-7 == pytest.approx(2 * sigma / (1 - sigma), rel=1e-5)


def covariance_error(coefficients, kind: str, eta: float, num_steps: int) -> float:
    """Largest error of mean and covariance of x_0 when x_1 ~ N(0, I) is pushed through a 4-d Gaussian flow, exactly.

    For data N(m, S) the velocity is affine in x (MATH 4), so every step maps a Gaussian to a Gaussian.
    """
    rng = np.random.default_rng(0)
    root = rng.standard_normal((4, 4)) / 2
    target_mean, target = rng.standard_normal(4), root @ root.T + 0.2 * np.eye(4)
    sigmas = np.linspace(1.0, 0.0, num_steps + 1)
    mean, cov, eye = np.zeros(4), np.eye(4), np.eye(4)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        mixed = (1 - sigma) ** 2 * target + sigma**2 * eye
        slope = (sigma * eye - (1 - sigma) * target) @ np.linalg.inv(mixed)
        step = coefficients(kind, sigma, sigma_next, eta)
        matrix = step.a * eye + step.b * slope
        offset = step.b * (-slope @ ((1 - sigma) * target_mean) - target_mean)
        mean, cov = matrix @ mean + offset, matrix @ cov @ matrix.T + step.s**2 * eye
    return max(np.abs(mean - target_mean).max(), np.abs(cov - target).max())


@pytest.mark.parametrize("kind", ["sde", "dance"])
@pytest.mark.parametrize("eta", [0.3, 0.7])
def test_sde_and_dance_keep_the_marginals(kind, eta):
    assert covariance_error(step_coefficients, kind, eta, 320) < 0.03


def test_memoryless_steps_keep_the_marginals():
    coarse, fine = (covariance_error(step_coefficients, "memoryless", 0.0, steps) for steps in (320, 640))
    assert coarse < 0.035
    assert fine / coarse == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("eta", [0.3, 0.7])
def test_the_error_of_dance_halves_with_the_step(eta):
    coarse, fine = (covariance_error(step_coefficients, "dance", eta, steps) for steps in (320, 640))
    assert fine / coarse == pytest.approx(0.5, abs=0.02)


def test_the_error_of_sde_falls_slowly():
    """Its first step's variance is 1 + eta^4 / 4 however short it is (sigma_1 stands in for sigma): not first order."""
    errors = [covariance_error(step_coefficients, "sde", 0.7, steps) for steps in (320, 1280, 5120)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.4 * errors[0]


def test_a_step_without_its_score_correction_loses_the_marginals():
    def broken(kind, sigma, sigma_next, eta):
        return StepCoefficients(1.0, sigma_next - sigma, step_coefficients(kind, sigma, sigma_next, eta).s)

    assert covariance_error(broken, "sde", 0.7, 320) > 0.3


def test_a_step_with_the_score_sign_flipped_loses_the_marginals():
    def broken(kind, sigma, sigma_next, eta):
        step, dt = step_coefficients(kind, sigma, sigma_next, eta), sigma_next - sigma
        return StepCoefficients(2 - step.a, 2 * dt - step.b, step.s)

    assert covariance_error(broken, "sde", 0.7, 320) > 0.3


def test_cps_does_not_keep_the_marginals_however_many_steps():
    assert all(covariance_error(step_coefficients, "cps", 0.7, steps) > 0.3 for steps in (80, 320, 1280))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("dde", 0.5, 0.4, 0.7), "'dde'"),
        (("sde", 0.4, 0.5, 0.7), "0.4 -> 0.5"),
        (("sde", 1.1, 0.5, 0.7), "1.1 -> 0.5"),
        (("sde", 0.5, 0.4, -1.0), "-1.0"),
    ],
)
def test_impossible_steps_are_refused_with_their_numbers(arguments, part):
    with pytest.raises(ValueError, match=part):
        step_coefficients(*arguments)


def test_the_first_sde_step_is_finite_and_uses_the_next_sigma():
    step = step_coefficients("sde", 1.0, 0.9, 0.7)
    assert step.s == pytest.approx(0.7 * math.sqrt(1 / (1 - 0.9)) * math.sqrt(0.1), rel=1e-12)
