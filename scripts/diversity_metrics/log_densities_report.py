"""What eval_ode_log_prob.py writes of its measurements: JSON, a table, a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flow_grpo.entropy import EntropyEstimate
from flow_grpo.figure_text import figure_text
from flow_grpo.runs.folder import flatten
from scripts.diversity_metrics.log_densities import Measured, entropy_change

MEASURE = (
    "resolution",
    "height",
    "width",
    "pretrained.",
    "prompts.test",
    "entropy.",
    "eval.seed",
    "eval.num_steps",
    "eval.guidance",
)
# of the samples of all prompts together: their spread, and no entropy, which would be that of the mixture
POOLED = ("num_samples", "log_prob_std", "log_prob_std_corrected", "minimum", "maximum", "quantiles")
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # Okabe and Ito's


def results(measured: Sequence[Measured], config: Any, run: Path, ema: bool) -> dict[str, Any]:
    """What ode_log_prob.json holds, nan included."""
    flat = flatten(config.to_dict())
    return {
        "run": run.resolve().name,
        "weights": "averaged" if ema else "current",
        "density": "of VAE-scaled latents given the prompt, under the guided ODE; nats unless a name says otherwise",
        "settings": {key: value for key, value in flat.items() if key.startswith(MEASURE)},
        "dims": measured[0].densities.dims,
        "models": [_entry(found, measured[0]) for found in measured],
    }


def _entry(found: Measured, first: Measured) -> dict[str, Any]:
    pairs = zip(found.densities.prompts, found.densities.per_prompt, strict=True)
    entry = {
        "name": found.model.name,
        "step": found.model.step,
        "metrics": found.metrics,
        "pooled": {name: value for name, value in _estimate(found.densities.pooled).items() if name in POOLED},
        "prompts": [{"prompt": prompt, **_estimate(estimate)} for prompt, estimate in pairs],
        "images": found.images,
    }
    if found is not first:
        change = entropy_change(first.densities, found.densities)
        entry["entropy_change"] = {
            "since": first.model.name,
            "nats": change.value,
            "standard_error": change.standard_error,
            "half_width_95": change.half_width(),
        }
    return entry


def _estimate(estimate: EntropyEstimate) -> dict[str, Any]:
    return {
        **asdict(estimate),
        "half_width_95": estimate.half_width_95,
        "nats_per_dim": estimate.nats_per_dim,
        "bits_per_dim": estimate.bits_per_dim,
        "quantiles": {f"{q:g}": value for q, value in estimate.quantiles.items()},
    }


def table(record: Mapping[str, Any]) -> str:
    """A line for each model."""
    heads = [
        "model",
        "entropy (nats, 95 %)",
        f"change since {record['models'][0]['name']}",
        "bits/dim",
        "std of log p",
        "corrected",
    ]
    heads += ["images: log p (nats)"] if record["models"][0]["images"] else []
    lines = [heads]
    for model in record["models"]:
        metrics, change = model["metrics"], model.get("entropy_change")
        line = [
            model["name"],
            f"{metrics['entropy/nats']:.2f} ± {metrics['entropy/half_width_95']:.2f}",
            f"{change['nats']:+.2f} ± {change['half_width_95']:.2f}" if change else "",
            f"{metrics['entropy/bits_per_dim']:.4f}",
            f"{metrics['ode_log_prob/std']:.2f}",
            f"{metrics['ode_log_prob/std_corrected']:.2f}",
        ]
        lines.append(line + ([f"{_mean_log_prob(model):.2f}"] if model["images"] else []))
    if len(record["models"]) == 1:  # no change to tell
        lines = [line[:2] + line[3:] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _mean_log_prob(model: Mapping[str, Any]) -> float:
    return sum(image["log_prob"] for image in model["images"]) / len(model["images"])


def logged(model: Mapping[str, Any]) -> dict[str, float]:
    """What the trackers are told of one model."""
    return model["metrics"] | ({"images/log_prob": _mean_log_prob(model)} if model["images"] else {})


def figure(record: Mapping[str, Any]) -> Figure:
    """Entropy, spread of log p_0, and the images' log-densities if there are any, against training."""
    models = record["models"]
    panels = 3 if models[0]["images"] else 2
    drawn = Figure(figsize=(4.6 * panels, 3.9), layout="constrained")
    axes = drawn.subplots(1, panels)
    _draw_entropy(axes[0], models)
    _draw_spread(axes[1], models)
    if panels == 3:
        _draw_images(axes[2], models)
    for panel in axes:
        panel.set_xlabel("training (epochs; 0: base model)")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.spines[["top", "right"]].set_visible(False)
    title = f"{record['run']}, {record['weights']} weights: log-density of latents under the guided ODE"
    drawn.suptitle(figure_text(title, 46 * panels // 2))
    return drawn


def _draw_entropy(axes: Axes, models: Sequence[Mapping[str, Any]]) -> None:
    steps, metrics = [model["step"] for model in models], [model["metrics"] for model in models]
    errors = [found["entropy/half_width_95"] for found in metrics]
    axes.errorbar(steps, [found["entropy/nats"] for found in metrics], errors, color=BLUE, marker="o", capsize=3)
    axes.set_ylabel("entropy given the prompt (nats)")
    axes.set_title("Differential entropy, 95 % interval", fontsize="medium")


def _draw_spread(axes: Axes, models: Sequence[Mapping[str, Any]]) -> None:
    steps = [model["step"] for model in models]
    series = (("std", "as observed", GREY, "s"), ("std_corrected", "without the probes' share", ORANGE, "o"))
    for name, label, colour, marker in series:
        values = [model["metrics"][f"ode_log_prob/{name}"] for model in models]
        axes.plot(steps, values, color=colour, marker=marker, label=label)
    axes.set_ylabel("standard deviation of log p (nats)")
    axes.set_title("ode_log_prob std, within prompts", fontsize="medium")
    axes.legend(frameon=False)


def _draw_images(axes: Axes, models: Sequence[Mapping[str, Any]]) -> None:
    steps = [model["step"] for model in models]
    for i in range(len(models[0]["images"])):
        values = [model["images"][i]["log_prob"] for model in models]
        axes.plot(steps, values, color=GREY, linewidth=0.7, marker=".", alpha=0.6, label="each" if i == 0 else None)
    axes.plot(steps, [_mean_log_prob(model) for model in models], color=BLUE, marker="o", label="mean")
    axes.set_ylabel("log p of the given image (nats)")
    axes.set_title("Given images", fontsize="medium")
    axes.legend(frameon=False)
