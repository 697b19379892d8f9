"""Train the embedded tiny models from real photographs and write them to assets/.

    python scripts/tiny/pretrain.py [--stage all] [--data DIR] [--out assets] [--work logs/pretrain_tiny]

Stages, in the order of `all`: `vae`, `sd3` (needs vae), `pickscore`, `features`, `measure`. Each saves its state every
--save-every steps: a killed run, started again, continues and ends with the same weights as an unbroken one, since the
random numbers of a step depend on (seed, stage, step) only. Two stages may run at once, with one thread each; another
number of threads gives other rounding, and so slightly other weights.

The photographs are Fashion-MNIST: install the Debian package `dataset-fashion-mnist`, or name with --data a folder that
holds its four `*-ubyte.gz` files.

Departures from the textbook:
- SD3: the text encoders are trained with the transformer, from random weights. A caption is the plain one, the coloured
  one, or empty (10 %, for guidance). The colour of a photograph is drawn once, so that its latent is computed once.
- SD3: fast attention kernels for the CPU are slow backwards in bfloat16; the plain one is used.
- VAE: no adversarial or perceptual term: squared error, half the absolute error, and a small KL term.
- CLIP: images of a batch that share their caption are all positives of it; the logit scale stays below exp(4).
- Weights are kept in float16 in assets/: load them with an explicit dtype.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_grpo.errors import ConfigError

if TYPE_CHECKING:
    from typing import TypeAlias

    import torch
    from torch import Tensor, nn
    from transformers import CLIPModel

    from scripts.tiny.data import Photographs

    AutoencoderKL: TypeAlias = Any  # type checkers do not see the methods of diffusers' classes
    StableDiffusion3Pipeline: TypeAlias = Any

STAGES = ("vae", "sd3", "pickscore", "features", "measure")
VAE_KL_WEIGHT = 5e-4  # of the KL divergence per latent number
MAX_LOGIT_SCALE = 4.0  # natural logarithm of CLIP's inverse temperature
CLIP_SIZES: dict[str, dict[str, int]] = {  # the judge differs from the reward in its seed and in its shape
    "pickscore": {},
    "features": {"vision_width": 96, "vision_layers": 6, "vision_heads": 3},
}


@dataclass(frozen=True)
class Recipe:
    """How one model is optimised: AdamW, linear warm-up, a flat part, then half a cosine to zero."""

    steps: int
    batch: int  # images a step
    learning_rate: float  # of the flat part
    weight_decay: float = 0.01
    beta2: float = 0.99
    warmup: int = 100  # steps
    flat: float = 0.0  # fraction of the steps before the cosine begins
    ema_decay: float = 0.0  # 0: no average is kept

    def rate(self, step: int) -> float:
        """The learning rate of a step as a fraction of `learning_rate`."""
        from math import cos, pi

        done = max(0.0, (step / self.steps - self.flat) / (1 - self.flat))
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + cos(pi * min(1.0, done)))


RECIPES = {
    "vae": Recipe(steps=6000, batch=32, learning_rate=1.5e-3, weight_decay=1e-4),
    "sd3": Recipe(steps=5000, batch=128, learning_rate=1.5e-3, flat=0.5, ema_decay=0.999),
    "pickscore": Recipe(steps=4000, batch=128, learning_rate=1.5e-3, weight_decay=0.05, beta2=0.98, warmup=400),
    "features": Recipe(steps=6000, batch=64, learning_rate=1.5e-3, weight_decay=0.05, beta2=0.98, warmup=400),
}


# --- one loop for all models ------------------------------------------------------------------------------


class Fit:
    """One model being trained: its optimizer, schedule, average, and the file it continues from.

    `ingredients`: whatever else decides the result (plain values); a state made with others is not continued.
    """

    def __init__(
        self, name: str, modules: Sequence[nn.Module], recipe: Recipe, seed: int, work: Path, **ingredients: Any
    ) -> None:
        import torch
        from diffusers.training_utils import EMAModel

        self.name, self.recipe, self.seed, self.ingredients, self.step = name, recipe, seed, ingredients, 0
        self.modules = torch.nn.ModuleList(modules)
        self.parameters = [parameter for parameter in self.modules.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [  # matrices decay, gains and biases do not
                {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
                {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(0.9, recipe.beta2),
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, recipe.rate)
        self.ema = EMAModel(self.parameters, decay=recipe.ema_decay) if recipe.ema_decay else None
        self.path = work / f"{name}.pt"

    def run(self, loss: Callable[[torch.Generator], Tensor], save_every: int) -> None:
        """Continue from the saved state, if any, to the recipe's last step; then load the average.

        `loss` draws its batch and its noise from the generator it is given.
        """
        import torch
        from tqdm import tqdm

        from flow_grpo.randomness import keyed_generator

        self.restore()
        last = self.recipe.steps
        bar = tqdm(range(self.step, last), desc=self.name, initial=self.step, total=last, mininterval=2)
        for step in bar:
            value = loss(keyed_generator(self.seed, self.name, step))
            self.optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.schedule.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
            self.step = step + 1
            if self.step % save_every == 0 or self.step == last:
                self.save()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        self.modules.eval()

    def save(self) -> None:
        """Write the state under a temporary name, then rename it: a kill leaves the old or the new file, whole."""
        import torch

        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "key": self.key(),
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.path)

    def restore(self) -> None:
        """Load the saved state if there is one; ConfigError if another recipe, seed or ingredient made it."""
        import torch

        if not self.path.is_file():
            return
        state = torch.load(self.path, weights_only=True)
        if state["key"] != self.key():
            raise ConfigError(
                f"--work: {self.path} was made with another recipe, seed or ingredient ({state['key']}); "
                f"name another folder, remove the file, or ask for the same as before."
            )
        self.step = state["step"]
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def key(self) -> dict[str, Any]:
        """What must be the same for a state to be continued."""
        return {"seed": self.seed, **asdict(self.recipe), **self.ingredients}


def digest(module: nn.Module) -> str:
    """SHA-256 of the names and values of a module's weights (any dtype of numpy's)."""
    sha = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def draw(photographs: Photographs, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` photographs in random colours: (B, 3, 32, 32) in [-1, 1], and the ids of their captions, (B,)."""
    import torch

    from scripts.tiny import data as tiny_data

    index = torch.randint(len(photographs), (count,), generator=generator)
    colours = torch.randint(len(tiny_data.COLOURS), (count,), generator=generator)
    coloured = torch.rand(count, generator=generator) < 0.6
    images = 2 * tiny_data.tint(photographs.grey[index], colours) - 1
    return images, tiny_data.caption_ids(photographs.labels[index], colours, coloured)


