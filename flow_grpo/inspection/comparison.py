"""Draw what is looked at, on the same prompts and noises, measure the images, and write records of them.

A folder takes the records as a run does, the base as evaluation 0: `flow_grpo.page.build` makes the page of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from ml_collections import ConfigDict, FrozenConfigDict
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from flow_grpo.diversity.features import FeatureExtractor
from flow_grpo.diversity.images import ImageFolder, stack
from flow_grpo.errors import ConfigError
from flow_grpo.evaluators.base import Evaluator, Measured, SampleRequest
from flow_grpo.evaluators.distances import distances_of
from flow_grpo.evaluators.diversity import (
    extractor_of,
    features_by_prompt,
    fitting_bandwidth,
    measure,
    noises_by_prompt,
    usable,
)
from flow_grpo.evaluators.evaluation import draw_samples, record_of, sample_evaluators, setting_of
from flow_grpo.inspection.looking import Look, Model
from flow_grpo.launch import launch
from flow_grpo.models.files import LOADING_ERRORS, first_line
from flow_grpo.models.loras import Loaded, load_lora
from flow_grpo.models.pipeline_files import image_size
from flow_grpo.policy import ImageModel, load_pretrained
from flow_grpo.prompts import PromptDataset
from flow_grpo.rewards.building import build_reward
from flow_grpo.runs.changes import with_changes
from flow_grpo.runs.evaluations import write_record
from flow_grpo.runs.progress import Bars, Counters
from flow_grpo.runs.record import FOLDERS, Record
from flow_grpo.runs.run import Run
from flow_grpo.runs.sprite import SMALL
from flow_grpo.settings import Settings
from flow_grpo.statistics import Interval
from flow_grpo.types import Samples

Features = Mapping[str, np.ndarray]  # prompt -> (n, d)


@dataclass(frozen=True)
class Drawn:
    """The images of one model, and how much of its LoRAs it has."""

    model: Model
    samples: Samples
    loaded: tuple[Loaded, ...]


@dataclass(frozen=True)
class Comparison:
    """What was found; the records are written."""

    records: tuple[Record, ...]  # of the base, then of what is looked at; of that alone
    loaded: tuple[Loaded, ...] = ()  # of what is looked at
    vendi: Interval | None = None  # of what is looked at


# --- drawing --------------------------------------------------------------------------------------------


def start(look: Look) -> tuple[Settings, Accelerator]:
    """The settings for this machine: large models that no run has a word on are drawn in bfloat16 on a GPU."""
    config = look.config
    if not look.own and max(image_size(config)) > SMALL and torch.cuda.is_available():
        config.mixed_precision = "bf16"
    settings, accelerator = launch(config)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.config.allow_tf32
    return settings, accelerator


def draw(
    models: Sequence[Model],
    settings: Settings,
    accelerator: Accelerator,
    prompts: PromptDataset,
    request: SampleRequest,
) -> Iterator[Drawn]:
    """The same request of every model, one after another; a pipeline without additions serves the next one too."""
    ready: dict[Model, ImageModel] = {}
    for model in models:
        image_model = ready.pop(model.base, None)
        ready.clear()
        if image_model is None:
            image_model = _load(model, settings, accelerator)
        if model.transformer is not None:
            _replace_transformer(image_model, model.transformer)
        loaded = tuple(load_lora(image_model.transformer, path) for path in model.loras)
        samples = draw_samples(image_model, prompts, settings, cast(Run, Bars()), [request])
        if not loaded and model.transformer is None:
            ready[model.base] = image_model
        yield Drawn(model, samples, loaded)


def _load(model: Model, settings: Settings, accelerator: Accelerator) -> ImageModel:
    config = ConfigDict(settings.config.to_dict())
    config.pretrained.model, config.pretrained.revision = model.pipeline, model.revision
    config.pretrained.lora, config.pretrained.skip = model.merged, model.skip
    changed = replace(settings, config=FrozenConfigDict(config))
    return ImageModel(load_pretrained(changed), changed, accelerator)


def _replace_transformer(image_model: ImageModel, folder: Path) -> None:
    """Take the weights of full fine-tuning, in float32 as they were trained."""
    try:
        transformer, missing = image_model.family.load_transformer(folder)
    except LOADING_ERRORS as error:
        raise ConfigError(f"{folder} cannot be loaded as its transformer: {first_line(error)}") from error
    if missing:
        raise ConfigError(f"{folder} is not whole: {missing[0]} is the first weight it lacks.")
    image_model.replace_transformer(transformer)


def draw_prompt(look: Look, prompt: str, number: int) -> tuple[tuple[Loaded, ...], list[Image.Image]]:
    """So many images of one prompt, by the last model of a look."""
    settings, accelerator = start(look)
    prompts, request = PromptDataset((prompt,), ({},)), SampleRequest((prompt,), number)
    (drawn,) = draw(look.models[-1:], settings, accelerator, prompts, request)
    return drawn.loaded, [to_pil_image(image) for image in drawn.samples.images.nan_to_num()]


# --- measuring ------------------------------------------------------------------------------------------


class Instruments:
    """Features, reward and judge, loaded once for all that is looked at."""

    def __init__(self, settings: Settings, device: torch.device, rewarded: bool, setting: str) -> None:
        """`setting`: of the records; those that differ in it are not compared."""
        self.settings, self.setting = settings, setting
        self.extractor: FeatureExtractor = extractor_of(settings.config, device)
        evaluators = sample_evaluators(build_reward(settings.config, device), settings, device)
        self.evaluators: list[Evaluator] = evaluators if rewarded else evaluators[1:]  # the reward's is the first
        self.bandwidth: float | None = None  # of RKE: chosen on the features that come first
        self.base: Features | None = None  # those

    def record(self, samples: Samples, features: Features, epoch: int, name: str) -> Record:
        """All that is measured of one model's images; the first that is asked for is the base."""
        if self.base is None:
            self.bandwidth = usable(fitting_bandwidth(features))
        order = self.settings.config.diversity.order
        distances = distances_of(
            features, noises_by_prompt(samples), self.extractor.name, order, self.bandwidth, self.base
        )
        found = [(samples, Measured(diversity=distances))]
        found += [(samples, evaluator.evaluate(samples)) for evaluator in self.evaluators]
        if self.base is None:
            self.base = features
        return replace(record_of(samples, found, Counters(epoch=epoch), self.setting), name=name)

    def alone(self, features: Features) -> Interval:
        """The Vendi score of what is looked at, with the interval of its own."""
        bandwidth = float("nan") if self.bandwidth is None else self.bandwidth
        return measure(features, bandwidth, self.extractor.name, self.settings.config).within.vendi


