"""Runs are compared at equal time and at equal reward."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.study.comparison import crossing, equal_reward_difference, final_difference
from scripts.study.records import RKE, VENDI
from tests.scripts.study.builders import record


def test_the_crossing_is_a_fraction_of_what_grpo_spent() -> None:
    grpo = record("GRPO", reward=(0.5, 0.65, 0.75), seconds=(0, 50, 100), forwards=200)
    found = crossing(record(), grpo)
    assert found.seconds_spent == pytest.approx(15)  # half way from 0.6 at 10 s to 0.9 at 20 s
    assert found.seconds == pytest.approx(0.15)
    assert found.network_evaluations == pytest.approx(1500 / 20000)
    early = crossing(record(), grpo, at={"network_evaluations": 5000, "seconds": 25})  # GRPO at 0.575 then
    assert early.seconds == pytest.approx(7.5 / 25)


@pytest.mark.parametrize(("grpo", "meaningful"), [((0.5, 0.95), True), ((0.5, 0.45), False)])
def test_a_level_never_reached_or_not_worth_reaching_is_no_crossing(
    grpo: tuple[float, float], meaningful: bool
) -> None:
    found = crossing(record(), record("GRPO", reward=grpo, seconds=(0, 100)))
    assert found.meaningful == meaningful
    assert not found.reached


def test_diversity_at_equal_reward_and_at_equal_time() -> None:
    pairs = []
    for seed, loss in enumerate((0.0, 0.2, 0.4)):
        drtune = record(seed=seed, vendi=(4.0, 3.5 - loss, 1.0), reward=(0.5, 0.6, 0.9))
        pairs.append((drtune, record("GRPO", seed, (0.5, 0.75), (0, 40), vendi=(4.0, 3.0))))
    # reward 0.75 is half way between DRTune's second and third evaluation: Vendi (3.5 - loss + 1) / 2
    assert equal_reward_difference(pairs, VENDI).estimate == pytest.approx(np.mean([2.25, 2.15, 2.05]) - 3.0)
    # at 20 s, where DRTune ends, GRPO is half way: 3.5
    assert final_difference(pairs, VENDI).estimate == pytest.approx(1.0 - 3.5)
    assert final_difference(pairs, RKE).count == 0  # not measured
