"""Measure the models of the scenes and write their figures and their model cards.

    python scripts/scenes/measure.py [--data DIR] [--out assets] [--seed 0]

For each model it writes `metrics.json`, and `README.md`, the card, whose every figure is read from that file.

"Right" is what flow_grpo/scenes/captions.py says of a picture as a detector sees it. Two detectors look at every
picture: the reward's (`tiny_scenes_detector`) and the judge (`tiny_scenes_judge`), trained apart. They look at scenes
of test photographs, as drawn and as the autoencoder decodes them, and at what the model draws.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_grpo.errors import ConfigError
from flow_grpo.scenes.captions import KINDS

if TYPE_CHECKING:
    from typing import TypeAlias

    from torch import Tensor

    from flow_grpo.rewards.clip import ClipScorer
    from flow_grpo.scenes.captions import Caption
    from flow_grpo.scenes.detector import CellDetector
    from scripts.tiny.data import Photographs

    AutoencoderKL: TypeAlias = Any  # type checkers do not see the methods of diffusers' classes
    StableDiffusion3Pipeline: TypeAlias = Any

IMAGES = 200  # of each kind
STEPS = 10
GUIDANCES = (1.0, 3.0)
BATCH = 250
CHOICES = 10  # captions among which the CLIP has to find an image's own
COMMAND = "python scripts/scenes/measure.py --seed {seed}"


# --- what is looked at ----------------------------------------------------------------------------------------


def captions_in_turn(held_out: bool, count: int, seed: int) -> list[Caption]:
    """`count` captions of each kind, of those that are held out or of the others: all of them before one again."""
    from flow_grpo.randomness import keyed_stream
    from scripts.scenes import data as scene_data

    chosen = []
    for kind in KINDS:
        captions = scene_data.test_captions(kind) if held_out else scene_data.training_captions(kind)
        rows = keyed_stream(len(captions), seed, f"measured {kind} {held_out}", 0, count)
        chosen += [captions[row] for row in rows]
    return chosen


def verdicts(detector: CellDetector, images: Tensor, captions: Sequence[Caption]) -> Tensor:
    """Whether each picture, (B, 3, 64, 64) in [0, 1], is right: (B,) bool."""
    import torch

    from flow_grpo.scenes.detector import readings

    with torch.no_grad():
        seen = [reading for part in images.split(BATCH) for reading in readings(detector(part))]
    return torch.tensor([caption.is_satisfied(reading) for caption, reading in zip(captions, seen, strict=True)])


def compare(
    detectors: Mapping[str, CellDetector], images: Tensor, captions: Sequence[Caption]
) -> dict[str, dict[str, float]]:
    """By kind of caption, and over all: the share that is right by each detector, and on which they agree."""
    right = {name: verdicts(detector, images, captions) for name, detector in detectors.items()}
    rows = {kind: [i for i, caption in enumerate(captions) if caption.kind == kind] for kind in KINDS}
    rows["all"] = [*range(len(captions))]
    return {
        kind: {
            **{name: of[chosen].float().mean().item() for name, of in right.items()},
            "agree": (right["detector"] == right["judge"])[chosen].float().mean().item(),
        }
        for kind, chosen in rows.items()
    }


def measure_cells(detector: CellDetector, photographs: Photographs, vae: AutoencoderKL, seed: int) -> dict[str, Any]:
    """How often a detector knows a cell: every test photograph in a random colour, and empty cells, 1 in 8."""
    import torch

    from flow_grpo.randomness import keyed_generator
    from flow_grpo.scenes.detector import EMPTY, join_cells, split_cells
    from scripts.scenes import training
    from scripts.tiny import measure as tiny_measure

    cells, labels, colours = training.draw_cells(photographs, 10_000, keyed_generator(seed, "test cells"))
    full = labels != EMPTY
    figures: dict[str, Any] = {"cells": len(labels)}
    for name, images in (
        ("drawn", cells),
        ("decoded", split_cells(tiny_measure.reconstruct(vae, join_cells(cells)))),
    ):
        with torch.no_grad():
            logits = [detector.logits(part) for part in images.split(4 * BATCH)]
        found, found_colours = (torch.cat(parts).argmax(1) for parts in zip(*logits, strict=True))
        figures[name] = {
            "class": (found == labels)[full].float().mean().item(),
            "empty": (found == labels)[~full].float().mean().item(),
            "colour": (found_colours == colours)[full].float().mean().item(),
        }
    return figures


def measure_clip(scorer: ClipScorer, images: Tensor, captions: Sequence[Caption], seed: int) -> dict[str, float]:
    """By kind: how often an image's own caption is the most similar of CHOICES of its kind."""
    import torch

    from flow_grpo.randomness import keyed_generator
    from scripts.scenes import data as scene_data
    from scripts.tiny import measure as tiny_measure

    features = tiny_measure.features(scorer, images)
    generator = keyed_generator(seed, "other captions")
    right: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for feature, caption in zip(features, captions, strict=True):
        others = [other for other in scene_data.test_captions(caption.kind) if other != caption]
        order = torch.randperm(len(others), generator=generator)[: CHOICES - 1].tolist()
        text = scorer.text_features([caption.text, *(others[i].text for i in order)])
        right[caption.kind].append(float((text @ feature).argmax() == 0))
    return {kind: sum(values) / len(values) for kind, values in right.items()}


