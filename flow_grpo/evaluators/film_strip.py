"""The denoising film strip of fixed prompts, with log-density and divergence at every step, along the training.

    steps/eval_000010.json                 the numbers of one evaluation
    images/eval_strip_000010.png           a row for each prompt: x0_hat decoded at every step
    images/eval_curves_000010.png          divergence and log-density against sigma, this and all earlier evaluations
    images/eval_training_000010.png        the same, each step's value against training

Those of the averaged weights are called eval_ema_... and have a history of their own. Everything overlaid is read back
from the run folder, so a resumed run goes on with the whole history; what was measured on other noise levels stays
there but is not drawn, and neither is a record that cannot be read.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from flow_grpo.diffusers_patch.rollout import ode_steps, rollout
from flow_grpo.entropy import NonFiniteError, divergence, draw_probes
from flow_grpo.errors import ConfigError
from flow_grpo.evaluators.base import Evaluator, Measured
from flow_grpo.evaluators.entropy import estimator_of, probe_generators
from flow_grpo.figure_text import optional_figure, sheet_text
from flow_grpo.files import read_object, strict_json, write_atomically
from flow_grpo.policy import Policy
from flow_grpo.randomness import evaluation_generators
from flow_grpo.rewards.building import WeightedReward
from flow_grpo.runs.folder import IMAGE_FOLDER
from flow_grpo.runs.run import Run
from flow_grpo.settings import Settings
from flow_grpo.statistics import half_widths
from flow_grpo.types import Samples

MAX_FRAMES, MAX_CURVES = 12, 8  # steps of a strip, and drawn against training
LEFT, HEADER, GAP = 170, 28, 2  # of the margins of a strip, and between its cells; pixels
FONT_SIZE, LINE_HEIGHT, LETTERS = 14, 18, 18
LEAST_CELL, MOST_CELL = 64, 128  # pixels


@dataclass(frozen=True)
class FilmStrip:
    """One image of each of P prompts, step by step (T steps)."""

    images: Tensor  # (P, T, 3, H, W): x0_hat decoded, in [0, 1]
    sigmas: list[float]  # (T + 1,)
    divergence: Tensor  # (P, T): div v, 1 / sigma
    log_density: Tensor  # (P, T + 1): log p_sigma(x_sigma), nats


def film_strip(policy: Policy, prompts: tuple[str, ...]) -> FilmStrip:
    """Follow the evaluation's ODE from the first noise of each prompt, by Euler's steps.

    Raises:
        NonFiniteError: the velocity or its divergence is not finite.
    """
    config, ids = policy.settings.config, [(p, 0) for p in range(len(prompts))]
    velocity = policy.velocity(policy.encode(prompts), config.eval.guidance_scale)
    estimator, generators = estimator_of(policy), probe_generators(config.eval.seed, ids)
    x = policy.noise(evaluation_generators(config.eval.seed, ids))
    sigmas = policy.sigmas(config.eval.num_steps).tolist()
    log_density = [-0.5 * (x.double().square() + np.log(2 * np.pi)).flatten(1).sum(1)]
    images: list[Tensor] = []
    divergences: list[Tensor] = []

    def measured(x: Tensor, sigma: float) -> Tensor:
        probes = draw_probes(x, estimator, generators(len(divergences)))
        with policy.eager():
            found = divergence(velocity, x, sigma, estimator, probes)
        divergences.append(found.mean)
        return found.velocity

    for taken in rollout(measured, x, sigmas, ode_steps(sigmas)):
        with torch.no_grad():
            images.append(policy.decode(taken.latents - taken.sigma * taken.velocity).cpu())
        log_density.append(log_density[-1] - taken.coefficients.b * divergences[-1])
    return FilmStrip(
        torch.stack(images, 1), sigmas, torch.stack(divergences, 1).cpu(), torch.stack(log_density, 1).cpu()
    )


class StepVisualizer:
    """Writes the strip and the curves of the first `config.entropy.num_strip_prompts` prompts; logs no metric.

    The strip is a handful of images. The main process follows it alone, unless the network waits for all of them.
    """

    name, request = "steps", None

    def __init__(self, policy: Policy, settings: Settings, run: Run) -> None:
        self.collective = policy.sharded
        self.policy, self.run = policy, run
        self.freq = settings.config.visualize_steps_freq or settings.config.eval_freq
        self.num_prompts = settings.config.entropy.num_strip_prompts
        self.folder = run.folder / "steps"
        estimator_of(policy)  # refuses what cannot be

    def evaluate(self, samples: Samples) -> Measured:
        """Draw the weights that the policy has now; nothing where their velocity is not finite."""
        step, prompts = self.run.counters.epoch, tuple(dict.fromkeys(samples.prompts))[: self.num_prompts]
        try:
            strip = film_strip(self.policy, prompts)
        except NonFiniteError as error:
            if self.run.is_main:
                warnings.warn(f"no film strip at epoch {step}: {error}", stacklevel=2)
            return Measured()
        if not self.run.is_main:
            return Measured()
        self._write(samples.label, step, prompts, strip)
        history = self._read(samples.label, step)
        drawings: dict[str, Callable[[], Image.Image]] = {
            "strip": lambda: strip_image(strip, prompts),
            "curves": lambda: rendered(curves_figure(history)),
            "training": lambda: rendered(training_figure(history)),
        }
        for name, draw in drawings.items():
            with optional_figure(self.folder.parent / IMAGE_FOLDER / f"{samples.label}_{name}_{step:06d}.png"):
                self.run.log_image(f"{samples.label}_{name}", draw(), step)
        return Measured()

    def _write(self, label: str, step: int, prompts: tuple[str, ...], strip: FilmStrip) -> None:
        self.folder.mkdir(exist_ok=True)
        record = {
            "step": step,
            "prompts": prompts,
            "sigmas": strip.sigmas,
            "divergence": strip.divergence.tolist(),
            "log_density": strip.log_density.tolist(),
        }
        write_atomically(self.folder / f"{label}_{step:06d}.json", strict_json(record))

    def _read(self, label: str, step: int) -> list[dict[str, Any]]:
        """Evaluations up to `step`, which has one, in order: those on the noise levels of that last one."""
        found = (_readable(path) for path in self.folder.glob(f"{label}_[0-9]*.json"))
        records = sorted((r for r in found if r and r["step"] <= step), key=lambda record: record["step"])
        return [record for record in records if record["sigmas"] == records[-1]["sigmas"]]


def _readable(path: Path) -> dict[str, Any] | None:
    """A record, nan for null; None for a file that holds none."""
    try:
        record = read_object(path)
        arrays = {name: np.asarray(record[name], dtype=float) for name in ("sigmas", "divergence", "log_density")}
        whole = type(record["step"]) is int and [array.ndim for array in arrays.values()] == [1, 2, 2]
    except (ConfigError, KeyError, TypeError, ValueError, OverflowError):
        return None
    return record | {name: array.tolist() for name, array in arrays.items()} if whole else None


# --- pictures ------------------------------------------------------------------------------------------


def strip_image(strip: FilmStrip, prompts: Sequence[str]) -> Image.Image:
    """Rows are prompts, columns the steps from noise to image, at most MAX_FRAMES of them, under their sigma."""
    count, steps = strip.images.shape[:2]
    chosen = np.unique(np.linspace(0, steps - 1, min(steps, MAX_FRAMES)).round().astype(int)).tolist()
    side = cell_side(strip.images.shape[-1])
    pitch = side + GAP
    drawn = Image.new("RGB", (LEFT + len(chosen) * pitch - GAP, HEADER + count * pitch - GAP), "white")
    pen = ImageDraw.Draw(drawn)
    for row, prompt in enumerate(prompts):
        text, file = sheet_text(prompt, LETTERS, max(1, side // LINE_HEIGHT))
        font = ImageFont.truetype(file, FONT_SIZE)
        pen.text((4, HEADER + row * pitch + side // 2), text, fill="black", anchor="lm", font=font)
    pen.font = ImageFont.truetype(sheet_text("sigma", LETTERS, 1)[1], FONT_SIZE)
    pen.text((4, HEADER - 6), "sigma", fill="black", anchor="ld")
    for column, step in enumerate(chosen):
        left = LEFT + column * pitch
        pen.text((left + side // 2, HEADER - 6), f"{strip.sigmas[step]:.3f}", fill="black", anchor="md")
        for row in range(count):
            drawn.paste(
                _eight_bit(strip.images[row, step]).resize((side, side), Image.Resampling.BOX),
                (left, HEADER + row * pitch),
            )
    return drawn


def _eight_bit(image: Tensor) -> Image.Image:
    return to_pil_image((image.float() * 255).round().byte())


def cell_side(side: int) -> int:
    """Of the cell that shows an image of this side: enlarged or reduced by a whole factor."""
    return side // max(1, side // MOST_CELL) if side >= LEAST_CELL else side * math.ceil(LEAST_CELL / side)


def curves_figure(history: list[dict[str, Any]]) -> Figure:
    """Means over prompts against sigma: a curve for each evaluation, from dark (first) to bright (last)."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for record, colour in zip(history, colormaps["viridis"](np.linspace(0, 0.9, len(history))), strict=True):
        label = f"epoch {record['step']}" if record in (history[0], history[-1]) else None
        left.plot(record["sigmas"][:-1], np.mean(record["divergence"], 0), color=colour, label=label)
        right.plot(record["sigmas"], np.mean(record["log_density"], 0), color=colour, label=label)
    for axes, name in ((left, "div v (1 / sigma)"), (right, "log p(x) at sigma (nats)")):
        axes.set_xlabel("sigma, from noise (1) to image (0)")
        axes.set_ylabel(f"{name}, mean over prompts")
        axes.invert_xaxis()
        axes.legend(frameon=False)
    return figure


