"""Claim 2: what the reward leaves of diversity, against the exact law, and which measure sees its fall first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from flow_grpo.statistics import CountedInterval, mean_interval
from scripts.study.claims.claim import RUN, Claim
from scripts.study.committed import Measured, Results
from scripts.study.figures import panels
from scripts.study.outcomes import Outcome, column, gains
from scripts.study.testbeds import CLAIMED

MEASURES: Mapping[str, str] = {  # figure -> as tables have it
    "vendi": "Vendi score",
    "rke": "RKE",
    "modes": "entropy of modes",
    "spread": "std of the ODE log-density",
    "nats": "differential entropy",
}
LINES = {"vendi": "-o", "rke": "--s", "modes": "-.D", "spread": ":^", "nats": "-x"}
COLLAPSED = 0.95  # a method that keeps less of the exact law's Vendi score has paid for nothing


@dataclass(frozen=True)
class Sight:
    """How DRTune's runs look to one measure."""

    title: str
    seconds: float  # the first evaluation from which on the fall is told from nothing; nan: it never is
    gain: float  # in reward, there
    measured: bool  # more often than at the end
    left: CountedInterval  # at the end, as a share of the base's; of nats, a difference
    follows: CountedInterval  # rank correlation with the Vendi score within a run, over runs of all methods


@dataclass(frozen=True)
class Collapse:
    """On one testbed."""

    measured: Measured
    level: str  # the largest gain that all seeds of DRTune reach
    rows: Sequence[Mapping[str, Any]]
    sights: Sequence[Sight]

    @property
    def drtune(self) -> CountedInterval:
        """What DRTune keeps of the exact law's Vendi score at the level."""
        found: CountedInterval = self.measured.rows["drtune"]["kept_at"][self.level]
        return found

    @property
    def collapses(self) -> bool:
        """DRTune is shown to keep less than the exact law leaves."""
        return self.drtune.below(COLLAPSED)


@dataclass(frozen=True)
class Found:
    """All numbers of the claim."""

    testbeds: Sequence[Collapse]
    limit: float = COLLAPSED

    @property
    def verdict(self) -> bool:
        """On both testbeds."""
        return all(found.collapses for found in self.testbeds)


def find(results: Results) -> Found:
    """On both testbeds."""
    return Found([collapse(measured) for measured in results.testbeds])


def collapse(measured: Measured) -> Collapse:
    """Of one testbed."""
    kept = measured.rows["drtune"]["kept_at"]
    level = [gain for gain in kept if kept[gain].count or gain == next(iter(kept))][-1]
    rows = [measured.rows[label] for label in CLAIMED]
    return Collapse(measured, level, rows, [sight(measured, name) for name in MEASURES])


def sight(measured: Measured, name: str) -> Sight:
    """How one measure sees DRTune's runs."""
    runs = [found for found in measured.of("drtune") if np.isfinite(column(found, name)[-1])]
    ends = [column(found, name)[[0, -1]] for found in runs]
    left = mean_interval(end - base if name == "nats" else end / base for base, end in ends)
    place = first_told(runs, name)
    seconds = gain = math.nan
    if place is not None:
        seconds = measured.seconds_an_epoch("drtune") * runs[0]["epoch"][place]
        gain = float(np.mean([gains(found)[place] for found in runs]))
    claimed = [found for label in CLAIMED for found in measured.of(label)]
    measured_often = any(np.isfinite(column(found, name)).sum() > 2 for found in runs)
    follows = mean_interval(within(found, name) for found in claimed)
    return Sight(MEASURES[name], seconds, gain, measured_often, left, follows)


def first_told(runs: Sequence[Outcome], name: str) -> int | None:
    """The evaluation from which on the 95 % interval over seeds of the fall lies below zero; None: there is none."""
    if len(runs) < 2:
        return None
    values = np.array([column(found, name) for found in runs])
    told = [mean_interval(values[:, i] - values[:, 0]).below(0) for i in range(values.shape[1])]
    after = len(told) - told[::-1].index(False)
    return after if after < len(told) else None


def within(found: Outcome, name: str) -> float:
    """Spearman's rank correlation with the Vendi score over a run's evaluations, the base's among them; nan: none."""
    values, vendi = column(found, name), column(found, "vendi")
    known = np.isfinite(values) & np.isfinite(vendi)
    if known.sum() < 4 or np.ptp(values[known]) == 0 or np.ptp(vendi[known]) == 0:
        return math.nan
    return float(spearmanr(values[known], vendi[known]).statistic)


def draw(results: Results) -> Figure:
    """Each measure in DRTune's runs, as a share of the base's, against the gain in reward; the exact law's beside."""
    figure, axes = panels([f"DRTune on {measured.testbed.title}" for measured in results.testbeds])
    for panel, measured in zip(axes, results.testbeds, strict=True):
        curve, runs = measured.curve, measured.of("drtune")
        law = np.array(curve.law["reward"]) - curve.law["reward"][0]
        vendi = 100 * np.array(curve.law["vendi"]) / curve.law["vendi"][0]
        panel.plot(law, vendi, "k-", lw=2.5, label="Vendi score of the exact law")
        gain = np.mean([gains(found) for found in runs], axis=0)
        for name, title in MEASURES.items():
            values = np.array([column(found, name) for found in runs])
            if name == "nats" or np.isfinite(values).all(0).sum() < 2:
                continue
            share = 100 * np.mean(values / values[:, :1], axis=0)
            known = np.isfinite(share)
            panel.plot(gain[known], share[known], LINES[name], label=title, ms=4, lw=1.2)
        panel.set_xlabel("gain in reward")
        panel.set_ylabel("% of the base model's")
        panel.legend(fontsize="small")
    return figure


CLAIM = Claim("claim-2", f"{RUN} --only {','.join(CLAIMED)}", find, draw)
