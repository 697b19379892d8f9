"""scripts/bench/speed.py: what it counts, and the table that it writes."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from flow_grpo.recipes.registry import get_config
from flow_grpo.settings import resolve
from scripts.bench.speed import CASES, GRPO, SCALES, Case, Timed, measure, table

SMALL = {
    "sample.num_steps": 2, "sample.groups_per_epoch": 2, "sample.num_image_per_prompt": 2, "sample.batch_size": 4,
    "train.batch_size": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", [*CASES, *SCALES])
def test_every_case_is_a_configuration_that_resolves(name, tmp_path):
    case = {**CASES, **SCALES}[name]
    config = get_config(case.recipe)
    config.update_from_flattened_dict(dict(case.changes))
    config.logdir = str(tmp_path)
    resolve(config, 1, cuda=False)


def test_an_epoch_is_timed_with_the_calls_that_it_was_counted_to_make():
    timed = measure(Case(GRPO, SMALL), rounds=1)
    assert (timed.images, timed.evaluations, timed.trained) == (4, 16, 8)
    assert timed.ratio == timed.seconds / timed.bare > 0


@pytest.mark.parametrize("against", ["", "abc123"])
def test_the_table_has_a_row_of_every_case(against):
    here = Timed(2.0, 1.6, 1.25, 0.5, 80, 1600, 800)
    row = {"here": asdict(here) | {"images_per_second": here.images_per_second}}
    rows = [{"case": "GRPO", **row, "other": row["here"] if against else None}, {"case": "new", **row, "other": None}]
    results = {"command": "x", "machine": "y", "rounds": 3, "load": 1.0, "against": against, "rows": rows}
    lines = [line for line in table(results).splitlines() if line.startswith("|")]
    assert lines[2].startswith("| GRPO | 80 | 1600 | 800 | 2.00 | 40.0 | 1.25 | 0.5 |")
    assert lines[2].endswith("| 2.00 | 1.00 |") == bool(against)
    assert len({line.count("|") for line in lines}) == 1
