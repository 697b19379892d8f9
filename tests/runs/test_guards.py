"""When a guard ends a run: a function of its history, its base's record and its settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from config.base import get_config
from flow_grpo.files import strict_json
from flow_grpo.runs.evaluations import write_record
from flow_grpo.runs.folder import flatten
from flow_grpo.runs.guards import Stop, early_stop
from flow_grpo.runs.record import Record

JUDGE, VENDI = "eval_ema/judge/accuracy", "eval_ema/diversity/vendi"


def ended(folder: Path, values: Sequence[float], metric: str = JUDGE, **guards: Any) -> Stop | None:
    """By values of an evaluation every 10 epochs, the base model's first, of a run with these guards."""
    lines = [{"step": 10 * i, metric: value} for i, value in enumerate(values)]
    lines.insert(1, {"step": 5, "train/reward": 9.0})
    (folder / "metrics.jsonl").write_text("".join(strict_json(line) + "\n" for line in lines))
    write_record(folder, Record("eval", 0, ["a"], [0], [0], extra={"diversity/vendi": 4.0, "diversity/rke": 2.0}), None)
    return early_stop(folder, settings(**guards), 10 * (len(values) - 1))


def settings(**guards: Any) -> Mapping[str, Any]:
    config = get_config()
    config.guard.update(guards)
    return flatten(config.to_dict())


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        ([0.8], False),
        ([0.8, 0.9, 0.85], False),
        ([0.8, 0.9, 0.85, 0.9], True),  # as good is no better
        ([0.8, 0.9, 0.85, 0.91], False),
        ([0.8, 0.7, 0.7], True),  # the base counts
        ([0.8, 0.9, math.nan, math.nan], True),
        ([math.nan, math.nan, math.nan], False),  # nothing is known
    ],
)
def test_patience_is_so_many_evaluations_without_a_rise(tmp_path: Path, values: list[float], stops: bool) -> None:
    assert (ended(tmp_path, values, patience=2) is not None) is stops


@pytest.mark.parametrize(
    ("values", "stops"),
    [([0.8, 0.9, 0.86], False), ([0.8, 0.9, 0.84], True), ([0.8, 0.9, 0.7, 0.89], False), ([0.8, math.nan], False)],
)
def test_a_drop_is_measured_from_the_highest_value(tmp_path: Path, values: list[float], stops: bool) -> None:
    assert (ended(tmp_path, values, max_drop=0.05) is not None) is stops


@pytest.mark.parametrize(
    ("which", "value", "stops"),
    [
        ("vendi", 3.01, False),
        ("vendi", 2.99, True),
        ("vendi", math.nan, False),
        ("rke", 1.6, False),
        ("rke", 1.4, True),
    ],
)
def test_a_floor_is_a_share_of_the_base_models_diversity(tmp_path: Path, which: str, value: float, stops: bool) -> None:
    metric = f"eval_ema/diversity/{which}"
    found = ended(tmp_path, [4.0, value], metric, diversity_floor=0.75, diversity=which)
    assert (found is not None) is stops


def test_no_guard_ends_nothing(tmp_path: Path) -> None:
    assert ended(tmp_path, [0.9, 0.1, 0.1, 0.1]) is None
    assert early_stop(tmp_path, {}, 30) is None  # settings of before there were guards


def test_a_floor_without_a_base_watches_nothing(tmp_path: Path) -> None:
    assert ended(tmp_path, [4.0, 1.0], VENDI, diversity_floor=0.5) is not None
    (tmp_path / "evaluations/eval_000000.json").unlink()
    assert early_stop(tmp_path, settings(diversity_floor=0.5), 10) is None


def test_later_evaluations_than_the_checkpoints_do_not_count(tmp_path: Path) -> None:
    ended(tmp_path, [0.8, 0.9, 0.2], max_drop=0.1)
    assert early_stop(tmp_path, settings(max_drop=0.1), 10) is None


def test_the_sentence_names_metric_value_limit_and_key(tmp_path: Path) -> None:
    found = [
        ended(tmp_path, [0.8, 0.9, 0.7], max_drop=0.1),
        ended(tmp_path, [0.8, 0.9, 0.7], patience=1),
        ended(tmp_path, [4.0, 2.5], VENDI, diversity_floor=0.75),
    ]
    assert found == [
        Stop(
            "guard.max_drop",
            "eval_ema/judge/accuracy 0.7000 is below 0.8000, its best, 0.9000 of epoch 10, less guard.max_drop = 0.1",
        ),
        Stop(
            "guard.patience",
            "eval_ema/judge/accuracy 0.7000 is no better than 0.9000 of epoch 10 (evaluations since "
            "then: 1; guard.patience = 1)",
        ),
        Stop(
            "guard.diversity_floor",
            "eval_ema/diversity/vendi 2.5000 is below 3.0000, the base's 4.0000 times guard.diversity_floor = 0.75",
        ),
    ]
