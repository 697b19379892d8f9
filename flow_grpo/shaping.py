"""Diversity inside the objective (MATH 10): what an image's difference from its group adds to its reward or advantage.

A group is the images of one prompt; it has two or more. All functions take rewards or advantages (N,), group_ids (N,)
int64 and features (N, F), over all processes, and return (N,) float64. Features are of an encoder that is neither the
reward nor the judge of the evaluation. Cosines are of their directions, so no row may be zero; the Gaussian kernel is
of the features as they are, exp(-|f_i - f_j|^2 / (2 h^2)), its bandwidth h fixed for the whole run.

`log_vendi` and `log_rke`, of one group's features (n, F), and `log_diversities`, of all groups', are differentiable;
the rest is not meant to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

NEGLIGIBLE = 1e-13  # an eigenvalue below this share of the largest is rounding


# --- bonuses of the reward ------------------------------------------------------------------------------


def cluster_bonus(rewards: Tensor, group_ids: Tensor, features: Tensor, weight: float, distance: float) -> Tensor:
    """R_i + beta sqrt(n / size of i's cluster) (after arXiv 2512.21514), n the size of the group.

    Clusters are SciPy's, by average linkage of 1 - cos, cut at `distance`: deterministic, in any number.
    """

    def rarity(f: Tensor) -> Tensor:
        apart = (1 - _cosines(f)).clamp(min=0).fill_diagonal_(0)
        tree = linkage(squareform(apart.cpu().numpy(), checks=False), method="average")
        labels = torch.from_numpy(fcluster(tree, distance, criterion="distance")).long()
        return (len(f) / labels.bincount()[labels].double()).sqrt().to(f.device)

    return rewards.double() + weight * _by_group(rarity, group_ids, features)


def entropy_bonus(rewards: Tensor, group_ids: Tensor, features: Tensor, weight: float, bandwidth: float) -> Tensor:
    """R_i - beta log mean_{j != i} k(f_i, f_j): each image's share of a leave-one-out Renyi entropy of its group.

    That is of the images; the entropy of the SDE policy is a constant of the noise schedule (arXiv 2605.12112).
    """

    def surprise(f: Tensor) -> Tensor:
        others = (-_squared_distances(f) / (2 * bandwidth**2)).fill_diagonal_(-math.inf)
        return math.log(len(f) - 1) - others.logsumexp(1)

    return rewards.double() + weight * _by_group(surprise, group_ids, features)


def vendi_bonus(rewards: Tensor, group_ids: Tensor, features: Tensor, weight: float, order: float = 1.0) -> Tensor:
    """R_i + beta (log VS(group) - log VS(group without i)): the set score's own share of each image."""

    def share(f: Tensor) -> Tensor:
        rest = [torch.cat((f[:i], f[i + 1 :])) for i in range(len(f))]
        return log_vendi(f, order) - torch.stack([log_vendi(others, order) for others in rest])

    return rewards.double() + weight * _by_group(share, group_ids, features)


# --- weights of the advantage, and of the KL divergence ---------------------------------------------------


def distance_weighted(advantages: Tensor, group_ids: Tensor, features: Tensor) -> Tensor:
    """A_i d_i / mean d where A_i > 0, else A_i (after arXiv 2512.24138); d_i = min_j (1 - cos(f_i, f_j)), in the group.

    The mean is over the group. A group of copies has no distances to weigh by, and keeps its advantages.
    """

    def weights(f: Tensor) -> Tensor:
        nearest = (1 - _cosines(f)).fill_diagonal_(math.inf).amin(1).clamp(min=0)
        mean = nearest.mean()
        return nearest / mean if mean > 0 else torch.ones_like(nearest)

    a = advantages.double()
    return torch.where(a > 0, a * _by_group(weights, group_ids, features), a)


def disagreement(rewards: Tensor, held_out: Tensor, group_ids: Tensor) -> Tensor:
    """U_i = win share under the training reward - mean win share under held-out ones, in [-1, 1], (N,).

    A win share is that of the others of the group which an image beats; a tie is half a win. High U: liked by the
    reward alone. (A released implementation has the opposite sign.)

    Args:
        held_out: (M, N), M rewards that are not trained on.
    """

    def wins(r: Tensor) -> Tensor:
        margins = torch.sign(r[:, None] - r).double()  # (n, n), 0 of the image against itself
        return (margins.sum(1) / (len(r) - 1) + 1) / 2

    return _by_group(wins, group_ids, rewards) - torch.stack([_by_group(wins, group_ids, r) for r in held_out]).mean(0)


def gate(disagreements: Tensor, share: float = 0.1) -> Tensor:
    """The images whose KL divergence counts, (N,) bool: that share with the highest U, at least one, if U > 0.

    Of equals, the first.
    """
    count = max(1, math.floor(share * len(disagreements)))
    chosen = torch.zeros_like(disagreements, dtype=torch.bool)
    chosen[disagreements.argsort(descending=True, stable=True)[:count]] = True
    return chosen & (disagreements > 0)


# --- the diversity of a group, differentiable -------------------------------------------------------------


def log_vendi(features: Tensor, order: float = 1.0) -> Tensor:
    """log Vendi_q of a group's features (n, F), cosine kernel: scalar, float64, q >= 1, math.inf included.

    The gradient is V f'(L) V^T in the kernel, of eigenvalues alone: it does not divide by their differences. Where
    images coincide, eigenvalues are 0 and f' of q = 1 is not finite; in the features the product is 0, and so it is
    here. (For q < 1/2 it is not.)

    Raises:
        ValueError: the order is below 1.
    """
    if not order >= 1:
        raise ValueError(f"order is {order}; a differentiable Vendi score takes 1 or more, inf included")
    eigenvalues = torch.linalg.eigvalsh(_cosines(features) / len(features))  # (n,), rising
    kept = eigenvalues[eigenvalues > NEGLIGIBLE * eigenvalues[-1]]
    p = kept / kept.sum()
    if order == 1:
        return -(p * p.log()).sum()
    if math.isinf(order):
        return -p.amax().log()
    return (order * p.log()).logsumexp(0) / (1 - order)


def log_rke(features: Tensor, bandwidth: float) -> Tensor:
    """log RKE = -log mean_ij k(f_i, f_j)^2 of a group's features (n, F): scalar, float64."""
    exponents = -_squared_distances(features) / bandwidth**2
    return 2 * math.log(len(features)) - exponents.flatten().logsumexp(0)


def log_diversities(features: Tensor, group_ids: Tensor, bandwidth: float | None = None) -> Tensor:
    """`log_rke` of each image's group, or without a bandwidth its `log_vendi`: (N,) float64, differentiable."""
    found = features.new_zeros(len(features), dtype=torch.float64)
    for group in group_ids.unique():
        f = features[group_ids == group]
        value = log_vendi(f) if bandwidth is None else log_rke(f, bandwidth)
        found = torch.where(group_ids == group, value, found)
    return found


# --- groups and kernels -----------------------------------------------------------------------------------


def _by_group(function: Callable[[Tensor], Tensor], group_ids: Tensor, values: Tensor) -> Tensor:
    """What a function gives (n,) of each group's rows (n, ...) of the values, put together: (N,) float64.

    Raises:
        ValueError: a group of one.
    """
    found = values.new_zeros(len(values), dtype=torch.float64)
    for group in group_ids.unique():
        rows = (group_ids == group).nonzero().squeeze(1)
        if len(rows) < 2:
            raise ValueError(f"group {int(group)} has one image; it has nothing to differ from")
        found[rows] = function(values[rows])
    return found


def _cosines(f: Tensor) -> Tensor:
    """(n, F) -> (n, n), float64."""
    u = F.normalize(f.double(), dim=1)
    return u @ u.T


def _squared_distances(f: Tensor) -> Tensor:
    """(n, F) -> (n, n), float64, smooth where rows coincide; centred, for the last digits of close rows."""
    f = f.double() - f.double().mean(0)
    squares = f.square().sum(1)
    return squares[:, None] + squares - 2 * f @ f.T
