"""Fashion-MNIST as a tiny text-to-image data set: real photographs, our colours, our captions.

The photographs are Zalando's Fashion-MNIST (MIT licence): 60,000 training and 10,000 test images, 28 x 28, grey, of ten
kinds of clothing. We changed three things, and every model card says so:

- **padding** to 32 x 32;
- **tint**: the grey value of a garment becomes a shade of one of eight colours, on a white background;
- **captions**: "a sneaker" (plain) or "a red sneaker" (coloured), written by us from the label and the tint.

A plain prompt therefore has eight known modes, one for each colour, which an eye or a count can check.

`/usr/share/datasets/fashion-mnist` is where Debian's package `dataset-fashion-mnist` puts the files; any other
folder that holds the four `*-ubyte.gz` files is named with `--data`.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flow_grpo.errors import ConfigError
from flow_grpo.scenes.captions import CLASSES, COLOURS, Garment, noun_phrase

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
RESOLUTION = 32  # pixels

PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255  # (8, 3)

_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


@dataclass(frozen=True)
class Photographs:
    """One split: grey photographs and what they show."""

    grey: Tensor  # (N, 32, 32) uint8, garment bright on black
    labels: Tensor  # (N,) int64, index into CLASSES

    def __len__(self) -> int:
        return len(self.labels)


def load(split: str, folder: Path = DEBIAN_FOLDER) -> Photographs:
    """Read the "train" (60,000) or "test" (10,000) split; ConfigError if a file is not there."""
    images, labels = (folder / name for name in _FILES[split])
    for path in (images, labels):
        if not path.is_file():
            raise ConfigError(
                f"--data: Fashion-MNIST's {path.name} is not in {folder}; install the Debian package "
                "dataset-fashion-mnist or name a folder that holds the four *-ubyte.gz files with --data DIR."
            )
    margin = (RESOLUTION - 28) // 2
    grey = F.pad(_read_idx(images, header=16).view(-1, 28, 28), (margin,) * 4)
    return Photographs(grey, _read_idx(labels, header=8).long())


def _read_idx(path: Path, header: int) -> Tensor:
    """The bytes of a gzipped idx file after its header, uint8."""
    return torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())[header:]), dtype=torch.uint8)


def tint(grey: Tensor, colours: Tensor) -> Tensor:
    """Colour grey photographs: (B, 32, 32) uint8 and (B,) indices into COLOURS -> (B, 3, 32, 32) in [0, 1].

    The grey value v (0 is background) gives a soft mask min(6 v, 1) and a shade (0.35 + 0.75 v) of the colour.
    """
    v = grey[:, None].float() / 255  # (B, 1, 32, 32)
    mask = (6 * v).clamp(max=1)
    shaded = (PALETTE[colours][:, :, None, None] * (0.35 + 0.75 * v)).clamp(max=1)  # (B, 3, 32, 32)
    return mask * shaded + (1 - mask)


def caption(label: int, colour: int | None = None) -> str:
    """ "a sneaker", or with a colour "a red sneaker"."""
    return noun_phrase(Garment(label, colour))


def plain_captions() -> list[str]:
    """The ten captions without a colour, in the order of CLASSES."""
    return [caption(label) for label in range(len(CLASSES))]


def coloured_captions() -> list[str]:
    """The eighty captions with a colour; index 8 * label + colour."""
    return [caption(label, colour) for label in range(len(CLASSES)) for colour in range(len(COLOURS))]


def all_captions() -> list[str]:
    """The empty caption, then the plain, then the coloured ones; `caption_ids` indexes this list."""
    return ["", *plain_captions(), *coloured_captions()]


def caption_ids(labels: Tensor, colours: Tensor, coloured: Tensor) -> Tensor:
    """Indices into `all_captions()`: with the colour where `coloured` (bool) says so, plain elsewhere; all (B,)."""
    plain = 1 + labels
    full = 1 + len(CLASSES) + labels * len(COLOURS) + colours
    return torch.where(coloured, full, plain)


def modes() -> dict[str, dict[str, str]]:
    """The known modes of each plain prompt: prompt -> colour name -> the prompt that names the colour."""
    return {
        caption(label): {name: caption(label, index) for index, name in enumerate(COLOURS)}
        for label in range(len(CLASSES))
    }


def write_prompts(folder: Path) -> None:
    """Write train.txt, test.txt, eval_diversity.txt (the ten plain prompts each) and modes.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test", "eval_diversity"):
        (folder / f"{name}.txt").write_text("\n".join(plain_captions()) + "\n", encoding="utf-8")
    (folder / "modes.json").write_text(json.dumps(modes(), indent=2) + "\n", encoding="utf-8")
