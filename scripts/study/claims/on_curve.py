"""Which method keeps what the exact law leaves: the recommended recipe against DRTune, and all that was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.study.claims.claim import RUN, Claim
from scripts.study.committed import Measured, Results
from scripts.study.tables import summarise

RECIPE = "anchored"  # what the README recommends
KEPT, SLOWER = 0.95, 1.5  # the goal: no less of the law's Vendi score and entropy, in no more of DRTune's time


@dataclass(frozen=True)
class Level:
    """At one gain in reward."""

    gain: str
    kept: Any  # intervals over seeds: of the exact law's Vendi score
    modes: Any  # of its entropy of modes; no count: not measured, or some seeds never came so far
    seconds: Any
    drtune: Any  # its seconds
    drtune_kept: Any

    @property
    def reached(self) -> bool:
        """All seeds have this gain."""
        return bool(self.seconds.count)

    @property
    def times(self) -> float:
        """Of DRTune's time."""
        return float(self.seconds.estimate / self.drtune.estimate)

    @property
    def met(self) -> bool:
        """The goal, by the means over seeds."""
        kept = [value.estimate for value in (self.kept, self.modes) if value.count]
        return self.reached and bool(kept) and min(kept) >= KEPT and (not self.drtune.count or self.times <= SLOWER)


@dataclass(frozen=True)
class OnCurve:
    """On one testbed."""

    measured: Measured
    levels: Sequence[Level]
    tried: Sequence[Mapping[str, Any]]

    @property
    def end(self) -> Mapping[str, Any]:
        """The recipe's row."""
        return self.measured.rows[RECIPE]


@dataclass(frozen=True)
class Found:
    """All numbers of the question."""

    testbeds: Sequence[OnCurve]
    goal: float = KEPT
    slower: float = SLOWER

    @property
    def verdict(self) -> bool:
        """The goal is met at every level of both testbeds."""
        return all(level.met for found in self.testbeds for level in found.levels)


def find(results: Results) -> Found:
    """On both testbeds."""
    return Found([on_curve(measured) for measured in results.testbeds])


def on_curve(measured: Measured) -> OnCurve:
    """Of one testbed."""
    own, drtune = measured.rows[RECIPE], measured.rows["drtune"]
    levels = [
        Level(
            gain, own["kept_at"][gain], own["modes_at"][gain], own["seconds_to"][gain], drtune["seconds_to"][gain],
            drtune["kept_at"][gain],
        )
        for gain in own["kept_at"]
    ]  # fmt: skip
    return OnCurve(measured, levels, summarise(measured.testbed, measured.tried, measured.folder))


CLAIM = Claim("on-curve", f"{RUN} --only {RECIPE},drtune", find, figure="scenes/frontier.png")
