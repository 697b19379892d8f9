"""Entropy and log-densities of the base model and of a run's checkpoints, and the log-density of given images.

    python scripts/diversity_metrics/eval_ode_log_prob.py --run logs/RUN
    python scripts/diversity_metrics/eval_ode_log_prob.py --run logs/RUN --checkpoints base,10,20 --ema
    python scripts/diversity_metrics/eval_ode_log_prob.py --run logs/RUN --images DIR --prompt "a bag"

The density is that of VAE-scaled latents, given the prompt, under the guided ODE of the run's evaluation (config.eval)
and in as many steps; no density of pixels, no law of a stochastic sampler, and no probability. The run's config.json
says everything else; noise and probes are keyed, the same for every model, and for the run's own evaluations.

Intervals are Student's, at 95 %, with the degrees of freedom of the samples: n - 1 for one prompt, by Welch and
Satterthwaite for the mean over several.

Images are encoded to the mode of the VAE's posterior and carried from data to noise. Euler's steps are there not those
of the sampler turned round (and the first is at sigma = 0): give --num-steps or --solver to have both agree.

Written to --out (default: RUN/ode_log_prob, or RUN/ode_log_prob_ema; with --images the first of these, -2, -3, ... that
is not there): ode_log_prob.json and, if it can be drawn, ode_log_prob.png. The scalars go to the run's trackers under
checkpoint/ or checkpoint_ema/. Nothing else of the run is written. The last line says where.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ml_collections import ConfigDict

from flow_grpo.commands import cli
from flow_grpo.diversity.images import listing, read_rgb, stack
from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import figure_text, one_line, optional_figure
from flow_grpo.files import strict_json, write_atomically
from flow_grpo.rules import text_fault
from flow_grpo.runs.config import read_config
from flow_grpo.runs.folder import flatten, fresh_folder
from flow_grpo.training.weights import Bars, Model, choose_models, load_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from flow_grpo.entropy import EntropyEstimate, ProbeGenerators
    from flow_grpo.evaluators.entropy import PromptLogDensities
    from flow_grpo.policy import Policy
    from flow_grpo.runs.run import Run
    from flow_grpo.statistics import Estimate

RESULTS, FIGURE = "ode_log_prob.json", "ode_log_prob.png"
OVERRIDES = {  # command-line option -> configuration key
    "num_probes": "entropy.num_probes",
    "num_image_per_prompt": "entropy.num_image_per_prompt",
    "num_prompts": "entropy.num_prompts",
    "solver": "entropy.solver",
    "num_steps": "eval.num_steps",
}
MEASURE = ("resolution", "pretrained.", "prompts.test", "entropy.", "eval.seed", "eval.num_steps", "eval.guidance")
# of the samples of all prompts together: their spread, and no entropy, which would be that of the mixture
POOLED = ("num_samples", "log_prob_std", "log_prob_std_corrected", "minimum", "maximum", "quantiles")
MAX_PAIRS, PROMPT_WIDTH = 20, 80  # images printed with their prompts, and letters of each
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # Okabe and Ito's


@dataclass(frozen=True)
class ImageFile:
    """An image whose density is asked, under its prompt."""

    path: Path
    prompt: str


@dataclass(frozen=True)
class Measured:
    """What one model gave."""

    model: Model
    densities: PromptLogDensities
    metrics: dict[str, float]  # of flow_grpo.evaluators.entropy.entropy_metrics
    images: list[dict[str, Any]] = field(default_factory=list)


# --- what to measure ----------------------------------------------------------------------------------------


def evaluated_prompts(config: ConfigDict) -> tuple[str, ...]:
    """The first `entropy.num_prompts` distinct prompts that the run's evaluation uses."""
    from flow_grpo.prompts import PromptDataset

    evaluated = PromptDataset.load(config.prompts.test).prompts[: config.eval.num_prompts or None]
    return tuple(dict.fromkeys(evaluated))[: config.entropy.num_prompts]


def _prompts_of(count: int, prompt: str, prompts_file: str) -> Sequence[str]:
    """The prompt of each of `count` images; ConfigError unless one way of saying it is given, and fits."""
    from flow_grpo.prompts import PromptDataset

    if bool(prompt) == bool(prompts_file):
        raise ConfigError("--images needs either --prompt, one for all, or --prompts, a file with one for each.")
    if fault := text_fault(prompt):
        raise ConfigError(f"--prompt {fault}; it takes text.")
    prompts = PromptDataset.load(prompts_file).prompts if prompts_file else (prompt,) * count
    if len(prompts) != count:
        raise ConfigError(f"--prompts {prompts_file} has {len(prompts)} prompts for {count} images.")
    return prompts