# --- VAE ----------------------------------------------------------------------------------------------------


def train_vae(photographs: Photographs, recipe: Recipe, seed: int, work: Path, save_every: int) -> AutoencoderKL:
    """Train the autoencoder, and set the factors that give its latents mean 0 and standard deviation 1."""
    import torch

    from flow_grpo.randomness import keyed_generator
    from scripts.tiny import models as tiny_models

    torch.manual_seed(seed)
    vae: AutoencoderKL = tiny_models.build_vae()

    def loss(generator: torch.Generator) -> Tensor:
        images, _ = draw(photographs, recipe.batch, generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
        error = decoded.float() - images
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.square().mean() + 0.5 * error.abs().mean() + VAE_KL_WEIGHT * kl

    Fit("vae", [vae], recipe, seed, work, kl_weight=VAE_KL_WEIGHT).run(loss, save_every)
    images, _ = draw(photographs, min(2000, len(photographs)), keyed_generator(seed, "latent statistics"))
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(250)])
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4), shift_factor=round(latents.mean().item(), 4)
    )
    return vae


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
    import torch
    from tqdm import tqdm

    from flow_grpo.randomness import keyed_generator
    from scripts.tiny import data as tiny_data

    count = len(photographs)
    colours = torch.randint(len(tiny_data.COLOURS), (count,), generator=keyed_generator(seed, "latent colours"))
    means, stds = [], []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for index in tqdm(torch.arange(count).split(500), desc="latents", mininterval=2):
            images = 2 * tiny_data.tint(photographs.grey[index], colours[index]) - 1
            posterior = vae.encode(images).latent_dist
            means.append(posterior.mean.float())
            stds.append(posterior.std.float())
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    return Latents((torch.cat(means) - shift) * scale, torch.cat(stds) * scale, photographs.labels, colours)


def train_sd3(
    photographs: Photographs, vae: AutoencoderKL, recipe: Recipe, seed: int, work: Path, save_every: int
) -> StableDiffusion3Pipeline:
    """Train transformer and text encoders by conditional flow matching on the latents of `vae`."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from scripts.tiny import data as tiny_data
    from scripts.tiny import models as tiny_models

    pipeline: StableDiffusion3Pipeline = tiny_models.build_pipeline(seed)
    pipeline.register_modules(vae=vae)
    latents = encode_latents(photographs, vae, seed)
    captions = tiny_data.all_captions()
    parts = [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]

    def loss(generator: torch.Generator) -> Tensor:
        x_0, ids = draw_latents(latents, recipe.batch, generator)
        x_1 = torch.randn(x_0.shape, generator=generator)
        t = torch.sigmoid(torch.randn(len(x_0), generator=generator))  # logit-normal, (B,)
        x_t = torch.lerp(x_0, x_1, t[:, None, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            embeds, _, pooled, _ = pipeline.encode_prompt(
                captions, None, None, do_classifier_free_guidance=False, max_sequence_length=tiny_models.PROMPT_LENGTH
            )
            velocity = pipeline.transformer(
                x_t,
                timestep=1000 * t,
                encoder_hidden_states=embeds[ids],
                pooled_projections=pooled[ids],
                return_dict=False,
            )[0]
        return (velocity.float() - (x_1 - x_0)).square().mean()

    with sdpa_kernel(SDPBackend.MATH):
        Fit("sd3", parts, recipe, seed, work, vae=digest(vae)).run(loss, save_every)
    return pipeline


def draw_latents(latents: Latents, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` latents, (B, C, 8, 8), and the ids of their captions: 10 % empty, 40 % plain, 50 % coloured."""
    import torch

    from scripts.tiny import data as tiny_data

    index = torch.randint(len(latents.labels), (count,), generator=generator)
    kind = torch.rand(count, generator=generator)
    ids = tiny_data.caption_ids(latents.labels[index], latents.colours[index], coloured=kind >= 0.5)
    mean, std = latents.mean[index], latents.std[index]
    return mean + std * torch.randn(mean.shape, generator=generator), torch.where(kind < 0.1, 0, ids)


