"""The study's runs can be trained as they are listed, for as long as their cost allows."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from flow_grpo.commands.cli import parse_config
from flow_grpo.errors import ConfigError
from flow_grpo.methods.registry import METHODS
from flow_grpo.recipes.registry import get_config
from flow_grpo.settings import resolve
from scripts.study.paths import ROOT
from scripts.study.records import MEASURE, NOT_MEASURE
from scripts.study.run import State, command, planned
from scripts.study.testbeds import (
    CLAIMED,
    COST,
    QUICK_SEED,
    SCENES,
    SEARCH_SEED,
    SEEDS,
    SEEDS_OF_CLAIMS,
    TESTBEDS,
    TINY,
)


@pytest.fixture
def out(tmp_path):
    """A folder in which every epoch costs 2 s."""
    (tmp_path / COST).write_text(json.dumps({"seconds": dict.fromkeys(METHODS, 2.0)}))
    return tmp_path


def test_names_are_unique_and_fit_for_folders():
    names = [run.name for run in [*planned(quick=False), *planned(quick=True)]]
    assert max(Counter(names).values()) == 1
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-") for name in names)


@pytest.mark.parametrize("testbed", TESTBEDS.values(), ids=str)
def test_what_the_claims_are_about_has_five_seeds_and_every_other_method_three(testbed):
    seeds = {label: list(SEEDS_OF_CLAIMS if label in CLAIMED else SEEDS) for label in testbed.entries}
    found = {label: [run.seed for run in testbed.plan() if run.label == label] for label in testbed.entries}
    assert found == seeds
    assert {run.seed for run in testbed.plan() if run.label in testbed.tried} <= {SEARCH_SEED}
    assert {run.seed for run in testbed.quick()} == {QUICK_SEED}


def test_the_epochs_of_a_run_are_those_that_its_cost_allows(out):
    assert {TINY.run(label, 0, out).settings["num_epochs"] for label in TINY.entries} == {75}  # of 150 s
    epochs = {label: SCENES.run(label, 0, out).settings["num_epochs"] for label in ("drtune", "nft")}
    assert epochs == {"drtune": 105, "nft": 210}


def test_a_quick_run_ends_at_an_evaluation_of_the_whole_one():
    for testbed in TESTBEDS.values():
        for quick in testbed.quick():
            whole = testbed.run(quick.label, quick.seed)
            assert quick.settings["num_epochs"] == quick.eval_freq
            assert quick.eval_freq % whole.eval_freq == 0
            assert quick.eval_freq < whole.settings["num_epochs"]


def test_a_method_whose_cost_is_not_known_is_named(out):
    (out / COST).write_text('{"seconds": {}}')
    with pytest.raises(ConfigError, match=r"does not say what an epoch of grpo costs; scripts/study/prepare\.py mea"):
        TINY.run("grpo", 0, out)


@pytest.mark.parametrize("testbed", TESTBEDS.values(), ids=str)
def test_every_command_is_a_recipe_with_the_listed_changes(testbed, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for run in {run.label: run for run in testbed.plan()}.values():
        config = parse_config(command(run, tmp_path, State.NEW)[1:], "")
        assert resolve(config, num_processes=1, cuda=False).config.train.method in ("", testbed.entry(run.label).method)
        recipe = get_config(run.recipe)
        recipe.update_from_flattened_dict(
            run.settings | {"logdir": str(tmp_path), "run_name": run.name, "trackers": ()}
        )
        assert config.to_dict() == recipe.to_dict()


@pytest.mark.parametrize("testbed", TESTBEDS.values(), ids=str)
def test_no_entry_changes_what_is_measured(testbed):
    for entry in (*testbed.entries.values(), *testbed.tried.values()):
        assert not [key for key in entry.changes if key.startswith(MEASURE) and key not in NOT_MEASURE]
