"""Measure the embedded models and write their figures and their model cards.

    python scripts/tiny/measure.py [--data DIR] [--out assets] [--seed 0]

For each model it writes `metrics.json`, and `README.md`, the card, whose every figure is read from that file; the
recipe comes from the `training.json` that the training left.

The judge of the pictures is `tiny_features`, a CLIP that neither the pipeline nor the reward has seen. "Class right":
of the ten plain captions the judge finds the image's own most similar; "colour right": of the eight captions that name
its class and a colour, its own. The Vendi score (arXiv 2210.02410, order 1) is taken within a prompt, with the cosine
kernel of the judge's image features, over equally many images for samples and for photographs, then averaged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_grpo.diversity.vendi import vendi_score
from flow_grpo.errors import ConfigError

if TYPE_CHECKING:
    from typing import TypeAlias

    from torch import Tensor

    from flow_grpo.rewards.clip import ClipScorer
    from scripts.tiny.data import Photographs

    AutoencoderKL: TypeAlias = Any  # type checkers do not see the methods of diffusers' classes
    StableDiffusion3Pipeline: TypeAlias = Any

SAMPLES = 1000  # images of each kind
STEPS = 20
GUIDANCE = 3.0  # the quality is measured at this guidance, the diversity at 1
BATCH = 250
COMMAND = "python scripts/tiny/measure.py --seed {seed}"


# --- figures ------------------------------------------------------------------------------------------------


def psnr(images: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the mean squared error over all of two batches with values in [0, 1]."""
    return -10 * (images - others).square().mean().log10().item()


def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode and decode, at the mean of the posterior: (B, 3, H, W) in [0, 1], and so is the result."""
    import torch

    with torch.no_grad():
        parts = [vae.decode(vae.encode(2 * part - 1).latent_dist.mean).sample for part in images.split(BATCH)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def features(scorer: ClipScorer, images: Tensor) -> Tensor:
    """(B, d) unit features, without gradient."""
    import torch

    with torch.no_grad():
        return torch.cat([scorer.image_features(part) for part in images.split(BATCH)])


def class_right(scorer: ClipScorer, image: Tensor, labels: Tensor) -> float:
    """The fraction of image features (B, d) that lie closest to their own of the ten plain captions."""
    from scripts.tiny import data as tiny_data

    text = scorer.text_features(tiny_data.plain_captions())
    return ((image @ text.T).argmax(1) == labels).float().mean().item()


def nearest_colours(scorer: ClipScorer, image: Tensor, labels: Tensor) -> Tensor:
    """The most similar of the eight captions that name a colour and the image's class: (B,) indices into COLOURS."""
    from scripts.tiny import data as tiny_data

    text = scorer.text_features(tiny_data.coloured_captions()).view(len(tiny_data.CLASSES), -1, image.shape[1])
    return (text[labels] @ image[:, :, None])[:, :, 0].argmax(1)


def within_prompt_vendi(image: Tensor, labels: Tensor, count: int) -> float:
    """The Vendi score of `count` images of one class, averaged over the classes and over disjoint sets of images."""
    scores = []
    for label in labels.unique():
        sets = image[labels == label].split(count)
        scores += [vendi_score(part.numpy()) for part in sets if len(part) == count]
    return sum(scores) / len(scores)


def generate(
    pipeline: StableDiffusion3Pipeline, prompts: Sequence[str], guidance: float, seed: int, steps: int = STEPS
) -> Tensor:
    """One image for each prompt, (B, 3, H, W) in [0, 1]; image i has its own noise, keyed by (seed, i)."""
    import torch
    from tqdm import tqdm

    from flow_grpo.randomness import sample_generators

    pipeline.set_progress_bar_config(disable=True)
    side = pipeline.vae.config.sample_size
    parts = []
    for index in tqdm(torch.arange(len(prompts)).split(BATCH), desc=f"images at guidance {guidance:g}"):
        parts.append(
            pipeline(
                [prompts[i] for i in index],
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=side,
                width=side,
                max_sequence_length=pipeline.tokenizer.model_max_length,
                output_type="pt",
                generator=sample_generators(seed, "measure", 0, index),
            ).images
        )
    return torch.cat(parts)


