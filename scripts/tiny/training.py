"""How each tiny model is trained: the autoencoder, the pipeline, the reward and the judge."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from scripts.tiny import data as tiny_data
from scripts.tiny import models as tiny_models
from scripts.tiny.data import Photographs
from scripts.tiny.fit import Fit, Recipe, digest

AutoencoderKL: TypeAlias = Any  # type checkers do not see the methods of diffusers' classes
StableDiffusion3Pipeline: TypeAlias = Any

VAE_KL_WEIGHT = 5e-4  # of the KL divergence per latent number
MAX_LOGIT_SCALE = 4.0  # natural logarithm of CLIP's inverse temperature
CLIP_SIZES: dict[str, dict[str, Any]] = {  # the judge differs from the reward in its seed and in its shape
    "pickscore": {},
    "features": {"vision_width": 96, "vision_layers": 6, "vision_heads": 3},
}
RECIPES = {
    "vae": Recipe(steps=6000, batch=32, learning_rate=1.5e-3, weight_decay=1e-4),
    "sd3": Recipe(steps=5000, batch=128, learning_rate=1.5e-3, flat=0.5, ema_decay=0.999),
    "pickscore": Recipe(steps=4000, batch=128, learning_rate=1.5e-3, weight_decay=0.05, beta2=0.98, warmup=400),
    "features": Recipe(steps=6000, batch=64, learning_rate=1.5e-3, weight_decay=0.05, beta2=0.98, warmup=400),
}


def draw(photographs: Photographs, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` photographs in random colours: (B, 3, 32, 32) in [-1, 1], and the ids of their captions, (B,)."""
    index = torch.randint(len(photographs), (count,), generator=generator)
    colours = torch.randint(len(tiny_data.COLOURS), (count,), generator=generator)
    coloured = torch.rand(count, generator=generator) < 0.6
    images = 2 * tiny_data.tint(photographs.grey[index], colours) - 1
    return images, tiny_data.caption_ids(photographs.labels[index], colours, coloured)


# --- VAE ----------------------------------------------------------------------------------------------------


def train_vae(photographs: Photographs, recipe: Recipe, seed: int, work: Path, save_every: int) -> AutoencoderKL:
    """Train the autoencoder, and set the factors that give its latents mean 0 and standard deviation 1."""
    torch.manual_seed(seed)
    vae: AutoencoderKL = tiny_models.build_vae()

    def loss(generator: torch.Generator) -> Tensor:
        return vae_loss(vae, draw(photographs, recipe.batch, generator)[0], generator)

    Fit("vae", [vae], recipe, seed, work, kl_weight=VAE_KL_WEIGHT).run(loss, save_every)
    standardise(vae, draw(photographs, min(2000, len(photographs)), keyed_generator(seed, "latent statistics"))[0])
    return vae


