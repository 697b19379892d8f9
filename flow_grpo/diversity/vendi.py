"""The Vendi score of any order, from features: how many distinct images a set is worth, between 1 and n (MATH 6).

X is (n, d), one image's features a row; K_ij = k(x_i, x_j), k(x, x) = 1; rho = K / n; l are its eigenvalues, sum l = 1.

    Vendi_q = exp(1 / (1 - q) log sum l^q),   Vendi_1 = exp(-sum l log l),   Vendi_inf = 1 / max l

(Friedman and Dieng, arXiv 2210.02410; orders q: Pasarkar and Dieng, arXiv 2310.12952.) The reference package's
`score_X` ignores q. Everything is computed in float64, whatever the features' dtype; large float32 features are
converted a block of rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import scipy.linalg

from flow_grpo.errors import ConfigError

KERNELS = ("cosine", "gaussian")
BLOCK = 4096  # rows converted to float64 at a time
NEAR_ONE = 1e-7  # orders this close to 1 differ from it by less than their own rounding
NEGLIGIBLE = 1e-13  # an eigenvalue below this share of the largest is rounding, and counts as zero at every order
SPECTRUM_TOLERANCE = 1e-6  # how far a given kernel or spectrum may stray from what it should be (float32 kernels pass)


def vendi_score(
    features: np.ndarray, order: float = 1.0, kernel: str = "cosine", bandwidth: float | None = None
) -> float:
    """Vendi_q of features (n, d), in [1, n]; `order` is q >= 0, math.inf included.

    Order 0 counts the eigenvalues above `NEGLIGIBLE` times the largest. The Gaussian kernel
    exp(-|x - y|^2 / (2 h^2)) needs its bandwidth h. Raises ConfigError for bad features, order, kernel or bandwidth.
    """
    return vendi_from_eigenvalues(eigenvalues(features, kernel, bandwidth), order)


def eigenvalues(features: np.ndarray, kernel: str = "cosine", bandwidth: float | None = None) -> np.ndarray:
    """Those of rho, rising; min(n, d) of them under the cosine kernel (the others are 0), n under the Gaussian.

    Cosine: of X^T X / n or X X^T / n, the smaller; with n > d the memory beyond the features is O(d^2 + block d).
    Gaussian: of the whole n x n matrix.
    """
    if kernel not in KERNELS:
        raise ConfigError(f"kernel is {kernel!r}; allowed: {', '.join(KERNELS)}.")
    x = validated(features)
    if kernel == "gaussian":
        matrix = gaussian_kernel(x, check_bandwidth(bandwidth))
    else:
        matrix = gram(x) if x.shape[0] > x.shape[1] else cosine_kernel(x)
    matrix /= x.shape[0]
    return scipy.linalg.eigvalsh(matrix, overwrite_a=True, check_finite=False)


def vendi_from_kernel(kernel_matrix: np.ndarray, order: float = 1.0) -> float:
    """Vendi_q of a kernel matrix K (n, n): symmetric, positive semi-definite, ones on its diagonal (each to 1e-6)."""
    k = validated(kernel_matrix, "kernel_matrix").astype(np.float64)
    if k.shape[0] != k.shape[1]:
        raise ConfigError(f"kernel_matrix has shape {k.shape}; it must be square.")
    if np.abs(k - k.T).max() > SPECTRUM_TOLERANCE:
        raise ConfigError(
            f"kernel_matrix differs from its transpose by {np.abs(k - k.T).max():g}; at most 1e-6 is allowed."
        )
    if np.abs(k.diagonal() - 1).max() > SPECTRUM_TOLERANCE:
        raise ConfigError(f"kernel_matrix has {k.diagonal().min():g} to {k.diagonal().max():g} on its diagonal, not 1.")
    return vendi_from_eigenvalues(scipy.linalg.eigvalsh((k + k.T) / 2 / len(k)), order)


def vendi_from_eigenvalues(eigenvalues: np.ndarray, order: float = 1.0) -> float:
    """Vendi_q of the eigenvalues of rho, (n,), in any order.

    They must sum to 1 and be non-negative, each to 1e-6. What rounding left is then taken away: those below
    `NEGLIGIBLE` times the largest (the negative ones too) become 0, and the rest is divided by its sum, so that the
    score never falls below 1.
    """
    p = np.asarray(eigenvalues, dtype=np.float64)
    if not (abs(p.sum() - 1) <= SPECTRUM_TOLERANCE and p.min() >= -SPECTRUM_TOLERANCE):
        raise ConfigError(
            f"The eigenvalues sum to {p.sum():g} and the smallest is {p.min():g}; "
            "they must sum to 1 and none be negative (a kernel that is positive semi-definite with k(x, x) = 1)."
        )
    return float(vendi_of_spectra(p, order))


def vendi_of_spectra(spectra: np.ndarray, order: float) -> np.ndarray:
    """Vendi_q along the last axis of (..., n) eigenvalues, known only up to a factor; (...)."""
    if not order >= 0:  # NaN fails too
        raise ConfigError(f"order is {order}; allowed: any number >= 0, inf included.")
    largest = spectra.max(-1, keepdims=True)
    kept = spectra > NEGLIGIBLE * largest
    if order == 0:
        return kept.sum(-1).astype(np.float64)
    p = np.where(kept, spectra, 0.0)
    p = p / p.sum(-1, keepdims=True)
    if order == math.inf:
        return 1 / p.max(-1)
    log_p = np.log(np.where(kept, p, 1.0))
    if abs(order - 1) < NEAR_ONE:  # where the formula below would divide rounding by nearly nothing
        return np.exp(np.maximum(-(p * log_p).sum(-1), 0.0))
    # sum p^q = max^q sum (p / max)^q: no underflow at large q
    log_max = np.log(p.max(-1))
    log_sum = np.log((kept * np.exp(order * (log_p - log_max[..., None]) * kept)).sum(-1)) + order * log_max
    return np.exp(np.maximum(log_sum / (1 - order), 0.0))


# --- features -----------------------------------------------------------------------------------------


def check_features(features: np.ndarray, name: str = "features") -> np.ndarray:
    """The features as float64 (n, d); ConfigError unless they are finite numbers, n >= 2 and d >= 1."""
    return validated(features, name).astype(np.float64, copy=False)


def validated(features: np.ndarray, name: str = "features") -> np.ndarray:
    """`check_features` in the features' own dtype: nothing of their size is allocated."""
    x = np.asarray(features)
    if x.ndim != 2:
        raise ConfigError(f"{name} has shape {x.shape}; it must be (n, d), one row for each image.")
    if x.dtype.kind not in "fiub":
        raise ConfigError(f"{name} has dtype {x.dtype}; it must hold real numbers.")
    if x.shape[0] < 2:
        raise ConfigError(f"{name} has {x.shape[0]} rows; diversity needs at least 2.")
    if x.shape[1] == 0:
        raise ConfigError(f"{name} has no columns; each image needs at least 1 feature.")
    bad = np.concatenate([~np.isfinite(x[rows]).all(1) for rows in row_blocks(len(x))])
    if bad.any():
        raise ConfigError(f"{name} has {bad.sum()} rows that are not finite, the first of them row {bad.argmax()}.")
    return x


