"""Check the entropy of `flow_grpo.entropy` against distributions whose entropy is known.

    python scripts/diversity_metrics/validate_entropy.py [--out assets/figures/entropy_validation] [--seed 0]

Each target is reached from noise twice: by its exact velocity field, and (small D) by an MLP trained on its samples by
conditional flow matching. With the exact field, estimate minus theory is the error of the method alone and must be
within a few standard errors of 0. With an MLP it also holds the misfit of the MLP, which is no error of the method.

The sharper check is the density error, mean of log p - log q over the samples x_0 drawn by the flow: p is the estimated
density, q the target's in closed form, at the same points. The spread of log q over the samples drops out of it; with
the exact field it is the bias of the solver and the noise of the probes, with an MLP the Kullback-Leibler divergence
KL(p || q).

Entropies are in nats, summed over the D dimensions, unless they say bits per dimension. The uniform's velocity is
singular at sigma = 0: its exact path stops at a small sigma, where x / (1 - sigma) is the uniform plus a little normal
noise; its theory is the entropy of that. Euler, Heun and RK4 here step over sigmas that crowd towards the data,
sigma_i = s + (1 - s)(1 - i/T)^2, s the last; the study of convergence has even steps, as samplers do.

It writes results.json, table.md, samples.png, errors.png and convergence.png. The same seed gives the same numbers
(seconds aside) on the same machine and number of threads.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_grpo.commands import cli
from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import optional_figure
from flow_grpo.files import strict_json, write_atomically
from flow_grpo.statistics import NORMAL_95

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Generator, Tensor

    from flow_grpo.diffusers_patch.velocity import VelocityFn
    from flow_grpo.entropy import DivergenceEstimator, OdeLogDensity
    from scripts.diversity_metrics.toy_flows import GaussianFlow

OUT = "assets/figures/entropy_validation"
COMMAND = "python scripts/diversity_metrics/validate_entropy.py --seed {seed}"
HALF_WIDTH = 1.5  # of the uniform
LAST_SIGMA = 0.01  # where the uniform's exact path stops
RING = {"components": 8, "radius": 2.0, "std": 0.25}
STEPS = 60  # of RK4: four velocity evaluations each
TRAINING_STEPS = 2000  # of an MLP
MLP_SAMPLES = 4000  # at most: its velocity costs more than a closed form
REFERENCE_DRAWS = 1_000_000  # for the entropy of the mixture in 16 dimensions
SHOWN = 2000  # points of a panel
CONVERGENCE_STEPS = (5, 10, 20, 40, 80, 160, 320)
CONVERGENCE_SOLVERS = {
    "Euler": ("euler", False),
    "Euler, second-order log-determinant": ("euler", True),
    "Heun": ("heun", False),
    "RK4": ("rk4", False),
}
EXACT_COLOUR, MLP_COLOUR, TARGET_COLOUR = "#0072B2", "#D55E00", "#777777"  # Okabe and Ito's
SOLVER_STYLES = {
    "Euler": ("#D55E00", "o"),
    "Euler, second-order log-determinant": ("#E69F00", "s"),
    "Heun": ("#009E73", "D"),
    "RK4": ("#0072B2", "^"),
}


@dataclass(frozen=True)
class Target:
    """A distribution, its exact velocity field, and how finely to estimate its entropy."""

    name: str
    dims: int
    velocity: VelocityFn
    sample: Callable[[int, Generator], Tensor]  # draws of x_0, (count, D)
    log_density: Callable[[Tensor], Tensor]  # log q, at x_0 = x / (1 - last_sigma) of the exact path's end
    entropy: float  # of x_0
    theory: float  # of what the exact path reaches: the entropy of x_0, if last_sigma is 0
    theory_standard_error: float  # 0, but where the theory itself is sampled
    num_samples: int
    num_probes: int = 0  # Rademacher; 0: the exact trace
    last_sigma: float = 0.0
    learnt: bool = False  # by an MLP too


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


# --- the targets --------------------------------------------------------------------------------------------


def gaussian_target(name: str, flow: GaussianFlow, num_samples: int, **options: Any) -> Target:
    """A Gaussian with all that is known of it."""
    law, entropy = flow.distribution, flow.entropy
    return Target(
        name, len(flow.mean), flow.velocity, flow.sample, law.log_prob, entropy, entropy, 0.0, num_samples, **options
    )


def uniform_target(dims: int, num_samples: int, **options: Any) -> Target:
    """The uniform on [-1.5, 1.5]^D."""
    from scripts.diversity_metrics.toy_flows import UniformFlow

    flow = UniformFlow(HALF_WIDTH)
    return Target(
        f"uniform, {dims}-d",
        dims,
        flow.velocity,
        lambda count, generator: flow.sample(count, dims, generator),
        lambda y: flow.log_density(y, LAST_SIGMA),
        flow.entropy(dims),
        flow.entropy(dims, LAST_SIGMA),
        0.0,
        num_samples,
        last_sigma=LAST_SIGMA,
        **options,
    )


def targets(fraction: float, seed: int) -> list[Target]:
    """All of them, with `fraction` of the full numbers of samples."""
    from flow_grpo.randomness import keyed_generator
    from scripts.diversity_metrics.toy_flows import GaussianFlow, MixtureFlow

    def count(full: int) -> int:
        return max(round(fraction * full), 8)

    isotropic = [
        gaussian_target(f"Gaussian, std {std:g}, 16-d", GaussianFlow.isotropic(16, std), count(4000))
        for std in (0.1, 0.5, 2.0)
    ]
    ring, scattered = MixtureFlow.ring(**RING), MixtureFlow.random(8, 16)  # type: ignore[arg-type] # counts and lengths
    ring_entropy = ring.entropy_by_integration()
    sampled = scattered.entropy_by_sampling(count(REFERENCE_DRAWS), keyed_generator(seed, "reference"))
    return [
        *isotropic,
        gaussian_target("Gaussian, full covariance, 2-d", GaussianFlow.random(2, 1), count(20_000), learnt=True),
        gaussian_target(
            "Gaussian, full covariance, 64-d", GaussianFlow.random(64), count(1500), num_probes=4, learnt=True
        ),
        gaussian_target("Gaussian, full covariance, 1024-d", GaussianFlow.random(1024), count(128), num_probes=2),
        uniform_target(2, count(20_000), learnt=True),
        uniform_target(16, count(1000)),
        Target(
            "mixture of 8, 2-d", 2, ring.velocity, ring.sample, ring.log_density, ring_entropy, ring_entropy, 0.0,
            count(20_000), learnt=True,
        ),
        Target(
            "mixture of 8, 16-d", 16, scattered.velocity, scattered.sample, scattered.log_density, sampled[0],
            *sampled, count(2000), num_probes=4,
        ),
    ]  # fmt: skip


# --- estimates ----------------------------------------------------------------------------------------------


def estimator_of(num_probes: int) -> DivergenceEstimator:
    """Rademacher probes, or the exact trace for 0."""
    from flow_grpo.entropy import DivergenceEstimator

    return DivergenceEstimator(num_probes=num_probes) if num_probes else DivergenceEstimator(exact=True)


def crowded(steps: int, last: float) -> Tensor:
    """sigma_i = s + (1 - s)(1 - i/T)^2, falling from 1 to s: (T + 1,)."""
    import torch

    return last + (1 - last) * torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** 2


def flow_samples(target: Target, velocity: VelocityFn, last: float, seed: int) -> OdeLogDensity:
    """Samples drawn through `velocity` with their log-densities; the noise is the same for every velocity."""
    import torch

    from flow_grpo.entropy import ode_log_density
    from flow_grpo.randomness import keyed_generator

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
    from flow_grpo.entropy import differential_entropy

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
    from flow_grpo.randomness import keyed_generator
    from scripts.diversity_metrics.toy_flows import fit_mlp

    steps = max(round(fraction * TRAINING_STEPS), 10)
    model = fit_mlp(target.sample, target.dims, steps, keyed_generator(seed, f"training {target.name}"))
    return lambda x, sigma: model.velocity(x.float(), sigma).to(x.dtype)


# --- convergence --------------------------------------------------------------------------------------------


def convergence(flow: GaussianFlow, solver: str, second_order: bool, steps: int) -> dict[str, float]:
    """The bias of the entropy in nats per dimension with T even steps, against the target and against Euler's own map.

    J of a Gaussian flow is the same at every x: with the exact trace, one sample gives the integral of div v, and the
    entropy of the noise is known. The bias is therefore free of sampling error.
    """
    import torch

    from flow_grpo.entropy import DivergenceEstimator, ode_log_density

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
    from scripts.diversity_metrics.toy_flows import GaussianFlow

    flow = GaussianFlow.random(64)
    return [
        {"solver": name, "steps": steps, **convergence(flow, solver, second_order, steps)}
        for name, (solver, second_order) in CONVERGENCE_SOLVERS.items()
        for steps in CONVERGENCE_STEPS
    ]


# --- table and figures --------------------------------------------------------------------------------------

HEADER = (
    "target", "estimate", "theory", "error", "standard error (samples, probes)", "error / s.e.",
    "bits per dim: estimate, theory", "density error ± s.e.", "samples", "probes", "seconds",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Markdown: the exact fields, then the MLPs."""
    exact, learnt = ([row for row in rows if row.field == field] for field in ("exact", "MLP"))
    return (
        "Entropies and errors in nats, summed over the dimensions. Density error: mean over the flow's own samples of "
        "log p - log q, p estimated, q the\ntarget in closed form. Solver: RK4, "
        f"{STEPS} steps. Probes: Rademacher, fresh at every evaluation. Written by "
        "`validate_entropy.py`.\n\n"
        "## Exact velocity fields: the error is the method's\n\n"
        f"{_markdown(exact)}\n"
        f"The uniform's path stops at sigma = {LAST_SIGMA:g}; its theory is D log {2 * HALF_WIDTH:g} plus what that "
        "much noise adds. The theory of the mixture in 16 "
        "dimensions\nis sampled, and its standard error is counted.\n\n"
        "## MLPs trained by flow matching: the error also holds their misfit\n\n"
        "The theory is the target's entropy, and the density error the Kullback-Leibler divergence of the MLP's "
        "distribution from the target (for the uniform\ninfinite, where samples leave the box: not given).\n\n"
        f"{_markdown(learnt)}"
    )


