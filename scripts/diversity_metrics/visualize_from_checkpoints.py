"""A page that shows what training did: the base model and a run's checkpoints on the same prompts, noise and probes.

    python scripts/diversity_metrics/visualize_from_checkpoints.py --checkpoint_dir logs/RUN/checkpoints --visualize_all
    python scripts/diversity_metrics/visualize_from_checkpoints.py --checkpoint_dir logs/RUN/checkpoints \\
        --checkpoint_steps 100,200 --ema --num_prompts 4 --num_seeds 8

For each model, with one load of the base model: images, reward, what the judge recognises, Vendi, RKE, differential
entropy, the spread of the log-density, the film strip of the denoising, divergence and log-density at every step.
Samples are those of the run's evaluations: noise and probes are keyed, and the same for every model. The run's
config.json says everything; the last two options only make it smaller.

Written to --out (default: RUN/visualization, or RUN/visualization_ema), a folder as a run's:

    page.html      the page, which needs no other file
    evaluations/   a record of each model
    images/        film strips; curves along the path and against training
    results.json   every number

Metrics and figures go to the run's trackers under checkpoint/ or checkpoint_ema/. A run that never chose RKE's
bandwidth gets RUN/diversity/bandwidth.json. Nothing else of the run is written.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from ml_collections import ConfigDict

from flow_grpo.commands import cli
from flow_grpo.errors import ConfigError
from flow_grpo.evaluators.base import Measured
from flow_grpo.figure_text import optional_figure
from flow_grpo.files import strict_json, write_atomically
from flow_grpo.page.build import build_page
from flow_grpo.runs.config import read_config
from flow_grpo.runs.evaluations import with_changes, write_record
from flow_grpo.runs.folder import CONFIG_FILE, EVALUATIONS, IMAGE_FOLDER, PAGE_FILE, flatten
from flow_grpo.runs.saved import checkpoint_state, finished_checkpoints
from flow_grpo.runs.weights import Bars, Model, choose_models, load_weights, output_folder
from flow_grpo.training_words import evaluation

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

if TYPE_CHECKING:
    from PIL import Image

    from flow_grpo.diversity.measure import Diversity
    from flow_grpo.ode_log_prob import PromptLogDensities
    from flow_grpo.policy import Policy
    from flow_grpo.runs.evaluations import Record
    from flow_grpo.step_visualizer import FilmStrip
    from flow_grpo.tracking import Run
    from flow_grpo.types import Samples

COMMAND = ("python", "scripts/diversity_metrics/visualize_from_checkpoints.py")
RESULTS = "results.json"
SETTINGS = ("resolution", "pretrained.", "prompts.test", "prompts.eval_diversity", "num_seeds", "reward_fn.",
            "reward_model.", "eval.", "entropy.", "diversity.")  # fmt: skip
LEAST_SEEDS = 4  # an interval of Vendi and RKE needs so many images of a prompt
NORMAL_95 = 1.96

Parts = list[tuple["Samples", Measured]]  # what evaluators found, and of which samples


@dataclass
class Findings:
    """What one model gave; a part that failed is None, and `failures` says why."""

    model: Model
    metrics: dict[str, float] = field(default_factory=dict)  # as the evaluators of the training name them
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # of some of them, 95 %
    diversity: Diversity | None = None
    densities: PromptLogDensities | None = None
    strip: FilmStrip | None = None  # without its images
    failures: dict[str, str] = field(default_factory=dict)  # part -> why
    record: Record | None = None  # as it is written


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
    """Everything that measures a model, loaded once. The base model must come first: the others are compared with it,
    and RKE's bandwidth may be its.
    """

    def __init__(self, policy: Policy, config: ConfigDict, run: Path, out: Path, label: str) -> None:
        """`out`: where records and film strips are written, under `label`."""
        from flow_grpo.evaluation import sample_evaluators, test_request
        from flow_grpo.evaluators.diversity import diversity_request, extractor_of
        from flow_grpo.prompts import PromptDataset
        from flow_grpo.rewards import build_reward

        self.policy, self.config, self.run, self.out, self.label = policy, config, run, out, label
        self.prompts = PromptDataset.load(config.prompts.test)
        self.tested = test_request(self.prompts, policy.settings)
        self.diverse = diversity_request(config)
        self.evaluators = sample_evaluators(build_reward(config, policy.device), policy.settings, policy.device)
        self.extractor = extractor_of(config, policy.device)
        self.bandwidth: float | None = None
        self.base: Record | None = None
        self.base_features: dict[str, np.ndarray] | None = None
        self.bars = cast("Run", Bars())

    @property
    def texts(self) -> tuple[str, ...]:
        """The different test prompts."""
        return tuple(dict.fromkeys(self.tested.prompts))

    def measure(self, model: Model) -> Findings:
        """The model whose weights the policy has; a checkpoint that has diverged only loses its own numbers.

        Raises:
            ConfigError: the base model cannot be measured.
        """
        from flow_grpo.diversity.features import NonFiniteFeatures
        from flow_grpo.entropy import NonFiniteError
        from flow_grpo.evaluation import draw_samples

        samples = draw_samples(
            self.policy, self.prompts, self.policy.settings, self.bars, [self.tested, self.diverse], self.label
        )
        found, parts = Findings(model), []
        measures: dict[str, Callable[[Findings, Samples], Parts]] = {
            "samples": self._images,
            "log-densities": self._densities,
            "film strip": self._strip,
        }
        for name, part in measures.items():
            try:
                parts += part(found, samples)
            except (NonFiniteError, NonFiniteFeatures) as error:
                if model.folder is None:
                    raise ConfigError(f"The base model's {name} cannot be measured: {error}") from error
                found.failures[name] = str(error)
        found.metrics = {name: value for _, part in parts for name, value in part.metrics.items()}
        found.record = self._record(model, samples, parts)
        return found

    def _images(self, found: Findings, samples: Samples) -> Parts:
        """Rewards, judge, diversity."""
        from flow_grpo.diversity import measure as diversity
        from flow_grpo.entropy import NonFiniteError
        from flow_grpo.evaluation import view
        from flow_grpo.evaluators.distances import distances_of
        from flow_grpo.evaluators.diversity import (
            features_by_prompt,
            measure,
            noises_by_prompt,
            run_bandwidth,
            usable,
        )

        if not (samples.images.isfinite().all() and samples.latents.isfinite().all()):
            raise NonFiniteError("its images are not finite")
        tested, diverse = view(samples, self.tested), view(samples, self.diverse)
        parts = [(tested, evaluator.evaluate(tested)) for evaluator in self.evaluators]
        features = features_by_prompt(diverse, self.extractor)
        if self.bandwidth is None:
            self.bandwidth = run_bandwidth(self.config, self.run, self.extractor, features)
        found.diversity = measure(features, self.bandwidth, self.extractor.name, self.config)
        distances = distances_of(
            features, noises_by_prompt(diverse), self.extractor.name, self.config.diversity.order,
            usable(self.bandwidth), self.base_features,
        )  # fmt: skip
        if self.base_features is None:
            self.base_features = features
        for _, part in parts:
            found.intervals |= _intervals(tested, part)
        for name in ("vendi", "rke"):
            interval = getattr(found.diversity.within, name)
            found.intervals[f"diversity/{name}"] = (interval.low, interval.high)
        return [*parts, (diverse, Measured(diversity.metrics(found.diversity), diversity=distances))]

    def _densities(self, found: Findings, samples: Samples) -> Parts:
        """Entropy and the spread of the log-density."""
        from flow_grpo.ode_log_prob import entropy_metrics, prompt_log_densities

        densities = prompt_log_densities(self.policy, self.texts[: self.config.entropy.num_prompts], self.bars)
        metrics = entropy_metrics(densities)
        half_widths = {
            "entropy/nats": metrics["entropy/half_width_95"],
            "ode_log_prob/std": NORMAL_95 * std_standard_error(densities.log_prob.numpy()),
        }
        found.densities = densities
        found.intervals |= {name: _around(metrics[name], width) for name, width in half_widths.items()}
        return [(samples, Measured(metrics))]

    def _strip(self, found: Findings, samples: Samples) -> Parts:
        """Drawn at once, where the page looks for it."""
        from flow_grpo.step_visualizer import film_strip, strip_image

        prompts = self.texts[: self.config.entropy.num_strip_prompts]
        strip = film_strip(self.policy, prompts)
        path = picture_path(self.out, self.label, "strip", found.model.step)
        with optional_figure(path):
            strip_image(strip, prompts).save(path)
        found.strip = replace(strip, images=strip.images[:, :0])
        return []

    def _record(self, model: Model, samples: Samples, parts: Parts) -> Record:
        """Compared with the base's, and written."""
        from flow_grpo.evaluation import record_of, setting_of
        from flow_grpo.tracking import Counters

        counters = Counters()
        if model.folder is not None:
            counters.load_state_dict(checkpoint_state(model.folder)["counters"])
        setting = setting_of(self.policy.settings.config, self.prompts.prompts)
        record = record_of(samples, parts, counters, setting)
        if self.base is None:
            self.base = record
        else:
            record = with_changes(record, self.base)
        write_record(self.out, record, samples.images)
        return record


