"""Train the models of the scenes from real photographs and write them to assets/.

    python scripts/scenes/pretrain.py [--stage all] [--data DIR] [--out assets] [--work logs/pretrain_scenes]

Stages, in the order of `all`: `vae` (needs assets/tiny_sd3, whose encoder it keeps), `sd3`, `detector`, `judge` and
`clip` (all need vae), `measure`. States, threads and data are as scripts/tiny/pretrain.py says. Two stages may run at
once, with one thread each.

Departures from the textbook:
- VAE: the decoder alone is trained, from tiny_sd3's weights: the encoder's latents of a scene keep what is needed.
- SD3: as tiny_sd3, with twelve tokens a caption and 64 tokens an image; a caption is empty in 10 % of the cases, and
  kinds of captions that are hard are drawn more often (`SHARES` in training.py). The scene of a caption is drawn once,
  so that its latent is computed once. The transformer's blocks are compiled where a C++ compiler is found: 1.8 times as
  fast on one core, with other rounding.
- Detectors: small convolutional networks that see a cell at a time, as drawn or as the autoencoder decodes it; they are
  not object detectors, and know where the cells are.
- Weights are kept in float16 in assets/: load them with an explicit dtype.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_grpo.errors import ConfigError

if TYPE_CHECKING:
    from scripts.tiny.data import Photographs

STAGES = ("vae", "sd3", "detector", "judge", "clip", "measure")
FOLDERS = {  # of the models in assets/
    "sd3": "tiny_scenes",
    "detector": "tiny_scenes_detector",
    "judge": "tiny_scenes_judge",
    "clip": "tiny_scenes_clip",
}


def run_stage(stage: str, args: argparse.Namespace) -> None:
    """Train one stage and write what it makes, or measure what is there."""
    from scripts.scenes import measure as measure_scenes
    from scripts.tiny import data as tiny_data

    if stage == "measure":
        return measure_scenes.measure(Path(args.out), Path(args.data), args.seed)
    return MAKERS[stage](stage, tiny_data.load("train", Path(args.data)), args)


def make_vae(stage: str, photographs: Photographs, args: argparse.Namespace) -> None:
    """Train the decoder of tiny_sd3's autoencoder; write the autoencoder to the work folder."""
    from scripts.scenes import training

    vae = load_vae(Path(args.out) / "tiny_sd3" / "vae", "run scripts/tiny/pretrain.py first")
    training.train_vae(photographs, vae, training.RECIPES[stage], args.seed, Path(args.work), args.save_every)
    vae.save_pretrained(Path(args.work) / "vae")


def make_sd3(stage: str, photographs: Photographs, args: argparse.Namespace) -> None:
    """Train the pipeline around the autoencoder of the work folder; write it and the prompts."""
    import torch

    from scripts.scenes import data as scene_data
    from scripts.scenes import training
    from scripts.tiny.pretrain import record

    vae, folder = trained_vae(args), Path(args.out) / FOLDERS[stage]
    pipeline = training.train_sd3(
        photographs,
        vae,
        [training.RECIPES[name] for name in training.SD3_PASSES],
        args.seed,
        Path(args.work),
        args.save_every,
        compiled=shutil.which("g++") is not None,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    record(folder, args.seed, training.RECIPES, "vae", *training.SD3_PASSES)
    scene_data.write_prompts(Path(args.out) / "prompts" / "scenes")


def make_detector(stage: str, photographs: Photographs, args: argparse.Namespace) -> None:
    """Train and write the reward's detector or the judge, each from its own seed."""
    from scripts.scenes import training
    from scripts.tiny.pretrain import record

    folder, seed = Path(args.out) / FOLDERS[stage], args.seed + STAGES.index(stage)
    detector = training.train_detector(
        stage, photographs, trained_vae(args), training.RECIPES[stage], seed, Path(args.work), args.save_every
    )
    detector.save(folder)
    record(folder, args.seed, training.RECIPES, stage)


def make_clip(stage: str, photographs: Photographs, args: argparse.Namespace) -> None:
    """Train and write the CLIP."""
    from scripts.scenes import training
    from scripts.tiny.pretrain import record

    folder, seed = Path(args.out) / FOLDERS[stage], args.seed + STAGES.index(stage)
    recipe = training.RECIPES[stage]
    model, processor = training.train_clip(
        photographs, trained_vae(args), recipe, seed, Path(args.work), args.save_every
    )
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    record(folder, args.seed, training.RECIPES, stage)


MAKERS = {"vae": make_vae, "sd3": make_sd3, "detector": make_detector, "judge": make_detector, "clip": make_clip}


def trained_vae(args: argparse.Namespace) -> Any:
    """The autoencoder of the work folder."""
    return load_vae(Path(args.work) / "vae", "run --stage vae first")


def load_vae(folder: Path, remedy: str) -> Any:
    """An AutoencoderKL in float32; ConfigError if it is not there."""
    import torch
    from diffusers import AutoencoderKL

    if not folder.is_dir():
        raise ConfigError(f"--stage: {folder} does not exist; {remedy}.")
    vae: Any = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()
    vae.register_to_config(_name_or_path="")  # the work folder is nobody's business
    return vae


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; 0, or 2 after one sentence about bad input."""
    from scripts.tiny import pretraining  # found once the folder is on the path

    return pretraining(arguments, __doc__, STAGES, "logs/pretrain_scenes", run_stage)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them
    sys.exit(main())
