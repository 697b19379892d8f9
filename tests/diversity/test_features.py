"""Features against each library's own preprocessing and encoder, on random networks; the call."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor
from transformers import BitImageProcessor, CLIPProcessor, Dinov2Model

from flow_grpo.diversity.features import FeatureExtractor, load_extractor, pixel_extractor
from flow_grpo.diversity.images import read_images
from flow_grpo.errors import ConfigError
from flow_grpo.rewards.clip import ClipScorer
from flow_grpo.rewards.image_path import ImagePath
from flow_grpo.scenes.detector import CellDetector
from tests.diversity.networks import PARITY, PREPROCESS, SIDE, distance, make_images, open_clip_config, spread, unit
from tests.pictures import to_pil

SIZES = [(32, 32), (64, 64), (20, 20), (32, 48), (45, 40), (40, 72), (65, 64), (100, 300)]  # height, width
LIBRARIES = ("clip", "dinov2", "open_clip")  # kinds of features
PIXEL_LEVEL = 1.01 / 255  # the most by which a pixel may differ from the library's: one level of 8 bits


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
@pytest.mark.parametrize("kind", LIBRARIES)
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
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
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
        ({"resize_mode": "longest", "size": (32, 48)}, "'longest' and size = 32 x 48"),
        ({"size": (32, 48)}, "'shortest' and size = 32 x 48"),
    ],
)
def test_other_open_clip_preprocessing_is_refused(change: dict[str, Any], shown: str) -> None:
    with pytest.raises(ConfigError) as error:
        ImagePath.from_open_clip({**PREPROCESS, "interpolation": "bicubic", "resize_mode": "shortest", **change}, "x")
    assert str(error.value) == (
        f"the preprocessing of 'x' has resize_mode = {shown}; it must be 'squash', or 'shortest' or "
        "'longest' with a square size."
    )


def test_clip_features_are_the_scorers_at_its_own_size(
    extractors: dict[str, FeatureExtractor], checkpoints: dict[str, tuple[str, str]]
) -> None:
    images = make_images(SIDE, SIDE)
    features = ClipScorer(checkpoints["clip"][0]).image_features(images)
    np.testing.assert_allclose(extractors["clip"](images), features.numpy(), rtol=0, atol=1e-6)


# --- the call -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LIBRARIES)
def test_batch_size_does_not_matter(checkpoints: dict[str, tuple[str, str]], kind: str) -> None:
    images = make_images(40, 72, count=7)
    whole = load_extractor(kind, *checkpoints[kind], batch_size=100)(images)
    for size in (1, 3):
        parts = load_extractor(kind, *checkpoints[kind], batch_size=size)(images)
        np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("kind", LIBRARIES)
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


@pytest.mark.parametrize("kind", LIBRARIES)
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


def test_pixel_features_are_the_mean_colours_of_a_grid_minus_grey_and_of_unit_length():
    image = torch.zeros(1, 3, 16, 16)
    image[:, 0, :2, :2] = 1.0  # the first field is red, all others black
    found = pixel_extractor()(image)
    expected = np.full((3, 8, 8), -0.5)
    expected[0, 0, 0] = 0.5
    np.testing.assert_allclose(found[0], expected.ravel() / np.linalg.norm(expected), atol=1e-7)


def test_pixel_features_are_those_of_the_saved_image():
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    extract = pixel_extractor()
    np.testing.assert_array_equal(extract(image), extract((255 * image).round() / 255))


# --- scenes ---------------------------------------------------------------------------------------------------

SCENES = "assets/tiny_scenes_judge"


def test_features_of_a_scene_are_those_of_its_cells_side_by_side() -> None:
    images = (255 * torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))).round() / 255
    detector, extractor = CellDetector.load(SCENES), load_extractor("scenes", SCENES)
    cells = [images[:, :, y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32)]
    expected = torch.cat([detector.features(2 * cell - 1) for cell in cells], 1)
    assert extractor(images) == pytest.approx(F.normalize(expected, dim=1).numpy(), abs=1e-6)
    assert extractor.name == f"scenes:{SCENES}"


def test_features_of_scenes_are_of_scenes_alone() -> None:
    with pytest.raises(ConfigError, match="sees scenes of 64 x 64 pixels, not 32 x 32"):
        load_extractor("scenes", SCENES)(torch.rand(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="brings its own weights"):
        load_extractor("scenes", SCENES, "laion2b")
    with pytest.raises(ConfigError, match="no detector of scenes but 'clip'"):
        load_extractor("scenes", "assets/tiny_scenes_clip")


def test_features_of_scenes_have_a_gradient_without_rounding() -> None:
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    load_extractor("scenes", SCENES, eight_bit=False).differentiable(images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
