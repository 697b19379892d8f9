"""Coefficients of one sampler step: x' = a x + b v + s z, z ~ N(0, I).

sigma = noise level now, sigma_next = after the step (sigma_next < sigma), dt = sigma_next - sigma < 0,
v = dx/dsigma the velocity, eta = noise_level, g the diffusion coefficient of the reverse-time SDE

    dx = [v + g^2 / (2 sigma) (x + (1 - sigma) v)] dt + g sqrt(-dt) z,

in which (x + (1 - sigma) v) / sigma is minus the score of the flow's marginal. Euler-Maruyama on it gives `sde`
and `dance`, which therefore keep the marginals as dt -> 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StepCoefficients:
    """x' = a x + b v + s z."""

    a: float
    b: float
    s: float


def ode(sigma: float, sigma_next: float, eta: float = 0.0) -> StepCoefficients:
    """Euler step of the probability-flow ODE dx/dsigma = v. `eta` is not used."""
    return StepCoefficients(a=1.0, b=sigma_next - sigma, s=0.0)


def sde(sigma: float, sigma_next: float, eta: float) -> StepCoefficients:
    """Flow-GRPO (arXiv 2505.05470, eq. 9): g = eta sqrt(sigma / (1 - sigma)).

    At sigma = 1, where g is infinite, the denominator takes the next sigma, as the paper's code does.
    """
    remaining = 1 - (sigma_next if sigma >= 1 else sigma)
    return _euler_maruyama(sigma, sigma_next, g=eta * math.sqrt(sigma / remaining))


def dance(sigma: float, sigma_next: float, eta: float) -> StepCoefficients:
    """DanceGRPO (arXiv 2505.07818): g = eta, the same at every sigma."""
    return _euler_maruyama(sigma, sigma_next, g=eta)


def cps(sigma: float, sigma_next: float, eta: float) -> StepCoefficients:
    """Coefficients-preserving sampling (arXiv 2509.05952): x' = (1 - sigma') x0_hat + q e_hat + s z.

    q^2 + s^2 = sigma'^2: each step mixes signal and noise in the proportion that sigma' asks for. The noise does not
    shrink with dt, so for a fixed eta the marginals are not kept, however many steps are taken.
    """
    s = sigma_next * math.sin(eta * math.pi / 2)
    q = math.sqrt(max(sigma_next**2 - s**2, 0.0))
    if eta == 0:
        return ode(sigma, sigma_next)  # the same numbers, without their rounding
    return StepCoefficients(a=(1 - sigma_next) + q, b=(1 - sigma) * q - sigma * (1 - sigma_next), s=s)


def memoryless(sigma: float, sigma_next: float, eta: float = 0.0) -> StepCoefficients:
    """Ancestral step: x' given x and x_0 = x0_hat under the chain that adds noise. `eta` is not used.

    It is the SDE with g^2 = 2 sigma / (1 - sigma), under which x_0 does not remember x_1: what Adjoint Matching needs
    (arXiv 2409.08861). With r = (1 - sigma) / (1 - sigma'), x = r x' + noise, and Gaussian conditioning gives

        mean = (1 - sigma') x0_hat + (r sigma'^2 / sigma) e_hat,   s^2 = sigma'^2 (1 - r^2 sigma'^2 / sigma^2).

    At sigma = 1, where g is infinite, r = 0 and nothing is to be regularised; at sigma' = 0 no noise is drawn.
    Euler-Maruyama with the usual g^2 = 2 (sigma + h) / (1 - sigma + h), h = -dt, draws a first noise of variance
    2 (1 + h), where sigma'^2 is right.
    """
    remembered = sigma_next**2 * (1 - sigma) / (1 - sigma_next) / sigma  # r sigma'^2 / sigma
    drawn = sigma_next**2 - remembered**2
    return StepCoefficients(
        a=(1 - sigma_next) + remembered,
        b=(1 - sigma) * remembered - sigma * (1 - sigma_next),
        s=math.sqrt(max(drawn, 0.0)),
    )


def _euler_maruyama(sigma: float, sigma_next: float, g: float) -> StepCoefficients:
    """One step of the reverse-time SDE with diffusion coefficient g."""
    dt = sigma_next - sigma
    correction = g**2 / (2 * sigma)
    return StepCoefficients(a=1 + correction * dt, b=(1 + correction * (1 - sigma)) * dt, s=g * math.sqrt(-dt))


STEPS: dict[str, Callable[[float, float, float], StepCoefficients]] = {
    "ode": ode,
    "sde": sde,
    "dance": dance,
    "cps": cps,
    "memoryless": memoryless,
}


def step_coefficients(sde_type: str, sigma: float, sigma_next: float, eta: float) -> StepCoefficients:
    """Coefficients of the step of kind `sde_type`, in double precision.

    Raises:
        ValueError: unknown `sde_type`, eta < 0, or not 0 <= sigma_next < sigma <= 1.
    """
    if sde_type not in STEPS:
        raise ValueError(f"sde_type is {sde_type!r}; it must be one of {sorted(STEPS)}")
    if not 0 <= sigma_next < sigma <= 1:
        raise ValueError(f"sigma {sigma} -> {sigma_next}: a step needs 0 <= sigma_next < sigma <= 1")
    if eta < 0:
        raise ValueError(f"eta is {eta}; it must be >= 0")
    return STEPS[sde_type](sigma, sigma_next, eta)
