"""How each model of the scenes is trained: the autoencoder, the pipeline, the two detectors, the CLIP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPModel

from flow_grpo.randomness import keyed_generator
from flow_grpo.scenes.captions import COLOURS, KINDS, Caption
from flow_grpo.scenes.detector import EMPTY, CellDetector, join_cells, split_cells
from flow_grpo.scenes.files import RESOLUTION
from scripts.scenes import data as scene_data
from scripts.tiny import data as tiny_data
from scripts.tiny import models as tiny_models
from scripts.tiny import training as tiny_training
from scripts.tiny.data import Photographs
from scripts.tiny.fit import Fit, Recipe, digest

AutoencoderKL: TypeAlias = Any  # type checkers do not see the methods of diffusers' classes
StableDiffusion3Pipeline: TypeAlias = Any

PROMPT_LENGTH = 12  # tokens, all encoders
STATISTICS = 1000  # scenes whose latents are standardised
POOL = 12_000  # scenes whose latents are computed once
SHARES = {"single": 1, "two": 2, "count": 2, "colour": 1.5, "position": 3.5, "binding": 4}  # of each kind in training
EMPTY_CAPTIONS = 0.1  # for guidance
DECODED_POOL = 6_000  # scenes that a detector or the CLIP sees as the autoencoder decodes them
SD3_PASSES = ("sd3", "sd3_second")
TIME_SHIFTS = (1.0, 2.0)  # of the training times of each pass: the second looks more at what decides the layout
SAMPLING_SHIFT = 3.0  # of the pipeline's scheduler, as SD3's
DETECTORS: dict[str, dict[str, Any]] = {  # the judge differs in seed, shape, activation, pooling and augmentation
    "detector": {"widths": [32, 64, 128], "kernels": [3, 3, 3], "activation": "silu", "pooling": "average"},
    "judge": {"widths": [24, 48, 96, 96], "kernels": [5, 3, 3, 3], "activation": "relu", "pooling": "maximum"},
}
LABEL_SMOOTHING = 0.02  # of the detectors
CLIP_SIZES = {"patch": 8}
RECIPES = {
    "vae": Recipe(steps=600, batch=16, learning_rate=1e-3, weight_decay=1e-4),
    "sd3": Recipe(steps=4000, batch=48, learning_rate=1.5e-3, flat=0.5, ema_decay=0.998),
    "sd3_second": Recipe(steps=2500, batch=48, learning_rate=1e-3, flat=0.4, ema_decay=0.998),
    "detector": Recipe(steps=3000, batch=128, learning_rate=4e-3, weight_decay=0.02),
    "judge": Recipe(steps=3000, batch=128, learning_rate=4e-3, weight_decay=0.02),
    "clip": Recipe(steps=2000, batch=64, learning_rate=1.5e-3, weight_decay=0.05, beta2=0.98, warmup=200),
}


def draw_captions(count: int, generator: torch.Generator) -> list[Caption]:
    """Captions that are not held out: kinds in the proportions of SHARES, those of a kind equally often."""
    kinds = torch.multinomial(torch.tensor([float(SHARES[kind]) for kind in KINDS]), count, True, generator=generator)
    lists = [scene_data.training_captions(kind) for kind in KINDS]
    chances = torch.rand(count, generator=generator).tolist()
    return [lists[kind][int(u * len(lists[kind]))] for kind, u in zip(kinds.tolist(), chances, strict=True)]


def draw_images(photographs: Photographs, count: int, generator: torch.Generator) -> Tensor:
    """Scenes of training captions, (B, 3, 64, 64) in [0, 1]."""
    scenes = scene_data.draw(draw_captions(count, generator), photographs, generator)
    return scene_data.render(scenes, photographs)


# --- VAE ----------------------------------------------------------------------------------------------------


def train_vae(
    photographs: Photographs, vae: AutoencoderKL, recipe: Recipe, seed: int, work: Path, save_every: int
) -> None:
    """Train the decoder of tiny_sd3's autoencoder on scenes, whose latents get mean 0 and standard deviation 1."""
    vae.encoder.requires_grad_(False)
    start = digest(vae)

    def loss(generator: torch.Generator) -> Tensor:
        return tiny_training.vae_loss(vae, 2 * draw_images(photographs, recipe.batch, generator) - 1, generator)

    fit = Fit("scenes_vae", [vae.decoder], recipe, seed, work, start=start, shares=SHARES)
    fit.run(loss, save_every)
    vae.register_to_config(sample_size=RESOLUTION)
    tiny_training.standardise(
        vae, 2 * draw_images(photographs, STATISTICS, keyed_generator(seed, "latent statistics")) - 1
    )


