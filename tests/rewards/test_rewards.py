"""MATH.md section 7, on a CLIP with random weights and the factor 100 of the real ones."""

from __future__ import annotations

import io
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from config.base import get_config
from flow_grpo.errors import ConfigError
from flow_grpo.rewards import build_reward, clip, validate_rewards
from flow_grpo.rewards.clip import ClipScore, ClipScorer, PickScore
from flow_grpo.rewards.image_path import ImagePath, check_images
from flow_grpo.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from scripts.tiny.models import build_clip
from tests.pictures import make_images, to_pil

SIDE = 32  # pixels of the tiny CLIP's input
SIZES = [(32, 32), (64, 64), (20, 20), (32, 48), (48, 32), (40, 72), (65, 64)]  # same, down, up; the rest is cropped
NO_METADATA: list[dict[str, Any]] = [{}]
# The most by which a PickScore may differ, over all texts, from one read through the library's 8-bit processor.
# Such scores spread by 0.3 over these images; a path without antialiasing differs by 0.3.
PARITY = 0.012


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    model, processor = build_clip(0)
    model.logit_scale.data.fill_(math.log(100))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def scorer(checkpoint: str) -> ClipScorer:
    return ClipScorer(checkpoint)


def pillow_path(image: Tensor, mean: float = 0.5, std: float = 0.5) -> np.ndarray:
    """The image path by Pillow on float channels: (3, H, W) -> (3, SIDE, SIDE), float64."""
    height, width = image.shape[1:]
    short = min(height, width)
    target = (SIDE * width // short, SIDE * height // short)
    left, top = (target[0] - SIDE) // 2, (target[1] - SIDE) // 2
    channels = [Image.fromarray(channel.numpy()).resize(target, Image.Resampling.BICUBIC) for channel in image]
    cropped = [channel.crop((left, top, left + SIDE, top + SIDE)) for channel in channels]
    return (np.stack([np.asarray(channel, dtype=np.float64) for channel in cropped]) - mean) / std


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
        ({"resample": 2}, "the image processor of 'x' has resample = 2; it must be 3."),
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


# --- the CLIP scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "divisor"), [(PickScore, 26.0), (ClipScore, 30.0)])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (40, 72)])
def test_score_equals_the_library_in_float64(
    scorer: ClipScorer, checkpoint: str, kind: type, divisor: float, size: tuple[int, int]
) -> None:
    images, prompts = (make_images(*size), ["a red sneaker", "a bag", "", "a dress " * 20])
    model: torch.nn.Module = CLIPModel.from_pretrained(checkpoint).double()
    text = CLIPProcessor.from_pretrained(checkpoint).tokenizer(
        prompts, padding=True, truncation=True, return_tensors="pt"
    )
    pixels = torch.from_numpy(np.stack([pillow_path(image) for image in images]))
    with torch.no_grad():
        expected = model(**text, pixel_values=pixels).logits_per_image.diagonal() / divisor
        scores = kind(scorer)(images, prompts, NO_METADATA * 4)
    assert scores.shape == (4,)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=2e-5)
    assert expected.std() > 1e-3  # the prompts and images are told apart by far more than the tolerance


def test_features_have_unit_length(scorer: ClipScorer) -> None:
    for features in (scorer.image_features(make_images(32, 32)), scorer.text_features(["a bag", "a coat"])):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(features)))


def test_scores_ignore_autocast(scorer: ClipScorer, checkpoint: str) -> None:
    images, prompts = make_images(32, 32), ["a bag"] * 4
    with torch.autocast("cpu", torch.bfloat16):
        inside = ClipScorer(checkpoint).logits(images, prompts)
    assert torch.equal(inside, scorer.logits(images, prompts))


def test_text_features_do_not_depend_on_the_texts_beside_them(checkpoint: str) -> None:
    together = ClipScorer(checkpoint).text_features(["a bag", "a very long red sneaker", "a coat"])
    assert torch.equal(ClipScorer(checkpoint).text_features(["a coat"])[0], together[2])


def test_texts_are_encoded_once_and_the_cache_is_bounded(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "TEXT_CACHE_SIZE", 2)
    scorer, calls = ClipScorer(checkpoint), []
    scorer.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    assert not scorer.text_features(["a", "b", "a", "b"]).requires_grad
    assert len(calls) == 2
    scorer.text_features(["c"])  # drops "a"
    scorer.text_features(["b", "c"])
    assert len(calls) == 3
    scorer.text_features(["a"])
    assert len(calls) == 4


