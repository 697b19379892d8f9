"""Scenes of up to four of Fashion-MNIST's garments on a grid of 2 x 2 cells, 64 x 64 pixels, and their captions.

The photographs, their tint and the words are those of scripts/tiny/data.py; the grid and the captions of
flow_grpo/scenes/captions.py are ours too. A scene is drawn from its caption: one of the readings that satisfy it, each
as likely as the others; the colours that it leaves open, each as likely; a photograph of the class.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from flow_grpo.randomness import keyed_generator
from flow_grpo.scenes.captions import CELLS, COLOURS, KINDS, Caption, captions_of, is_held_out
from flow_grpo.scenes.detector import EMPTY, join_cells
from flow_grpo.scenes.files import RESOLUTION
from scripts.tiny import data as tiny_data
from scripts.tiny.data import Photographs


@dataclass(frozen=True)
class Scenes:
    """What is to be seen in N scenes, cell by cell."""

    labels: Tensor  # (N, 4), EMPTY where nothing is
    colours: Tensor  # (N, 4)
    photographs: Tensor  # (N, 4) indices

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, count: int) -> Iterator[Scenes]:
        """Parts of so many."""
        parts = (field.split(count) for field in (self.labels, self.colours, self.photographs))
        return (Scenes(*part) for part in zip(*parts, strict=True))


def draw(captions: Sequence[Caption], photographs: Photographs, generator: torch.Generator) -> Scenes:
    """A scene for each caption."""
    of_label = [(photographs.labels == label).nonzero().flatten() for label in range(EMPTY)]
    count = len(captions)
    labels = torch.full((count, CELLS), EMPTY)
    colours = torch.randint(len(COLOURS), (count, CELLS), generator=generator)
    chances = torch.rand(count, 1 + CELLS, generator=generator)  # which reading; which photographs
    index = torch.zeros(count, CELLS, dtype=torch.long)
    for row, caption in enumerate(captions):
        possible = caption.readings()
        for cell, garment in enumerate(possible[int(chances[row, 0] * len(possible))]):
            if garment is not None:
                same = of_label[garment.label]
                labels[row, cell] = garment.label
                index[row, cell] = same[int(chances[row, 1 + cell] * len(same))]
                if garment.colour is not None:
                    colours[row, cell] = garment.colour
    return Scenes(labels, colours, index)


def render(scenes: Scenes, photographs: Photographs) -> Tensor:
    """(N, 3, 64, 64) in [0, 1]; empty cells are white."""
    cells = tiny_data.tint(photographs.grey[scenes.photographs.flatten()], scenes.colours.flatten())
    cells[scenes.labels.flatten() == EMPTY] = 1
    images = join_cells(cells)
    assert images.shape[-2:] == (RESOLUTION, RESOLUTION)
    return images


@lru_cache
def training_captions(kind: str) -> tuple[Caption, ...]:
    """Those of a kind that are not held out."""
    return tuple(caption for caption in captions_of(kind) if not is_held_out(caption))


@lru_cache
def test_captions(kind: str) -> tuple[Caption, ...]:
    """Those that are held out; of single objects, of which none is, all."""
    return tuple(caption for caption in captions_of(kind) if is_held_out(caption) or kind == "single")


def all_texts() -> list[str]:
    """Every caption, held-out ones too; the tokenizers are made from them."""
    return [caption.text for kind in KINDS for caption in captions_of(kind)]


def choose(captions: Sequence[Caption], count: int, *key: str) -> list[Caption]:
    """At most `count` of them, the same for the same key, in their order."""
    order = torch.randperm(len(captions), generator=keyed_generator(0, "scene prompts " + " ".join(key)))
    return [captions[i] for i in sorted(order[:count].tolist())]


def write_prompts(folder: Path) -> None:
    """Write train.jsonl, and of held-out captions test.jsonl and eval_diversity.jsonl; of the first two the hard kinds.

    Each line has its kind.
    Kinds are what `sample.prompt_sampling=balanced` balances by `sample.prompt_category=kind`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, (source, count) in PROMPTS.items():
        chosen = [caption for kind in KINDS for caption in choose(source(kind), count, name, kind)]
        _write(folder / f"{name}.jsonl", chosen)
        if name != "eval_diversity":
            _write(folder / f"{name}_hard.jsonl", [caption for caption in chosen if caption.kind in HARD])


def _write(path: Path, captions: Sequence[Caption]) -> None:
    lines = [json.dumps({"prompt": caption.text, "kind": caption.kind}) for caption in captions]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


HARD = ("two", "count", "position")  # of which the base model gets one in five right: groups hold both
PROMPTS = {  # file -> whose captions, and how many of a kind, where there are so many
    "train": (training_captions, 100),
    "test": (test_captions, 20),
    "eval_diversity": (test_captions, 2),
}
