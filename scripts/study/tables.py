"""A testbed's table.md and frontier.png: every method's means over seeds beside the exact law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flow_grpo.curve import Curve
from flow_grpo.files import read_object
from flow_grpo.methods.registry import METHODS
from flow_grpo.scenes.captions import KINDS
from flow_grpo.statistics import mean_interval
from scripts.study.outcomes import COLUMNS, Outcome, column, epochs_to, gains, kept, kept_at, of_all, right
from scripts.study.testbeds import COST, CURVE, SEARCH_SEED, Testbed
from scripts.study.words import environment


def summarise(testbed: Testbed, outcomes: Sequence[Outcome], out: Path) -> list[dict[str, Any]]:
    """A row for each entry: at the end of its runs, and at some gains, means over seeds with 95 % t-intervals."""
    cost, curve = read_object(out / COST), Curve.read(out / CURVE)
    rows = []
    for label in dict.fromkeys(o["label"] for o in outcomes):
        mine = [o for o in outcomes if o["label"] == label]
        entry, seconds = testbed.entry(label), testbed.seconds_an_epoch(label, cost)
        row: dict[str, Any] = {"label": label, "title": entry.title, "seeds": len(mine), "epochs": mine[0]["epoch"][-1]}
        row |= {"seconds": seconds, "peak_mib": cost.get("peak_mib", {}).get(label, math.nan)}
        names = {"reward", *COLUMNS, *testbed.columns}
        row |= {name: mean_interval(column(o, name)[-1] for o in mine) for name in names}
        row["base"] = {name: column(mine[0], name)[0] for name in names}
        for name, figure in {"kept": "vendi", "kept_modes": "modes"}.items():
            row[name] = of_all([kept(o, figure, curve)[-1] for o in mine])
        row["gain"] = mean_interval(gains(o)[-1] for o in mine)
        if "judge_two" in testbed.columns:
            row["right"], row["base"]["right"] = mean_interval(right(o)[-1] for o in mine), right(mine[0])[0]
            row["of_base"] = mean_interval(right(o)[-1] / right(o)[0] for o in mine)
        row["seconds_to"] = {f"{g:g}": of_all([seconds * epochs_to(o, g) for o in mine]) for g in testbed.gains}
        row["kept_at"] = {f"{g:g}": of_all([kept_at(o, g, "vendi", curve) for o in mine]) for g in testbed.gains}
        row["modes_at"] = {f"{g:g}": of_all([kept_at(o, g, "modes", curve) for o in mine]) for g in testbed.gains}
        rows.append(row)
    return rows


def table(testbed: Testbed, outcomes: Sequence[Outcome], out: Path) -> str:
    """The page's text."""
    tried = [o for o in outcomes if o["seed"] == SEARCH_SEED]
    rows = summarise(testbed, [o for o in outcomes if o["seed"] != SEARCH_SEED], out)
    return (
        environment()
        .get_template(f"table_{testbed.name}.md.j2")
        .render(
            rows=sorted(rows, key=lambda row: -row["reward"].estimate) if testbed.name == "tiny" else rows,
            tried=summarise(testbed, tried, out),
            curve=read_object(out / CURVE),
            cost=read_object(out / COST),
            gains=[f"{gain:g}" for gain in testbed.gains],
            testbed=testbed,
            kinds=KINDS,
        )
    )


def draw(testbed: Testbed, outcomes: Sequence[Outcome], out: Path) -> None:
    """Diversity against reward beside the exact law, a line for each method: means over seeds, seconds as colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cost, curve = read_object(out / COST), Curve.read(out / CURVE)
    most = max(testbed.seconds.values())
    law = np.array(curve.law["reward"]) - curve.law["reward"][0], 100 * np.array(curve.law["vendi"])
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    titles = {True: "by the reward's gradient", False: "by rewards alone"}
    for axes, (gradient, title) in zip(panels, titles.items(), strict=True):
        axes.plot(law[0], law[1] / curve.law["vendi"][0], "k-", lw=2.5, label="exact law")
        labels = [n for n, entry in testbed.entries.items() if METHODS[entry.method].reward_gradient == gradient]
        for marker, label in zip("osDv^<>PX*hpd8H", labels, strict=False):
            mine = [o for o in outcomes if o["label"] == label and o["seed"] != SEARCH_SEED]
            if not mine:
                continue
            gain, left, seconds = mean_path(mine, testbed.seconds_an_epoch(label, cost))
            axes.plot(gain, left, "-", lw=0.8, color="0.7", zorder=1)
            axes.plot([], [], marker, color="0.4", label=testbed.entry(label).title)
            dots = axes.scatter(
                gain, left, c=seconds, vmin=0, vmax=most, cmap="viridis_r", marker=marker, s=34, zorder=2
            )
        axes.set_title(title)
        axes.set_xlabel("gain in mean reward over the base model")
        axes.legend(fontsize="small", loc="upper right")
    panels[0].set_ylabel("Vendi score within a prompt, % of the base's")
    figure.colorbar(dots, ax=panels, label="seconds of training", pad=0.01)
    figure.savefig(out / "frontier.png", dpi=130, metadata={"Software": None})


def mean_path(mine: Sequence[Outcome], seconds: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gain, Vendi score in % of the base's, and seconds, means over seeds, at the evaluations of the first seed."""
    epochs = column(mine[0], "epoch")

    def mean(values: list[np.ndarray]) -> np.ndarray:
        return np.mean([np.interp(epochs, column(o, "epoch"), v) for o, v in zip(mine, values, strict=True)], axis=0)

    vendi = [column(o, "exact_vendi") for o in mine]
    return mean([gains(o) for o in mine]), mean([100 * values / values[0] for values in vendi]), seconds * epochs
