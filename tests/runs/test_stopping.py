"""Signals, deadlines and launchers that have gone: a run that is stopped goes on as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flow_grpo.errors import ConfigError, Interrupted
from flow_grpo.evaluators.evaluation import sample_evaluators
from flow_grpo.launch import is_lost_process
from flow_grpo.loops import drtune, fdfo, forward_process
from flow_grpo.loops import policy_gradient as grpo
from flow_grpo.runs import stopping
from flow_grpo.runs.history import read_history
from flow_grpo.runs.stopping import Reason, StopWatch, watching
from flow_grpo.training import checkpoint
from flow_grpo.training.state import TrainingState
from flow_grpo.training.trainer import fit
from tests import forked
from tests.saved_runs import read_state
from tests.training.saving import deterministic

METHODS = {"grpo": grpo, "nft": forward_process, "fdfo": fdfo, "drtune": drtune}
OF_METHODS = {
    "nft": {"forward.old": "ema", "forward.draws": 1},  # whose old weights are a state of their own
    "fdfo": {"sample.sde_type": "cps"},
}


class StopAfter(StopWatch):
    """Asks to stop at the n-th question, by SIGTERM."""

    def __init__(self, questions: int) -> None:
        super().__init__({})
        self.left = questions

    def reason(self) -> Reason | None:
        self.left -= 1
        return Reason.SIGTERM if self.left < 0 else None


def train(config, build, stop_after=None):
    """scripts/train/train_sd3.py with reward and judge; how many questions were left, and the parts."""
    parts = build(config)
    parts.run._stop = StopAfter(10**9 if stop_after is None else stop_after)
    parts.run._stop.run = parts.run
    due = checkpoint.resume(parts.policy, parts.run, parts.settings)
    evaluators = sample_evaluators(parts.reward, parts.settings, torch.device("cpu"))
    method = METHODS[config.train.method or "grpo"]
    arguments = (parts.prompts, parts.prompts, parts.reward, evaluators, parts.settings, parts.run, due)
    fit(parts.policy, method.train_epoch, *arguments)
    return parts


def history(parts):
    return deterministic(parts.run.folder)


@pytest.fixture(autouse=True)
def _interruptible():
    """A suite started in the background ignores Ctrl-C from the start, as it should; these tests send it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def evaluated(config):
    """2 epochs of 2 updates in minibatches of 2; evaluated and saved after each."""
    config.eval_freq = config.save_freq = 1
    config.train.updates_per_epoch, config.train.batch_size, config.sample.batch_size = 2, 2, 4
    config.eval.batch_size, config.eval.num_prompts, config.eval.num_steps = 2, 2, 2
    return config


def questions(config, build, monkeypatch, note=lambda run: None):
    """An unbroken run, and what `note` says of it at each question whether to stop."""
    notes = []
    config.run_name = "unbroken"
    with monkeypatch.context() as patch:
        patch.setattr(StopAfter, "reason", lambda self: notes.append(note(self.run)))
        unbroken = train(config, build)
    return unbroken, notes


def check_resumed(config, build, unbroken, number):
    """Stop at a question, go on, and compare with the unbroken run: weights, history, counters, score."""
    expected = [p.detach().clone() for p in unbroken.policy.trainable]
    config.run_name, config.resume_from = f"stopped-{number}", ""
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM after epoch (\d), checkpoint \1 is whole; "):
        train(config, build, stop_after=number)
    config.resume_from = f"{config.logdir}/stopped-{number}"
    resumed = train(config, build)
    assert all(torch.equal(a, b) for a, b in zip(resumed.policy.trainable, expected, strict=True)), number
    assert history(resumed) == history(unbroken), number
    ours, theirs = (read_state(parts.run.folder / "checkpoints/checkpoint-000002") for parts in (resumed, unbroken))
    assert {**ours["counters"], "seconds": 0} == {**theirs["counters"], "seconds": 0}
    assert (ours["score"], ours["best"]) == (theirs["score"], theirs["best"])


