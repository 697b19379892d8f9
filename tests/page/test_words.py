"""Words and numbers of the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from flow_grpo.page.build import number
from flow_grpo.page.data import read_run
from flow_grpo.page.words import FIGURES, load, model_name
from flow_grpo.runs.evaluations import write_record
from tests.page.small_runs import SMALL
from tests.synthetic_records import write_records


def test_there_are_words_for_everything_that_can_be_said() -> None:
    words = load()
    assert words["diversity"].keys() >= {"less", "more", "not_shown", "not_measured"}
    assert words["exploitation"].keys() >= {"exploited", "not_shown", "no_judge", "no_reward"}
    assert words["direction"].keys() >= {"better", "worse", "not_shown", "not_measured"}
    assert tuple(words["figures"]) == FIGURES
    assert "not exploited" not in json.dumps(words)
    assert (model_name(0), model_name(10), model_name(10, "mine")) == ("base model", "epoch 10", "mine")


@pytest.mark.parametrize(
    ("value", "unit", "sign", "expected"),
    [
        (0.51234, "number", False, "0.512"),
        (0.53, "number", False, "0.530"),
        (123.4, "number", False, "123"),
        (-0.0227, "number", False, "\N{MINUS SIGN}0.0227"),
        (0.0227, "number", True, "+0.0227"),
        (0.0, "number", True, "0"),
        (-0.001, "share", True, "\N{MINUS SIGN}0.1"),  # an end of an interval: on which side of 0, is the verdict
        (-0.001, "share", False, "0"),
        (0.876, "share", False, "88"),
        (-0.2, "share", True, "\N{MINUS SIGN}20"),
    ],
)
def test_numbers_as_people_read_them(value: float, unit: str, sign: bool, expected: str) -> None:
    assert number(value, unit, sign) == expected


def test_changes_that_are_not_finite_are_not_shown(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "run", **SMALL)
    record = read_run(folder, "run").last_record()
    assert record is not None
    unknown = replace(record.changes["vendi"], low=math.nan)
    write_record(folder, replace(record, changes={**record.changes, "vendi": unknown}), None)
    last = read_run(folder, "run").last
    assert last.changes.keys() == {"reward", "judge", "reached"}
    assert last.picture_path is None
