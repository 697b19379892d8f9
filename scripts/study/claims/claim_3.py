"""Claim 3: the entropy estimator against theory. Reads assets/figures/entropy_validation/results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import chi2

from flow_grpo.statistics import LEVEL, NORMAL_95, Interval
from scripts.study.claims.claim import Claim
from scripts.study.committed import Results, Rows


@dataclass(frozen=True)
class Agreement:
    """Errors in standard errors against a standard normal, together."""

    targets: int
    statistic: float  # sum of squares
    limit: float  # its 95 % quantile
    largest: float  # error in absolute value, in standard errors

    @property
    def holds(self) -> bool:
        """The errors are no larger than their standard errors explain."""
        return self.statistic <= self.limit


@dataclass(frozen=True)
class Row:
    """One target by one velocity field."""

    target: str
    field: str  # "exact", or how it was learnt
    estimate: float  # nats
    theory: float
    error: Interval
    standard_errors: float  # the error, in them


@dataclass(frozen=True)
class Validation:
    """All numbers of the claim."""

    agreement: Agreement  # of the exact fields
    learnt: int
    off: Sequence[str]  # learnt ones whose error is larger than `most` standard errors
    rows: Sequence[Row]
    most: float = NORMAL_95

    @property
    def verdict(self) -> bool:
        """Whether it holds."""
        return self.agreement.holds


def find(results: Results) -> Validation:
    """Of the exact velocity fields together, and of the learnt ones one by one."""
    exact = [row for row in results.validation if row["field"] == "exact"]
    learnt = [row for row in results.validation if row["field"] != "exact"]
    return Validation(
        agreement=agreement(exact),
        learnt=len(learnt),
        off=[row["target"] for row in learnt if abs(row["error_in_standard_errors"]) > NORMAL_95],
        rows=[_row(row) for row in results.validation],
    )


def agreement(rows: Rows) -> Agreement:
    """Of rows of the validation."""
    errors = np.array([row["error_in_standard_errors"] for row in rows])
    return Agreement(len(rows), float(np.square(errors).sum()), float(chi2.ppf(LEVEL, len(rows))), abs(errors).max())


def _row(row: Mapping[str, Any]) -> Row:
    error, half = row["error"], NORMAL_95 * row["standard_error"]
    interval = Interval(error, error - half, error + half)
    return Row(row["target"], row["field"], row["estimate"], row["theory"], interval, row["error_in_standard_errors"])


CLAIM = Claim(
    "claim-3",
    "python scripts/diversity_metrics/validate_entropy.py",
    find,
    figure="../figures/entropy_validation/errors.png",
)
