"""A run of its own for each test."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator

from flow_grpo.runs.run import Run
from tests.runs.new_runs import NewRun, make_settings


@pytest.fixture
def new_run(tmp_path: Path) -> NewRun:
    """Make a run in tmp_path, as a process that has just started would."""
    return lambda **overrides: Run(make_settings(tmp_path, **overrides), Accelerator(cpu=True))
