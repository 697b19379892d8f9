"""What a dashboard shows of a run, whoever draws it: names of metrics, a run's description, images with captions.

Metrics keep their names in metrics.jsonl. On a dashboard they stand in sections whose names sort in the order of use:

    a_reward/total         eval/reward/total, the current weights on held-out noise
    a_reward/total_ema     eval_ema/reward/total, the averaged weights
    a_reward/train         train/reward
    b_judge/ c_diversity/ d_entropy/    the same way
    e_training/            what else an epoch logs, and the counters
    f_performance/         perf/...: images a second, seconds by phase, memory
    samples/               images, in wandb also the table of every image and the page

A letter comes first because wandb sorts runs only by names that begin with one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flow_grpo.diversity.images import read_rgb
from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import one_line
from flow_grpo.runs.folder import flatten
from flow_grpo.runs.record import NONE_OF_THEM, Record

WANDB_TAG = 64  # characters at most
AXES = ("epoch", "seconds", "network_evaluations")
SECTIONS = {
    "reward": "a_reward",
    "judge": "b_judge",
    "diversity": "c_diversity",
    "modes": "c_diversity/modes",
    "exact_curve": "c_diversity/exact_curve",
    "entropy": "d_entropy",
    "ode_log_prob": "d_entropy/ode_log_prob",
    "forward_kl": "d_entropy/forward_kl",
}
TRAINING, PERFORMANCE, SAMPLES = "e_training", "f_performance", "samples"
BEST = ("reward/total", "judge/accuracy", "diversity/vendi")  # shown of the evaluation that decides
ENDS = re.compile(r"diversity/\w+_(low|high)$")  # of intervals: no curves of their own
MOST_IMAGES = 80  # of one evaluation with a caption each: wandb shows about a hundred
CAPTION = 200  # characters


def shown_as(metric: str) -> str | None:
    """The dashboard's name of a metric of the history; None: it is not shown."""
    if ENDS.search(metric):
        return None
    label, _, rest = metric.partition("/")
    kind, _, name = rest.partition("/")
    if not rest:  # a counter
        return metric if metric in AXES else f"{TRAINING}/{metric}"
    if label == "train":
        return f"{SECTIONS['reward']}/train{rest[6:]}" if rest.startswith("reward") else f"{TRAINING}/{rest}"
    if label == "perf":
        return f"{PERFORMANCE}/{rest}"
    if label in ("eval", "eval_ema") and kind in SECTIONS:
        return f"{SECTIONS[kind]}/{name}{label[4:]}"
    return metric


def shown(values: Mapping[str, float]) -> dict[str, float]:
    """The values that a dashboard shows, by its names."""
    named = ((shown_as(name), value) for name, value in values.items())
    return {name: value for name, value in named if name is not None}


# --- what a run is, to those who look at many -----------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """A run's name, and its settings and environment as config.json and environment.json have them."""

    name: str
    config: Mapping[str, Any]  # by full names: flow_grpo.runs.folder.flatten
    environment: Mapping[str, Any]

    @property
    def method(self) -> str:
        """By which method it trains."""
        default = "drtune" if self.config.get("use_reward_gradient") else "grpo"
        return self.config.get("train.method") or default

    @property
    def rewards(self) -> list[str]:
        """Those that are trained on."""
        keys = (key for key, weight in self.config.items() if key.startswith("reward_fn.") and weight)
        return [key.removeprefix("reward_fn.") for key in keys]

    @property
    def tags(self) -> list[str]:
        """Method, model, rewards."""
        model = Path(str(self.config.get("pretrained.model", ""))).name
        return [tag[:WANDB_TAG] for tag in (self.method, model, *self.rewards) if tag]

    @property
    def hyperparameters(self) -> dict[str, bool | int | float | str]:
        """Settings, device, batch plan and state of the code, flat."""
        keys = ("device", "processes", "batch_plan", "git")
        values = {**self.config, **flatten({key: self.environment.get(key) for key in keys})}
        return {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()
        }


def prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    """Metrics that are no training's, by the names `prefix/<name>`."""
    return {f"{prefix}/{name}": float(value) for name, value in values.items() if not ENDS.search(name)}


# --- an evaluation's images -----------------------------------------------------------------------------


def captioned(record: Record) -> list[tuple[np.ndarray, str]]:
    """The first images (H, W, 3) with "reward | judge | prompt"; none where there is no sprite to be read."""
    path, sprite = record.sprite_path, record.sprite
    if path is None or sprite is None:
        return []
    try:
        grid = read_rgb(path)  # (H, W, 3)
    except ConfigError:
        return []
    width, height = sprite.cell
    tiles = []
    for place, i in enumerate(sprite.images[:MOST_IMAGES]):
        row, column = divmod(place, sprite.columns)
        tile = grid[row * height :, column * width :][:height, :width]
        if tile.size:
            tiles.append((tile, caption(record, i)))
    return tiles


def caption(record: Record, i: int) -> str:
    """0.5120 | ✓ 0.93 | a bag: the reward; whether the judge likes the own prompt best, with its probability."""
    reward = (record.rewards.get("total") or {i: None})[i]
    parts = ["-" if reward is None else f"{reward:.4f}"]
    if record.judge is not None:
        guess, probability = record.judge.guess[i], record.judge.probability[i]
        mark = "-" if guess is None else "✓" if guess == record.prompt[i] else f"✗ {guessed(record, guess)}".rstrip()
        parts.append(mark if probability is None else f"{mark} {probability:.2f}")
    return one_line(" | ".join([*parts, record.prompts[record.prompt[i]]]), CAPTION)


def guessed(record: Record, guess: int) -> str:
    """The prompt that the judge takes an image for; empty: none of them."""
    return "" if guess == NONE_OF_THEM else record.prompts[guess]


def table_of(record: Record) -> tuple[list[str | int], list[list[Any]]]:
    """Columns, and a row for each image."""
    columns: dict[str, Sequence[Any]] = {
        "epoch": [record.epoch] * len(record.prompt),
        "prompt": [record.prompts[p] for p in record.prompt],
        "noise": record.noise,
    }
    columns |= {f"reward {name}": values for name, values in record.rewards.items()}
    if record.judge is not None:
        guess = record.judge.guess
        columns["judge's guess"] = [None if g is None else guessed(record, g) for g in guess]
        columns["judge is right"] = [None if g is None else g == p for g, p in zip(guess, record.prompt, strict=True)]
        columns["judge's probability"] = record.judge.probability
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def pixels_of(image: Image.Image | np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 of a picture, or of an array (H, W) or (H, W, 3) of uint8 or of floats in [0, 1]."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if np.issubdtype(image.dtype, np.floating):
        image = np.round(image.clip(0, 1) * 255).astype(np.uint8)
    return np.asarray(Image.fromarray(image).convert("RGB"))
