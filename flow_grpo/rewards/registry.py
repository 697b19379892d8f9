"""Which rewards there are; chosen.py says which of them a configuration uses.

To add a reward: write its class (see `RewardModel`) and add one entry to `REWARDS`: its weight is then a key. One's own
needs no entry: `config.reward_files` (own_files.py) says where it is. This module is imported while the configuration
is checked, so nothing heavy is imported at its top.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from flow_grpo.models.files import CLIP_NEEDS, Needs
from flow_grpo.scenes.files import DETECTOR_NEEDS, RESOLUTION

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


class Pending(Protocol):
    """Scores that another process computes."""

    def failed(self) -> bool:
        """Whether it is known already that there are none; it does not wait."""

    def result(self) -> Tensor:
        """Wait for them: (B,) float32. Raises RewardFailed: there are none."""


@runtime_checkable
class Server(Protocol):
    """A reward that another process computes, while this one goes on."""

    def submit(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Pending:
        """What a RewardModel takes; it returns at once."""

    def heed(self, unwanted: Callable[[], bool]) -> None:
        """From now on, wait for scores only while it says False; what would still wait then raises RewardFailed."""


@dataclass(frozen=True)
class RewardSpec:
    """What is known of a reward before it loads. Places in code are written "module:attribute"."""

    name: str
    differentiable: bool
    meaning: str  # what it is, in a few words
    factory: str  # makes the RewardModel; is called with the loaded scorer, the values of `options`, or nothing
    scorer: str | None = None  # loads config.reward_model.<name>, called as `load_scorer` says; None: no checkpoint
    model: str = ""  # the default of config.reward_model.<name>
    needs: Needs = CLIP_NEEDS  # the files of a folder that is its model
    hub_file: str = "config.json"  # a file that each such model on the hub has
    reads: str = ""  # called with a prompt and the configuration: raises ValueError for one that it cannot score
    side: int = 0  # pixels of the only square images that it takes; 0: any
    options: tuple[str, ...] = ()  # keys of settings of its own, or groups of them
    extra: str = ""  # the extra of pyproject.toml that installs `packages`
    packages: tuple[str, ...] = ()  # modules that it needs beside the project's dependencies
    bounds: str = "any number"  # what its scores may be, and are mostly
    licence: str = "this project's"  # of the code and the published weights it runs


CHAT = "chat"
SCENE_SCORER = "flow_grpo.rewards.scenes:SceneScorer"
READ_CAPTION = "flow_grpo.rewards.prompt_words:read_caption"
CLIP_SCORER = "flow_grpo.rewards.clip:ClipScorer"
# Weights that are one file, by the names they were published under, the usual one first.
HPS_FILES = ("HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt", "open_clip_model.safetensors")
IMAGE_REWARD_FILES = ("ImageReward.pt",)
AESTHETIC_FILES = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth")

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
            bounds="-3.8 to 3.8; mostly 0.7 to 0.9",
            licence="code MIT; weights without one",
        ),
        RewardSpec(
            "clipscore",
            True,
            "exp(logit_scale) cos(image, prompt) / 30",
            "flow_grpo.rewards.clip:ClipScore",
            CLIP_SCORER,
            "assets/tiny_pickscore",
            bounds="-3.3 to 3.3; mostly 0.7 to 1.1",
            licence="of the CLIP chosen; OpenAI's is MIT",
        ),
        RewardSpec(
            "hpsv2",
            True,
            "HPSv2.1's cos(image, prompt)",
            "flow_grpo.rewards.hpsv2:HPSv2",
            "flow_grpo.rewards.hpsv2:HpsScorer",
            "xswu/HPSv2",
            needs=(HPS_FILES,),
            hub_file=HPS_FILES[0],
            bounds="-1 to 1; mostly 0.2 to 0.35",
            licence="Apache-2.0",
        ),
        RewardSpec(
            "imagereward",
            True,
            "ImageReward's mark, of mean 0 and std 1",
            "flow_grpo.rewards.imagereward:ImageReward",
            "flow_grpo.rewards.imagereward:ImageRewardScorer",
            "THUDM/ImageReward",
            needs=(IMAGE_REWARD_FILES,),
            hub_file=IMAGE_REWARD_FILES[0],
            bounds="any number; mostly -2.5 to 2",
            licence="Apache-2.0",
        ),
        RewardSpec(
            "aesthetic",
            True,
            "LAION's aesthetic mark; no prompt is read",
            "flow_grpo.rewards.aesthetic:Aesthetic",
            "flow_grpo.rewards.aesthetic:AestheticScorer",
            "trl-lib/ddpo-aesthetic-predictor",
            needs=(AESTHETIC_FILES,),
            hub_file=AESTHETIC_FILES[0],
            bounds="any number; mostly 4 to 7",
            licence="head Apache-2.0, CLIP MIT",
        ),
        RewardSpec(
            "siglip",
            True,
            "SigLIP's logit of image and prompt",
            "flow_grpo.rewards.siglip:SiglipScore",
            "flow_grpo.rewards.siglip:SiglipScorer",
            "google/siglip2-so400m-patch14-384",
            bounds="any number; above 0 they fit",
            licence="Apache-2.0",
        ),
        RewardSpec(
            "ocr",
            False,
            "the share of the quoted words that can be read; no gradient",
            "flow_grpo.rewards.ocr:Ocr",
            reads="flow_grpo.rewards.prompt_words:read_quoted",
            extra="ocr",
            packages=("rapidocr", "onnxruntime", "rapidfuzz"),
            bounds="0 to 1",
            licence="Apache-2.0",
        ),
        RewardSpec(
            "jpeg_compressibility",
            False,
            "-kilobytes of the JPEG; no gradient",
            "flow_grpo.rewards.jpeg:JpegCompressibility",
            bounds="below 0",
        ),
        RewardSpec(
            "jpeg_incompressibility",
            False,
            "kilobytes of the JPEG; no gradient",
            "flow_grpo.rewards.jpeg:JpegIncompressibility",
            bounds="above 0",
        ),
        RewardSpec(
            "target_colour",
            True,
            "-distance of the mean colour to targets.colour",
            "flow_grpo.rewards.targets:TargetColour",
            reads="flow_grpo.rewards.prompt_words:read_colour",
            options=("targets.colour",),
            bounds="-1.73 to 0",
        ),
        RewardSpec(
            "target_brightness",
            True,
            "-distance of the mean brightness to targets.brightness",
            "flow_grpo.rewards.targets:TargetBrightness",
            options=("targets.brightness",),
            bounds="-1 to 0",
        ),
        RewardSpec(
            "scenes",
            False,
            "1 if a detector sees what the caption of a scene says, else 0; no gradient",
            "flow_grpo.rewards.scenes:Scenes",
            SCENE_SCORER,
            "assets/tiny_scenes_detector",
            needs=DETECTOR_NEEDS,
            reads=READ_CAPTION,
            side=RESOLUTION,
            bounds="0 or 1",
        ),
        RewardSpec(
            "scenes_soft",
            True,
            "the log-probability, to a detector, of what the caption of a scene says",
            "flow_grpo.rewards.scenes:SoftScenes",
            SCENE_SCORER,
            "assets/tiny_scenes_detector",
            needs=DETECTOR_NEEDS,
            reads=READ_CAPTION,
            side=RESOLUTION,
            bounds="-37.2 to 0",
        ),
        RewardSpec(
            "scenes_clip",
            True,
            "exp(logit_scale) cos(image, prompt) / 30 of a CLIP of scenes",
            "flow_grpo.rewards.scenes:ScenesClip",
            CLIP_SCORER,
            "assets/tiny_scenes_clip",
            bounds="-3.3 to 3.3",
        ),
        RewardSpec(
            CHAT,
            False,
            "what a vision-language model at chat.url says; no gradient",
            "flow_grpo.rewards.chat:ChatReward",
            options=("chat", "remote"),
            extra="remote",
            packages=("httpx", "tenacity"),
            bounds="0 to 1",
            licence="the served model's",
        ),
    )
}


def spec_of_key(key: str) -> RewardSpec:
    """The registered reward whose model the setting "reward_model.NAME" names."""
    return REWARDS[key.partition(".")[2]]
