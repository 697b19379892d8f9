"""The verdict on diversity follows the numbers."""

from __future__ import annotations

import pytest

from flow_grpo.statistics import CountedInterval
from scripts.study.claims.claim_2 import diversity_verdict
from scripts.study.records import RKE, VENDI
from scripts.study.study_records import SPREAD
from scripts.study.words import said
from tests.scripts.study.builders import HIGHER, LOWER, ONE, UNCLEAR


@pytest.mark.parametrize(
    ("at_time", "at_reward", "verdict"),
    [
        ((LOWER,) * 3, (LOWER,) * 3, "holds, at equal time and at equal reward"),
        ((LOWER,) * 3, (UNCLEAR,) * 3, "holds at equal time; at equal reward DRTune's diversity is not lower by any"),
        ((LOWER, LOWER, UNCLEAR), (HIGHER, LOWER, UNCLEAR), "at equal time it holds by Vendi score and RKE; at equal"),
        ((UNCLEAR,) * 3, (UNCLEAR,) * 3, "does not hold"),
        ((HIGHER,) * 3, (HIGHER,) * 3, "does not hold"),
        ((LOWER,) * 3, (ONE,) * 3, "holds at equal time; too few seeds"),
        ((ONE,) * 3, (ONE,) * 3, "cannot be said"),
    ],
)
def test_the_verdict_on_diversity(
    at_time: list[CountedInterval], at_reward: list[CountedInterval], verdict: str
) -> None:
    names = (VENDI, RKE, SPREAD)
    means = (dict(zip(names, values, strict=True)) for values in (at_time, at_reward))
    found = said("claim-2", "verdict", diversity_verdict(*means))
    assert found.startswith(verdict)
    assert ("higher by Vendi score" in found) == (at_reward[0] is HIGHER and at_time[0] is LOWER)


@pytest.mark.parametrize(("slowly", "depends"), [(HIGHER, True), (UNCLEAR, True), (LOWER, False)])
def test_what_holds_at_one_learning_rate_only_is_not_the_methods(slowly: CountedInterval, depends: bool) -> None:
    lower = dict.fromkeys((VENDI, RKE, SPREAD), LOWER)
    found = said("claim-2", "verdict", diversity_verdict(lower, lower, {VENDI: slowly}))
    assert found.endswith("it depends on DRTune's learning rate" if depends else "at equal time and at equal reward")
