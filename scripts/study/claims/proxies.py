"""Whether the std of ode_log_prob and the differential entropy follow diversity. Reads all evaluations of all runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy.stats import rankdata

from flow_grpo.statistics import LEVEL, CountedInterval, mean_interval
from scripts.study.claims.claim import RUN, Claim
from scripts.study.committed import Results
from scripts.study.records import RKE, VENDI
from scripts.study.study_records import NATS, SPREAD, StudyRecord

CLOSE = 0.7  # "closely": rank correlations above


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho of two metrics over evaluations."""

    pooled: float  # over all evaluations of all runs
    low: float  # 95 % by bootstrap over runs
    high: float
    evaluations: int
    runs: int
    within: CountedInterval  # mean of the runs' own rho

    @property
    def text(self) -> str:
        """Rho over all runs with its interval."""
        interval = f"{self.low:.2f} to {self.high:.2f}" if math.isfinite(self.low) else "one run"
        return f"{self.pooled:.2f} ({interval})"


class Follows(StrEnum):
    """What a correlation amounts to."""

    CLOSELY = "closely"
    LOOSELY = "loosely"
    BETWEEN_RUNS = "between runs"  # and against it within them
    AGAINST = "against"
    NOT_SHOWN = "not shown"


@dataclass(frozen=True)
class Pair:
    """A proxy and what it may stand for."""

    proxy: str
    diversity: str
    rho: RankCorrelation
    follows: Follows


@dataclass(frozen=True)
class Proxies:
    """All numbers of the question."""

    pairs: Sequence[Pair]
    close: float = CLOSE
    figures: Sequence[str] = ("proxies",)

    @property
    def with_vendi(self) -> dict[str, RankCorrelation]:
        """By proxy."""
        return {pair.proxy: pair.rho for pair in self.pairs if pair.diversity == VENDI}

    @property
    def verdict(self) -> Mapping[str, Follows]:
        """By proxy, of the Vendi score."""
        return {pair.proxy: pair.follows for pair in self.pairs if pair.diversity == VENDI}


def find(results: Results) -> Proxies | None:
    """None without a run."""
    records = results.study.records
    if not records:
        return None
    wanted = [(proxy, diversity) for proxy in (SPREAD, NATS) for diversity in (VENDI, RKE)]
    found = [(proxy, diversity, rank_correlation(records, proxy, diversity)) for proxy, diversity in wanted]
    return Proxies([Pair(proxy, diversity, rho, follows(rho)) for proxy, diversity, rho in found])


def follows(rho: RankCorrelation) -> Follows:
    """Decided by the interval over all runs and that of the runs' own."""
    lows = (rho.low, rho.within.low)
    if all(low > CLOSE for low in lows):
        return Follows.CLOSELY
    if all(low > 0 for low in lows):
        return Follows.LOOSELY
    if rho.high < 0 or rho.within.below(0):
        return Follows.BETWEEN_RUNS if rho.low > 0 else Follows.AGAINST
    return Follows.NOT_SHOWN


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of two samples, both (n,); nan where one is constant or n < 3."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def rank_correlation(
    records: Sequence[StudyRecord], first: str, second: str, draws: int = 1000, seed: int = 0
) -> RankCorrelation:
    """Of two metrics over all evaluations after training began; the base model, the same in every run, is left out.

    Evaluations of one run are alike, so it is runs that are resampled, with replacement; percentile interval.
    """
    samples = [_finite_pairs(record, first, second) for record in records]
    samples = [sample for sample in samples if sample.shape[1] > 0]
    if not samples:
        nothing = mean_interval([])
        return RankCorrelation(math.nan, math.nan, math.nan, 0, 0, nothing)
    everything = np.concatenate(samples, axis=1)
    low = high = math.nan
    if len(samples) > 1:
        generator = np.random.default_rng(seed)
        chosen = generator.integers(len(samples), size=(draws, len(samples)))
        rhos = [spearman(*np.concatenate([samples[i] for i in row], axis=1)) for row in chosen]
        low, high = (float(end) for end in np.nanquantile(rhos, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)))
    within = mean_interval(spearman(*sample) for sample in samples)
    return RankCorrelation(spearman(*everything), low, high, everything.shape[1], len(samples), within)


def _finite_pairs(record: StudyRecord, first: str, second: str) -> np.ndarray:
    """(2, evaluations) after the first."""
    values = np.stack([record.curve(first), record.curve(second)])[:, 1:]
    return values[:, np.isfinite(values).all(0)]


CLAIM = Claim("proxies", RUN, find)
