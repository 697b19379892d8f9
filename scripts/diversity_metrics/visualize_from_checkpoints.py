"""A page that shows what training did: the base model and a run's checkpoints on the same prompts, noise and probes.

    python scripts/diversity_metrics/visualize_from_checkpoints.py --checkpoint_dir logs/RUN/checkpoints --visualize_all
    python scripts/diversity_metrics/visualize_from_checkpoints.py --checkpoint_dir logs/RUN/checkpoints \\
        --checkpoint_steps 100,200 --ema --num_prompts 4 --num_seeds 8

For each model, with one load of the base model: the film strip of the denoising, final images side by side, divergence
and log-density at every step, Vendi, RKE, differential entropy, the spread of the log-density, reward, and what the
judge recognises. Samples are those of the run's evaluations: noise and probes are keyed, and the same for every model.
The run's config.json says everything; the last two options only make it smaller.

Written to --out (default: RUN/visualization, or RUN/visualization_ema): index.html, which needs no other file, its
figures as PNGs, and results.json. Metrics and figures go to the run's trackers under checkpoint/ or checkpoint_ema/.
A run that never chose RKE's bandwidth gets RUN/diversity/bandwidth.json. Nothing else of the run is written.
"""

from __future__ import annotations

import argparse
import base64
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from ml_collections import ConfigDict

