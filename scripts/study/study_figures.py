"""The study's figures, from its committed results. Colours are Okabe and Ito's; no curve is told by colour alone.

Curves have a thin line for each seed, a thick one for their mean and a band from the lowest seed to the highest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from scripts.study.claims.frontier import Point, frontier
from scripts.study.claims.proxies import rank_correlation
from scripts.study.figures import BASE_COLOUR, COLOURS, REWARD_LABEL, State
from scripts.study.figures import samples_figure as grids_figure
from scripts.study.forms import Form, by_form
from scripts.study.grids import Sample
from scripts.study.records import ACCURACY, ENTROPY, REWARD, RKE, VENDI, Evaluation
from scripts.study.study_records import NATS, SPREAD, Study, StudyRecord, by_label

METHODS = ("DRTune", "GRPO")
METHOD_MARKERS = {"DRTune": "o", "GRPO": "s"}
FORM_COLOURS = {"sde": "#0072B2", "ode_step": "#D55E00", "ode_path": "#009E73", "cfm": "#CC79A7"}
PROBE_LINES = {1: "-", 4: "--", 16: ":", 0: "-."}  # 0: the exact trace
PROBE_MARKERS = {1: "o", 4: "s", 16: "^", 0: "D"}
POINT_MARKERS = "oXDvP*^s<>hp"
LABELS = {
    VENDI: "Vendi score within a prompt\n(effective number of images)",
    RKE: "RKE within a prompt\n(effective number of images)",
    ENTROPY: "colour entropy\n(nats; 8 equal shares: 2.08)",
    NATS: "differential entropy of an image,\ngiven its prompt (nats)",
    SPREAD: "std of the ODE log-density\nwithin a prompt (nats)",
}
STEP_LABEL = "epochs"
SECONDS_LABEL = "training time (s)"
ACCURACY_LABEL = "images whose prompt the judge recognises (%)"
DPI = 130


def all_figures(
    study: Study, noise: Sequence[Mapping[str, Any]], scales: Sequence[Mapping[str, Any]]
) -> dict[str, Figure]:
    """Name -> figure, of what there are results for."""
    claims, ratios = study.of("claims"), study.of("ratio")
    points = frontier(study, scales)
    drawn: dict[str, Callable[[], Figure]] = {}
    if claims:
        drawn |= {
            "reward": lambda: reward_figure(claims),
            "diversity_vs_seconds": lambda: diversity_figure(claims, "seconds"),
            "diversity_vs_reward": lambda: diversity_figure(claims, REWARD),
            "judge_vs_reward": lambda: judge_figure(claims),
        }
    if study.records:
        drawn["proxies"] = lambda: proxies_figure(study.records)
    if ratios:
        drawn |= {
            "ratios": lambda: ratios_figure(by_form(study)),
            "ratio_statistics": lambda: ratio_statistics_figure(by_form(study)),
        }
    if points:
        base = {name: study.records[0].base(name) for name in (REWARD, VENDI)}
        drawn["frontier"] = lambda: frontier_figure(points, base)
    if noise:
        drawn["gradient_noise"] = lambda: gradient_noise_figure(noise)
    return {name: draw() for name, draw in drawn.items()}


def save_figures(figures: Mapping[str, Figure], out: Path) -> None:
    """As PNGs."""
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=DPI, metadata={"Software": None})


# --- curves -----------------------------------------------------------------------------------------------


def reward_figure(records: Sequence[StudyRecord]) -> Figure:
    """Reward against seconds, against network evaluations and against images."""
    figure = Figure(figsize=(13.5, 4.2), layout="constrained")
    quantities = {
        "seconds": "training time,\nevaluation not counted (s)",
        "network_evaluations": "network evaluations in training\n(one image through the transformer once)",
        "images": "images sampled in training",
    }
    for axes, (quantity, name) in zip(figure.subplots(1, 3, sharey=True), quantities.items(), strict=True):
        axes.axhline(records[0].base(REWARD), color=BASE_COLOUR, linestyle=":", label="base")
        for label in METHODS:
            _draw(axes, by_label(records).get(label, []), quantity, REWARD, COLOURS[label], label)
        axes.set_xlabel(name)
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        _plain(axes)
    figure.axes[0].set_ylabel(REWARD_LABEL)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", frameon=False, title=_seeds_note(records))
    return figure


def diversity_figure(records: Sequence[StudyRecord], x: str) -> Figure:
    """Five measures of diversity against "seconds", or against the reward."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    for axes, (metric, label) in zip(panels, LABELS.items(), strict=False):
        axes.axhline(records[0].base(metric), color=BASE_COLOUR, linestyle=":", label="base")
        for method in METHODS:
            _draw(axes, by_label(records).get(method, []), x, metric, COLOURS[method], method)
        axes.set_ylabel(label)
        axes.set_xlabel(REWARD_LABEL if x == REWARD else SECONDS_LABEL)
        _plain(axes)
    panels[-1].axis("off")
    note = "a line for each seed" if x == REWARD else _seeds_note(records)
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center", frameon=False, title=note)
    return figure


