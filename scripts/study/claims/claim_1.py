"""Claim 1: how long each method takes to each level of reward. Reads both testbeds' runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flow_grpo.statistics import CountedInterval
from scripts.study.claims.claim import RUN, Claim
from scripts.study.committed import Measured, Results
from scripts.study.figures import METHODS, panels
from scripts.study.outcomes import column, epochs_to, gains, of_all
from scripts.study.testbeds import CLAIMED


@dataclass(frozen=True)
class Race:
    """On one testbed."""

    measured: Measured
    level: float  # GRPO's mean gain at its end
    seconds: float  # that GRPO took for it
    reached: CountedInterval  # seconds of DRTune to that gain; none where a seed never had it
    rows: Sequence[Mapping[str, Any]]

    @property
    def faster(self) -> bool:
        """DRTune is shown to need less time than GRPO has had."""
        return self.reached.below(self.seconds)


@dataclass(frozen=True)
class Found:
    """All numbers of the claim."""

    races: Sequence[Race]

    @property
    def verdict(self) -> bool:
        """Faster on both testbeds."""
        return all(race.faster for race in self.races)


def find(results: Results) -> Found:
    """On both testbeds."""
    return Found([race(measured) for measured in results.testbeds])


def race(measured: Measured) -> Race:
    """DRTune against the gain that GRPO ends with, as a mean over its seeds."""
    grpo, each = measured.of("grpo"), measured.seconds_an_epoch("drtune")
    level = float(np.mean([gains(found)[-1] for found in grpo]))
    reached = [each * epochs_to(found, level) for found in measured.of("drtune")] if level > 0 else [math.nan]
    return Race(
        measured, level, measured.seconds_an_epoch("grpo") * grpo[0]["epoch"][-1], of_all(reached),
        [measured.rows[label] for label in CLAIMED],
    )  # fmt: skip


def draw(results: Results) -> Figure:
    """Gain in reward against seconds of training, on each testbed."""
    figure, axes = panels([measured.testbed.title for measured in results.testbeds])
    for panel, measured in zip(axes, results.testbeds, strict=True):
        for label in CLAIMED:
            style = METHODS[label]
            for i, found in enumerate(measured.of(label)):
                seconds = measured.seconds_an_epoch(label) * column(found, "epoch")
                title = measured.testbed.entry(label).title if i == 0 else None
                panel.plot(seconds, gains(found), style.line, color=style.colour, label=title, lw=1.2)
        panel.set_xlabel("seconds of training")
        panel.set_ylabel("gain in reward")
        panel.legend(fontsize="small")
    return figure


CLAIM = Claim("claim-1", f"{RUN} --only {','.join(CLAIMED)}", find, draw)
