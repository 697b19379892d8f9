"""MATH.md section 7: the scores of a CLIP."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

from flow_grpo.errors import ConfigError
from flow_grpo.rewards import clip, towers
from flow_grpo.rewards.clip import ClipScore, ClipScorer, PickScore
from flow_grpo.rewards.jpeg import JpegCompressibility
from tests.pictures import make_images
from tests.rewards.scoring import NO_METADATA, pillow_path


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
    monkeypatch.setattr(towers, "TEXT_CACHE_SIZE", 2)
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


# --- dtype, and where the weights are ---------------------------------------------------------------------

ROUNDING = {
    "rtol": 1e-4,
    "atol": 1e-5,
}  # float32: a copy may lie otherwise in memory, and be multiplied by another kernel


def gradient_of(scorer: ClipScorer, before_backward=lambda: None) -> tuple[torch.Tensor, torch.Tensor]:
    images = make_images(32, 32).requires_grad_()
    scores = scorer.logits(images, ["a bag", "a boot", "a coat", "a bag"])
    before_backward()
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    return scores.detach(), gradient


def zero(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter)


def test_offloaded_weights_give_the_same_scores_and_gradients(scorer: ClipScorer, checkpoint: str) -> None:
    for kept, offloaded in zip(gradient_of(scorer), gradient_of(ClipScorer(checkpoint, offload=True)), strict=True):
        torch.testing.assert_close(offloaded, kept, **ROUNDING)


def test_an_offloaded_model_has_its_own_weights_back_after_every_use(checkpoint: str) -> None:
    offloaded, inside = ClipScorer(checkpoint, offload=True), []
    before = list(offloaded.model.parameters())
    offloaded.model.vision_model.register_forward_hook(lambda module, *_: inside.extend(module.parameters()))
    offloaded.logits(make_images(32, 32), ["a bag"] * 4)
    assert all(a is b for a, b in zip(before, offloaded.model.parameters(), strict=True))
    assert not {id(tensor) for tensor in inside} & {id(tensor) for tensor in before}


def test_the_graph_keeps_the_copies_that_its_backward_pass_needs(scorer: ClipScorer, checkpoint: str) -> None:
    _, right = gradient_of(scorer)
    offloaded, in_place = ClipScorer(checkpoint, offload=True), ClipScorer(checkpoint)
    _, found = gradient_of(offloaded, lambda: zero(offloaded.model))
    _, broken = gradient_of(in_place, lambda: zero(in_place.model))  # weights that have left before the backward pass
    torch.testing.assert_close(found, right, **ROUNDING)
    assert (broken - right).abs().max() > 0.01 * right.abs().max()


def test_bf16_scores_are_float32_and_differ_by_its_rounding(scorer: ClipScorer, checkpoint: str) -> None:
    half = ClipScorer(checkpoint, dtype="bf16")
    assert {parameter.dtype for parameter in half.model.vision_model.parameters()} == {torch.bfloat16}
    assert torch.equal(half.logit_scale, scorer.logit_scale)
    (scores, gradient), (exact, exact_gradient) = gradient_of(half), gradient_of(scorer)
    assert scores.dtype == gradient.dtype == torch.float32
    assert not torch.equal(scores, exact)
    torch.testing.assert_close(scores / 100, exact / 100, rtol=0, atol=4 * 2**-8)  # cosines; bf16 has 8 bits
    assert torch.cosine_similarity(gradient.flatten(), exact_gradient.flatten(), dim=0) > 0.99