# --- the three models ---------------------------------------------------------------------------------------


def measure_clip(folder: Path, photographs: Photographs, images: Tensor, colours: Tensor) -> dict[str, Any]:
    """How often a CLIP names the class and the colour of the real test images (`images`, tinted in `colours`)."""
    from flow_grpo.rewards.clip import ClipScorer

    scorer = ClipScorer(str(folder))
    image = features(scorer, images)
    return {
        "images": len(images),
        "class_accuracy": class_right(scorer, image, photographs.labels),
        "colour_accuracy": (nearest_colours(scorer, image, photographs.labels) == colours).float().mean().item(),
        "logit_scale": scorer.logit_scale.item(),
    }


def measure_vae(vae: AutoencoderKL, images: Tensor) -> dict[str, Any]:
    """Reconstruction of the real test images."""
    return {"images": len(images), "psnr_db": psnr(reconstruct(vae, images), images)}


def measure_quality(pipeline: StableDiffusion3Pipeline, judge: ClipScorer, seed: int) -> dict[str, Any]:
    """With guidance: is the class of plain prompts right, and the colour of coloured ones?"""
    import torch

    from scripts.tiny import data as tiny_data

    plain, coloured = tiny_data.plain_captions(), tiny_data.coloured_captions()
    index = torch.arange(SAMPLES)
    labels = index % len(plain)
    of_plain = features(judge, generate(pipeline, [plain[i] for i in labels], GUIDANCE, seed))
    pairs = index % len(coloured)
    labels_too, colours = pairs // len(tiny_data.COLOURS), pairs % len(tiny_data.COLOURS)
    of_coloured = features(judge, generate(pipeline, [coloured[i] for i in pairs], GUIDANCE, seed + 1))
    return {
        "images": SAMPLES,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "plain_class_accuracy": class_right(judge, of_plain, labels),
        "coloured_class_accuracy": class_right(judge, of_coloured, labels_too),
        "coloured_colour_accuracy": (nearest_colours(judge, of_coloured, labels_too) == colours).float().mean().item(),
    }


def measure_diversity(images: Tensor, judge: ClipScorer, real: Tensor, real_labels: Tensor) -> dict[str, Any]:
    """Colours of unguided pictures of the plain prompts in turn, and their Vendi score beside that of real ones."""
    import torch

    from scripts.tiny import data as tiny_data

    labels = torch.arange(len(images)) % len(tiny_data.CLASSES)
    image, count = features(judge, images), len(images) // len(tiny_data.CLASSES)
    shares = nearest_colours(judge, image, labels).bincount(minlength=len(tiny_data.COLOURS)) / len(images)
    vendi_samples = within_prompt_vendi(image, labels, count)
    vendi_real = within_prompt_vendi(features(judge, real), real_labels, count)
    return {
        "images": len(images),
        "steps": STEPS,
        "guidance": 1.0,
        "plain_class_accuracy": class_right(judge, image, labels),
        "colour_shares": dict(zip(tiny_data.COLOURS, shares.tolist(), strict=True)),
        "images_per_prompt": count,
        "vendi_samples": vendi_samples,
        "vendi_real": vendi_real,
        "vendi_ratio": vendi_samples / vendi_real,
    }


def save_grid(images: Tensor, path: Path, scale: int = 3) -> None:
    """Write (rows, columns, 3, H, W) in [0, 1] as one picture, so many times enlarged."""
    from PIL import Image

    rows, columns, _, height, width = images.shape
    pixels = images.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    picture = Image.fromarray((255 * pixels).round().byte().numpy())
    size = (scale * picture.width, scale * picture.height)
    picture.resize(size, Image.Resampling.NEAREST).save(path, optimize=True)


# --- model cards --------------------------------------------------------------------------------------------

