"""Loops train on what a composition makes of the rewards, and a resumed run goes on with it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from ml_collections import ConfigDict

from flow_grpo.loops import collect
from flow_grpo.loops.collect import epoch_prompts, sample_images
from flow_grpo.metrics import MeanMetrics
from flow_grpo.recipes.base import declare
from flow_grpo.training import checkpoint
from flow_grpo.training.checkpoint import Saver
from tests.conftest import by_method

HELD = {"reward_fn.jpeg_compressibility": 0.5, "reward_constraint.clipscore": 0.5, "reward_normalise": True,
        "reward_augment": 0.1}  # fmt: skip


def change(config: ConfigDict, changes: dict[str, object]) -> ConfigDict:
    declare(config, changes)
    config.update_from_flattened_dict(changes)
    return config


def images_of(parts) -> tuple[collect.Images, dict[str, float]]:
    policy, plan = parts.policy, parts.settings.plan
    batch = epoch_prompts(parts.prompts, plan, parts.settings.config.seed, 0, 0)
    metrics = MeanMetrics()
    images = sample_images(policy, batch, parts.reward, parts.settings, parts.run, metrics)
    return images, metrics.result(policy.accelerator)


def test_rewards_alone_are_scaled_by_the_very_images_that_train(config, build):
    config.sample.batch_size = 3  # batches, whose own deviations would differ
    plain = build(config.copy_and_resolve_references())
    assert images_of(plain)[1]["reward/pickscore/std"] > 0
    changes = {"reward_fn.jpeg_compressibility": 0.5, "reward_normalise": True}
    parts = build(change(config.copy_and_resolve_references(), changes))
    images, metrics = images_of(parts)
    composition = parts.run.composition
    assert composition.moments["pickscore"].count == 8
    assert metrics["reward/pickscore/std"] == pytest.approx(composition.moments["pickscore"].std, rel=1e-5)
    assert metrics["reward/jpeg_compressibility/factor"] == pytest.approx(
        0.5 / metrics["reward/jpeg_compressibility/std"], rel=1e-5
    )
    with torch.no_grad():
        decoded = parts.policy.decode(images.trajectory.final_latents)
        terms = parts.reward(decoded, images.batch.prompts, images.batch.metadata).terms
    torch.testing.assert_close(images.rewards, composition.total(terms), rtol=1e-4, atol=1e-4)


def test_a_constraint_compares_with_the_bases_images_of_the_same_noise(config, build):
    """Untrained, policy and base are the same: nothing is below. Once trained, something may be."""
    parts = build(change(config, HELD))
    _, metrics = images_of(parts)
    assert metrics["reward/clipscore/below_base"] == 0
    assert metrics["reward/clipscore/multiplier"] == 0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parts.policy.trainable:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    before = parts.run.composition.moments["clipscore"].count
    _, metrics = images_of(parts)
    gap, rate, std = metrics["reward/clipscore/below_base"], 0.5, parts.run.composition.moments["clipscore"].std
    assert gap != 0
    assert parts.run.composition.moments["clipscore"].count == 2 * before  # the base's images are not among them
    assert metrics["reward/clipscore/multiplier"] == pytest.approx(max(0.0, rate * gap / std), rel=1e-4)


@pytest.mark.parametrize("name", ["drtune", "draft_lv", "leapalign", "alignprop"])
def test_reward_gradients_have_a_scale_before_their_first_update(config, build, name):
    by_method(config, name)
    config.train.updates_per_epoch = 2
    parts = build(change(config, {"reward_fn.clipscore": 1.0, "reward_constraint.clipscore": 0.5,
                                  "reward_normalise": True}))  # fmt: skip
    metrics = parts.train()
    composition = parts.run.composition
    assert composition.moments["pickscore"].count == 4 + 8  # the first update's images once more, ahead
    assert metrics["reward/pickscore/factor"] == pytest.approx(1 / composition.moments["pickscore"].std, rel=0.5)
    shares = [metrics[f"reward/{reward}/gradient_share"] for reward in ("pickscore", "clipscore")]
    assert sum(shares) == pytest.approx(1, rel=1e-5)
    assert min(shares) > 0.01
    assert metrics["skipped_updates"] == 0


def test_a_constraint_of_reward_gradients_is_0_at_the_base(config, build):
    by_method(config, "drtune")
    parts = build(change(config, {"reward_constraint.clipscore": 0.5, "reward_augment": 0.1}))
    assert parts.train()["reward/clipscore/below_base"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["grpo", "drtune"])
def test_a_resumed_run_goes_on_with_the_same_scales_and_multipliers(config, build, name):
    by_method(config, name)
    changes = HELD | ({"reward_fn.jpeg_compressibility": 0.0} if name == "drtune" else {})
    config = change(config, changes)
    config.train.learning_rate = 1e-2
    parts = build(config)
    parts.train()
    saver = Saver(parts.policy, parts.run, parts.settings)
    assert saver.save(None)
    parts.train()
    expected = parts.run.composition.state_dict()
    weights = [p.detach().clone() for p in parts.policy.trainable]
    again = change(config.copy_and_resolve_references(), {"resume_from": str(parts.run.folder)})
    parts = build(again)
    checkpoint.resume(parts.policy, parts.run, parts.settings)
    parts.run.counters.epoch = 1
    parts.train()
    assert parts.run.composition.state_dict() == expected
    assert all(torch.equal(p, q) for p, q in zip(parts.policy.trainable, weights, strict=True))
    assert any(moments["count"] > 0 for moments in expected["moments"].values())


def test_ones_own_reward_trains_by_its_gradient(config, build, tmp_path: Path):
    (tmp_path / "mine.py").write_text("def red(images, prompts):\n    return images[:, 0].flatten(1).mean(1)\n")
    by_method(config, "drtune")
    config.train.learning_rate = 1e-2
    parts = build(change(config, {"reward_fn.pickscore": 0.0, "reward_files.mine": f"{tmp_path / 'mine.py'}:red"}))
    first = parts.train()["reward/mine"]
    for _ in range(3):
        last = parts.train()["reward/mine"]
    assert last > first
    assert math.isfinite(last)
