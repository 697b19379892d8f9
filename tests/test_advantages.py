"""MATH 2: group-normalised advantages."""

import numpy as np
import pytest
import torch

from flow_grpo.advantages import ADVANTAGE_STDS, apply_advantage_mode, group_advantages, zero_std_fraction

REWARDS = torch.tensor([0.1, 0.9, 0.4, 0.4, 0.2, 0.8, 0.5, 0.4], dtype=torch.float64)
GROUPS = torch.tensor([7, 7, 2, 2, 7, 5, 5, 2])


@pytest.mark.parametrize("kind", ADVANTAGE_STDS)
def test_advantages_equal_numpy_group_by_group(kind):
    advantages = group_advantages(REWARDS, GROUPS, kind)
    for group in (2, 5, 7):
        r = REWARDS[group == GROUPS].numpy()
        divisor = {"group": r.std() + 1e-4, "batch": REWARDS.numpy().std() + 1e-4, "none": 1.0}[kind]
        np.testing.assert_allclose(advantages[group == GROUPS], (r - r.mean()) / divisor, rtol=1e-12, atol=1e-12)


def test_an_unknown_standard_deviation_is_refused():
    with pytest.raises(ValueError, match="'global'"):
        group_advantages(REWARDS, GROUPS, "global")


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
    assert (broken - group_advantages(REWARDS, GROUPS, "batch")).abs().max() > 0.1


def test_equal_rewards_have_no_advantage_and_are_counted():
    assert group_advantages(REWARDS, GROUPS)[GROUPS == 2].abs().max() < 1e-10
    assert zero_std_fraction(REWARDS, GROUPS) == pytest.approx(1 / 3)


@pytest.mark.parametrize("size", [2, 3, 7, 24])
def test_equal_float32_rewards_have_an_advantage_of_exactly_zero(size):
    """Images without an advantage are left out of the training, so a rounding error would cost a forward."""
    rewards = torch.rand(50, generator=torch.Generator().manual_seed(0)).repeat_interleave(size)
    assert (group_advantages(rewards, torch.arange(50).repeat_interleave(size)) == 0).all()


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
