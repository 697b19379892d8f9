"""Claim 1: when DRTune's reward comes to GRPO's final one, in seconds and in network evaluations.

Reads the runs of "claims", and those of "search" for whether both ran as the search left them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from flow_grpo.recipes.base import leaves
from flow_grpo.recipes.registry import get_config
from flow_grpo.statistics import CountedInterval, mean_interval
from scripts.study.claims.claim import RUN, Claim
from scripts.study.committed import Results
from scripts.study.comparison import Ends, SeedCrossing, crossing, ends, final_difference
from scripts.study.records import ACCURACY, REWARD
from scripts.study.study_records import Study, StudyRecord, by_label

FAR = 0.2  # "far faster": in less than a fifth
SHOWN = ("seconds", "network_evaluations", "images", REWARD, ACCURACY)


class Code(StrEnum):
    """What became of the claim."""

    NO_RISE = "GRPO did not rise"
    NOT_REACHED = "not reached"
    ONE_SEED = "one seed"
    HOLDS = "holds"
    IN_PART = "in part"
    FAILS = "fails"
    NOT_SHOWN = "not shown"


@dataclass(frozen=True)
class Verdict:
    """The code, and of how many seeds."""

    code: Code
    seeds: int
    risen: int  # seeds in which GRPO's reward rose
    reached: int  # of those, seeds in which DRTune reached it
    far: float = FAR


@dataclass(frozen=True)
class Speed:
    """All numbers of the claim."""

    verdict: Verdict
    seconds: CountedInterval  # of GRPO's
    network_evaluations: CountedInterval  # of GRPO's
    gap: CountedInterval  # reward at equal time
    untuned: Mapping[str, str] | None
    base: StudyRecord  # whose first evaluation is of the base model
    methods: Sequence[Ends]
    crossings: Sequence[SeedCrossing]
    figures: Sequence[str] = ("reward",)


def find(results: Results) -> Speed | None:
    """None without a seed of both methods."""
    study, pairs = results.study, results.study.pairs()
    if not pairs:
        return None
    crossings = [crossing(*pair) for pair in pairs]
    return Speed(
        verdict=speed_verdict(crossings),
        seconds=mean_interval(found.seconds for found in crossings),
        network_evaluations=mean_interval(found.network_evaluations for found in crossings),
        gap=final_difference(pairs, REWARD),
        untuned=untuned(study),
        base=study.of("claims")[0],
        methods=[ends(label, records, SHOWN) for label, records in by_label(study.of("claims")).items()],
        crossings=crossings,
    )


def speed_verdict(crossings: Sequence[SeedCrossing]) -> Verdict:
    """Far faster: both intervals below FAR, and no seed that never gets there."""
    risen = [found for found in crossings if found.meaningful]
    reached = [found for found in risen if found.reached]
    return Verdict(_code(risen, reached), len(crossings), len(risen), len(reached))


def _code(risen: Sequence[SeedCrossing], reached: Sequence[SeedCrossing]) -> Code:
    if not risen:
        return Code.NO_RISE
    if len(reached) < len(risen):
        return Code.NOT_REACHED
    if len(reached) < 2:
        return Code.ONE_SEED
    fractions = [mean_interval(f.seconds for f in reached), mean_interval(f.network_evaluations for f in reached)]
    if all(fraction.below(FAR) for fraction in fractions):
        return Code.HOLDS
    if all(fraction.below(1) for fraction in fractions):
        return Code.IN_PART
    return Code.FAILS if any(fraction.above(1) for fraction in fractions) else Code.NOT_SHOWN


def untuned(study: Study) -> dict[str, str] | None:
    """Methods whose runs do not have the settings that the search found best -> label of those; None: no search."""
    if not study.of("search"):
        return None
    late = {}
    for method, ran in {record.method: record for record in study.of("claims")}.items():
        tried = [record for record in study.of("search") if record.method == method]
        best = max(tried, key=lambda record: record.final(REWARD), default=ran)
        if _settings(best) != _settings(ran):
            late[method] = best.label
    return late


def _settings(record: StudyRecord) -> dict[str, Any]:
    return dict(leaves(get_config(record.recipe))) | dict(record.overrides)


CLAIM = Claim("claim-1", f"{RUN} --only claims", find, in_readme=True)