@pytest.mark.parametrize("method", list(METHODS))
def test_stopped_anywhere_it_goes_on_as_if_it_had_not_been(evaluated, build, monkeypatch, method):
    """Before the first epoch, in sampling, between updates, in evaluation; each method at other questions."""
    evaluated.use_reward_gradient, evaluated.train.method = method == "drtune", method
    evaluated.update_from_flattened_dict(OF_METHODS.get(method, {}))
    unbroken, notes = questions(evaluated, build, monkeypatch)
    assert len(notes) > 15
    for number in range(list(METHODS).index(method), len(notes), len(notes) // 4):
        check_resumed(evaluated, build, unbroken, number)


def test_a_stop_right_after_an_evaluation_does_not_log_it_twice(evaluated, build, monkeypatch):
    def lines(run):
        path = run.folder / "metrics.jsonl"
        return len(read_history(path)) if path.exists() else 0

    unbroken, notes = questions(evaluated, build, monkeypatch, lines)
    assert [line["step"] for line in history(unbroken)] == [0, 1, 1, 2, 2]
    for logged in (1, 3):  # the base model's evaluation; the first epoch's
        check_resumed(evaluated, build, unbroken, notes.index(logged))


def test_a_run_that_has_ended_has_nothing_to_stop(evaluated, build, monkeypatch):
    """It is asked to stop while it writes its last checkpoint."""
    evaluated.eval_freq = 0
    _, notes = questions(evaluated, build, monkeypatch)
    evaluated.run_name = "ended"
    ended = train(evaluated, build, stop_after=len(notes))
    assert read_state(ended.run.folder / "checkpoints/checkpoint-000002")["counters"]["epoch"] == 2


def test_a_stop_that_kept_the_middle_of_an_epoch_would_not_be_exact(evaluated, build, monkeypatch):
    """The broken twin: the weights of after the first update, with the counters of before."""
    unbroken, notes = questions(evaluated, build, monkeypatch, lambda run: run.counters.updates)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "to_cpu", lambda self: self)  # no copy: it goes on changing
        evaluated.run_name = "stopped"
        with pytest.raises(Interrupted):
            train(evaluated, build, stop_after=notes.index(1))
    evaluated.resume_from = f"{evaluated.logdir}/stopped"
    resumed = train(evaluated, build)
    assert not all(torch.equal(a, b) for a, b in zip(resumed.policy.trainable, unbroken.policy.trainable, strict=True))


# --- the watch ------------------------------------------------------------------------------------------


def noted(watch: StopWatch) -> Reason | None:
    """What the watch has noted, once its thread has had its turn."""
    for _ in range(1000):
        if watch.reason():
            break
        time.sleep(0.01)
    return watch.reason()


def test_in_training_a_signal_is_noted():
    with watching() as watch:
        watch.armed = True
        assert watch.reason() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert noted(watch) == signal.SIGINT


# ends only by a signal: the main thread waits inside a library, as for another process that never comes
WAITING = """
import ctypes, sys
from flow_grpo.runs.stopping import watching
with watching() as watch:
    watch.armed = sys.argv[1] == "armed"
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(60)
    ctypes.CDLL(None).sleep(60)
"""


def test_before_training_a_signal_ends_a_process_that_waits_inside_a_library():
    process = start_waiting("unarmed")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert said == "stopped by SIGTERM before training began; nothing was lost.\n"


def test_in_training_a_second_signal_ends_a_process_that_waits_inside_a_library():
    process = start_waiting("armed")
    process.send_signal(signal.SIGTERM)
    time.sleep(stopping.SAME_REQUEST + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143


def start_waiting(state: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, state], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_signal_that_a_launcher_passes_on_is_the_same_request(monkeypatch):
    ended: list[int] = []
    monkeypatch.setattr(stopping.os, "_exit", ended.append)
    clock = iter([100.0, 100.5, 101.5])
    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(clock))
    watch = StopWatch({})
    watch.armed = True
    watch.handle(signal.SIGINT)
    watch.handle(signal.SIGTERM)
    assert ended == []
    watch.handle(signal.SIGTERM)
    assert ended == [143]


