"""Images of a base model, and what is measured of them: drawn once, kept in a folder, and added to later.

A folder has a file for every `CHUNK` images of each prompt, images_000000.safetensors, ..., with P prompts:

    reward             (P, n) float64   the training reward
    right              (P, n) bool      whether the judge finds the image to be its prompt's, among these P
    features           (P, n, d)        float16, unit features of `diversity.extractor`
    labels, colours    (P, n, 4) int8   of scenes: what the judge sees in each cell, EMPTY and NONE

and question.json, what they depend on. Image s of prompt p has the noise that an evaluation gives it, whoever draws it
and when, so a folder that is interrupted goes on, and its first images are those of every evaluation of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object, strict_json, write_atomically
from flow_grpo.scenes.captions import CLASSES

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from flow_grpo.evaluators.base import Evaluator
    from flow_grpo.types import Samples

CHUNK = 40  # images of each prompt in a file
QUESTION = "question.json"
EMPTY, NONE = len(CLASSES), 0  # label of an empty cell, and the colour that it is given


@dataclass(frozen=True)
class BaseImages:
    """N images of each of P prompts."""

    prompts: tuple[str, ...]
    reward: np.ndarray  # (P, N)
    right: np.ndarray  # (P, N) bool
    features: np.ndarray  # (P, N, d) float32
    labels: np.ndarray | None = None  # (P, N, 4), of scenes
    colours: np.ndarray | None = None

    def first(self, number: int) -> BaseImages:
        """The first images of each prompt."""
        labels, colours = (None if x is None else x[:, :number] for x in (self.labels, self.colours))
        reward, right, features = (x[:, :number] for x in (self.reward, self.right, self.features))
        return BaseImages(self.prompts, reward, right, features, labels, colours)

    def of(self, kept: np.ndarray) -> BaseImages:
        """Those of some prompts, (P,) bool."""
        prompts = tuple(prompt for prompt, use in zip(self.prompts, kept, strict=True) if use)
        labels, colours = (None if x is None else x[kept] for x in (self.labels, self.colours))
        return BaseImages(prompts, self.reward[kept], self.right[kept], self.features[kept], labels, colours)


def base_images(config: ConfigDict, number: int, folder: Path) -> BaseImages:
    """`number` images of each prompt whose diversity is measured, by the base model: those that are missing are drawn.

    Raises:
        ConfigError: the folder holds images of other models, prompts or settings, or a damaged file.
    """
    from flow_grpo.launch import launch

    settings, accelerator = launch(config)
    asked = _question(settings.config)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / QUESTION
    if path.exists() and (kept := read_object(path)) != asked:
        other = next(key for key in {**kept, **asked} if kept.get(key) != asked.get(key))
        was, now = (repr(values.get(other))[:200] for values in (kept, asked))
        raise ConfigError(f"{folder} holds images of other settings: {other} is {was}, not {now}; move it away.")
    write_atomically(path, strict_json(asked, indent=1) + "\n")
    files = [folder / f"images_{first:06d}.safetensors" for first in range(0, number, CHUNK)]
    if missing := [place for place, file in enumerate(files) if not file.exists()]:
        for place, tensors in _drawn(settings, accelerator, missing):
            write_atomically(files[place], save(tensors))
    return _joined(asked["prompts"], files).first(number)


def _question(config: Any) -> dict[str, Any]:
    """What images and figures depend on, as plain data."""
    from flow_grpo.evaluators.diversity import diversity_request
    from flow_grpo.evaluators.evaluation import drawing_of, setting_of
    from flow_grpo.prompts import PromptDataset

    test, chosen = PromptDataset.load(config.prompts.test).prompts, diversity_request(config).prompts
    return {
        "prompts": [text for text in dict.fromkeys([*test, *chosen]) if text in chosen],  # in the order of samples
        "model": config.pretrained.model,
        "setting": setting_of(config, test),
        "drawing": drawing_of(config, test),
        "judge": config.eval.judge,
        "features": features_name(config),
    }


def features_name(config: Any) -> str:
    """As `load_extractor` calls them."""
    chosen = config.diversity
    return ":".join(part for part in (chosen.extractor, chosen.model, chosen.pretrained) if part)


def _drawn(settings: Any, accelerator: Any, places: Sequence[int]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The tensors of these files, one after another."""
    import torch
    from tqdm import tqdm

    from flow_grpo.evaluators.base import SampleRequest
    from flow_grpo.evaluators.diversity import diversity_request, extractor_of
    from flow_grpo.evaluators.evaluation import draw_samples, sample_evaluators
    from flow_grpo.policy import ImageModel, load_pretrained
    from flow_grpo.prompts import PromptDataset
    from flow_grpo.rewards.building import build_reward
    from flow_grpo.runs.progress import Bars
    from flow_grpo.runs.run import Run

    config, device = settings.config, accelerator.device
    model = ImageModel(load_pretrained(settings), settings, accelerator)
    prompts = PromptDataset.load(config.prompts.test)
    evaluators = sample_evaluators(build_reward(config, device), settings, device)
    extractor = extractor_of(config, device)
    request = SampleRequest(diversity_request(config).prompts, CHUNK)
    for place in tqdm(places, desc="base images"):
        with torch.no_grad():
            samples = draw_samples(model, prompts, settings, cast(Run, Bars()), [request], first=place * CHUNK)
        yield place, _measured(samples, evaluators) | {"features": _by_prompt(extractor(samples.images), np.float16)}


def _measured(samples: Samples, evaluators: Sequence[Evaluator]) -> dict[str, np.ndarray]:
    """Rewards, what the judge finds, and of scenes what it sees."""
    from flow_grpo.evaluators.scenes import SceneJudge, look

    found: dict[str, np.ndarray] = {}
    for evaluator in evaluators:
        measured = evaluator.evaluate(samples)
        if "total" in measured.rewards:
            found["reward"] = _by_prompt(measured.rewards["total"], np.float64)
        if measured.judge is not None:
            own = {prompt: number for number, prompt in enumerate(dict.fromkeys(samples.prompts))}
            right = [guess == own[prompt] for guess, prompt in zip(measured.judge.guess, samples.prompts, strict=True)]
            found["right"] = _by_prompt(right, np.bool_)
        if isinstance(evaluator, SceneJudge):
            cells = look(evaluator.scorer, samples)
            found["labels"] = _by_prompt(cells.labels.argmax(-1).numpy(), np.int8)
            found["colours"] = np.where(
                found["labels"] == EMPTY, NONE, _by_prompt(cells.colours.argmax(-1).numpy(), np.int8)
            ).astype(np.int8)
    return found


def _by_prompt(values: Any, dtype: Any) -> np.ndarray:
    """(P * CHUNK, ...) -> (P, CHUNK, ...)."""
    array = np.asarray(values, dtype)
    return array.reshape(-1, CHUNK, *array.shape[1:])


def _joined(prompts: Sequence[str], files: Sequence[Path]) -> BaseImages:
    """All files' images; ConfigError if one cannot be read."""
    parts = []
    for file in files:
        try:
            parts.append(load_file(file))
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file} is damaged ({error}); move it away to have its images drawn again.") from None
    joined = {name: np.concatenate([part[name] for part in parts], 1) for name in parts[0]}
    return BaseImages(
        tuple(prompts),
        joined["reward"],
        joined["right"],
        joined["features"].astype(np.float32),
        joined.get("labels"),
        joined.get("colours"),
    )