DATA = """## Data

[Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) (Zalando SE, MIT licence): 60,000 training and 10,000
test photographs of clothing, 28 x 28, grey. Padded by us to 32 x 32, **tinted by us** in eight colours on white, and
**captioned by us** from label and tint: "a sneaker" or "a red sneaker". Nothing else was seen; no pretrained weights.
"""

SD3_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# tiny_sd3

A `StableDiffusion3Pipeline` of {parameters:,} parameters that draws 32 x 32 pictures of clothing. It is a test object
for reward fine-tuning: real diffusers classes, real photographs, trained on two CPU cores in about an hour. Its words
are ten garments and eight colours; prompts have at most eight tokens. Weights are float16: load them with a dtype.

![ten plain prompts, no guidance](samples.png)

{data}
## Recipe

`python scripts/tiny/pretrain.py --seed {training[seed]}`. First the autoencoder, {vae[steps]:,} steps of
{vae[batch]} photographs; then transformer and text encoders together, from random weights, by conditional flow matching
({sd3[steps]:,} steps of {sd3[batch]}, logit-normal times, AdamW {sd3[learning_rate]:g}, EMA {sd3[ema_decay]:g}); 10 %
of the captions empty, 40 % plain, 50 % coloured. The script's docstring lists the departures from SD3.

## Measured

By `{command}`; the judge is `tiny_features`, {quality[images]:,} pictures of each kind, {quality[steps]} Euler steps.

| what | value |
|---|---|
| guidance {quality[guidance]:g}, plain prompts: class right | {quality[plain_class_accuracy]:.3f} |
| guidance {quality[guidance]:g}, coloured prompts: colour right | {quality[coloured_colour_accuracy]:.3f} |
| guidance {quality[guidance]:g}, coloured prompts: class right | {quality[coloured_class_accuracy]:.3f} |
| guidance 1, plain prompts: class right | {diversity[plain_class_accuracy]:.3f} |
| guidance 1, plain prompts: share of the rarest and of the commonest of 8 colours | {rarest:.3f}, {commonest:.3f} |
| guidance 1, Vendi within a prompt, {diversity[images_per_prompt]} pictures (real test images: \
{diversity[vendi_real]:.2f}) | {diversity[vendi_samples]:.2f} |
| autoencoder: PSNR on {autoencoder[images]:,} test images | {autoencoder[psnr_db]:.2f} dB |

## Limits

Nothing but toy clothing can be drawn. Do not compare its numbers with those of large models.
"""

CLIP_CARD = """---
license: apache-2.0
library_name: transformers
---
# {title}

A `CLIPModel` of {parameters:,} parameters for 32 x 32 pictures of clothing. {purpose}
Weights are float16: load them with a dtype.

{data}
## Recipe

`python scripts/tiny/pretrain.py --stage {stage} --seed {training[seed]}`: {recipe[steps]:,} steps of
{recipe[batch]} augmented photographs (shift, brightness, tone, noise), 60 % of the captions with the colour, symmetric
contrastive loss in which equal captions are all positives, AdamW {recipe[learning_rate]:g}, logit scale at most exp(4).

## Measured

By `{command}`, on the {test[images]:,} held-out test photographs, each in a random colour:

| what | value |
|---|---|
| class right, of 10 plain captions | {test[class_accuracy]:.4f} |
| colour right, of the 8 captions of its class | {test[colour_accuracy]:.4f} |

## Limits

