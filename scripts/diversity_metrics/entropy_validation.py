"""Estimates of entropies that are known: through exact fields, through MLPs, and by how the solvers converge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flow_grpo.diffusers_patch.velocity import VelocityFn
from flow_grpo.entropy import DivergenceEstimator, OdeLogDensity, differential_entropy, ode_log_density
from flow_grpo.randomness import keyed_generator
from scripts.diversity_metrics.entropy_targets import Target
from scripts.diversity_metrics.toy_flows import GaussianFlow, fit_mlp

STEPS = 60  # of RK4: four velocity evaluations each
TRAINING_STEPS = 2000  # of an MLP
CONVERGENCE_STEPS = (5, 10, 20, 40, 80, 160, 320)
CONVERGENCE_SOLVERS = {
    "Euler": ("euler", False),
    "Euler, second-order log-determinant": ("euler", True),
    "Heun": ("heun", False),
    "RK4": ("rk4", False),
}


@dataclass(frozen=True)
class Row:
    """One estimate beside its theory; nats, unless a name says otherwise."""

    target: str
    dims: int
    field: str  # "exact" or "MLP"
    estimate: float
    theory: float
    error: float
    standard_error: float  # of the error: sqrt(sample_part^2 + probe_part^2 + theory_standard_error^2)
    sample_part: float
    probe_part: float
    theory_standard_error: float
    error_in_standard_errors: float
    bits_per_dim: float
    theory_bits_per_dim: float
    density_error: float | None  # mean log p - log q; null where q is 0 at some samples
    density_error_standard_error: float | None
    prior_part: float  # estimate = prior_part + divergence_part: -mean log N(x_1; 0, I), and
    divergence_part: float  # minus the mean integral of div v, and D log of the rescaling at last_sigma
    num_samples: int
    solver: str
    steps: int
    last_sigma: float
    probes: int  # 0: exact trace
    seconds: float


# --- estimates ----------------------------------------------------------------------------------------------


def estimator_of(num_probes: int) -> DivergenceEstimator:
    """Rademacher probes, or the exact trace for 0."""
    return DivergenceEstimator(num_probes=num_probes) if num_probes else DivergenceEstimator(exact=True)


def crowded(steps: int, last: float) -> Tensor:
    """sigma_i = s + (1 - s)(1 - i/T)^2, falling from 1 to s: (T + 1,)."""
    return last + (1 - last) * torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** 2


def flow_samples(target: Target, velocity: VelocityFn, last: float, seed: int) -> OdeLogDensity:
    """Samples drawn through `velocity` with their log-densities; the noise is the same for every velocity."""
    generator = keyed_generator(seed, f"noise {target.name}")
    x_1 = torch.randn(target.num_samples, target.dims, generator=generator, dtype=torch.float64)
    return ode_log_density(
        velocity,
        x_1,
        crowded(STEPS, last),
        estimator_of(target.num_probes),
        # one generator for the batch, drawn from sample after sample: seeding one for each would take longer than v
        lambda k: [keyed_generator(seed, f"probes {target.name}", k)] * target.num_samples,
        solver="rk4",
    )


def make_row(target: Target, field: str, result: OdeLogDensity, last: float, seconds: float) -> Row:
    """The estimate from samples at sigma = `last`, rescaled to x_0 = x / (1 - last), beside the theory."""
    dims, exact = target.dims, field == "exact"
    rescaling = dims * math.log(1 - last)  # log p of x / (1 - last) = log p of x + this
    log_p = result.log_prob + rescaling
    found = differential_entropy(log_p, result.probe_variance, dims)
    theory = target.theory if exact else target.entropy
    standard_error = math.hypot(found.standard_error, target.theory_standard_error)
    known = exact or target.last_sigma == 0
    difference = log_p - target.log_density(result.x_0 / (1 - last)) if known else None
    prior = -result.prior.mean().item()
    return Row(
        target=target.name,
        dims=dims,
        field=field,
        estimate=found.entropy,
        theory=theory,
        error=found.entropy - theory,
        standard_error=standard_error,
        sample_part=found.sample_part,
        probe_part=found.probe_part,
        theory_standard_error=target.theory_standard_error,
        error_in_standard_errors=(found.entropy - theory) / standard_error,
        bits_per_dim=found.bits_per_dim,
        theory_bits_per_dim=theory / dims / math.log(2),
        density_error=None if difference is None else difference.mean().item(),
        density_error_standard_error=(
            None if difference is None else difference.std().item() / math.sqrt(len(difference))
        ),
        prior_part=prior,
        divergence_part=found.entropy - prior,
        num_samples=found.num_samples,
        solver="rk4",
        steps=STEPS,
        last_sigma=last,
        probes=target.num_probes,
        seconds=seconds,
    )


def learn(target: Target, fraction: float, seed: int) -> VelocityFn:
    """The velocity of an MLP, in float32, trained on the target's samples."""
    steps = max(round(fraction * TRAINING_STEPS), 10)
    model = fit_mlp(target.sample, target.dims, steps, keyed_generator(seed, f"training {target.name}"))
    return lambda x, sigma: model.velocity(x.float(), sigma).to(x.dtype)


# --- convergence --------------------------------------------------------------------------------------------


def convergence(flow: GaussianFlow, solver: str, second_order: bool, steps: int) -> dict[str, float]:
    """The bias of the entropy in nats per dimension with T even steps, against the target and against Euler's own map.

    J of a Gaussian flow is the same at every x: with the exact trace, one sample gives the integral of div v, and the
    entropy of the noise is known. The bias is therefore free of sampling error.
    """
    dims, eye = len(flow.mean), torch.eye(len(flow.mean), dtype=torch.float64)
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    result = ode_log_density(
        flow.velocity,
        torch.zeros(1, dims, dtype=torch.float64),
        sigmas,
        DivergenceEstimator(exact=True, chunk=dims),
        solver=solver,
        second_order=second_order,
    )
    of_noise = 0.5 * dims * math.log(2 * math.pi * math.e)
    found = of_noise - result.step_integrals.sum().item()
    bias = {"against_target": (found - flow.entropy) / dims}
    if solver == "euler":  # x -> x + dt v has the log-determinant log|det(I + dt J)|
        levels = sigmas.tolist()
        maps = [eye + (b - a) * flow.slope(a) for a, b in pairwise(levels)]
        of_map = of_noise + sum(torch.linalg.slogdet(step).logabsdet.item() for step in maps)
        bias["against_map"] = (found - of_map) / dims
    return bias


def all_convergence() -> list[dict[str, Any]]:
    """The bias of each solver on the Gaussian in 64 dimensions, over CONVERGENCE_STEPS."""
    flow = GaussianFlow.random(64)
    return [
        {"solver": name, "steps": steps, **convergence(flow, solver, second_order, steps)}
        for name, (solver, second_order) in CONVERGENCE_SOLVERS.items()
        for steps in CONVERGENCE_STEPS
    ]