def test_a_checkpoint_without_processor_uses_the_one_named_for_it(
    scorer: ClipScorer, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(checkpoint, name), tmp_path)
    monkeypatch.setitem(clip.PROCESSORS, str(tmp_path), checkpoint)
    images = make_images(32, 32)
    assert torch.equal(ClipScorer(str(tmp_path)).logits(images, ["a bag"] * 4), scorer.logits(images, ["a bag"] * 4))


def test_a_checkpoint_that_lacks_a_weight_is_refused(checkpoint: str, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError) as error:
        ClipScorer(str(folder))
    assert str(error.value) == f"'{folder}' is not a whole CLIP checkpoint; it lacks visual_projection.weight."


def test_a_nan_image_makes_only_its_own_score_nan(scorer: ClipScorer) -> None:
    images = make_images(32, 32)
    images[1, 0, 3, 3] = math.nan
    for reward in (PickScore(scorer), JpegCompressibility()):
        assert reward(images, ["a bag"] * 4, NO_METADATA * 4).isnan().tolist() == [False, True, False, False]


# --- JPEG ---------------------------------------------------------------------------------------------------


def test_jpeg_size_is_the_file_that_pillow_writes(tmp_path: Path) -> None:
    images = make_images(48, 64)
    expected = []
    for image in to_pil(images):
        image.save(tmp_path / "image.jpg", quality=95)
        expected.append((tmp_path / "image.jpg").stat().st_size / 1000)
    sizes = JpegIncompressibility()(images, [""] * 4, NO_METADATA * 4)
    assert sizes.dtype == torch.float32
    torch.testing.assert_close(sizes, torch.tensor(expected), rtol=1e-7, atol=0)
    assert torch.equal(JpegCompressibility()(images, [""] * 4, NO_METADATA * 4), -sizes)

    buffer = io.BytesIO()
    to_pil(images)[0].save(buffer, format="JPEG", quality=90)
    assert buffer.tell() / 1000 < 0.9 * expected[0]  # another quality is another reward


def test_jpeg_size_grows_with_noise() -> None:
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = torch.stack([0.5 + amplitude * (noise - 0.5) for amplitude in (0.0, 0.1, 0.3, 1.0)])
    assert JpegIncompressibility()(images, [""] * 4, NO_METADATA * 4).diff().min() > 0.1


# --- the weighted sum -----------------------------------------------------------------------------------------


def make_config(checkpoint: str, **weights: float) -> ConfigDict:
    config = get_config()
    config.reward_fn.update(weights)
    config.reward_model.pickscore = config.reward_model.clipscore = config.eval.judge = checkpoint
    return config


def test_total_is_the_weighted_sum_of_the_terms(scorer: ClipScorer, checkpoint: str) -> None:
    config = make_config(checkpoint, pickscore=0.5, clipscore=-2.0, jpeg_compressibility=0.1)
    images, prompts = make_images(32, 32), ["a bag", "a coat", "a red dress", "a shirt"]
    reward = build_reward(config, "cpu")(images, prompts, NO_METADATA * 4)
    assert set(reward.terms) == {"pickscore", "clipscore", "jpeg_compressibility"}
    logits, kilobytes = (scorer.logits(images, prompts), JpegIncompressibility()(images, prompts, NO_METADATA * 4))
    torch.testing.assert_close(reward.terms["pickscore"], logits / 26)
    torch.testing.assert_close(reward.total, 0.5 * logits / 26 - 2 * logits / 30 - 0.1 * kilobytes)
    assert reward.total.dtype == torch.float32


def test_rewards_with_one_checkpoint_share_one_scorer(checkpoint: str, tmp_path: Path) -> None:
    config = make_config(checkpoint, pickscore=1.0, clipscore=1.0)
    models = build_reward(config, "cpu").models
    assert models["pickscore"].scorer is models["clipscore"].scorer  # type: ignore[attr-defined]
    config.reward_model.clipscore = str(shutil.copytree(checkpoint, tmp_path / "other"))
    models = build_reward(config, "cpu").models
    assert models["pickscore"].scorer is not models["clipscore"].scorer  # type: ignore[attr-defined]


