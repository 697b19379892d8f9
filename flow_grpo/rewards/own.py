"""Rewards of one's own: the code that `config.reward_files` names, imported, and tried on two random images.

It may be a class that is made without arguments, an object, or a plain function of images (B, 3, H, W) in [0, 1],
their B prompts and, if it takes a third argument, their B metadata. It gives (B,) numbers: a tensor, an array or a
list. A torch module is moved to the device, and frozen in eval mode.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flow_grpo.errors import ConfigError, RewardFailed
from flow_grpo.models.pipeline_files import image_size
from flow_grpo.places import failure
from flow_grpo.prompts import PromptDataset
from flow_grpo.randomness import keyed_generator
from flow_grpo.rewards.own_files import Place, find_place
from flow_grpo.rewards.registry import Metadata, RewardModel

RAISED = (Exception, SystemExit)  # whatever somebody's code does
TRIED = 2  # images: a score for each shows that there is one for each


@dataclass(frozen=True)
class OwnReward:
    """Somebody's code as a `RewardModel`."""

    name: str
    place: Place
    score: Callable[..., Any]
    takes_metadata: bool
    differentiable: bool = False  # found by trying; False as well where the code says so
    why_not: str = ""  # differentiable, in words

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1], B prompts, B metadata -> (B,) float32; ValueError for other scores."""
        more = (list(metadata),) if self.takes_metadata else ()
        found = self.score(images, list(prompts), *more)
        if isinstance(found, list | tuple) and found and all(isinstance(score, Tensor) for score in found):
            found = torch.stack(list(found))
        try:
            scores = torch.as_tensor(found)
        except (TypeError, ValueError, RuntimeError):  # of what holds no numbers
            raise ValueError(f"{self.place.thing} gave {found!r:.80}; {self._wanted(images)}") from None
        if scores.shape != (len(images),) or scores.is_complex():
            raise ValueError(
                f"{self.place.thing} gave {scores.dtype} of shape {tuple(scores.shape)} for {len(images)} images; "
                f"{self._wanted(images)}"
            )
        return scores.to(images.device, torch.float32)

    def _wanted(self, images: Tensor) -> str:
        return f"it is to give a number for each image, of shape ({len(images)},)"


def load_own(name: str, text: str, config: Any, device: torch.device | str, needs_gradient: bool) -> OwnReward:
    """Import the code of `config.reward_files.<name>`, and try it.

    Args:
        text: its place.
        config: says how large images are, and which prompts there are.
        needs_gradient: whether it is trained on by its gradient.

    Raises:
        ConfigError: naming file and line, if it cannot be imported, made or called, or does not give finite scores
            (B,), or no gradient where one is needed.
    """
    place = find_place(name, text)
    thing = _imported(name, place)
    score = _made(name, place, thing, device)
    reward = OwnReward(name, place, score, _takes_metadata(name, place, score))
    return _tried(reward, config, device, needs_gradient, getattr(score, "differentiable", None))


def ask_server(name: str, url: str, config: Any, device: torch.device | str) -> RewardModel:
    """The reward of a server, once it has been tried; raises as `try_server`."""
    from flow_grpo.rewards.client import Network, RemoteReward  # whose packages are an extra's

    reward = RemoteReward(name, url, Network(**config.remote))
    try_server(reward, f"config.reward_files.{name} = {url!r}", config, device)
    return reward


def try_server(reward: RewardModel, subject: str, config: Any, device: torch.device | str) -> None:
    """Ask for scores of two known images.

    Raises:
        ConfigError: beginning with `subject`, if there are none within `config.remote.patience` seconds, or they are
            not in `config.reward_range`.
    """
    images, prompts, metadata = _trial(config, device)
    try:
        scores = reward(images, prompts, metadata)
    except RewardFailed as error:
        raise ConfigError(f"{subject} cannot be used, {error.what}.") from error
    _check_scores(reward.name, subject, scores, config)


# --- from a place to something that can be called ---------------------------------------------------------


def _imported(name: str, place: Place) -> Any:
    try:
        module = importlib.import_module(place.module) if place.module else _import_file(name, place.file)
        return getattr(module, place.thing)
    except RAISED as error:
        raise ConfigError(f"config.reward_files.{name}: {failure(error, place.file)}.") from error


def _import_file(name: str, file: str) -> Any:
    """A file that belongs to no package; what lies beside it can be imported from it, as from a script."""
    module_name = f"reward_of_{name}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None  # .py files have a spec and a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(Path(file).parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last: nothing that is there already is hidden
    sys.modules[module_name] = module  # dataclasses and pickle look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _made(name: str, place: Place, thing: Any, device: torch.device | str) -> Callable[..., Any]:
    """A class's object; others as they are. ConfigError for what cannot be called."""
    if isinstance(thing, type):
        try:
            thing = thing()
        except RAISED as error:
            raise ConfigError(
                f"config.reward_files.{name}: {place.thing}() failed: {failure(error, place.file)}."
            ) from error
    if not callable(thing):
        raise ConfigError(
            f"config.reward_files.{name}: {place.thing} of {place.file} cannot be called; it takes a function "
            "(images, prompts), or a class or object with such a __call__."
        )
    if isinstance(thing, torch.nn.Module):
        thing.to(device).eval().requires_grad_(False)
    return thing


