"""One update: what is skipped, counted, averaged and refused."""

from __future__ import annotations

import pytest
import torch

from flow_grpo.errors import TrainingStopped
from flow_grpo.loops import drtune
from flow_grpo.loops import policy_gradient as grpo
from flow_grpo.loops.update import apply_update
from flow_grpo.rewards.building import WeightedReward
from flow_grpo.rules import LARGEST, SMALLEST
from tests.conftest import by_method


class SpoiltReward:
    """A reward that returns `value` for the first image while `calls` last."""

    def __init__(self, model, value: float, calls: int) -> None:
        self.model, self.value, self.calls = model, value, calls

    def __call__(self, images, prompts, metadata):
        scores = self.model(images, prompts, metadata)
        if self.calls == 0:
            return scores
        self.calls -= 1
        spoil = torch.zeros_like(scores)
        spoil[0] = self.value
        return scores + spoil


def spoilt(reward: WeightedReward, value: float, calls: int) -> WeightedReward:
    [(name, model)] = reward.models.items()
    return WeightedReward({name: SpoiltReward(model, value, calls)}, reward.weights)


METHODS = pytest.mark.parametrize("method", [grpo, drtune])


@METHODS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_reward_skips_the_update_and_training_goes_on(config, build, method, value):
    config.use_reward_gradient = method is drtune
    parts = build(config)
    parts.reward = spoilt(parts.reward, value, calls=1)
    before = [p.detach().clone() for p in parts.policy.trainable]
    metrics = parts.train(method)
    assert metrics["skipped_updates"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(parts.policy.trainable, before, strict=True))
    assert (parts.run.counters.updates, parts.run.counters.nonfinite_updates) == (0, 1)
    assert parts.train(method)["skipped_updates"] == 0.0
    assert (parts.run.counters.updates, parts.run.counters.nonfinite_updates) == (1, 1)
    assert not all(torch.equal(a, b) for a, b in zip(parts.policy.trainable, before, strict=True))


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("nft", "train.adv_clip_max", SMALLEST),
        ("grpo", "train.adam_epsilon", SMALLEST),
        ("grpo", "train.beta", LARGEST),
        ("nft", "forward.beta", LARGEST),
        ("pepg", "forward.strength", LARGEST),
        ("anchored", "anchored.strength", LARGEST),
        ("adjoint_matching", "adjoint.strength", LARGEST),
    ],
)
def test_at_the_ends_of_what_a_number_may_be_updates_are_finite(config, build, method, key, value):
    by_method(config, method)
    config.update_from_flattened_dict({key: value})
    parts = build(config)
    assert [parts.train()["skipped_updates"] for _ in range(2)] == [0.0, 0.0]
    assert all(p.isfinite().all() for p in parts.policy.trainable)


@METHODS
def test_so_many_skipped_updates_in_a_row_stop_the_run(config, build, method):
    config.use_reward_gradient = method is drtune
    config.train.max_nonfinite_updates = 3
    parts = build(config)
    parts.reward = spoilt(parts.reward, float("nan"), calls=10)
    parts.train(method)
    parts.train(method)
    with pytest.raises(TrainingStopped, match="3 updates in a row"):
        parts.train(method)


def test_an_update_in_between_starts_the_count_anew(config, build):
    config.train.max_nonfinite_updates = 2
    parts = build(config)
    for loss in (float("nan"), 0.0, float("nan"), 0.0):
        for parameter in parts.policy.trainable:
            parameter.grad = torch.zeros_like(parameter)
        apply_update(parts.policy, torch.tensor(loss), parts.run)
    assert parts.run.counters.nonfinite_updates == 2


def test_in_fp16_an_overflow_lowers_the_loss_scale_and_is_not_a_failure_until_that_is_no_help(config, build):
    config.train.max_nonfinite_updates = 1
    parts = build(config)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    parts.policy.accelerator.scaler = scaler
    before = [p.detach().clone() for p in parts.policy.trainable]
    for scale in (2.0, 1.0):
        _overflow(parts, scaler)
        assert apply_update(parts.policy, torch.tensor(0.0), parts.run)["skipped_updates"] == 1.0
        assert scaler.get_scale() == scale
    _overflow(parts, scaler)
    with pytest.raises(TrainingStopped):
        apply_update(parts.policy, torch.tensor(0.0), parts.run)
    assert all(torch.equal(a, b) for a, b in zip(parts.policy.trainable, before, strict=True))


def _overflow(parts, scaler):
    """Leave infinite gradients behind, seen by the scaler as by accelerate's clip_grad_norm_."""
    for parameter in parts.policy.trainable:
        parameter.grad = torch.full_like(parameter, torch.inf)
    scaler.scale(torch.tensor(0.0))
    scaler.unscale_(parts.policy.optimizer.optimizer)


def test_gradients_are_clipped_and_their_norm_before_that_is_reported(config, build):
    config.train.max_grad_norm = 0.5
    parts = build(config)
    seen = []
    parts.policy.optimizer.step = lambda: seen.append(torch.cat([p.grad.flatten() for p in parts.policy.trainable]))
    for parameter in parts.policy.trainable:
        parameter.grad = torch.ones_like(parameter)
    metrics = apply_update(parts.policy, torch.tensor(1.0), parts.run)
    assert metrics["grad_norm"] == pytest.approx(len(seen[0]) ** 0.5, rel=1e-5)
    assert seen[0].norm().item() == pytest.approx(0.5, rel=1e-4)


def test_the_average_follows_the_weights_with_its_decay(config, build):
    """diffusers' schedule: decay min((1 + t) / (10 + t), ema_decay) from the second update on."""
    parts = build(config)
    parameter, shadow = parts.policy.trainable[0], parts.policy.ema.shadow_params[0]
    expected = parameter.detach().clone()
    for t in range(3):
        for p in parts.policy.trainable:
            p.grad = torch.ones_like(p)
        apply_update(parts.policy, torch.tensor(0.0), parts.run)
        decay = 0.0 if t == 0 else min((1 + t) / (10 + t), 0.9)
        expected = decay * expected + (1 - decay) * parameter.detach()
    torch.testing.assert_close(shadow, expected, rtol=1e-6, atol=1e-9)
