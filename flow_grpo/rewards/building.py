"""Load the rewards of a configuration, and score images with their weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from flow_grpo import places
from flow_grpo.errors import ConfigError, RewardFailed, TrainingStopped
from flow_grpo.models.files import LOADING_ERRORS, first_line
from flow_grpo.rewards.chosen import checkpoints_of, is_own, reward_names, reward_weights, trained_rewards
from flow_grpo.rewards.own import RAISED, OwnReward, ask_server, load_own, try_server
from flow_grpo.rewards.own_files import is_server
from flow_grpo.rewards.registry import CHAT, REWARDS, Metadata, Pending, RewardModel, RewardSpec, Server
from flow_grpo.types import RewardBatch


@contextmanager
def in_batch(when: str) -> Iterator[None]:
    """A reward that fails in the block says that it was in this batch."""
    try:
        yield
    except RewardFailed as error:
        raise RewardFailed(error.name, error.what, when) from error.__cause__


@dataclass(frozen=True)
class WeightedReward:
    """The plain reward, the sum of weight * reward, and the rewards that are only measured."""

    models: Mapping[str, RewardModel]  # every reward in use, by name
    weights: Mapping[str, float]  # those that are trained on, none of them zero

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> RewardBatch:
        """The plain reward and its terms; images (B, 3, H, W) in [0, 1], gradient where every term has one."""
        return self._score(tuple(self.weights), images, prompts, metadata)

    def evaluate(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> RewardBatch:
        """The same total, with the terms of the rewards that are only measured besides."""
        return self._score(tuple(self.models), images, prompts, metadata)

    def terms(
        self, names: Sequence[str], images: Tensor, prompts: Sequence[str], metadata: Metadata
    ) -> dict[str, Tensor]:
        """Single rewards of those in use, unweighted: (B,) each.

        Raises:
            RewardFailed: one of them raised something.
        """
        return self.begin(names, images, prompts, metadata).result()

    def begin(self, names: Sequence[str], images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Begun:
        """The same, without waiting for those that a server computes.

        Raises:
            ValueError: there are not as many prompts and metadata as images.
            RewardFailed: another of them raised something.
        """
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(
                f"a reward takes as many prompts and metadata as images, "
                f"got {len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata"
            )
        scores: dict[str, Tensor] = {}
        pending: dict[str, Pending] = {}
        for name in sorted(names, key=lambda name: not isinstance(self.models[name], Server)):  # servers first
            model = self.models[name]
            if isinstance(model, Server):
                pending[name] = model.submit(images, prompts, metadata)
            else:
                scores[name] = _scored(name, model, images, prompts, metadata)
        return Begun(tuple(names), scores, pending)

    def heed(self, unwanted: Callable[[], bool]) -> None:
        """From now on, wait for servers only while it says False; see `Server`."""
        for model in self.models.values():
            if isinstance(model, Server):
                model.heed(unwanted)

    def _score(self, names: Sequence[str], images: Tensor, prompts: Sequence[str], metadata: Metadata) -> RewardBatch:
        terms = self.terms(names, images, prompts, metadata)
        total = torch.stack([weight * terms[name] for name, weight in self.weights.items()]).sum(0)  # (B,)
        return RewardBatch(total, terms)


@dataclass(frozen=True)
class Begun:
    """Rewards of some images, some of which a server may still compute."""

    names: Sequence[str]
    scores: Mapping[str, Tensor]
    pending: Mapping[str, Pending]

    def failed(self) -> bool:
        """Whether one is known to have failed; it does not wait."""
        return any(pending.failed() for pending in self.pending.values())

    def result(self) -> dict[str, Tensor]:
        """Wait for all: (B,) each. Raises RewardFailed: there are no scores."""
        found = {**self.scores, **{name: pending.result() for name, pending in self.pending.items()}}
        return {name: found[name] for name in self.names}


def _scored(name: str, model: RewardModel, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    try:
        return model(images, prompts, metadata)
    except (ConfigError, TrainingStopped):
        raise
    except RAISED as error:
        others = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
        file = model.place.file if isinstance(model, OwnReward) else ""
        what = f"on the images of {prompts[0]!r}{others}: {places.failure(error, file)}"
        raise RewardFailed(name, what) from error


@dataclass(frozen=True)
class Ensemble:
    """Several checkpoints of one reward: of each image the mean of their scores, or the lowest.

    The gradient is that of what is returned: of "min" that of the member which gave it, of equals the first's.
    """

    name: str
    members: Sequence[RewardModel]
    kind: str  # "mean" or "min"

    @property
    def differentiable(self) -> bool:
        """Whether every member is."""
        return all(member.differentiable for member in self.members)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W), B prompts -> (B,) float32."""
        scores = torch.stack([member(images, prompts, metadata) for member in self.members])  # (M, B)
        return scores.mean(0) if self.kind == "mean" else scores.min(0).values


# (key, place, model) -> what the class at that place makes of the model of that key
LoadScorer = Callable[[str, str, str], Any]


def build_reward(config: Any, device: torch.device | str) -> WeightedReward:
    """Load the rewards of `config`; rewards with the same checkpoint share one scorer.

    Raises:
        ConfigError: one cannot be loaded; one's own is not what it should be (see `load_own`).
    """
    scorers: dict[tuple[str, str], Any] = {}
    options = {"dtype": config.reward_dtype, "offload": config.offload_rewards}
    by_gradient = trained_rewards(config) if config.use_reward_gradient else ()

    def scorer(key: str, place: str, model: str) -> Any:
        if (place, model) not in scorers:
            scorers[place, model] = load_scorer(key, place, model, device, options)
        return scorers[place, model]

    models: dict[str, RewardModel] = {}
    names = reward_names(config)
    for name in sorted(names, key=lambda name: not (is_own(config, name) or name == CHAT)):  # tried before others load
        if is_own(config, name) and is_server(config.reward_files[name]):
            models[name] = ask_server(name, config.reward_files[name], config, device)
        elif is_own(config, name):
            models[name] = load_own(name, config.reward_files[name], config, device, name in by_gradient)
        else:
            models[name] = model = _build_model(REWARDS[name], config, scorer)
            if isinstance(model, Server):
                try_server(model, f"config.chat.url = {config.chat.url!r}", config, device)
    return WeightedReward({name: models[name] for name in names}, reward_weights(config))


def _build_model(spec: RewardSpec, config: Any, scorer: LoadScorer) -> RewardModel:
    factory: Callable[..., RewardModel] = places.load(spec.factory)
    if spec.options:
        return factory(*(attrgetter(option)(config) for option in spec.options))
    if spec.scorer is None:
        return factory()
    key = f"config.reward_model.{spec.name}"
    members = [factory(scorer(key, spec.scorer, model)) for model in checkpoints_of(config, spec.name)]
    return members[0] if len(members) == 1 else Ensemble(spec.name, members, config.reward_ensemble)


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
