"""Diversity of a model's samples: the evaluator of a run, the bandwidth that a run keeps, and its base's features.

RKE needs a bandwidth that never changes. A run chooses it on its base model's samples and keeps it in
RUN/diversity/bandwidth.json, with the name of the features.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flow_grpo.diversity import measure as diversity
from flow_grpo.diversity.features import FeatureExtractor, NonFiniteFeatures, load_extractor
from flow_grpo.diversity.measure import Diversity
from flow_grpo.diversity.rke import NoBandwidth, median_bandwidth
from flow_grpo.diversity.vendi import check_bandwidth
from flow_grpo.errors import ConfigError
from flow_grpo.evaluators.base import Measured, SampleRequest
from flow_grpo.evaluators.distances import (
    base_features_path,
    distances_of,
    read_base_features,
    write_base_features,
)
from flow_grpo.files import read_object, strict_json, write_atomically
from flow_grpo.runs.folder import keep_damaged, run_folder_of

if TYPE_CHECKING:
    import torch
    from ml_collections import ConfigDict, FrozenConfigDict

    from flow_grpo.policy import Policy
    from flow_grpo.rewards.building import WeightedReward
    from flow_grpo.runs.record import Distances
    from flow_grpo.runs.run import Run
    from flow_grpo.settings import Settings
    from flow_grpo.types import Samples

FOLDER, BANDWIDTH_FILE = "diversity", "bandwidth.json"


class DiversityEvaluator:
    """Logs `diversity/...` of `num_seeds` images of each diversity prompt; writes RUN/diversity/<label>_<epoch>.json.

    The first evaluation of a run, which is the base model's, chooses the bandwidth, unless the configuration gives it.
    It also keeps the base model's features, for the distances to them. Samples that cannot be measured are a warning
    and nan: they do not end the run.
    """

    name, collective = "diversity", False

    def __init__(
        self,
        extractor: FeatureExtractor,
        bandwidth: float | None,
        settings: Settings,
        run: Run,
        base: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """`bandwidth`: None if it is still to be chosen, nan if the base model's samples gave none.

        `base`: features of the base model's images; None: they are still to come, or are lost.
        """
        self.extractor, self.bandwidth, self.run, self.base = extractor, bandwidth, run, base
        self.config = settings.config
        self.freq = how_often(settings.config)
        self.request = diversity_request(settings.config)

    def evaluate(self, samples: Samples) -> Measured:
        """Measure; per-prompt figures go to the run folder."""
        folder = self.run.folder / FOLDER
        try:
            features = features_by_prompt(samples, self.extractor)
        except NonFiniteFeatures as error:
            warnings.warn(f"no diversity at epoch {self.run.counters.epoch}: {error}", stacklevel=2)
            if self.bandwidth is None:  # never one of later weights
                self.bandwidth = write_bandwidth(folder, math.nan, self.extractor.name)
            return Measured(dict.fromkeys(diversity.METRICS, math.nan))
        if self.bandwidth is None:
            self.bandwidth = choose_bandwidth(features, self.extractor.name, folder)
        found = measure(features, self.bandwidth, self.extractor.name, self.config)
        record = folder / f"{samples.label}_{self.run.counters.epoch:06d}.json"
        with self.run.writing(str(record)):
            write_json(record, diversity.record(found))
        return Measured(diversity.metrics(found), diversity=self._distances(samples, features))

    def _distances(self, samples: Samples, features: dict[str, np.ndarray]) -> Distances:
        """For the record; the base model's features are kept when it is evaluated first."""
        is_base = self.run.counters.epoch == 0
        if is_base and self.base is None:
            self.base = features
            with self.run.writing(str(base_features_path(self.run.folder))):
                write_base_features(self.run.folder, features, self.extractor.name)
        bandwidth = None if self.bandwidth is None else usable(self.bandwidth)
        order, base = self.config.diversity.order, None if is_base else self.base
        return distances_of(features, noises_by_prompt(samples), self.extractor.name, order, bandwidth, base)


def how_often(config: ConfigDict | FrozenConfigDict) -> int:
    """Epochs from one measurement to the next; 0: never."""
    return config.eval_diversity_freq or config.eval_freq


def build_diversity_evaluators(settings: Settings, run: Run, device: torch.device) -> list[DiversityEvaluator]:
    """The evaluator, if the configuration asks for it, ever.

    Raises:
        ConfigError: the extractor cannot be loaded; a resumed run has no bandwidth, or has it of other features.
    """
    config = settings.config
    if not config.eval_diversity or how_often(config) == 0:
        return []
    extractor = extractor_of(config, device)
    bandwidth = config.diversity.bandwidth or None
    source = None if run.begins else run_folder_of(config.resume_from)
    if bandwidth is not None and run.is_main:
        write_bandwidth(run.folder / FOLDER, bandwidth, extractor.name)
    if bandwidth is None and not run.begins:
        bandwidth = None if source is None else stored_bandwidth(source / FOLDER, extractor.name)
        if bandwidth is None:
            raise ConfigError(
                f"config.eval_diversity = True, but the run of config.resume_from = {config.resume_from!r} did not "
                "measure its base model's diversity, where RKE's bandwidth is chosen; give one in "
                "config.diversity.bandwidth."
            )
        if run.is_main and not run.resumed:
            write_bandwidth(run.folder / FOLDER, bandwidth, extractor.name)
    base = _base_of(source, extractor.name, run) if source is not None and run.is_main else None
    return [DiversityEvaluator(extractor, bandwidth, settings, run, base)]


