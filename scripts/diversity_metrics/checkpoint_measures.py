"""What visualize_from_checkpoints.py measures of the base model and a run's checkpoints, and writes of it.

Records and pictures as a run's evaluations leave them, results.json, and what the run's trackers are told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from scipy.stats import binomtest

from flow_grpo.diversity import measure as scores
from flow_grpo.diversity.features import NonFiniteFeatures
from flow_grpo.entropy import NonFiniteError
from flow_grpo.errors import ConfigError
from flow_grpo.evaluators.base import Measured
from flow_grpo.evaluators.distances import distances_of
from flow_grpo.evaluators.diversity import (
    diversity_request,
    extractor_of,
    features_by_prompt,
    measure,
    noises_by_prompt,
    run_bandwidth,
    usable,
)
from flow_grpo.evaluators.entropy import PromptLogDensities, entropy_metrics, prompt_log_densities
from flow_grpo.evaluators.evaluation import draw_samples, record_of, sample_evaluators, setting_of, test_request, view
from flow_grpo.evaluators.film_strip import (
    FilmStrip,
    curves_figure,
    film_strip,
    strip_image,
    training_figure,
)
from flow_grpo.figure_text import optional_figure
from flow_grpo.files import strict_json, write_atomically
from flow_grpo.launch import launch
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.rewards.building import build_reward
from flow_grpo.runs.changes import with_changes
from flow_grpo.runs.evaluations import write_record
from flow_grpo.runs.folder import EVALUATIONS, IMAGE_FOLDER, flatten
from flow_grpo.runs.progress import Bars, Counters
from flow_grpo.runs.record import Record
from flow_grpo.runs.run import Run
from flow_grpo.runs.saved import checkpoint_state
from flow_grpo.runs.trackers import log_checkpoints
from flow_grpo.statistics import NORMAL_95, half_widths
from flow_grpo.training.weights import Model, load_weights
from flow_grpo.types import Samples
from scripts.diversity_metrics.log_densities import entropy_change

SETTINGS = ("resolution", "height", "width", "pretrained.", "prompts.test", "prompts.eval_diversity", "num_seeds",
            "reward_fn.", "reward_model.", "reward_files.", "eval.", "entropy.", "diversity.", "targets.",
            "chat.", "remote.")  # fmt: skip
FIGURES = {"curves": curves_figure, "training": training_figure}

Parts = list[tuple[Samples, Measured]]  # what evaluators found, and of which samples


@dataclass
class Findings:
    """What one model gave; a part that failed is None, and `failures` says why."""

    model: Model
    metrics: dict[str, float] = field(default_factory=dict)  # as the evaluators of the training name them
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # of some of them, 95 %
    diversity: scores.Diversity | None = None
    densities: PromptLogDensities | None = None
    strip: FilmStrip | None = None  # without its images
    failures: dict[str, str] = field(default_factory=dict)  # part -> why


def measure_checkpoints(
    models: Sequence[Model], config: ConfigDict, run: Path, file: Path, label: str
) -> dict[str, Any]:
    """Measure the models, the base first, with one load of it; write all but the page, and return what `file` holds.

    Args:
        file: JSON of every number; records and pictures come beside it, under `label`.

    Raises:
        ConfigError: a model cannot be loaded, or the base model not measured.
    """
    out = file.parent
    settings, accelerator = launch(config)
    instruments = Instruments(Policy.load(settings, accelerator), config, run, out, label)
    clear(out, label)
    base = [parameter.detach().clone() for parameter in instruments.policy.trainable]
    found = []
    for model in Bars().progress(models, "models"):
        load_weights(instruments.policy, model, base, label == "eval_ema")
        found.append(instruments.measure(model))
    record = results(found, instruments)
    write_atomically(file, strict_json(record, indent=1) + "\n")
    draw_figures(record, out, label)
    metrics = {one.model.step: one.metrics for one in found if one.metrics}
    prefix = label.replace("eval", "checkpoint")
    log_checkpoints(accelerator, config, run, prefix, metrics, pictures(models, out, label))
    return record


def clear(out: Path, label: str) -> None:
    """Make the folders; what this command left there under the label, of other checkpoints perhaps, goes."""
    files = {EVALUATIONS: ("",), IMAGE_FOLDER: [f"{name}_" for name in ("strip", *FIGURES)]}
    for name, kinds in files.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for path in (path for kind in kinds for path in (out / name).glob(f"{label}_{kind}[0-9]*")):
            path.unlink()


# --- measuring ----------------------------------------------------------------------------------------------


class Instruments:
    """Everything that measures a model, loaded once. The base model must come first: the others are compared with it,
    and RKE's bandwidth may be its.
    """

    def __init__(self, policy: Policy, config: ConfigDict, run: Path, out: Path, label: str) -> None:
        """`out`: where records and film strips are written, under `label`."""
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
        self._write_record(model, samples, parts)
        return found

    def _images(self, found: Findings, samples: Samples) -> Parts:
        """Rewards, judge, diversity."""
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
        return [*parts, (diverse, Measured(scores.metrics(found.diversity), diversity=distances))]

    def _densities(self, found: Findings, samples: Samples) -> Parts:
        """Entropy and the spread of the log-density."""
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
        prompts = self.texts[: self.config.entropy.num_strip_prompts]
        strip = film_strip(self.policy, prompts)
        path = picture_path(self.out, self.label, "strip", found.model.step)
        with optional_figure(path):
            strip_image(strip, prompts).save(path)
        found.strip = replace(strip, images=strip.images[:, :0])
        return []

    def _write_record(self, model: Model, samples: Samples, parts: Parts) -> None:
        """Compared with the base's."""
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


