"""Write run folders with chosen numbers, as a run would: for the tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from config.base import get_config

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
ENVIRONMENT = {
    "command": "python scripts/train/train_sd3.py",
    "git": {"revision": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
    "device": "cpu (synthetic)",
    "processes": 1,
    "threads": 2,
    "platform": "Linux",
    "python": "3.11.7",
    "packages": {"torch": "2.15.0", "diffusers": "0.42.1", "transformers": "5.23.0", "peft": "0.21.0"},
    "started": "2026-11-22T00:00:00+00:00",
    "earlier_sessions": [],
}


def write_run(
    folder: Path,
    rewards: Sequence[float | None],
    seconds: Sequence[float],
    gradient: bool,
    accuracy: Sequence[float] | None = None,
    collapse: Sequence[float] | None = None,
    forwards_per_second: int = 700,
    evals_every: int = 10,
    overrides: Mapping[str, Any] | None = None,
    density: bool = False,
    diversity: bool = False,
) -> Path:
    """A run evaluated at `seconds`; `collapse` 0: all colours equally often, 1: only one of them."""
    config = get_config()
    config.update({"use_reward_gradient": gradient, "run_name": folder.name})
    config.update_from_flattened_dict(dict(overrides or {}))
    (folder / "images").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    lines = []
    for index, (reward, spent) in enumerate(zip(rewards, seconds, strict=True)):
        step, lost = index * evals_every, (collapse or [0.0] * len(rewards))[index]
        shares = np.full(8, (1 - lost) / 8) + lost * np.eye(8)[2 if gradient else 5]
        line: dict[str, Any] = {"step": step, "seconds": spent, "network_evaluations": int(spent * forwards_per_second)}
        line |= {"images": step * 80, "updates": step * 2, "nonfinite_updates": 0}
        lines.append(line | {"train/reward": 0.5, "train/skipped_updates": 0.0})
        line |= {"eval/reward/total": reward, "eval/reward/pickscore": reward}
        line |= {"eval/judge/accuracy": (accuracy or [0.78] * len(rewards))[index], "eval/judge/similarity": 0.6}
        line |= {f"eval/modes/{colour}": float(share) for colour, share in zip(COLOURS, shares, strict=True)}
        if density:
            line |= {"eval/entropy/nats": -20.0 - 50 * lost, "eval/entropy/standard_error": 4.0}
            line |= {"eval/entropy/half_width_95": 8.0}
            line |= {"eval/ode_log_prob/std": 36.0 - 10 * lost}
        if diversity:
            for name, value, width in (("vendi", 3.5, 0.1), ("rke", 4.5, 0.2)):
                score = 1 + (value - 1) * (1 - lost)
                ends = {"": score, "_low": score - width, "_high": score + width}
                line |= {f"eval/diversity/{name}{end}": number for end, number in ends.items()}
        lines.append(line | {"eval/modes/entropy": float(-(shares * np.log(shares + 1e-12)).sum())})
        write_grid(folder / f"images/eval_{step:06d}.png", shares)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_grid(path: Path, shares: np.ndarray, rows: int = 10, columns: int = 8) -> None:
    """Discs of the eight colours on white, drawn with these shares."""
    from matplotlib.colors import to_rgb

    generator = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:33j, -1:1:33j]
    disc = ((x**2 + y**2) < 0.6)[..., None]
    grid = np.ones((rows * 33, columns * 33, 3))
    for row in range(rows):
        for column in range(columns):
            colour = COLOURS[generator.choice(8, p=shares / shares.sum())]
            cell = np.where(disc, np.array(to_rgb(colour)), 1.0)
            grid[row * 33 : (row + 1) * 33, column * 33 : (column + 1) * 33] = cell
    Image.fromarray((grid * 255).astype(np.uint8)).save(path)


def write_demo_pair(folder: Path) -> tuple[Path, Path]:
    """Two runs shaped like those that were measured: DRTune overtakes GRPO early, then collapses."""
    t = np.linspace(0, 180, 41)
    drtune = write_run(
        folder / "drtune",
        list(0.648 + 0.146 * (1 - np.exp(-t / 90))),
        list(t),
        gradient=True,
        accuracy=list(0.78 + 0.11 * np.exp(-(((t - 25) / 20) ** 2)) - 0.13 * t / 180),
        collapse=list(1 - np.exp(-t / 60)),
        evals_every=8,
    )
    t = np.linspace(0, 181, 15)
    grpo = write_run(
        folder / "grpo",
        list(0.648 + 0.024 * (t / 181) ** 0.7),
        list(t),
        gradient=False,
        accuracy=list(0.78 + 0.1 * t / 181),
        collapse=list(0.35 * t / 181),
        forwards_per_second=930,
    )
    return drtune, grpo