def _markdown(rows: Sequence[Row]) -> str:
    lines = [" | ".join(HEADER), " | ".join(["---"] + ["---:"] * (len(HEADER) - 1))]
    lines += [" | ".join(_cells(row)) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _cells(row: Row) -> list[str]:
    density = "-"
    if row.density_error is not None:
        density = f"{row.density_error:+.1e} ± {row.density_error_standard_error:.0e}"
    return [
        row.target,
        f"{row.estimate:.4f}",
        f"{row.theory:.4f}",
        f"{row.error:+.4f}",
        f"{row.standard_error:.4f} ({row.sample_part:.4f}, {row.probe_part:.4f})",
        f"{row.error_in_standard_errors:+.2f}",
        f"{row.bits_per_dim:.4f}, {row.theory_bits_per_dim:.4f}",
        density,
        f"{row.num_samples:,}",
        str(row.probes) if row.probes else "exact trace",
        f"{row.seconds:.1f}",
    ]


def errors_figure(rows: Sequence[Row]) -> Figure:
    """Estimate minus theory with 95 % intervals, in nats per dimension: exact fields and MLPs."""
    from matplotlib.figure import Figure

    groups = {
        "exact velocity field": ([row for row in rows if row.field == "exact"], EXACT_COLOUR, "o"),
        "MLP trained by flow matching (misfit included)": (
            [row for row in rows if row.field == "MLP"],
            MLP_COLOUR,
            "s",
        ),
    }
    figure = Figure(figsize=(8.4, 5.6), layout="constrained")
    heights = [len(members) + 0.6 for members, _, _ in groups.values()]
    panels = figure.subplots(2, 1, height_ratios=heights)
    for axes, (title, (members, colour, marker)) in zip(panels, groups.items(), strict=True):
        places = range(len(members))
        scaled = [row.error / row.dims for row in members]
        interval = [NORMAL_95 * row.standard_error / row.dims for row in members]
        axes.axvline(0, color="black", linewidth=0.9)
        axes.errorbar(scaled, places, xerr=interval, fmt=marker, color=colour, capsize=4, ms=6)
        axes.set_yticks(places, [row.target for row in members])
        axes.set_ylim(len(members) - 0.5, -0.5)
        axes.set_title(title, loc="left", fontsize=11)
        _plain(axes, "x")
    panels[-1].set_xlabel("estimate minus theory, with its 95 % interval (nats per dimension)")
    return figure


def convergence_figure(points: Sequence[dict[str, Any]]) -> Figure:
    """|Bias| against the number of steps: against the target's entropy, and against that of Euler's own map."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(10, 4.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("against the target's entropy", "against the entropy of what Euler's steps draw")
    for axes, title, key in zip(panels, titles, ("against_target", "against_map"), strict=True):
        for name, (colour, marker) in SOLVER_STYLES.items():
            drawn = [(p["steps"], abs(p[key])) for p in points if p["solver"] == name and key in p]
            if drawn:
                axes.loglog(*zip(*drawn, strict=True), color=colour, marker=marker, ms=5.5, label=name)
        for order in (1, 2, 4) if axes is panels[0] else (1, 2):
            _guide(axes, order, 0.5)
        axes.set_xlim(4, 640)
        axes.set_xticks(CONVERGENCE_STEPS, [str(steps) for steps in CONVERGENCE_STEPS])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("steps, even in sigma")
        axes.set_title(title, loc="left", fontsize=11)
        _plain(axes, "both")
    panels[0].set_ylabel("|bias of the entropy| (nats per dimension)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _guide(axes: Axes, order: int, level: float) -> None:
    """A dotted line of slope -order."""
    ends = [CONVERGENCE_STEPS[0], CONVERGENCE_STEPS[-1]]
    axes.loglog(ends, [level, level * (ends[0] / ends[1]) ** order], ":", color="#999999", linewidth=1, zorder=0)
    end = (ends[1], level * (ends[0] / ends[1]) ** order)
    axes.annotate(f"order {order}", end, (4, 0), textcoords="offset points", va="center", fontsize=8, color="#666666")


def samples_figure(samples: dict[str, dict[str, Tensor]]) -> Figure:
    """A row for each 2-d target: the noise, the target's samples, and what either field makes of the noise."""
    from matplotlib.figure import Figure

    columns = {
        "noise": ("#000000", "noise"),
        "target": (TARGET_COLOUR, "target"),
        "exact": (EXACT_COLOUR, "noise through the exact field"),
        "MLP": (MLP_COLOUR, "noise through the MLP"),
    }
    figure = Figure(figsize=(11.2, 2.9 * len(samples)), layout="constrained")
    panels = figure.subplots(len(samples), len(columns), squeeze=False)
    for row, (name, clouds) in zip(panels, samples.items(), strict=True):
        widest = max(cloud.abs().max().item() for key, cloud in clouds.items() if key != "noise")
        for axes, (key, (colour, title)) in zip(row, columns.items(), strict=True):
            limit = 4.0 if key == "noise" else 1.08 * widest
            axes.scatter(*clouds[key].T.tolist(), s=3, color=colour, alpha=0.45, linewidths=0)
            axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
            axes.set_title(title, fontsize=10, color=colour)
        row[0].set_ylabel(f"{name}\n\nsecond coordinate")
    for axes in panels[-1]:
        axes.set_xlabel("first coordinate")
    return figure


def _plain(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e5e5e5")  # type: ignore[arg-type] # "x", "y" or "both"
    axes.set_axisbelow(True)


# --- the command --------------------------------------------------------------------------------------------


def validate(out: Path, seed: int, fraction: float) -> list[Row]:
    """Estimate everything and write the files."""
    from tqdm import tqdm

    start = time.perf_counter()
    every = targets(fraction, seed)
    jobs = [(target, "exact") for target in every] + [(target, "MLP") for target in every if target.learnt]
    rows: list[Row] = []
    samples: dict[str, dict[str, Tensor]] = {}
    for chosen, field in (bar := tqdm(jobs)):
        target = chosen
        bar.set_description(f"{target.name}, {field}")
        if field == "exact":
            velocity, last = target.velocity, target.last_sigma
        else:
            velocity, last = learn(target, fraction, seed), 0.0
            target = replace(target, num_samples=min(target.num_samples, MLP_SAMPLES))
        before = time.perf_counter()
        result = flow_samples(target, velocity, last, seed)
        rows.append(make_row(target, field, result, last, time.perf_counter() - before))
        if target.dims == 2:
            clouds = samples.setdefault(target.name, {})
            clouds[field], clouds["noise"] = result.x_0[:SHOWN] / (1 - last), result.x_1[:SHOWN]
    add_target_samples(every, samples, seed)
    write(out, rows, all_convergence(), samples, {"seed": seed, "fraction": fraction}, start)
    return rows


def add_target_samples(every: Sequence[Target], samples: dict[str, dict[str, Tensor]], seed: int) -> None:
    """As many draws of each shown target as there are of its flows."""
    from flow_grpo.randomness import keyed_generator

    for target in every:
        if target.name in samples:
            count = len(samples[target.name]["noise"])
            samples[target.name]["target"] = target.sample(count, keyed_generator(seed, f"shown {target.name}"))


def write(
    out: Path,
    rows: Sequence[Row],
    points: Sequence[dict[str, Any]],
    samples: dict[str, dict[str, Tensor]],
    settings: dict[str, Any],
    start: float,
) -> None:
    """results.json and table.md, then the figures; `start` is when the command began, by time.perf_counter."""
    import torch

    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "table.md", table(rows))
    extra = "" if settings["fraction"] == 1 else f" --fraction {settings['fraction']:g}"
    results = {
        "command": COMMAND.format(seed=settings["seed"]) + extra,
        **settings,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start,
        "training_steps": TRAINING_STEPS,
        "rows": [asdict(row) for row in rows],
        "convergence": list(points),
    }
    write_atomically(out / "results.json", strict_json(results, indent=1) + "\n")
    with optional_figure(out / "samples.png"):
        samples_figure(samples).savefig(out / "samples.png", dpi=110)
    with optional_figure(out / "errors.png"):
        errors_figure(rows).savefig(out / "errors.png", dpi=130)
    with optional_figure(out / "convergence.png"):
        convergence_figure(points).savefig(out / "convergence.png", dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Validate; exit code 2 after one sentence about bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=OUT, help="folder of the results (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the samples and training steps, for a trial")
    args = parser.parse_args(arguments)
    with cli.one_sentence_errors():
        if not 0 < args.fraction <= 1:
            raise ConfigError(f"--fraction {args.fraction:g} is not allowed; it must be above 0 and at most 1.")
        validate(Path(args.out), args.seed, args.fraction)
        print((Path(args.out) / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them
    main()
