"""What is known of a method before it loads. Torch is not imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.rules import Key

Recipe = Callable[[ConfigDict], None]  # changes a configuration; its docstring says what, source, cost, what to expect


@dataclass(frozen=True)
class Method:
    """One way to turn rewards into an update of the policy.

    `check` raises ConfigError for settings that the method cannot be combined with. `loop` is written
    "module:attribute": a `TrainEpoch`, imported when the training begins. The two recipes say what differs from GRPO's,
    or from DRTune's of a method that takes the reward's gradient: on the embedded tiny SD3, and on SD3.5-medium.
    """

    name: str  # as config.train.method has it
    title: str  # as people write it
    reward_gradient: bool  # whether it needs the gradient of the reward: config.use_reward_gradient
    check: Callable[[ConfigDict], None]
    loop: str
    keys: tuple[Key, ...] = ()  # settings that only it reads, or it and others of its file
    tiny: Recipe | None = None  # the recipe tiny_sd3_<name>
    sd35: Recipe | None = None  # the recipe pickscore_sd3_<name>
    unread: tuple[str, ...] = ()  # keys of other sections that it does not look at; "drtune.": all of that group
    only: Mapping[str, Any] = field(default_factory=dict)  # such keys that must have this value, whoever has set it
    needs_base: bool = False  # whether it asks for the base model's velocity, whatever train.beta


# Of rewards alone, and of the ratio that GRPO makes of them: nothing that a reward gradient looks at.
BLACK_BOX_ONLY = (
    "train.num_inner_epochs", "train.clip_range", "train.adv_clip_max", "train.advantage_mode", "train.advantage_std",
    "train.timestep_fraction", "train.kl_space", "train.ratio_normalization", "train.ratio", "train.ratio_probes",
    "train.max_ratio_error", "sample.sde_window_size", "sample.sde_window_range",
    "sample.sde_window_placement", "sample.sde_window_epochs", "sample.sde_window_stride",
)  # fmt: skip
REWARD_GRADIENT_ONLY = ("drtune.",)


def takes_only(config: ConfigDict | FrozenConfigDict, key: str, allowed: Any, because: str) -> None:
    """ConfigError unless a setting has this value; `because` completes "config.key = value ..."."""
    value = config
    for part in key.split("."):
        value = value[part]
    if value != allowed:
        raise ConfigError(f"config.{key} = {_shown(value)} {because}; it takes {_shown(allowed)}.")


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
