"""Scenes judged by rule over a detector, and the soft reward of the same detector."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flow_grpo.errors import ConfigError
from flow_grpo.prompts import PromptDataset
from flow_grpo.randomness import keyed_generator
from flow_grpo.rewards.scenes import MIXED, Scenes, SceneScorer, SoftScenes
from flow_grpo.scenes.captions import KINDS, Caption, captions_of, is_held_out, parse
from flow_grpo.scenes.detector import EMPTY, CellDetector, Cells, join_cells, readings, split_cells
from scripts.scenes import data as scene_data
from scripts.tiny.data import Photographs
from tests.rewards.scoring import NO_METADATA

ASSETS = Path(__file__).parents[2] / "assets"
DETECTORS = ("tiny_scenes_detector", "tiny_scenes_judge")


@pytest.fixture(scope="module")
def photographs() -> Photographs:
    """One of each class."""
    with Image.open(ASSETS / "tiny_scenes_detector" / "garments.png") as picture:
        row = torch.from_numpy(np.array(picture))  # (32, 320)
    return Photographs(row.unflatten(1, (10, 32)).transpose(0, 1).contiguous(), torch.arange(10))


@pytest.fixture(scope="module")
def random_scorer(tmp_path_factory: pytest.TempPathFactory) -> SceneScorer:
    """A small detector with random weights."""
    folder = tmp_path_factory.mktemp("detector")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CellDetector([4, 6], [3, 3]).save(folder)
    return SceneScorer(str(folder))


def drawings(captions: list[Caption], photographs: Photographs, seed: int) -> Tensor:
    scenes = scene_data.draw(captions, photographs, keyed_generator(seed, "drawings"))
    return scene_data.render(scenes, photographs)


def some_captions(kind: str, count: int) -> list[Caption]:
    return scene_data.choose(captions_of(kind), count, "tested", kind)


def score(scorer: SceneScorer, images: Tensor, captions: list[Caption]) -> Tensor:
    return Scenes(scorer)(images, [caption.text for caption in captions], NO_METADATA * len(captions))


# --- right or wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("kind", KINDS)
def test_drawings_made_by_rule_are_right(name, kind, photographs):
    captions = some_captions(kind, 100)
    scores = score(SceneScorer(str(ASSETS / name)), drawings(captions, photographs, 0), captions)
    assert scores.mean() >= 0.99
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("kind", ["position", "binding"])
def test_swapped_sides_and_swapped_colours_are_wrong(name, kind, photographs):
    """The broken twin of a caption names the same garments, and the same colours, the other way round."""
    captions = some_captions(kind, 100)
    twins = []
    for caption in captions:
        (one, other), relation = caption.garments, caption.relation
        if kind == "binding":
            one, other = type(one)(one.label, other.colour), type(one)(other.label, one.colour)
        else:
            one, other = other, one
        twins.append(Caption(kind, (one, other), relation))
    scorer = SceneScorer(str(ASSETS / name))
    assert score(scorer, drawings(twins, photographs, 1), captions).mean() <= 0.01
    assert score(scorer, drawings(twins, photographs, 1), twins).mean() >= 0.99


@pytest.mark.parametrize("name", DETECTORS)
def test_one_object_too_many_or_too_few_is_wrong(name, photographs):
    captions = some_captions("count", 30)
    fewer = [Caption("single" if len(c.garments) == 2 else "count", c.garments[1:]) for c in captions]
    scorer = SceneScorer(str(ASSETS / name))
    assert score(scorer, drawings(fewer, photographs, 2), captions).mean() <= 0.01
    assert score(scorer, drawings(captions, photographs, 2), fewer).mean() <= 0.01


def test_cells_are_read_in_the_order_of_the_grid():
    images = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    cells = split_cells(images)
    assert torch.equal(cells[1], images[0, :, :4, 4:])
    assert torch.equal(cells[6], images[1, :, 4:, :4])
    assert torch.equal(join_cells(cells), images)


def test_the_most_probable_class_and_colour_are_read():
    labels, colours = torch.full((1, 4, 11), -9.0), torch.full((1, 4, 8), -9.0)
    for cell, (label, colour) in enumerate([(EMPTY, 3), (2, 7), (9, 0), (EMPTY, 0)]):
        labels[0, cell, label] = colours[0, cell, colour] = 0
    empty, second, third, last = readings(Cells(labels, colours))[0]
    assert empty is None
    assert last is None
    assert (second.label, second.colour, third.label, third.colour) == (2, 7, 9, 0)


def test_an_image_with_nan_has_no_verdict(random_scorer):
    images = torch.rand(2, 3, 64, 64)
    images[1, 0, 0, 0] = math.nan
    scores = Scenes(random_scorer)(images, ["a dress"] * 2, NO_METADATA * 2)
    assert scores.isnan().tolist() == [False, True]


@pytest.mark.parametrize("reward", [Scenes, SoftScenes])
def test_what_cannot_be_scored_is_refused(reward, random_scorer):
    with pytest.raises(ValueError, match="64 x 64 pixels, got 32 x 32"):
        reward(random_scorer)(torch.rand(1, 3, 32, 32), ["a dress"], NO_METADATA)
    with pytest.raises(ConfigError, match="not a caption of a scene"):
        reward(random_scorer)(torch.rand(1, 3, 64, 64), ["a photo of a dress"], NO_METADATA)


# --- soft -----------------------------------------------------------------------------------------------------


def reference(cells: Cells, caption: Caption) -> float:
    """Over every picture of four cells with the caption's garments: the largest probability that satisfies it."""
    labels = (1 - MIXED) * cells.labels[0].exp() + MIXED / 11
    colours = (1 - MIXED) * cells.colours[0].exp() + MIXED / 8
    best = 0.0
    for places in itertools.permutations(range(4), len(caption.garments)):
        rows, columns = [place // 2 for place in places], [place % 2 for place in places]
        if caption.relation == "left of" and columns != [0, 1]:
            continue
        if caption.relation == "above" and rows != [0, 1]:
            continue
        product = 1.0
        for cell in range(4):
            if cell not in places:
                product *= labels[cell, EMPTY].item()
                continue
            garment = caption.garments[places.index(cell)]
            product *= labels[cell, garment.label].item()
            product *= 1 if garment.colour is None else colours[cell, garment.colour].item()
        best = max(best, product)
    return math.log(best)


@pytest.mark.parametrize("kind", KINDS)
def test_the_soft_reward_is_the_best_reading_in_float64(kind, random_scorer):
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    captions = some_captions(kind, 5)
    scorer = in_float64(random_scorer)
    scores = SoftScenes(scorer)(images, [caption.text for caption in captions], NO_METADATA * 5)
    for image, caption, found in zip(images, captions, scores, strict=True):
        assert found.item() == pytest.approx(reference(scorer.cells(image[None]), caption), abs=1e-9)


def in_float64(scorer: SceneScorer) -> SceneScorer:
    """A sharper detector, so that the readings differ, in double precision."""
    copy = SceneScorer.__new__(SceneScorer)
    copy.device = scorer.device
    copy.detector = CellDetector(**scorer.detector.shape)
    copy.detector.load_state_dict(scorer.detector.state_dict())
    copy.detector.label.weight.data *= 20
    copy.detector.colour.weight.data *= 20
    copy.detector.double().eval().requires_grad_(False)
    return copy


@pytest.mark.parametrize("text", ["a dress", "two boots", "a red dress", "a dress left of a boot"])
def test_its_gradient_is_that_of_finite_differences(text, random_scorer):
    generator = torch.Generator().manual_seed(2)
    image = (0.1 + 0.8 * torch.rand(1, 3, 64, 64, generator=generator)).double().requires_grad_()
    reward = SoftScenes(in_float64(random_scorer))

    def value(at: Tensor) -> Tensor:
        return reward(at, [text], NO_METADATA)[0]

    (gradient,) = torch.autograd.grad(value(image), image)
    for _ in range(3):
        direction = torch.randn(image.shape, generator=generator).double()
        step = 1e-6
        with torch.no_grad():
            change = (value(image + step * direction) - value(image - step * direction)) / (2 * step)
        assert change.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", DETECTORS)
def test_the_soft_reward_prefers_what_is_right(name, photographs):
    captions = some_captions("binding", 50)
    texts = [caption.text for caption in captions]
    reward = SoftScenes(SceneScorer(str(ASSETS / name)))
    right = reward(drawings(captions, photographs, 3), texts, NO_METADATA * 50)
    wrong = reward(drawings(captions[1:] + captions[:1], photographs, 3), texts, NO_METADATA * 50)
    assert (right > wrong).all()
    assert wrong.min() >= 4 * math.log(MIXED / 11) + 2 * math.log(MIXED / 8)  # each term has its floor
    assert right.max() <= 0


# --- files ----------------------------------------------------------------------------------------------------


def test_a_saved_detector_sees_as_before(tmp_path):
    detector = CellDetector([4, 6, 8], [5, 3, 3], "relu", "maximum").eval()
    detector.half().float().save(tmp_path)
    images = torch.rand(3, 3, 64, 64)
    for before, after in zip(detector(images), CellDetector.load(str(tmp_path))(images), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "shape"])
def test_a_folder_without_a_detector_is_one_sentence(tmp_path, broken):
    CellDetector([4], [3]).save(tmp_path)
    if broken == "shape":
        (tmp_path / "config.json").write_text('{"widths": [5], "kernels": [3]}')
    else:
        (tmp_path / broken).unlink()
    with pytest.raises(ConfigError, match="cannot be loaded as a detector of scenes") as error:
        CellDetector.load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_captions_of_the_prompt_files_are_understood_and_apart():
    found = {}
    for name in ("train", "test"):
        dataset = PromptDataset.load(str(ASSETS / "prompts" / "scenes" / f"{name}.jsonl"))
        captions = [parse(prompt) for prompt in dataset.prompts]
        assert [caption.kind for caption in captions] == [line["kind"] for line in dataset.metadata]
        assert {caption.kind for caption in captions} == set(KINDS)
        found[name] = [caption for caption in captions if caption.kind != "single"]
    assert all(is_held_out(caption) for caption in found["test"])
    assert not any(is_held_out(caption) for caption in found["train"])
