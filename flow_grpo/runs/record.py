"""One evaluation of N images: what was measured of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flow_grpo.diversity.paired import Change

NONE_OF_THEM = -1  # the guess of a judge that takes an image for no prompt's
FOLDERS = "folders "  # a setting begins so where images were not drawn, but there already


@dataclass(frozen=True)
class Judged:
    """What the judge makes of N images."""

    model: str  # directory or hub id
    independent: bool  # its model is none of the rewards' models in use
    guess: Sequence[int | None]  # (N,): index of the prompt that it sees, or NONE_OF_THEM; None: it is not finite
    probability: Sequence[float | None]  # (N,): of the image's own prompt, softmax at the judge's scale


@dataclass(frozen=True)
class Sprite:
    """Where the images are: row by row in one file, beside the record."""

    file: str
    cell: tuple[int, int]  # width and height, pixels
    columns: int
    images: Sequence[int]  # which of the N images, in the sprite's order


@dataclass(frozen=True)
class Distances:
    """Euclidean distances of unit features (0 to 2), prompt by prompt: cosine = 1 - distance^2 / 2."""

    features: str  # name of the extractor
    order: float  # q of the Vendi score
    prompts: Sequence[int]  # (P,): index into the record's prompts
    images: Sequence[int]  # (P,): n of each prompt
    noise: Sequence[Sequence[int]]  # (P, n): which images of the prompt
    within: Sequence[Sequence[float]]  # (P, n (n - 1) / 2): as scipy's pdist orders them
    to_base: Sequence[Sequence[float]] | None  # (P, n n): rows base images, columns this model's; None: of the base
    vendi: Sequence[float]  # (P,)
    rke: Sequence[float] | None  # (P,); None: no bandwidth fits


@dataclass(frozen=True)
class Record:
    """One evaluation of N images; None stands for a number that is not finite."""

    label: str  # "eval": the current weights, "eval_ema": the averaged ones
    epoch: int  # 0: the base model
    prompts: Sequence[str]  # distinct, in order
    prompt: Sequence[int]  # (N,): index into the prompts
    noise: Sequence[int]  # (N,): number of the image's noise among those of its prompt
    name: str = ""  # shown instead of "base model" or "epoch 10"
    seconds: float = 0.0  # of training
    network_evaluations: int = 0  # of training
    setting: str = ""  # digest of what decides the images and the trained reward; records that differ are not compared
    rewards: Mapping[str, Sequence[float | None]] = field(default_factory=dict)  # name -> (N,); "total": trained on
    judge: Judged | None = None
    sprite: Sprite | None = None
    diversity: Distances | None = None
    changes: Mapping[str, Change] = field(default_factory=dict)  # of CHANGES, against the base; {} for the base
    extra: Mapping[str, float | None] = field(default_factory=dict)  # scalars of the same evaluation
    folder: Path = Path()  # that the record lies in, and its sprite

    @property
    def sprite_path(self) -> Path | None:
        """The file of the images."""
        return None if self.sprite is None else self.folder / self.sprite.file

    @property
    def drawn(self) -> bool:
        """Whether the images were drawn for it, from noises that other records share."""
        return not self.setting.startswith(FOLDERS)

    @property
    def images(self) -> dict[tuple[str, int], int]:
        """(prompt, noise) -> position of the image."""
        return {(self.prompts[p], s): i for i, (p, s) in enumerate(zip(self.prompt, self.noise, strict=True))}
