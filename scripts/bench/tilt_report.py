"""The table and the figure of tilt.py, from its results alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flow_grpo.statistics import CountedInterval, mean_interval
from scripts.bench.tilt_measures import DIRECTIONS
from scripts.bench.tilt_methods import AT_END, AT_LEVEL, BASE, DISCRETE, REFERENCES

TEMPLATE = "tilt.md.j2"
MEASURES = ("mean", "covariance", "modes", "w1_reward", "w1_sliced")
STYLES = {AT_LEVEL: ("#0072B2", "o", "at equal reward"), AT_END: ("#D55E00", "D", "at the end, own λ")}  # Okabe, Ito
PANELS = {"w1_sliced": "sliced W₁ to the exact law", "kl": "KL to the exact law, nats"}
NOTHING = "-"  # a cell without a number
FLOOR = 1e-4  # a KL that is estimated as less is drawn here


@dataclass(frozen=True)
class Line:
    """One line of a table: means over the seeds that came there."""

    entry: str
    seeds: int
    strength: CountedInterval
    measures: Mapping[str, CountedInterval]  # the KL among them
    evaluations: CountedInterval  # of the network, in thousands


def lines(results: Mapping[str, Any], problem: str, at: str) -> list[Line]:
    """Of one problem and one comparison, in the order of the results; entries without a lambda have none at the end."""
    rows = [row for row in results["rows"] if row["problem"] == problem and row["at"] == at]
    entries = [name for name, e in results["entries"].items() if at == AT_LEVEL or e["strength"] is not None]
    return [_line(name, [row for row in rows if row["entry"] == name]) for name in (*REFERENCES, *entries)]


def _line(name: str, rows: Sequence[Mapping[str, Any]]) -> Line:
    def over(found: Iterable[float | None]) -> CountedInterval:
        return mean_interval(math.nan if one is None else one for one in found)

    measures = {key: over(row["measures"][key] for row in rows) for key in MEASURES}
    return Line(
        name, len(rows), over(row["strength"] for row in rows), measures | {"kl": over(row["kl"] for row in rows)},
        over(row["network_evaluations"] / 1000 for row in rows),
    )  # fmt: skip


def shown(interval: CountedInterval, digits: int = 3) -> str:
    """A mean with half its interval's width, where there is one; a dash without a mean."""
    if not interval.count:
        return NOTHING
    half = f" ± {interval.high - interval.estimate:.{digits}f}" if interval.known else ""
    return f"{interval.estimate:.{digits}f}{half}"


def table(results: Mapping[str, Any]) -> str:
    """Markdown."""
    environment = Environment(  # Markdown: nothing is escaped
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    problems = list(dict.fromkeys(row["problem"] for row in results["rows"]))
    return environment.get_template(TEMPLATE).render(
        results=results,
        problems=problems,
        lines=lines,
        shown=shown,
        nothing=NOTHING,
        level=AT_LEVEL,
        end=AT_END,
        trained=_trained,
        directions=DIRECTIONS,
    )


def _trained(line: Line) -> bool:
    return line.entry not in REFERENCES


# --- the figure -------------------------------------------------------------------------------------------------


def figure(results: Mapping[str, Any]) -> Figure:
    """A row of panels for each problem: sliced W1 and KL of every method, and of what nothing was trained for."""
    problems = list(dict.fromkeys(row["problem"] for row in results["rows"]))
    names = [BASE, *results["entries"]]
    drawn = Figure(figsize=(10, 1.3 + len(problems) * (0.6 + 0.24 * len(names))), layout="constrained")
    panels = drawn.subplots(len(problems), len(PANELS), squeeze=False, sharex="col")
    for row, problem in zip(panels, problems, strict=True):
        for axes, (key, title) in zip(row, PANELS.items(), strict=True):
            _panel(axes, results, problem, key, names)
            axes.set_title(f"{problem}: {title}", loc="left", fontsize=10)
        row[1].set_yticklabels([])
    drawn.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return drawn


def _panel(axes: Axes, results: Mapping[str, Any], problem: str, key: str, names: Sequence[str]) -> None:
    for at, (colour, marker, label) in STYLES.items():
        found = {line.entry: line for line in lines(results, problem, at)}
        if at == AT_LEVEL:
            floor = max(found[DISCRETE].measures[key].estimate, FLOOR)
            axes.axvline(floor, color="#777777", linestyle="--", linewidth=1, label="the law's own velocity")
        for place, name in enumerate(names):
            values = [max(value, FLOOR) for value in _values(results, problem, at, name, key)]
            offset = 0.0 if at == AT_LEVEL else 0.22
            axes.plot(values, [place + offset] * len(values), marker, color=colour, ms=4.5, alpha=0.75, label=label)
            label = "_"  # one entry of the legend
    axes.set(xscale="log", ylim=(len(names) - 0.4, -0.6))
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5")
    axes.set_axisbelow(True)


def _values(results: Mapping[str, Any], problem: str, at: str, name: str, key: str) -> list[float]:
    """One of each seed."""
    rows = [row for row in results["rows"] if (row["problem"], row["at"], row["entry"]) == (problem, at, name)]
    return [row["kl"] if key == "kl" else row["measures"][key] for row in rows]
