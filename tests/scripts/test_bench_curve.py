"""scripts/bench/curve.py: the truths that estimates are held against."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scripts.bench import curve
from scripts.bench.curve import base_images, features_of, rows_of, table, truth
from scripts.bench.tilt_problem import PROBLEMS


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(curve, "SETS", 400)


@pytest.mark.parametrize("name", PROBLEMS)
def test_kl_of_a_linear_reward_is_that_of_the_densities(name):
    problem, strength = PROBLEMS[name], 0.8
    x = problem.law(strength).sample(200_000, curve.keyed_generator(0, "kl"))
    sampled = (problem.law(strength).log_density(x) - problem.flow.log_density(x)).mean().item()
    assert truth(problem, strength, False, 0.5)["kl"] == pytest.approx(sampled, abs=0.01)


def test_a_reward_of_0_or_1_at_its_end_is_right_everywhere():
    found = truth(PROBLEMS["mixture"], math.inf, True, 0.5)
    assert found["reward"] == 1
    assert found["kl"] == pytest.approx(math.log(1 / 0.3))
    assert base_images(PROBLEMS["mixture"], 0, True).reward.mean() == pytest.approx(0.3, abs=0.05)


def test_features_have_unit_length():
    x = np.random.default_rng(0).normal(size=(50, 2))
    assert np.linalg.norm(features_of(x), axis=1) == pytest.approx(np.ones(50))


def test_rows_hold_estimates_near_the_truth(monkeypatch):
    monkeypatch.setattr(curve, "REPEATS_OF_SETS", 10)
    monkeypatch.setattr(curve.exact_law, "HALVES", 8)
    rows = rows_of(PROBLEMS["gaussian"], False, (0.5,), 3)
    assert [row.figure for row in rows] == list(curve.FIGURES)
    reward = rows[0]
    assert reward.truth == pytest.approx(PROBLEMS["gaussian"].reward_of(0.5))
    assert reward.mean == pytest.approx(reward.truth, abs=0.15)
    assert "| gaussian | 0.5 | reward |" in table(rows, 3)
