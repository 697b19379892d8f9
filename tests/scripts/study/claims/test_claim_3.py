"""The estimator agrees with theory if its errors are what their standard errors say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scipy import stats

from scripts.study.claims.claim_3 import agreement, find
from scripts.study.words import said
from tests.scripts.study.claims.builders import results


def test_agreement_is_a_chi_square_test() -> None:
    rows = [{"error_in_standard_errors": value} for value in (0.5, -1.5, 1.0)]
    found = agreement(rows)
    assert found.statistic == pytest.approx(3.5)
    assert stats.chi2.sf(found.limit, 3) == pytest.approx(0.05)
    assert (found.largest, found.holds) == (1.5, True)
    assert not agreement([*rows, {"error_in_standard_errors": -11.0}]).holds


def test_the_verdict_on_the_entropy_estimator() -> None:
    everything = results()
    assert said("claim-3", "verdict", find(everything)) == "Holds"
    rows = [dict(row) for row in everything.validation]
    rows[0]["error_in_standard_errors"] = 9.0
    flipped = find(replace(everything, validation=rows))
    assert said("claim-3", "verdict", flipped) == "Does not hold"
    assert "9.00 standard errors" in said("claim-3", "answer", flipped)
