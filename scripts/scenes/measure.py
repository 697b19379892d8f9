"""Measure the models of the scenes and write their figures and their model cards.

    python scripts/scenes/measure.py [--data DIR] [--out assets] [--seed 0]

For each model it writes `metrics.json`, and `README.md`, the card, whose every figure is read from that file.

"Right" is what flow_grpo/scenes/captions.py says of a picture as a detector sees it. Two detectors look at every
picture: the reward's (`tiny_scenes_detector`) and the judge (`tiny_scenes_judge`), trained apart. They look at scenes
of test photographs, as drawn and as the autoencoder decodes them, and at what the model draws.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_grpo.errors import ConfigError
from flow_grpo.scenes.captions import KINDS
from scripts.scenes.pretrain import FOLDERS

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


# --- model cards ----------------------------------------------------------------------------------------------

DATA = """## Data

Photographs, tint and words are those of [tiny_sd3](../tiny_sd3/README.md): Fashion-MNIST (Zalando SE, MIT licence),
tinted **by us**. Arranged **by us** on a white grid of 2 x 2 cells, 64 x 64 pixels, and captioned **by us** in the six
kinds of GenEval (arXiv 2310.11513). What a caption leaves open, cells, colours, photographs, is drawn at random.
"""

SCENES_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# tiny_scenes

A `StableDiffusion3Pipeline` of {parameters:,} parameters that draws 64 x 64 pictures of up to four garments. It is a
test object for reward fine-tuning with headroom: GenEval in small, judged by rule. Prompts have at most twelve tokens.
Weights are float16: load them with a dtype.

![a caption of each kind, no guidance](samples.png)

{data}
| kind | an example |
|---|---|
| single | a dress |
| two | a dress and a boot |
| count | three dresses |
| colour | a red dress |
| position | a dress left of a boot; a dress above a boot |
| binding | a red dress and a blue boot |

Held out of all training: 10 of the 45 pairs of garments, one number and two colours of each garment alone.
`assets/prompts/scenes/test.jsonl` has captions of these (and the ten single objects), `train.jsonl` of the others.

## Recipe

`python scripts/scenes/pretrain.py --seed {training[seed]}`. The decoder of tiny_sd3's autoencoder was trained on
scenes ({vae[steps]:,} steps of {vae[batch]}), its encoder kept. Transformer and text encoders were trained together, from random
weights, by conditional flow matching in two passes: {sd3[steps]:,} steps of {sd3[batch]} (AdamW
{sd3[learning_rate]:g}, EMA {sd3[ema_decay]:g}, logit-normal times), then {sd3_second[steps]:,} steps
({sd3_second[learning_rate]:g}) whose times are shifted towards noise, where the layout is decided.
{shares}
One caption in ten is empty. It was stopped where a third to a half of its pictures are right: the rest is for reward
fine-tuning.

## Measured

By `{command}`: {images} pictures of each kind, {steps} Euler steps, at
guidance (g) 1 and 3: the share that is right by the reward's detector, by the judge, and on which both agree.

Held-out captions:

{held_out}

Captions that it was trained on:

{seen}

Scenes of test photographs, held-out captions, as drawn and as the autoencoder decodes them:

{real}

Autoencoder: {psnr_db:.2f} dB on {psnr_images:,} scenes of test photographs.

## Limits

Nothing but toy clothing can be drawn. Do not compare its numbers with those of large models.
"""

DETECTOR_CARD = """---
license: apache-2.0
---
# {title}

A convolutional network of {parameters:,} parameters that says of each cell of a scene which garment it shows, or none,
and in which colour. {purpose} Weights are float16, of
`flow_grpo.scenes.detector.CellDetector`.

{data}
## Recipe

`python scripts/scenes/pretrain.py --stage {stage} --seed {training[seed]}`: {recipe[steps]:,} steps of {recipe[batch]}
augmented cells, half as drawn, half as the autoencoder decodes them; AdamW {recipe[learning_rate]:g}.

## Measured

By `{command}`, on {cells[cells]:,} cells of test photographs:

| cells | class | empty | colour |
|---|---|---|---|
| as drawn | {cells[drawn][class]:.4f} | {cells[drawn][empty]:.4f} | {cells[drawn][colour]:.4f} |
| decoded | {cells[decoded][class]:.4f} | {cells[decoded][empty]:.4f} | {cells[decoded][colour]:.4f} |

`garments.png` has a photograph of each class that both detectors know surely, for drawings made by rule.
A scene is right only if every cell is; [tiny_scenes](../tiny_scenes/README.md) has the shares of whole scenes.
"""

