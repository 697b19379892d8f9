"""Which models can be named, and which are refused with one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants
from open_clip import pretrained as open_clip_pretrained
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load_file, save_file

from flow_grpo.diversity.features import FeatureExtractor, NonFiniteFeatures, load_extractor
from flow_grpo.errors import ConfigError
from tests.diversity.networks import PARITY, SIDE, distance, make_images, open_clip_config, unit
from tests.pictures import to_pil

# --- open_clip's ways to name a model -------------------------------------------------------------------------


def test_every_way_to_name_an_open_clip_gives_the_same_features(
    extractors: dict[str, FeatureExtractor], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(40, 72)
    expected = extractors["open_clip"](images)
    clash = shutil.copy(models / "model.json", tmp_path / "ViT-B-32.json")  # the name of a model that it knows
    whole = tmp_path / "open_clip_config.json"
    whole.write_text(json.dumps({"model_cfg": open_clip_config(), "preprocess_cfg": {}}))
    shutil.copy(models / "weights.safetensors", tmp_path / "open_clip_model.safetensors")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-ViT", open_clip_config())
    tag = {"file": str(models / "weights.pt")}
    monkeypatch.setitem(open_clip_pretrained._PRETRAINED, "tiny-ViT", {"random": tag})
    for model, pretrained in (
        (clash, models / "weights.pt"),
        (whole, models / "weights.safetensors"),
        ("tiny-ViT", models / "weights.pt"),
        ("tiny/ViT", "random"),
        (f"local-dir:{tmp_path}", ""),
    ):
        features = load_extractor("open_clip", str(model), str(pretrained))(images)
        np.testing.assert_array_equal(features, expected)
    assert open_clip.get_model_config("ViT-B-32")["embed_dim"] == 512


def test_the_numbers_of_a_configuration_or_tag_are_used(models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    numbers: dict[str, Any] = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_cfg": open_clip_config(), "preprocess_cfg": numbers}))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", open_clip_config())
    tag = {"file": str(models / "weights.pt"), "quick_gelu": True, **numbers}
    monkeypatch.setitem(open_clip_pretrained._PRETRAINED, "tiny", {"random": tag})

    images = make_images(64, 128)
    transform = image_transform_v2(PreprocessCfg(size=SIDE, **numbers), is_train=False)
    pixels = torch.stack([transform(image) for image in to_pil(images)])
    expected = {}
    for quick in (False, True):
        network = open_clip.CLIP(**open_clip_config(), quick_gelu=quick).eval()
        network.load_state_dict(torch.load(models / "weights.pt"))
        with torch.no_grad():
            expected[quick] = unit(network.encode_image(pixels))
    found = load_extractor("open_clip", str(config), str(models / "weights.pt"))(images)
    assert distance(found, expected[False]) < PARITY
    quick = load_extractor("open_clip", "tiny", "random")(images)  # the activation that the weights were trained with
    assert distance(quick, expected[True]) < PARITY
    assert distance(expected[False], expected[True]) > 2 * PARITY


# --- bad models -----------------------------------------------------------------------------------------------


def refusal(*arguments: Any, **keywords: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load_extractor(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unknown_kinds_and_batch_sizes_are_one_sentence(checkpoints: dict[str, tuple[str, str]]) -> None:
    assert refusal("clipp") == "the features 'clipp' are unknown; there are clip, dinov2, open_clip, scenes."
    assert "takes a whole number of at least 1." in refusal("dinov2", *checkpoints["dinov2"], batch_size=0)


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_transformers_models_that_cannot_be_used_are_one_sentence(
    kind: str, checkpoints: dict[str, tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints[kind][0]
    assert "'laion' is for open_clip" in refusal(kind, source, "laion")
    assert f"the {kind} model = '{tmp_path}/none' is not a directory" in refusal(kind, f"{tmp_path}/none")
    assert "cannot be loaded" in refusal(kind, str(tmp_path))  # an empty directory
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "'nobody/no-such-model' cannot be loaded" in refusal(kind, "nobody/no-such-model")

    other = checkpoints["dinov2" if kind == "clip" else "clip"][0]
    sentence = refusal(kind, other)
    assert f"{other!r} is no DINOv2 but a 'clip'" in sentence if kind == "dinov2" else f"{other!r} cannot" in sentence
    folder = shutil.copytree(source, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    name = "layernorm.weight" if kind == "dinov2" else "visual_projection.weight"
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors")
    assert f"lacks {name}." in refusal(kind, str(folder))
    save_file({**weights, name: weights[name][:1]}, folder / "model.safetensors")
    assert f"'{folder}' cannot be loaded" in refusal(kind, str(folder))
    save_file({**weights, name: torch.full_like(weights[name], torch.nan)}, folder / "model.safetensors")
    assert "not finite" in refusal(kind, str(folder))
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert f"'{folder}' cannot be loaded" in refusal(kind, str(folder))


def test_open_clip_names_and_tags_are_one_sentence(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "knows no model 'ViT-B32'; the nearest are ViT-B-32" in refusal("open_clip", "ViT-B32", "openai")
    for pretrained in ("", "opnai", str(models / "none.pt")):
        sentence = refusal("open_clip", "ViT-B-32", pretrained)
        assert f"pretrained = {pretrained!r} is neither a file nor a tag" in sentence
        assert "openai, laion400m_e31" in sentence
    assert "which brings its own weights" in refusal("open_clip", "hf-hub:org/name", "openai")
    assert "Directory specified" in refusal("open_clip", f"local-dir:{models}/none")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "open_clip cannot load 'hf-hub:nobody/none'" in refusal("open_clip", "hf-hub:nobody/none")
    assert "Failed to download weights" in refusal("open_clip", "ViT-B-32", "laion2b_s34b_b79k")


def test_open_clip_files_that_cannot_be_used_are_one_sentence(models: Path, tmp_path: Path) -> None:
    config, weights = str(models / "model.json"), tmp_path / "weights.pt"
    for pretrained in ("", "openai", str(tmp_path / "none.pt")):
        assert f"pretrained = {pretrained!r} is not a file" in refusal("open_clip", config, pretrained)
    good = torch.load(models / "weights.pt")
    shorter = {key: value for key, value in good.items() if key != "visual.proj"}
    for damaged in (shorter, {**good, "visual.proj": torch.zeros(3, 5)}, {}, [1], torch.nn.Linear(2, 2).state_dict()):
        torch.save(damaged, weights)
        assert f"open_clip cannot load {config!r}" in refusal("open_clip", config, str(weights))
    weights.write_bytes(b"")
    assert "open_clip cannot load" in refusal("open_clip", config, str(weights))
    weights.write_bytes((models / "weights.pt").read_bytes()[:5000])
    assert "open_clip cannot load" in refusal("open_clip", config, str(weights))
    safetensors = tmp_path / "weights.safetensors"
    safetensors.write_bytes(b"no weights")
    assert "open_clip cannot load" in refusal("open_clip", config, str(safetensors))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read (No such file or directory)."),
        ("{", "is not JSON"),
        (100_000 * "[", "JSON nested too deep"),
        ("[1]", "is no open_clip configuration; it needs embed_dim, vision_cfg, text_cfg."),
        ('{"model_cfg": 3}', "is no open_clip configuration"),
        ('{"embed_dim": 8, "vision_cfg": {}}', "is no open_clip configuration"),
        (json.dumps({**open_clip_config(), "widht": 3}), "unexpected keyword argument 'widht'"),
        (json.dumps(open_clip_config(patch_size=0)), "open_clip cannot load"),
    ],
)
def test_open_clip_configurations_that_cannot_be_used_are_one_sentence(
    models: Path, tmp_path: Path, text: str | None, sentence: str
) -> None:
    if text is not None:
        (tmp_path / "model.json").write_text(text)
    assert sentence in refusal("open_clip", str(tmp_path / "model.json"), str(models / "weights.pt"))


def test_images_that_cannot_be_used_are_refused(extractors: dict[str, FeatureExtractor]) -> None:
    extractor = extractors["open_clip"]
    with pytest.raises(ValueError, match=r"^a feature extractor takes images in \[0, 1\], got values from 0.0 to 2.0$"):
        extractor(2 * torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"^a feature extractor takes float images of shape \(B, 3, H, W\), got"):
        extractor(torch.zeros(3, 8, 8))
    images = make_images(32, 32)
    images[4, 0, 3, 3] = torch.nan
    with pytest.raises(NonFiniteFeatures, match=r"are not finite, first those of image 4\.$"):
        extractor(images)
