"""Features against each library's own preprocessing and encoder, on random networks; folders of images."""

from __future__ import annotations

import json
import shutil
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
from huggingface_hub import constants
from open_clip import pretrained as open_clip_pretrained
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitImageProcessor, CLIPProcessor, Dinov2Config, Dinov2Model

from flow_grpo.errors import ConfigError
from flow_grpo.rewards.clip import ClipScorer
from flow_grpo.rewards.image_path import ImagePath
from scripts.diversity_metrics.features import (
    EXTRACTORS,
    FeatureExtractor,
    load_extractor,
    load_pixels,
    read_images,
)

SIDE = 32  # pixels of the input of CLIP and open_clip
SIZES = [(32, 32), (64, 64), (20, 20), (32, 48), (45, 40), (40, 72), (65, 64), (100, 300)]  # height, width
PREPROCESS: dict[str, Any] = {"size": SIDE, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
PIXEL_LEVEL = 1.01 / 255  # the most by which a pixel may differ from the library's: one level of 8 bits
PARITY = 2e-3  # the most by which a feature may, as a distance; its length is 1


def make_images(height: int, width: int, count: int = 6, seed: int = 0) -> Tensor:
    """Half noise, half smooth; whole multiples of 1/255."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count // 2, 3, height, width, generator=generator)
    coarse = torch.rand(count - count // 2, 3, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (torch.cat([noise, smooth]) * 255).round() / 255


def to_pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]


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
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7, layerscale_value=0.5
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
    print("FEAT", kind, size, distance(features, expected), spread(expected))
    assert distance(features, expected) < PARITY
    assert spread(expected) > 20 * PARITY


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_open_clip_pixels_are_the_librarys_to_one_level(size: tuple[int, int], interpolation: str, mode: str) -> None:
    numbers: dict[str, Any] = {**PREPROCESS, "interpolation": interpolation, "resize_mode": mode}
    transform = image_transform_v2(PreprocessCfg(**numbers), is_train=False)
    images = make_images(*size)
    expected = torch.stack([transform(image) for image in to_pil(images)])
    pixels = replace(ImagePath.from_open_clip(numbers, "x"), eight_bit=True)(images)
    d = ((pixels - expected).abs() * torch.tensor(numbers["std"]).view(3, 1, 1))
    print("PIX", mode, interpolation, size, d.max().item() * 255, (d > 1e-4).float().mean().item())
    assert d.max() < PIXEL_LEVEL
