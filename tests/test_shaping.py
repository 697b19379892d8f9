"""Diversity inside the objective, in float64, against references that are written independently."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial.distance import cdist

from flow_grpo import shaping
from flow_grpo.diversity.rke import rke_score
from flow_grpo.diversity.vendi import vendi_score
from flow_grpo.shaping import (
    cluster_bonus,
    disagreement,
    distance_weighted,
    entropy_bonus,
    gate,
    log_rke,
    log_vendi,
    vendi_bonus,
)

GENERATOR = torch.Generator().manual_seed(0)
GROUPS = torch.tensor([3, 7, 3, 7, 3, 7, 7, 3, 7])  # of 4 and 5, interleaved
FEATURES = torch.randn(9, 6, generator=GENERATOR, dtype=torch.float64)
REWARDS = torch.randn(9, generator=GENERATOR, dtype=torch.float64)
ORDERS = [1.0, 1.5, 2.0, math.inf]


def by_image(of: Callable[[np.ndarray, int], float]) -> torch.Tensor:
    """What a reference gives for image i of its group's features, image by image."""
    found = []
    for image in range(len(GROUPS)):
        rows = [j for j in range(len(GROUPS)) if GROUPS[j] == GROUPS[image]]
        found.append(of(FEATURES[rows].numpy(), rows.index(image)))
    return torch.tensor(found, dtype=torch.float64)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def without(x: np.ndarray, i: int) -> np.ndarray:
    return np.delete(x, i, axis=0)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# --- bonuses --------------------------------------------------------------------------------------------


def entropy_reference(bandwidth: float, sign: float = -1.0) -> torch.Tensor:
    def log_mean(x: np.ndarray, i: int) -> float:
        squares = cdist(x[i : i + 1], without(x, i), "sqeuclidean")
        return math.log(np.exp(-squares / (2 * bandwidth**2)).mean())

    return sign * by_image(log_mean)


def test_the_entropy_bonus_is_minus_the_log_of_the_mean_kernel_to_the_others() -> None:
    close(entropy_bonus(REWARDS, GROUPS, FEATURES, 0.3, 2.0), REWARDS + 0.3 * entropy_reference(2.0))
    for broken in (entropy_reference(2.0, sign=1.0), entropy_reference(2.0 * math.sqrt(2))):
        with pytest.raises(AssertionError):
            close(entropy_bonus(REWARDS, GROUPS, FEATURES, 0.3, 2.0), REWARDS + 0.3 * broken)


@pytest.mark.parametrize("order", ORDERS)
def test_the_vendi_bonus_is_what_the_score_of_the_others_lacks(order: float) -> None:
    def share(x: np.ndarray, i: int) -> float:
        return math.log(vendi_score(x, order)) - math.log(vendi_score(without(x, i), order))

    close(vendi_bonus(REWARDS, GROUPS, FEATURES, 0.3, order), REWARDS + 0.3 * by_image(share))
    with pytest.raises(AssertionError):  # the sign
        close(vendi_bonus(REWARDS, GROUPS, FEATURES, 0.3, order), REWARDS - 0.3 * by_image(share))


def test_the_cluster_bonus_is_by_the_size_of_the_cluster() -> None:
    """Three of one direction and one of another; a second group of three that differ, whatever their lengths."""
    x, y, z = torch.eye(3, dtype=torch.float64)
    features = torch.stack([x, 2 * x, x + 0.01 * y, y, x, y, z])
    groups, rewards = torch.tensor([0, 0, 0, 0, 1, 1, 1]), torch.arange(7.0)
    expected = torch.tensor([4 / 3, 4 / 3, 4 / 3, 4, 3, 3, 3], dtype=torch.float64).sqrt()
    close(cluster_bonus(rewards, groups, features, 0.5, 0.1), rewards.double() + 0.5 * expected)
    one = torch.ones(7, dtype=torch.float64)  # cut above all distances
    close(cluster_bonus(rewards, groups, features, 0.5, 1.1), rewards.double() + 0.5 * one)
    with pytest.raises(AssertionError):  # by the square of the rarity
        close(cluster_bonus(rewards, groups, features, 0.5, 0.1), rewards.double() + 0.5 * expected.square())


