"""RKE, the number of modes a set of images spreads over, its relative form, and their bandwidth (MATH 6).

RKE-MC (Jalali, Li and Farnia, arXiv 2306.11302) is Vendi of order 2 under the Gaussian kernel: with K_ij =
exp(-|x_i - x_j|^2 / (2 h^2)) and rho = K / n it is 1 / |rho|_F^2 = n^2 / sum_ij K_ij^2, and needs no eigenvalues.

The bandwidth h is chosen once, on the base model's samples, and stored with the run. One chosen again at every
checkpoint cannot see a collapse: shrink the cloud and the bandwidth shrinks with it, so that K stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.linalg
from scipy.spatial.distance import pdist

from flow_grpo.diversity.vendi import (
    BLOCK,
    centre_of,
    check_bandwidth,
    check_features,
    gaussian_tile,
    row_blocks,
    validated,
)
from flow_grpo.errors import ConfigError


class NoBandwidth(ConfigError):
    """Half of the pairs are duplicates: no bandwidth can be chosen on these images, and RKE is not measured."""


def median_bandwidth(features_by_group: Sequence[np.ndarray]) -> float:
    """h = median of |x - y| over all pairs within a group, divided by sqrt(2): at that distance k^2 = exp(-2).

    Groups are (n, d) each: the images of one prompt. Call it once, on the base model's samples, and store the value.
    Takes all pairs at once (8 bytes a pair). Raises ConfigError for bad features, NoBandwidth where the median is 0.
    """
    if len(features_by_group) == 0:
        raise ConfigError("features_by_group is empty; a bandwidth needs at least one group of images.")
    groups = [check_features(group, f"features_by_group[{i}]") for i, group in enumerate(features_by_group)]
    median = float(np.median(np.concatenate([pdist(group) for group in groups])))
    if median == 0:
        raise NoBandwidth("the median distance within groups is 0: half of the pairs are duplicates, no bandwidth fits")
    return check_bandwidth(median / math.sqrt(2))


def rke_score(features: np.ndarray, bandwidth: float, block: int = BLOCK) -> float:
    """RKE-MC = n^2 / sum_ij exp(-|x_i - x_j|^2 / h^2) of features (n, d), in [1, n].

    By blocks of rows and columns, half of them by symmetry: memory beyond the features O(block^2 + block d).
    Distances are good to the error `vendi.gaussian_tile` states; each of the n pairs (i, i) counts exactly 1.
    """
    x, narrow = validated(features), check_bandwidth(bandwidth) / math.sqrt(2)  # k^2 is a Gaussian of h / sqrt(2)
    n, centre = len(x), centre_of(x)
    total = 0.0  # over i < j
    for i in row_blocks(n, block):
        for j in row_blocks(n, block):
            if j.start == i.start:
                tile = gaussian_tile(x[i], x[i], centre, narrow)
                total += 0.5 * float(tile.sum() - tile.trace())
            elif j.start > i.start:
                total += float(gaussian_tile(x[i], x[j], centre, narrow).sum())
    return n**2 / (n + 2 * total)


def relative_rke(features: np.ndarray, reference: np.ndarray, bandwidth: float, block: int = BLOCK) -> float:
    """RRKE, how far the set's modes are from a reference's: a Rényi divergence of order 1/2, in nats, 0 to infinity.

    RRKE = -2 log tr sqrt(sqrt(rho) sigma sqrt(rho)) = -2 log(|K_XY|_* / sqrt(n m)), |.|_* the sum of singular values
    (arXiv 2306.11302): with rho = A A^T and sigma = B B^T the trace is |sqrt(rho) sqrt(sigma)|_* = |A^T B|_*, and
    A^T B = K_XY / sqrt(n m). Symmetric in the two sets; 0 if they hold the same points in the same proportions;
    infinite where every kernel value underflows. Features (n, d), reference (m, d).
    Memory O(n m), time O(n m min(n, m)).
    """
    x, y = validated(features), validated(reference, "reference")
    if x.shape[1] != y.shape[1]:
        raise ConfigError(f"features have {x.shape[1]} columns, the reference {y.shape[1]}; they must agree.")
    n, m, h = len(x), len(y), check_bandwidth(bandwidth)
    centre = (n * centre_of(x) + m * centre_of(y)) / (n + m)
    cross = np.empty((n, m))
    for i in row_blocks(n, block):
        for j in row_blocks(m, block):
            cross[i, j] = gaussian_tile(x[i], y[j], centre, h)
    fidelity = float(scipy.linalg.svdvals(cross, overwrite_a=True).sum()) / math.sqrt(n * m)
    return max(-2 * math.log(fidelity), 0.0) if fidelity > 0 else math.inf