def judge_figure(records: Sequence[StudyRecord]) -> Figure:
    """Accuracy of the held-out judge against the reward; the last evaluation of each seed has a black edge."""
    figure, axes = _single(REWARD_LABEL, ACCURACY_LABEL)
    for method in METHODS:
        for index, record in enumerate(by_label(records).get(method, [])):
            x, y = record.curve(REWARD), record.curve(ACCURACY)
            colour, marker = COLOURS[method], METHOD_MARKERS[method]
            label = None if index else method
            axes.plot(x, y, lw=0.9, ms=3, alpha=0.7, label=label, color=colour, marker=marker)
            axes.plot(x[-1], y[-1], ms=8, mec="black", ls="", zorder=3, color=colour, marker=marker)
    first = records[0]
    axes.plot(
        first.base(REWARD), first.base(ACCURACY), "h", ms=12, color=BASE_COLOUR, mec="black", label="base", zorder=4
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.legend(frameon=False, title="a line for each seed; black edge: its end")
    return figure


def _draw(axes: Axes, records: Sequence[StudyRecord], x: str, y: str, colour: str, label: str) -> None:
    """Every seed, and, against a quantity that grows, their mean and range; against the reward, the ends."""
    if not records:
        return
    for index, record in enumerate(records):
        named = label if x == REWARD and index == 0 else None
        axes.plot(record.curve(x), record.curve(y), color=colour, lw=0.8, alpha=0.55, label=named)
    if x == REWARD:
        marker = METHOD_MARKERS[label]
        ends = ([record.final(name) for record in records] for name in (x, y))
        axes.plot(*ends, color=colour, marker=marker, ls="", mec="black", ms=7, label=f"{label}, end of a seed")
        return
    grid, curves = on_one_grid(records, x, y)
    marker = METHOD_MARKERS[label]
    axes.plot(grid, curves.mean(0), color=colour, lw=2.4, marker=marker, markevery=0.2, ms=7, label=label)
    axes.fill_between(grid, curves.min(0), curves.max(0), color=colour, alpha=0.15, lw=0)


def on_one_grid(records: Sequence[StudyRecord], x: str, y: str, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """x up to where the shortest seed ends, (points,), and y there by linear interpolation, (seeds, points)."""
    grid = np.linspace(0, min(record.final(x) for record in records), points)
    curves = []
    for record in records:
        known = np.isfinite(record.curve(y))
        curves.append(np.interp(grid, record.curve(x)[known], record.curve(y)[known]) if known.any() else grid * np.nan)
    return grid, np.stack(curves)


# --- proxies ----------------------------------------------------------------------------------------------


def proxies_figure(records: Sequence[StudyRecord]) -> Figure:
    """Spread of the log-density and differential entropy against Vendi and RKE: every evaluation of every run."""
    figure = Figure(figsize=(10.5, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for row, diversity in zip(panels, (VENDI, RKE), strict=True):
        for axes, proxy in zip(row, (SPREAD, NATS), strict=True):
            for method in METHODS:
                chosen = [record for record in records if record.method == method]
                x, y = (
                    np.concatenate([np.empty(0), *(record.curve(name)[1:] for record in chosen)])
                    for name in (proxy, diversity)
                )
                marker = METHOD_MARKERS[method]
                axes.scatter(x, y, s=14, alpha=0.5, lw=0, color=COLOURS[method], marker=marker, label=method)
            rho = rank_correlation(records, proxy, diversity)
            counts = f"{rho.evaluations} evaluations of {rho.runs} runs"
            axes.set_title(f"rank correlation {rho.text}\n{counts}", fontsize=10)
            _plain(axes)
        row[0].set_ylabel(LABELS[diversity])
    for axes, proxy in zip(panels[-1], (SPREAD, NATS), strict=True):
        axes.set_xlabel(LABELS[proxy])
    panels[0][0].legend(frameon=False, title="one evaluation each")
    return figure


# --- ratio forms ------------------------------------------------------------------------------------------


def ratios_figure(forms: Mapping[Form, Sequence[StudyRecord]]) -> Figure:
    """Reward against epochs and against seconds, one curve for each form and number of probes."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    base = next(iter(forms.values()))[0].base(REWARD)
    for axes, (x, label) in zip(
        figure.subplots(1, 2, sharey=True), (("step", STEP_LABEL), ("seconds", SECONDS_LABEL)), strict=True
    ):
        axes.axhline(base, color=BASE_COLOUR, linestyle=":", label="base")
        for form, records in forms.items():
            grid, curves = on_one_grid(records, x, REWARD)
            axes.plot(
                grid, curves.mean(0), color=FORM_COLOURS[form.ratio], ls=_line(form), lw=1.8, label=form.title,
                marker=_marker(form), markevery=(0.1, 0.2), ms=5,
            )  # fmt: skip
            axes.fill_between(grid, curves.min(0), curves.max(0), color=FORM_COLOURS[form.ratio], alpha=0.12, lw=0)
        axes.set_xlabel(label)
        _plain(axes)
    figure.axes[0].set_ylabel(REWARD_LABEL)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
    return figure


def ratio_statistics_figure(forms: Mapping[Form, Sequence[StudyRecord]]) -> Figure:
    """Share of clipped ratios and spread of log r: first epoch (hollow) and mean of all (filled), a point per seed."""
    figure = Figure(figsize=(11, 0.42 * len(forms) + 1.9), layout="constrained")
    panels = (
        ("train/clip_fraction", "share of ratios outside the clip range (%)"),
        ("train/ratio_std", "standard deviation of log r"),
    )
    places = np.arange(len(forms))
    for axes, (name, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for place, (form, records) in zip(places, forms.items(), strict=True):
            for which, face, offset in (("first", "none", -0.15), ("mean", FORM_COLOURS[form.ratio], 0.15)):
                values = [record.training.get(name, {}).get(which) for record in records]
                known = [value for value in values if value is not None]
                axes.plot(
                    known, [place + offset] * len(known), _marker(form), mfc=face, mec=FORM_COLOURS[form.ratio], ms=7
                )
        axes.set_yticks(places, [form.title for form in forms])
        axes.set_ylim(len(forms) - 0.5, -0.5)
        axes.set_xlabel(label)
        _plain(axes, "x")
    figure.axes[0].xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    figure.axes[1].set_xscale("log")
    figure.axes[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    figure.axes[1].xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    figure.axes[1].xaxis.set_minor_formatter(NullFormatter())
    figure.suptitle("a point for each seed; hollow: first epoch, filled: mean over all epochs", fontsize=10)
    return figure


def gradient_noise_figure(noise: Sequence[Mapping[str, Any]]) -> Figure:
    """The gradient of a group: what its probes add to its noise, and how much of it points up the reward."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = {
        "probes": "signal to noise over other probes\n(same images)",
        "batches": "signal to noise over other images",
        "uphill": "share of its length\nthat points up the reward",
    }
    for axes, (source, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        rows = [row for row in noise if row["source"] == source and None not in (row["value"], row["low"])]
        forms = [Form(row["form"], row["probes"]) for row in rows]
        for place, (row, form) in enumerate(zip(rows, forms, strict=True)):
            bar = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
            axes.errorbar(
                row["value"], place, xerr=bar, fmt=_marker(form), color=FORM_COLOURS[form.ratio], capsize=4, ms=7
            )
        axes.set_yticks(range(len(rows)), [form.title for form in forms], fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        if source == "probes":
            axes.set_xscale("log")
        else:
            axes.axvline(0, color="#777777", lw=0.8)
            axes.locator_params(axis="x", nbins=4)
        _plain(axes, "x")
    figure.suptitle("the gradient of GRPO's loss on a group of 8 images; bars: 95 % intervals", fontsize=10)
    return figure


def _line(form: Form) -> str:
    return PROBE_LINES.get(form.probes, "-")


def _marker(form: Form) -> str:
    return PROBE_MARKERS.get(form.probes, "o")


# --- the frontier -----------------------------------------------------------------------------------------


def frontier_figure(points: Sequence[Point], base: Mapping[str, float]) -> Figure:
    """Reward against Vendi score within a prompt, each method and seed a point; `base`: both of the base model."""
    figure = Figure(figsize=(10.5, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(base[VENDI], base[REWARD], "h", ms=13, color=BASE_COLOUR, mec="black", ls="", label="base")
    labels = list(dict.fromkeys(point.label for point in points))
    counts = dict.fromkeys(METHODS, 0)
    for label in sorted(labels, key=lambda label: next(p.method for p in points if p.label == label)):
        chosen = [point for point in points if point.label == label]
        method = chosen[0].method
        face = COLOURS[method] if counts[method] < len(POINT_MARKERS) else "none"
        marker = POINT_MARKERS[counts[method] % len(POINT_MARKERS)]
        counts[method] += 1
        edge = COLOURS[method] if face == "none" else "black"
        x, y = [point.vendi for point in chosen], [point.reward for point in chosen]
        axes.plot(x, y, marker, mfc=face, mec=edge, mew=0.6, ms=9, alpha=0.85, label=label)
    axes.set_xlabel(LABELS[VENDI].replace("\n", " "))
    axes.set_ylabel(REWARD_LABEL)
    _plain(axes, "both")
    figure.legend(loc="outside right upper", frameon=False, title="a point for each seed")
    return figure


def samples_figure(samples: Sequence[Sample], out: Path) -> Figure:
    """The committed image grids side by side: the same prompts and the same noise in each."""
    states = []
    for sample in samples:
        at = Evaluation(sample.step, 0.0, 0, 0, 0, metrics={REWARD: sample.reward}, ema_metrics={})
        colour = BASE_COLOUR if sample.method is None else COLOURS[sample.method]
        states.append(State(sample.title.replace(", ", ",\n"), out / sample.file, at, colour))
    return grids_figure(states)


# --- looks ------------------------------------------------------------------------------------------------


def _single(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    _plain(axes)
    return figure, axes


def _plain(axes: Axes, grid: Any = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e5e5e5")
    axes.set_axisbelow(True)


def _seeds_note(records: Iterable[StudyRecord]) -> str:
    seeds = len({record.seed for record in records})
    return f"{seeds} seeds, a thin line each;\nthick: their mean;\nband: lowest to highest"
