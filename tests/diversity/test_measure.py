"""What is measured of groups of features, and how it is told."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from flow_grpo.diversity import measure as diversity
from flow_grpo.diversity.prdc import mean_pairwise_distance
from flow_grpo.diversity.rke import rke_score
from flow_grpo.diversity.vendi import vendi_score
from flow_grpo.errors import ConfigError
from flow_grpo.files import strict_json

BANDWIDTH = 0.5


def unit(n: int, d: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, d)) + 1.5
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def groups() -> dict[str, np.ndarray]:
    return {"a bag": unit(12, 6, 0), "a boot": unit(9, 6, 1)}


@pytest.fixture
def found(groups):
    return diversity.measure(groups, BANDWIDTH, 1.0, "clip:x", draws=100)


def test_the_headline_is_the_mean_over_prompts_of_each_prompts_score(groups, found):
    for name, score in (("vendi", vendi_score), ("rke", lambda x: rke_score(x, BANDWIDTH))):
        assert getattr(found.within, name).estimate == pytest.approx(np.mean([score(g) for g in groups.values()]))
        for prompt, features in groups.items():
            assert getattr(found.groups[prompt], name).estimate == pytest.approx(score(features), rel=1e-12)
        whole = np.concatenate(list(groups.values()))
        assert getattr(found.pooled, name).estimate == pytest.approx(score(whole), rel=1e-12)
        assert getattr(found.pooled, name).estimate != pytest.approx(getattr(found.within, name).estimate, rel=1e-2)
    assert found.within.distance == pytest.approx(np.mean([mean_pairwise_distance(g) for g in groups.values()]))
    assert found.counts == {"a bag": 12, "a boot": 9}


def test_every_score_lies_within_its_interval(found):
    for scores in (found.within, found.pooled, *found.groups.values()):
        for interval in (scores.vendi, scores.rke):
            assert interval.low < interval.estimate < interval.high


def test_the_order_is_that_asked_for(groups):
    second = diversity.measure(groups, BANDWIDTH, 2.0, "clip:x", draws=100)
    assert second.groups["a bag"].vendi.estimate == pytest.approx(vendi_score(groups["a bag"], order=2.0))


def test_what_is_logged_holds_both_scores_with_their_ends_and_the_pooled_ones(found):
    logged = diversity.metrics(found)
    assert logged["diversity/vendi"] == found.within.vendi.estimate
    assert (logged["diversity/rke_low"], logged["diversity/rke_high"]) == (found.within.rke.low, found.within.rke.high)
    assert logged["diversity/vendi_pooled"] == found.pooled.vendi.estimate


def test_the_record_says_how_to_measure_the_same_again(found):
    record = diversity.record(found)
    assert (record["features"], record["order"], record["bandwidth"], record["images"]) == ("clip:x", 1.0, 0.5, 21)
    assert (record["draws"], record["seed"], record["neighbours"]) == (100, 0, 5)
    assert record["groups"]["a bag"]["vendi"]["estimate"] == found.groups["a bag"].vendi.estimate


def test_the_table_has_a_line_for_each_prompt_with_number_and_interval(found):
    lines = diversity.table(found).splitlines()
    line = next(line for line in lines if line.startswith("a boot"))
    rke = found.groups["a boot"].rke
    assert line.split()[2] == "9"
    assert f"{rke.estimate:.2f} ({rke.low:.2f} to {rke.high:.2f})" in line
    assert lines[1].startswith("mean over prompts")


def test_the_figure_shows_every_prompts_interval(found):
    left, right = diversity.figure(found).axes
    for axes, name in ((left, "vendi"), (right, "rke")):
        segments = axes.containers[0][2][0].get_segments()
        for segment, scores in zip(segments, found.groups.values(), strict=True):
            interval = getattr(scores, name)
            assert segment[:, 0] == pytest.approx([interval.low, interval.high])


@pytest.mark.parametrize("name", ["a $^$ bag", r"$\frac{$", "costs $5 or $10", "红包 🎒", 160 * "x", "a\nb\x1b[31m"])
def test_a_group_of_any_name_is_shown_as_it_is(groups, name):
    measured = diversity.measure({name: groups["a bag"], "b": groups["a boot"]}, BANDWIDTH, 1.0, "clip:x", draws=100)
    drawn = diversity.figure(measured)
    FigureCanvasAgg(drawn).draw()
    assert drawn.axes[0].get_position().width > 0.2  # the names leave room
    lines = diversity.table(measured).splitlines()
    assert len(lines) == 7
    assert max(map(len, lines)) < 170
    assert not any(ord(letter) < 32 for line in lines for letter in line)


def test_the_figure_has_a_bound_and_says_what_it_leaves_out(found):
    many = replace(found, groups={f"prompt {i}": found.within for i in range(1600)}, counts=defaultdict(int))
    drawn = diversity.figure(many)
    assert drawn.get_size_inches()[1] < 25
    assert len(drawn.axes[0].get_yticks()) == diversity.MAX_ROWS == 60
    assert "the first 60 of 1,600 prompts; 1,540 are not shown" in drawn.get_suptitle()


def test_without_a_bandwidth_rke_alone_is_not_measured(groups):
    measured = diversity.measure(groups, None, 1.0, "clip:x", draws=100)
    assert measured.within.vendi == diversity.measure(groups, BANDWIDTH, 1.0, "clip:x", draws=100).within.vendi
    record = json.loads(strict_json(diversity.record(measured)))
    assert record["bandwidth"] is record["within"]["rke"]["estimate"] is record["pooled"]["rke"]["low"] is None
    table = diversity.table(measured)
    assert "RKE is not measured: half of the images within prompts are duplicates" in table
    assert table.splitlines()[1].count("not measured") == 1
    assert len(diversity.figure(measured).axes) == 1
    same = diversity.against_reference(groups, groups, None)
    assert np.isnan(same.relative_rke)
    assert "relative RKE not measured" in diversity.table(replace(measured, reference=same))


def test_a_reference_is_compared_as_a_whole(groups):
    same = diversity.against_reference(groups, groups, BANDWIDTH)
    assert (same.prdc.precision, same.prdc.recall, same.prdc.coverage) == (1.0, 1.0, 1.0)
    assert same.relative_rke == pytest.approx(0.0, abs=1e-9)
    far = {"other": -unit(15, 6, 3)}
    other = diversity.against_reference(groups, far, BANDWIDTH)
    assert other.prdc.coverage == 0.0
    assert other.relative_rke > 1
    assert other.images == 15


def test_features_that_are_not_finite_are_one_sentence(groups):
    groups["a boot"][3, 2] = np.nan
    with pytest.raises(ConfigError, match="finite"):
        diversity.measure(groups, BANDWIDTH, 1.0, "clip:x", draws=100)


def test_no_interval_leaves_what_the_score_can_be():
    pair = np.eye(8)[:, [0, 1, 2, 3, 4, 5, 6, 6]].T.copy()  # one duplicate among orthogonal rows
    found = diversity.measure({"a bag": pair}, 0.05, 1.0, "clip:x", draws=100)
    for interval in (found.within.vendi, found.within.rke, found.pooled.rke):
        assert 1 <= interval.low <= interval.estimate <= interval.high <= 8
    assert found.within.rke.high == 8


def test_too_few_images_for_an_interval_name_the_prompt(groups):
    groups["a boot"] = groups["a boot"][:3]
    with pytest.raises(ConfigError, match="'a boot' has 3 images; an interval of their diversity needs at least 4"):
        diversity.measure(groups, BANDWIDTH, 1.0, "clip:x", draws=100)
