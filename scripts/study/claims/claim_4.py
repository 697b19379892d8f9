"""Claim 4: the ODE log-probability in GRPO's ratio. Reads the runs in the plane, and the gradients on the tiny SD3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flow_grpo.statistics import CountedInterval, Interval, mean_interval
from scripts.study.claims.claim import Claim
from scripts.study.committed import Results
from scripts.study.figures import Style, panels
from scripts.study.ratios import EPOCHS, EVERY, FORMS, PROBLEMS, RATES, Trained
from scripts.study.testbeds import SEARCH_SEED

EXACT = 0  # probes
LEAST_POWER = 10.0  # the control's gain in standard deviations of its seeds
STYLES = {
    "sde": Style("#0072B2", "-"),
    "cfm": Style("#CC79A7", ":"),
    "ode_step": Style("#D55E00", "--"),
    "ode_path": Style("#009E73", "-."),
}


class Why(StrEnum):
    """Why `ode_step` does not train, or that it does."""

    NO_POWER = "no power"  # the control gains too little over its seeds' spread
    TRAINS = "trains"
    BIAS = "bias"  # nor does it with the exact trace
    VARIANCE = "variance"  # it does with the exact trace
    NOT_SHOWN = "not shown"


@dataclass(frozen=True)
class Row:
    """A form on one problem."""

    form: str
    probes: int
    rate: float
    gain: CountedInterval  # in reward, at the end
    spread: float  # standard deviation of the gain over seeds
    seconds: float  # of training, an epoch

    @property
    def title(self) -> str:
        """As tables have it."""
        if self.form == "sde":
            return "sde"
        if self.form == "cfm":
            return f"cfm, {self.probes} draws"
        return f"{self.form}, {'exact' if self.probes == EXACT else self.probes}"


@dataclass(frozen=True)
class Plane:
    """One problem."""

    problem: str
    rows: Sequence[Row]
    fast: Trained  # `ode_step` with the exact trace at the largest rate: one seed, of the search

    def row(self, form: str, probes: int) -> Row:
        """Of one form."""
        return next(row for row in self.rows if (row.form, row.probes) == (form, probes))

    @property
    def power(self) -> float:
        """The control's gain in standard deviations of its seeds."""
        control = self.rows[0]
        return control.gain.estimate / control.spread

    @property
    def why(self) -> Why:
        """The verdict."""
        one, exact = self.row("ode_step", 1), self.row("ode_step", EXACT)
        if self.power < LEAST_POWER:
            return Why.NO_POWER
        if one.gain.above(0):
            return Why.TRAINS
        if exact.gain.above(0):
            return Why.VARIANCE
        return Why.BIAS if self.row("ode_path", EXACT).gain.above(0) else Why.NOT_SHOWN


@dataclass(frozen=True)
class Gradient:
    """The gradient of one form on the tiny SD3's base model."""

    title: str
    uphill: Interval  # share of its length that points up the reward
    probe_share: float  # of its squared length that its probes add; nan: none were drawn anew


@dataclass(frozen=True)
class Found:
    """All numbers of the claim."""

    planes: Sequence[Plane]
    gradients: Sequence[Gradient]
    rates: Sequence[float] = RATES
    epochs: int = EPOCHS

    @property
    def verdict(self) -> Why:
        """Of both problems, if they agree."""
        found = {plane.why for plane in self.planes}
        return found.pop() if len(found) == 1 else Why.NOT_SHOWN


def find(results: Results) -> Found:
    """From both files."""
    return Found([plane(problem, results.ratios) for problem in PROBLEMS], gradients(results.noise))


def plane(problem: str, ratios: Sequence[Trained]) -> Plane:
    """The rows of one problem, in the order of FORMS."""
    rows = []
    for form, probes in FORMS:
        mine = [one for one in ratios if one.key == (problem, form, probes) and one.seed != SEARCH_SEED]
        found = [one.gain for one in mine]
        seconds = float(np.median([one.seconds for one in mine]))
        rows.append(Row(form, probes, mine[0].rate, mean_interval(found), float(np.std(found, ddof=1)), seconds))
    return Plane(problem, rows, fastest(problem, ratios))


def fastest(problem: str, ratios: Sequence[Trained]) -> Trained:
    """`ode_step` with the exact trace at the largest rate that was tried."""
    tried = [one for one in ratios if one.key == (problem, "ode_step", EXACT) and one.seed == SEARCH_SEED]
    return max(tried, key=lambda one: one.rate)


def gradients(noise: Sequence[Mapping[str, Any]]) -> list[Gradient]:
    """From the rows of gradient_noise.py."""
    found: dict[tuple[str, int], dict[str, Interval]] = {}
    for row in noise:
        ends = [float("nan") if row[end] is None else row[end] for end in ("value", "low", "high")]
        found.setdefault((row["form"], row["probes"]), {})[row["source"]] = Interval(*ends)
    return [
        Gradient(
            Row(form, probes, 0, CountedInterval(0), 0, 0).title,
            sources["uphill"],
            1 / (1 + sources["probes"].estimate) if "probes" in sources else float("nan"),
        )
        for (form, probes), sources in found.items()
    ]


def draw(results: Results) -> Figure:
    """Gain in reward by epoch on each problem: a line for each form, means over seeds; and one that falls."""
    figure, axes = panels([f"the {problem} in the plane" for problem in PROBLEMS])
    for panel, problem in zip(axes, PROBLEMS, strict=True):
        for form, probes in FORMS:
            mine = [one for one in results.ratios if one.key == (problem, form, probes) and one.seed != SEARCH_SEED]
            style, title = STYLES[form], Row(form, probes, 0, CountedInterval(0), 0, 0).title
            shade = {4: 0.7, 16: 0.55}.get(probes, 1.0)
            gain = np.mean([np.subtract(one.reward, one.reward[0]) for one in mine], axis=0)
            panel.plot(EVERY * np.arange(len(gain)), gain, style.line, color=style.colour, alpha=shade, label=title)
        fast = fastest(problem, results.ratios)
        gain = np.subtract(fast.reward, fast.reward[0])
        title = f"ode_step, exact, at {fast.rate:g}: one seed"
        panel.plot(EVERY * np.arange(len(gain)), gain, "x:", color="0.2", ms=4, lw=1, label=title)
        panel.axhline(0, color="0.7", lw=0.8, zorder=0)
        panel.set_xlabel("epochs")
        panel.set_ylabel("gain in reward")
        panel.legend(fontsize="small")
    return figure


CLAIM = Claim("claim-4", "python scripts/study/ratios.py && python scripts/study/gradient_noise.py", find, draw)