def compare_models(look: Look, out: Path) -> Comparison:
    """Draw and measure the models of a look, and write their records to a folder.

    Raises:
        ConfigError: a model cannot be loaded, or its images cannot be measured.
    """
    settings, accelerator = start(look)
    prompts = PromptDataset.load(settings.config.prompts.test)
    setting = setting_of(settings.config, prompts.prompts)
    instruments = Instruments(settings, accelerator.device, look.rewarded, setting)
    chosen = tuple(dict.fromkeys(prompts.prompts))[: settings.config.eval.num_prompts or None]
    request = SampleRequest(chosen, settings.config.eval.num_image_per_prompt)
    records: list[Record] = []
    for epoch, drawn in enumerate(draw(look.models, settings, accelerator, prompts, request)):
        features = features_by_prompt(drawn.samples, instruments.extractor)
        record = instruments.record(drawn.samples, features, epoch, drawn.model.name)
        records.append(with_changes(record, records[0]) if epoch else record)
        write_record(out, records[-1], drawn.samples.images)
    return Comparison(tuple(records), drawn.loaded, instruments.alone(features))


def compare_folders(
    folders: Mapping[str, ImageFolder], config: ConfigDict, rewarded: bool, paired: bool, out: Path
) -> Comparison:
    """Measure folders of images (name -> folder, the base first) with as many images of each prompt, or one alone.

    Args:
        paired: whether images of one number belong together.

    Raises:
        ConfigError: a model cannot be loaded, or the images cannot be measured.
    """
    settings, accelerator = launch(config)
    instruments = Instruments(settings, accelerator.device, rewarded, _setting_of_folders(folders, config))
    records: list[Record] = []
    for epoch, (name, folder) in enumerate(folders.items()):
        features = folder.features(instruments.extractor)
        samples = samples_of(folder)
        record = instruments.record(samples, features, epoch, name)
        records.append(with_changes(record, records[0], paired) if epoch else record)
        write_record(out, records[-1], samples.images)
    return Comparison(tuple(records), vendi=instruments.alone(features))


def _setting_of_folders(folders: Mapping[str, ImageFolder], config: ConfigDict) -> str:
    """Of these folders alone: images of the same number in others have nothing in common with theirs."""
    roots = [str(folder.root.resolve()) for folder in folders.values()]
    return FOLDERS + setting_of(FrozenConfigDict(config), roots)


class FilesAsTensor:
    """Images on disk that are read when they are asked for: what is used of a tensor (N, 3, H, W)."""

    def __init__(self, paths: Sequence[Path], size: tuple[int, int]) -> None:
        self.paths, self.shape = paths, (len(paths), 3, size[1], size[0])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Tensor:
        """One image by number; several by slice or list."""
        if isinstance(index, int):
            return stack([self.paths[index]])[0]
        return stack(self.paths[index] if isinstance(index, slice) else [self.paths[i] for i in index])


def samples_of(folder: ImageFolder) -> Samples:
    """A folder's images, a group's name as their prompt."""
    paths = [path for group in folder.groups.values() for path in group]
    return Samples(
        images=cast(Tensor, FilesAsTensor(paths, folder.size)),
        latents=torch.empty(len(paths), 0),
        prompts=tuple(name for name, group in folder.groups.items() for _ in group),
        metadata=({},) * len(paths),
        prompt_ids=torch.tensor([p for p, group in enumerate(folder.groups.values()) for _ in group]),
        sample_ids=torch.tensor([s for group in folder.groups.values() for s in range(len(group))]),
    )
