"""The table and the figures of validate_entropy.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from flow_grpo.statistics import NORMAL_95
from scripts.diversity_metrics.entropy_targets import HALF_WIDTH, LAST_SIGMA
from scripts.diversity_metrics.entropy_validation import CONVERGENCE_STEPS, STEPS, Row

EXACT_COLOUR, MLP_COLOUR, TARGET_COLOUR = "#0072B2", "#D55E00", "#777777"  # Okabe and Ito's
SOLVER_STYLES = {
    "Euler": ("#D55E00", "o"),
    "Euler, second-order log-determinant": ("#E69F00", "s"),
    "Heun": ("#009E73", "D"),
    "RK4": ("#0072B2", "^"),
}

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
