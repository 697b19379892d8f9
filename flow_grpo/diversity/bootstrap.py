"""Bootstrap intervals for a diversity score of n images, alone or as the mean over prompts (MATH 6).

The target is the expected score of n images drawn like these: it depends on n, as the scores do. Prompts are fixed;
their images are drawn. Intervals of different n do not speak of the same number.

Resampling the images themselves fails here: a duplicate is no new image, and every replicate falls below the score.
So no image is drawn twice. With s = log score and s_(i), s_(ij) the same without images i, or i and j:

    psi_i = -(s_(i) - mean) sqrt((n - 1) / n),   J = sum psi_i^2             (the jackknife's variance)
    D_ij  = s - (n - 1) / n (s_(i) + s_(j)) + (n - 2) / n s_(ij)             (the interaction of i and j)
    E     = n (n - 3)^2 / ((n - 1)^2 (n - 2)) sum_{i<j} (D_ij - mean)^2      (after Efron and Stein, 1981)
    V     = max(J - E, 0.6 J (n - 2) / (2 (n - 1)) + 0.4 E (n - 2) / n)

J counts every interaction twice, and interactions are most of the variance where modes are balanced or images nearly
orthogonal: its interval is then 30 to 50 % too wide. J - E is unbiased for scores of first and second order. Were
interactions all there is, J (n - 2) / (2 (n - 1)) and E (n - 2) / n would each estimate the variance; V is never less
than their mean, whose weights were chosen by coverage. What is resampled are the psi_i, in a studentised bootstrap:
with c multinomial counts,

    t* = sum c_i psi_i / sqrt(sum c_i (psi_i - psi*)^2),   replicate = score exp(sqrt(V) t*)

and the interval is score exp(-+ w sqrt(V)), w the 95 % quantile of |t*|. The mean over prompts sums psi, J, V and both
parts of t* over the prompts, each prompt weighted by its share of the mean.

Coverage of the 95 % interval in 1,000 repetitions (400 for the prompts), in `tests/diversity/test_bootstrap.py`, which
asserts 93 to 97 %, and with a seed used for nothing else (standard errors 0.7 and 1.1 %):

    situation                                         Vendi_1             RKE
    n = 64, 8 balanced modes                       96.6, 96.3 %      93.5, 94.1 %
    n = 64, one mode with 80 % of the images       96.3, 95.8 %      94.2, 95.0 %
    n = 32, diffuse in 16 dimensions               96.6, 97.3 %      94.8, 95.4 %
    mean over 10 prompts, n = 16, 3 or 4 modes        96.3 %            94.0 %

Outside the band (500 repetitions): a single prompt of n = 16 in 4 or in 3 unequal modes, RKE 91.4 and 91.2 % (Vendi
94.2 and 94.6 %); n = 64 with 2 % of the images outside one mode, Vendi 79.8 % (RKE 95.4 %), for a quarter of such sets
hold no image from outside, and no resampling shows what was never drawn. With 5 % outside it is 96.2 and 95.0 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from flow_grpo.diversity.rke import rke_score
from flow_grpo.diversity.vendi import (
    BLOCK,
    centre_of,
    check_bandwidth,
    cosine_kernel,
    gaussian_kernel,
    gaussian_tile,
    gram,
    validated,
    vendi_of_spectra,
    vendi_score,
)
from flow_grpo.errors import ConfigError
from flow_grpo.statistics import Interval

MAX_BLOCKS = 64  # left out one by one: beyond so many images, blocks of equal size are, not images
MAX_PAIRS = 500  # left out two by two, drawn at random where there are more
LEAST_SPREAD = 1 / 16  # of sum c (psi - psi*)^2 / J: a resample that misses every rare image would make t* infinite
LEAST_WEIGHT = 0.4  # of the interactions in the least V; 0 to 1/2 were measured, see above
LEAST_ROWS = 4
STACK_BYTES = 2**26  # of the matrices whose eigenvalues are taken together

Score = Callable[[np.ndarray], float]
Without = Callable[[np.ndarray], np.ndarray]  # (k, r) numbers of blocks -> (k,) scores without these r blocks


@runtime_checkable
class FastScore(Protocol):
    """A score that knows a quicker way than to begin anew for each set of blocks left out."""

    def __call__(self, features: np.ndarray) -> float:
        """The score of features (n, d)."""

    def without(self, features: np.ndarray, blocks: np.ndarray) -> Without:
        """Scores without some of the `blocks` (number, size) of row numbers."""


@dataclass(frozen=True)
class VendiScore:
    """`vendi_score` with its arguments fixed; leaving blocks out costs one eigenproblem of the smaller side."""

    order: float = 1.0
    kernel: str = "cosine"
    bandwidth: float | None = None

    def __call__(self, features: np.ndarray) -> float:
        """The score of features (n, d)."""
        return vendi_score(features, self.order, self.kernel, self.bandwidth)

    def without(self, features: np.ndarray, blocks: np.ndarray) -> Without:
        """By a sum of outer products less those of the blocks (cosine, n > d), or a kernel matrix less their rows."""
        n, d = features.shape
        if self.kernel == "cosine" and n > d:
            whole, parts = gram(features), np.stack([gram(features[rows]) for rows in blocks])
            return self._spectra_of(lambda left_out: whole - parts[left_out].sum(1), d)
        k = cosine_kernel(features) if self.kernel == "cosine" else gaussian_kernel(features, self._bandwidth)

        def remaining(left_out: np.ndarray) -> np.ndarray:
            rows = rows_left(n, blocks, left_out)
            return k[rows[:, :, None], rows[:, None, :]]

        return self._spectra_of(remaining, n)

    @property
    def _bandwidth(self) -> float:
        return check_bandwidth(self.bandwidth)

    def _spectra_of(self, matrices: Callable[[np.ndarray], np.ndarray], side: int) -> Without:
        def scores(left_out: np.ndarray) -> np.ndarray:
            parts = np.array_split(left_out, math.ceil(8 * side**2 * len(left_out) / STACK_BYTES))
            spectra = np.concatenate([np.linalg.eigvalsh(matrices(part)) for part in parts if len(part)])
            return vendi_of_spectra(spectra, self.order)

        return scores


@dataclass(frozen=True)
class RkeScore:
    """`rke_score` with its bandwidth fixed; leaving blocks out costs nothing beyond one pass over the kernel."""

    bandwidth: float

    def __call__(self, features: np.ndarray) -> float:
        """The score of features (n, d)."""
        return rke_score(features, self.bandwidth)

    def without(self, features: np.ndarray, blocks: np.ndarray) -> Without:
        """By the sums of k^2 between blocks; the pair (i, i) counts 1 once, in the block of i."""
        n, size = len(features), blocks.shape[1]
        sums = self._block_sums(features, blocks)  # (blocks, blocks), then the rows in no block
        total, row_sums = sums.sum(), sums.sum(1)

        def scores(left_out: np.ndarray) -> np.ndarray:
            inside = sums[left_out[:, :, None], left_out[:, None, :]].sum((1, 2))
            rest = total - 2 * row_sums[left_out].sum(1) + inside
            return (n - size * left_out.shape[1]) ** 2 / rest

        return scores

    def _block_sums(self, features: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        narrow, centre = check_bandwidth(self.bandwidth) / math.sqrt(2), centre_of(features)
        number, size = blocks.shape
        others = np.setdiff1d(np.arange(len(features)), blocks)
        step = max(1, BLOCK // size)  # blocks in a tile
        strips = [blocks[start : start + step] for start in range(0, number, step)]
        strips += [others[None]] if len(others) else []
        firsts = np.cumsum([0] + [len(strip) for strip in strips])
        sums = np.zeros((firsts[-1], firsts[-1]))
        for a, rows in enumerate(strips):
            for b, columns in enumerate(strips[: a + 1]):
                tile = gaussian_tile(features[rows.ravel()], features[columns.ravel()], centre, narrow)
                if a == b:
                    np.fill_diagonal(tile, 1.0)
                tile = tile.reshape(*rows.shape, *columns.shape).sum((1, 3))
                sums[firsts[a] : firsts[a + 1], firsts[b] : firsts[b + 1]] = tile
                sums[firsts[b] : firsts[b + 1], firsts[a] : firsts[a + 1]] = tile.T
        return sums


# --- intervals ----------------------------------------------------------------------------------------


def grouped_interval(
    features_by_group: Sequence[np.ndarray],
    score: Score,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    log: bool = True,
) -> Interval:
    """Of the mean over groups (prompts, fixed) of the score of each group's features (n, d), n >= 4.

    The score is `VendiScore(...)`, `RkeScore(...)` (fast) or any function of features (n, d): about min(n, 64) + 500
    calls a group. `log`: the interval is symmetric on the log scale, for which the score must be positive; False:
    symmetric about the score. Raises ConfigError for fewer than 4 rows, bad features, draws or level.
    """
    estimate, values = _replicates(features_by_group, score, draws, seed, log)
    return interval(estimate, values, level, log)


def replicates(features: np.ndarray, score: Score, draws: int, seed: int = 0, log: bool = True) -> np.ndarray:
    """(draws,) replicates of the score of features (n, d), spread about it as it is about its expectation."""
    return _replicates([features], score, draws, seed, log)[1]


def interval(estimate: float, replicates: np.ndarray, level: float = 0.95, log: bool = True) -> Interval:
    """The interval symmetric about the estimate, on the log scale or as it is, that holds `level` of the replicates."""
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}; it must lie between 0 and 1.")
    if not log:
        width = float(np.quantile(np.abs(replicates - estimate), level))
        return Interval(estimate, estimate - width, estimate + width, level)
    width = float(np.quantile(np.abs(np.log(replicates / estimate)), level))
    return Interval(estimate, estimate * math.exp(-width), estimate * math.exp(width), level)


def _replicates(
    features_by_group: Sequence[np.ndarray], score: Score, draws: int, seed: int, log: bool
) -> tuple[float, np.ndarray]:
    """The mean score over groups and its (draws,) replicates."""
    if len(features_by_group) == 0 or draws < 1:
        raise ConfigError(f"There are {len(features_by_group)} groups and {draws} draws; at least 1 of each is needed.")
    rngs = [np.random.default_rng([seed, group]) for group in range(len(features_by_group))]
    parts = [_jackknife(x, score, rng, log) for x, rng in zip(features_by_group, rngs, strict=True)]
    values = np.array([part.value for part in parts])
    shares = values / values.sum() if log else np.full(len(parts), 1 / len(parts))
    off = deviations(parts, shares, rngs, draws)
    mean = float(values.mean())
    return mean, mean * np.exp(off) if log else mean + off


def deviations(
    parts: Sequence[Jackknife], shares: Sequence[float] | np.ndarray, rngs: Sequence[np.random.Generator], draws: int
) -> np.ndarray:
    """(draws,) sqrt(V) t* of the sum of independent parts, each times its share; zeros where nothing varies."""
    jackknife = float(sum(a**2 * part.jackknife for a, part in zip(shares, parts, strict=True)))
    variance = float(sum(a**2 * part.variance for a, part in zip(shares, parts, strict=True)))
    numerator, spread = np.zeros(draws), np.zeros(draws)
    for share, part, rng in zip(shares, parts, rngs, strict=True):
        psi = share * part.influence
        counts = rng.multinomial(len(psi), np.full(len(psi), 1 / len(psi)), size=draws)  # (draws, blocks)
        sums = counts @ psi
        numerator += sums
        spread += counts @ psi**2 - sums**2 / len(psi)
    if jackknife == 0:  # identical rows
        return np.zeros(draws)
    return math.sqrt(variance) * numerator / np.sqrt(np.maximum(spread, LEAST_SPREAD * jackknife))


@dataclass(frozen=True)
class Jackknife:
    """One group's score; the `influence` (blocks,) of its images, and variances, are of its logarithm if `log`."""

    value: float
    influence: np.ndarray
    jackknife: float  # J = sum influence^2
    variance: float  # V


