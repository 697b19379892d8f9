"""The figures of visualize_from_checkpoints.py: sheets of images, and curves over checkpoints, from base to last."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flow_grpo.figure_text import sheet_text
from flow_grpo.runs.weights import Model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image
    from torch import Tensor

    from flow_grpo.step_visualizer import FilmStrip

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # Okabe and Ito's
PANELS = {  # metric -> title, label of the axis, decimals
    "diversity/vendi": ("Vendi score within a prompt", "effective number of images", 2),
    "diversity/rke": ("RKE within a prompt", "effective number of images", 2),
    "entropy/nats": ("Differential entropy given the prompt", "nats", 1),
    "ode_log_prob/std": ("Spread of log p within a prompt", "standard deviation (nats)", 1),
    "reward/total": ("Reward", "weighted sum of the rewards", 4),
    "judge/accuracy": ("Prompt recognised by the judge", "share of the images", 3),
}
BY_STEP = {"divergence": "div v (1 / sigma)", "log_density": "log p at sigma (nats)"}
MAX_FRAMES, MAX_CURVES = 12, 8  # steps of a strip, and against training
MAX_LEGEND, MAX_TICKS = 14, 8  # models named in a legend, and on an axis


def label(model: Mapping[str, Any] | Model) -> str:
    """What a model is called on the page."""
    step = model.step if isinstance(model, Model) else model["step"]
    return f"epoch {step}" if step else "base"


def shown_metrics(record: Mapping[str, Any]) -> list[str]:
    """Those of PANELS that were measured."""
    return [name for name in PANELS if name in record["models"][0]["metrics"]]


# --- pictures of images -------------------------------------------------------------------------------------

LEFT, HEADER, GAP, BLOCK_GAP = 170, 48, 2, 12  # of the margins of a sheet, and between cells and blocks; pixels
FONT_SIZE, LINE_HEIGHT, LETTERS, FRAME = 14, 18, 18, 3
LEAST_CELL, MOST_CELL, MAX_WIDTH = 64, 128, 1500  # pixels


def cell_side(side: int) -> int:
    """Of the cell that shows an image of this side: enlarged or reduced by a whole factor."""
    return side // max(1, side // MOST_CELL) if side >= LEAST_CELL else side * math.ceil(LEAST_CELL / side)


def thumbnails(images: Tensor) -> np.ndarray:
    """Images (N, 3, H, W) in [0, 1] -> (N, s, s, 3) uint8, s the `cell_side` of W."""
    from torch.nn.functional import avg_pool2d, interpolate

    side = images.shape[-1]
    if side >= LEAST_CELL:
        images = avg_pool2d(images.float(), max(1, side // MOST_CELL))
    else:
        images = interpolate(images.float(), scale_factor=cell_side(side) / side, mode="nearest")
    return (images.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()


def sheet(blocks: Mapping[str, np.ndarray | None], rows: Sequence[str], corner: str = "") -> Image.Image:
    """Blocks of cells (R, K, s, s, 3) side by side, under their titles; rows have their text at the left.

    A block that is None is left grey. One at least is not.
    """
    from PIL import Image, ImageDraw, ImageFont

    width, side = next(cells.shape[1:3] for cells in blocks.values() if cells is not None)
    pitch = side + GAP
    block_width, height = width * pitch - GAP, len(rows) * pitch - GAP
    drawn = Image.new("RGB", (LEFT + len(blocks) * (block_width + BLOCK_GAP), HEADER + height + 2 * FRAME), "white")
    pen = ImageDraw.Draw(drawn)
    heading, file = sheet_text(corner, LETTERS, 1)
    pen.font = ImageFont.truetype(file, FONT_SIZE)
    pen.text((4, HEADER - 6), heading, fill="black", anchor="ld")
    for row, text in enumerate(rows):
        shown, file = sheet_text(text, LETTERS, max(1, side // LINE_HEIGHT))
        font = ImageFont.truetype(file, FONT_SIZE)
        pen.text((4, HEADER + row * pitch + side // 2), shown, fill="black", anchor="lm", font=font)
    for number, (title, cells) in enumerate(blocks.items()):
        left = LEFT + number * (block_width + BLOCK_GAP)
        middle = left + block_width // 2
        pen.text((middle, HEADER - 6), title, fill="black", anchor="md", align="center")
        frame = (left - FRAME, HEADER - FRAME, left + block_width + FRAME - 1, HEADER + height + FRAME - 1)
        pen.rectangle(frame, outline="#999999", fill="#cccccc" if cells is None else None)
        if cells is None:
            pen.text((middle, HEADER + height // 2), "not\nfinite", fill="black", anchor="mm", align="center")
            continue
        for row, column in np.ndindex(cells.shape[:2]):
            drawn.paste(Image.fromarray(cells[row, column]), (left + column * pitch, HEADER + row * pitch))
    return drawn


def strip_frames(strip: FilmStrip) -> dict[str, np.ndarray]:
    """x0_hat of each prompt at the steps, at most MAX_FRAMES of them, as blocks of a sheet."""
    steps = strip.images.shape[1]
    chosen = np.unique(np.linspace(0, steps - 1, min(steps, MAX_FRAMES)).round().astype(int)).tolist()
    return {f"sigma\n{strip.sigmas[i]:.3f}": thumbnails(strip.images[:, i])[:, None] for i in chosen}


# --- curves -------------------------------------------------------------------------------------------------


def metrics_figure(record: Mapping[str, Any]) -> Figure:
    """Every metric of the table against training, with its 95 % interval; a cross where a model has none."""
    from matplotlib.figure import Figure

    names = shown_metrics(record)
    rows = math.ceil(len(names) / 3)
    drawn = Figure(figsize=(13, 3.9 * rows), layout="constrained")
    panels = drawn.subplots(rows, 3, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        _draw_metric(axes, record["models"], name)
        _against_training(axes, record["models"])
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    return drawn


def _draw_metric(axes: Axes, models: Sequence[Mapping[str, Any]], name: str) -> None:
    title, unit, _ = PANELS[name]
    steps = np.array([model["step"] for model in models])
    values = _finite([model["metrics"][name] for model in models])
    ends = _finite([model["intervals"][name] for model in models])  # (M, 2)
    axes.axhline(values[0], color=GREY, linestyle=":", linewidth=1)
    axes.errorbar(steps, values, np.abs(ends - values[:, None]).T, color=BLUE, marker="o", markersize=5, capsize=3)
    lost = steps[np.isnan(values)]
    if len(lost):  # an empty line, not clipped, would confuse the layout
        axes.plot(
            lost, np.full(len(lost), 0.03), "x", color=ORANGE, transform=axes.get_xaxis_transform(), clip_on=False
        )
    axes.set_title(title, fontsize="medium")
    axes.set_ylabel(unit)


def curves_figure(record: Mapping[str, Any]) -> Figure:
    """Divergence and log-density against sigma, means over prompts; below, the change since the base model."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(13, 8), layout="constrained")
    panels = drawn.subplots(2, 2, sharex=True)
    models = [model for model in record["models"] if model["divergence_by_step"] is not None]
    named = set(np.linspace(0, len(models) - 1, min(len(models), MAX_LEGEND)).round().astype(int).tolist())
    for column, (name, unit) in enumerate(BY_STEP.items()):
        key = f"{name}_by_step"
        first = np.array(models[0][key])  # (P, T) or (P, T + 1)
        sigmas = record["sigmas"][: first.shape[1]]
        for number, (model, style) in enumerate(zip(models, _styles(len(models)), strict=True)):
            text = label(model) if number in named else None
            values = _finite(model[key])
            panels[0, column].plot(sigmas, values.mean(0), label=text, **style)
            panels[1, column].plot(sigmas, (values - first).mean(0), **style)
        panels[0, column].set_ylabel(f"{unit}, mean over prompts")
        panels[1, column].set_ylabel("change since the base model")
        panels[1, column].set_xlabel("sigma, from noise (1) to image (0)")
        for axes in panels[:, column]:
            axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].invert_xaxis()  # all share it
    drawn.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return drawn