CLIP_CARD = """---
license: apache-2.0
library_name: transformers
---
# tiny_scenes_clip

A `CLIPModel` of {parameters:,} parameters for scenes: the proxy, a reward that can be fooled by optimisation.
Weights are float16: load them with a dtype.

{data}
## Recipe

`python scripts/scenes/pretrain.py --stage clip --seed {training[seed]}`: {recipe[steps]:,} steps of {recipe[batch]}
augmented scenes, half as drawn, half as the autoencoder decodes them, AdamW {recipe[learning_rate]:g}, symmetric
contrastive loss in which equal captions are all positives.

## Measured

By `{command}`: how often the own caption of a scene of test photographs
is the most similar of {choices} of its kind.

{table}
"""

PURPOSES = {
    "detector": "It is the reward's: `scenes` and `scenes_soft`.",
    "judge": "It is the judge, never optimised against: other seed, shape and augmentation\nthan the reward's.",
}


def table(columns: Sequence[str], rows: Mapping[str, Sequence[float]]) -> str:
    """Shares as a Markdown table, a row for each kind."""
    lines = [["kind", *columns], ["---"] * (1 + len(columns))]
    lines += [[kind, *(f"{value:.3f}" for value in values)] for kind, values in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def side_by_side(parts: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Several comparisons as one table."""
    names = ("detector", "judge", "agree")
    columns = [f"{title}: {name}" for title in parts for name in names]
    first = next(iter(parts.values()))
    return table(columns, {kind: [part[kind][name] for part in parts.values() for name in names] for kind in first})


def card(stage: str, metrics: dict[str, Any]) -> str:
    """The model card, from its figures."""
    training = metrics["training"]
    if stage == "sd3":
        recipes = {name: training[name] for name in ("vae", "sd3", "sd3_second")}
        samples = {
            which: side_by_side({f"g {guidance}": part for guidance, part in metrics["samples"][which].items()})
            for which in ("held_out", "seen")
        }
        figures = {**metrics, "real": side_by_side(metrics["real"]), "shares": shares_in_words(metrics["shares"])}
        return SCENES_CARD.format(data=DATA, **recipes, **figures, **samples)
    if stage == "clip":
        rows = {kind: [value] for kind, value in metrics["own_caption"].items()}
        return CLIP_CARD.format(data=DATA, recipe=training[stage], table=table(["found"], rows), **metrics)
    names = {"title": FOLDERS[stage], "stage": stage, "purpose": PURPOSES[stage]}
    return DETECTOR_CARD.format(data=DATA, recipe=training[stage], **names, **metrics)


def shares_in_words(shares: Mapping[str, float]) -> str:
    """How often each kind of caption was drawn in training."""
    total = sum(shares.values())
    parts = [f"{kind} {100 * share / total:.0f} %" for kind, share in shares.items()]
    return f"Kinds of captions: {', '.join(parts)}."


def write_card(folder: Path, stage: str, metrics: dict[str, Any]) -> None:
    """Write metrics.json, and the README.md made from it."""
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(stage, metrics), encoding="utf-8")


# --- the command ----------------------------------------------------------------------------------------------


def measure(out: Path, data: Path, seed: int) -> None:
    """Measure the models under `out` with the test photographs of `data`; ConfigError if one is missing."""
    from flow_grpo.randomness import keyed_generator
    from flow_grpo.rewards.clip import ClipScorer
    from flow_grpo.scenes.detector import CellDetector
    from scripts.scenes import data as scene_data
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
        write_card(folder, stage, metrics)


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