# --- SD3 ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latents:
    """The training set as the transformer sees it."""

    mean: Tensor  # (N, C, 16, 16), scaled and shifted
    std: Tensor  # (N, C, 16, 16), of the posterior, scaled
    texts: list[str]  # the caption of each


def encode_scenes(photographs: Photographs, vae: AutoencoderKL, count: int, seed: int) -> Latents:
    """Draw and encode scenes."""
    generator = keyed_generator(seed, "scenes")
    captions = draw_captions(count, generator)
    scenes = scene_data.draw(captions, photographs, generator)
    parts = (scene_data.render(part, photographs) for part in scenes.split(200))
    return Latents(*tiny_training.posteriors(vae, parts), [caption.text for caption in captions])


def build_pipeline(seed: int) -> StableDiffusion3Pipeline:
    """With random weights; 64 x 64 images, 12 tokens."""
    captions = tuple(scene_data.all_texts())
    return tiny_models.build_pipeline(
        seed, captions=captions, length=PROMPT_LENGTH, resolution=RESOLUTION, shift=SAMPLING_SHIFT
    )


def train_sd3(
    photographs: Photographs,
    vae: AutoencoderKL,
    recipes: Sequence[Recipe],
    seed: int,
    work: Path,
    save_every: int,
    compiled: bool = False,
) -> StableDiffusion3Pipeline:
    """Train transformer and text encoders by conditional flow matching on the latents of `vae`'s encoder.

    In passes, a recipe each, from where the one before ended; the times of TIME_SHIFTS.
    """
    pipeline = build_pipeline(seed)
    pipeline.register_modules(vae=vae)
    latents = encode_scenes(photographs, vae, POOL, seed)
    parts = tiny_training.trained_parts(pipeline)
    if compiled:
        for block in pipeline.transformer.transformer_blocks:
            block.compile()
    for name, recipe, shift in zip(SD3_PASSES, recipes, TIME_SHIFTS, strict=True):

        def loss(generator: torch.Generator, recipe: Recipe = recipe, shift: float = shift) -> Tensor:
            x_0, texts, ids = draw_latents(latents, recipe.batch, generator)
            return tiny_training.velocity_loss(pipeline, texts, x_0, ids, generator, shift)

        ingredients = {"encoder": digest(vae.encoder), "shares": SHARES, "pool": POOL}
        if shift != 1:
            ingredients["shift"] = shift
        with sdpa_kernel(SDPBackend.MATH):
            Fit(f"scenes_{name}", parts, recipe, seed, work, **ingredients).run(loss, save_every)
    return pipeline


def draw_latents(latents: Latents, count: int, generator: torch.Generator) -> tuple[Tensor, list[str], Tensor]:
    """`count` latents (B, C, 16, 16), the different captions among theirs, and which of them is whose, (B,)."""
    index = torch.randint(len(latents.texts), (count,), generator=generator)
    unsaid = torch.rand(count, generator=generator) < EMPTY_CAPTIONS
    captions = ["" if empty else latents.texts[i] for i, empty in zip(index.tolist(), unsaid.tolist(), strict=True)]
    mean, std = latents.mean[index], latents.std[index]
    return mean + std * torch.randn(mean.shape, generator=generator), *number(captions)


def number(captions: list[str]) -> tuple[list[str], Tensor]:
    """The different captions, and the number of each one's own among them, (B,)."""
    texts = sorted(set(captions))
    return texts, torch.tensor([texts.index(caption) for caption in captions])


# --- detectors ------------------------------------------------------------------------------------------------


def decode(vae: AutoencoderKL, parts: Iterable[Tensor], generator: torch.Generator) -> Tensor:
    """Scenes in [0, 1] as the autoencoder decodes them: (N, 3, 64, 64) uint8."""
    decoded = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for images in tqdm(parts, desc="decoded scenes", mininterval=2):
            latents = vae.encode(2 * images - 1).latent_dist.sample(generator)
            again = (vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)
            decoded.append((255 * again).round().byte())
    return torch.cat(decoded)