def steps_figure(record: Mapping[str, Any]) -> Figure:
    """Some steps against training, means over prompts; below, their change since the base model, 95 % intervals."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(13, 8), layout="constrained")
    models = [model for model in record["models"] if model["divergence_by_step"] is not None]
    epochs = np.array([model["step"] for model in models])
    panels = drawn.subplots(2, 2)
    for column, (name, unit) in enumerate(BY_STEP.items()):
        values = _finite([model[f"{name}_by_step"] for model in models])  # (M, P, T or T + 1)
        chosen = np.unique(np.linspace(0, values.shape[2] - 1, MAX_CURVES).round().astype(int))
        aside = np.linspace(-0.025, 0.025, len(chosen)) * epochs.max()  # bars of several steps stand side by side
        for i, shift, colour in zip(chosen, aside, colormaps["viridis"](np.linspace(0, 0.9, len(chosen))), strict=True):
            level, change = values[:, :, i], values[:, :, i] - values[0, :, i]
            style = {"color": colour, "marker": "o", "markersize": 4}
            panels[0, column].plot(epochs, level.mean(1), label=f"{record['sigmas'][i]:.3f}", **style)
            panels[1, column].errorbar(
                epochs + shift, change.mean(1), t_half_widths(change), capsize=2, elinewidth=0.8, **style
            )
        panels[0, column].set_ylabel(f"{unit}, mean over prompts")
        panels[1, column].set_ylabel("change since the base model")
        panels[0, column].legend(
            title="sigma", frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5)
        )
        for axes in panels[:, column]:
            _against_training(axes, models)
    return drawn


def t_half_widths(values: np.ndarray) -> np.ndarray:
    """Of the 95 % interval of the mean over the last axis, of independent values; nan if there is only one."""
    from scipy.stats import t

    count = values.shape[-1]
    if count < 2:
        return np.full(values.shape[:-1], np.nan)
    return t.ppf(0.975, count - 1) * values.std(-1, ddof=1) / math.sqrt(count)


def _finite(values: Any) -> np.ndarray:
    """float64, with nan for what is infinite."""
    found = np.array(values, dtype=np.float64)
    return np.where(np.isfinite(found), found, np.nan)


def _styles(number: int) -> list[dict[str, Any]]:
    """The base model black and dashed; checkpoints from dark (early) to bright (late)."""
    from matplotlib import colormaps

    colours = colormaps["viridis"](np.linspace(0, 0.9, max(number - 1, 1)))
    return [
        {"color": "black", "linestyle": "--", "zorder": 3},
        *({"color": colour, "linestyle": "-"} for colour in colours[: number - 1]),
    ]


def _against_training(axes: Axes, models: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator

    axes.set_xlabel("training (epochs; 0: base model)")
    few = len(models) <= MAX_TICKS
    axes.xaxis.set_major_locator(FixedLocator([m["step"] for m in models]) if few else MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
