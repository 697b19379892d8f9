"""DRTune collapses where it is shown to keep less than the exact law leaves; which measure says so first."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scripts.study.claims.claim_2 import find, first_told, within
from scripts.study.words import said
from tests.scripts.study.claims.builders import SCENES_ENDS, TINY_ENDS, results


def runs(*columns):
    return [{"epoch": list(range(len(values))), "vendi": values, "rke": values} for values in columns]


def test_a_method_that_keeps_what_the_law_leaves_does_not_collapse():
    assert find(results()).verdict
    law = {"drtune": (0.02, 0.88)}
    found = find(results(tiny=TINY_ENDS | law, scenes=SCENES_ENDS | {"drtune": (0.2, 0.99)}))
    assert [one.collapses for one in found.testbeds] == [False, False]
    assert said("claim-2", "verdict", found) == "Not shown"


def test_what_is_kept_is_told_at_the_largest_gain_that_all_seeds_reach():
    tiny, scenes = find(results()).testbeds
    assert (tiny.level, scenes.level) == ("0.02", "0.2")
    share = tiny.measured.curve.share("vendi", 0.02)
    assert tiny.drtune.estimate == pytest.approx(0.75 / share, rel=1e-3)


def test_a_fall_is_told_from_the_evaluation_on_where_all_later_intervals_lie_below_zero():
    falling = runs([3.0, 3.1, 2.9, 2.0], [3.0, 2.9, 2.8, 2.1], [3.0, 3.0, 2.85, 2.05])
    assert first_told(falling, "vendi") == 2
    assert first_told(runs([3.0, 2.0, 3.1], [3.0, 2.1, 2.9]), "vendi") is None
    assert first_told(falling[:1], "vendi") is None


def test_what_never_falls_has_no_first_time():
    sights = {sight.title: sight for sight in find(results()).testbeds[0].sights}
    assert math.isnan(sights["entropy of modes"].seconds)
    assert sights["Vendi score"].seconds == pytest.approx(
        20 * find(results()).testbeds[0].measured.seconds_an_epoch("drtune")
    )
    assert sights["std of the ODE log-density"].left.estimate == pytest.approx(0.5)


def test_the_correlation_within_a_run_is_spearmans():
    found = {"epoch": [0, 1, 2, 3], "vendi": [3.0, 2.0, 2.5, 1.0], "spread": [40.0, 20.0, 30.0, 10.0]}
    assert within(found, "spread") == pytest.approx(1.0)
    assert within(found | {"spread": [10.0, 30.0, 20.0, 40.0]}, "spread") == pytest.approx(-1.0)
    assert np.isnan(within(found | {"spread": [10.0, None, None, 40.0]}, "spread"))
