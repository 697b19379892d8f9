"""What is known of a method before it loads. Torch is not imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ml_collections import ConfigDict


@dataclass(frozen=True)
class Method:
    """One way to turn rewards into an update of the policy.

    `check` raises ConfigError for settings that the method cannot be combined with. `loop` is written
    "module:attribute": a `TrainEpoch`, imported when the training begins.
    """

    name: str  # as config.train.method has it
    title: str  # as people write it
    reward_gradient: bool  # whether it needs the gradient of the reward: config.use_reward_gradient
    check: Callable[[ConfigDict], None]
    loop: str
