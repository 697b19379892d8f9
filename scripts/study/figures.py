"""Sample grids side by side, and the colours of the study's figures: Okabe and Ito's, told apart by everybody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from flow_grpo.diversity.images import read_rgb
from flow_grpo.figure_text import figure_text
from scripts.study.records import Evaluation

BASE_COLOUR = "#777777"
COLOURS = {"DRTune": "#D55E00", "GRPO": "#0072B2"}
REWARD_LABEL = "reward on held-out noise"
MAX_PANELS = 8  # sample grids side by side


@dataclass(frozen=True)
class State:
    """A model whose samples are shown."""

    label: str
    image: Path
    evaluation: Evaluation
    colour: str


def samples_figure(shown: Sequence[State]) -> Figure:
    """The first MAX_PANELS sample grids side by side: the same prompts and the same noise in each."""
    every, shown = len(shown), shown[:MAX_PANELS]
    grids = [_scaled(Image.fromarray(read_rgb(state.image))) for state in shown]
    titles = [figure_text(state.label, 34, 3) for state in shown]
    height = 3.2 * grids[0].height / grids[0].width + 0.55
    figure = Figure(figsize=(3.2 * len(shown), height), layout="compressed")  # made for axes of a fixed shape
    for index, (state, grid, title) in enumerate(zip(shown, grids, titles, strict=True)):
        axes = figure.add_subplot(1, len(shown), index + 1)
        axes.imshow(np.asarray(grid))
        axes.set_title(f"{title}\nreward {state.evaluation.reward:.4f}", fontsize=10, color=state.colour)
        axes.set_xticks([])
        axes.set_yticks([])
    if every > len(shown):
        figure.suptitle(f"the first {len(shown)} of {every}; {every - len(shown)} are not shown", fontsize=10)
    return figure


def _scaled(image: Image.Image, width: int = 800) -> Image.Image:
    """Small pixels enlarged by a whole factor, large images reduced: both stay sharp."""
    if image.width <= width // 2:
        factor = width // image.width
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    height = round(image.height * width / image.width)
    return image.resize((width, height), Image.Resampling.LANCZOS) if image.width > width else image
