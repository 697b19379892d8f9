"""Claim 4: the ODE log-probability in GRPO's ratio. Reads ratios.json, and the gradients on the tiny SD3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flow_grpo.statistics import CountedInterval, Interval
from scripts.study.claims.claim import Claim
from scripts.study.committed import Results
from scripts.study.figures import Style, panels
from scripts.study.outcomes import of_all
from scripts.study.ratios import SETUPS, Form, Setup, Trained
from scripts.study.testbeds import SEARCH_SEED
from scripts.study.words import named

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
    TRAINS = "trains"  # no less than its unbiased form
    BIAS = "bias"  # with the best trace it gains less than its unbiased form with one probe
    VARIANCE = "variance"  # with the best trace it gains no less
    NOT_SHOWN = "not shown"


@dataclass(frozen=True)
class Row:
    """A form on one problem."""

    form: Form
    rate: float
    gain: CountedInterval  # in reward, at the end
    spread: float  # standard deviation of the gain over seeds
    seconds: float  # of training, an epoch


@dataclass(frozen=True)
class Problem:
    """What became of every form on one problem."""

    setup: Setup
    rows: Mapping[Form, Row]
    fast: Trained  # `ode_step` with one probe at the largest rate: one seed, of the search

    @property
    def control(self) -> Row:
        """GRPO's own ratio."""
        return self.rows["sde", 1]

    @property
    def best(self) -> Row:
        """`ode_step` with the exact trace, or where that was not trained with most probes."""
        probes = [n for form, n in self.rows if form == "ode_step"]
        return self.rows["ode_step", EXACT if EXACT in probes else max(probes)]

    @property
    def power(self) -> float:
        """The control's gain in standard deviations of its seeds."""
        return self.control.gain.estimate / self.control.spread

    @property
    def why(self) -> Why:
        """The verdict."""
        if not self.power >= LEAST_POWER:  # nan, too
            return Why.NO_POWER
        one, unbiased = self.rows["ode_step", 1].gain, self.rows["ode_path", 1].gain
        if not unbiased.above(0):
            return Why.NOT_SHOWN
        if not one.below(unbiased.low):
            return Why.TRAINS
        return Why.BIAS if self.best.gain.below(unbiased.low) else Why.VARIANCE


@dataclass(frozen=True)
class Gradient:
    """The gradient of one form on the tiny SD3's base model."""

    form: Form
    uphill: Interval  # share of its length that points up the reward
    probe_share: float  # of its squared length that its probes add; nan: none were drawn anew


@dataclass(frozen=True)
class Found:
    """All numbers of the claim."""

    problems: Mapping[str, Problem]
    gradients: Sequence[Gradient]

    @property
    def verdict(self) -> Why:
        """Of all problems, if they agree."""
        found = {problem.why for problem in self.problems.values()}
        return found.pop() if len(found) == 1 else Why.NOT_SHOWN

    @property
    def forms(self) -> list[Form]:
        """Of any problem."""
        return list(dict.fromkeys(form for problem in self.problems.values() for form in problem.rows))


def find(results: Results) -> Found:
    """From both files; problems in the order of SETUPS."""
    problems = {name: problem(name, setup, results.ratios) for name, setup in SETUPS.items()}
    return Found(problems, gradients(results.noise))


def problem(name: str, setup: Setup, ratios: Sequence[Trained]) -> Problem:
    """One of them; draws of cfm are left out of its form, as they are the sampler's steps."""
    rows = {}
    for form, probes in setup.forms:
        mine = [one for one in ratios if one.key == (name, form, probes) and one.seed != SEARCH_SEED]
        gains = [one.gain for one in mine]
        seconds = float(np.median([one.seconds for one in mine]))
        known = (form, 1 if form == "cfm" else probes)
        rows[known] = Row(known, mine[0].rate, of_all(gains), float(np.std(gains, ddof=1)), seconds)
    return Problem(setup, rows, fastest(name, ratios))


def fastest(name: str, ratios: Sequence[Trained]) -> Trained:
    """`ode_step` with one probe at the largest rate that was tried."""
    tried = [one for one in ratios if one.key == (name, "ode_step", 1) and one.seed == SEARCH_SEED]
    return max(tried, key=lambda one: one.rate)


def gradients(noise: Sequence[Mapping[str, Any]]) -> list[Gradient]:
    """From the rows of gradient_noise.py."""
    found: dict[Form, dict[str, Interval]] = {}
    for row in noise:
        ends = [float("nan") if row[end] is None else row[end] for end in ("value", "low", "high")]
        found.setdefault((row["form"], row["probes"]), {})[row["source"]] = Interval(*ends)
    return [
        Gradient(form, s["uphill"], 1 / (1 + s["probes"].estimate) if "probes" in s else float("nan"))
        for form, s in found.items()
    ]


def draw(results: Results) -> Figure:
    """Gain in reward by epoch on each problem: a line for each form, means over seeds; and one that falls."""
    figure, axes = panels([setup.title for setup in SETUPS.values()])
    for panel, (name, setup) in zip(axes, SETUPS.items(), strict=True):
        highest = 0.0
        for form, probes in setup.forms:
            mine = [one for one in results.ratios if one.key == (name, form, probes) and one.seed != SEARCH_SEED]
            style, shade = STYLES[form], {4: 0.7, 16: 0.55}.get(probes, 1.0)
            gain = np.mean([np.subtract(one.reward, one.reward[0]) for one in mine], axis=0)
            epochs, highest = setup.every * np.arange(len(gain)), max(highest, float(gain[-1]))
            panel.plot(epochs, gain, style.line, color=style.colour, alpha=shade, label=named((form, probes)))
        fast = fastest(name, results.ratios)
        gain = np.subtract(fast.reward, fast.reward[0])
        panel.plot(setup.every * np.arange(len(gain)), gain, "x:", color="0.2", ms=4, lw=1, label="ode_step, 1, fast")
        panel.set_ylim(bottom=-0.3 * highest)
        panel.axhline(0, color="0.7", lw=0.8, zorder=0)
        panel.set_xlabel("epochs")
        panel.legend(fontsize="x-small")
    axes[0].set_ylabel("gain in reward")
    return figure


CLAIM = Claim("claim-4", "python scripts/study/ratios.py && python scripts/study/gradient_noise.py", find, draw)
