"""Features against each library's own preprocessing and encoder, on random networks; folders of images."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from open_clip import pretrained as open_clip_pretrained
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitImageProcessor, CLIPProcessor, Dinov2Config, Dinov2Model

from flow_grpo.diversity.features import EXTRACTORS, FeatureExtractor, NonFiniteFeatures, load_extractor
from flow_grpo.diversity.images import read_images
from flow_grpo.errors import ConfigError
from flow_grpo.rewards.clip import ClipScorer
from flow_grpo.rewards.image_path import ImagePath
from tests import pictures
from tests.pictures import to_pil

SIDE = 32  # pixels of the input of CLIP and open_clip
SIZES = [(32, 32), (64, 64), (20, 20), (32, 48), (45, 40), (40, 72), (65, 64), (100, 300)]  # height, width
PREPROCESS: dict[str, Any] = {"size": SIDE, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
PIXEL_LEVEL = 1.01 / 255  # the most by which a pixel may differ from the library's: one level of 8 bits
PARITY = 5e-4  # the most by which a feature may, as a distance; its length is 1


make_images = partial(pictures.make_images, count=6)


def unit(features: Tensor) -> np.ndarray:
    return F.normalize(features, dim=-1).numpy()


def distance(features: np.ndarray, others: np.ndarray) -> float:
    """The largest over the images."""
    return float(np.linalg.norm(features - others, axis=1).max())


def spread(features: np.ndarray) -> float:
    """The smallest distance between two images."""
    distances = np.linalg.norm(features[:, None] - features[None], axis=-1)
    return float(distances[~np.eye(len(features), dtype=bool)].min())


# --- random networks ------------------------------------------------------------------------------------------


def open_clip_config(**vision: Any) -> dict[str, Any]:
    """The text tower is never run. An image of 32 x 32 pixels in 16 patches, unless said otherwise."""
    return {
        "embed_dim": 24,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, **vision},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dinov2/, and open_clip's model.json, weights.pt and weights.safetensors."""
    folder = tmp_path_factory.mktemp("features")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = open_clip.CLIP(**open_clip_config())
        config = Dinov2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
            layerscale_value=0.5,
        )
        dinov2 = Dinov2Model(config)
    (folder / "model.json").write_text(json.dumps(open_clip_config()))
    torch.save(network.state_dict(), folder / "weights.pt")
    save_file({name: value.clone() for name, value in network.state_dict().items()}, folder / "weights.safetensors")
    dinov2.save_pretrained(folder / "dinov2")
    BitImageProcessor(
        size={"shortest_edge": 36},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder / "dinov2")
    return folder


@pytest.fixture(scope="module")
def checkpoints(models: Path, random_models: Path) -> dict[str, tuple[str, str]]:
    """Of each kind, a model and its `pretrained`."""
    return {
        "clip": (str(random_models / "clip"), ""),
        "dinov2": (str(models / "dinov2"), ""),
        "open_clip": (str(models / "model.json"), str(models / "weights.pt")),
    }


@pytest.fixture(scope="module")
def extractors(checkpoints: dict[str, tuple[str, str]]) -> dict[str, FeatureExtractor]:
    return {kind: load_extractor(kind, *checkpoint) for kind, checkpoint in checkpoints.items()}


Library = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # images -> pixels, pixels -> features


@pytest.fixture(scope="module")
def libraries(checkpoints: dict[str, tuple[str, str]]) -> dict[str, Library]:
    """Of each kind, the library's own preprocessing of Pillow images and its own encoder."""
    scorer = ClipScorer(checkpoints["clip"][0])
    clip_processor = CLIPProcessor.from_pretrained(checkpoints["clip"][0]).image_processor
    dinov2 = Dinov2Model.from_pretrained(checkpoints["dinov2"][0]).eval()
    dinov2_processor = BitImageProcessor.from_pretrained(checkpoints["dinov2"][0])
    network = open_clip.CLIP(**open_clip_config()).eval()
    network.load_state_dict(torch.load(checkpoints["open_clip"][1]))
    transform = image_transform_v2(PreprocessCfg(size=SIDE), is_train=False)

    def encode_clip(pixels: Tensor) -> Tensor:
        return scorer.model.visual_projection(scorer.model.vision_model(pixel_values=pixels).pooler_output)

    return {
        "clip": (lambda x: clip_processor(to_pil(x), return_tensors="pt").pixel_values, encode_clip),
        "dinov2": (
            lambda x: dinov2_processor(to_pil(x), return_tensors="pt").pixel_values,
            lambda pixels: dinov2(pixel_values=pixels).last_hidden_state[:, 0],
        ),
        "open_clip": (lambda x: torch.stack([transform(image) for image in to_pil(x)]), network.encode_image),
    }


