"""scripts/bench/methods.py: which runs there are, and what is made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flow_grpo.methods.registry import METHODS
from flow_grpo.recipes.registry import get_config
from flow_grpo.settings import resolve
from scripts.bench.methods import ENTRIES, SEEDS, plan
from scripts.bench.methods_results import exact_share, outcome, summarise, table, title_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "assets/figures/methods"
LAW = [
    {"strength": 0, "reward": 0.50, "judge": 0.8, "vendi": 3.2, "rke": 4.0, "kl": 0.0, "effective": 1000.0},
    {"strength": 60, "reward": 0.52, "judge": 0.9, "vendi": 2.8, "rke": 3.0, "kl": 0.3, "effective": 300.0},
]
COST = {"seconds": dict.fromkeys(ENTRIES, 2.0), "peak_mib": dict.fromkeys(ENTRIES, 800.0)}


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "cost.json").write_text(json.dumps(COST))
    return plan(tmp_path)


def record(rewards, vendi):
    """A run evaluated every 10 epochs."""
    evaluations = [
        SimpleNamespace(
            step=10 * i, reward=reward,
            metrics={"reward/total": reward, "judge/accuracy": 0.9, "modes/entropy": math.log(4)},
            occasional={"diversity/vendi": v, "diversity/rke": 2.0, "entropy/nats": -50.0},
        )
        for i, (reward, v) in enumerate(zip(rewards, vendi, strict=True))
    ]  # fmt: skip
    found = SimpleNamespace(evaluations=evaluations, final=evaluations[-1])
    found.curve = lambda name: np.array([e.metrics[name] for e in evaluations])
    return found


def test_every_method_is_trained_with_three_seeds_for_as_many_epochs_as_its_cost_allows(runs):
    assert {run.label for run in runs} == set(ENTRIES) >= set(METHODS)
    for name in ENTRIES:
        assert sorted(run.seed for run in runs if run.label == name) == list(SEEDS)
    assert {run.settings["num_epochs"] for run in runs} == {75}  # 150 s of 2 s each


def test_every_run_of_the_plan_is_a_configuration_that_can_be_trained(runs):
    for run in runs[: len(ENTRIES)]:
        config = get_config(run.recipe)
        config.update_from_flattened_dict(run.settings)
        assert resolve(config, 1, cuda=False).config.train.method in ("", ENTRIES[run.label][0])


@pytest.mark.parametrize(("gain", "expected"), [(-0.01, 1.0), (0.01, 3.0 / 3.2), (0.02, 2.8 / 3.2)])
def test_the_share_that_the_exact_law_keeps_is_read_off_its_curve(gain, expected):
    assert exact_share(gain, LAW) == pytest.approx(expected)


def test_beyond_the_curve_there_is_no_exact_law():
    assert math.isnan(exact_share(0.03, LAW))


def test_the_seconds_to_a_gain_are_epochs_times_the_methods_cost_and_diversity_is_compared_there(runs):
    found = outcome(record([0.50, 0.51, 0.52], [3.2, 2.9, 2.5]), runs[0], 2.0, LAW)
    assert found.seconds_to["0.005"] == pytest.approx(5 * 2.0)
    assert found.seconds_to["0.01"] == pytest.approx(10 * 2.0)
    assert found.excess_at["0.01"] == pytest.approx(2.9 - 3.0)
    higher = outcome(record([0.53, 0.54, 0.55], [1.6, 1.4, 1.2]), runs[0], 2.0, LAW)  # another base: half as diverse
    assert higher.excess_at["0.01"] == pytest.approx(1.4 - 1.5)
    assert found.final["colours"] == pytest.approx(4)
    never = outcome(record([0.50, 0.501, 0.502], [3.2, 3.1, 3.1]), runs[0], 2.0, LAW)
    assert math.isnan(never.seconds_to["0.01"])
    assert math.isnan(never.excess_at["0.01"])


def test_the_table_has_a_row_for_each_method_by_falling_reward(runs):
    ends = {"drtune": 0.53, "grpo": 0.51}
    outcomes = [
        outcome(record([0.50, end + seed / 1e4], [3.2, 2.5]), SimpleNamespace(label=name, seed=seed), 2.0, LAW)
        for name, end in ends.items()
        for seed in SEEDS
    ]
    text = table(summarise(outcomes, COST), {"images": 1000, "rows": LAW})
    assert text.index("| DRTune | 0.5301 ± 0.0002") < text.index("| GRPO | 0.5101")
    assert "| DRTune | 10 | 2.00 | 800 |" in text
    assert "\n\n|---" not in text


def test_every_entry_has_a_title():
    assert all(title_of(name) for name in ENTRIES)
    assert len({title_of(name) for name in ENTRIES}) == len(ENTRIES)


# --- the committed results ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed():
    text = (RESULTS / "results.json").read_text(encoding="utf-8").replace("null", "NaN")
    return {row["method"]: row for row in json.loads(text)["summary"]}


def test_every_method_there_is_has_been_measured_with_three_seeds(committed):
    assert set(METHODS) <= set(committed)
    assert {row["seeds"] for row in committed.values()} == {3}


def test_the_committed_table_is_what_the_results_say(committed):
    law = json.loads((RESULTS / "curve.json").read_text(encoding="utf-8"))
    assert table(list(committed.values()), law) == (RESULTS / "table.md").read_text(encoding="utf-8")


def test_what_the_docs_say_of_the_methods_is_what_was_measured(committed):
    """docs/methods.md, "How they compare"."""
    text = " ".join((ROOT / "docs/methods.md").read_text(encoding="utf-8").split())
    anchored, drtune, nft = committed["anchored"], committed["drtune"], committed["nft"]
    for words in (
        f"gains {anchored['gain']['mean']:.4f} and keeps {anchored['kept']['mean']:.0%}".replace("%", " %"),
        f"+0.01 in {anchored['seconds_to']['0.01']['mean']:.0f} s, where DRTune needs "
        f"{drtune['seconds_to']['0.01']['mean']:.0f} s",
        f"it keeps {100 * committed['anchored_kl']['kept']['mean']:.0f} % of what its gain allows",
        f"keeps {100 * committed['adjoint_matching']['kept']['mean']:.0f} % here",
        f"+0.01 in {nft['seconds_to']['0.01']['mean']:.0f} s, with {100 * nft['kept']['mean']:.0f} % kept at the end",
        f"GRPO gains {committed['grpo']['gain']['mean']:+.3f} in the time",
    ):
        assert words in text, words


def test_without_an_anchor_every_gradient_method_collapses_and_the_anchored_one_does_not(committed):
    free = [name for name, method in METHODS.items() if method.reward_gradient and not method.needs_base]
    assert all(1.05 < committed[name]["vendi"]["mean"] < 1.55 for name in free)
    assert committed["anchored"]["kept"]["mean"] > 0.95