def read_images(folder: Path, prompt: str, prompts_file: str, resolution: int) -> list[ImageFile]:
    """The images of a folder in the order of their names, 2 before 10, each with its prompt.

    All are decoded once, so that nothing is found unreadable later.

    Raises:
        ConfigError: a file that is no image, or of another size; no image; not as many prompts as images.
    """
    if not folder.is_dir():
        raise ConfigError(f"--images {folder} is not a folder.")
    paths, folders = listing(folder)
    if folders:
        raise ConfigError(f"--images {folder} holds a folder ({folders[0].name}); it takes images only.")
    if not paths:
        raise ConfigError(f"--images {folder} holds no image.")
    prompts = _prompts_of(len(paths), prompt, prompts_file)
    for path in paths:
        height, width = read_rgb(path).shape[:2]
        if (width, height) != (resolution, resolution):
            raise ConfigError(
                f"--images: {path} is {width} x {height} pixels; the run's are {resolution} x {resolution} "
                "(config.resolution)."
            )
    return [ImageFile(path, text) for path, text in zip(paths, prompts, strict=True)]


def pairing(images: Sequence[ImageFile]) -> str:
    """Which image goes with which prompt: a line each, of the first MAX_PAIRS."""
    lines = [f"{image.path.name}: {one_line(image.prompt, PROMPT_WIDTH)}" for image in images[:MAX_PAIRS]]
    more = len(images) - len(lines)
    return "\n".join([*lines, *([f"and {more} more, in the order of the names"] if more else [])])


# --- measuring ----------------------------------------------------------------------------------------------


