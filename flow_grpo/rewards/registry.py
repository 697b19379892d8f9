"""Which rewards there are, their weighted sum, and the checks made before anything loads.

To add a reward: write its class (see `RewardModel`) and add one entry to `REWARDS`: its weight is then a key. This
module is imported while the configuration is checked, so nothing heavy is imported at its top.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from flow_grpo import places
from flow_grpo.errors import ConfigError
from flow_grpo.models.files import LOADING_ERRORS, first_line
from flow_grpo.paths import find

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from flow_grpo.types import RewardBatch

Metadata = Sequence[Mapping[str, Any]]


class RewardModel(Protocol):
    """One reward. `differentiable` promises a gradient at every pixel that the reward looks at."""

    name: str
    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1], B prompts, B metadata -> (B,) float32; ValueError for others."""


@dataclass(frozen=True)
class RewardSpec:
    """What is known of a reward before it loads. Places in code are written "module:attribute"."""

    name: str
    differentiable: bool
    meaning: str  # what it is, in a few words
    factory: str  # makes the RewardModel; is called with the loaded scorer, or with nothing
    scorer: str | None = None  # loads config.reward_model.<name>, called as `load_scorer` says; None: no checkpoint
    model: str = ""  # the default of config.reward_model.<name>


CLIP_SCORER = "flow_grpo.rewards.clip:ClipScorer"

REWARDS: dict[str, RewardSpec] = {
    spec.name: spec
    for spec in (
        RewardSpec(
            "pickscore",
            True,
            "exp(logit_scale) cos(image, prompt) / 26",
            "flow_grpo.rewards.clip:PickScore",
            CLIP_SCORER,
            "assets/tiny_pickscore",
        ),
        RewardSpec(
            "clipscore",
            True,
            "exp(logit_scale) cos(image, prompt) / 30",
            "flow_grpo.rewards.clip:ClipScore",
            CLIP_SCORER,
            "assets/tiny_pickscore",
        ),
        RewardSpec(
            "jpeg_compressibility",
            False,
            "-kilobytes of the JPEG; no gradient",
            "flow_grpo.rewards.jpeg:JpegCompressibility",
        ),
        RewardSpec(
            "jpeg_incompressibility",
            False,
            "kilobytes of the JPEG; no gradient",
            "flow_grpo.rewards.jpeg:JpegIncompressibility",
        ),
    )
}