def test_a_copy_in_the_group_earns_less_than_what_differs() -> None:
    features = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    groups, rewards = torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    for bonus in (
        cluster_bonus(rewards, groups, features, 1.0, 0.1),
        entropy_bonus(rewards, groups, features, 1.0, 0.5),
        vendi_bonus(rewards, groups, features, 1.0),
    ):
        assert bonus[0] == pytest.approx(bonus[1].item())
        assert bonus[2] > bonus[0]


def test_no_weight_leaves_the_rewards() -> None:
    for bonus in (
        cluster_bonus(REWARDS, GROUPS, FEATURES, 0.0, 0.1),
        entropy_bonus(REWARDS, GROUPS, FEATURES, 0.0, 1.0),
        vendi_bonus(REWARDS, GROUPS, FEATURES, 0.0),
    ):
        assert torch.equal(bonus, REWARDS)


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="group 5 has one image"):
        vendi_bonus(REWARDS[:1], torch.tensor([5]), FEATURES[:1], 1.0)


# --- advantages and the gate ----------------------------------------------------------------------------


def nearest(x: np.ndarray, i: int) -> float:
    return min(1 - cosine(x[i], other) for other in without(x, i))


def mean_nearest(x: np.ndarray, i: int) -> float:
    return float(np.mean([nearest(x, j) for j in range(len(x))]))


def test_positive_advantages_are_weighted_by_the_distance_to_the_nearest() -> None:
    weights = by_image(nearest) / by_image(mean_nearest)
    close(distance_weighted(REWARDS, GROUPS, FEATURES), torch.where(REWARDS > 0, REWARDS * weights, REWARDS))
    for broken in (REWARDS * weights, torch.where(REWARDS < 0, REWARDS * weights, REWARDS), REWARDS / weights):
        with pytest.raises(AssertionError):
            close(distance_weighted(REWARDS, GROUPS, FEATURES), broken)


def test_a_group_of_copies_keeps_its_advantages() -> None:
    copies = torch.ones(9, 6, dtype=torch.float64)
    assert torch.equal(distance_weighted(REWARDS, GROUPS, copies), REWARDS)


def test_the_one_that_the_reward_alone_likes_is_penalised() -> None:
    """By hand: the reward says 0 > 1 > 2, held-out rewards 1 > 2 > 0. Wins: (1, 1/2, 0) and (0, 1, 1/2)."""
    rewards, held_out, groups = (
        torch.tensor([3.0, 2, 1]),
        torch.tensor([[1.0, 3, 2]]),
        torch.zeros(3, dtype=torch.int64),
    )
    found = disagreement(rewards, held_out, groups)
    assert found.tolist() == [1.0, -0.5, -0.5]
    assert gate(found).tolist() == [True, False, False]
    assert gate(-found).tolist() != gate(found).tolist()  # the opposite sign


def test_win_shares_are_within_groups_with_half_a_win_for_a_tie_and_a_mean_over_held_out_rewards() -> None:
    groups = torch.tensor([0, 0, 0, 1, 1])
    rewards, flat = torch.tensor([5.0, 5, 1, 0, 9]), torch.zeros(5)
    held_out = torch.stack([flat, rewards])
    found = disagreement(rewards, held_out, groups)
    shares = torch.tensor([0.75, 0.75, 0.0, 0.0, 1.0], dtype=torch.float64)
    close(found, shares - (0.5 + shares) / 2)


def test_the_gate_is_a_tenth_and_only_of_those_whom_the_reward_prefers() -> None:
    u = torch.linspace(-1, 1, 40)
    assert gate(u).nonzero().flatten().tolist() == [36, 37, 38, 39]
    assert gate(torch.full((40,), -0.1)).sum() == gate(torch.zeros(40)).sum() == 0
    assert gate(torch.ones(40)).nonzero().flatten().tolist() == [0, 1, 2, 3]


# --- differentiable -------------------------------------------------------------------------------------