def _jackknife(features: np.ndarray, score: Score, rng: np.random.Generator, log: bool) -> Jackknife:
    """Of one group's features (n, d)."""
    x = validated(features)
    if len(x) < LEAST_ROWS:
        raise ConfigError(f"features has {len(x)} rows; an interval needs at least {LEAST_ROWS} in each group.")
    blocks = blocks_of(len(x), rng)
    without = score.without(x, blocks) if isinstance(score, FastScore) else _one_by_one(score, x, blocks)
    return jackknife(score(x), without, len(x), len(blocks), rng, log)


def blocks_of(n: int, rng: np.random.Generator) -> np.ndarray:
    """(blocks, size) numbers of the images that are left out together: one by one up to MAX_BLOCKS of them."""
    size = math.ceil(n / MAX_BLOCKS)
    return rng.permutation(n)[: n // size * size].reshape(-1, size) if size > 1 else np.arange(n)[:, None]


def rows_left(n: int, blocks: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """(k, rows) numbers of the n images that are outside the blocks `left_out` (k, r)."""
    keep = np.ones((len(left_out), n), dtype=bool)
    np.put_along_axis(keep, blocks[left_out].reshape(len(left_out), -1), False, axis=1)
    return np.nonzero(keep)[1].reshape(len(left_out), -1)


def jackknife(value: float, without: Without, n: int, blocks: int, rng: np.random.Generator, log: bool) -> Jackknife:
    """The equations at the top of this file; with blocks of m images, n / m stands for n.

    `value` is the score of all n images, `without` that of the images outside some of the blocks. ConfigError for a
    score without a logarithm, if `log`.
    """
    i, j = _pairs(blocks, rng)
    whole, one, two = value, without(np.arange(blocks)[:, None]), without(np.stack([i, j], 1))
    if log:
        if min(value, one.min(), two.min()) <= 0:
            raise ConfigError(f"A score of {min(value, one.min(), two.min()):g} has no logarithm; pass log=False.")
        whole, one, two = math.log(value), np.log(one), np.log(two)
    units = n / math.ceil(n / MAX_BLOCKS)  # the blocks, and a part of one where some images are in no block
    influence = (one.mean() - one) * (units - 1) / math.sqrt(units * (blocks - 1))
    first = float((influence**2).sum())
    interactions = whole - (units - 1) / units * (one[i] + one[j]) + (units - 2) / units * two
    pairs = units * (units - 1) / 2
    excess = units * (units - 3) ** 2 / ((units - 1) ** 2 * (units - 2)) * pairs * float(interactions.var())
    # where interactions are all there is, half of J and they themselves both estimate the variance
    least = (1 - LEAST_WEIGHT) * first * (units - 2) / (units - 1) / 2 + LEAST_WEIGHT * excess * (units - 2) / units
    return Jackknife(value, influence, first, max(first - excess, least))


def _pairs(number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pairs i < j of so many blocks: all, or MAX_PAIRS of them."""
    i, j = np.triu_indices(number, 1)
    if len(i) > MAX_PAIRS:
        drawn = rng.choice(len(i), MAX_PAIRS, replace=False)
        i, j = i[drawn], j[drawn]
    return i, j


def _one_by_one(score: Score, x: np.ndarray, blocks: np.ndarray) -> Without:
    """Any score, called anew for each set of blocks left out."""
    return lambda left_out: np.array([score(np.delete(x, blocks[out].ravel(), axis=0)) for out in left_out])