def draw_cells(photographs: Photographs, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Cells (N, 3, 32, 32) in [0, 1], an eighth of them empty, their labels (N,) and colours (N,)."""
    index = torch.randint(len(photographs), (count,), generator=generator)
    colours = torch.randint(len(COLOURS), (count,), generator=generator)
    empty = torch.rand(count, generator=generator) < 1 / 8
    cells = tiny_data.tint(photographs.grey[index], colours)
    cells[empty] = 1
    return cells, torch.where(empty, EMPTY, photographs.labels[index]), colours


def train_detector(
    name: str, photographs: Photographs, vae: AutoencoderKL, recipe: Recipe, seed: int, work: Path, save_every: int
) -> CellDetector:
    """Train "detector" or "judge" on cells, half of them decoded, with augmentations of its own."""
    torch.manual_seed(seed)
    detector = CellDetector(**DETECTORS[name]).to(memory_format=torch.channels_last)
    generator = keyed_generator(seed, "decoded cells")
    cells, labels, colours = draw_cells(photographs, 4 * DECODED_POOL, generator)
    decoded = split_cells(decode(vae, join_cells(cells).split(100), generator))

    def loss(generator: torch.Generator) -> Tensor:
        half = recipe.batch // 2
        index = torch.randint(len(decoded), (recipe.batch - half,), generator=generator)
        drawn = draw_cells(photographs, half, generator)
        images = torch.cat([drawn[0], decoded[index].float() / 255])
        label, colour = torch.cat([drawn[1], labels[index]]), torch.cat([drawn[2], colours[index]])
        with torch.autocast("cpu", torch.bfloat16):
            label_logits, colour_logits = detector.logits(AUGMENTATIONS[name](images, generator))
        label_loss = F.cross_entropy(label_logits.float(), label, label_smoothing=LABEL_SMOOTHING)
        return label_loss + F.cross_entropy(colour_logits.float()[label != EMPTY], colour[label != EMPTY])

    ingredients = {"shape": DETECTORS[name], "pool": DECODED_POOL, "smoothing": LABEL_SMOOTHING, "vae": digest(vae)}
    Fit(f"scenes_{name}", [detector], recipe, seed, work, **ingredients).run(loss, save_every)
    return detector


def shifted_and_noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    """The detector's: cells (B, 3, 32, 32) in [0, 1], shifted by up to two pixels, mirrored, with noise."""
    count = len(images)
    images = shift(images, 2, generator)
    mirrored = torch.rand(count, generator=generator) < 0.3
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    strength = 0.08 * torch.rand(count, 1, 1, 1, generator=generator)
    return (images + strength * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def blurred_and_scaled(images: Tensor, generator: torch.Generator) -> Tensor:
    """The judge's: cells (B, 3, 32, 32) in [0, 1], shifted by up to three pixels, some blurred, brighter or darker."""
    count = len(images)
    images = shift(images, 3, generator)
    blurred = F.avg_pool2d(F.pad(images, (1,) * 4, mode="replicate"), 3, 1)
    share = torch.rand(count, 1, 1, 1, generator=generator)
    images = torch.lerp(images, blurred, share * (share > 0.5))
    contrast = 0.9 + 0.2 * torch.rand(count, 1, 1, 1, generator=generator)
    return (1 - contrast * (1 - images)).clamp(0, 1)


AUGMENTATIONS = {"detector": shifted_and_noisy, "judge": blurred_and_scaled}


def shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Each eighth of a batch by its own offset of up to so many pixels; what leaves comes in white."""
    parts = []
    for part in images.chunk(8):
        down, right = torch.randint(2 * pixels + 1, (2,), generator=generator).tolist()
        padded = F.pad(part, (pixels,) * 4, value=1.0)
        parts.append(padded[..., down : down + part.shape[2], right : right + part.shape[3]])
    return torch.cat(parts)


# --- CLIP ---------------------------------------------------------------------------------------------------


def train_clip(
    photographs: Photographs, vae: AutoencoderKL, recipe: Recipe, seed: int, work: Path, save_every: int
) -> tuple[CLIPModel, Any]:
    """Train a CLIP on augmented scenes and their captions, half of them decoded."""
    sizes = {"length": PROMPT_LENGTH, "resolution": RESOLUTION, **CLIP_SIZES}
    model, processor = tiny_models.build_clip(seed, captions=tuple(scene_data.all_texts()), **sizes)
    generator = keyed_generator(seed, "decoded scenes")
    captions = draw_captions(DECODED_POOL, generator)
    scenes = scene_data.draw(captions, photographs, generator)
    decoded = decode(vae, (scene_data.render(part, photographs) for part in scenes.split(100)), generator)

    def loss(generator: torch.Generator) -> Tensor:
        half = recipe.batch // 2
        index = torch.randint(len(decoded), (recipe.batch - half,), generator=generator)
        fresh = draw_captions(half, generator)
        drawn = scene_data.render(scene_data.draw(fresh, photographs, generator), photographs)
        images = torch.cat([drawn, decoded[index].float() / 255])
        texts, ids = number([caption.text for caption in [*fresh, *(captions[i] for i in index.tolist())]])
        tokens = processor.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        return tiny_training.clip_loss(model, tiny_training.augment(2 * images - 1, generator), tokens, ids)

    fit = Fit(
        "scenes_clip", [model], recipe, seed, work, sizes=sizes, shares=SHARES, pool=DECODED_POOL, vae=digest(vae)
    )
    tiny_training.fit_clip(fit, loss, save_every)
    return model, processor
