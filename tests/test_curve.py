"""Where a model stands beside the exact curve."""

from __future__ import annotations

import json
import math

import pytest

from flow_grpo.curve import Curve
from flow_grpo.errors import ConfigError


def curve_file(folder, **changes):
    """A curve of two points: reward .2 to .6, Vendi 4 to 3."""
    figures = [{"reward": 0.2, "vendi": 4.0, "rke": 5.0}, {"reward": 0.6, "vendi": 3.0, "rke": 4.0}]
    content = {
        "prompts": ["a bag", "a boot"],
        "set_size": 4,
        "rewards": {"pickscore": 1.0},
        "features": "clip:model",
        "bandwidth": 0.5,
        "first": {"reward": 0.25, "vendi": 3.8, "rke": 5.5},
        "points": [{"figures": {name: {"estimate": value} for name, value in point.items()}} for point in figures],
    }
    path = folder / "curve.json"
    path.write_text(json.dumps(content | changes))
    return path


def test_a_model_on_the_curve_keeps_all_of_it(tmp_path):
    curve = Curve.read(curve_file(tmp_path))
    kept = curve.kept({"reward": 0.45, "vendi": 3.8 * 3.5 / 4, "rke": 5.5 * 4.5 / 5})  # a gain of .2: half-way
    assert kept == {"vendi": pytest.approx(1.0), "rke": pytest.approx(1.0)}


def test_a_model_below_it_keeps_its_share(tmp_path):
    kept = Curve.read(curve_file(tmp_path)).kept({"reward": 0.65, "vendi": 1.9})
    assert kept == {"vendi": pytest.approx(0.5 / 0.75)}  # half of the base's, where the law has three quarters


def test_the_base_model_is_at_its_beginning(tmp_path):
    curve = Curve.read(curve_file(tmp_path))
    assert curve.kept(curve.first) == {"vendi": pytest.approx(1.0), "rke": pytest.approx(1.0)}


def test_beyond_the_curve_nothing_is_known(tmp_path):
    curve = Curve.read(curve_file(tmp_path))
    assert math.isnan(curve.kept({"reward": 0.66, "vendi": 3.0})["vendi"])
    assert math.isnan(curve.kept({"reward": math.nan, "vendi": 3.0})["vendi"])


def test_a_reward_below_the_bases_is_held_against_the_base(tmp_path):
    assert Curve.read(curve_file(tmp_path)).kept({"reward": 0.1, "vendi": 3.8})["vendi"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "changes", [{"points": []}, {"first": {}}, {"set_size": "x"}, {"points": [{"figures": {}}]}, {"rewards": 3}]
)
def test_a_damaged_curve_is_one_sentence(tmp_path, changes):
    path = curve_file(tmp_path, **changes)
    with pytest.raises(ConfigError, match=r"curve\.json is no curve\.json of scripts/study/curve\.py, or is damaged"):
        Curve.read(path)
