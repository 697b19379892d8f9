"""An epoch's windows, minibatches and rewards."""

from __future__ import annotations

import pytest
import torch

from flow_grpo.advantages import group_advantages
from flow_grpo.loops.collect import (
    advantages_of,
    epoch_prompts,
    sample_images,
    sampling_minibatches,
    sde_window,
    training_minibatches,
)
from flow_grpo.metrics import MeanMetrics
from flow_grpo.settings import resolve


def settings_of(config):
    return resolve(config, num_processes=1, cuda=False)


def windows(config, epochs):
    settings = settings_of(config)
    return [tuple(sde_window(settings, epoch)) for epoch in range(epochs)]


def test_a_random_window_is_drawn_anew_each_epoch_within_its_range(config):
    config.sample.sde_window_size, config.sample.sde_window_range = 1, (1, 3)
    assert set(windows(config, 12)) == {(1,), (2,)}


def test_a_sliding_window_goes_from_the_noisiest_steps_to_the_last_and_begins_again(config):
    config.sample.num_steps, config.sample.sde_window_size = 5, 2
    config.sample.sde_window_placement, config.sample.sde_window_epochs = "sliding", 2
    assert windows(config, 10) == [w for w in [(0, 1), (1, 2), (2, 3), (3, 4), (0, 1)] for _ in range(2)]


def test_a_sliding_windows_last_stride_is_cut_so_that_it_ends_with_the_last_steps(config):
    config.sample.num_steps, config.sample.sde_window_size, config.sample.sde_window_stride = 10, 3, 3
    config.sample.sde_window_placement, config.sample.sde_window_epochs = "sliding", 1
    config.sample.sde_window_range = (1, 9)
    assert windows(config, 4) == [(1, 2, 3), (4, 5, 6), (6, 7, 8), (1, 2, 3)]


def test_a_sliding_window_that_fills_its_range_stays(config):
    config.sample.sde_window_size, config.sample.sde_window_placement = 4, "sliding"
    assert set(windows(config, 60)) == {(0, 1, 2, 3)}


def test_in_float32_images_are_sampled_in_the_given_batches(config):
    config.sample.batch_size = 5
    chunks = sampling_minibatches(settings_of(config), 8, recorded=True)
    assert [chunk.tolist() for chunk in chunks] == [[0, 1, 2, 3, 4], [5, 6, 7]]


TEACHES = torch.tensor([True, False, False, True, True, True, False, False])


def minibatches(config, recorded):
    config.train.batch_size = 3
    return [chunk.tolist() for chunk in training_minibatches(settings_of(config), 0, TEACHES, recorded)]


def test_only_images_that_teach_are_trained_in_as_many_minibatches_as_all_would_be(config):
    assert minibatches(config, recorded=True) == [[0, 3, 4], [5], []]


def test_below_float32_a_minibatch_of_the_rollout_is_whole_or_left_out(config):
    config.mixed_precision = "bf16"
    assert minibatches(config, recorded=True) == [[0, 1, 2], [3, 4, 5], []]
    assert minibatches(config, recorded=False) == [[0, 3, 4], [5], []]


def images_of(parts, starts=None):
    batch = epoch_prompts(parts.prompts, parts.settings.plan, parts.settings.config.seed, 0, 0)
    return sample_images(parts.policy, batch, parts.reward, parts.settings, parts.run, MeanMetrics(), starts=starts)


def test_advantages_are_those_of_the_rewards_within_prompts_clamped(config, build):
    config.train.adv_clip_max, config.train.advantage_std = 1e-3, "none"
    parts = build(config)
    images = images_of(parts)
    found = advantages_of(parts.policy, images, parts.settings, MeanMetrics())
    expected = group_advantages(images.rewards, images.batch.group_ids, "none").clamp(-1e-3, 1e-3).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (expected.abs() == 1e-3).any()


@pytest.mark.parametrize("size", [8, 3])
def test_images_of_one_start_share_their_first_noise_and_nothing_else(config, build, size):
    config.sample.batch_size = size
    parts = build(config)
    latents = images_of(parts, starts=torch.arange(8) // 2).trajectory.latents
    assert torch.equal(latents[0::2, 0], latents[1::2, 0])
    assert not torch.equal(latents[0, 0], latents[2, 0])
    assert not torch.equal(latents[0::2, 1], latents[1::2, 1])