def training_figure(history: list[dict[str, Any]]) -> Figure:
    """Some steps against training, means over the prompts that all have; below, the change since the first evaluation.

    The 95 % intervals of the changes are of pairs, on the same noise and probes.
    """
    figure = Figure(figsize=(13, 8), layout="constrained")
    epochs = np.array([record["step"] for record in history])
    panels = figure.subplots(2, 2, sharex=True)
    prompts = min(len(record["divergence"]) for record in history)
    units = {"divergence": "1 / sigma", "log_density": "nats"}
    for (upper, lower), (name, unit) in zip(panels.T, units.items(), strict=True):
        values = np.array([record[name][:prompts] for record in history])  # (evaluations, P, T or T + 1)
        chosen = np.unique(np.linspace(0, values.shape[2] - 1, MAX_CURVES).round().astype(int))
        aside = np.linspace(-0.025, 0.025, len(chosen)) * epochs.max()  # bars of several steps stand side by side
        for i, shift, colour in zip(chosen, aside, colormaps["viridis"](np.linspace(0, 0.9, len(chosen))), strict=True):
            level, change = values[:, :, i], values[:, :, i] - values[0, :, i]
            style = {"color": colour, "marker": "o", "markersize": 3}
            upper.plot(epochs, level.mean(1), label=f"{history[-1]['sigmas'][i]:.3g}", **style)
            lower.errorbar(epochs + shift, change.mean(1), half_widths(change), capsize=2, elinewidth=0.8, **style)
        upper.set_ylabel(f"{name.replace('_', ' ')} ({unit}), mean over prompts")
        lower.set_ylabel(f"change since epoch {epochs[0]}")
        lower.set_xlabel("epochs")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        upper.legend(title="sigma", frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def rendered(figure: Figure) -> Image.Image:
    """The figure's pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def build(policy: Policy, reward: WeightedReward, settings: Settings, run: Run) -> list[Evaluator]:
    """The evaluator, if the configuration asks for it."""
    return [StepVisualizer(policy, settings, run)] if settings.config.visualize_steps else []