def picture_path(out: Path, label: str, name: str, step: int) -> Path:
    """As a run's evaluators name theirs."""
    return out / IMAGE_FOLDER / f"{label}_{name}_{step:06d}.png"


def _intervals(tested: Samples, part: Measured) -> dict[str, tuple[float, float]]:
    """Of the rewards: t, from the means of each seed, which are independent; of the judge's accuracy: Wilson's."""
    from scipy.stats import binomtest

    from flow_grpo.step_visualizer import t_half_widths

    found, seeds = {}, tested.sample_ids.numpy()
    for name, values in part.rewards.items():
        means = np.array([np.asarray(values)[seeds == seed].mean() for seed in np.unique(seeds)])
        found[f"reward/{name}"] = _around(part.metrics[f"reward/{name}"], float(t_half_widths(means)))
    if "judge/accuracy" in part.metrics:
        count = len(tested.prompts)
        wilson = binomtest(round(part.metrics["judge/accuracy"] * count), count).proportion_ci(method="wilson")
        found["judge/accuracy"] = (float(wilson.low), float(wilson.high))
    return found


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


def results(measured: Sequence[Findings], instruments: Instruments, ema: bool) -> dict[str, Any]:
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


def _entry(found: Findings, base: Findings) -> dict[str, Any]:
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


