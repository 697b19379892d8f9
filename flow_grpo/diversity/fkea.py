"""Vendi and RKE of many samples by random Fourier features (FKEA, arXiv 2407.02961), with its bias and its error.

Legend: n samples x_i, k(x, y) = exp(-|x - y|^2 / (2 h^2)), S = mean_ij k(x_i, x_j)^2 so that RKE = 1 / S, r frequencies
w_k ~ N(0, I / h^2), phi(x) = [cos w_k . x, sin w_k . x]_k / sqrt(r), rho = mean_i phi(x_i) phi(x_i)^T with trace 1. Its
non-zero eigenvalues are those of the kernel matrix (1/r) sum_k cos w_k . (x_i - x_j) divided by n. Cost O(n r (d + r))
and memory O(r^2 + block r) beyond the features, against O(n^3) and O(n^2) of the eigendecomposition.

The plug-in, Vendi_q of the eigenvalues of rho, is biased by O(1/r), and never exceeds 2r. With u = w . (x - y),
E cos u = k and E cos^2 u = (1 + k^4) / 2, so

    E |rho|_F^2 = S + mean_ij (1 - k_ij^2)^2 / (2r)

and RKE comes out too low, as does Vendi_q in general (tr rho^q is convex in rho for q > 1, concave for q < 1, and the
entropy is concave). What is reported is corrected, from the same rho:

- q = 2: the bias is all in the products of a frequency with itself, the 2 x 2 blocks B_k of rho. Without them,
  r / (r - 1) (|rho|_F^2 - sum_k |B_k|_F^2) is S without bias, at any r. It is averaged over repeats, then inverted.
- Other q: log Vendi_q from r frequencies and from each half of them, a and b, whose moments are blocks of rho:
  2 L_r - (L_a + L_b) / 2 has no term in 1/r. What remains is O(1/r^2) where the eigenvalues that matter are well above
  1/r; where value and plug-in differ by much, r is too small for this q. At q = inf the largest eigenvalue must also
  stand apart: equal ones part by O(1 / sqrt(r)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flow_grpo.diversity.vendi import (
    BLOCK,
    centre_of,
    check_bandwidth,
    row_blocks,
    validated,
    vendi_from_eigenvalues,
)
from flow_grpo.errors import ConfigError

Array = NDArray[np.float64]
RESOLVED = 0.05  # of the value: a larger correction says that r is too small


@dataclass(frozen=True)
class FkeaScore:
    """Vendi_q with the Gaussian kernel, estimated; q = 2 is RKE."""

    value: float  # corrected for the bias in 1/r, between 1 and n
    standard_error: float  # over draws of the frequencies, the samples fixed; nan with one repeat
    plug_in: float  # uncorrected: the mean over repeats
    order: float
    r: int  # frequencies of a repeat
    repeats: int

    @property
    def error(self) -> float:
        """The standard error; for q other than 2 the size of the correction joins it. It holds only if `resolved`."""
        return self.standard_error if self.order == 2 else math.hypot(self.standard_error, self.value - self.plug_in)

    @property
    def resolved(self) -> bool:
        """Whether r is large enough for the error to be believed: the correction of the plug-in is below 5 %.

        A spectrum with many small eigenvalues needs 2r far above the score, which a score alone does not show.
        """
        return self.order == 2 or abs(self.value - self.plug_in) < RESOLVED * self.value


def fkea_scores(
    features: np.ndarray,
    bandwidth: float,
    orders: Sequence[float] = (1.0, 2.0),
    num_frequencies: int = 1024,
    repeats: int = 5,
    seed: int = 0,
    block: int = BLOCK,
) -> dict[float, FkeaScore]:
    """Vendi_q of the Gaussian kernel for each order q, from the same frequencies.

    Args:
        features: (n, d).
        bandwidth: h.
        num_frequencies: r, even: the correction compares the halves.
        repeats: independent draws of the frequencies, the i-th keyed by (seed, i).
        block: rows at a time; changes the memory, not the result.

    Raises:
        ConfigError: for features that are no finite matrix, a bandwidth, r, repeats or block out of range.
    """
    x, h = validated(features), check_bandwidth(bandwidth)
    _check_counts(num_frequencies, repeats, block)
    draws = []  # (repeats, orders, 2): statistic and plug-in
    for repeat in range(repeats):
        w = draw_frequencies(x.shape[1], h, num_frequencies, seed, repeat)
        rho = feature_moment(x, w, block)
        spectra = _spectra(rho) if any(order != 2 for order in orders) else []
        draws.append([_purity(rho) if order == 2 else _log_vendi(spectra, order) for order in orders])
    return {q: _summary(np.array(draws)[:, i], q, num_frequencies, len(x)) for i, q in enumerate(orders)}


def _check_counts(num_frequencies: int, repeats: int, block: int) -> None:
    if num_frequencies < 2 or num_frequencies % 2:
        raise ConfigError(f"num_frequencies is {num_frequencies}; it must be even and at least 2.")
    for name, value in (("repeats", repeats), ("block", block)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1.")


def draw_frequencies(dims: int, bandwidth: float, r: int, seed: int, repeat: int) -> Array:
    """w_k ~ N(0, I / h^2), the columns: (dims, r)."""
    return np.random.default_rng([seed, repeat]).standard_normal((dims, r)) / bandwidth


def feature_moment(x: np.ndarray, w: Array, block: int = BLOCK) -> Array:
    """rho = mean_i phi(x_i) phi(x_i)^T, summed by blocks of rows; cosines come first: (2r, 2r) float64."""
    r, centre = w.shape[1], centre_of(x)  # differences are all that counts, and small angles are exact
    rho = np.zeros((2 * r, 2 * r))
    for rows in row_blocks(len(x), block):
        angles = (x[rows] - centre) @ w  # (b, r)
        phi = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)  # (b, 2r), times sqrt(r)
        rho += phi.T @ phi
    return rho / (len(x) * r)


def _purity(rho: Array) -> tuple[float, float]:
    """S without bias, and the plug-in of RKE."""
    r = len(rho) // 2
    cos, sin, cross = np.diag(rho)[:r], np.diag(rho)[r:], np.diag(rho, r)
    whole = float(np.square(rho).sum())
    own = float(np.square(cos).sum() + np.square(sin).sum() + 2 * np.square(cross).sum())
    return r / (r - 1) * (whole - own), 1 / whole


def _spectra(rho: Array) -> list[Array]:
    """Eigenvalues of rho, and of the moments of the first and of the second half of the frequencies."""
    r = len(rho) // 2
    first = np.r_[: r // 2, r : r + r // 2]
    halves = [2 * rho[np.ix_(half, half)] for half in (first, first + r // 2)]
    return [np.linalg.eigvalsh(moment) for moment in (rho, *halves)]


def _log_vendi(spectra: list[Array], order: float) -> tuple[float, float]:
    """log Vendi_q without its term in 1/r, and the plug-in of Vendi_q."""
    plug_in, *halves = (vendi_from_eigenvalues(spectrum, order) for spectrum in spectra)
    return 2 * math.log(plug_in) - sum(map(math.log, halves)) / 2, plug_in


def _summary(draws: Array, order: float, r: int, n: int) -> FkeaScore:
    """The mean over repeats, brought back to Vendi_q, and its error to first order.

    Args:
        draws: (repeats, 2), statistic and plug-in; the statistic is S for order 2 and log Vendi_q for others.
    """
    statistic, repeats = draws[:, 0], len(draws)
    error = float(statistic.std(ddof=1)) / math.sqrt(repeats) if repeats > 1 else math.nan
    if order == 2:
        value = 1 / float(np.clip(statistic.mean(), 1 / n, 1))
        relative = value * error
    else:
        value = math.exp(float(np.clip(statistic.mean(), 0, math.log(n))))
        relative = error
    return FkeaScore(value, value * relative, float(draws[:, 1].mean()), order, r, repeats)
