"""What keeps diversity is found, and said."""

from __future__ import annotations

import pytest

from flow_grpo.statistics import CountedInterval
from scripts.study.claims.frontier import CLAIM, frontier, shares_kept, undoing_verdict, undominated
from scripts.study.pages import section
from scripts.study.records import ACCURACY, REWARD, RKE, VENDI
from scripts.study.words import said
from tests.scripts.study.builders import HIGHER, LOWER, ONE, UNCLEAR, record, results_of, study_of


def test_the_frontier_has_every_seed_and_where_drtune_would_have_been_stopped() -> None:
    whole = study_of(
        [
            record(vendi=(4, 3, 1), rke=(4, 3, 1), accuracy=(0.8, 0.9, 0.7)),
            record("GRPO", reward=(0.5, 0.75), seconds=(0, 20), vendi=(4, 3.5), rke=(4, 3.5), accuracy=(0.8, 0.9)),
            record("DRTune beta 1", group="frontier", reward=(0.5, 0.7), seconds=(0, 20), vendi=(4, 2.5)),
        ]
    )
    scales = [
        {"label": "DRTune", "method": "DRTune", "seed": 0, "scale": 0.5, "seconds": 20.0}
        | {REWARD: 0.7, VENDI: 3.2, RKE: 3.0, ACCURACY: 0.9}
    ]
    points = {point.label: point for point in frontier(whole, scales)}
    stopped = points["DRTune stopped at GRPO's reward"]
    assert (stopped.seconds, stopped.reward, stopped.vendi) == pytest.approx((15, 0.75, 2.0))
    assert points["DRTune LoRA scaled by 0.5"].vendi == 3.2
    assert len(points) == 5
    base = {REWARD: 0.5, VENDI: 4.0}
    undone, kept = shares_kept(list(points.values()), "DRTune beta 1", base)
    assert (undone.estimate, kept.estimate) == pytest.approx((0.5, 0.5))  # 1 -> 2.5 of 1 -> 4; 0.2 of 0.4


def test_what_another_beats_in_both_is_dominated() -> None:
    assert undominated({"a": (1, 1), "b": (2, 2), "c": (3, 0), "d": (0, 3), "e": (1, 2)}) == ["b", "c", "d", "e"]


def test_a_method_that_never_has_grpos_reward_is_said_not_to_reach_it() -> None:
    diversity = {"vendi": (4.0, 3.0, 1.0), "rke": (4.0, 3.0, 1.0), "accuracy": (0.8, 0.9, 0.7)}
    runs = [record(**diversity), record("GRPO", reward=(0.5, 0.6, 0.75), **diversity)]
    runs += [record("DRTune beta 1", reward=(0.5, 0.55, 0.6), group="frontier", **diversity)]
    runs += [record("DRTune beta 0.1", reward=(0.5, 0.6, 0.8), group="frontier", **diversity)]
    body = section(CLAIM, results_of(study_of(runs))).body
    rows = [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("| ")]
    last = {row[0]: row[-1] for row in rows}
    assert last["DRTune beta 1"] == "not reached"
    assert last["DRTune beta 0.1"] == "+0.50 (one seed)"  # 0.75 lies three quarters of the way from 3 to 1


def test_the_verdict_on_what_undoes_the_collapse() -> None:
    def verdict(shares: dict[str, CountedInterval]) -> str:
        return said("frontier", "verdict", undoing_verdict(shares))

    assert verdict({"beta 1": HIGHER, "beta 0.1": UNCLEAR}) == "shown to undo some of it: beta 1"
    assert verdict({"beta 1": LOWER}) == "shown to undo some of it: none"
    assert verdict({"beta 1": ONE}).startswith("cannot be said")
    assert verdict({}).startswith("cannot be said")
