"""Write run folders with records of evaluations whose images look like the tiny model's: for the tests of the page.

A run drifts from the base model's images to one washed picture for each prompt: its reward rises all the way, the
different images are lost early, and the judge complains late, as was measured of DRTune.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.spatial.distance import cdist, pdist

from config.base import get_config
from flow_grpo.diversity.vendi import vendi_score
from flow_grpo.runs.changes import with_changes
from flow_grpo.runs.evaluations import write_record
from flow_grpo.runs.record import Distances, Judged, Record
from tests.synthetic_runs import ENVIRONMENT

GARMENTS = ("a t-shirt", "a trouser", "a pullover", "a dress", "a coat", "a sandal", "a shirt", "a sneaker", "a bag",
            "a boot")  # fmt: skip
SAMPLES = Path(__file__).parents[1] / "assets/tiny_sd3/samples.png"  # a row of 8 samples for each garment, magnified
CELL = 32  # pixels


@cache
def base_images(prompts: int, noises: int, size: int = CELL) -> np.ndarray:
    """(prompts, noises, 3, size, size) in [0, 1]: the model's samples, mirrored or with their channels exchanged."""
    sheet = Image.open(SAMPLES).convert("RGB").resize((8 * CELL, 10 * CELL), Image.Resampling.NEAREST)
    cells = np.asarray(sheet, dtype=np.float32).reshape(10, CELL, 8, CELL, 3).transpose(0, 2, 4, 1, 3) / 255
    found = np.empty((prompts, noises, 3, size, size), dtype=np.float32)
    for row in range(prompts):
        for column in range(noises):
            image = cells[row % 10, column % 8][np.roll(range(3), column // 8)]
            found[row, column] = _resized(image if column % 2 else image[:, :, ::-1], size)
    return found


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    """(3, h, w) -> (3, size, size); enlarged ones get a texture, as photographs have one."""
    pixels = Image.fromarray((image.transpose(1, 2, 0) * 255).astype(np.uint8)).resize((size, size))
    found = np.asarray(pixels, dtype=np.float32).transpose(2, 0, 1) / 255
    return found if size == CELL else found * _texture(size)


@cache
def _texture(size: int) -> np.ndarray:
    return 0.85 + 0.15 * np.random.default_rng(3).random((size, size), dtype=np.float32)


def drifted(base: np.ndarray, lost: float) -> np.ndarray:
    """The images when a share `lost` of their diversity is: mixed with one blue picture of each prompt."""
    size = base.shape[-1]
    y, x = np.mgrid[0 : 1 : size * 1j, 0 : 1 : size * 1j]
    washed = np.stack([0.45 + 0.4 * np.sin(17 * x), 0.5 + 0.3 * np.cos(23 * y), 0.8 + 0.2 * np.sin(11 * (x + y))])
    target = 0.55 * base.mean(1, keepdims=True) + 0.45 * washed.clip(0, 1)
    return ((1 - lost) * base + lost * target).astype(np.float32)


def write_records(
    folder: Path,
    epochs: Sequence[int] = (0, 10, 20, 40, 60, 80, 120),
    prompts: Sequence[str] = GARMENTS,
    noises: int = 16,
    size: int = CELL,
    seed: int = 42,
    speed: float = 1.0,
    parts: Sequence[str] = ("reward", "judge", "diversity", "images"),
    overrides: Mapping[str, Any] | None = None,
    names: Mapping[int, str] | None = None,
    trained: bool = True,
) -> Path:
    """A run folder whose evaluations have records.

    Args:
        speed: of the drift; 0: the model stays as it is.
        parts: what was measured and kept.
        names: epoch -> what the model is called instead.
        trained: whether the epochs are of a training, which took time; else they number the models, and no settings are
            kept, as of what `fme check` writes.
    """
    folder.mkdir(parents=True)
    config = get_config()
    config.update({"run_name": folder.name, "recipe": "tiny_sd3_use_gradient", "use_reward_gradient": True})
    config.update_from_flattened_dict({"seed": seed, **(overrides or {})})
    if trained:
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    base, lines = None, []
    for epoch in epochs:
        record, images = evaluation(epoch, prompts, noises, size, seed, speed, parts, base)
        record = replace(record, name=(names or {}).get(epoch, ""))
        record = record if trained else replace(record, seconds=0.0, network_evaluations=0)
        base = base or record
        write_record(folder, record if record is base else with_changes(record, base), images)
        lines.append(_line(record))
    if trained:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def evaluation(
    epoch: int,
    prompts: Sequence[str],
    noises: int,
    size: int,
    seed: int,
    speed: float,
    parts: Sequence[str],
    base: Record | None,
) -> tuple[Record, np.ndarray | None]:
    """One evaluation and its images (N, 3, size, size)."""
    rng = np.random.default_rng([seed, epoch])
    progress = speed * epoch
    clean = base_images(len(prompts), noises, size)
    images = drifted(clean, 0.97 * (1 - np.exp(-progress / 12))) if progress else clean
    features = _features(images)  # (P, n, d)
    own = np.repeat(np.arange(len(prompts)), noises)
    record = Record(
        label="eval",
        epoch=epoch,
        prompts=list(prompts),
        prompt=own.tolist(),
        noise=list(range(noises)) * len(prompts),
        seconds=round(1.17 * epoch * (1 + seed / 1000), 2),
        network_evaluations=1600 * epoch,
        rewards=_rewards(len(own), progress, seed, rng) if "reward" in parts else {},
        judge=_judged(own, len(prompts), progress, rng) if "judge" in parts else None,
        diversity=_distances(features, _features(clean), epoch) if "diversity" in parts else None,
        extra={"entropy/nats": -20 - 0.3 * progress, "entropy/standard_error": 4.0, "ode_log_prob/std": 36.0},
    )
    return record, images.reshape(-1, *images.shape[2:]) if "images" in parts else None


def _features(images: np.ndarray) -> np.ndarray:
    """(P, n, 3, H, W) -> (P, n, d) unit: means of 8 x 8 blocks, around grey."""
    p, n, _, height, width = images.shape
    means = images.reshape(p, n, 3, 8, height // 8, 8, width // 8).mean((4, 6)).reshape(p, n, -1) - 0.75
    return means / np.linalg.norm(means, axis=-1, keepdims=True)


def _rewards(images: int, progress: float, seed: int, rng: np.random.Generator) -> dict[str, list[float]]:
    of_noise = np.random.default_rng(0).normal(0.51, 0.02, images)
    gain = 0.055 * (1 - np.exp(-progress / 60)) + 0.0002 * (seed % 7) * (progress > 0)
    total = of_noise + gain + rng.normal(0, 0.008, images) * (progress > 0)
    return {"total": total.tolist(), "pickscore": total.tolist()}


def _judged(own: np.ndarray, prompts: int, progress: float, rng: np.random.Generator) -> Judged:
    accuracy = 0.86 + 0.1 * np.exp(-(((progress - 20) / 18) ** 2)) - 0.002 * max(progress - 30, 0)
    rank = np.random.default_rng(1).permutation(len(own)) / len(own)  # the same images are hard at every epoch
    right = (rank + rng.normal(0, 0.03, len(own))) < accuracy
    other = (own + 1 + rng.integers(0, max(prompts - 1, 1), len(own))) % prompts
    guess = np.where(right | (prompts == 1), own, other)
    return Judged("assets/tiny_features", True, guess.tolist(), np.where(right, 0.8, 0.15).tolist())


def _distances(features: np.ndarray, base: np.ndarray, epoch: int) -> Distances:
    prompts, noises = features.shape[:2]
    return Distances(
        features="clip:assets/tiny_features",
        order=1.0,
        prompts=list(range(prompts)),
        images=[noises] * prompts,
        noise=[list(range(noises))] * prompts,
        within=[pdist(rows).tolist() for rows in features],
        to_base=[cdist(old, new).ravel().tolist() for old, new in zip(base, features, strict=True)] if epoch else None,
        vendi=[float(vendi_score(rows)) for rows in features],
        rke=None,
    )


def _line(record: Record) -> dict[str, Any]:
    """Of metrics.jsonl, as a run logs it."""
    line: dict[str, Any] = {"step": record.epoch, "seconds": record.seconds}
    line |= {"network_evaluations": record.network_evaluations, "images": 80 * record.epoch, "updates": record.epoch}
    if record.rewards:
        line["eval/reward/total"] = float(np.mean(np.asarray(record.rewards["total"], dtype=float)))
    if record.judge is not None:
        line["eval/judge/accuracy"] = float(np.mean(np.asarray(record.judge.guess) == np.asarray(record.prompt)))
    if record.diversity is not None:
        line["eval/diversity/vendi"] = float(np.mean(record.diversity.vendi))
    return line
