"""The log-density of a flow model's samples, or of given data, and its differential entropy.

x_sigma follows dx/dsigma = v(x, sigma) from noise x_1 ~ N(0, I) to data x_0. Along it d log p / dsigma = -div v
(arXiv 1806.07366, eq. 8), so

    log p_0(x_0) = log N(x_1; 0, I) + integral over sigma from 0 to 1 of div v(x_sigma, sigma).

The density is that of the push-forward of N(0, I) by the given velocity field: for a guided model, by the *guided*
ODE, over the VAE-scaled latents, given the prompt. It is neither the law of a stochastic sampler nor a density of
pixels, and it is a density: its logarithm may be positive, and its exponential is no probability.

div v = tr J, J = dv/dx, is computed exactly (D products with J) or estimated by E[z^T J z] over random probes z
(Hutchinson; arXiv 1810.01367): flow_grpo/divergence.py, and all that is public there can be imported from here too.
B samples in a batch, D dimensions each, n probes, T solver steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flow_grpo.diffusers_patch.rollout import ode_steps, rollout
from flow_grpo.diffusers_patch.velocity import VelocityFn
from flow_grpo.divergence import (
    DISTRIBUTIONS,
    MAX_JACOBIAN_BYTES,
    PRODUCTS,
    Divergence,
    DivergenceEstimator,
    NonFiniteError,
    Products,
    divergence,
    draw_probes,
)
from flow_grpo.statistics import half_width

__all__ = [
    "DISTRIBUTIONS",
    "LOG_2PI",
    "MAX_JACOBIAN_BYTES",
    "PRODUCTS",
    "QUANTILES",
    "SOLVERS",
    "Divergence",
    "DivergenceEstimator",
    "EntropyEstimate",
    "NonFiniteError",
    "OdeLogDensity",
    "ProbeGenerators",
    "Products",
    "Solver",
    "differential_entropy",
    "divergence",
    "draw_probes",
    "ode_log_density",
]

LOG_2PI = math.log(2 * math.pi)

# generators of the probes of one velocity evaluation, one per sample; the argument counts evaluations from 0
ProbeGenerators = Callable[[int], list[torch.Generator]]


# --- along the path ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solver:
    """An explicit Runge-Kutta method by its Butcher tableau; `order` is that of its global error."""

    order: int
    nodes: tuple[float, ...]  # where in the step each stage is, from 0 to 1
    matrix: tuple[tuple[float, ...], ...]  # how much of the earlier stages' slopes leads there
    weights: tuple[float, ...]  # of the stages' slopes in the step


SOLVERS = {
    "euler": Solver(1, (0.0,), ((),), (1.0,)),
    "heun": Solver(2, (0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2)),
    "rk4": Solver(
        4, (0.0, 1 / 2, 1 / 2, 1.0), ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    ),
}


@dataclass(frozen=True)
class OdeLogDensity:
    """log p_0 of a batch under the guided ODE, and what it was made of; nats, unless a name says otherwise."""

    x_0: Tensor  # (B, ...): the data
    x_1: Tensor  # (B, ...): its noise
    prior: Tensor  # (B,) float64: log N(x_1; 0, I)
    step_integrals: Tensor  # (B, T) float64: integral of div v over sigma of each step, in the order of the path
    probe_variance: Tensor  # (B,) float64: of log_prob over the draw of probes; 0 if exact, nan with one probe

    @property
    def log_prob(self) -> Tensor:
        """log p_0(x_0), a sum over the D dimensions: (B,) float64."""
        return self.prior + self.step_integrals.sum(1)

    @property
    def dims(self) -> int:
        """D."""
        return self.x_0[0].numel()

    @property
    def nats_per_dim(self) -> Tensor:
        """log_prob / D, (B,)."""
        return self.log_prob / self.dims

    @property
    def bits_per_dim(self) -> Tensor:
        """-log2 p_0(x_0) / D, (B,)."""
        return -self.nats_per_dim / math.log(2)

    @property
    def probe_standard_error(self) -> Tensor:
        """Of log_prob, over the draw of probes: (B,)."""
        return self.probe_variance.sqrt()


def ode_log_density(
    velocity: VelocityFn,
    x: Tensor,
    sigmas: Tensor,
    estimator: DivergenceEstimator,
    probe_generators: ProbeGenerators | None = None,
    *,
    solver: str = "euler",
    second_order: bool = False,
    enable_grad: bool = False,
) -> OdeLogDensity:
    """Integrate state and log-density together, from noise to data or from data to noise.

    The memory does not depend on the number of steps, unless `enable_grad` keeps the graph.

    Args:
        velocity: v(x, sigma), already guided and bound to the prompts.
        x: (B, ...): x_1, if `sigmas` fall from 1; x_0, if they rise to 1.
        sigmas: (T + 1,), monotonic; one end is 1, the other 0 or next to it.
        probe_generators: evaluation index -> one generator per sample; not read if exact.
        solver: "euler" (the sampler's own steps), "heun" or "rk4".
        second_order: with "euler", add the second term of log|det(I + dt J)| = dt tr J - dt^2 / 2 tr J^2 + ...: nearer
            to the density of what the discrete sampler really draws.
        enable_grad: keep the graph: log_prob can then be differentiated, prior and transport of the path included.

    Raises:
        ValueError: unknown solver; sigmas that do not begin or end at 1; probes without generators; `second_order` with
            another solver than Euler; and see `divergence`, with the step's number.
        NonFiniteError: see `divergence`, with the step's number.
    """
    falling = _check_path(sigmas, solver, second_order, estimator, probe_generators)
    source = _ProbeSource(estimator, probe_generators)
    levels = sigmas.tolist()
    steps, log_dets = ode_steps(levels), list[Tensor]()

    def slope(x: Tensor, sigma: float) -> Tensor:
        i = len(log_dets)
        try:
            velocity_of_step, log_det = _slope(
                velocity, x, sigma, steps[i].b, SOLVERS[solver], estimator, source, second_order, enable_grad
            )
        except ValueError as error:
            kind = NonFiniteError if isinstance(error, NonFiniteError) else ValueError
            raise kind(f"step {i} of {len(steps)}: {error}") from error
        log_dets.append(-log_det if falling else log_det)  # (n, B)
        return velocity_of_step

    x_start = x = x.to(torch.promote_types(x.dtype, torch.float32))
    for taken in rollout(slope, x_start, levels, steps, enable_grad=enable_grad):
        x = taken.next_latents
    with torch.set_grad_enabled(enable_grad):
        per_probe = torch.stack(log_dets)  # (T, n, B)
        x_0, x_1 = (x, x_start) if falling else (x_start, x)
        prior = -0.5 * (x_1.double().square().flatten(1).sum(1) + x_1[0].numel() * LOG_2PI)
        variance = _probe_variance(per_probe.detach(), estimator, x_1[0].numel())
        return OdeLogDensity(x_0, x_1, prior, per_probe.mean(1).T, variance)


def _slope(
    velocity: VelocityFn,
    x: Tensor,
    sigma: float,
    dt: float,
    solver: Solver,
    estimator: DivergenceEstimator,
    source: _ProbeSource,
    second_order: bool,
    enable_grad: bool,
) -> tuple[Tensor, Tensor]:
    """What a step of length dt multiplies by it, (B, ...), and the log-determinant of its map, (n, B)."""
    slopes: list[Tensor] = []
    log_det = torch.zeros((), dtype=torch.float64, device=x.device)
    for node, row, weight in zip(solver.nodes, solver.matrix, solver.weights, strict=True):
        stage = x + dt * sum(a * v for a, v in zip(row, slopes, strict=True)) if any(row) else x
        found = divergence(
            velocity, stage, sigma + node * dt, estimator, source.draw(stage),
            squared=second_order, enable_grad=enable_grad,
        )  # fmt: skip
        slopes.append(found.velocity)
        log_det = log_det + weight * dt * found.per_probe
        if found.squared is not None:
            log_det = log_det - 0.5 * dt**2 * found.squared
    weighted = [b * v for b, v in zip(solver.weights, slopes, strict=True)]
    return sum(weighted[1:], weighted[0]), log_det


class _ProbeSource:
    """Fresh probes at every evaluation, or one draw for the whole path."""

    def __init__(self, estimator: DivergenceEstimator, generators: ProbeGenerators | None) -> None:
        self.estimator, self.generators = estimator, generators
        self.evaluations = 0
        self.held: Tensor | None = None

    def draw(self, like: Tensor) -> Tensor | None:
        """(n, B, ...); None if the divergence is exact."""
        if self.estimator.exact or self.generators is None:
            return None
        if self.held is not None:
            return self.held
        probes = draw_probes(like, self.estimator, self.generators(self.evaluations))
        self.evaluations += 1
        if self.estimator.hold:
            self.held = probes
        return probes


def _check_path(
    sigmas: Tensor, solver: str, second_order: bool, estimator: DivergenceEstimator, generators: ProbeGenerators | None
) -> bool:
    """Whether sigma falls; ValueError for a path that is none."""
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; it must be one of {tuple(SOLVERS)}")
    if second_order and solver != "euler":
        raise ValueError(f"second_order belongs to the discrete map of solver 'euler', not to {solver!r}")
    if not estimator.exact and generators is None:
        raise ValueError("random probes need probe_generators")
    differences = sigmas.diff()
    falling = bool((differences < 0).all())
    if len(sigmas) < 2 or not (falling or bool((differences > 0).all())):
        raise ValueError(f"sigmas must fall or rise all along, in at least one step; got {sigmas.tolist()}")
    if not math.isclose(sigmas.max().item(), 1.0, abs_tol=1e-6) or sigmas.min().item() < 0:
        raise ValueError(f"sigmas must run between 1 and 0; got {sigmas[0].item()} to {sigmas[-1].item()}")
    return falling


def _probe_variance(per_probe: Tensor, estimator: DivergenceEstimator, dims: int) -> Tensor:
    """Variance of the path's integral over the draw of probes, from the spread among the n: (T, n, B) -> (B,).

    Fresh probes make the steps independent: their variances add. Held ones do not: the variance is that of the whole
    path's integral. Orthogonal probes are n of the D directions of a random basis, over which z^T J z has the fixed sum
    D tr J: a sample without replacement, whose mean varies less by 1 - n / D.
    """
    n = per_probe.shape[1]
    if estimator.exact:
        return per_probe.new_zeros(per_probe.shape[2])
    if n == 1:
        return per_probe.new_full((per_probe.shape[2],), torch.nan)
    left = 1 - n / dims if estimator.distribution == "orthogonal" else 1.0
    variance = per_probe.sum(0).var(0) if estimator.hold else per_probe.var(1).sum(0)
    return left * variance / n


# --- entropy -------------------------------------------------------------------------------------------


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class EntropyEstimate:
    """H = -E[log p_0] from independent samples, with its error; nats, unless a name says otherwise."""

    entropy: float
    standard_error: float  # of the entropy: log_prob_std / sqrt(N), probes included
    sample_part: float  # from drawing other samples: sqrt(standard_error^2 - probe_part^2), or 0 where that is larger
    probe_part: float  # from drawing other probes; both parts are nan if the probes' variance is not known
    num_samples: int
    dims: int
    log_prob_std: float  # standard deviation of log p_0 over the samples ("ode_log_prob_std"), as observed
    log_prob_std_corrected: float  # the same without what the probes add; nan if their variance is not known
    minimum: float  # of log p_0
    maximum: float
    quantiles: dict[float, float] = field(default_factory=dict)

    @property
    def half_width_95(self) -> float:
        """Of the entropy's 95 % interval: `standard_error` times Student's t of N - 1 degrees of freedom."""
        return half_width(self.standard_error, self.num_samples - 1)

    @property
    def nats_per_dim(self) -> float:
        """entropy / D."""
        return self.entropy / self.dims

    @property
    def bits_per_dim(self) -> float:
        """entropy / (D log 2)."""
        return self.nats_per_dim / math.log(2)


def differential_entropy(log_prob: Tensor, probe_variance: Tensor, dims: int) -> EntropyEstimate:
    """The entropy of one distribution from the log-densities of samples of it.

    Args:
        log_prob: (N,), of N >= 2 independent samples.
        probe_variance: (N,), of each log_prob over its own probes; zeros if exact, nan if not known.
        dims: D.

    Raises:
        ValueError: fewer than 2 samples.
    """
    n = len(log_prob)
    if n < 2:
        raise ValueError(f"an entropy with its error needs at least 2 samples, got {n}")
    values = log_prob.double()
    observed, probes = values.var().item(), probe_variance.double().mean().item()
    between = math.nan if math.isnan(probes) else max(observed - probes, 0.0)
    return EntropyEstimate(
        entropy=-values.mean().item(),
        standard_error=math.sqrt(observed / n),
        sample_part=math.sqrt(between / n),
        probe_part=math.sqrt(probes / n),
        num_samples=n,
        dims=dims,
        log_prob_std=math.sqrt(observed),
        log_prob_std_corrected=math.sqrt(between),
        minimum=values.min().item(),
        maximum=values.max().item(),
        quantiles={q: values.quantile(q).item() for q in QUANTILES},
    )
