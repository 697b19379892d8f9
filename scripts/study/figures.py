"""The figures of a report. Colours are Okabe and Ito's, told apart by colour-blind readers too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import is_color_like
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter
from PIL import Image

from flow_grpo.diversity.images import read_rgb
from flow_grpo.figure_text import figure_text, one_line
from scripts.study.records import ACCURACY, ENTROPY, REWARD, RKE, VENDI, Crossing, Evaluation, RunRecord

BASE_COLOUR = "#777777"
COLOURS = {"DRTune": "#D55E00", "GRPO": "#0072B2"}
MORE_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
AXIS_LABELS = {
    "seconds": "training time, evaluation not counted (s)",
    "network_evaluations": "network evaluations in training (one image through the transformer once)",
}
REWARD_LABEL = "reward on held-out noise"
LEGEND, SHORT = 34, 24  # letters in a line of a legend, and of a run's label in a sentence
MAX_PANELS = 8  # sample grids side by side
MAX_MODES = 24  # in the figure of modes


@dataclass(frozen=True)
class Style:
    """How a run is drawn."""

    colour: str
    marker: str


@dataclass(frozen=True)
class State:
    """A model whose samples are shown: the base, a run's last, or a run at another's final reward."""

    label: str
    image: Path
    evaluation: Evaluation
    colour: str
    hatched: bool = False


def styles(runs: Sequence[RunRecord]) -> dict[str, Style]:
    """A colour and a marker for each label; DRTune and GRPO always have theirs."""
    spare = iter(MORE_COLOURS * len(runs))
    return {
        run.label: Style(COLOURS.get(run.label) or next(spare), MARKERS[i % len(MARKERS)]) for i, run in enumerate(runs)
    }


def states(runs: Sequence[RunRecord], crossings: Sequence[Crossing]) -> list[State]:
    """Base, each run's last and, of two runs, the faster one when it had just reached the other's reward."""
    style = styles(runs)
    shown = [State("base", runs[0].image(runs[0].base), runs[0].base, BASE_COLOUR)]
    for run in runs:
        for crossing in crossings:
            reached = crossing.evaluation
            if len(runs) == 2 and crossing.runner is run and crossing.reached and reached not in (None, run.final):
                label = f"{run.label} at {crossing.target.label}'s reward, {reached.seconds:.0f} s"
                shown.append(State(label, run.image(reached), reached, style[run.label].colour, hatched=True))
        final = run.final
        shown.append(State(f"{run.label}, {final.seconds:.0f} s", run.image(final), final, style[run.label].colour))
    return shown


def reward_figure(runs: Sequence[RunRecord], crossings: Sequence[Crossing], quantity: str) -> Figure:
    """Reward against "seconds" or "network_evaluations"; where one run reaches another's final reward is marked."""
    figure, axes = _new_figure(AXIS_LABELS[quantity], REWARD_LABEL)
    axes.axhline(runs[0].base.reward, color=BASE_COLOUR, linestyle=":", label="base")
    _draw_curves(axes, runs, quantity, REWARD)
    style = styles(runs)
    for crossing in crossings:
        spent, fraction = crossing.spent(quantity), crossing.fraction(quantity)
        if not crossing.reached or spent is None or fraction is None:
            continue
        level, end = crossing.level, crossing.target.spent(quantity)[-1]
        axes.hlines(level, spent, end, colors=style[crossing.target.label].colour, linestyles="--", linewidth=1)
        axes.plot(
            spent, level, marker="*", markersize=17, color=style[crossing.runner.label].colour, mec="black", zorder=5
        )
        if len(runs) == 2:
            unit = f"{spent:.1f} s" if quantity == "seconds" else f"{spent:,.0f} network evaluations"
            runner, target = (one_line(run.label, SHORT) for run in (crossing.runner, crossing.target))
            lines = (f"{runner} reaches {target}'s final reward", f"after {unit}, {fraction:.1%} of {target}'s")
            _annotate(axes, "\n".join(map(figure_text, lines)), spent, level, end)
    axes.legend(loc="best", frameon=False)
    return figure