# --- agreement with the libraries -----------------------------------------------------------------------------


@torch.no_grad()
def library_features(library: Library, images: Tensor) -> np.ndarray:
    preprocess, encode = library
    return unit(encode(preprocess(images)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", EXTRACTORS)
def test_features_are_those_of_the_library(
    extractors: dict[str, FeatureExtractor], libraries: dict[str, Library], kind: str, size: tuple[int, int]
) -> None:
    images = make_images(*size)
    features, expected = extractors[kind](images), library_features(libraries[kind], images)
    assert features.shape == (len(images), extractors[kind].dims)
    assert features.dtype == np.float32
    assert distance(features, expected) < PARITY
    assert spread(expected) > 80 * PARITY


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_open_clip_pixels_are_the_librarys_to_one_level(size: tuple[int, int], interpolation: str, mode: str) -> None:
    numbers: dict[str, Any] = {**PREPROCESS, "interpolation": interpolation, "resize_mode": mode}
    transform = image_transform_v2(PreprocessCfg(**numbers), is_train=False)
    images = make_images(*size)
    expected = torch.stack([transform(image) for image in to_pil(images)])
    pixels = replace(ImagePath.from_open_clip(numbers, "x"), eight_bit=True)(images)
    levels = (pixels - expected).abs() * torch.tensor(numbers["std"]).view(3, 1, 1)
    assert levels.max() < PIXEL_LEVEL
    assert (levels > PIXEL_LEVEL / 10).float().mean() < 0.05  # ties, where one rounds up and the other down


class Unsmoothed(ImagePath):
    """The twin without antialiasing."""

    def _interpolate(self, images: Tensor, target: tuple[int, int]) -> Tensor:
        return F.interpolate(images, target, mode=self.interpolation, align_corners=False)


TWINS = {
    "no antialiasing": Unsmoothed(SIDE, (SIDE, SIDE), (0.5,) * 3, (0.5,) * 3, eight_bit=True),
    "another mean": ImagePath(SIDE, (SIDE, SIDE), (0.49, 0.5, 0.5), (0.5,) * 3, eight_bit=True),
    "another kernel": ImagePath(SIDE, (SIDE, SIDE), (0.5,) * 3, (0.5,) * 3, "bilinear", eight_bit=True),
    "the overshoot kept": ImagePath(SIDE, (SIDE, SIDE), (0.5,) * 3, (0.5,) * 3),
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_broken_image_path_leaves_the_bound(
    extractors: dict[str, FeatureExtractor], libraries: dict[str, Library], twin: str
) -> None:
    images = make_images(45, 40)
    expected = library_features(libraries["clip"], images)
    with torch.no_grad():
        broken = unit(libraries["clip"][1](TWINS[twin](images)))
    assert distance(extractors["clip"](images), expected) < PARITY
    assert distance(broken, expected) > 2 * PARITY


def test_half_an_odd_margin_is_cut_as_each_library_does() -> None:
    images = make_images(40, 59)  # 32 x 47: a margin of 15, of which torchvision cuts 8 and transformers 7
    path = ImagePath(SIDE, (SIDE, SIDE), (0.5,) * 3, (0.5,) * 3)
    assert (path(images) - replace(path, round_margin=True)(images)).abs().max() > 100 * PIXEL_LEVEL
    numbers: dict[str, Any] = {**PREPROCESS, "interpolation": "bicubic", "resize_mode": "shortest"}
    expected = torch.stack([image_transform_v2(PreprocessCfg(**numbers), False)(image) for image in to_pil(images)])
    pixels = replace(ImagePath.from_open_clip(numbers, "x"), eight_bit=True)(images)
    assert (pixels - expected).abs().max() * max(numbers["std"]) < PIXEL_LEVEL


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"resize_mode": "longest"}, "'longest' and size = 32 x 32"),
        ({"size": (32, 48)}, "'shortest' and size = 32 x 48"),
    ],
)
def test_other_open_clip_preprocessing_is_refused(change: dict[str, Any], shown: str) -> None:
    with pytest.raises(ConfigError) as error:
        ImagePath.from_open_clip({**PREPROCESS, "interpolation": "bicubic", "resize_mode": "shortest", **change}, "x")
    assert str(error.value) == (
        f"the preprocessing of 'x' has resize_mode = {shown}; it must be 'squash', or 'shortest' with a square size."
    )