def vae_loss(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """Squared and half the absolute error of (B, 3, H, W) in [-1, 1] after a sample of the posterior; a small KL."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
    error = decoded.float() - images
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.square().mean() + 0.5 * error.abs().mean() + VAE_KL_WEIGHT * kl


def standardise(vae: AutoencoderKL, images: Tensor) -> None:
    """Set the factors that give the latents of images in [-1, 1] mean 0 and standard deviation 1."""
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(250)])
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4), shift_factor=round(latents.mean().item(), 4)
    )


# --- SD3 ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latents:
    """The training set as the transformer sees it; each photograph has one colour."""

    mean: Tensor  # (N, C, 8, 8), scaled and shifted
    std: Tensor  # (N, C, 8, 8), of the posterior, scaled
    labels: Tensor  # (N,)
    colours: Tensor  # (N,)


def encode_latents(photographs: Photographs, vae: AutoencoderKL, seed: int) -> Latents:
    """Encode every photograph in one random colour."""
    count = len(photographs)
    colours = torch.randint(len(tiny_data.COLOURS), (count,), generator=keyed_generator(seed, "latent colours"))
    parts = (tiny_data.tint(photographs.grey[i], colours[i]) for i in torch.arange(count).split(500))
    return Latents(*posteriors(vae, parts), photographs.labels, colours)


def posteriors(vae: AutoencoderKL, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, scaled and shifted, of batches of images in [0, 1]."""
    means, stds = [], []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for images in tqdm(parts, desc="latents", mininterval=2):
            posterior = vae.encode(2 * images - 1).latent_dist
            means.append(posterior.mean.float())
            stds.append(posterior.std.float())
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    return (torch.cat(means) - shift) * scale, torch.cat(stds) * scale


def train_sd3(
    photographs: Photographs, vae: AutoencoderKL, recipe: Recipe, seed: int, work: Path, save_every: int
) -> StableDiffusion3Pipeline:
    """Train transformer and text encoders by conditional flow matching on the latents of `vae`."""
    pipeline: StableDiffusion3Pipeline = tiny_models.build_pipeline(seed)
    pipeline.register_modules(vae=vae)
    latents = encode_latents(photographs, vae, seed)
    captions = tiny_data.all_captions()

    def loss(generator: torch.Generator) -> Tensor:
        return velocity_loss(pipeline, captions, *draw_latents(latents, recipe.batch, generator), generator)

    with sdpa_kernel(SDPBackend.MATH):
        Fit("sd3", trained_parts(pipeline), recipe, seed, work, vae=digest(vae)).run(loss, save_every)
    return pipeline


def trained_parts(pipeline: StableDiffusion3Pipeline) -> list[Any]:
    """The transformer and the three text encoders."""
    return [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]


def velocity_loss(
    pipeline: StableDiffusion3Pipeline,
    captions: list[str],
    x_0: Tensor,
    ids: Tensor,
    generator: torch.Generator,
    shift: float = 1.0,
) -> Tensor:
    """Conditional flow matching: latents (B, C, h, w), whose captions are `captions[ids]`.

    Times are logit-normal, then shifted to s t / (1 + (s - 1) t) (arXiv 2403.03206, equation 23).
    """
    x_1 = torch.randn(x_0.shape, generator=generator)
    t = torch.sigmoid(torch.randn(len(x_0), generator=generator))  # (B,)
    t = shift * t / (1 + (shift - 1) * t)
    x_t = torch.lerp(x_0, x_1, t[:, None, None, None])
    length = pipeline.tokenizer.model_max_length
    with torch.autocast("cpu", torch.bfloat16):
        embeds, _, pooled, _ = pipeline.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
        velocity = pipeline.transformer(
            x_t,
            timestep=1000 * t,
            encoder_hidden_states=embeds[ids],
            pooled_projections=pooled[ids],
            return_dict=False,
        )[0]
    return (velocity.float() - (x_1 - x_0)).square().mean()


def draw_latents(latents: Latents, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` latents, (B, C, 8, 8), and the ids of their captions: 10 % empty, 40 % plain, 50 % coloured."""
    index = torch.randint(len(latents.labels), (count,), generator=generator)
    kind = torch.rand(count, generator=generator)
    ids = tiny_data.caption_ids(latents.labels[index], latents.colours[index], coloured=kind >= 0.5)
    mean, std = latents.mean[index], latents.std[index]
    return mean + std * torch.randn(mean.shape, generator=generator), torch.where(kind < 0.1, 0, ids)


# --- CLIP ---------------------------------------------------------------------------------------------------


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to two pixels, change brightness and tone a little, add noise: (B, 3, H, W) in [-1, 1]."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    count, channels, height, width = images.shape
    down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
    images = torch.roll(images, (down, right), (2, 3)) * (0.9 + 0.2 * uniform(count, 1, 1, 1))
    images = images + 0.05 * normal(count, channels, 1, 1)
    images = images + 0.1 * uniform(count, 1, 1, 1) * normal(count, channels, height, width)
    return images.clamp(-1, 1)


def contrastive_loss(image: Tensor, text: Tensor, ids: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric loss; every pair of the batch with the same caption id is a positive.

    `image`, `text`: unit features, (B, d); `ids`: (B,).
    """
    logits = logit_scale.exp() * image @ text.T  # (B, B)
    positive = (ids[:, None] == ids[None]).float()
    target = positive / positive.sum(1, keepdim=True)
    return -((logits.log_softmax(1) + logits.T.log_softmax(1)) * target).sum(1).mean() / 2


def train_clip(
    name: str, photographs: Photographs, recipe: Recipe, seed: int, work: Path, save_every: int
) -> tuple[CLIPModel, Any]:
    """Train one CLIP, "pickscore" or "features", on augmented photographs and their captions."""
    model, processor = tiny_models.build_clip(seed, **CLIP_SIZES[name])
    tokens = processor.tokenizer(tiny_data.all_captions(), padding="max_length", return_tensors="pt").input_ids

    def loss(generator: torch.Generator) -> Tensor:
        images, ids = draw(photographs, recipe.batch, generator)
        return clip_loss(model, augment(images, generator), tokens, ids)

    fit_clip(
        Fit(name, [model], recipe, seed, work, sizes=CLIP_SIZES[name], max_logit_scale=MAX_LOGIT_SCALE),
        loss,
        save_every,
    )
    return model, processor


def clip_loss(model: CLIPModel, images: Tensor, tokens: Tensor, ids: Tensor) -> Tensor:
    """Of images (B, 3, H, W) in [-1, 1], whose captions have the tokens `tokens[ids]`."""
    with torch.autocast("cpu", torch.bfloat16):
        image = model.visual_projection(model.vision_model(pixel_values=images).pooler_output)
        text = model.text_projection(model.text_model(input_ids=tokens).pooler_output)[ids]
    scale = model.logit_scale.clamp(max=MAX_LOGIT_SCALE)
    return contrastive_loss(F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1), ids, scale)


def fit_clip(fit: Fit, loss: Callable[[torch.Generator], Tensor], save_every: int) -> None:
    """Train one CLIP, with the attention that is fast on CPUs."""
    model: Any = fit.modules[0]
    model.train()
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the fused one is slow backwards in bfloat16 on CPUs
    fit.run(loss, save_every)
    model.set_attn_implementation(attention)
    model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