It knows ten garments and eight colours, nothing else.
"""

PURPOSES = {
    "tiny_pickscore": "It is the default reward: `exp(logit_scale) cos / 26`, as PickScore is used;\nit can be "
    "fooled by optimisation, which is what it is for.",
    "tiny_features": "It is the independent judge, and the feature space of the\ndiversity measures; it differs from "
    "the reward `tiny_pickscore` in its seed and in its shape, and is never optimised against.",
}


def write_card(folder: Path, metrics: dict[str, Any]) -> None:
    """Write metrics.json, and the README.md made from it."""
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    if folder.name == "tiny_sd3":
        shares = metrics["diversity"]["colour_shares"].values()
        recipes = {name: metrics["training"][name] for name in ("vae", "sd3")}
        card = SD3_CARD.format(data=DATA, rarest=min(shares), commonest=max(shares), **recipes, **metrics)
    else:
        stage = folder.name.removeprefix("tiny_")
        names = {"title": folder.name, "stage": stage, "purpose": PURPOSES[folder.name]}
        card = CLIP_CARD.format(data=DATA, recipe=metrics["training"][stage], **names, **metrics)
    (folder / "README.md").write_text(card, encoding="utf-8")


# --- the command --------------------------------------------------------------------------------------------


def measure(out: Path, data: Path, seed: int) -> None:
    """Measure the models under `out` with the test images of `data`; ConfigError if one is missing."""
    import torch

    from flow_grpo.randomness import keyed_generator
    from scripts.tiny import data as tiny_data

    reward, judge, sd3 = (out / name for name in ("tiny_pickscore", "tiny_features", "tiny_sd3"))
    for folder in (reward, judge, sd3):
        if not (folder / "training.json").is_file():
            raise ConfigError(f"--out: {folder} is not complete; make it with scripts/tiny/pretrain.py.")
    photographs = tiny_data.load("test", data)
    generator = keyed_generator(seed, "test colours")
    colours = torch.randint(len(tiny_data.COLOURS), (len(photographs),), generator=generator)
    images = tiny_data.tint(photographs.grey, colours)
    for folder in (reward, judge):
        finish(folder, seed, {"test": measure_clip(folder, photographs, images, colours)})
    finish(sd3, seed, measure_pipeline(sd3, judge, images, photographs.labels, seed))


def measure_pipeline(folder: Path, judge_folder: Path, real: Tensor, labels: Tensor, seed: int) -> dict[str, Any]:
    """All figures of the pipeline, and its picture samples.png: ten plain prompts, eight images each."""
    from flow_grpo.rewards.clip import ClipScorer
    from scripts.tiny import data as tiny_data

    pipeline, judge = load_pipeline(folder), ClipScorer(str(judge_folder))
    prompts = tiny_data.plain_captions() * (SAMPLES // len(tiny_data.CLASSES))
    unguided = generate(pipeline, prompts, 1.0, seed + 2)
    save_grid(unguided[:80].unflatten(0, (8, 10)).transpose(0, 1), folder / "samples.png")
    return {
        "autoencoder": measure_vae(pipeline.vae, real),
        "quality": measure_quality(pipeline, judge, seed),
        "diversity": measure_diversity(unguided, judge, real, labels),
    }


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """The pipeline in float32."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    with warnings.catch_warnings():  # diffusers 0.42 renames torch_dtype; this name works from 0.33 on
        warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
        return StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)


def finish(folder: Path, seed: int, figures: dict[str, Any]) -> None:
    """Add to the figures how they and the model came about, and write them and the card."""
    write_card(folder, with_origin(folder, COMMAND.format(seed=seed), seed, figures))


def with_origin(folder: Path, command: str, seed: int, figures: dict[str, Any]) -> dict[str, Any]:
    """Figures of a model with the command that measured them, its weights' sizes and hashes, and its recipe."""
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    logging.info("%s %s", folder, figures)
    return {"command": command, "seed": seed, **weights(folder), "training": training, **figures}


def weights(folder: Path) -> dict[str, Any]:
    """Parameters, bytes and SHA-256 (by relative path) of the safetensors files under a folder."""
    from safetensors import safe_open

    files = sorted(folder.rglob("*.safetensors"))
    parameters = 0
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            parameters += sum(tensors.get_tensor(key).numel() for key in tensors.keys())  # noqa: SIM118 - a handle, not a dict
    return {
        "parameters": parameters,
        "bytes": sum(path.stat().st_size for path in files),
        "sha256": {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 0, or 2 after one sentence about bad input."""
    from scripts.tiny import measuring  # found once the folder is on the path

    return measuring(arguments, __doc__, measure)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them
    sys.exit(main())