def _intervals(tested: Samples, part: Measured) -> dict[str, tuple[float, float]]:
    """Of the rewards: t, from the means of each seed, which are independent; of the judge's accuracy: Wilson's."""
    found, seeds = {}, tested.sample_ids.numpy()
    for name, values in part.rewards.items():
        means = np.array([np.asarray(values)[seeds == seed].mean() for seed in np.unique(seeds)])
        found[f"reward/{name}"] = _around(part.metrics[f"reward/{name}"], float(half_widths(means)))
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


def results(measured: Sequence[Findings], instruments: Instruments) -> dict[str, Any]:
    """What results.json holds, nan included: every model has the keys that the base model has."""
    config, base = instruments.config, measured[0]
    assert base.densities is not None  # or measuring it had raised
    assert base.strip is not None
    return {
        "run": instruments.run.resolve().name,
        "weights": "averaged" if instruments.label == "eval_ema" else "current",
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
    strip, densities = found.strip, found.densities
    return {
        "name": found.model.name,
        "step": found.model.step,
        "failures": found.failures,
        "metrics": {name: found.metrics.get(name, math.nan) for name in base.metrics},
        "intervals": {name: found.intervals.get(name, (math.nan, math.nan)) for name in base.intervals},
        "entropy_change": _entropy_change(found, base),
        "diversity": None if found.diversity is None else scores.record(found.diversity),
        "log_prob": None if densities is None else densities.log_prob.tolist(),
        "divergence_by_step": None if strip is None else strip.divergence.tolist(),
        "log_density_by_step": None if strip is None else strip.log_density.tolist(),
    }


def _entropy_change(found: Findings, base: Findings) -> dict[str, float] | None:
    """Since the base model, in pairs of samples with common noise and probes."""
    if found is base or found.densities is None or base.densities is None:
        return None
    change = entropy_change(base.densities, found.densities).interval()
    return {"nats": change.estimate, "low": change.low, "high": change.high}


# --- pictures -----------------------------------------------------------------------------------------------


def picture_path(out: Path, label: str, name: str, step: int) -> Path:
    """As a run's evaluators name theirs."""
    return out / IMAGE_FOLDER / f"{label}_{name}_{step:06d}.png"


def draw_figures(record: Mapping[str, Any], out: Path, label: str) -> None:
    """Divergence and log-density along the path and against training; one that cannot be drawn is a warning."""
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
    for name, draw in FIGURES.items():
        path = picture_path(out, label, name, record["models"][-1]["step"])
        with optional_figure(path):
            draw(history).savefig(path, dpi=110)


def pictures(models: Sequence[Model], out: Path, label: str) -> dict[str, Image.Image]:
    """Those that could be drawn, by their names in the trackers."""
    paths = {name: picture_path(out, label, name, models[-1].step) for name in FIGURES}
    paths |= {f"strip_{model.name}": picture_path(out, label, "strip", model.step) for model in models}
    return {name: Image.open(path) for name, path in paths.items() if path.is_file()}
