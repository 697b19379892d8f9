"""Which rewards there are; chosen.py says which of them a configuration uses.

To add a reward: write its class (see `RewardModel`) and add one entry to `REWARDS`: its weight is then a key. One's own
needs no entry: `config.reward_files` (own_files.py) says where it is. This module is imported while the configuration
is checked, so nothing heavy is imported at its top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Metadata = Sequence[Mapping[str, Any]]


class RewardModel(Protocol):
    """One reward."""

    @property
    def name(self) -> str:
        """As `config.reward_fn` has it."""

    @property
    def differentiable(self) -> bool:
        """Whether there is a gradient at every pixel that the reward looks at."""

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
    extra: str = ""  # the extra of pyproject.toml that installs `packages`
    packages: tuple[str, ...] = ()  # modules that it needs beside the project's dependencies
    bounds: str = "any number"  # what its scores may be, and are mostly
    licence: str = "this project's"  # of the code and the published weights it runs


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
