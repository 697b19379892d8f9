"""Bias where the best trace does not help, variance where it does; and nothing without power."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scripts.study.claims.claim_4 import Why, find, gradients, problem
from scripts.study.ratios import SETUPS, Trained, best_rates
from scripts.study.testbeds import SEARCH_SEED
from tests.scripts.study.claims.builders import BEST_TRACES, BIASED, results, trained

GAUSSIAN = SETUPS["gaussian"]


@pytest.mark.parametrize(
    ("gains", "noise", "why"),
    [
        (BIASED, 0.01, Why.BIAS),
        (BIASED | dict.fromkeys(BEST_TRACES, 2.0), 0.01, Why.VARIANCE),
        (BIASED | dict.fromkeys((("ode_step", 1), *BEST_TRACES), 2.0), 0.01, Why.TRAINS),
        (BIASED, 0.3, Why.NO_POWER),
        ({("sde", 1): 2.0}, 0.01, Why.NOT_SHOWN),
    ],
)
def test_the_verdict(gains, noise, why):
    assert find(results(gains=gains, noise=noise)).verdict == why


def test_problems_that_disagree_settle_nothing():
    mixed = [one for one in trained(BIASED) if one.problem != "mixture"]
    mixed += [one for one in trained(BIASED | {("ode_step", 1): 2.0}) if one.problem == "mixture"]
    assert find(replace(results(), ratios=mixed)).verdict == Why.NOT_SHOWN


def test_power_is_the_controls_gain_over_its_seeds_spread():
    found = problem("gaussian", GAUSSIAN, trained(BIASED, noise=0.01))
    assert found.power == pytest.approx(2.0 / (0.01 * 2.5**0.5))


def test_the_searched_seed_is_in_no_mean():
    extra = Trained("gaussian", "sde", 1, 1e-4, SEARCH_SEED, 0.1, [1.0] * 12 + [99.0])
    assert problem("gaussian", GAUSSIAN, [*trained(BIASED), extra]).control.gain.estimate == pytest.approx(2.0)


def test_where_the_exact_trace_was_not_trained_the_most_probes_stand_for_it():
    forms = {name: one.best.form for name, one in find(results()).problems.items()}
    assert forms == {"gaussian": ("ode_step", 0), "mixture": ("ode_step", 0), "images": BEST_TRACES[1]}


def test_the_rate_is_that_of_the_largest_finite_gain():
    tried = [
        Trained("gaussian", "sde", 1, rate, SEARCH_SEED, 0.1, [0.0, end])
        for rate, end in ((1e-4, 0.1), (3e-4, 0.5), (1e-3, float("nan")))
    ]
    assert best_rates(tried) == {("gaussian", "sde", 1): 3e-4}


def test_forms_that_were_not_searched_have_the_rate_of_their_fewest_probes():
    tried = [Trained("images", "ode_path", 1, 1e-3, SEARCH_SEED, 0.1, [0.0, 1.0])]
    found = best_rates(tried)
    assert found[("images", "ode_path", 4)] == 1e-3
    assert all(key[:2] == ("images", "ode_path") for key in found)


def test_the_probes_share_is_of_the_squared_length():
    rows = [
        {"form": "ode_step", "probes": 1, "source": "probes", "value": 3.0, "low": 2.0, "high": 4.0},
        {"form": "ode_step", "probes": 1, "source": "uphill", "value": 0.03, "low": 0.01, "high": None},
    ]
    (one,) = gradients(rows)
    assert (one.form, one.probe_share, one.uphill.estimate) == (("ode_step", 1), 0.25, 0.03)
