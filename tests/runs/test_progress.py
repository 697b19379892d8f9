"""Counters and bars."""

from __future__ import annotations

import json

from flow_grpo.runs.progress import Counters
from tests.runs.new_runs import NewRun


def test_counters_survive_a_checkpoint_in_place() -> None:
    counters = Counters(epoch=3, seconds=1.5, network_evaluations=10, images=20, updates=6, nonfinite_updates=1)
    restored = Counters()
    restored.load_state_dict(json.loads(json.dumps(counters.state_dict())))
    assert restored == counters


def test_progress_iterates_over_a_total_or_an_iterable(new_run: NewRun) -> None:
    run = new_run()
    assert list(run.progress(3, "total")) == [0, 1, 2]
    assert list(run.progress("ab", "iterable")) == ["a", "b"]
