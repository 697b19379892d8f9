"""Runs that differ in their seed: grouped, averaged, compared."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flow_grpo.diversity.paired import change_of_means
from flow_grpo.page.contents import contents_of
from flow_grpo.page.data import PageRun, read_runs
from flow_grpo.page.seeds import (
    Difference,
    Group,
    curves,
    differences,
    differing_measures,
    groups_of,
    mean_of,
)
from flow_grpo.statistics import Interval
from tests.page.small_runs import SMALL
from tests.synthetic_records import write_records


def seeded(folder: Path, seeds: tuple[int, ...], name: str = "run", **changes: Any) -> list[PageRun]:
    folders = [write_records(folder / f"{name}-seed{seed}", **SMALL, seed=seed, **changes) for seed in seeds]
    return read_runs(folders)


def test_runs_of_the_same_settings_but_the_seed_are_one_group(tmp_path: Path) -> None:
    runs = seeded(tmp_path, (1, 2)) + seeded(tmp_path, (1,), "other", overrides={"train.learning_rate": 1.0})
    assert groups_of(runs) == [Group("run", (0, 1)), Group("other-seed1", (2,))]


def test_runs_without_settings_are_groups_of_their_own(tmp_path: Path) -> None:
    folders = [write_records(tmp_path / name, **SMALL) for name in "ab"]
    for folder in folders:
        (folder / "config.json").unlink()
        (folder / "environment.json").unlink()
    assert [group.runs for group in groups_of(read_runs(folders))] == [(0,), (1,)]


def test_the_same_seed_again_is_no_other_seed(tmp_path: Path) -> None:
    """As of a run that branched off: with it, the mean over seeds would have an interval without a width."""
    runs = seeded(tmp_path, (1, 2)) + seeded(tmp_path, (1,), "again")
    assert [group.runs for group in groups_of(runs)] == [(0, 1), (2,)]


def test_seeds_that_differ_by_the_same_number_show_nothing(tmp_path: Path) -> None:
    """Shares of few images often do; a t interval would have no width, and say better or worse."""
    runs = seeded(tmp_path, (1, 2)) + seeded(tmp_path, (1, 2), "slow")

    def with_judge(run: PageRun, judge: float) -> PageRun:
        last = replace(run.last, figures={**run.last.figures, "judge": judge})
        return replace(run, evaluations=(*run.evaluations[:-1], last))

    runs = [with_judge(run, judge) for run, judge in zip(runs, (0.9, 0.7, 0.8, 0.6), strict=True)]
    groups = Group("slow", (2, 3)), Group("run", (0, 1))
    assert differences(*groups, runs)["judge"] == Difference(Interval(pytest.approx(-0.1)), "none")
    runs[3] = with_judge(runs[3], 0.75)  # the broken twin has a spread
    assert differences(*groups, runs)["judge"].how == "seeds"
    other_seeds = [replace(run, config={**run.config, "seed": 5 + i}) for i, run in enumerate(runs)]
    exact = [with_judge(run, judge) for run, judge in zip(other_seeds, (1.0, 1.0, 0.875, 0.875), strict=True)]
    assert differences(*groups, exact)["judge"] == Difference(Interval(-0.125), "none")


def test_the_interval_of_seeds_is_students() -> None:
    values = [1.0, 2.0, 4.0]
    found = mean_of(values)
    half = stats.t.ppf(0.975, 2) * math.sqrt(np.var(values, ddof=1) / 3)
    assert (found.estimate, found.low, found.high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half), rel=1e-12)
    assert mean_of(values, 0.0, 5.0) == Interval(found.estimate, 0.0, 5.0)  # what it can be
    assert not mean_of([3.0]).known
    assert (mean_of([3.0, 3.0]).low, mean_of([3.0, 3.0]).high) == (3.0, 3.0)


def test_a_mean_curve_has_the_epochs_that_all_seeds_evaluated(tmp_path: Path) -> None:
    runs = seeded(tmp_path, (1, 2, 3))
    (runs[2].folder / "evaluations/eval_000010.json").unlink()
    (runs[2].folder / "metrics.jsonl").unlink()
    runs = read_runs([run.folder for run in runs])
    points = curves(Group("run", (0, 1, 2)), runs)["reward"]
    assert [point["epoch"] for point in points] == [0, 20]
    assert points[1]["value"] == pytest.approx(np.mean([run.last.figures["reward"] for run in runs]))
    assert points[1]["seconds"] == pytest.approx(np.mean([run.last.seconds for run in runs]))


def test_groups_of_the_same_seeds_are_compared_seed_by_seed(tmp_path: Path) -> None:
    runs = seeded(tmp_path, (1, 2, 3)) + seeded(tmp_path, (3, 1, 2), "slow", speed=0.2)
    found = differences(Group("slow", (3, 4, 5)), Group("run", (0, 1, 2)), runs)["reward"]
    new, old = ([runs[i].last.figures["reward"] for i in order] for order in ((4, 5, 3), (0, 1, 2)))
    paired = stats.ttest_rel(new, old).confidence_interval()
    assert found.how == "seeds"
    assert (found.estimate.low, found.estimate.high) == pytest.approx((paired.low, paired.high))
    unequal = stats.ttest_rel([runs[i].last.figures["reward"] for i in (3, 4, 5)], old).confidence_interval()
    assert found.estimate.low != pytest.approx(unequal.low)  # in the order of the folders it would be another interval


def test_groups_of_other_seeds_are_compared_by_welch(tmp_path: Path) -> None:
    runs = seeded(tmp_path, (1, 2, 3)) + seeded(tmp_path, (4, 5), "slow", speed=0.2)
    found = differences(Group("slow", (3, 4)), Group("run", (0, 1, 2)), runs)["reward"]
    new, old = ([runs[i].last.figures["reward"] for i in members] for members in ((3, 4), (0, 1, 2)))
    welch = stats.ttest_ind(new, old, equal_var=False).confidence_interval()
    assert found.how == "runs"
    assert (found.estimate.low, found.estimate.high) == pytest.approx((welch.low, welch.high))


def test_two_single_runs_are_compared_image_by_image(tmp_path: Path) -> None:
    runs = seeded(tmp_path, (1,)) + seeded(tmp_path, (2,), "slow", speed=0.2)
    found = differences(Group("slow", (1,)), Group("run", (0,)), runs)
    new, old = runs[1].last.record, runs[0].last.record
    assert new is not None
    assert old is not None
    expected = change_of_means(
        np.array(old.rewards["total"], float), np.array(new.rewards["total"], float), np.array(new.prompt)
    )
    assert expected is not None
    assert {figure: one.how for figure, one in found.items()} == {
        "reward": "images", "vendi": "images", "judge": "images", "reached": "none",
    }  # fmt: skip
    assert (found["reward"].estimate.low, found["reward"].estimate.high) == pytest.approx((expected.low, expected.high))


def test_runs_that_measure_something_else_are_not_compared(tmp_path: Path) -> None:
    runs = seeded(tmp_path, (1,)) + seeded(tmp_path, (1,), "other", overrides={"eval.num_steps": 20})
    assert differing_measures(runs) == ["eval.num_steps"]
    found = contents_of(runs, live=False, label="eval")
    assert all(figure["difference"] is None for row in found.comparison for figure in row["figures"].values())
    assert differing_measures(runs[:1]) == []
