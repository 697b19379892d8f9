"""A detector of what is in each cell of a scene: a class or nothing, and a colour."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flow_grpo.errors import ConfigError
from flow_grpo.paths import find
from flow_grpo.scenes.captions import CELLS, CLASSES, COLOURS, Garment, Reading
from flow_grpo.scenes.files import MODEL_TYPE, check_detector

EMPTY = len(CLASSES)  # the label of a cell without an object
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}
POOLINGS = {"average": nn.AvgPool2d, "maximum": nn.MaxPool2d}


class Cells(NamedTuple):
    """What a detector says of the four cells of B scenes."""

    labels: Tensor  # (B, 4, 11) log-probabilities of the classes, and last of an empty cell
    colours: Tensor  # (B, 4, 8) log-probabilities of the colours, of no meaning where a cell is empty


class CellDetector(nn.Module):
    """Stages of convolution, normalisation, activation and pooling, then a linear layer each for class and colour."""

    def __init__(
        self, widths: Sequence[int], kernels: Sequence[int], activation: str = "silu", pooling: str = "average"
    ) -> None:
        """`widths`: the channels of each stage, which halves the picture; `kernels`: the side of its filters."""
        super().__init__()
        self.shape = {"widths": [*widths], "kernels": [*kernels], "activation": activation, "pooling": pooling}
        stages: list[nn.Module] = []
        for before, width, kernel in zip((3, *widths), widths, kernels, strict=False):
            convolution = nn.Conv2d(before, width, kernel, padding=kernel // 2, bias=False)
            stages += [convolution, nn.BatchNorm2d(width), ACTIVATIONS[activation](), POOLINGS[pooling](2)]
        self.features = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.label = nn.Linear(4 * widths[-1], EMPTY + 1)
        self.colour = nn.Linear(4 * widths[-1], len(COLOURS))

    def forward(self, images: Tensor) -> Cells:
        """Scenes (B, 3, 64, 64) in [0, 1] -> what is in their cells."""
        labels, colours = (
            logits.unflatten(0, (-1, CELLS)).log_softmax(-1) for logits in self.logits(split_cells(images))
        )
        return Cells(labels, colours)

    def logits(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Cells (N, 3, 32, 32) in [0, 1] -> logits of class or empty (N, 11), and of colour (N, 8)."""
        features = self.features(2 * cells - 1)  # (N, 4 widths[-1])
        return self.label(features), self.colour(features)

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors (float16)."""
        folder.mkdir(parents=True, exist_ok=True)
        shape = {"model_type": MODEL_TYPE, **self.shape}
        (folder / "config.json").write_text(json.dumps(shape, indent=2) + "\n", encoding="utf-8")
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        halves = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
        save_file(halves, folder / "model.safetensors")

    @staticmethod
    def load(path: str) -> CellDetector:
        """Read a folder in float32, in eval mode and without gradients of its weights; ConfigError if it has none."""
        folder = Path(find(path))
        try:
            shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            check_detector(repr(path), shape)
            detector = CellDetector(**{name: value for name, value in shape.items() if name != "model_type"})
            detector.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{path!r} cannot be loaded as a detector of scenes: {reason}") from error
        return detector.eval().requires_grad_(False)


def split_cells(images: Tensor) -> Tensor:
    """(B, 3, 2 h, 2 w) -> (B * 4, 3, h, w), the cells of each scene in the order of the grid."""
    height, width = images.shape[-2] // 2, images.shape[-1] // 2
    return images.unfold(2, height, height).unfold(3, width, width).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def join_cells(cells: Tensor) -> Tensor:
    """The inverse of `split_cells`."""
    grid = cells.unflatten(0, (-1, 2, 2))  # (B, 2, 2, 3, h, w)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def readings(cells: Cells) -> list[Reading]:
    """The most probable class and colour of every cell."""
    labels, colours = (values.argmax(-1).tolist() for values in cells)
    return [
        tuple(None if label == EMPTY else Garment(label, colour) for label, colour in zip(*scene, strict=True))
        for scene in zip(labels, colours, strict=True)
    ]