def build(policy: Policy, reward: WeightedReward, settings: Settings, run: Run) -> list[DiversityEvaluator]:
    """The same, as the registry asks for it."""
    return build_diversity_evaluators(settings, run, policy.device)


def _base_of(source: Path, extractor: str, run: Run) -> dict[str, np.ndarray] | None:
    """The base model's features of the run that goes on, for a new folder too; None, in words, if there are none."""
    path = base_features_path(source)
    try:
        base = read_base_features(source, extractor)
    except ConfigError as error:
        where = f"it is now {keep_damaged(path)}" if run.resumed else "it is passed over"
        run.tell(f"{str(error).rstrip('.')}: {where}, and the base's images still reached are not measured.")
        return None
    if base is None:
        run.tell(f"{path} is missing, or has no {extractor}: the base's images still reached are not measured.")
    elif not run.resumed:
        with run.writing(str(base_features_path(run.folder))):
            write_base_features(run.folder, base, extractor)
    return base


def extractor_of(config: ConfigDict | FrozenConfigDict, device: torch.device) -> FeatureExtractor:
    """The features that `config.diversity` names; ConfigError where they cannot be loaded."""
    chosen = config.diversity
    try:
        return load_extractor(chosen.extractor, chosen.model, chosen.pretrained, device, chosen.batch_size)
    except ConfigError as error:
        raise ConfigError(f"config.diversity.model: {error}") from error


def diversity_request(config: ConfigDict | FrozenConfigDict) -> SampleRequest:
    """The images that a diversity evaluation needs."""
    from flow_grpo.prompts import PromptDataset

    prompts = PromptDataset.load(config.prompts.eval_diversity).prompts
    return SampleRequest(tuple(dict.fromkeys(prompts))[: config.diversity.num_prompts or None], config.num_seeds)


def features_by_prompt(samples: Samples, extractor: FeatureExtractor) -> dict[str, np.ndarray]:
    """prompt -> (n, d) features of its images."""
    features = extractor(samples.images)
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(samples.prompts):
        rows.setdefault(prompt, []).append(i)
    return {prompt: features[indices] for prompt, indices in rows.items()}


def noises_by_prompt(samples: Samples) -> list[list[int]]:
    """The numbers of the images' noises, in the order of `features_by_prompt`."""
    found: dict[str, list[int]] = {}
    for prompt, number in zip(samples.prompts, samples.sample_ids.tolist(), strict=True):
        found.setdefault(prompt, []).append(number)
    return list(found.values())


def measure(
    features: Mapping[str, np.ndarray], bandwidth: float, extractor: str, config: ConfigDict | FrozenConfigDict
) -> Diversity:
    """With the order and the bootstrap of `config.diversity`; a bandwidth of nan is none."""
    return diversity.measure(features, usable(bandwidth), config.diversity.order, extractor, config.diversity.num_draws)


# --- the bandwidth --------------------------------------------------------------------------------------


def choose_bandwidth(features: Mapping[str, np.ndarray], extractor: str, folder: Path) -> float:
    """Choose the bandwidth on these features, those of the base model, and store it; nan if they give none."""
    return write_bandwidth(folder, fitting_bandwidth(features), extractor)


def fitting_bandwidth(features: Mapping[str, np.ndarray]) -> float:
    """The median bandwidth of these groups; nan, with a warning, where half of the images are duplicates."""
    try:
        return median_bandwidth(list(features.values()))
    except NoBandwidth as error:
        warnings.warn(f"RKE is not measured: {error}", stacklevel=2)
        return math.nan


def usable(bandwidth: float) -> float | None:
    """None for nan."""
    return None if math.isnan(bandwidth) else bandwidth


def write_bandwidth(folder: Path, bandwidth: float, extractor: str) -> float:
    """Store it with the features that it is for, nan as null, and return it."""
    write_json(folder / BANDWIDTH_FILE, {"bandwidth": bandwidth, "features": extractor})
    return bandwidth


def stored_bandwidth(folder: Path, extractor: str) -> float | None:
    """The bandwidth of a run; None if it has not been chosen, nan if its base model's samples gave none.

    Raises:
        ConfigError: it is of other features, or damaged.
    """
    path = folder / BANDWIDTH_FILE
    if not path.exists():
        return None
    stored = read_object(path)
    bandwidth, features = stored.get("bandwidth", ""), stored.get("features")
    try:
        bandwidth = math.nan if bandwidth is None else check_bandwidth(bandwidth)
    except (TypeError, OverflowError, ConfigError):  # no number, or a whole one that no float holds
        raise ConfigError(f"{path} is damaged; it holds a bandwidth and the features that it is for.") from None
    if features != extractor:
        raise ConfigError(
            f"{path} is for the features {features!r}, not {extractor!r}: a bandwidth of other features says nothing."
        )
    return bandwidth


def run_bandwidth(config: ConfigDict, run: Path, extractor: FeatureExtractor, base: Mapping[str, np.ndarray]) -> float:
    """Of a run that has ended: configured, stored, or chosen now on its base model's features and stored."""
    stored = config.diversity.bandwidth or stored_bandwidth(run / FOLDER, extractor.name)
    return choose_bandwidth(base, extractor.name, run / FOLDER) if stored is None else stored


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Strict JSON, in a folder made if needed; the folder above must be there."""
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, strict_json(value, indent=1) + "\n")
