"""What is committed of the study's runs, and the tables that are made of it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flow_grpo.curve import Curve
from flow_grpo.files import read_object
from flow_grpo.methods.registry import METHODS
from scripts.study import outcomes as outcomes_module
from scripts.study import tables
from scripts.study.outcomes import column, commit, epochs_to, kept, kept_at, merged, outcome, right
from scripts.study.paths import ROOT
from scripts.study.tables import summarise, table
from scripts.study.testbeds import CLAIMED, COST, CURVE, SCENES, SEARCH_SEED, SEEDS, TESTBEDS, TINY, Entry

LAW = [{"reward": 0.50, "vendi": 3.2, "rke": 4.0}, {"reward": 0.54, "vendi": 2.4, "rke": 3.0}]
FIGURE = {"estimate": 1.0, "images": [0.9, 1.1], "prompts": [0.8, 1.2]}
SEARCHED = dataclasses.replace(TINY, tried={"strong": Entry("anchored", {"anchored.strength": 3000.0}, "strong")})


@pytest.fixture
def out(tmp_path):
    """A folder with the cost, and with a curve from .50 to .54, of which the law keeps three quarters."""
    (tmp_path / COST).write_text(json.dumps({"machine": "a machine", "seconds": dict.fromkeys(METHODS, 2.0)}))
    points = [
        {"strength": str(i), "effective": 100.0, "figures": dict.fromkeys(("judge", "kl"), FIGURE)
         | {name: FIGURE | {"estimate": value} for name, value in figures.items()}}
        for i, figures in enumerate(LAW)
    ]  # fmt: skip
    content = {
        "images": 1000, "prompts": ["a bag"], "set_size": 16, "rewards": {"pickscore": 1.0}, "features": "x",
        "bandwidth": 0.5, "first": {"reward": [0.5], "vendi": [3.2], "rke": [4.0]}, "best": 0.6, "drawing": "x",
        "points": points,
    }  # fmt: skip
    (tmp_path / CURVE).write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def runs_with(monkeypatch):
    """Whatever run is read has these rewards and Vendi scores, every ten epochs."""

    def make(rewards, vendi, **more):
        names = {"reward/total": rewards, "judge/accuracy": [0.9] * len(rewards), "diversity/vendi": vendi}
        names |= {"exact_curve/reward": rewards, "exact_curve/vendi": vendi} | more
        evaluations = [
            SimpleNamespace(step=10 * i, metrics={k: v[i] for k, v in names.items()}, occasional={})
            for i in range(len(rewards))
        ]
        monkeypatch.setattr(outcomes_module, "load_runs", lambda _: [SimpleNamespace(evaluations=evaluations)])

    return make


def read(testbed, label="grpo", seed=0):
    return outcome(testbed, SimpleNamespace(label=label, seed=seed, name="x"), Path("logs"))


# --- outcomes ---------------------------------------------------------------------------------------------


def test_an_outcome_has_the_figures_that_were_measured_and_no_others(runs_with):
    runs_with([0.5, 0.51], [3.2, 2.9], **{"entropy/nats": [-20.0, math.nan]})
    found = read(TINY)
    assert found["epoch"] == [0, 10]
    assert found["nats"] == [-20.0, None]
    assert "rke" not in found
    assert np.isnan(column(found, "rke")).all()


def test_the_time_to_a_gain_and_what_is_kept_there_are_read_between_evaluations(runs_with, out):
    runs_with([0.50, 0.51, 0.52], [3.2, 3.0, 2.0])
    found, curve = read(TINY), Curve.read(out / CURVE)
    assert epochs_to(found, 0.015) == pytest.approx(15)
    assert kept_at(found, 0.015, "vendi", curve) == pytest.approx((2.5 / 3.2) / (1 - 0.25 * 0.015 / 0.04))
    assert math.isnan(epochs_to(found, 0.03))
    assert math.isnan(kept_at(found, 0.03, "vendi", curve))


def test_nothing_is_said_of_what_is_kept_beyond_the_curve(runs_with, out):
    runs_with([0.50, 0.56], [3.2, 2.0])
    assert epochs_to(read(TINY), 0.05) == pytest.approx(50 / 6)
    assert math.isnan(kept_at(read(TINY), 0.05, "vendi", Curve.read(out / CURVE)))


def test_what_is_kept_is_held_against_the_law_of_the_same_gain(runs_with, out):
    runs_with([0.51, 0.53, 0.56], [3.0, 2.4, 2.0])  # of other base images than the curve's
    found = kept(read(TINY), "vendi", Curve.read(out / CURVE))
    assert found == pytest.approx([1.0, 0.8 / (1 - 0.25 * 0.02 / 0.04), math.nan], nan_ok=True)
    assert np.isnan(kept(read(TINY), "modes", Curve.read(out / CURVE))).all()


def test_right_images_are_those_of_the_kinds_that_are_trained(runs_with):
    kinds = {f"judge/accuracy_{kind}": [0.0, 1.0] for kind in ("two", "position")}
    others = {f"judge/accuracy_{kind}": [0.5, 0.5] for kind in ("single", "count", "colour", "binding")}
    runs_with([0.5, 0.5], [3.2, 3.2], **kinds, **others)
    assert right(read(SCENES)) == pytest.approx([0.1, 0.9])  # 20 captions of two, 20 of position, 10 of counting


def test_an_outcome_of_an_entry_that_there_is_no_more_is_dropped(runs_with, out):
    runs_with([0.5, 0.51], [3.2, 2.9])
    gone = read(TINY) | {"label": "gone"}
    (out / "results.json").write_text(json.dumps({"prompts": ["a bag"], "outcomes": [gone]}))
    found = merged(TINY, [SimpleNamespace(label="nft", seed=0, name="x")], Path("logs"), out)
    assert [one["label"] for one in found] == ["nft"]


def test_a_figure_that_some_seeds_lack_is_a_dash(runs_with, out):
    ends = [0.53, 0.53, 0.56]  # one of them beyond the curve
    outcomes = []
    for seed, end in enumerate(ends):
        runs_with([0.50, end], [3.2, 2.5])
        outcomes.append(read(TINY, "grpo", seed))
    (row,) = summarise(TINY, outcomes, out)
    assert row["kept"].count == 0
    assert row["reward"].count == 3


def test_outcomes_of_runs_that_are_gone_are_kept_while_the_law_is_of_the_same_prompts(runs_with, out):
    runs_with([0.5, 0.51], [3.2, 2.9])

    def written(labels):
        commit(merged(TINY, [SimpleNamespace(label=n, seed=0, name="x") for n in labels], Path("logs"), out), out)
        return [found["label"] for found in read_object(out / "results.json")["outcomes"]]

    assert written(["grpo", "nft"]) == ["grpo", "nft"]
    assert written(["nft", "drtune"]) == ["grpo", "nft", "drtune"]
    (out / CURVE).write_text((out / CURVE).read_text().replace("a bag", "a boot"))
    assert written(["refl"]) == ["refl"]


# --- table and figure ---------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_method_by_falling_reward(runs_with, out):
    outcomes = []
    for label, end in {"drtune": 0.53, "grpo": 0.51}.items():
        for seed in SEEDS:
            runs_with([0.50, end + seed / 1e4], [3.2, 2.5])
            outcomes.append(read(TINY, label, seed))
    text = table(TINY, outcomes, out)
    assert text.index("| DRTune | 3 | 0.5301 ± 0.0002") < text.index("| GRPO | 3 | 0.5101")
    assert "| DRTune | 10 | 2.00 |" in text
    assert "\n\n|---" not in text


def test_what_was_tried_is_in_no_methods_row(runs_with, out):
    runs_with([0.5, 0.51], [3.2, 2.9])
    outcomes = [read(SEARCHED, "anchored"), read(SEARCHED, "strong", SEARCH_SEED)]
    text = table(SEARCHED, outcomes, out)
    assert text.count("\n| anchored gradient | 1 |") == 1
    assert text.count("\n| strong | 2.00 | 0.0100 | 0.97 |") == 1
    assert "Tried" not in table(SEARCHED, outcomes[:1], out)


def test_the_figure_is_drawn_for_both_families(runs_with, out):
    runs_with([0.5, 0.51], [3.2, 2.9])
    tables.draw(TINY, [read(TINY, "grpo"), read(TINY, "drtune")], out)
    assert (out / "frontier.png").stat().st_size > 10_000


# --- the committed results ----------------------------------------------------------------------------------


@pytest.mark.parametrize("testbed", TESTBEDS.values(), ids=str)
def test_the_committed_table_is_what_the_results_say(testbed):
    outcomes = read_object(testbed.results / "results.json")["outcomes"]
    assert table(testbed, outcomes, testbed.results) == (testbed.results / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("testbed", TESTBEDS.values(), ids=str)
def test_every_entry_has_been_measured_with_seeds_enough_for_an_interval(testbed):
    found = [o["label"] for o in read_object(testbed.results / "results.json")["outcomes"] if o["seed"] != SEARCH_SEED]
    assert min(found.count(name) for name in testbed.entries) >= 2
    assert min(found.count(name) for name in CLAIMED) >= 3


@pytest.mark.parametrize(("reward", "vendi"), [(0.5208, 2.93), (0.5257, 2.83)])
def test_the_tiny_curve_is_that_of_the_first_measurement(reward, vendi):
    """MATH 11: by other sets of 16 images, and another program."""
    figures = [point["figures"] for point in read_object(TINY.results / CURVE)["points"]]
    rewards = [f["reward"]["estimate"] for f in figures]
    low, high = (np.interp(reward, rewards, [f["vendi"]["images"][end] for f in figures]) for end in (0, 1))
    assert low <= vendi <= high


@pytest.fixture(scope="module")
def committed():
    """The row of each entry of each testbed."""

    def rows(testbed):
        outcomes = read_object(testbed.results / "results.json")["outcomes"]
        outcomes = [o for o in outcomes if o["seed"] != SEARCH_SEED]
        return {row["label"]: row for row in summarise(testbed, outcomes, testbed.results)}

    return {name: rows(testbed) for name, testbed in TESTBEDS.items()}


def percent(interval):
    return f"{100 * interval.estimate:.0f} %"


def test_what_the_docs_say_of_the_methods_is_what_was_measured(committed):
    """docs/methods.md, "How they compare"."""
    rows = committed["tiny"]
    anchored, drtune, nft, kl = (rows[name] for name in ("anchored", "drtune", "nft", "anchored_kl"))
    free = [rows[name] for name, method in METHODS.items() if method.reward_gradient and not method.needs_base]
    kept = {gain: [100 * row["kept_at"][gain].estimate for row in free] for gain in ("0.01", "0.02")}
    law = Curve.read(TINY.results / CURVE).law["reward"]
    costs = [p["figures"]["kl"]["estimate"] for p in read_object(TINY.results / CURVE)["points"]]
    words = [
        f"at a Vendi score of {min(row['vendi'].estimate for row in free):.1f} to "
        f"{max(row['vendi'].estimate for row in free):.1f}, where the base model has {drtune['base']['vendi']:.1f}",
        f"At a gain of 0.01 they keep {min(kept['0.01']):.0f} to {max(kept['0.01']):.0f} % of the exact law's score, "
        f"at 0.02 only {min(kept['0.02']):.0f} to {max(kept['0.02']):.0f} %",
        f"gains {anchored['gain'].estimate:.4f} and keeps {percent(anchored['kept'])}",
        f"+0.01 in {anchored['seconds_to']['0.01'].estimate:.0f} s, where DRTune needs "
        f"{drtune['seconds_to']['0.01'].estimate:.0f} s",
        f"it keeps {percent(kl['kept'])} of what its gain allows, but gains only {kl['gain'].estimate:.4f}: the law "
        f"that costs so much gains {np.interp(0.3, costs, law) - law[0]:.4f}",
        f"keeps {percent(rows['adjoint_matching']['kept'])} here",
        f"+0.01 in {nft['seconds_to']['0.01'].estimate:.0f} s, with {percent(nft['kept'])} kept at the end",
        f"GRPO gains {rows['grpo']['gain'].estimate:+.3f} in the time",
    ]
    text = " ".join((ROOT / "docs/methods.md").read_text(encoding="utf-8").split())
    for said in words:
        assert said in text, said


def test_what_the_docs_say_of_the_law_of_scenes_is_what_was_measured():
    found = read_object(SCENES.results / CURVE)
    first, last = (found["points"][place]["figures"] for place in (0, -1))
    words = [
        f"have {100 * last['vendi']['estimate'] / first['vendi']['estimate']:.0f} % of the Vendi score",
        f"The judge finds {100 * last['judge']['estimate']:.0f} % of them right",
        f"on {len(found['prompts'])} of the {len(found['prompts']) + len(found['left_out'])} captions of the trained "
        f"kinds, from {found['images']} images of each",
    ]
    text = " ".join((ROOT / "docs/scenes.md").read_text(encoding="utf-8").split())
    for said in words:
        assert said in text, said
    assert last["modes"]["estimate"] >= first["modes"]["estimate"]


def test_what_the_docs_say_of_the_methods_on_scenes_is_what_was_measured(committed):
    """docs/scenes.md, "How far they get"."""
    nft, grpo, drtune, anchored = (committed["scenes"][name] for name in ("nft", "grpo", "drtune", "anchored"))
    outcomes = [o for o in read_object(SCENES.results / "results.json")["outcomes"] if o["label"] == "nft"]
    first, second, third = sorted(right(o)[-1] / right(o)[0] for o in outcomes)
    low, high = (getattr(grpo["of_base"], end) for end in ("low", "high"))
    words = [
        f"DiffusionNFT makes {percent(nft['right'])} right where the base model has {100 * nft['base']['right']:.0f} %",
        f"{first:.1f}, {second:.1f} and {third:.1f} times as many with three seeds",
        f"keeps {percent(nft['kept'])} of the law's Vendi score, and {percent(nft['kept_modes'])} of its modes' "
        "entropy",
        f"in {drtune['seconds_to']['0.1'].estimate:.0f} s, where DiffusionNFT needs "
        f"{nft['seconds_to']['0.1'].estimate:.0f} s. There it keeps {percent(drtune['kept_at']['0.1'])} of the law's "
        f"Vendi score; at its end {percent(drtune['right'])} are right, and it keeps {percent(drtune['kept'])}",
        f"needs {anchored['seconds_to']['0.1'].estimate:.0f} s to the same ten, and keeps "
        f"{percent(anchored['kept_at']['0.1'])} of the law's score. It then comes to rest, at "
        f"{anchored['of_base'].estimate:.1f} times the base model's share, with {percent(anchored['kept'])}",
        f"GRPO is slower: {percent(grpo['right'])} in the same time, {low:.1f} to {high:.1f} times as many",
    ]
    text = " ".join((ROOT / "docs/scenes.md").read_text(encoding="utf-8").split())
    for said in words:
        assert said in text, said
    assert first >= 1.5


def test_without_an_anchor_every_gradient_method_collapses_and_the_anchored_one_does_not(committed):
    free = [name for name, method in METHODS.items() if method.reward_gradient and not method.needs_base]
    assert all(1.05 < committed["tiny"][name]["vendi"].estimate < 1.55 for name in free)
    assert committed["tiny"]["anchored"]["kept"].estimate > 0.95


@pytest.mark.parametrize("testbed", TESTBEDS.values(), ids=str)
def test_runs_have_the_noises_of_the_curves_first_images(testbed):
    first = Curve.read(testbed.results / CURVE).first
    for found in read_object(testbed.results / "results.json")["outcomes"]:
        assert column(found, "exact_reward")[0] == pytest.approx(np.mean(first["reward"]), rel=1e-4)
        assert column(found, "exact_vendi")[0] == pytest.approx(np.mean(first["vendi"]), rel=1e-3)
