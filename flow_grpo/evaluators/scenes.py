"""What a detector sees of scenes: whether they are right, and how much of what their captions leave open still varies.

A caption leaves open where its objects are and, unless it says them, their colours (flow_grpo/scenes/captions.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from scipy.stats import entropy

from flow_grpo.evaluators.base import Measured, SampleRequest
from flow_grpo.rewards.scenes import SceneScorer, best_log_probability
from flow_grpo.runs.record import NONE_OF_THEM, Judged
from flow_grpo.scenes.captions import COLOURS, KINDS, OPEN_COLOURS, Caption, Reading, parse
from flow_grpo.scenes.detector import Cells, readings

if TYPE_CHECKING:
    from flow_grpo.types import Samples

BATCH = 256
T = TypeVar("T")


class SceneJudge:
    """How often a detector that is not the reward's finds a scene right.

    `judge/accuracy`: share of the images that show what their caption says and nothing else; `judge/accuracy_<kind>`:
    of the captions of one kind. nan if an image is not finite.
    """

    name, collective, request = "judge", False, None

    def __init__(self, scorer: SceneScorer, freq: int = 1, model: str = "", independent: bool = True) -> None:
        """`model`: its name; `independent`: no reward that is trained on is of the same weights."""
        self.scorer, self.freq, self.model, self.independent = scorer, freq, model, independent

    @torch.no_grad()
    def evaluate(self, samples: Samples) -> Measured:
        """Over all samples; of each, whether it is right, and how probable its most probable right reading is."""
        captions, cells = [parse(prompt) for prompt in samples.prompts], look(self.scorer, samples)
        right = [caption.is_satisfied(seen) for caption, seen in zip(captions, readings(cells), strict=True)]
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(samples.prompts))}
        finite = cells.labels.isfinite().flatten(1).all(1).tolist()
        guess = [
            None if not fine else numbers[prompt] if fits else NONE_OF_THEM
            for prompt, fits, fine in zip(samples.prompts, right, finite, strict=True)
        ]
        probability = best_log_probability(cells, [caption.readings() for caption in captions]).double().exp().tolist()
        found = {
            f"judge/{name}": float(np.mean([float(fits) if fine else math.nan for fits, fine in rows]))
            for name, rows in by_kind("accuracy", captions, list(zip(right, finite, strict=True))).items()
        }
        return Measured(found, judge=Judged(self.model, self.independent, guess, probability))


class SceneModes:
    """Entropies, in nats, of what captions leave open, over the images of one prompt; means over prompts.

    - `modes/colour_entropy`: of the colours of the objects seen (log 8 at most), of captions that say none;
    - `modes/cell_entropy`: of the cells that they are in (log 4 at most);
    - `modes/layout_entropy`: of the sets of cells that are filled (log 16 at most);
    - `modes/entropy`: the colours', where they are open, plus the cells'; `modes/entropy_<kind>`: of one kind;
    - `modes/<colour>`: share of the objects, over the captions that say no colour.

    Objects count whether or not the scene is right. The entropies are those of the shares seen in n images of a
    prompt, which are below those of its law: compare them at equal n. nan if an image is not finite.
    """

    name, collective = "modes", False

    def __init__(self, scorer: SceneScorer, request: SampleRequest | None, freq: int = 1) -> None:
        """`request`: images that are looked at; None: those of the test prompts."""
        self.scorer, self.request, self.freq = scorer, request, freq

    @torch.no_grad()
    def evaluate(self, samples: Samples) -> Measured:
        """Over all samples."""
        seen = seen_by_prompt(self.scorer, samples)
        captions = [parse(prompt) for prompt in seen]
        found = {f"modes/{name}": value for name, value in of_modes(captions, list(seen.values())).items()}
        return Measured(found if samples.images.isfinite().all() else dict.fromkeys(found, math.nan))


def of_modes(captions: Sequence[Caption], scenes: Sequence[Sequence[Reading]]) -> dict[str, float]:
    """The figures of `SceneModes` of what is seen in the images of each caption."""
    modes = [scene_modes(caption.kind, seen) for caption, seen in zip(captions, scenes, strict=True)]
    found: dict[str, float] = {}
    for name in ("colour_entropy", "cell_entropy", "layout_entropy"):
        values = [figures[name] for figures in modes if name in figures]
        found |= {name: float(np.mean(values))} if values else {}
    totals = [figures["entropy"] for figures in modes]
    found |= {name: float(np.mean(values)) for name, values in by_kind("entropy", captions, totals).items()}
    open_ones = [seen for caption, seen in zip(captions, scenes, strict=True) if caption.kind in OPEN_COLOURS]
    counts = Counter(garment.colour for seen in open_ones for scene in seen for garment in scene if garment is not None)
    total = sum(counts.values())
    return found | ({name: counts[i] / total for i, name in enumerate(COLOURS)} if total else {})


def scene_modes(kind: str, scenes: Sequence[Reading]) -> dict[str, float]:
    """The entropies of the images of one caption; no `colour_entropy` of kinds that say a colour."""
    objects = [(cell, garment) for scene in scenes for cell, garment in enumerate(scene) if garment is not None]
    cell = entropy_of(cell for cell, _ in objects)
    layout = entropy_of(tuple(garment is not None for garment in scene) for scene in scenes)
    found = {"cell_entropy": cell, "layout_entropy": layout, "entropy": cell}
    if kind in OPEN_COLOURS:
        colour = entropy_of(garment.colour for _, garment in objects)
        found |= {"colour_entropy": colour, "entropy": cell + colour}
    return found


def entropy_of(things: Iterable[object]) -> float:
    """Of the shares of things, in nats; 0 of nothing."""
    counts = list(Counter(things).values())
    return float(entropy(counts)) if counts else 0.0


def by_kind(name: str, captions: Sequence[Caption], values: Sequence[T]) -> dict[str, list[T]]:
    """All values under `name`, and those of each kind of caption that is there under `name_<kind>`."""
    found = {name: list(values)}
    for kind in KINDS:
        chosen = [value for caption, value in zip(captions, values, strict=True) if caption.kind == kind]
        found |= {f"{name}_{kind}": chosen} if chosen else {}
    return found


def seen_by_prompt(scorer: SceneScorer, samples: Samples) -> dict[str, list[Reading]]:
    """prompt -> what a detector sees in each of its images."""
    rows: dict[str, list[Reading]] = {}
    for prompt, reading in zip(samples.prompts, readings(look(scorer, samples)), strict=True):
        rows.setdefault(prompt, []).append(reading)
    return rows


def look(scorer: SceneScorer, samples: Samples) -> Cells:
    """What a detector sees of all images, on the CPU."""
    parts = [scorer.cells(part) for part in samples.images.split(BATCH)]
    return Cells(*(torch.cat(values).cpu() for values in zip(*parts, strict=True)))
