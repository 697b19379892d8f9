"""scripts/bench/scenes.py: which runs there are, and what is made of their records."""

from __future__ import annotations

import dataclasses
import functools
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
    {"reward": [0.25, 0.25], "vendi": [2.0, 2.0], "rke": [2.0, 2.0], "modes": [3.0, 3.0]}, 1.0,
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
        extra={"modes/entropy": 2.5, "diversity/kept_of_exact": vendi / 2, "diversity/kept_of_exact_modes": 0.9},
    )  # fmt: skip


def test_epochs_are_the_budget_over_the_cost(runs):
    assert {run.label for run in runs} == set(BUDGETS)
    assert sorted(run.seed for run in runs if run.label == "nft") == list(SEEDS)
    for run in runs:
        assert run.settings["num_epochs"] == round(BUDGETS[run.label] / 9)
        config = get_config(run.recipe)
        config.update_from_flattened_dict(run.settings | {"eval.curve": ""})  # made by a command
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
    assert (last["exact"]["vendi"], last["exact"]["kept"], last["exact"]["kept_modes"]) == (1.5, 0.75, 0.9)


def test_outcomes_of_runs_that_are_gone_are_kept_while_the_law_is_the_same(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes_results, "draw", lambda *_: None)
    monkeypatch.setattr(scenes_results, "records_of", lambda _: [record(0, "100000", 2.0), record(20, "111100", 1.5)])
    monkeypatch.setattr(scenes_results.Curve, "read", lambda _: CURVE)
    write_results = functools.partial(scenes_results.write, logs=tmp_path, out=tmp_path)
    write_results(runs[:2])
    write_results(runs[1:3])

    def kept() -> list[tuple[str, int]]:
        found = json.loads((tmp_path / "results.json").read_text())
        return sorted((o["method"], o["seed"]) for o in found["outcomes"])

    assert kept() == sorted((run.label, run.seed) for run in runs[:3])
    monkeypatch.setattr(scenes_results.Curve, "read", lambda _: dataclasses.replace(CURVE, prompts=CURVE.prompts[:1]))
    write_results(runs[3:4])
    assert kept() == [(runs[3].label, runs[3].seed)]


def test_the_table_has_a_row_for_each_method_and_no_long_cells(runs, tmp_path):
    outcomes = [
        outcome([record(0, "100000", 2.0), record(20, "111100", 1.5)], run, 9.0, CURVE) for run in runs if run.seed < 2
    ]
    rows = summarise(outcomes)
    assert [row["method"] for row in rows] == list(BUDGETS)
    assert rows[0]["ratio"]["mean"] == 4.0
    assert rows[0]["seeds"] == 2
    law = {"prompts": 2, "points": [{"reward": 0.2, "vendi": 2.0, "rke": 2.0, "modes": 3.0}]}
    text = table({"summary": rows, "law": law}, COST)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len([line for line in lines if "DiffusionNFT" in line]) == 2
    assert max(len(cell.strip()) for line in lines for cell in line.split("|")) <= 40
    scenes_results.draw(outcomes, CURVE, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
