"""From images to the network's pixels: as the library does it, differentiable, and refused where it cannot be."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPProcessor

from flow_grpo.errors import ConfigError
from flow_grpo.rewards.building import build_reward
from flow_grpo.rewards.clip import ClipScorer, PickScore
from flow_grpo.rewards.image_path import ImagePath, check_images
from flow_grpo.rewards.jpeg import JpegCompressibility
from tests.pictures import make_images, to_pil
from tests.rewards.scoring import NO_METADATA, SIDE, make_config, pillow_path

SIZES = [(32, 32), (64, 64), (20, 20), (32, 48), (48, 32), (40, 72), (65, 64)]  # same, down, up; the rest is cropped
# The most by which a PickScore may differ, over all texts, from one read through the library's 8-bit processor.
# Such scores spread by 0.3 over these images; a path without antialiasing differs by 0.3.
PARITY = 0.012


def feature_distance(scorer: ClipScorer, pixels: Tensor, images: Tensor) -> float:
    """The most by which the PickScore of `images` can differ, over all texts, from that of vision inputs `pixels`."""
    with torch.no_grad():
        pooled = scorer.model.vision_model(pixel_values=pixels).pooler_output
        reference = F.normalize(scorer.model.visual_projection(pooled), dim=-1)
        distance = (scorer.image_features(images) - reference).norm(dim=-1).max().item()
    return distance * 100 / 26


# --- the image path ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_image_path_equals_pillow_on_floats(scorer: ClipScorer, size: tuple[int, int]) -> None:
    images = make_images(*size)
    expected = np.stack([pillow_path(image) for image in images])
    np.testing.assert_allclose(scorer.image_path(images).double().numpy(), expected, atol=5e-6)


def test_image_path_without_antialias_or_bicubic_is_another(scorer: ClipScorer) -> None:
    images = make_images(64, 64)
    expected = scorer.image_path(images)
    for mode, antialias in (("bicubic", False), ("bilinear", True)):
        twin = F.interpolate(images, (SIDE, SIDE), mode=mode, align_corners=False, antialias=antialias) * 2 - 1
        assert (twin - expected).abs().max() > 0.1


@pytest.mark.parametrize("size", SIZES)
def test_score_equals_that_of_the_library_processor(scorer: ClipScorer, checkpoint: str, size: tuple[int, int]) -> None:
    images = make_images(*size)
    processor = CLIPProcessor.from_pretrained(checkpoint)
    pixels = processor.image_processor(to_pil(images), return_tensors="pt").pixel_values
    assert feature_distance(scorer, pixels, images) < (PARITY if min(size) != SIDE else 1e-5)


def test_score_without_antialias_breaks_the_parity_bound(scorer: ClipScorer, checkpoint: str) -> None:
    images = make_images(64, 64)
    processor = CLIPProcessor.from_pretrained(checkpoint)
    pixels = processor.image_processor(to_pil(images), return_tensors="pt").pixel_values
    twin = F.interpolate(images, (SIDE, SIDE), mode="bicubic", align_corners=False).clamp(0, 1)
    assert feature_distance(scorer, pixels, twin) > 5 * PARITY


def test_old_and_new_processor_files_give_one_path() -> None:
    numbers = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    old = ImagePath.from_dict({**numbers, "size": 224, "crop_size": 224}, "old")
    new = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "resample": 3}
    assert old == ImagePath.from_dict({**numbers, **new}, "new")
    assert old == ImagePath(224, (224, 224), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"resample": 0}, "the image processor of 'x' has resample = 0; it must be 2 or 3."),
        (
            {"do_center_crop": False},
            "the image processor of 'x' has size = 224 and no crop; it must have a height and a width.",
        ),
        ({"do_resize": False}, "the image processor of 'x' has do_resize = False; it must be True."),
        (
            {"crop_size": 256},
            (
                "the image processor of 'x' has size = 224 and crop_size = 256; "
                "it must resize the shortest edge to at least the crop."
            ),
        ),
    ],
)
def test_unknown_image_processors_are_refused(change: dict, sentence: str) -> None:
    numbers = {"size": 224, "crop_size": 224, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with pytest.raises(ConfigError) as error:
        ImagePath.from_dict({**numbers, **change}, "x")
    assert str(error.value) == sentence


# --- gradients --------------------------------------------------------------------------------------------


def double_scorer(checkpoint: str) -> ClipScorer:
    scorer = ClipScorer(checkpoint)
    scorer.model.double()
    return scorer


def score_gradient(reward: PickScore, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    reward(images, ["a sneaker"] * len(images), NO_METADATA * len(images)).sum().backward()
    assert images.grad is not None
    return images.grad


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (20, 20)])
def test_gradient_reaches_every_pixel_and_equals_finite_differences(checkpoint: str, size: tuple[int, int]) -> None:
    reward = PickScore(double_scorer(checkpoint))
    images = 0.1 + 0.8 * make_images(*size, count=1).double()
    gradient = score_gradient(reward, images)[0].flatten()
    assert gradient.abs().min() > 0

    step = 1e-4
    pixels = torch.randperm(gradient.numel(), generator=torch.Generator().manual_seed(1))[:40]
    nudges = step * F.one_hot(pixels, gradient.numel()).double().view(-1, *images.shape[1:])
    prompts, metadata = ["a sneaker"] * len(pixels), NO_METADATA * len(pixels)
    difference = reward(images + nudges, prompts, metadata) - reward(images - nudges, prompts, metadata)
    torch.testing.assert_close(
        gradient[pixels], difference / (2 * step), rtol=1e-4, atol=1e-6 * gradient.abs().max().item()
    )


def test_gradient_of_a_wide_image_is_its_centre_crop(checkpoint: str) -> None:
    gradient = score_gradient(PickScore(double_scorer(checkpoint)), 0.1 + 0.8 * make_images(32, 48).double())
    assert gradient[..., 8:40].abs().min() > 0
    assert gradient[..., :8].abs().max() == gradient[..., 40:].abs().max() == 0


def test_white_and_black_images_have_a_gradient(checkpoint: str) -> None:
    images = torch.stack([torch.ones(3, 64, 64), torch.zeros(3, 64, 64)])
    assert score_gradient(PickScore(ClipScorer(checkpoint)), images).abs().min() > 0


def test_gradient_leaves_the_weights_alone(scorer: ClipScorer) -> None:
    score_gradient(PickScore(scorer), make_images(32, 32))
    assert not scorer.model.training
    for parameter in scorer.model.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert parameter.dtype == torch.float32


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (torch.zeros(3, 8, 8), "got torch.float32 of shape (3, 8, 8)"),
        (torch.zeros(2, 8, 8, 3), "got torch.float32 of shape (2, 8, 8, 3)"),
        (torch.zeros(0, 3, 8, 8), "got torch.float32 of shape (0, 3, 8, 8)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "got torch.uint8 of shape (2, 3, 8, 8)"),
    ],
)
def test_other_shapes_are_refused_with_their_numbers(images: Tensor, sentence: str) -> None:
    expected = f"a reward takes float images of shape (B, 3, H, W), {sentence}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        check_images(images)


def test_other_ranges_and_counts_are_refused_with_their_numbers(scorer: ClipScorer, checkpoint: str) -> None:
    images = torch.linspace(-1, 1.5, 3 * 64).view(1, 3, 8, 8)
    for reward in (PickScore(scorer), JpegCompressibility()):
        with pytest.raises(ValueError, match=r"^a reward takes images in \[0, 1\], got values from -1.0 to 1.5$"):
            reward(images, ["a bag"], [{}])
    with pytest.raises(ValueError, match=r"^each image needs its text, got 4 images and 1 texts$"):
        PickScore(scorer)(make_images(32, 32), ["a bag"], [{}])
    weighted = build_reward(make_config(checkpoint, jpeg_compressibility=1.0), "cpu")
    with pytest.raises(ValueError, match=r"got 4 images, 3 prompts and 4 metadata$"):
        weighted(make_images(32, 32), ["a bag"] * 3, NO_METADATA * 4)
