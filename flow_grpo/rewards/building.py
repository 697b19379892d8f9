"""Load the rewards of a configuration, and score images with their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from flow_grpo import places
from flow_grpo.errors import ConfigError
from flow_grpo.models.files import LOADING_ERRORS, first_line
from flow_grpo.rewards.registry import REWARDS, Metadata, RewardModel, RewardSpec, reward_names, reward_weights
from flow_grpo.types import RewardBatch


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
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(
                f"a reward takes as many prompts and metadata as images, "
                f"got {len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata"
            )
        terms = self.terms(names, images, prompts, metadata)
        total = torch.stack([weight * terms[name] for name, weight in self.weights.items()]).sum(0)  # (B,)
        return RewardBatch(total, terms)


def build_reward(config: Any, device: torch.device | str) -> WeightedReward:
    """Load the rewards of `config`; rewards with the same checkpoint share one scorer."""
    scorers: dict[tuple[str, str], Any] = {}
    models = {name: _build_model(REWARDS[name], config, device, scorers) for name in reward_names(config)}
    return WeightedReward(models, reward_weights(config))


def _build_model(spec: RewardSpec, config: Any, device: Any, scorers: dict[tuple[str, str], Any]) -> RewardModel:
    factory = places.load(spec.factory)
    if spec.option:
        return factory(attrgetter(spec.option)(config))
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
