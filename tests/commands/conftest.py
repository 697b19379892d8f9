"""A folder to be in, an earlier run, trainings that do not begin."""

from __future__ import annotations

import hashlib
import json

import pytest

from flow_grpo.commands import cli, train
from flow_grpo.recipes.registry import get_config
from tests.synthetic_runs import ENVIRONMENT


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def started(monkeypatch):
    """Trainings that would begin, instead of beginning."""
    found = []
    monkeypatch.setattr(train, "train", found.append)
    monkeypatch.setattr(cli, "resolve", lambda *_, **__: None)  # that their values fit is another matter
    return found


@pytest.fixture
def earlier(tmp_path):
    """A run of tiny_drtune with other settings than its recipe's."""
    config = get_config("tiny_drtune")
    config.update({"num_epochs": 7, "seed": 5, "logdir": str(tmp_path), "run_name": "run"})
    folder = tmp_path / "run"
    folder.mkdir()
    text = json.dumps(config.to_dict())
    (folder / "config.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT | {"config_sha256": digest}))
    return folder
