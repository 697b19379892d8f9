"""What a run writes of its settings and of what it ran on."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from config.base import get_config
from flow_grpo.runs.environment import _git_state
from tests.runs.new_runs import NewRun


def test_the_records_hold_the_whole_config_and_what_it_ran_on(new_run: NewRun) -> None:
    run = new_run()
    config = json.loads((run.folder / "config.json").read_text())
    assert set(config) == set(get_config())
    assert config["sample"]["num_steps"] == 10
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["packages"]["accelerate"]
    assert environment["processes"] == 1
    assert environment["threads"] >= 1
    assert environment["command"].startswith("python ")
    assert environment["device"].startswith("cpu")
    assert environment["batch_plan"]["images"] == 80
    assert not any(os.environ.get(secret, "\0") in json.dumps(environment) for secret in ("WANDB_API_KEY", "HF_TOKEN"))


def test_the_git_state_is_none_where_the_code_is_not_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    code = tmp_path / "tracking.py"
    code.write_text("x = 1\n")
    monkeypatch.setattr("flow_grpo.runs.environment.__file__", str(code))
    git("init")
    assert _git_state() is None  # inside a checkout that does not track it, such as a virtual environment's
    git("add", ".")
    git("commit", "-m", "one")
    state = _git_state()
    assert state is not None
    assert len(state["revision"]) == 40
    assert state["dirty"] is False
    code.write_text("x = 2\n")
    assert (_git_state() or {})["dirty"] is True