def accuracy_figure(runs: Sequence[RunRecord]) -> Figure:
    """Accuracy of the held-out judge against seconds."""
    figure, axes = _new_figure(AXIS_LABELS["seconds"], "images whose prompt the judge recognises (%)")
    axes.axhline(runs[0].base.metrics[ACCURACY], color=BASE_COLOUR, linestyle=":", label="base")
    _draw_curves(axes, runs, "seconds", ACCURACY)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.legend(loc="best", frameon=False)
    return figure


def entropy_figure(runs: Sequence[RunRecord]) -> Figure:
    """Differential entropy, with its 95 % interval, and the spread of the ODE log-density, against seconds."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    style = styles(runs)
    panels = (
        ("entropy/nats", "differential entropy of an image,\ngiven its prompt (nats)"),
        ("ode_log_prob/std", "standard deviation of the ODE log-density\nwithin a prompt (nats)"),
    )
    for axes, (metric, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for run in runs:
            measured = [evaluation for evaluation in run.evaluations if metric in evaluation.occasional]
            seconds = [evaluation.seconds for evaluation in measured]
            values = [evaluation.occasional[metric] for evaluation in measured]
            errors = [evaluation.occasional["entropy/half_width_95"] for evaluation in measured]
            axes.errorbar(
                seconds,
                values,
                yerr=errors if metric == "entropy/nats" else None,
                color=style[run.label].colour,
                marker=style[run.label].marker,
                ms=4.5,
                lw=1.8,
                capsize=2,
                label=figure_text(run.label, LEGEND),
            )
        axes.set_xlabel(AXIS_LABELS["seconds"])
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5")
        axes.legend(frameon=False)
    return figure


def vendi_rke_figure(runs: Sequence[RunRecord]) -> Figure:
    """Vendi score and RKE within a prompt, with 95 % intervals: against seconds, and against reward."""
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    style, labels = styles(runs), (AXIS_LABELS["seconds"], REWARD_LABEL)
    scores = ((VENDI, "Vendi score within a prompt"), (RKE, "RKE within a prompt"))
    for row, (metric, label) in zip(figure.subplots(2, 2, sharey="row", sharex="col"), scores, strict=True):
        for run in runs:
            measured = [evaluation for evaluation in run.evaluations if metric in evaluation.occasional]
            values, low, high = (
                np.array([evaluation.occasional[f"{metric}{end}"] for evaluation in measured])
                for end in ("", "_low", "_high")
            )
            look = style[run.label]
            for axes, x in zip(row, ("seconds", "reward"), strict=True):
                axes.errorbar(
                    [getattr(evaluation, x) for evaluation in measured], values, yerr=[values - low, high - values],
                    color=look.colour, marker=look.marker, ms=4, lw=1.3, elinewidth=0.7, capsize=1.5,
                    label=figure_text(run.label, LEGEND),
                )  # fmt: skip
        row[0].set_ylabel(f"{label}\n(effective number of images)")
        for axes in row:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#e5e5e5")
            axes.legend(frameon=False)
    for axes, label in zip(row, labels, strict=True):
        axes.set_xlabel(label)
    return figure


def diversity_figure(runs: Sequence[RunRecord]) -> Figure:
    """Entropy of the mode shares against reward: diversity compared at equal reward."""
    figure, axes = _new_figure(REWARD_LABEL, "entropy of the mode shares (nats)")
    base, style = runs[0].base, styles(runs)
    for run in runs:
        look = style[run.label]
        axes.plot(
            run.curve(REWARD),
            run.curve(ENTROPY),
            color=look.colour,
            marker=look.marker,
            ms=4,
            lw=1.3,
            label=figure_text(run.label, LEGEND),
        )
        axes.plot(
            run.final.reward, run.final.metrics[ENTROPY], marker=look.marker, ms=11, color=look.colour, mec="black"
        )
    axes.plot(
        base.reward, base.metrics[ENTROPY], marker="h", ms=12, color=BASE_COLOUR, mec="black", ls="", label="base"
    )
    most = float(np.log(len(base.modes)))
    axes.axhline(most, color="black", linestyle="--", linewidth=0.8)
    axes.text(
        0.99,
        most,
        f"all {len(base.modes)} equally often ",
        va="bottom",
        ha="right",
        transform=axes.get_yaxis_transform(),
    )
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), most * 1.1)
    axes.legend(loc="best", frameon=False)
    return figure


def modes_figure(shown: Sequence[State]) -> Figure:
    """Share of the images in each of the first MAX_MODES modes, for each state."""
    every = list(shown[0].evaluation.modes)
    names = every[:MAX_MODES]
    texts = [figure_text(name, max(6, 80 // len(names)), 3) for name in names]
    figure, axes = _new_figure("", "share of the images (%)", width=10)
    width = 0.84 / len(shown)
    positions = np.arange(len(names))
    for index, state in enumerate(shown):
        heights = [state.evaluation.modes[name] for name in names]
        offsets = positions + (index - (len(shown) - 1) / 2) * width
        hatch = "////" if state.hatched else None
        face = "white" if state.hatched else state.colour
        text = figure_text(state.label, LEGEND)
        axes.bar(offsets, heights, width, label=text, color=face, edgecolor=state.colour, hatch=hatch)
    axes.axhline(1 / len(every), color="black", linestyle="--", linewidth=0.8, label="all equally often")
    axes.set_xticks(positions, texts)
    if len(every) > len(names):
        axes.set_xlabel(f"the first {len(names)} of {len(every):,} modes; {len(every) - len(names):,} are not shown")
    axes.tick_params(axis="x", length=0, pad=24)
    for position, name in zip(positions, names, strict=True):
        if is_color_like(name):
            below = axes.get_xaxis_transform()
            axes.plot(position, -0.04, "s", ms=11, color=name, mec="black", mew=0.6, clip_on=False, transform=below)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.legend(loc="best", frameon=False)
    return figure


def samples_figure(shown: Sequence[State]) -> Figure:
    """The first MAX_PANELS sample grids side by side: the same prompts and the same noise in each."""
    every, shown = len(shown), shown[:MAX_PANELS]
    grids = [_scaled(Image.fromarray(read_rgb(state.image))) for state in shown]
    titles = [figure_text(state.label, 34, 3) for state in shown]
    height = 3.2 * grids[0].height / grids[0].width + 0.55
    figure = Figure(figsize=(3.2 * len(shown), height), layout="compressed")  # made for axes of a fixed shape
    for index, (state, grid, title) in enumerate(zip(shown, grids, titles, strict=True)):
        axes = figure.add_subplot(1, len(shown), index + 1)
        axes.imshow(np.asarray(grid))
        axes.set_title(f"{title}\nreward {state.evaluation.reward:.4f}", fontsize=10, color=state.colour)
        axes.set_xticks([])
        axes.set_yticks([])
    if every > len(shown):
        figure.suptitle(f"the first {len(shown)} of {every}; {every - len(shown)} are not shown", fontsize=10)
    return figure


def _scaled(image: Image.Image, width: int = 800) -> Image.Image:
    """Small pixels enlarged by a whole factor, large images reduced: both stay sharp."""
    if image.width <= width // 2:
        factor = width // image.width
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    height = round(image.height * width / image.width)
    return image.resize((width, height), Image.Resampling.LANCZOS) if image.width > width else image


def _new_figure(x_label: str, y_label: str, width: float = 8) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 4.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    return figure, axes


def _draw_curves(axes: Axes, runs: Sequence[RunRecord], quantity: str, metric: str) -> None:
    style = styles(runs)
    for run in runs:
        look = style[run.label]
        axes.plot(
            run.spent(quantity),
            run.curve(metric),
            color=look.colour,
            marker=look.marker,
            ms=4.5,
            lw=1.8,
            label=figure_text(run.label, LEGEND),
        )
    if quantity == "network_evaluations":
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlim(left=0)


def _annotate(axes: Axes, text: str, x: float, y: float, end: float) -> None:
    """Say what happens at the start (x, y) of a level line that runs to `end`, where a rising curve leaves room."""
    left, right = axes.get_xlim()
    early = x - left < 0.5 * (right - left)
    position, offset = ((end, y), (0, 5)) if early else ((x, y), (-14, 10))
    axes.annotate(text, position, xytext=offset, textcoords="offset points", ha="right", va="bottom", fontsize=9)