def test_clip_features_are_the_scorers_at_its_own_size(
    extractors: dict[str, FeatureExtractor], checkpoints: dict[str, tuple[str, str]]
) -> None:
    images = make_images(SIDE, SIDE)
    features = ClipScorer(checkpoints["clip"][0]).image_features(images)
    np.testing.assert_allclose(extractors["clip"](images), features.numpy(), rtol=0, atol=1e-6)


# --- the call -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXTRACTORS)
def test_batch_size_does_not_matter(checkpoints: dict[str, tuple[str, str]], kind: str) -> None:
    images = make_images(40, 72, count=7)
    whole = load_extractor(kind, *checkpoints[kind], batch_size=100)(images)
    for size in (1, 3):
        parts = load_extractor(kind, *checkpoints[kind], batch_size=size)(images)
        np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("kind", EXTRACTORS)
def test_autocast_and_gradients_around_the_call_change_nothing(
    extractors: dict[str, FeatureExtractor], kind: str
) -> None:
    images, calls = make_images(40, 72), []
    expected = extractors[kind](images)
    encode = extractors[kind]._encode

    def spy(batch: Tensor) -> Tensor:
        calls.append(encode(batch))
        return calls[-1]

    spying = FeatureExtractor("spy", spy, "cpu", batch_size=4)
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        features = spying(images.double().requires_grad_())
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-6)  # batches of 4, not 64
    assert [(call.requires_grad, call.dtype) for call in calls] == [(False, torch.float32)] * 3  # one to learn `dims`


def test_images_go_to_the_device_a_batch_at_a_time() -> None:
    seen = []

    def encode(batch: Tensor) -> Tensor:
        seen.append((batch.device.type, len(batch), batch.dtype))
        return torch.arange(3.0).expand(len(batch), 3)

    extractor = FeatureExtractor("x", encode, "cpu", batch_size=4)
    extractor.device = torch.device("meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *_, **__: torch.enable_grad())  # there is none on "meta"
        extractor(make_images(8, 8, count=6).double())
    assert seen == [("cpu", 1, torch.float32), ("meta", 4, torch.float32), ("meta", 2, torch.float32)]


@pytest.mark.parametrize("kind", EXTRACTORS)
def test_networks_are_moved_to_the_device(
    checkpoints: dict[str, tuple[str, str]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, move = [], torch.nn.Module.to

    def record(module: torch.nn.Module, *arguments: Any, **keywords: Any) -> torch.nn.Module:
        moved.extend(str(argument) for argument in arguments)
        return move(module, *["cpu" if str(argument) == "cpu:0" else argument for argument in arguments], **keywords)

    monkeypatch.setattr(torch.nn.Module, "to", record)
    load_extractor(kind, *checkpoints[kind], device="cpu:0")
    assert "cpu:0" in moved


def test_images_in_memory_have_the_features_of_their_png(
    extractors: dict[str, FeatureExtractor], tmp_path: Path
) -> None:
    images = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))  # no multiples of 1/255
    for index, image in enumerate(to_pil(images)):
        image.save(tmp_path / f"{index}.png")
    for extractor in extractors.values():
        saved = read_images(tmp_path).features(extractor)[tmp_path.name]
        np.testing.assert_allclose(saved, extractor(images), rtol=0, atol=1e-6)


def test_names_tell_the_features_apart(
    extractors: dict[str, FeatureExtractor], checkpoints: dict[str, tuple[str, str]]
) -> None:
    model, weights = checkpoints["open_clip"]
    assert extractors["open_clip"].name == f"open_clip:{model}:{weights}"
    assert extractors["clip"].name == f"clip:{checkpoints['clip'][0]}"
    assert {kind: extractor.dims for kind, extractor in extractors.items()} == {
        "clip": 64,
        "dinov2": 32,
        "open_clip": 24,
    }


def test_the_default_is_the_embedded_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    extractor = load_extractor()
    assert (extractor.name, extractor.dims) == ("clip:assets/tiny_features", 64)


def test_the_module_loads_no_heavy_library() -> None:
    code = (
        "import sys, flow_grpo.diversity.features; "
        "sys.exit(bool({'torch', 'transformers', 'open_clip', 'PIL'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


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
    assert refusal("clipp") == "the features 'clipp' are unknown; there are clip, dinov2, open_clip."
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