def _entropy_change(found: Findings, base: Findings) -> dict[str, float] | None:
    """Since the base model, in pairs of samples with common noise and probes."""
    from scripts.diversity_metrics.eval_ode_log_prob import entropy_change

    if found is base or found.densities is None or base.densities is None:
        return None
    change = entropy_change(base.densities, found.densities)
    low, high = _around(change.mean, change.half_width_95)
    return {"nats": change.mean, "low": low, "high": high}


# --- the command --------------------------------------------------------------------------------------------


def draw_figures(record: Mapping[str, Any], out: Path, label: str) -> None:
    """Divergence and log-density along the path and against training; one that cannot be drawn is a warning."""
    from flow_grpo.step_visualizer import curves_figure, training_figure

    history = [
        {
            "step": model["step"],
            "sigmas": record["sigmas"],
            "divergence": model["divergence_by_step"],
            "log_density": model["log_density_by_step"],
        }
        for model in record["models"]
        if model["divergence_by_step"] is not None
    ]
    for name, draw in {"curves": curves_figure, "training": training_figure}.items():
        path = picture_path(out, label, name, record["models"][-1]["step"])
        with optional_figure(path):
            draw(history).savefig(path, dpi=110)


def results_folder(given: str, run: Path, label: str) -> Path:
    """Where the results go.

    Raises:
        ConfigError: it is a file, or holds what another command wrote.
    """
    out = output_folder(given or run / ("visualization_ema" if label == "eval_ema" else "visualization"))
    others = (out / CONFIG_FILE).exists() or ((out / EVALUATIONS).exists() and not (out / RESULTS).exists())
    if given and others:
        raise ConfigError(f"--out {given} holds evaluations of another command; it takes a folder of its own.")
    return out


def clear(out: Path, label: str) -> None:
    """Make the folders; what this command left there under the label, of other checkpoints perhaps, goes."""
    files = {EVALUATIONS: ("",), IMAGE_FOLDER: ("strip_", "curves_", "training_")}
    for name, kinds in files.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for path in (path for kind in kinds for path in (out / name).glob(f"{label}_{kind}[0-9]*")):
            path.unlink()


def visualize(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure, draw, write the page and the trackers; what results.json holds."""
    run, label = run_folder(args.checkpoint_dir), "eval_ema" if args.ema else "eval"
    config = read_config(run, {"eval_diversity": True})
    models = choose_models(run, chosen_checkpoints(args, run), config, args.ema)
    config.update_from_flattened_dict(smaller(config, args.num_prompts, args.num_seeds))
    out = results_folder(args.out, run, label)

    from flow_grpo.launch import launch
    from flow_grpo.policy import Policy
    from flow_grpo.runs.trackers import log_checkpoints

    settings, accelerator = launch(config)
    instruments = Instruments(Policy.load(settings, accelerator), config, run, out, label)
    clear(out, label)
    found = measure_models(instruments, models, args.ema)
    record = results(found, instruments, args.ema)
    write_atomically(out / RESULTS, strict_json(record, indent=1) + "\n")
    draw_figures(record, out, label)
    build_page([out], out / PAGE_FILE, command, label=label, names=[record["run"]])
    metrics = {one.model.step: one.metrics for one in found if one.metrics}
    log_checkpoints(
        accelerator, config, run, label.replace("eval", "checkpoint"), metrics, pictures(models, out, label)
    )
    print(*words_of(found), f"page: {out / PAGE_FILE}", sep="\n")
    return record


def measure_models(instruments: Instruments, models: Sequence[Model], ema: bool) -> list[Findings]:
    """One after the other; afterwards the policy has the weights of the last."""
    policy = instruments.policy
    base = [parameter.detach().clone() for parameter in policy.trainable]
    found = []
    for model in Bars().progress(models, "models"):
        load_weights(policy, model, base, ema)
        found.append(instruments.measure(model))
    return found


def pictures(models: Sequence[Model], out: Path, label: str) -> dict[str, Image.Image]:
    """Those that could be drawn, by their names in the trackers."""
    from PIL import Image

    paths = {name: picture_path(out, label, name, models[-1].step) for name in ("curves", "training")}
    paths |= {f"strip_{model.name}": picture_path(out, label, "strip", model.step) for model in models}
    return {name: Image.open(path) for name, path in paths.items() if path.is_file()}


def words_of(found: Sequence[Findings]) -> list[str]:
    """A line for each model, and for each of its parts that could not be measured."""
    lines = [evaluation(one.record) for one in found if one.record is not None]
    lines += [f"{one.model.name}: no {part}: {why}." for one in found for part, why in one.failures.items()]
    return [line for line in lines if line]


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
        visualize(args, shlex.join([*COMMAND, *given]))


if __name__ == "__main__":
    main()
