"""Bias where the exact trace does not help, variance where it does; and nothing without power."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scripts.study.claims.claim_4 import Why, find, gradients, plane
from scripts.study.ratios import Trained, best_rates
from scripts.study.testbeds import SEARCH_SEED
from tests.scripts.study.claims.builders import BIASED, results, trained


@pytest.mark.parametrize(
    ("gains", "noise", "why"),
    [
        (BIASED, 0.01, Why.BIAS),
        (BIASED | {("ode_step", 0): 2.0}, 0.01, Why.VARIANCE),
        (BIASED | {("ode_step", probes): 2.0 for probes in (1, 0)}, 0.01, Why.TRAINS),
        (BIASED, 0.3, Why.NO_POWER),
        ({("sde", 1): 2.0}, 0.01, Why.NOT_SHOWN),
    ],
)
def test_the_verdict(gains, noise, why):
    assert find(results(gains=gains, noise=noise)).verdict == why


def test_problems_that_disagree_settle_nothing():
    mixed = [one for one in trained(BIASED) if one.problem == "gaussian"]
    mixed += [one for one in trained(BIASED | {("ode_step", 1): 2.0}) if one.problem == "mixture"]
    assert find(replace(results(), ratios=mixed)).verdict == Why.NOT_SHOWN


def test_power_is_the_controls_gain_over_its_seeds_spread():
    assert plane("gaussian", trained(BIASED, noise=0.01)).power == pytest.approx(2.0 / (0.01 * 2.5**0.5))


def test_the_searched_seed_is_in_no_mean():
    extra = Trained("gaussian", "sde", 1, 1e-4, SEARCH_SEED, 0.1, [1.0] * 12 + [99.0])
    assert plane("gaussian", [*trained(BIASED), extra]).rows[0].gain.estimate == pytest.approx(2.0)


def test_the_rate_is_that_of_the_largest_finite_gain():
    tried = [
        Trained("gaussian", "sde", 1, rate, SEARCH_SEED, 0.1, [0.0, end])
        for rate, end in ((1e-4, 0.1), (3e-4, 0.5), (1e-3, float("nan")))
    ]
    assert best_rates(tried) == {("gaussian", "sde", 1): 3e-4}


def test_the_probes_share_is_of_the_squared_length():
    rows = [
        {"form": "ode_step", "probes": 1, "source": "probes", "value": 3.0, "low": 2.0, "high": 4.0},
        {"form": "ode_step", "probes": 1, "source": "uphill", "value": 0.03, "low": 0.01, "high": None},
    ]
    (one,) = gradients(rows)
    assert (one.title, one.probe_share, one.uphill.estimate) == ("ode_step, 1", 0.25, 0.03)
