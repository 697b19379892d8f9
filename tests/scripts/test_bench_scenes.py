"""scripts/bench/scenes.py: which runs there are, and what is made of their records."""

from __future__ import annotations

import json
import math

import pytest

from flow_grpo.curve import Curve
from flow_grpo.recipes.registry import get_config
from flow_grpo.runs.record import NONE_OF_THEM, Distances, Judged, Record
from flow_grpo.settings import resolve
from scripts.bench import scenes_results
from scripts.bench.scenes import BUDGETS, SEEDS, plan
from scripts.bench.scenes_results import outcome, summarise, table

COST = {"machine": "a machine", "seconds": dict.fromkeys(BUDGETS, 9.0)}
PROMPTS = ["a dress and a boot", "three dresses", "a red dress"]
CURVE = Curve(
    tuple(PROMPTS[:2]), 2, {"scenes": 1.0}, "scenes:x", 0.5,
    {"reward": [0.2, 1.0], "vendi": [2.0, 1.0], "rke": [2.0, 1.0], "modes": [3.0, 2.0]},
    {"reward": 0.25, "vendi": 2.0, "rke": 2.0, "modes": 3.0},
)  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "cost.json").write_text(json.dumps(COST))
    return plan(tmp_path)


def record(epoch: int, right: str, vendi: float) -> Record:
    """Two images of each prompt, right (1) or wrong (0) to reward and judge."""
    prompt = [0, 0, 1, 1, 2, 2]
    guess = [p if mark == "1" else NONE_OF_THEM for p, mark in zip(prompt, right, strict=True)]
    nothing = [[] for _ in PROMPTS]
    return Record(
        "eval", epoch, PROMPTS, prompt, [0, 1] * 3,
        rewards={"scenes": [float(mark) for mark in right]},
        judge=Judged("judge", True, guess, [0.5] * 6),
        diversity=Distances("x", 1.0, [0, 1, 2], [2] * 3, [[0, 1]] * 3, nothing, None, [vendi, vendi, 1.0], None),
        extra={"modes/entropy": 2.5},
    )  # fmt: skip


def test_epochs_are_the_budget_over_the_cost(runs):
    assert {run.label for run in runs} == set(BUDGETS)
    assert sorted(run.seed for run in runs if run.label == "nft") == list(SEEDS)
    for run in runs:
        assert run.settings["num_epochs"] == round(BUDGETS[run.label] / 9)
        config = get_config(run.recipe)
        config.update_from_flattened_dict(run.settings)
        resolve(config, 1, cuda=False)


def test_a_run_is_told_by_kind_and_on_the_curves_prompts(runs):
    found = outcome([record(0, "100000", 2.0), record(20, "111100", 1.5)], runs[0], 9.0, CURVE)
    base, last = found["evaluations"]
    assert base["judge"]["two"] == 0.5
    assert base["judge"]["trained"] == 0.25
    assert last["judge"] == {
        "single": pytest.approx(math.nan, nan_ok=True), "two": 1.0, "count": 1.0, "colour": 0.0,
        "position": pytest.approx(math.nan, nan_ok=True), "binding": pytest.approx(math.nan, nan_ok=True),
        "all": pytest.approx(2 / 3), "trained": 1.0,
    }  # fmt: skip
    assert (last["epoch"], last["seconds"]) == (20, 180.0)
    assert last["exact"]["reward"] == 1.0
    gain = 0.75  # of .8 to the curve's end, where the law has half of the base's Vendi score
    assert last["exact"]["kept"] == pytest.approx(0.75 / (1 - 0.5 * gain / 0.8))
    assert base["exact"]["kept"] == 1


def test_the_table_has_a_row_for_each_method_and_no_long_cells(runs, tmp_path):
    outcomes = [
        outcome([record(0, "100000", 2.0), record(20, "111100", 1.5)], run, 9.0, CURVE) for run in runs if run.seed < 2
    ]
    rows = summarise(outcomes)
    assert [row["method"] for row in rows] == list(BUDGETS)
    assert rows[0]["ratio"]["mean"] == 4.0
    assert rows[0]["seeds"] == 2
    law = {"prompts": 2, "points": [{"reward": 0.2, "vendi": 2.0, "rke": 2.0, "modes": 3.0}], "first": {}}
    text = table({"summary": rows, "law": law}, COST)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len([line for line in lines if "DiffusionNFT" in line]) == 2
    assert max(len(cell.strip()) for line in lines for cell in line.split("|")) <= 40
    scenes_results.draw(outcomes, CURVE, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
