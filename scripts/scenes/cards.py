"""The model cards of scenes: every figure is read from a model's metrics.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.scenes.pretrain import FOLDERS

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
scenes ({vae[steps]:,} steps of {vae[batch]}), its encoder kept. Transformer and text encoders were trained together,
from random weights, by conditional flow matching in two passes: {sd3[steps]:,} steps of {sd3[batch]} (AdamW
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

[garments.png](../tiny_scenes_detector/garments.png) has a photograph of each class that both detectors know surely, for
drawings made by rule.
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
is the most similar of {choices} of its kind ("a dress and a boot" and "a boot and a dress" count as two).

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