def gradient(of: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    of(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def finite_difference(of: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, h: float = 1e-5) -> torch.Tensor:
    found = torch.zeros_like(x)
    for place in range(x.numel()):
        step = torch.zeros_like(x).view(-1)
        step[place] = h
        found.view(-1)[place] = (of(x + step.view_as(x)) - of(x - step.view_as(x))) / (2 * h)
    return found


@pytest.mark.parametrize("order", ORDERS)
def test_log_vendi_is_the_log_of_the_score_and_its_gradient_that_of_differences(order: float) -> None:
    def of(x: torch.Tensor) -> torch.Tensor:
        return log_vendi(x, order)

    assert of(FEATURES).item() == pytest.approx(math.log(vendi_score(FEATURES.numpy(), order)), rel=1e-9)
    torch.testing.assert_close(gradient(of, FEATURES), finite_difference(of, FEATURES), rtol=1e-6, atol=1e-8)


def test_log_rke_is_the_log_of_the_score_and_its_gradient_that_of_differences() -> None:
    def of(x: torch.Tensor) -> torch.Tensor:
        return log_rke(x, 1.7)

    assert of(FEATURES).item() == pytest.approx(math.log(rke_score(FEATURES.numpy(), 1.7)), rel=1e-9)
    torch.testing.assert_close(gradient(of, FEATURES), finite_difference(of, FEATURES), rtol=1e-6, atol=1e-8)


def vendi_gradient(x: np.ndarray, sign: float = 1.0) -> np.ndarray:
    """d(-tr rho log rho) = -tr(d rho log rho), by SciPy's matrix logarithm; through the rows' lengths by hand."""
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    u = x / lengths
    in_u = -2 / len(x) * scipy.linalg.logm(u @ u.T / len(x)).real @ u
    return sign * (in_u - (in_u * u).sum(1, keepdims=True) * u) / lengths


def test_the_gradient_of_log_vendi_is_that_of_the_matrix_logarithm() -> None:
    x = FEATURES[:5]
    close(gradient(log_vendi, x), torch.from_numpy(vendi_gradient(x.numpy())))
    with pytest.raises(AssertionError):
        close(gradient(log_vendi, x), torch.from_numpy(vendi_gradient(x.numpy(), sign=-1.0)))


def rke_gradient(x: np.ndarray, bandwidth: float) -> np.ndarray:
    """d log RKE / d x_i = 4 sum_j k_ij^2 (x_i - x_j) / h^2 / sum k^2."""
    squared = np.exp(-cdist(x, x, "sqeuclidean") / bandwidth**2)
    return 4 * (squared[:, :, None] * (x[:, None] - x)).sum(1) / bandwidth**2 / squared.sum()


def test_the_gradient_of_log_rke_is_the_closed_form() -> None:
    close(gradient(lambda x: log_rke(x, 1.7), FEATURES), torch.from_numpy(rke_gradient(FEATURES.numpy(), 1.7)))
    with pytest.raises(AssertionError):
        close(gradient(lambda x: log_rke(x, 1.7), FEATURES), torch.from_numpy(rke_gradient(FEATURES.numpy(), 1.2)))


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_are_finite_where_eigenvalues_coincide(order: float) -> None:
    """Orthonormal features, all eigenvalues alike; and copies, all but one of them 0: both are stationary."""
    for x in (torch.eye(5, dtype=torch.float64), torch.ones(5, 6, dtype=torch.float64)):
        found = gradient(lambda y: log_vendi(y, order), x)
        assert found.isfinite().all()
        if order < math.inf:
            torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-9)
    assert gradient(lambda y: log_rke(y, 1.0), torch.ones(5, 6)).abs().max() < 1e-6


def test_two_pairs_of_copies_have_the_gradient_of_differences() -> None:
    """Eigenvalues that coincide at 0 beside others that do not."""
    x = FEATURES[[0, 0, 1, 1]]
    for order in (1.5, 2.0):
        found = gradient(lambda y, order=order: log_vendi(y, order), x)
        expected = finite_difference(lambda y, order=order: log_vendi(y, order), x)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_features_of_float32_are_taken_in_float64() -> None:
    x = FEATURES.float()
    assert log_vendi(x).dtype == log_rke(x, 1.0).dtype == torch.float64
    assert gradient(log_vendi, x).dtype == torch.float32


@pytest.mark.parametrize("order", [0.5, math.nan])
def test_an_order_below_one_is_refused(order: float) -> None:
    with pytest.raises(ValueError, match="takes 1 or more"):
        log_vendi(FEATURES, order)


def test_a_twin_that_divides_by_what_is_nothing_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shaping, "NEGLIGIBLE", -math.inf)
    found = gradient(lambda x: log_vendi(x), torch.ones(5, 6, dtype=torch.float64))
    assert not (found.isfinite().all() and found.abs().max() < 1e-9)