def save_samples(images: Tensor, path: Path) -> None:
    """Write a row of ten framed pictures of each kind, of IMAGES each."""
    import torch.nn.functional as F

    from scripts.tiny import measure as tiny_measure

    framed = F.pad(images, (1,) * 4, value=0.6)
    tiny_measure.save_grid(framed.unflatten(0, (len(KINDS), IMAGES))[:, :10], path, scale=2)


def typical_garments(photographs: Photographs, detectors: Mapping[str, CellDetector]) -> Tensor:
    """A photograph of each class that both detectors know in every colour, most surely: (10, 32, 32) uint8.

    The surest is the one whose own class has the largest least probability, over colours and detectors.
    """
    import torch

    from flow_grpo.scenes.captions import CLASSES, COLOURS
    from scripts.tiny import data as tiny_data

    chosen = []
    for label in range(len(CLASSES)):
        grey = photographs.grey[photographs.labels == label][:100]
        least = torch.ones(len(grey))
        for colour in range(len(COLOURS)):
            cells = tiny_data.tint(grey, torch.full((len(grey),), colour))
            with torch.no_grad():
                for detector in detectors.values():
                    labels, colours = detector.logits(cells)
                    sure = labels.softmax(1)[:, label].minimum(colours.softmax(1)[:, colour])
                    least = least.minimum(sure)
        chosen.append(grey[least.argmax()])
    return torch.stack(chosen)


def save_garments(grey: Tensor, path: Path) -> None:
    """Write photographs (N, 32, 32) uint8 side by side."""
    from PIL import Image

    Image.fromarray(grey.permute(1, 0, 2).flatten(1).numpy()).save(path, optimize=True)


# --- the command ----------------------------------------------------------------------------------------------


def measure(out: Path, data: Path, seed: int) -> None:
    """Measure the models under `out` with the test photographs of `data`; ConfigError if one is missing."""
    from flow_grpo.randomness import keyed_generator
    from flow_grpo.rewards.clip import ClipScorer
    from flow_grpo.scenes.detector import CellDetector
    from scripts.scenes import cards
    from scripts.scenes import data as scene_data
    from scripts.scenes.pretrain import FOLDERS
    from scripts.tiny import data as tiny_data
    from scripts.tiny import measure as tiny_measure

    folders = {stage: out / name for stage, name in FOLDERS.items()}
    for folder in folders.values():
        if not (folder / "training.json").is_file():
            raise ConfigError(f"--out: {folder} is not complete; make it with scripts/scenes/pretrain.py.")
    photographs = tiny_data.load("test", data)
    pipeline = tiny_measure.load_pipeline(folders["sd3"])
    detectors = {name: CellDetector.load(str(folders[name])) for name in ("detector", "judge")}
    captions = captions_in_turn(True, IMAGES, seed)
    drawn = scene_data.render(scene_data.draw(captions, photographs, keyed_generator(seed, "test scenes")), photographs)
    figures: dict[str, dict[str, Any]] = {
        name: {"cells": measure_cells(detector, photographs, pipeline.vae, seed)}
        for name, detector in detectors.items()
    }
    scorer = ClipScorer(str(folders["clip"]))
    figures["clip"] = {"choices": CHOICES, "own_caption": measure_clip(scorer, drawn, captions, seed)}
    figures["sd3"] = measure_pipeline(pipeline, detectors, drawn, captions, seed, folders["sd3"])
    save_garments(typical_garments(photographs, detectors), folders["detector"] / "garments.png")
    for stage, folder in folders.items():
        metrics = tiny_measure.with_origin(folder, COMMAND.format(seed=seed), seed, figures[stage])
        cards.write_card(folder, stage, metrics)


def measure_pipeline(
    pipeline: StableDiffusion3Pipeline,
    detectors: Mapping[str, CellDetector],
    drawn: Tensor,
    captions: Sequence[Caption],
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """All figures of the pipeline, and its picture samples.png: a row of unguided pictures of each kind."""
    from scripts.scenes import training
    from scripts.tiny import measure as tiny_measure

    decoded = tiny_measure.reconstruct(pipeline.vae, drawn)
    samples: dict[str, dict[str, Any]] = {}
    for name, asked in (("held_out", captions), ("seen", captions_in_turn(False, IMAGES, seed))):
        samples[name] = {}
        for guidance in GUIDANCES:
            texts = [caption.text for caption in asked]
            images = tiny_measure.generate(pipeline, texts, guidance, seed, STEPS)
            samples[name][f"{guidance:g}"] = compare(detectors, images, asked)
            if name == "held_out" and guidance == 1:
                save_samples(images, folder / "samples.png")
    return {
        "images": IMAGES,
        "steps": STEPS,
        "shares": training.SHARES,
        "samples": samples,
        "real": {"as drawn": compare(detectors, drawn, captions), "decoded": compare(detectors, decoded, captions)},
        "psnr_images": len(drawn),
        "psnr_db": tiny_measure.psnr(decoded, drawn),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 0, or 2 after one sentence about bad input."""
    from scripts.tiny import measuring  # found once the folder is on the path

    return measuring(arguments, __doc__, measure)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them
    sys.exit(main())