def _takes_metadata(name: str, place: Place, score: Callable[..., Any]) -> bool:
    try:
        signature = inspect.signature(score.forward if isinstance(score, torch.nn.Module) else score)
    except (TypeError, ValueError):  # of code in C
        return False
    for number in (3, 2):
        try:
            signature.bind(*range(number))
        except TypeError:
            continue
        return number == 3
    raise ConfigError(
        f"config.reward_files.{name}: {place.thing}{signature} of {place.file} cannot be called with (images, prompts) "
        "or (images, prompts, metadata)."
    )


# --- the trial --------------------------------------------------------------------------------------------


def _tried(reward: OwnReward, config: Any, device: torch.device | str, needs_gradient: bool, says: Any) -> OwnReward:
    """The reward, with whether it has a gradient; ConfigError for scores that are none. `says`: what it promises."""
    subject = f"config.reward_files.{reward.name}"
    images, prompts, metadata = _trial(config, device)
    try:
        with torch.no_grad():
            scores = reward(images, prompts, metadata)
    except RAISED as error:
        raise ConfigError(f"{subject}, tried on random images: {failure(error, reward.place.file)}.") from error
    _check_scores(reward.name, subject, scores, config)
    why_not = (
        "its attribute differentiable is False" if says is False else _no_gradient(reward, images, prompts, metadata)
    )
    if why_not and needs_gradient:
        raise ConfigError(f"{subject} has no gradient, which config.use_reward_gradient = True needs: {why_not}.")
    return replace(reward, differentiable=not why_not, why_not=why_not)


def _check_scores(name: str, subject: str, scores: Tensor, config: Any) -> None:
    """ConfigError unless they are finite, and in `config.reward_range`, where it says something of this reward."""
    low, high = config.reward_range.get(name) or (-math.inf, math.inf)
    found = scores.tolist()
    if not all(map(math.isfinite, found)):
        raise ConfigError(f"{subject}, tried on random images, gave {found}; scores are to be finite.")
    if not all(low <= score <= high for score in found):
        raise ConfigError(
            f"{subject}, tried on random images, gave {found}, outside config.reward_range.{name} = {(low, high)}."
        )


def _trial(config: Any, device: torch.device | str) -> tuple[Tensor, list[str], list[Mapping[str, Any]]]:
    """Random images that are always the same, of the size that is drawn, with prompts and metadata."""
    images = torch.rand(TRIED, 3, *image_size(config), generator=keyed_generator(0, "trial")).to(device)
    return images, *_asked(config)


def _asked(config: Any) -> tuple[list[str], list[Mapping[str, Any]]]:
    """What the random images are said to be: the first training prompt, or that of a test file with metadata."""
    train, test = (PromptDataset.load(config.prompts[name]) for name in ("train", "test"))
    chosen = test if test.metadata[0] and not train.metadata[0] else train
    return [chosen.prompts[0]] * TRIED, [chosen.metadata[0]] * TRIED


def _no_gradient(reward: OwnReward, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> str:
    """Why its scores have no finite gradient at the pixels, in words; empty: they have."""
    images = images.clone().requires_grad_()
    try:
        with torch.enable_grad():
            scores = reward(images, prompts, metadata)
            if not scores.requires_grad:
                return "its scores do not depend on the pixels by operations that autograd knows"
            (gradient,) = torch.autograd.grad(scores.sum(), images, allow_unused=True)
    except RAISED as error:
        return failure(error, reward.place.file)
    if gradient is None or not gradient.any():
        return "it is 0 at every pixel of two random images"
    return "" if gradient.isfinite().all() else "it is not finite at every pixel of two random images"