from flow_grpo.commands import cli
from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import optional_figure
from flow_grpo.files import strict_json, write_atomically
from flow_grpo.runs.config import read_config
from flow_grpo.runs.folder import CONFIG_FILE, flatten
from flow_grpo.runs.saved import finished_checkpoints
from flow_grpo.runs.weights import Bars, Model, choose_models, load_weights, output_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from scripts.diversity_metrics.checkpoint_figures import (
    GAP,
    LEFT,
    MAX_CURVES,
    MAX_FRAMES,
    MAX_WIDTH,
    PANELS,
    cell_side,
    curves_figure,
    label,
    metrics_figure,
    sheet,
    shown_metrics,
    steps_figure,
    strip_frames,
    t_half_widths,
    thumbnails,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from flow_grpo.diversity.measure import Diversity
    from flow_grpo.ode_log_prob import PromptLogDensities
    from flow_grpo.policy import Policy
    from flow_grpo.step_visualizer import FilmStrip
    from flow_grpo.tracking import Run
    from flow_grpo.types import Samples

PAGE, RESULTS, TEMPLATE = "index.html", "results.json", "visualize_from_checkpoints.html.j2"
SETTINGS = ("resolution", "pretrained.", "prompts.test", "prompts.eval_diversity", "num_seeds", "reward_fn.",
            "reward_model.", "eval.", "entropy.", "diversity.")  # fmt: skip
LEAST_SEEDS = 4  # an interval of Vendi and RKE needs so many images of a prompt
NORMAL_95 = 1.96


@dataclass
class Measured:
    """What one model gave; a part that failed is None, and `failures` says why."""

    model: Model
    metrics: dict[str, float] = field(default_factory=dict)  # as the evaluators of the training name them
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # of some of them, 95 %
    diversity: Diversity | None = None
    densities: PromptLogDensities | None = None
    strip: FilmStrip | None = None  # without its images: what is shown of them are the frames
    frames: dict[str, np.ndarray] = field(default_factory=dict)  # noise level -> (prompts, 1, s, s, 3) uint8
    thumbnails: np.ndarray | None = None  # (prompts, seeds, s, s, 3) uint8
    failures: dict[str, str] = field(default_factory=dict)  # part -> why


# --- what to show -------------------------------------------------------------------------------------------


def run_folder(given: str) -> Path:
    """The run whose checkpoints folder, or which itself, is given; ConfigError if it is neither."""
    folder = Path(given)
    run = folder.resolve().parent if folder.resolve().name == "checkpoints" else folder
    if not (run / CONFIG_FILE).is_file():
        raise ConfigError(f"--checkpoint_dir {given} is neither the checkpoints folder of a run nor a run folder.")
    return run


def chosen_checkpoints(args: argparse.Namespace, run: Path) -> str:
    """For `choose_models`: the base model and the checkpoints that the command line names.

    Raises:
        ConfigError: it names none, or some that are not there; or both ways of naming them.
    """
    found = finished_checkpoints(run / "checkpoints")
    everything = args.visualize_all.lower()
    if everything not in ("true", "false"):
        raise ConfigError(f"--visualize_all={args.visualize_all} is not allowed; it takes true or false.")
    if not found:
        raise ConfigError(f"--checkpoint_dir {args.checkpoint_dir} holds no checkpoint.")
    there = ", ".join(map(str, found))
    if (everything == "true") == bool(args.checkpoint_steps):
        raise ConfigError(f"Give either --visualize_all=True or --checkpoint_steps with some of {there}.")
    words = [word.strip() for word in args.checkpoint_steps.split(",")] if args.checkpoint_steps else []
    missing = [word for word in words if not word.isdecimal() or int(word) not in found]
    if missing:
        raise ConfigError(f"--checkpoint_steps: {run} has no checkpoint {missing[0]!r}; it has those of {there}.")
    return ",".join(["base", *(words or ["all"])])


def smaller(config: ConfigDict, num_prompts: int | None, num_seeds: int | None) -> dict[str, int]:
    """The keys that --num_prompts and --num_seeds change, each to no more than the run has."""
    from flow_grpo.prompts import PromptDataset

    changed = {}
    if num_seeds is not None:
        if not LEAST_SEEDS <= num_seeds <= config.num_seeds:
            raise ConfigError(f"--num_seeds {num_seeds} is not allowed; it takes {LEAST_SEEDS} to {config.num_seeds}.")
        changed["num_seeds"] = num_seeds
        for key in ("eval", "entropy"):
            changed[f"{key}.num_image_per_prompt"] = min(num_seeds, config[key].num_image_per_prompt)
    if num_prompts is not None:
        files = {"eval": config.prompts.test, "diversity": config.prompts.eval_diversity}
        present = {key: len(PromptDataset.load(path)) for key, path in files.items()}
        used = {key: config[key].num_prompts or count for key, count in present.items()}
        if not 1 <= num_prompts <= max(used.values()):
            raise ConfigError(f"--num_prompts {num_prompts} is not allowed; it takes 1 to {max(used.values())}.")
        changed |= {f"{key}.num_prompts": min(num_prompts, count) for key, count in used.items()}
        for key in ("entropy.num_prompts", "entropy.num_strip_prompts"):
            changed[key] = min(num_prompts, config.entropy[key.split(".")[1]])
    return changed


# --- measuring ----------------------------------------------------------------------------------------------


class Instruments:
    """Everything that measures a model, loaded once. The base model must come first: RKE's bandwidth may be its."""

    def __init__(self, policy: Policy, config: ConfigDict, run: Path, grid_width: int) -> None:
        """`grid_width`: images of a prompt that the grid has room for."""
        from flow_grpo.evaluation import sample_evaluators, test_request
        from flow_grpo.evaluators.diversity import diversity_request, extractor_of
        from flow_grpo.prompts import PromptDataset
        from flow_grpo.rewards import build_reward

        self.policy, self.config, self.run, self.grid_width = policy, config, run, grid_width
        self.prompts = PromptDataset.load(config.prompts.test)
        self.tested = test_request(self.prompts, policy.settings)
        self.diverse = diversity_request(config)
        self.evaluators = sample_evaluators(build_reward(config, policy.device), policy.settings, policy.device)
        self.extractor = extractor_of(config, policy.device)
        self.bandwidth: float | None = None
        self.bars = cast("Run", Bars())

    @property
    def texts(self) -> tuple[str, ...]:
        """The different test prompts."""
        return tuple(dict.fromkeys(self.tested.prompts))

    def measure(self, model: Model) -> Measured:
        """The model whose weights the policy has; a checkpoint that has diverged only loses its own numbers.

        Raises:
            ConfigError: the base model cannot be measured.
        """
        from flow_grpo.diversity.features import NonFiniteFeatures
        from flow_grpo.entropy import NonFiniteError

        found = Measured(model)
        parts: dict[str, Callable[[Measured], None]] = {
            "samples": self._samples,
            "log-densities": self._densities,
            "film strip": self._strip,
        }
        for name, part in parts.items():
            try:
                part(found)
            except (NonFiniteError, NonFiniteFeatures) as error:
                if model.folder is None:
                    raise ConfigError(f"The base model's {name} cannot be measured: {error}") from error
                found.failures[name] = str(error)
        return found

    def _samples(self, found: Measured) -> None:
        """Rewards, judge, diversity, thumbnails."""
        from flow_grpo.diversity import measure as diversity
        from flow_grpo.entropy import NonFiniteError
        from flow_grpo.evaluation import draw_samples, view
        from flow_grpo.evaluators.diversity import features_by_prompt, measure, run_bandwidth

        samples = draw_samples(
            self.policy, self.prompts, self.policy.settings, self.bars, [self.tested, self.diverse], "checkpoints"
        )
        if not (samples.images.isfinite().all() and samples.latents.isfinite().all()):
            raise NonFiniteError("its images are not finite")
        tested = view(samples, self.tested)
        found.thumbnails = self._thumbnails(tested)
        for evaluator in self.evaluators:
            found.metrics |= evaluator.evaluate(tested).metrics
        found.intervals |= self._intervals(tested, found.metrics)
        features = features_by_prompt(view(samples, self.diverse), self.extractor)
        self.bandwidth = self.bandwidth or run_bandwidth(self.config, self.run, self.extractor, features)
        found.diversity = measure(features, self.bandwidth, self.extractor.name, self.config)
        found.metrics |= diversity.metrics(found.diversity)
        for name in ("vendi", "rke"):
            interval = getattr(found.diversity.within, name)
            found.intervals[f"diversity/{name}"] = (interval.low, interval.high)

    def _thumbnails(self, tested: Samples) -> np.ndarray:
        """(prompts, seeds, s, s, 3) of the first images of the first prompts."""
        rows = [
            thumbnails(tested.images[tested.prompt_ids == prompt][: self.grid_width])
            for prompt in tested.prompt_ids.unique().tolist()[: self.config.eval.num_grid_prompts]
        ]
        return np.stack(rows)

    def _intervals(self, tested: Samples, metrics: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Of the rewards: t, from the means of each seed, which are independent; of the judge's accuracy: Wilson's."""
        from scipy.stats import binomtest

        reward = next(evaluator for evaluator in self.evaluators if evaluator.name == "reward")
        seeds = [(tested.sample_ids == seed).nonzero().flatten().tolist() for seed in tested.sample_ids.unique()]
        means = [reward.evaluate(tested[rows]).metrics for rows in seeds]
        widths = {name: t_half_widths(np.array([mean[name] for mean in means])) for name in means[0]}
        found = {name: _around(metrics[name], float(width)) for name, width in widths.items()}
        if "judge/accuracy" in metrics:
            count = len(tested.prompts)
            wilson = binomtest(round(metrics["judge/accuracy"] * count), count).proportion_ci(method="wilson")
            found["judge/accuracy"] = (float(wilson.low), float(wilson.high))
        return found

    def _densities(self, found: Measured) -> None:
        """Entropy and the spread of the log-density."""
        from flow_grpo.ode_log_prob import entropy_metrics, prompt_log_densities

        texts = self.texts[: self.config.entropy.num_prompts]
        found.densities = prompt_log_densities(self.policy, texts, self.bars)
        found.metrics |= entropy_metrics(found.densities)
        half_widths = {
            "entropy/nats": found.metrics["entropy/half_width_95"],
            "ode_log_prob/std": NORMAL_95 * std_standard_error(found.densities.log_prob.numpy()),
        }
        found.intervals |= {name: _around(found.metrics[name], width) for name, width in half_widths.items()}

    def _strip(self, found: Measured) -> None:
        from flow_grpo.step_visualizer import film_strip

        strip = film_strip(self.policy, self.texts[: self.config.entropy.num_strip_prompts])
        found.frames = strip_frames(strip)
        found.strip = replace(strip, images=strip.images[:, :0])


def _around(value: float, half_width: float) -> tuple[float, float]:
    return value - half_width, value + half_width


def std_standard_error(log_prob: np.ndarray) -> float:
    """Of `ode_log_prob/std`, the root of the mean variance of P prompts, (P, S): each prompt's by the jackknife."""
    prompts, samples = log_prob.shape
    if samples < 3:
        return math.nan
    left_out = np.stack([np.delete(log_prob, s, 1).var(1, ddof=1) for s in range(samples)], 1)  # (P, S)
    of_variance = np.sqrt((samples - 1) * left_out.var(1).sum()) / prompts
    return float(of_variance / (2 * np.sqrt(log_prob.var(1, ddof=1).mean())))


# --- results ------------------------------------------------------------------------------------------------


def results(measured: Sequence[Measured], instruments: Instruments, ema: bool) -> dict[str, Any]:
    """What results.json holds, nan included: every model has the keys that the base model has."""
    config, base = instruments.config, measured[0]
    assert base.densities is not None  # or measuring it had raised
    assert base.strip is not None
    return {
        "run": instruments.run.resolve().name,
        "weights": "averaged" if ema else "current",
        "density": "of VAE-scaled latents given the prompt, under the guided ODE; nats unless a name says otherwise",
        "settings": {k: v for k, v in flatten(config.to_dict()).items() if k.startswith(SETTINGS)},
        "bandwidth": instruments.bandwidth,
        "dims": base.densities.dims,
        "prompts": {
            "evaluated": list(instruments.texts),
            "diversity": list(instruments.diverse.prompts),
            "density": list(base.densities.prompts),
            "strip": list(instruments.texts[: config.entropy.num_strip_prompts]),
        },
        "images_per_prompt": {
            "evaluated": config.eval.num_image_per_prompt,
            "diversity": config.num_seeds,
            "density": config.entropy.num_image_per_prompt,
            "strip": 1,
        },
        "sigmas": base.strip.sigmas,
        "models": [_entry(found, base) for found in measured],
    }


def _entry(found: Measured, base: Measured) -> dict[str, Any]:
    from flow_grpo.diversity import measure as diversity

    strip, densities = found.strip, found.densities
    return {
        "name": found.model.name,
        "step": found.model.step,
        "failures": found.failures,
        "metrics": {name: found.metrics.get(name, math.nan) for name in base.metrics},
        "intervals": {name: found.intervals.get(name, (math.nan, math.nan)) for name in base.intervals},
        "entropy_change": _entropy_change(found, base),
        "diversity": None if found.diversity is None else diversity.record(found.diversity),
        "log_prob": None if densities is None else densities.log_prob.tolist(),
        "divergence_by_step": None if strip is None else strip.divergence.tolist(),
        "log_density_by_step": None if strip is None else strip.log_density.tolist(),
    }


def _entropy_change(found: Measured, base: Measured) -> dict[str, float] | None:
    """Since the base model, in pairs of samples with common noise and probes."""
    from scripts.diversity_metrics.eval_ode_log_prob import entropy_change

    if found is base or found.densities is None or base.densities is None:
        return None
    change = entropy_change(base.densities, found.densities)
    low, high = _around(change.mean, change.half_width_95)
    return {"nats": change.mean, "low": low, "high": high}


def table(record: Mapping[str, Any]) -> list[list[str]]:
    """A line of heads, then one for each model."""
    names = shown_metrics(record)
    lines = [["model", *(f"{PANELS[name][0]}, {PANELS[name][1]}" for name in names), "Change of the entropy, nats"]]
    for model in record["models"]:
        cells = [_cell(model["metrics"][name], model["intervals"][name], PANELS[name][2]) for name in names]
        change = model["entropy_change"]
        cells.append(_cell(change["nats"], (change["low"], change["high"]), 1) if change else "")
        lines.append([label(model), *cells])
    return lines


def _cell(value: float, interval: tuple[float, float], decimals: int) -> str:
    low, high = interval
    if not math.isfinite(value):
        return "not finite"
    ends = f" ({low:.{decimals}f} to {high:.{decimals}f})" if math.isfinite(low + high) else ""
    return f"{value:.{decimals}f}{ends}"


def notes(record: Mapping[str, Any]) -> list[str]:
    """What could not be measured."""
    found = []
    for model in record["models"]:
        found += [f"{model['name']}: no {part}: {why}." for part, why in model["failures"].items()]
        lost = [PANELS[name][0] for name in shown_metrics(record) if not math.isfinite(model["metrics"][name])]
        if lost and not model["failures"]:
            found.append(f"{model['name']}: not finite: {', '.join(lost)}.")
    return found


def grid_sheet(measured: Sequence[Measured], prompts: Sequence[str]) -> Image.Image:
    """A column of blocks for each model: rows are prompts, within a block each column is a seed."""
    blocks = {label(found.model).replace(" ", "\n"): found.thumbnails for found in measured}
    rows = measured[0].thumbnails
    assert rows is not None  # or measuring the base model had raised
    return sheet(blocks, prompts[: len(rows)], "prompt")


# --- the page -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A figure of the page."""

    file: str
    title: str  # empty: it goes on under the heading before
    caption: str
    data: str  # base64 of the PNG


def write_pictures(measured: Sequence[Measured], record: Mapping[str, Any], out: Path) -> list[Picture]:
    """Draw and save every figure; one that cannot be drawn is a warning, and the page is without it."""
    said, texts = captions(record), record["prompts"]
    found = [
        _saved(lambda: metrics_figure(record), out / "metrics.png", "Against training", said["metrics"]),
        _saved(lambda: grid_sheet(measured, texts["evaluated"]), out / "grid.png", "Images", said["grid"]),
        _saved(lambda: curves_figure(record), out / "curves.png", "Along the path", said["curves"]),
        _saved(lambda: steps_figure(record), out / "steps.png", "Steps against training", said["steps"]),
    ]
    for model in measured:
        if not model.frames:
            continue
        draw = partial(sheet, model.frames, texts["strip"], label(model.model))
        first = model is measured[0]
        caption = f"{label(model.model)}. {said['strip']}" if first else f"{label(model.model)}."
        found.append(_saved(draw, out / f"strip_{model.model.name}.png", "Film strips" if first else "", caption))
    return [picture for picture in found if picture]


def _saved(draw: Callable[[], Figure | Image.Image], path: Path, title: str, caption: str) -> Picture | None:
    from PIL import Image

    with optional_figure(path):
        drawn = draw()
        if isinstance(drawn, Image.Image):
            drawn.save(path)
        else:
            drawn.savefig(path, dpi=110)
        return Picture(path.name, title, caption, base64.b64encode(path.read_bytes()).decode())
    return None


def captions(record: Mapping[str, Any]) -> dict[str, str]:
    """What is measured on what."""
    said, counts = record["settings"], record["images_per_prompt"]
    found = record["models"][0]["diversity"]
    width = "no h fits" if found["bandwidth"] is None else f"h = {found['bandwidth']:.4g}"
    prompts = {name: len(texts) for name, texts in record["prompts"].items()}
    sampler = f"ODE sampler, {said['eval.num_steps']} steps, guidance {said['eval.guidance_scale']:g}"
    probes = f"{said['entropy.num_probes']} {said['entropy.distribution']} probes"
    density = "the density of VAE-scaled latents given the prompt, under the guided ODE"
    return {
        "metrics": (
            f"{sampler}. Vendi (q = {found['order']:g}, cosine kernel) and RKE (Gaussian kernel, "
            f"{width}): means over {prompts['diversity']} prompts with {counts['diversity']} images "
            f"each, features {found['features']}; bootstrap intervals, prompts fixed. Both depend on the number of "
            f"images. Entropy and spread of log p: {density}, {prompts['density']} prompts with {counts['density']} "
            f"images each, {probes}, solver {said['entropy.solver']}; intervals by Student's t, probes included, and "
            f"the jackknife. Reward and judge: {prompts['evaluated']} prompts with {counts['evaluated']} images "
            "each; Student's t over seeds, and Wilson's interval. All are of 95 % and of one model; noise is common: "
            "changes are known better than these tell. Dotted: base model. Cross: not finite."
        ),
        "grid": (
            f"Columns are models, rows the first prompts of {prompts['evaluated']}; the same place has the same prompt "
            f"and the same noise in every column. {sampler}, {said['resolution']} x {said['resolution']} pixels, "
            "enlarged or reduced by a whole factor."
        ),
        "curves": (
            f"Divergence of the guided velocity ({probes}) and log-density of x at each sigma ({density}) along the "
            f"sampler's own path: {sampler}. Means over {prompts['strip']} prompts, one image each; noise and probes "
            "are the same for every model. Below: the same less the base model's; its intervals are in the next figure."
        ),
        "steps": (
            f"At most {MAX_CURVES} of the steps of the figure above. Below: less the base model's on the same noise "
            f"and probes, with the 95 % interval of the mean over the {prompts['strip']} prompts (Student's t; none "
            "with one prompt). Bars stand side by side to be seen."
        ),
        "strip": (
            f"x0_hat = x - sigma v, decoded, at each step ({sampler}; at most {MAX_FRAMES} are shown). The first noise "
            f"of {prompts['strip']} prompts, the same for every model."
        ),
    }


def page(record: Mapping[str, Any], pictures: Sequence[Picture], command: str) -> str:
    """The HTML, which refers to nothing outside it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    heads, *lines = table(record)
    return environment.get_template(TEMPLATE).render(
        record=record, notes=notes(record), heads=heads, lines=lines, pictures=pictures, command=command
    )


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Turned round for the terminal: a line for each metric."""
    turned = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in zip(*turned, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in turned)


# --- the command --------------------------------------------------------------------------------------------


def visualize(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure, draw, write the page and the trackers; what results.json holds."""
    run = run_folder(args.checkpoint_dir)
    config = read_config(run, {"eval_diversity": True})
    models = choose_models(run, chosen_checkpoints(args, run), config, args.ema)
    config.update_from_flattened_dict(smaller(config, args.num_prompts, args.num_seeds))
    out = output_folder(args.out or run / ("visualization_ema" if args.ema else "visualization"))

    from flow_grpo.launch import launch
    from flow_grpo.policy import Policy
    from flow_grpo.runs.trackers import log_checkpoints

    settings, accelerator = launch(config)
    room = (MAX_WIDTH - LEFT) // len(models) // (cell_side(config.resolution) + GAP)
    grid_width = min(config.eval.num_grid_images, config.eval.num_image_per_prompt, max(2, room))
    instruments = Instruments(Policy.load(settings, accelerator), config, run, grid_width)
    out.mkdir(parents=True, exist_ok=True)
    measured = measure_models(instruments, models, args.ema)
    record = results(measured, instruments, args.ema)
    write_atomically(out / RESULTS, strict_json(record, indent=1) + "\n")
    pictures = write_pictures(measured, record, out)
    write_atomically(out / PAGE, page(record, pictures, command).encode("utf-8", "backslashreplace"))
    prefix = "checkpoint_ema" if args.ema else "checkpoint"
    metrics = {found.model.step: found.metrics for found in measured if found.metrics}
    log_checkpoints(accelerator, config, run, prefix, metrics, _images(pictures, out))
    print(text_table(table(record)), *notes(record), f"\nwritten to {out / PAGE}", sep="\n")
    return record


def measure_models(instruments: Instruments, models: Sequence[Model], ema: bool) -> list[Measured]:
    """One after the other; afterwards the policy has the weights of the last."""
    policy = instruments.policy
    base = [parameter.detach().clone() for parameter in policy.trainable]
    measured = []
    for model in Bars().progress(models, "models"):
        load_weights(policy, model, base, ema)
        measured.append(instruments.measure(model))
    return measured


def _images(pictures: Sequence[Picture], out: Path) -> dict[str, Image.Image]:
    from PIL import Image

    return {Path(picture.file).stem: Image.open(out / picture.file) for picture in pictures}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; dashes are taken for underscores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options: dict[str, dict[str, Any]] = {
        "checkpoint_dir": {"required": True, "help": "the checkpoints folder of a run, or the run folder"},
        "visualize_all": {"nargs": "?", "const": "true", "default": "false", "help": "true: every checkpoint"},
        "checkpoint_steps": {"default": "", "help": "instead: epochs that have a checkpoint, with commas between"},
        "num_prompts": {"type": int, "help": "use only the first so many prompts"},
        "num_seeds": {"type": int, "help": f"use at most so many images of a prompt, {LEAST_SEEDS} or more"},
        "out": {"default": "", "help": "folder of the results (default: RUN/visualization)"},
    }
    for name, option in options.items():
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **option)
    parser.add_argument("--ema", action="store_true", help="the averaged weights of the checkpoints")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Visualize; exit code 2 after one sentence about bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parse(given)
    with cli.one_sentence_errors():
        visualize(args, shlex.join(["python", "scripts/diversity_metrics/visualize_from_checkpoints.py", *given]))


if __name__ == "__main__":
    main()
