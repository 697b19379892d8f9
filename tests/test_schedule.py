"""The learning rate of every update: the schedules' closed forms, what moves them, and where they end."""

from __future__ import annotations

import math

import pytest
import torch

from flow_grpo.loops.update import apply_update
from flow_grpo.recipes.base import SCHEDULES
from flow_grpo.schedule import learning_rates
from flow_grpo.settings import resolve
from tests.training.saving import deterministic, train, weights

RATE, WARMUP, TOTAL = 0.01, 3, 11


def rates(config, name: str, updates: int, **changes) -> list[float]:
    """Of the first so many updates."""
    config.train.update({"learning_rate": RATE, "lr_scheduler": name, **changes})
    rate = learning_rates(resolve(config, 1, False))
    return [rate(n) for n in range(updates)]


def share(n: int) -> float:
    """How far the fall is after n updates, 0 to 1."""
    return min((n - WARMUP) / (TOTAL - WARMUP), 1.0)


CLOSED_FORMS = {
    "constant_with_warmup": lambda n: 1.0,
    "linear": lambda n: 1 - share(n),
    "cosine": lambda n: (1 + math.cos(math.pi * share(n))) / 2,
    "cosine_with_restarts": lambda n: (1 + math.cos(math.pi * (2 * share(n) % 1))) / 2 if share(n) < 1 else 0.0,
    "polynomial": lambda n: (1 - share(n)) ** 3 * (1 - 1e-7 / RATE) + 1e-7 / RATE,
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_schedule_is_its_closed_form_and_stays_at_its_end(config, name):
    own = {"cosine_with_restarts": {"lr_num_cycles": 2}, "polynomial": {"lr_power": 3.0}}.get(name, {})
    end = {} if name == "constant_with_warmup" else {"lr_total_steps": TOTAL}
    config.num_epochs = TOTAL + 4
    found = rates(config, name, TOTAL + 4, lr_warmup_steps=WARMUP, **end, **own)
    expected = [RATE * (n / WARMUP if n < WARMUP else CLOSED_FORMS[name](n)) for n in range(TOTAL + 4)]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-18)


def test_every_schedule_has_its_closed_form_here():
    assert {"constant", *CLOSED_FORMS} == set(SCHEDULES)


def test_a_constant_rate_is_the_configured_one_to_the_bit(config):
    assert set(rates(config, "constant", 5)) == {RATE}


@pytest.mark.parametrize(("reward_gradient", "updates"), [(False, 12), (True, 6)])
def test_a_schedule_ends_with_the_last_update_of_all_epochs(config, reward_gradient, updates):
    """Three epochs of two updates; black-box methods pass over an epoch's images twice."""
    config.use_reward_gradient, config.num_epochs, config.train.updates_per_epoch = reward_gradient, 3, 2
    config.train.num_inner_epochs = 1 if reward_gradient else 2
    config.train.lr_scheduler = "linear"
    settings = resolve(config, 1, False)
    assert settings.total_updates == updates
    assert learning_rates(settings)(updates) == 0 < learning_rates(settings)(updates - 1)


def update(parts, loss: float = 0.0) -> dict[str, float]:
    for parameter in parts.policy.trainable:
        parameter.grad = torch.ones_like(parameter)
    return apply_update(parts.policy, torch.tensor(loss), parts.run)


def test_an_update_takes_the_rate_of_its_number_and_a_skipped_one_does_not_count(config, build):
    """Adam with equal gradients moves every weight by the learning rate."""
    config.train.update({"learning_rate": RATE, "lr_scheduler": "linear", "lr_total_steps": 4})
    config.train.adam_weight_decay, config.train.adam_epsilon = 0.0, 1e-15
    parts = build(config)
    for loss, rate in ((0.0, 1.0), (0.0, 0.75), (float("nan"), 0.5), (0.0, 0.5), (0.0, 0.25), (0.0, 0.0)):
        before = parts.policy.trainable[0].detach().clone()
        assert update(parts, loss)["learning_rate"] == pytest.approx(RATE * rate, rel=1e-12)
        moved = (before - parts.policy.trainable[0].detach()).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, RATE * rate * (loss == 0)), rtol=1e-3, atol=1e-7)


def test_a_run_that_goes_on_is_the_unbroken_one_where_the_schedule_ends_with_the_epochs(config, build):
    config.train.update({"lr_scheduler": "cosine", "lr_warmup_steps": 1, "updates_per_epoch": 2})
    config.save_freq, config.num_epochs = 1, 3
    unbroken = train(config, build)
    before, kept = deterministic(unbroken.run.folder), weights(unbroken)
    config.resume_from = str(unbroken.run.folder / "checkpoints" / "checkpoint-000001")
    resumed = train(config, build)
    assert deterministic(resumed.run.folder) == before
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), kept, strict=True))
    logged = [line["train/learning_rate"] for line in before if "train/learning_rate" in line]
    assert len(set(logged)) == 3


def test_a_schedule_that_began_anew_would_be_noticed(config, build):
    config.train.update({"lr_scheduler": "cosine", "updates_per_epoch": 2})
    config.save_freq, config.num_epochs = 1, 2
    unbroken = train(config, build)
    kept = weights(unbroken)
    config.resume_from = str(unbroken.run.folder / "checkpoints" / "checkpoint-000001")
    make = build

    def build_wrong(settings):
        parts = make(settings)
        right = parts.policy.learning_rate
        parts.policy.learning_rate = lambda updates: right(updates - 2)
        return parts

    assert not all(torch.equal(a, b) for a, b in zip(weights(train(config, build_wrong)), kept, strict=True))