def test_evaluation_measures_more_rewards_and_the_same_total(checkpoint: str) -> None:
    config = make_config(checkpoint, pickscore=0.5)
    config.eval.rewards = ("jpeg_compressibility", "pickscore")
    reward, arguments = (build_reward(config, "cpu"), (make_images(32, 32), ["a bag"] * 4, NO_METADATA * 4))
    assert list(reward(*arguments).terms) == ["pickscore"]
    assert list(reward.evaluate(*arguments).terms) == ["pickscore", "jpeg_compressibility"]
    assert torch.equal(reward(*arguments).total, reward.evaluate(*arguments).total)


def test_rewards_without_weight_are_not_loaded(checkpoint: str) -> None:
    config = make_config(checkpoint, jpeg_incompressibility=1.0)
    config.reward_model.pickscore = "assets/none"
    validate_rewards(config)
    assert list(build_reward(config, "cpu").models) == ["jpeg_incompressibility"]


# --- bad input --------------------------------------------------------------------------------------------------

ALL = "clipscore, jpeg_compressibility, jpeg_incompressibility, pickscore"


def unlocked(config: ConfigDict) -> None:
    with config.unlocked():
        config.reward_fn.pikscore = 1.0


def set_values(**values: object) -> Callable[[ConfigDict], None]:
    return lambda config: config.update_from_flattened_dict({key.replace("__", "."): v for key, v in values.items()})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (unlocked, f"config.reward_fn.pikscore is not a reward; the nearest is pickscore (there are {ALL})."),
        (
            set_values(reward_fn__pickscore=0.0),
            (
                f"config.reward_fn has no weight other than 0; give one to any of {ALL}, "
                "as in --config.reward_fn.pickscore=1."
            ),
        ),
        (
            set_values(reward_fn__clipscore=math.nan),
            "config.reward_fn.clipscore = nan is not a weight; it takes a finite number.",
        ),
        (
            set_values(reward_fn__clipscore=-math.inf),
            "config.reward_fn.clipscore = -inf is not a weight; it takes a finite number.",
        ),
        (
            set_values(use_reward_gradient=True, reward_fn__jpeg_compressibility=0.5),
            (
                "config.reward_fn.jpeg_compressibility = 0.5 has no gradient, which config.use_reward_gradient = True "
                "needs; the differentiable rewards are clipscore, pickscore."
            ),
        ),
        (
            set_values(eval__rewards=("clipscor",)),
            (
                "config.eval.rewards = ('clipscor',): 'clipscor' is not a reward; the nearest is clipscore "
                f"(there are {ALL})."
            ),
        ),
        (
            set_values(reward_model__pickscore="assets/none"),
            (
                "config.reward_model.pickscore = 'assets/none' is not a directory; "
                "it takes the directory or hub id (org/name) of a checkpoint."
            ),
        ),
        (
            set_values(reward_model__pickscore="tests/none"),
            (
                "config.reward_model.pickscore = 'tests/none' is not a directory; "
                "it takes the directory or hub id (org/name) of a checkpoint."
            ),
        ),
        (
            set_values(eval__judge="~/no such folder"),
            (
                "config.eval.judge = '~/no such folder' is not a directory; "
                "it takes the directory or hub id (org/name) of a checkpoint."
            ),
        ),
        (
            set_values(reward_model__pickscore=""),
            "config.reward_model.pickscore is empty; it takes the directory or hub id (org/name) of a checkpoint.",
        ),
    ],
)
def test_each_mistake_has_its_sentence(
    checkpoint: str, change: Callable[[ConfigDict], None], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    config = make_config(checkpoint, pickscore=1.0)
    change(config)
    with pytest.raises(ConfigError) as error:
        validate_rewards(config)
    assert str(error.value) == sentence


def test_hub_ids_no_judge_and_unused_black_boxes_pass(checkpoint: str) -> None:
    config = make_config(checkpoint, pickscore=1.0)
    config.reward_model.pickscore = "yuvalkirstain/PickScore_v1"
    config.eval.judge = ""
    config.use_reward_gradient = True
    config.eval.rewards = ("jpeg_compressibility",)
    validate_rewards(config)


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


def test_the_registry_loads_no_heavy_library() -> None:
    code = "import sys, flow_grpo.rewards; sys.exit(bool({'torch', 'transformers', 'PIL'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_folder_that_holds_no_clip_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded as a CLIP"):
        ClipScorer(str(tmp_path))
