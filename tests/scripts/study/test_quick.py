"""Quick runs are held against the whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from flow_grpo.errors import ConfigError
from scripts.study.quick import compare_quick
from scripts.study.records import REWARD, VENDI
from scripts.study.study_records import Study
from tests.scripts.study.builders import record, study_of


def quick_and_whole(shift: float) -> tuple[Study, Study]:
    """Four committed seeds of 20 s, and a quick one of 10 s, with DRTune's reward off by `shift`."""
    numbers = {"vendi": (4, 3, 2), "rke": (4, 3, 2), "accuracy": (0.8, 0.8, 0.8), "nats": (1, 2, 3)}
    flat = {"spread": (1, 1, 1)}
    whole = []
    for seed in range(4):
        wobble = 0.01 * seed
        columns = {name: [v + wobble for v in values] for name, values in (numbers | flat).items()}
        whole.append(record("DRTune", seed, (0.5, 0.7 + wobble, 0.9), **columns))
        whole.append(record("GRPO", seed, (0.5, 0.55 + wobble, 0.6), **columns))
    halves = {name: values[:2] for name, values in (numbers | flat).items()}
    quick = [
        record("DRTune", 0, (0.5, 0.71 + shift), (0, 5), "quick", forwards=200, **halves),  # a machine twice as fast
        record("GRPO", 0, (0.5, 0.56), (0, 5), "quick", forwards=200, **halves),
    ]
    for one in (*whole, *quick):
        one.evaluations["modes/entropy"] = one.evaluations[VENDI]
    return study_of(quick), study_of(whole)


def test_quick_runs_are_held_against_the_whole_at_equal_network_evaluations() -> None:
    comparisons = compare_quick(*quick_and_whole(0.0))
    assert all(item.within for item in comparisons)
    rewards = [item for item in comparisons if item.quantity == f"DRTune seed 0: {REWARD}"]
    seeds = [0.7, 0.71, 0.72, 0.73]  # the committed ones at 1,000 network evaluations, 10 s of theirs
    level = 1 - 0.05 / len(comparisons)
    half = stats.t.ppf((1 + level) / 2, 3) * np.std(seeds, ddof=1) * math.sqrt(1.25)
    assert rewards[0].expected.estimate == pytest.approx(0.715)
    assert rewards[0].expected.high == pytest.approx(0.715 + half)
    speed = next(item for item in comparisons if "until GRPO" in item.quantity)
    assert speed.value == pytest.approx(1000 * 0.06 / 0.21 / 1000)


def test_a_quick_run_that_is_off_is_noticed() -> None:
    outside = [item.quantity for item in compare_quick(*quick_and_whole(0.2)) if not item.within]
    assert f"DRTune seed 0: {REWARD}" in outside
    quick, whole = quick_and_whole(0.0)
    with pytest.raises(ConfigError, match="1 seeds of quick runs and 1 committed"):
        compare_quick(quick, study_of(whole.records[:2]))