# --- CLIP ---------------------------------------------------------------------------------------------------


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to two pixels, change brightness and tone a little, add noise: (B, 3, H, W) in [-1, 1]."""
    import torch

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
    import torch
    import torch.nn.functional as F

    from scripts.tiny import data as tiny_data
    from scripts.tiny import models as tiny_models

    model, processor = tiny_models.build_clip(seed, **CLIP_SIZES[name])
    model.train()
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the fused one is slow backwards in bfloat16 on CPUs
    tokens = processor.tokenizer(tiny_data.all_captions(), padding="max_length", return_tensors="pt").input_ids

    def loss(generator: torch.Generator) -> Tensor:
        images, ids = draw(photographs, recipe.batch, generator)
        images = augment(images, generator)
        with torch.autocast("cpu", torch.bfloat16):
            image = model.visual_projection(model.vision_model(pixel_values=images).pooler_output)
            text = model.text_projection(model.text_model(input_ids=tokens).pooler_output)[ids]
        scale = model.logit_scale.clamp(max=MAX_LOGIT_SCALE)
        return contrastive_loss(F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1), ids, scale)

    ingredients = {"sizes": CLIP_SIZES[name], "max_logit_scale": MAX_LOGIT_SCALE}
    Fit(name, [model], recipe, seed, work, **ingredients).run(loss, save_every)
    model.set_attn_implementation(attention)
    model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
    return model, processor


# --- the command --------------------------------------------------------------------------------------------


def run_stage(stage: str, args: argparse.Namespace) -> None:
    """Train one stage and write what it makes under args.out, or measure what is there."""
    from scripts.tiny import data as tiny_data
    from scripts.tiny import measure as measure_tiny

    out, work, data = Path(args.out), Path(args.work), Path(args.data)
    if stage == "measure":
        return measure_tiny.measure(out, data, args.seed)
    photographs = tiny_data.load("train", data)
    if stage == "vae":
        return train_vae(photographs, RECIPES["vae"], args.seed, work, args.save_every).save_pretrained(work / "vae")
    if stage == "sd3":
        return make_sd3(photographs, out, work, args)
    return make_clip(stage, photographs, out, work, args)


def make_sd3(photographs: Photographs, out: Path, work: Path, args: argparse.Namespace) -> None:
    """Train the pipeline around the autoencoder of the work folder; write it and the prompts."""
    import torch
    from diffusers import AutoencoderKL

    from scripts.tiny import data as tiny_data

    if not (work / "vae").is_dir():
        raise ConfigError(f"--stage sd3: {work / 'vae'} does not exist; run --stage vae first.")
    vae: Any = AutoencoderKL.from_pretrained(work / "vae").eval()
    vae.register_to_config(_name_or_path="")  # the work folder is nobody's business
    pipeline = train_sd3(photographs, vae, RECIPES["sd3"], args.seed, work, args.save_every)
    pipeline.to(torch.float16).save_pretrained(out / "tiny_sd3")
    record(out / "tiny_sd3", args.seed, "vae", "sd3")
    tiny_data.write_prompts(out / "prompts" / "tiny")


def make_clip(stage: str, photographs: Photographs, out: Path, work: Path, args: argparse.Namespace) -> None:
    """Train and write the reward or the judge, each from its own seed."""
    folder, seed = out / f"tiny_{stage}", args.seed + 1 + list(CLIP_SIZES).index(stage)
    model, processor = train_clip(stage, photographs, RECIPES[stage], seed, work, args.save_every)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    record(folder, args.seed, stage)


def record(folder: Path, seed: int, *stages: str) -> None:
    """Write training.json, the seed of the command and the recipes, beside a model: its card is made from it."""
    training = {"seed": seed, **{stage: asdict(RECIPES[stage]) for stage in stages}}
    (folder / "training.json").write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("all", *STAGES), default="all", help="what to train (default: all)")
    parser.add_argument(
        "--data", default="/usr/share/datasets/fashion-mnist", help="folder of Fashion-MNIST (default: %(default)s)"
    )
    parser.add_argument("--out", default="assets", help="where the models go (default: %(default)s)")
    parser.add_argument("--work", default="logs/pretrain_tiny", help="where states go (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--save-every", type=int, default=250, help="steps between states (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; 0, or 2 after one sentence about bad input."""
    args = parse(arguments)
    import torch

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        for stage in STAGES if args.stage == "all" else [args.stage]:
            run_stage(stage, args)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them
    sys.exit(main())
