"""A fall after the peak is found where there is one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from scripts.study.claims.judge import hacking
from scripts.study.records import REWARD
from tests.scripts.study.builders import record


def test_a_fall_after_the_peak_is_not_an_effect_of_choosing_the_peak() -> None:
    """Accuracies of pure noise: a seed's own maximum is followed by a fall, the one chosen by the others is not."""
    falls, biased = [], []
    for repetition in range(200):
        generator = np.random.default_rng(repetition)
        noise = generator.standard_normal((5, 12))
        records = [
            record(seed=seed, reward=list(np.linspace(0, 1, 12)), seconds=list(range(12)), accuracy=list(row))
            for seed, row in enumerate(noise)
        ]
        falls.append(hacking(records).accuracy_after.estimate)
        biased.append(float(np.mean([row[-1] - row.max() for row in noise])))
    assert abs(np.mean(falls)) < 4 * np.std(falls) / math.sqrt(len(falls))
    assert np.mean(biased) < -1


def test_a_real_fall_is_found_where_it_begins() -> None:
    records = [
        record(
            seed=seed,
            reward=(0.5, 0.6, 0.7, 0.8),
            seconds=(0, 10, 20, 30),
            accuracy=(0.8, 0.9 + 0.01 * seed, 0.8, 0.6),
        )
        for seed in range(4)
    ]
    found = hacking(records)
    assert found.seconds.estimate == 10
    assert found.accuracy_after.estimate == pytest.approx(0.6 - 0.915)
    assert found.reward_after.estimate == pytest.approx(0.2)
    assert found.shown
    falling = [replace(one, evaluations={**one.evaluations, REWARD: (0.5, 0.8, 0.7, 0.6)}) for one in records]
    assert not hacking(falling).shown  # both fall: nothing is exploited
