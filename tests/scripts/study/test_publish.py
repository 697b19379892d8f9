"""The README's numbers are those of the committed demo, and what it names exists."""

import copy
import json
import re

import pytest

from flow_grpo.errors import ConfigError
from flow_grpo.page.data import read_run
from scripts.study.publish import FIGURES, README, ROOT, draw, section, summarise
from tests.synthetic_records import write_records

SUMMARY = json.loads((FIGURES / "summary.json").read_text())
ROWS = {row["name"]: row for row in SUMMARY["rows"]}


def test_the_readmes_demo_section_is_generated_from_the_committed_summary():
    assert section(SUMMARY) in README.read_text()


@pytest.mark.parametrize("figure", ["reward", "vendi", "reached", "judge"])
def test_another_number_would_be_noticed(figure):
    changed = copy.deepcopy(SUMMARY)
    changed["rows"][-1]["figures"][figure] += 0.02
    assert section(changed) not in README.read_text()


def test_the_committed_demo_shows_what_the_readme_says():
    """Both methods raise the reward, DRTune is there sooner than GRPO, and ends less diverse than its base."""
    assert all(ROWS[name]["changes"]["reward"]["low"] > 0 for name in ("DRTune", "GRPO"))
    assert ROWS["DRTune at GRPO's reward"]["seconds"] < ROWS["GRPO"]["seconds"]
    assert ROWS["DRTune"]["changes"]["vendi"]["high"] < 0


def test_every_picture_and_path_of_the_readme_exists():
    text = README.read_text()
    paths = re.findall(r"\]\(((?:assets|docs)/[^)#]+)", text) + re.findall(
        r"`((?:scripts|flow_grpo|tests|config|docs)/\S+?)`", text
    )
    assert len(paths) >= 8
    for path in paths:
        assert (ROOT / path).exists(), path


@pytest.fixture
def drtune(tmp_path):
    prompts = ("a sneaker", "a bag", "a dress", "a shirt")
    overrides = {"num_epochs": 40}
    return read_run(write_records(tmp_path / "drtune", (0, 10, 20, 40), prompts, overrides=overrides), "DRTune")


def test_the_picture_has_three_numbers_under_each_model(drtune):
    first, last = draw(drtune, [drtune.evaluations[0], drtune.last]).axes
    assert (first.get_title(), last.get_title()) == ("base model", "epoch 40")
    figures = drtune.last.figures
    assert last.get_xlabel() == (
        f"reward {figures['reward']:.3f}   {figures['vendi']:.1f} different of 16   judge {figures['judge']:.0%}"
    )


def test_a_demo_that_the_clock_cut_is_not_published(tmp_path, drtune):
    cut = read_run(write_records(tmp_path / "grpo", (0, 10), overrides={"num_epochs": 100}), "GRPO")
    with pytest.raises(ConfigError, match="GRPO was cut by the clock"):
        summarise(drtune, cut)
