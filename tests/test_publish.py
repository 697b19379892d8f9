"""The README's numbers are those of the committed demo, and what it names exists."""

import json
import re

from scripts.study.publish import FIGURES, README, ROOT, SHOWN, demo_section

SUMMARY = json.loads((FIGURES / "summary.json").read_text())


def test_the_readmes_demo_section_is_generated_from_the_committed_summary():
    assert demo_section(SUMMARY) in README.read_text()


def test_another_number_would_be_noticed():
    changed = json.loads(json.dumps(SUMMARY))
    changed["runs"]["GRPO"]["reward/total"] += 0.001
    assert demo_section(changed) not in README.read_text()


def test_the_committed_demo_shows_what_the_readme_says():
    """Both methods raise the reward, and DRTune is there in at most a fifth of GRPO's time."""
    base = SUMMARY["base"]["reward/total"]
    assert all(run["reward/total"] > base for run in SUMMARY["runs"].values())
    crossing = next(c for c in SUMMARY["crossings"] if c["runner"] == "DRTune")
    assert crossing["fraction_of_seconds"] <= 0.2


def test_every_picture_and_path_of_the_readme_exists():
    text = README.read_text()
    paths = re.findall(r"\]\(((?:assets|docs)/[^)]+)\)", text) + re.findall(
        r"`((?:scripts|flow_grpo|tests|config)/\S+?)`", text
    )
    assert len(paths) >= len(SHOWN)
    for path in paths:
        assert (ROOT / path.partition("#")[0]).exists(), path


def test_the_committed_demo_shows_drtunes_collapse_by_vendi_rke_and_the_colours():
    """Intervals that do not overlap the base model's; GRPO's, at its own reward, do or lie above DRTune's."""
    base, drtune, grpo = SUMMARY["base"], SUMMARY["runs"]["DRTune"], SUMMARY["runs"]["GRPO"]
    for score in ("diversity/vendi", "diversity/rke"):
        assert drtune[f"{score}_high"] < base[f"{score}_low"]
        assert drtune[f"{score}_high"] < grpo[f"{score}_low"]
    assert drtune["modes/entropy"] < base["modes/entropy"] - 0.5
