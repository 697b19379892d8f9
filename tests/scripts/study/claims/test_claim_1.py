"""DRTune's reward rises faster where it is shown to need less time for GRPO's last gain than GRPO had."""

from __future__ import annotations

import math

import pytest

from scripts.study.claims.claim_1 import find
from scripts.study.words import said
from tests.scripts.study.claims.builders import TINY_ENDS, results


def test_the_time_to_grpos_gain_is_read_off_drtunes_runs():
    tiny = find(results()).races[0]
    assert tiny.level == pytest.approx(0.004)
    assert tiny.reached.estimate == pytest.approx(80 * 0.1 * tiny.measured.seconds_an_epoch("drtune"), rel=1e-3)
    assert tiny.seconds == pytest.approx(80 * tiny.measured.seconds_an_epoch("grpo"))
    assert tiny.faster


def test_it_holds_on_both_testbeds_or_in_part():
    assert find(results()).verdict
    slow = find(results(tiny=TINY_ENDS | {"drtune": (0.001, 0.9)}))
    assert [race.faster for race in slow.races] == [False, True]
    assert math.isnan(slow.races[0].reached.estimate)
    assert said("claim-1", "verdict", slow) == "Holds in part"


def test_where_grpo_gains_nothing_there_is_nothing_to_reach():
    assert not find(results(tiny=TINY_ENDS | {"grpo": (-0.001, 1.0)})).races[0].faster