def encode_images(policy: Policy, pixels: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> latents (B, C, h, w) float32, at the scale of the transformer."""
    import torch

    with torch.no_grad():
        return policy.family.encode_image(pixels)


def image_probes(seed: int, indices: Sequence[int]) -> ProbeGenerators:
    """Generators of the probes of given images, by their place in the order: the same for every model."""
    from flow_grpo.randomness import keyed_generator

    return lambda evaluation: [keyed_generator(seed, "image probe", i, evaluation) for i in indices]


def data_log_densities(policy: Policy, latents: Tensor, prompts: Sequence[str]) -> list[dict[str, float]]:
    """log p_0 of latents (N, C, h, w), each given its prompt, from data to noise."""
    from flow_grpo.entropy import ode_log_density
    from flow_grpo.evaluators.entropy import estimator_of

    config, found = policy.settings.config, []
    for start in range(0, len(latents), config.entropy.batch_size):
        part = range(start, min(start + config.entropy.batch_size, len(latents)))
        density = ode_log_density(
            policy.velocity(policy.encode([prompts[i] for i in part]), config.eval.guidance_scale),
            latents[part.start : part.stop],
            policy.sigmas(config.eval.num_steps).flip(0),
            estimator_of(policy),
            image_probes(config.eval.seed, part),
            solver=config.entropy.solver,
        )
        columns = (density.log_prob, density.nats_per_dim, density.bits_per_dim, density.probe_standard_error)
        names = ("log_prob", "nats_per_dim", "bits_per_dim", "probe_standard_error")
        rows = zip(*(column.tolist() for column in columns), strict=True)
        found += [dict(zip(names, row, strict=True)) for row in rows]
    return found


def measure(
    policy: Policy, models: Sequence[Model], prompts: Sequence[str], images: Sequence[ImageFile], ema: bool
) -> list[Measured]:
    """Every model on the same noise and probes; afterwards the policy has the weights of the last."""
    import torch

    from flow_grpo.entropy import NonFiniteError
    from flow_grpo.evaluators.entropy import entropy_metrics, prompt_log_densities

    base = [parameter.detach().clone() for parameter in policy.trainable]
    paths, size = [image.path for image in images], policy.settings.config.entropy.batch_size
    parts = [encode_images(policy, stack(paths[start : start + size])) for start in range(0, len(paths), size)]
    latents = torch.cat(parts) if parts else None
    bars, texts = Bars(), [image.prompt for image in images]
    measured = []
    for model in bars.progress(models, "models"):
        load_weights(policy, model, base, ema)
        try:
            densities = prompt_log_densities(policy, prompts, cast("Run", bars))
            values = [] if latents is None else data_log_densities(policy, latents, texts)
        except NonFiniteError as error:
            raise ConfigError(f"{model.name} has no log-density: {error}") from error
        rows = [{"file": i.path.name, "prompt": i.prompt, **v} for i, v in zip(images, values, strict=True)]
        measured.append(Measured(model, densities, entropy_metrics(densities), rows))
    return measured


def entropy_change(first: PromptLogDensities, other: PromptLogDensities) -> Estimate:
    """Entropy of `other` minus that of `first`, mean over prompts; nats.

    Noise and probes are common, so the samples are compared in pairs: the error is that of the difference.
    """
    from flow_grpo.evaluators.entropy import mean_over_prompts

    return mean_over_prompts(first.log_prob - other.log_prob)


# --- results ------------------------------------------------------------------------------------------------


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


def _logged(model: Mapping[str, Any]) -> dict[str, float]:
    """What the trackers are told of one model."""
    return model["metrics"] | ({"images/log_prob": _mean_log_prob(model)} if model["images"] else {})


def figure(record: Mapping[str, Any]) -> Figure:
    """Entropy, spread of log p_0, and the images' log-densities if there are any, against training."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

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


# --- the command --------------------------------------------------------------------------------------------


def create_folder(args: argparse.Namespace, run: Path) -> Path:
    """The folder of the results: --out, or one in the run's, a fresh one for given images.

    Raises:
        ConfigError: it cannot be a folder.
    """
    path = Path(args.out) if args.out else run / ("ode_log_prob_ema" if args.ema else "ode_log_prob")
    try:
        if args.images and not args.out:
            return fresh_folder(path)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be a folder: {error.strerror}.") from error
    return path


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write the files and the trackers; what ode_log_prob.json holds."""
    overrides = {key: getattr(args, name) for name, key in OVERRIDES.items() if getattr(args, name) is not None}
    if args.num_prompts is not None:
        overrides["eval.num_prompts"] = 0  # not only those that the training evaluated
    run = Path(args.run)
    config = read_config(run, overrides)
    if not args.images and (args.prompt or args.prompts):
        raise ConfigError("--prompt and --prompts say what --images shows; give --images too.")
    models = choose_models(run, args.checkpoints, config, args.ema)
    images = read_images(Path(args.images), args.prompt, args.prompts, config.resolution) if args.images else []
    if args.prompts:
        print(pairing(images))
    out = create_folder(args, run)

    from flow_grpo.launch import launch
    from flow_grpo.policy import Policy
    from flow_grpo.runs.trackers import log_checkpoints

    settings, accelerator = launch(config)
    prompts = evaluated_prompts(config)
    if args.num_prompts is not None and len(prompts) < args.num_prompts:
        raise ConfigError(f"--num-prompts {args.num_prompts} is more than the {len(prompts)} of {config.prompts.test}.")
    measured = measure(Policy.load(settings, accelerator), models, prompts, images, args.ema)
    record = results(measured, settings.config, run, args.ema)
    write_atomically(out / RESULTS, strict_json(record, indent=1) + "\n")
    with optional_figure(out / FIGURE):
        figure(record).savefig(out / FIGURE, dpi=130)
    log_checkpoints(
        accelerator,
        config,
        run,
        "checkpoint_ema" if args.ema else "checkpoint",
        {model["step"]: _logged(model) for model in record["models"]},
    )
    print(table(record), f"\n\nwritten to {out}", sep="")
    return record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="the folder of a run")
    parser.add_argument(
        "--checkpoints", default="base,all", help='"base", "all", "latest", epochs; commas between (default: base,all)'
    )
    parser.add_argument("--ema", action="store_true", help="the averaged weights of the checkpoints")
    parser.add_argument("--images", default="", help="a folder of images whose log-density to find")
    parser.add_argument("--prompt", default="", help="the prompt of all images")
    parser.add_argument("--prompts", default="", help="a file of prompts, one for each image in the order of the names")
    parser.add_argument("--out", default="", help="folder of the results (default: RUN/ode_log_prob)")
    for name, key in OVERRIDES.items():
        kind = str if name == "solver" else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"instead of the run's config.{key}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate; exit code 2 after one sentence about bad input."""
    args = parse(arguments)
    with cli.one_sentence_errors():
        evaluate(args)


if __name__ == "__main__":
    main()
