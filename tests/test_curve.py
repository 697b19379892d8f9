"""Where a model stands beside the exact curve."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from flow_grpo.curve import Curve
from flow_grpo.errors import ConfigError
from flow_grpo.statistics import mean_interval


def curve_file(folder, end="40.0", **changes):
    """A curve of two points: reward .2 to .6, Vendi 4 to 3."""
    figures = [{"reward": 0.2, "vendi": 4.0, "rke": 5.0}, {"reward": 0.6, "vendi": 3.0, "rke": 4.0}]
    points = [{"figures": {name: {"estimate": x} for name, x in point.items()}} for point in figures]
    content = {
        "prompts": ["a bag", "a boot"],
        "set_size": 4,
        "rewards": {"pickscore": 1.0},
        "features": "clip:model",
        "bandwidth": 0.5,
        "first": {"reward": [0.2, 0.3], "vendi": [3.6, 4.0], "rke": [5.5, 5.5]},
        "best": 0.7,
        "drawing": "x",
        "points": [point | {"strength": strength} for point, strength in zip(points, ("0.0", end), strict=True)],
    }
    path = folder / "curve.json"
    path.write_text(json.dumps(content | changes))
    return path


def kept(path, **figures):
    """Shares by figure, of both prompts' figures."""
    return {name: found.share.estimate for name, found in Curve.read(path).kept(figures).items()}


def test_a_model_on_the_curve_keeps_all_of_it(tmp_path):
    half_way = kept(curve_file(tmp_path), reward=[0.4, 0.5], vendi=[3.8 * 3.5 / 4] * 2, rke=[5.5 * 4.5 / 5] * 2)
    assert half_way == {"vendi": pytest.approx(1.0), "rke": pytest.approx(1.0)}


def test_a_model_below_it_keeps_its_share_and_has_lost_the_rest(tmp_path):
    found = Curve.read(curve_file(tmp_path)).kept({"reward": [0.6, 0.7], "vendi": [1.5, 2.3]})["vendi"]
    assert found.share.estimate == pytest.approx(0.5 / 0.75)  # half of the base's, where the law has three quarters
    assert found.lost.estimate == pytest.approx(3.8 * (0.75 - 0.5))


def test_the_base_model_is_at_its_beginning(tmp_path):
    path = curve_file(tmp_path)
    assert kept(path, **Curve.read(path).first) == {"vendi": pytest.approx(1.0), "rke": pytest.approx(1.0)}


def test_beyond_the_curve_nothing_is_known(tmp_path):
    path = curve_file(tmp_path)
    assert math.isnan(kept(path, reward=[0.66, 0.66], vendi=[3.0, 3.0])["vendi"])
    assert math.isnan(kept(path, reward=[math.nan, 0.3], vendi=[3.0, 3.0])["vendi"])


def test_a_curve_of_0_or_1_has_no_beyond(tmp_path):
    """Base images less often right than the law's gain more than it on the way to always right."""
    path = curve_file(tmp_path, end="inf")
    assert kept(path, reward=[0.8, 0.8], vendi=[2.85, 2.85])["vendi"] == pytest.approx(1.0)
    assert math.isnan(kept(path, reward=[math.nan, 0.3], vendi=[3.0, 3.0])["vendi"])


def test_a_reward_below_the_bases_is_held_against_the_base(tmp_path):
    assert kept(curve_file(tmp_path), reward=[0.1, 0.1], vendi=[3.6, 4.0])["vendi"] == pytest.approx(1.0)


def test_above_the_bases_best_images_it_is_off_the_support(tmp_path):
    curve = Curve.read(curve_file(tmp_path))
    assert not curve.is_off_support([0.6, 0.8])
    assert curve.is_off_support([0.6, 0.81])


def test_the_interval_is_the_jackknifes_over_prompts(tmp_path):
    """At the base's reward the share is a ratio of means; with the same first images, a mean: Student's own."""
    first = {"reward": [0.25] * 3, "vendi": [4.0] * 3, "rke": [5.0] * 3}
    curve = Curve.read(curve_file(tmp_path, prompts=["a", "b", "c"], first=first))
    values = [3.0, 3.5, 3.6]
    found = curve.kept({"reward": [0.25] * 3, "vendi": values})["vendi"]
    expected = mean_interval([value / 4 for value in values])
    for one, other in ((found.share, 1), (found.lost, -4)):
        ends = sorted([other * expected.low, other * expected.high])
        shift = 4 if other < 0 else 0
        assert [one.low, one.high] == pytest.approx([end + shift for end in ends])


def test_intervals_cover_the_share_of_a_model_below_the_curve():
    """Prompts differ in reward and diversity, and so does what a model does of them: 95 % of 2,000 sets of 20."""
    law = {"reward": [0.0, 1.0], "vendi": [4.0, 2.0]}
    rng, held = np.random.default_rng(0), 0
    for _ in range(2000):
        base, gain = rng.uniform(3, 5, 20), rng.uniform(0, 0.8, 20)
        first = {"reward": [0.0] * 20, "vendi": base}
        curve = Curve(("",) * 20, 16, {}, "", 1.0, law, first, 1.0)
        model = {"reward": gain, "vendi": base * (0.7 + 0.1 * rng.standard_normal(20)) * (1 - gain / 2)}
        held += curve.kept(model)["vendi"].share.holds(TRUE_SHARE)
    assert 0.93 < held / 2000 < 0.97


TRUE_SHARE = 0.7  # base, gain and share are independent, so that the ratio of the means is the share


@pytest.mark.parametrize(
    "changes",
    [
        {"points": []},
        {"first": {}},
        {"set_size": "x"},
        {"points": [{"figures": {}}]},
        {"rewards": 3},
        {"prompts": ["a bag"]},
        {"prompts": []},
        {"set_size": 0},
        {"best": math.nan},
        {"first": {"reward": [0.2], "vendi": [3.6], "rke": [5.5]}},
        {"first": {"reward": [0.2, 0.3], "vendi": [0.0, 0.0], "rke": [5.5, 5.5]}},
    ],
)
def test_a_damaged_curve_is_one_sentence(tmp_path, changes):
    path = curve_file(tmp_path, **changes)
    with pytest.raises(ConfigError, match=r"curve\.json is no curve\.json of scripts/study/curve\.py, or is damaged"):
        Curve.read(path)


def test_a_curve_whose_rewards_do_not_rise_is_damaged(tmp_path):
    path = curve_file(tmp_path)
    path.write_text(path.read_text().replace("0.6", "0.2"))
    with pytest.raises(ConfigError, match=r"is no curve\.json"):
        Curve.read(path)
