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
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_grpo.errors import ConfigError

if TYPE_CHECKING:
    from scripts.tiny.data import Photographs
    from scripts.tiny.fit import Recipe

STAGES = ("vae", "sd3", "pickscore", "features", "measure")


def run_stage(stage: str, args: argparse.Namespace) -> None:
    """Train one stage and write what it makes under args.out, or measure what is there."""
    from scripts.tiny import data as tiny_data
    from scripts.tiny import measure as measure_tiny
    from scripts.tiny.training import RECIPES, train_vae

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
    from scripts.tiny.training import RECIPES, train_sd3

    if not (work / "vae").is_dir():
        raise ConfigError(f"--stage sd3: {work / 'vae'} does not exist; run --stage vae first.")
    vae: Any = AutoencoderKL.from_pretrained(work / "vae").eval()
    vae.register_to_config(_name_or_path="")  # the work folder is nobody's business
    pipeline = train_sd3(photographs, vae, RECIPES["sd3"], args.seed, work, args.save_every)
    pipeline.to(torch.float16).save_pretrained(out / "tiny_sd3")
    record(out / "tiny_sd3", args.seed, RECIPES, "vae", "sd3")
    tiny_data.write_prompts(out / "prompts" / "tiny")


def make_clip(stage: str, photographs: Photographs, out: Path, work: Path, args: argparse.Namespace) -> None:
    """Train and write the reward or the judge, each from its own seed."""
    from scripts.tiny.training import CLIP_SIZES, RECIPES, train_clip

    folder, seed = out / f"tiny_{stage}", args.seed + 1 + list(CLIP_SIZES).index(stage)
    model, processor = train_clip(stage, photographs, RECIPES[stage], seed, work, args.save_every)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    record(folder, args.seed, RECIPES, stage)


def record(folder: Path, seed: int, recipes: Mapping[str, Recipe], *stages: str) -> None:
    """Write training.json, the seed of the command and the recipes, beside a model: its card is made from it."""
    training = {"seed": seed, **{stage: asdict(recipes[stage]) for stage in stages}}
    (folder / "training.json").write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; 0, or 2 after one sentence about bad input."""
    from scripts.tiny import pretraining  # found once the folder is on the path

    return pretraining(arguments, __doc__, STAGES, "logs/pretrain_tiny", run_stage)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them
    sys.exit(main())
