"""MATH 2: group-normalised advantages."""

import numpy as np
import pytest
import torch

from flow_grpo.advantages import apply_advantage_mode, group_advantages, zero_std_fraction

REWARDS = torch.tensor([0.1, 0.9, 0.4, 0.4, 0.2, 0.8, 0.5, 0.4], dtype=torch.float64)
GROUPS = torch.tensor([7, 7, 2, 2, 7, 5, 5, 2])


@pytest.mark.parametrize("global_std", [False, True])
def test_advantages_equal_numpy_group_by_group(global_std):
    advantages = group_advantages(REWARDS, GROUPS, global_std)
    for group in (2, 5, 7):
        r = REWARDS[group == GROUPS].numpy()
        std = REWARDS.numpy().std() if global_std else r.std()
        np.testing.assert_allclose(advantages[group == GROUPS], (r - r.mean()) / (std + 1e-4), rtol=1e-12, atol=1e-12)


def test_advantages_do_not_depend_on_the_order_of_images():
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        group_advantages(REWARDS[order], GROUPS[order]),
        group_advantages(REWARDS, GROUPS)[order],
        rtol=1e-12,
        atol=1e-12,
    )


def test_normalising_by_the_batch_mean_instead_of_the_groups_differs():
    broken = (REWARDS - REWARDS.mean()) / (REWARDS.std(correction=0) + 1e-4)
    assert (broken - group_advantages(REWARDS, GROUPS, global_std=True)).abs().max() > 0.1


def test_equal_rewards_have_no_advantage_and_are_counted():
    assert group_advantages(REWARDS, GROUPS)[GROUPS == 2].abs().max() < 1e-10
    assert zero_std_fraction(REWARDS, GROUPS) == pytest.approx(1 / 3)


def test_a_non_finite_reward_spoils_its_whole_group_and_no_other():
    rewards = REWARDS.clone()
    rewards[5] = torch.inf
    assert group_advantages(rewards, GROUPS).isnan().tolist() == (GROUPS == 5).tolist()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [-2.0, 0.0, 3.0]),
        ("positive", [0.0, 0.0, 3.0]),
        ("negative", [-2.0, 0.0, 0.0]),
        ("weighted", [-2.0, 0.0, 0.3]),
    ],
)
def test_modes_keep_their_part(mode, expected):
    values = apply_advantage_mode(torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64), mode)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'both'"):
        apply_advantage_mode(REWARDS, "both")