def unit_rows(features: np.ndarray) -> np.ndarray:
    """The rows (n, d), float64, each divided by its length; ConfigError for a row of zeros."""
    return _unit(check_features(features), 0)


def _unit(x: np.ndarray, first_row: int) -> np.ndarray:
    """Rows of unit length, float64; `first_row` is the number of x[0] in the whole set, for the message."""
    # as float64 before the sign is turned: no integer type holds minus its own least value
    ends = (end(1, keepdims=True).astype(np.float64) for end in (x.max, x.min))
    largest = np.maximum(*map(np.abs, ends))
    if not largest.all():
        raise ConfigError(f"Row {first_row + int(largest.argmin())} of the features is zero: it has no direction.")
    scaled = x / largest  # so that no square under- or overflows
    scaled /= np.sqrt(np.einsum("nd,nd->n", scaled, scaled))[:, None]
    return scaled


def row_blocks(n: int, block: int = BLOCK) -> Iterator[slice]:
    """Slices that cover n rows, `block` at a time."""
    return (slice(start, min(start + block, n)) for start in range(0, n, block))


# --- kernels ------------------------------------------------------------------------------------------


def gram(x: np.ndarray, block: int = BLOCK) -> np.ndarray:
    """X^T X (d, d) of the rows of x made unit length, a block of rows at a time."""
    total = np.zeros((x.shape[1], x.shape[1]))
    for rows in row_blocks(len(x), block):
        u = _unit(x[rows], rows.start)  # (block, d)
        total += u.T @ u
    return total


def cosine_kernel(x: np.ndarray) -> np.ndarray:
    """X X^T (n, n) of the rows of x made unit length."""
    u = _unit(x, 0)
    return u @ u.T


def gaussian_kernel(x: np.ndarray, bandwidth: float, block: int = BLOCK) -> np.ndarray:
    """exp(-|x - y|^2 / (2 h^2)) over all pairs, (n, n), with exact ones on the diagonal."""
    n, centre = len(x), centre_of(x)
    k = np.empty((n, n))
    for i in row_blocks(n, block):
        for j in row_blocks(n, block):
            if j.start >= i.start:
                k[i, j] = gaussian_tile(x[i], x[j], centre, bandwidth)
                k[j, i] = k[i, j].T
    np.fill_diagonal(k, 1.0)
    return k


def centre_of(x: np.ndarray) -> np.ndarray:
    """The mean row (d,), in float64 without a copy of x."""
    return x.mean(0, dtype=np.float64)


def gaussian_tile(x: np.ndarray, y: np.ndarray, centre: np.ndarray, bandwidth: float) -> np.ndarray:
    """exp(-|x - y|^2 / (2 h^2)) between the rows of x (n, d) and y (m, d): (n, m).

    |x - y|^2 = |x|^2 + |y|^2 - 2 x.y after both are moved by `centre`. The error of the exponent is a few times
    2.2e-16 (R / h)^2, R the largest distance from the centre: below 1e-12 while the cloud spans 50 bandwidths.
    """
    x, y = (x - centre) / bandwidth, (y - centre) / bandwidth  # float64: the centre is
    tile = x @ y.T
    tile -= 0.5 * np.einsum("nd,nd->n", x, x)[:, None]
    tile -= 0.5 * np.einsum("nd,nd->n", y, y)
    np.minimum(tile, 0.0, out=tile)
    return np.exp(tile, out=tile)


def check_bandwidth(bandwidth: float | None) -> float:
    """The bandwidth h of a Gaussian kernel; ConfigError unless it is a positive finite number."""
    if bandwidth is None:
        raise ConfigError(
            "bandwidth is not given; the Gaussian kernel needs one, chosen once by `rke.median_bandwidth`."
        )
    if not 0 < bandwidth < math.inf:
        raise ConfigError(f"bandwidth is {bandwidth}; it must be a positive finite number.")
    return float(bandwidth)
