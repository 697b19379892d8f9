"""The loop around an epoch: which checkpoints it writes, and by what the best is chosen."""

from __future__ import annotations

import pytest
import torch

from flow_grpo import checkpoint
from flow_grpo.errors import TrainingStopped
from flow_grpo.trainer import fit, score_of


def train(parts, updates):
    """Epochs that apply so many updates each; fit, and the names of the checkpoints."""
    applied = iter(updates)

    def train_epoch(policy, prompts, reward, settings, run):
        count = next(applied)
        run.counters.updates += count
        policy.skipped_in_a_row = 0 if count else policy.skipped_in_a_row + 1
        with torch.no_grad():
            policy.trainable[0] += count
        return {"reward": 0.0}

    fit(parts.policy, train_epoch, parts.prompts, parts.prompts, parts.reward, (), parts.settings, parts.run)
    return sorted(path.name for path in (parts.run.folder / "checkpoints").iterdir())


def name(epoch):
    return f"checkpoint-{epoch:06d}"


def test_a_last_epoch_whose_updates_were_skipped_is_saved(config, build):
    config.num_epochs, config.save_freq = 5, 10
    assert train(build(config), [1, 1, 1, 1, 0]) == [name(5)]


def test_an_epoch_with_one_update_skipped_is_saved_as_any_other(config, build):
    config.num_epochs, config.save_freq = 2, 1
    parts = build(config)
    parts.policy.skipped_in_a_row = 1
    assert train(parts, [1, 1]) == [name(1), name(2)]


def test_epochs_without_an_update_are_not_saved_again_before_the_last(config, build):
    config.num_epochs, config.save_freq = 5, 1
    assert train(build(config), [1, 0, 0, 1, 0]) == [name(1), name(4), name(5)]


def failing(monkeypatch, times):
    """The disk is full the first so many times."""
    left, export = iter(range(times)), checkpoint.export

    def sometimes(*arguments):
        if next(left, None) is not None:
            raise OSError(28, "No space left on device")
        export(*arguments)

    monkeypatch.setattr(checkpoint, "export", sometimes)


def test_a_checkpoint_that_could_not_be_written_is_tried_again_after_every_epoch(config, build, monkeypatch):
    config.num_epochs, config.save_freq = 7, 3
    failing(monkeypatch, 2)
    assert train(build(config), [1] * 7) == [name(5), name(6), name(7)]


def test_a_last_checkpoint_that_cannot_be_written_is_one_sentence(config, build, monkeypatch):
    config.num_epochs, config.save_freq = 2, 1
    parts = build(config)
    failing(monkeypatch, 10**9)
    with pytest.raises(TrainingStopped, match="the last checkpoint could not be written; what was saved"):
        train(parts, [1, 1])


METRICS = {
    "eval/reward/total": 9.0,
    "eval/reward/pickscore": 9.0,
    "eval/reward/clipscore": 3.0,
    "eval/judge/accuracy": 0.5,
}


@pytest.mark.parametrize(
    ("judge", "measured", "expected"),
    [
        (True, ("clipscore",), ("eval/judge/accuracy", 0.5)),
        (False, ("pickscore", "clipscore"), ("eval/reward/clipscore", 3.0)),
        (False, ("pickscore",), ("eval/reward/total", 9.0)),
    ],
)
def test_the_best_is_chosen_by_judge_then_held_out_reward_then_what_is_trained_on(
    config, build, judge, measured, expected
):
    config.eval.rewards = measured
    if not judge:
        config.eval.judge = config.eval.modes = ""
    found = score_of(METRICS, build(config).settings, "eval")
    assert (found.metric, found.value) == expected


@pytest.mark.parametrize("value", [None, float("nan")])
def test_what_was_not_measured_or_is_not_finite_is_no_score(config, build, value):
    metrics = METRICS | {"eval/judge/accuracy": value}
    assert score_of(metrics, build(config).settings, "eval") is None
