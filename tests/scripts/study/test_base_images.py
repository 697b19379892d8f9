"""Base images are drawn once, kept, added to, and never mixed with others."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from flow_grpo.errors import ConfigError
from flow_grpo.evaluators.base import SampleRequest
from flow_grpo.evaluators.evaluation import draw_samples
from flow_grpo.prompts import PromptDataset
from flow_grpo.recipes.registry import get_config
from scripts.study import base_images, curve
from tests.conftest import PROMPTS


@pytest.fixture(autouse=True)
def _small_files(monkeypatch):
    monkeypatch.setattr(base_images, "CHUNK", 3)


def test_images_are_those_of_the_evaluation(config, build, tmp_path):
    found = base_images.base_images(config, 5, tmp_path / "images")
    parts = build(config)
    prompts = PromptDataset.load(config.prompts.test)
    samples = draw_samples(parts.policy, prompts, parts.settings, parts.run, [SampleRequest(PROMPTS, 5)])
    with torch.no_grad():
        scores = parts.reward(samples.images, samples.prompts, samples.metadata).total
    assert found.prompts == PROMPTS
    assert found.reward == pytest.approx(scores.double().numpy().reshape(4, 5), abs=1e-6)
    assert found.right.shape == (4, 5)
    assert np.linalg.norm(found.features, axis=-1) == pytest.approx(np.ones((4, 5)), abs=1e-3)


def test_noises_are_those_of_an_evaluation_of_other_prompts_too(config, build, tmp_path):
    """Diversity is measured on two of the test prompts: their places are those in the test file."""
    (tmp_path / "two.txt").write_text(f"{PROMPTS[3]}\n{PROMPTS[1]}\n")
    config.prompts.eval_diversity = str(tmp_path / "two.txt")
    found = base_images.base_images(config, 3, tmp_path / "images")
    assert found.prompts == (PROMPTS[1], PROMPTS[3])
    parts = build(config)
    prompts = PromptDataset.load(config.prompts.test)
    samples = draw_samples(parts.policy, prompts, parts.settings, parts.run, [SampleRequest(PROMPTS, 3)])
    with torch.no_grad():
        scores = parts.reward(samples.images, samples.prompts, samples.metadata).total.double().numpy().reshape(4, 3)
    assert found.reward == pytest.approx(scores[[1, 3]], abs=1e-6)


def test_what_is_there_is_kept_and_only_the_rest_is_drawn(config, tmp_path, monkeypatch):
    few = base_images.base_images(config, 3, tmp_path)
    drawn = []
    original = base_images._drawn
    monkeypatch.setattr(base_images, "_drawn", lambda s, a, places: drawn.append(places) or original(s, a, places))
    more = base_images.base_images(config, 7, tmp_path)
    assert drawn == [[1, 2]]
    assert np.array_equal(more.reward[:, :3], few.reward)
    assert more.reward.shape == (4, 7)
    base_images.base_images(config, 7, tmp_path)
    assert len(drawn) == 1


def test_a_chunk_does_not_depend_on_what_was_drawn_before_it(config, tmp_path):
    whole = base_images.base_images(config, 6, tmp_path / "whole")
    base_images.base_images(config, 3, tmp_path / "parts")
    parts = base_images.base_images(config, 6, tmp_path / "parts")
    assert np.array_equal(whole.reward, parts.reward)
    assert not np.allclose(whole.reward[:, :3], whole.reward[:, 3:])


def test_images_of_other_settings_are_refused(config, tmp_path):
    base_images.base_images(config, 3, tmp_path)
    config.eval.num_steps += 1
    with pytest.raises(ConfigError, match=r"holds images of other settings: setting is .*; move it away"):
        base_images.base_images(config, 3, tmp_path)


def test_a_damaged_file_is_named(config, tmp_path):
    base_images.base_images(config, 3, tmp_path)
    (tmp_path / "images_000000.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"images_000000\.safetensors is damaged .* move it away"):
        base_images.base_images(config, 3, tmp_path)


def test_scenes_keep_what_the_judge_sees(config, tmp_path):
    scenes = get_config("scenes_nft")
    scenes.diversity.num_prompts, scenes.eval.num_steps = 2, 2
    found = base_images.base_images(scenes, 3, tmp_path)
    assert found.labels is not None
    assert found.labels.shape == found.colours.shape == (2, 3, 4)
    assert found.labels.max() <= base_images.EMPTY
    assert set(np.unique(found.reward)) <= {0.0, 1.0}


def test_the_command_writes_and_prints_the_curve(tmp_path, capsys, monkeypatch):
    settings = ["diversity.num_prompts=2", "eval.num_steps=2"]
    monkeypatch.setattr(base_images, "CHUNK", 100)
    assert curve.main(["tiny_drtune", *settings, "--images", "100", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "tiny_drtune/curve.json").read_text())
    assert len(found["prompts"]) == 2
    assert found["left_out"] == []
    rewards = [point["figures"]["reward"]["estimate"] for point in found["points"]]
    assert rewards == sorted(rewards)
    assert rewards[0] < rewards[-1]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["lambda", "reward", "judge", "kl", "vendi", "rke", "effective"]
    assert len(printed) == 1 + len(found["points"]) + 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tiny_drtune", "--images", "20"], "it takes at least 100"),
        (["tiny_drtun"], "tiny_drtun"),
        (["tiny_drtune", "eval.num_stesp=3"], "eval.num_stesp is not a key"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        curve.main([*arguments, "--out", str(tmp_path)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