def test_a_signal_that_was_ignored_from_the_start_stays_ignored():
    """nohup, and what a shell starts in the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with watching() as watch:
            watch.armed = True
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGINT)
            assert noted(watch) == signal.SIGINT
    finally:
        signal.signal(signal.SIGHUP, before)


DEADLINES = [
    ({"FLOW_GRPO_DEADLINE": 1000}, 880),
    ({"SLURM_JOB_END_TIME": 1000}, 880),
    ({"FLOW_GRPO_DEADLINE": 1000, "SLURM_JOB_END_TIME": 5000}, 880),
    ({"SLURM_JOB_END_TIME": 1000, "FLOW_GRPO_DEADLINE_MARGIN": 10}, 990),
]


@pytest.mark.parametrize(("environment", "stops_at"), DEADLINES)
def test_a_deadline_stops_as_sigterm_does_two_minutes_before(monkeypatch, environment, stops_at):
    watch = StopWatch({name: str(value) for name, value in environment.items()})
    monkeypatch.setattr(stopping.time, "time", lambda: stops_at - 0.5)
    assert watch.reason() is None
    monkeypatch.setattr(stopping.time, "time", lambda: stops_at)
    assert watch.reason() is Reason.DEADLINE
    assert Interrupted(Reason.DEADLINE, "after epoch 2").exit_code == 143
    assert str(Interrupted(Reason.DEADLINE, "after epoch 2")) == "stopped by its deadline after epoch 2."


@pytest.mark.parametrize("value", ["soon", "-1", "nan", ""])
def test_a_deadline_that_is_no_time_is_one_sentence(value):
    with pytest.raises(ConfigError, match=f"FLOW_GRPO_DEADLINE={value} is not allowed; it takes seconds"):
        StopWatch({"FLOW_GRPO_DEADLINE": value})


PARENTS = [
    ("-m torch.distributed.run --nproc-per-node 2 train.py", True),
    ("-m accelerate.commands.launch train.py", True),
    ("scripts/study/run.py", True),
    ("-c pass", False),  # a shell, nohup, tmux: closing it stops nothing
]
CHILD = """
import os, sys, time
from flow_grpo.runs.stopping import StopWatch
watch, parent = StopWatch(), os.getppid()
while os.getppid() == parent:
    time.sleep(0.01)
open(sys.argv[1], "w").write(str(watch.reason()))
"""


@pytest.mark.parametrize(("words", "stops"), PARENTS)
def test_a_launcher_that_is_killed_stops_its_process_but_a_shell_does_not(tmp_path, words, stops):
    """The parent starts the child, with these words in its own command line, and is killed."""
    said = tmp_path / "said"
    parent = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', *sys.argv[1:3]]); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", parent, CHILD, str(said), words])
    time.sleep(2)
    process.kill()
    process.wait()
    for _ in range(1000):
        if said.exists() and said.read_text():
            break
        time.sleep(0.01)
    assert said.read_text() == (str(int(Reason.ORPHANED)) if stops else "None")


@pytest.mark.parametrize(
    ("message", "processes", "lost"),
    [
        ("[pair.cc:553] Connection closed by peer", 2, True),
        ("Connection closed by peer", 1, False),
        ("x", 2, False),
    ],
)
def test_a_process_that_has_gone_is_told_from_other_errors(message, processes, lost):
    assert is_lost_process(RuntimeError(message), processes) is lost


# --- as a command ---------------------------------------------------------------------------------------


def signalled(process: subprocess.Popen[str] | forked.Forked, folder: Path) -> None:
    """SIGTERM once the first epoch's line is in the history: it comes in the middle of training."""
    metrics = folder / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 1):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_real_signal_ends_every_process_with_one_sentence_and_a_checkpoint(random_models, tmp_path, processes):
    """Two are torchrun's, which passes the signal on."""
    from tests.scripts.test_train_sd3 import ROOT, SCRIPT, overrides

    recipe = ["--config", "config/grpo.py:tiny_sd3", "--config.num_epochs=1000", "--config.save_freq=0"]
    command = [SCRIPT, *overrides(random_models, tmp_path), *recipe, "--config.eval_freq=0"]
    if processes == 1:
        alone = forked.Forked(*command)
        signalled(alone, tmp_path)
        done = alone.finish()
        said = done.stderr
        assert done.returncode == 143
        assert "Traceback" not in said
    else:
        env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *command]
        launched = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        signalled(launched, tmp_path)
        _, said = launched.communicate(timeout=120)
    assert said.count("stopped by SIGTERM after epoch") == 1
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    epoch = int(saved.name.removeprefix("checkpoint-"))
    assert f"checkpoint {epoch} is whole; go on with `fme train --resume {tmp_path / 'run'}`." in said
    assert checkpoint.checkpoint_damage(saved, deep=True) is None