@dataclass(frozen=True)
class WeightedReward:
    """The training reward, the sum of weight * reward, and the rewards that are only measured."""

    models: Mapping[str, RewardModel]  # every reward in use, by name
    weights: Mapping[str, float]  # those that are trained on, none of them zero

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> RewardBatch:
        """The training reward and its terms; images (B, 3, H, W) in [0, 1], gradient where every term has one."""
        return self._score(tuple(self.weights), images, prompts, metadata)

    def evaluate(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> RewardBatch:
        """The same total, with the terms of the rewards that are only measured besides."""
        return self._score(tuple(self.models), images, prompts, metadata)

    def terms(
        self, names: Sequence[str], images: Tensor, prompts: Sequence[str], metadata: Metadata
    ) -> dict[str, Tensor]:
        """Single rewards of those in use, unweighted: (B,) each."""
        return {name: self.models[name](images, prompts, metadata) for name in names}

    def _score(self, names: Sequence[str], images: Tensor, prompts: Sequence[str], metadata: Metadata) -> RewardBatch:
        import torch  # both are loaded by now; imported here to keep the registry light

        from flow_grpo.types import RewardBatch

        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(
                f"a reward takes as many prompts and metadata as images, "
                f"got {len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata"
            )
        terms = self.terms(names, images, prompts, metadata)
        total = torch.stack([weight * terms[name] for name, weight in self.weights.items()]).sum(0)  # (B,)
        return RewardBatch(total, terms)


# --- building -------------------------------------------------------------------------------------------


def build_reward(config: Any, device: torch.device | str) -> WeightedReward:
    """Load the rewards of `config`; rewards with the same checkpoint share one scorer."""
    scorers: dict[tuple[str, str], Any] = {}
    models = {name: _build_model(REWARDS[name], config, device, scorers) for name in reward_names(config)}
    return WeightedReward(models, reward_weights(config))


def reward_weights(config: Any) -> dict[str, float]:
    """The non-zero weights of `config.reward_fn`, in its order."""
    return {name: float(weight) for name, weight in config.reward_fn.items() if weight != 0}


def reward_names(config: Any) -> tuple[str, ...]:
    """The rewards in use, each once: those trained on, then those of the gate and of `config.eval.rewards`."""
    return tuple(dict.fromkeys([*reward_weights(config), *config.shaping.gate_rewards, *config.eval.rewards]))


def trained_models(config: Any) -> set[str]:
    """The checkpoints of the rewards that training sees: those that are trained on, and those of the gate."""
    names = (*reward_weights(config), *config.shaping.gate_rewards)
    return {config.reward_model[name] for name in names if REWARDS[name].scorer is not None}


def _build_model(spec: RewardSpec, config: Any, device: Any, scorers: dict[tuple[str, str], Any]) -> RewardModel:
    factory = places.load(spec.factory)
    if spec.scorer is None:
        return factory()
    key = (spec.scorer, config.reward_model[spec.name])
    if key not in scorers:
        options = {"dtype": config.reward_dtype, "offload": config.offload_rewards}
        scorers[key] = load_scorer(f"config.reward_model.{spec.name}", *key, device, options)
    return factory(scorers[key])


def load_scorer(subject: str, place: str, model: str, device: Any, options: Mapping[str, Any] | None = None) -> Any:
    """What the class at `place` makes of a model: scorer(model, device, **options).

    Rewards hand it the options `dtype` and `offload`, of `config.reward_dtype` and `config.offload_rewards`.

    Raises:
        ConfigError: beginning with `subject`, if it cannot be loaded.
    """
    scorer = places.load(place)
    try:
        return scorer(model, device, **(options or {}))
    except ConfigError as error:
        raise ConfigError(f"{subject}: {error}") from error
    except LOADING_ERRORS as error:
        raise ConfigError(f"{subject} = {model!r} cannot be loaded: {first_line(error)}") from error


# --- checks ---------------------------------------------------------------------------------------------


def validate_rewards(config: Any) -> None:
    """Raise ConfigError for rewards that cannot be built or trained on. Reads the file system, loads nothing."""
    _check_weights(config.reward_fn)
    measured = {"eval.rewards": config.eval.rewards, "shaping.gate_rewards": config.shaping.gate_rewards}
    for key, names in measured.items():
        for name in names:
            _check_name(f"config.{key} = {tuple(names)}: {name!r}", name)
    if config.use_reward_gradient:
        _check_differentiable(reward_weights(config))
    for name in reward_names(config):
        if REWARDS[name].scorer is not None:
            check_checkpoint(f"config.reward_model.{name}", config.reward_model.get(name, ""))
    if config.eval.judge:
        check_checkpoint("config.eval.judge", config.eval.judge)


def check_checkpoint(key: str, checkpoint: str) -> None:
    """Raise ConfigError unless `checkpoint` is a directory or may be a hub id, which has the form "org/name".

    It is taken for a directory if it has another form, or if its first component is "assets" or exists.
    """
    if not checkpoint:
        raise ConfigError(f"{key} is empty; it takes the directory or hub id (org/name) of a checkpoint.")
    first = checkpoint.split("/")[0]
    local = checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") != 1
    local = local or first == "assets" or os.path.exists(first)
    if local and not os.path.isdir(find(checkpoint)):
        raise ConfigError(
            f"{key} = {checkpoint!r} is not a directory; it takes the directory or hub id (org/name) of a checkpoint."
        )


def _check_weights(weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        _check_name(f"config.reward_fn.{name}", name)
        if not math.isfinite(weight):
            raise ConfigError(f"config.reward_fn.{name} = {weight} is not a weight; it takes a finite number.")
    if not any(weights.values()):
        raise ConfigError(
            f"config.reward_fn has no weight other than 0; give one to any of {_listed(REWARDS)}, "
            "as in --config.reward_fn.pickscore=1."
        )


def _check_name(subject: str, name: str) -> None:
    if name not in REWARDS:
        nearest = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{subject} is not a reward; the nearest is {nearest} (there are {_listed(REWARDS)}).")


def _check_differentiable(weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not REWARDS[name].differentiable:
            differentiable = _listed([spec.name for spec in REWARDS.values() if spec.differentiable])
            raise ConfigError(
                f"config.reward_fn.{name} = {weight} has no gradient, which config.use_reward_gradient = True needs; "
                f"the differentiable rewards are {differentiable}."
            )


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(sorted(names))
