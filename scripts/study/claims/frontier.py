"""What keeps diversity, and at what price: KL penalties, stopping early, a LoRA scaled at sampling time.

Reads the runs of "claims" and "frontier", and what lora_scales.py wrote.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from flow_grpo.statistics import CountedInterval, mean_interval
from scripts.study.claims.claim import RUN, Claim
from scripts.study.committed import Results, Rows
from scripts.study.comparison import equal_reward_difference
from scripts.study.records import ACCURACY, REWARD, RKE, VENDI
from scripts.study.study_records import Study, StudyRecord, by_label, paired

SHOWN = ("seconds", "reward", "vendi", "rke", "accuracy")


@dataclass(frozen=True)
class Point:
    """One model: a method, a seed."""

    label: str
    method: str
    seed: int
    seconds: float
    reward: float
    vendi: float
    rke: float
    accuracy: float


class Code(StrEnum):
    """Whether anything can be said."""

    ONE_SEED = "one seed"
    COMPARED = "compared"


@dataclass(frozen=True)
class Verdict:
    """The code, and the variants of DRTune that keep diversity which DRTune loses."""

    code: Code
    undoing: Sequence[str]


@dataclass(frozen=True)
class AtReward:
    """Vendi score minus GRPO's, where a run has the final reward of GRPO's of the same seed."""

    difference: CountedInterval
    pairs: int


@dataclass(frozen=True)
class Row:
    """The models of one label."""

    label: str
    seeds: int
    means: Mapping[str, CountedInterval]  # of SHOWN
    undone: CountedInterval | None  # share of DRTune's loss of Vendi score; None: of DRTune itself
    kept: CountedInterval | None  # share of DRTune's reward gain
    at_reward: AtReward | None  # None: not a run, or GRPO itself


@dataclass(frozen=True)
class Frontier:
    """All numbers of the question."""

    verdict: Verdict
    shares: Mapping[str, CountedInterval]  # of DRTune's variants: the loss of Vendi score undone
    undominated: Sequence[str]
    penalties: bool  # whether runs with a KL penalty are there
    scales: bool  # whether scaled LoRAs are there
    rows: Sequence[Row]
    figures: Sequence[str] = ("frontier",)


def find(results: Results) -> Frontier | None:
    """None before any run."""
    study = results.study
    points = frontier(study, results.scales)
    if not points:
        return None
    base = {name: study.of("claims", "frontier")[0].base(name) for name in (REWARD, VENDI)}
    rows = [_row(label, points, study, base) for label in dict.fromkeys(point.label for point in points)]
    methods = {point.label: point.method for point in points}
    shares = {r.label: r.undone for r in rows if methods[r.label] == "DRTune" and r.undone is not None}
    means = {row.label: (row.means["reward"].estimate, row.means["vendi"].estimate) for row in rows}
    return Frontier(
        verdict=undoing_verdict(shares),
        shares=shares,
        undominated=undominated({"base": (base[REWARD], base[VENDI]), **means}),
        penalties=bool(study.of("frontier")),
        scales=bool(results.scales),
        rows=rows,
    )


def frontier(study: Study, scales: Rows = ()) -> list[Point]:
    """Every run at its end, DRTune stopped at GRPO's reward, and LoRAs that were scaled at sampling time.

    Args:
        study: its groups "claims" and "frontier".
        scales: {"label", "method", "seed", "scale", "seconds"} and the metrics by name, of each scaled LoRA.
    """
    points = [_final_point(record) for record in study.of("claims", "frontier")]
    for drtune, grpo in study.pairs():
        level = grpo.final(REWARD)
        if level > grpo.base(REWARD) and level <= drtune.rising_reward[-1]:
            values = [drtune.where_reward_is(level, name) for name in ("seconds", REWARD, VENDI, RKE, ACCURACY)]
            points.append(Point("DRTune stopped at GRPO's reward", "DRTune", drtune.seed, *values))
    for entry in scales:
        label = f"{entry['label']} LoRA scaled by {entry['scale']:g}"
        values = [entry[name] for name in ("seconds", REWARD, VENDI, RKE, ACCURACY)]
        points.append(Point(label, entry["method"], entry["seed"], *values))
    return points


def _final_point(record: StudyRecord) -> Point:
    values = [record.final(name) for name in ("seconds", REWARD, VENDI, RKE, ACCURACY)]
    return Point(record.label, record.method, record.seed, *values)


def _row(label: str, points: Sequence[Point], study: Study, base: Mapping[str, float]) -> Row:
    chosen = [point for point in points if point.label == label]
    undone, kept = (None, None) if label == "DRTune" else shares_kept(points, label, base)
    return Row(
        label=label,
        seeds=len(chosen),
        means={name: mean_interval(getattr(point, name) for point in chosen) for name in SHOWN},
        undone=undone,
        kept=kept,
        at_reward=_at_reward(label, study),
    )


def _at_reward(label: str, study: Study) -> AtReward | None:
    records = by_label(study.of("claims", "frontier")).get(label, [])
    if not records or records[0].method == "GRPO":
        return None
    pairs = paired(records, by_label(study.of("claims")).get("GRPO", []))
    return AtReward(equal_reward_difference(pairs, VENDI), len(pairs))


def undominated(means: Mapping[str, tuple[float, float]]) -> list[str]:
    """Labels than which no other has both more reward and more diversity; means: (reward, diversity)."""
    return [
        label
        for label, (reward, diversity) in means.items()
        if not any(r > reward and d > diversity for r, d in means.values())
    ]


def shares_kept(
    points: Sequence[Point], label: str, base: Mapping[str, float]
) -> tuple[CountedInterval, CountedInterval]:
    """Of DRTune's loss of Vendi score, the share undone; of its reward gain, the share kept; seeds paired.

    Args:
        points: among them "DRTune" and `label`.
        label: the method in question.
        base: the base model's REWARD and VENDI.
    """
    reference = {point.seed: point for point in points if point.label == "DRTune"}
    matched = [(point, reference[point.seed]) for point in points if point.label == label and point.seed in reference]
    undone = mean_interval(_ratio(p.vendi - full.vendi, base[VENDI] - full.vendi) for p, full in matched)
    kept = mean_interval(_ratio(p.reward - base[REWARD], full.reward - base[REWARD]) for p, full in matched)
    return undone, kept


def _ratio(part: float, whole: float) -> float:
    """nan where the whole is not positive."""
    return part / whole if whole > 0 else math.nan


def undoing_verdict(shares: Mapping[str, CountedInterval]) -> Verdict:
    """Which variants of DRTune keep diversity that DRTune loses; shares of the loss that they undo."""
    code = Code.ONE_SEED if all(undone.count < 2 for undone in shares.values()) else Code.COMPARED
    return Verdict(code, [label for label, undone in shares.items() if undone.above(0)])


CLAIM = Claim("frontier", f"{RUN} --only claims,frontier && python scripts/study/lora_scales.py", find, in_readme=True)
