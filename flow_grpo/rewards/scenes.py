"""Scenes scored by rule over a detector of each cell: right or wrong, and the log-probability of being right.

`Scenes` is GenEval in small (arXiv 2310.11513): 1 if what the detector sees satisfies the caption, else 0; there is no
gradient. `SoftScenes` has one: the log-probability, by the same detector, of the most probable of the caption's
readings,

    max_r  sum_c  log p_c(r_c),    p_c(class and colour) = p(class) p(colour | not empty),

where a colour that the caption leaves open counts for nothing. Each probability p is mixed with the uniform one,
(1 - MIXED) p + MIXED / n of n choices, so a cell that is plainly wrong costs no more than log(n / MIXED).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from flow_grpo.rewards.clip import ClipScore
from flow_grpo.rewards.image_path import check_images
from flow_grpo.rewards.registry import Metadata
from flow_grpo.scenes.captions import Reading, parse
from flow_grpo.scenes.detector import EMPTY, CellDetector, Cells, readings
from flow_grpo.scenes.files import RESOLUTION

MIXED = 0.02  # the weight of the uniform distribution
OPEN = -1  # a colour that a reading leaves open


class SceneScorer:
    """A frozen detector on a device; gradient flows to the images."""

    def __init__(
        self, model: str, device: torch.device | str = "cpu", *, dtype: str = "fp32", offload: bool = False
    ) -> None:
        """Load a folder; ConfigError if it holds no detector.

        `dtype` and `offload` are what any scorer is told; a detector is half a megabyte, and stays on the device in
        float32.
        """
        self.device = torch.device(device)
        self.detector = CellDetector.load(model).to(self.device)

    def cells(self, images: Tensor) -> Cells:
        """What is in the cells of scenes (B, 3, 64, 64) float in [0, 1]; ValueError for other images."""
        check_images(images, "a reward of scenes")
        if images.shape[-2:] != (RESOLUTION, RESOLUTION):
            height, width = images.shape[-2:]
            raise ValueError(f"a reward of scenes takes images of 64 x 64 pixels, got {height} x {width}")
        dtype = torch.promote_types(next(self.detector.parameters()).dtype, torch.float32)
        with torch.autocast(self.device.type, enabled=False):
            return self.detector(images.to(self.device, dtype))


class Scenes:
    """1 where the picture shows what the caption says and nothing else, 0 elsewhere."""

    name = "scenes"
    differentiable = False

    def __init__(self, scorer: SceneScorer) -> None:
        self.scorer = scorer

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Scenes (B, 3, 64, 64) float in [0, 1], B captions -> (B,) float32; NaN for an image with NaN."""
        cells = self.scorer.cells(images)
        right = [parse(prompt).is_satisfied(seen) for prompt, seen in zip(prompts, readings(cells), strict=True)]
        scores = torch.tensor(right, dtype=torch.float32, device=cells.labels.device)
        return scores.masked_fill(cells.labels.isnan().flatten(1).any(1), math.nan)


class SoftScenes:
    """The log-probability of the most probable reading that satisfies the caption; at most 0."""

    name = "scenes_soft"
    differentiable = True

    def __init__(self, scorer: SceneScorer) -> None:
        self.scorer = scorer

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Scenes (B, 3, 64, 64) float in [0, 1], B captions -> (B,), with the gradient of the images."""
        return best_log_probability(self.scorer.cells(images), [parse(prompt).readings() for prompt in prompts])


class ScenesClip(ClipScore):
    """exp(logit_scale) cos / 30 of a CLIP trained on scenes and their captions: a proxy that can be hacked."""

    name = "scenes_clip"


def best_log_probability(cells: Cells, possible: Sequence[Sequence[Reading]]) -> Tensor:
    """Of the most probable of each scene's readings: (B,)."""
    labels, colours = mixed(cells.labels), mixed(cells.colours)  # (B, 4, 11), (B, 4, 8)
    best = []
    for row, scene in enumerate(possible):
        label_ids, colour_ids = (ids.to(labels.device) for ids in indices(tuple(scene)))  # (R, 4) each
        of_labels = labels[row].expand(len(scene), -1, -1).gather(2, label_ids[..., None])[..., 0]
        of_colours = colours[row].expand(len(scene), -1, -1).gather(2, colour_ids.clamp(min=0)[..., None])[..., 0]
        best.append((of_labels + torch.where(colour_ids == OPEN, 0, of_colours)).sum(1).max())
    return torch.stack(best)


def mixed(log_probabilities: Tensor) -> Tensor:
    """Log-probabilities over the last axis, mixed with the uniform distribution."""
    return torch.logaddexp(
        log_probabilities + math.log(1 - MIXED),
        torch.full_like(log_probabilities, math.log(MIXED / log_probabilities.shape[-1])),
    )


@lru_cache(maxsize=4096)
def indices(possible: tuple[Reading, ...]) -> tuple[Tensor, Tensor]:
    """The labels and the colours of R readings, (R, 4) each, with EMPTY and OPEN."""
    labels = [[EMPTY if garment is None else garment.label for garment in reading] for reading in possible]
    colours = [
        [OPEN if garment is None or garment.colour is None else garment.colour for garment in reading]
        for reading in possible
    ]
    return torch.tensor(labels), torch.tensor(colours)
