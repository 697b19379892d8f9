"""One run held against another of the same seed: when it reaches the other's reward, and what it is like there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from flow_grpo.crossing import first_crossing
from flow_grpo.statistics import CountedInterval, mean_interval
from scripts.study.records import REWARD
from scripts.study.study_records import StudyRecord


class Side(StrEnum):
    """On which side of zero an interval lies."""

    BELOW = "below"
    ABOVE = "above"
    NEITHER = "neither"
    NO_INTERVAL = "no interval"


def side(interval: CountedInterval) -> Side:
    """Of the interval of a mean; one value has none."""
    if interval.count < 2:
        return Side.NO_INTERVAL
    return Side.BELOW if interval.below(0) else Side.ABOVE if interval.above(0) else Side.NEITHER


@dataclass(frozen=True)
class Ends:
    """The runs of one label at their last evaluations."""

    label: str
    seeds: int
    means: Mapping[str, CountedInterval]  # by metric


def ends(label: str, records: Sequence[StudyRecord], names: Iterable[str]) -> Ends:
    """Means over seeds of some metrics."""
    return Ends(label, len(records), {name: mean_final(records, name) for name in names})


def mean_final(records: Iterable[StudyRecord], name: str) -> CountedInterval:
    """Mean over seeds of a metric at the last evaluation."""
    return mean_interval(record.final(name) for record in records)


@dataclass(frozen=True)
class SeedCrossing:
    """What DRTune of one seed spent until GRPO's final reward of that seed, as fractions of what GRPO spent."""

    seed: int
    level: float  # GRPO's final reward
    meaningful: bool  # whether GRPO rose at all
    seconds: float  # nan: never, or not meaningful
    network_evaluations: float  # likewise
    seconds_spent: float  # likewise; in seconds

    @property
    def reached(self) -> bool:
        """Whether there was something to reach, and it was."""
        return math.isfinite(self.seconds)


def crossing(drtune: StudyRecord, grpo: StudyRecord, at: Mapping[str, float] | None = None) -> SeedCrossing:
    """When DRTune's rising reward came to GRPO's final one; `at`: what GRPO had spent, for its reward then."""
    spent = at or {name: grpo.final(name) for name in ("seconds", "network_evaluations")}
    level = grpo.final(REWARD) if at is None else grpo.at("network_evaluations", at["network_evaluations"], REWARD)
    meaningful = level > grpo.base(REWARD)
    found = {name: first_crossing(drtune.curve(name), drtune.rising_reward, level) for name in spent}
    reached = {name: math.nan if value is None or not meaningful else value for name, value in found.items()}
    return SeedCrossing(
        seed=grpo.seed,
        level=level,
        meaningful=meaningful,
        seconds=reached["seconds"] / spent["seconds"],
        network_evaluations=reached["network_evaluations"] / spent["network_evaluations"],
        seconds_spent=reached["seconds"],
    )


def final_difference(pairs: Sequence[tuple[StudyRecord, StudyRecord]], name: str) -> CountedInterval:
    """First minus second at equal time: when the shorter of the two ended."""
    differences = []
    for first, second in pairs:
        seconds = min(first.final("seconds"), second.final("seconds"))
        differences.append(first.at("seconds", seconds, name) - second.at("seconds", seconds, name))
    return mean_interval(differences)


def equal_reward_difference(pairs: Sequence[tuple[StudyRecord, StudyRecord]], name: str) -> CountedInterval:
    """DRTune, where its rising reward was GRPO's final one, minus GRPO at its end."""
    return mean_interval(
        drtune.where_reward_is(grpo.final(REWARD), name) - grpo.final(name)
        for drtune, grpo in pairs
        if grpo.gain(REWARD) > 0
    )
