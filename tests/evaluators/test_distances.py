"""The distances that a record keeps, and the base model's features, which a run keeps."""

from __future__ import annotations

import os

import numpy as np
import pytest
from scipy.spatial.distance import squareform

from flow_grpo.diversity.rke import rke_score
from flow_grpo.diversity.vendi import vendi_from_kernel, vendi_score
from flow_grpo.errors import ConfigError
from flow_grpo.evaluators import distances
from flow_grpo.evaluators.distances import (
    base_features_path,
    distances_of,
    read_base_features,
    write_base_features,
)


def features(seed, counts=(6, 5)):
    generator = np.random.default_rng(seed)
    groups = {f"prompt {i}": generator.normal(size=(n, 8)).astype(np.float32) for i, n in enumerate(counts)}
    return {prompt: x / np.linalg.norm(x, axis=1, keepdims=True) for prompt, x in groups.items()}


NOISE = [list(range(6)), list(range(5))]


def test_cosines_and_scores_come_back_from_the_distances():
    ours = features(0)
    found = distances_of(ours, NOISE, "clip:x", 2.0, 0.7)
    for i, x in enumerate(ours.values()):
        kernel = 1 - squareform(found.within[i]) ** 2 / 2
        np.testing.assert_allclose(kernel, x.astype(np.float64) @ x.T, atol=1e-6)
        assert vendi_from_kernel(kernel, 2.0) == pytest.approx(found.vendi[i], rel=1e-5)
        assert found.vendi[i] == pytest.approx(vendi_score(x, 2.0))
        assert found.rke[i] == pytest.approx(rke_score(x, 0.7))
    assert (found.to_base, found.images, found.noise) == (None, [6, 5], NOISE)


def test_distances_to_the_base_have_its_images_in_rows():
    ours, base = features(0), features(1)
    found = distances_of(ours, NOISE, "clip:x", 1.0, None, base)
    x, y = base["prompt 1"].astype(np.float64), ours["prompt 1"].astype(np.float64)
    assert found.to_base[1][1 * 5 + 3] == pytest.approx(np.linalg.norm(x[1] - y[3]))
    assert found.rke is None


def test_a_base_of_other_images_is_none():
    ours = features(0)
    for base in (features(1, (6, 4)), {"prompt 0": features(1)["prompt 0"]}):
        assert distances_of(ours, NOISE, "clip:x", 1.0, None, base).to_base is None


def test_of_many_images_the_first_are_kept(monkeypatch):
    monkeypatch.setattr(distances, "MOST_DISTANCES", 60)  # 2 prompts x 1.5 x 4^2 = 48 numbers, of 5 images 75
    ours, base = features(0), features(1)
    found = distances_of(ours, NOISE, "clip:x", 1.0, 0.7, base)
    assert found.images == [4, 4]
    assert found.noise == [[0, 1, 2, 3]] * 2
    assert [len(row) for row in found.within + found.to_base] == [6, 6, 16, 16]
    assert found.vendi[0] == pytest.approx(vendi_score(ours["prompt 0"][:4]))


def test_base_features_come_back_bit_for_bit_and_only_for_their_extractor(tmp_path):
    assert read_base_features(tmp_path, "clip:x") is None
    write_base_features(tmp_path, features(0), "clip:x")
    found = read_base_features(tmp_path, "clip:x")
    assert all(np.array_equal(found[prompt], group) for prompt, group in features(0).items())
    assert read_base_features(tmp_path, "dinov2:x") is None


@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_damaged_base_features_are_one_sentence(tmp_path, how):
    write_base_features(tmp_path, features(0), "clip:x")
    path = base_features_path(tmp_path)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content if how == "flip" else content[:-40])
    with pytest.raises(ConfigError, match=r"base_features\.safetensors is damaged: "):
        read_base_features(tmp_path, "clip:x")


def test_a_pipe_is_no_file_of_features(tmp_path):
    (tmp_path / "evaluations").mkdir()
    os.mkfifo(base_features_path(tmp_path))
    with pytest.raises(ConfigError, match="is not a regular file"):
        read_base_features(tmp_path, "clip:x")
