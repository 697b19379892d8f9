"""Rank correlations are Spearman's, with intervals over runs, and so are the words for them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from flow_grpo.statistics import CountedInterval
from scripts.study.claims.proxies import RankCorrelation, follows, rank_correlation, spearman
from scripts.study.records import VENDI
from scripts.study.study_records import SPREAD, StudyRecord
from scripts.study.words import said
from tests.scripts.study.builders import record


def clustered(runs: int, seed: int, slope: float = 0.0) -> list[StudyRecord]:
    """Each run has a level of its own in both metrics; within it they go together by `slope`."""
    generator, found = np.random.default_rng(seed), []
    for number in range(runs):
        x, y = generator.standard_normal(2)[:, None] + 0.2 * generator.standard_normal((2, 8))
        found.append(
            record(
                seed=number, reward=[0.5] * 8, seconds=list(range(8)), spread=[*x[:7], None], vendi=list(y + slope * x)
            )
        )
    return found


def test_the_rank_correlation_is_spearmans_without_the_base_model() -> None:
    records = clustered(6, seed=1, slope=0.5)
    x, y = (np.concatenate([one.curve(name)[1:7] for one in records]) for name in (SPREAD, VENDI))  # 7: not measured
    found = rank_correlation(records, SPREAD, VENDI, draws=200)
    assert found.pooled == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert (found.evaluations, found.runs) == (36, 6)
    within = [stats.spearmanr(one.curve(SPREAD)[1:7], one.curve(VENDI)[1:7]).statistic for one in records]
    assert found.within.estimate == pytest.approx(np.mean(within), abs=1e-12)
    assert found == rank_correlation(records, SPREAD, VENDI, draws=200)  # seeded
    tied = np.array([1.0, 1.0, 2.0, 3.0, 3.0])
    other = np.array([2.0, 1.0, 2.0, 5.0, 4.0])
    assert spearman(tied, other) == pytest.approx(stats.spearmanr(tied, other).statistic, abs=1e-12)
    assert math.isnan(spearman(np.ones(5), other))


def test_runs_are_resampled_because_evaluations_of_a_run_are_alike() -> None:
    """Independent metrics, levels by run: over runs the interval holds zero, over evaluations (the twin) rarely."""
    held = twin_held = 0
    repetitions = 60
    for repetition in range(repetitions):
        records = clustered(20, seed=100 + repetition)
        found = rank_correlation(records, SPREAD, VENDI, draws=150)
        held += found.low <= 0 <= found.high
        x, y = (np.concatenate([one.curve(name)[1:7] for one in records]) for name in (SPREAD, VENDI))
        twin_held += abs(np.arctanh(spearman(x, y))) < 1.96 / math.sqrt(len(x) - 3)
    assert held >= 0.85 * repetitions
    assert twin_held <= 0.75 * repetitions


@pytest.mark.parametrize(
    ("low", "high", "within", "words"),
    [
        (0.8, 0.9, CountedInterval(0.8, 0.75, 0.9, count=9), "follows diversity closely"),
        (0.8, 0.9, CountedInterval(0.5, 0.3, 0.7, count=9), "follows diversity loosely"),
        (0.8, 0.9, CountedInterval(0.1, -0.2, 0.4, count=9), "is not shown to follow diversity"),
        (
            0.8,
            0.9,
            CountedInterval(-0.5, -0.7, -0.3, count=9),
            "goes with diversity between runs, and against it within them",
        ),
        (-0.2, 0.9, CountedInterval(-0.5, -0.7, -0.3, count=9), "runs against diversity"),
        (-0.9, -0.8, CountedInterval(0.8, 0.75, 0.9, count=9), "runs against diversity"),
    ],
)
def test_the_verdict_on_a_proxy(low: float, high: float, within: CountedInterval, words: str) -> None:
    rho = RankCorrelation((low + high) / 2, low, high, 100, 9, within)
    assert said("proxies", "amounts_to", follows(rho)) == words
