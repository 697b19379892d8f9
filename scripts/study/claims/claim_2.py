"""Claim 2: DRTune's diversity against GRPO's, at equal time and at equal reward.

Reads the runs of "claims", and those of "frontier" with a gentler learning rate: what holds at equal reward with one of
the rates only is not the method's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from flow_grpo.statistics import CountedInterval, mean_interval
from scripts.study import plan
from scripts.study.claims.claim import RUN, Claim
from scripts.study.committed import Results
from scripts.study.comparison import equal_reward_difference, final_difference, mean_final
from scripts.study.records import REWARD, RKE, VENDI
from scripts.study.study_records import DIVERSITY, SPREAD, Study, StudyRecord, by_label, paired

CLAIMED = (VENDI, RKE, SPREAD)  # what the claim names
Means = Mapping[str, CountedInterval]  # by metric
Pairs = Sequence[tuple[StudyRecord, StudyRecord]]


class Code(StrEnum):
    """What became of the claim."""

    ONE_SEED = "one seed"
    FAILS = "fails"
    HOLDS = "holds"
    BY_RATE = "by learning rate"
    TOO_FEW = "too few at equal reward"
    IN_PART = "in part"


@dataclass(frozen=True)
class Verdict:
    """The code, and by which measures of CLAIMED DRTune has less diversity than GRPO, or more."""

    code: Code
    lower_then: Sequence[str]  # at equal time
    lower: Sequence[str]  # at equal reward
    higher: Sequence[str]  # at equal reward
    claimed: int = len(CLAIMED)

    @property
    def unclear(self) -> list[str]:
        """Measures that are not lower at equal reward."""
        return [name for name in CLAIMED if name not in self.lower]


@dataclass(frozen=True)
class Row:
    """One measure."""

    name: str
    base: float
    drtune: CountedInterval  # at the end
    grpo: CountedInterval  # at the end
    there: CountedInterval  # DRTune's where its reward is GRPO's final one


@dataclass(frozen=True)
class Diversity:
    """All numbers of the claim."""

    verdict: Verdict
    at_time: Means  # DRTune minus GRPO
    at_reward: Means
    slowly: Means  # at equal reward with the gentler rate; empty before two seeds have run
    gentler: str  # the label of those runs
    falls: Means  # DRTune's end minus the base model
    pairs: int
    images: int  # of a prompt
    rows: Sequence[Row]
    figures: Sequence[str]


def find(results: Results) -> Diversity | None:
    """None without a seed of both methods."""
    pairs = results.study.pairs()
    if not pairs:
        return None
    at_time = {name: final_difference(pairs, name) for name in DIVERSITY}
    at_reward = {name: equal_reward_difference(pairs, name) for name in DIVERSITY}
    slowly = gentler(results.study)
    return Diversity(
        verdict=diversity_verdict(at_time, at_reward, slowly),
        at_time=at_time,
        at_reward=at_reward,
        slowly=slowly,
        gentler=plan.GENTLER,
        falls={name: mean_interval(drtune.gain(name) for drtune, _ in pairs) for name in CLAIMED},
        pairs=len(pairs),
        images=plan.EVALUATION["num_seeds"],
        rows=[_row(name, pairs) for name in DIVERSITY],
        figures=["diversity_vs_seconds", "diversity_vs_reward", *(["samples"] if results.samples else [])],
    )


def gentler(study: Study) -> dict[str, CountedInterval]:
    """DRTune with a tenth of the learning rate minus GRPO, at equal reward; empty before two seeds have run."""
    records = by_label(study.of("frontier")).get(plan.GENTLER, [])
    pairs = paired(records, by_label(study.of("claims")).get("GRPO", []))
    found = {name: equal_reward_difference(pairs, name) for name in DIVERSITY}
    return found if found[VENDI].count > 1 else {}


def diversity_verdict(at_time: Means, at_reward: Means, slowly: Means | None = None) -> Verdict:
    """By which of its measures DRTune has less diversity, at equal time and at equal reward.

    `slowly`: at equal reward with a smaller learning rate; what holds with one of them only is not the method's.
    """
    lower_then = [name for name in CLAIMED if at_time[name].below(0)]
    lower = [name for name in CLAIMED if at_reward[name].below(0)]
    higher = [name for name in CLAIMED if at_reward[name].above(0)]
    if any(at_time[name].count < 2 for name in CLAIMED):
        code = Code.ONE_SEED
    elif not lower_then:
        code = Code.FAILS
    elif len(lower_then) == len(lower) == len(CLAIMED):
        code = Code.BY_RATE if slowly and not slowly[VENDI].below(0) else Code.HOLDS
    else:
        code = Code.TOO_FEW if any(at_reward[name].count < 2 for name in CLAIMED) else Code.IN_PART
    return Verdict(code, lower_then, lower, higher)


def _row(name: str, pairs: Pairs) -> Row:
    return Row(
        name=name,
        base=pairs[0][0].base(name),
        drtune=mean_final((drtune for drtune, _ in pairs), name),
        grpo=mean_final((grpo for _, grpo in pairs), name),
        there=mean_interval(d.where_reward_is(g.final(REWARD), name) for d, g in pairs if g.gain(REWARD) > 0),
    )


CLAIM = Claim("claim-2", f"{RUN} --only claims", find, in_readme=True)
