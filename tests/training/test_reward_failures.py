"""A run whose reward is a server's, which goes away: nothing is lost, and the run goes on as if it had stayed."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from flow_grpo.errors import ConfigError, Interrupted, RewardFailed, TrainingStopped
from flow_grpo.evaluators.base import Measured
from flow_grpo.loops import policy_gradient
from flow_grpo.recipes.base import declare
from flow_grpo.rewards.wire import SAFETENSORS, digest_of, unpack
from flow_grpo.runs.folder import CHECKPOINTS
from flow_grpo.runs.saved import CHECKPOINT_STATE
from flow_grpo.runs.stopping import StopWatch
from flow_grpo.training import checkpoint
from flow_grpo.training.trainer import fit
from tests import forked
from tests.rewards.http_servers import Answer, answering

START = 1  # requests of the trial when rewards are built, of two images each


def redness(path: str, body: bytes) -> Answer:
    images, _, _ = unpack(body, SAFETENSORS, 64, 2**20)
    return 200, {"scores": images[:, 0].mean((1, 2)).tolist(), "digest": digest_of(body)}


@contextmanager
def red_server(requests: float, then: Answer = (503, "busy")) -> Iterator[str]:
    """A server that answers so many requests well, and then in another way."""
    seen: list[bytes] = []

    def answer(path: str, body: bytes) -> Answer:
        seen.append(body)
        return redness(path, body) if len(seen) <= requests else then

    with answering(answer) as address:
        yield address


def served(config, address: str) -> None:
    """Four requests an epoch, two images each."""
    config.reward_fn.pickscore = 0.0
    declare(config, ["reward_files.red"])
    config.reward_files.red = f"{address}/score/red"
    config.remote.patience, config.remote.batch_size, config.remote.concurrency = 0.2, 2, 2
    config.sample.batch_size, config.num_epochs = 4, 3


def train(parts, evaluators=()) -> None:
    due = checkpoint.resume(parts.policy, parts.run, parts.settings)
    loop = policy_gradient.train_epoch
    fit(parts.policy, loop, parts.prompts, parts.prompts, parts.reward, evaluators, parts.settings, parts.run, due)


def history(run) -> list[dict]:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    unlike = ("seconds", "perf/", "network_evaluations")
    return [
        {key: value for key, value in line.items() if not key.startswith(unlike)}
        for line in lines
        if "train/stopped" not in line
    ]


def test_a_run_whose_server_has_gone_is_saved_and_goes_on_as_if_it_had_stayed(config, build):
    with red_server(START + 4 * 2 + 1) as address:
        served(config, address)
        broken = build(config)
        with pytest.raises(TrainingStopped, match=r"the reward red failed in epoch 3, .*503.*checkpoint 2 is whole"):
            train(broken)
    with red_server(float("inf")) as address:
        served(config, address)
        config.resume_from = str(broken.run.folder)
        resumed = build(config)
        train(resumed)
        config.resume_from, config.run_name = "", "unbroken"
        unbroken = build(config)
        train(unbroken)
    assert len(history(unbroken.run)) == 3
    assert history(resumed.run) == history(unbroken.run)


@pytest.mark.parametrize("then", [(200, b"<html>"), (200, {"scores": []}), (401, {}), (500, {"detail": "no memory"})])
def test_whatever_is_wrong_with_an_answer_the_last_finished_epoch_is_saved(config, build, then):
    with red_server(START + 4 + 2, then) as address:
        served(config, address)
        parts = build(config)
        with pytest.raises(TrainingStopped, match=r"the reward red failed in epoch 2, .*checkpoint 1 is whole"):
            train(parts)
    assert [path.name for path in (parts.run.folder / CHECKPOINTS).iterdir()] == ["checkpoint-000001"]


class FailsAfterTwo:
    """An evaluator whose reward fails at the second epoch."""

    name, collective, request, freq = "fails", False, None, 2

    def __init__(self, run):
        self.run = run

    def evaluate(self, samples):
        if self.run.counters.epoch == 2:
            raise RewardFailed("red", "as its server has gone")
        return Measured({"fine": 1.0})


def test_a_reward_that_fails_in_an_evaluation_leaves_it_to_be_made_again(config, build):
    config.num_epochs = 3
    parts = build(config)
    with pytest.raises(TrainingStopped, match=r"the reward red failed as its server has gone; .*checkpoint 2 is whole"):
        train(parts, [FailsAfterTwo(parts.run)])
    state = json.loads((parts.run.folder / CHECKPOINTS / "checkpoint-000002" / CHECKPOINT_STATE).read_text())
    assert state["evaluated"] is False


def test_no_server_at_the_start_is_one_sentence_before_training(config, build):
    served(config, "http://127.0.0.1:9")
    with pytest.raises(
        ConfigError, match=r"reward_files\.red = .* cannot be used, as the server .* no answer for 0\.2"
    ):
        build(config)


def test_no_chat_server_at_the_start_is_one_sentence_too(config, build):
    config.reward_fn.chat, config.chat.url, config.remote.patience = 1.0, "http://127.0.0.1:9/v1", 0.2
    with pytest.raises(
        ConfigError, match=r"config\.chat\.url = .* cannot be used, as the server .* no answer for 0\.2"
    ):
        build(config)


def test_a_run_that_is_asked_to_stop_does_not_wait_for_a_server(config, build):
    stop, seen = StopWatch({}), []

    def answer(path: str, body: bytes) -> Answer:
        seen.append(body)
        if len(seen) == START + 4 + 2:
            stop.handle(signal.SIGTERM)
        return redness(path, body) if len(seen) < START + 4 + 2 else (503, "busy")

    with answering(answer) as address:
        served(config, address)
        config.remote.patience = 3600.0
        parts = build(config)
        parts.run._stop = stop
        parts.reward.heed(lambda: stop.reason() is not None)
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM after epoch 1, .*checkpoint 1 is whole"):
            train(parts)


def test_scores_outside_their_range_are_refused_at_the_start(config, build):
    with red_server(START) as address:
        served(config, address)
        declare(config, ["reward_range.red"])
        config.reward_range.red = (0.9, 1.0)
        with pytest.raises(ConfigError, match=r"outside config\.reward_range\.red = \(0\.9, 1\.0\)"):
            build(config)


def test_one_of_two_processes_whose_server_fails_ends_both_and_saves(random_models, tmp_path):
    with red_server(2 * START + 4 * 2 + 1) as address:
        done = forked.run("tests/reward_worker.py", random_models, tmp_path, address, processes=2)
    assert done.returncode == 0, done.stderr
    said = [(tmp_path / f"process{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "the reward red failed in epoch 3" in said[0]
    assert "checkpoint 2 is whole" in said[0]
    assert [path.name for path in (tmp_path / "logs/run" / CHECKPOINTS).iterdir()] == ["checkpoint-000002"]
