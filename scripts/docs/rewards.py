"""assets/rewards.md: every reward, from flow_grpo/rewards/registry.py, and what an image costs.

    python scripts/docs/rewards.py                              writes the page
    python scripts/docs/rewards.py --measure hpsv2 ocr ...      first times these, into assets/rewards.json

Rewards with a network are timed at their real sizes on random weights, or on their own where the repository has them:
one image of 512 x 512 pixels, 64 x 64 for the detector of scenes, prompts encoded before, CPU seconds of a process with
one thread, the median of three.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flow_grpo.files import strict_json, write_atomically
from flow_grpo.rewards.registry import REWARDS

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PAGE, SECONDS = ROOT / "assets/rewards.md", ROOT / "assets/rewards.json"
TEMPLATE = "rewards.md.j2"
SIDE = 512  # pixels of the image that is scored
REPEATS = 3
PROMPT = 'a red bag that says "Hello"'
VIT_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "projection_dim": 1024,
}
VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "projection_dim": 768,
}


def text() -> str:
    """The page, with the seconds that are kept."""
    environment = Environment(  # Markdown: nothing is escaped
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    kept = json.loads(SECONDS.read_text(encoding="utf-8"))
    return environment.get_template(TEMPLATE).render(rewards=REWARDS.values(), kept=kept, repeats=REPEATS)


def measure(name: str) -> dict[str, float]:
    """CPU seconds of one image's score, and with the gradient at the image where there is one."""
    import torch

    torch.manual_seed(0)
    side = REWARDS[name].side or SIDE
    score, image = TIMED[name](), torch.rand(1, 3, side, side)
    with torch.no_grad():
        score(image)  # encodes the prompt, and fills what is filled once
        found = {"score": _median(lambda: score(image))}
    if REWARDS[name].differentiable:
        image.requires_grad_()
        found["gradient"] = _median(lambda: torch.autograd.grad(score(image).sum(), image))
    return found


def _median(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


# --- rewards at their real sizes, with random weights -------------------------------------------------------


def _plain(name: str, *arguments: Any) -> Callable[[], Callable[[Tensor], Tensor]]:
    """A reward without a checkpoint."""

    def build() -> Callable[[Tensor], Tensor]:
        from flow_grpo.places import load

        reward = load(REWARDS[name].factory)(*arguments)
        return lambda image: reward(image, [PROMPT], [{}])

    return build


def _hpsv2() -> Callable[[Tensor], Tensor]:
    """ViT-H-14, which is PickScore's size too."""
    import open_clip

    from flow_grpo.rewards.hpsv2 import ARCHITECTURE, HpsScorer, image_path
    from flow_grpo.rewards.towers import TwoTowers

    scorer = HpsScorer.__new__(HpsScorer)
    scorer.tokenizer = open_clip.SimpleTokenizer()
    network = open_clip.CLIP(**open_clip.get_model_config(ARCHITECTURE))
    TwoTowers.__init__(scorer, network, image_path(224))
    return lambda image: scorer.cosines(image, [PROMPT])


def _clip_embeddings(sizes: Mapping[str, int]) -> Callable[[Tensor], Tensor]:
    """The image tower of a CLIP."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from flow_grpo.rewards.frozen import FrozenNetwork
    from flow_grpo.rewards.hpsv2 import image_path

    options: dict[str, Any] = {**sizes, "patch_size": 14}
    model: Any = FrozenNetwork(CLIPVisionModelWithProjection(CLIPVisionConfig(**options))).model
    path = image_path(224)
    return lambda image: model(path(image)).image_embeds


def _clip(sizes: Mapping[str, int]) -> Callable[[], Callable[[Tensor], Tensor]]:
    """The cosine of an image with a prompt."""

    def build() -> Callable[[Tensor], Tensor]:
        import torch
        import torch.nn.functional as F

        embed, text = _clip_embeddings(sizes), torch.ones(sizes["projection_dim"])
        return lambda image: F.cosine_similarity(embed(image), text)

    return build


def _aesthetic() -> Callable[[Tensor], Tensor]:
    """The image tower of CLIP ViT-L/14, and the head."""
    from flow_grpo.rewards.heads import LinearHead

    embed, head = _clip_embeddings(VIT_L), LinearHead((768, 1024, 128, 64, 16, 1))
    return lambda image: head(embed(image))


def _siglip() -> Callable[[Tensor], Tensor]:
    """The image tower of SigLIP2 so400m at 384 pixels; the text only adds a product."""
    import torch.nn.functional as F
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from flow_grpo.rewards.frozen import FrozenNetwork

    sizes: dict[str, Any] = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
    }
    model: Any = FrozenNetwork(SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=384, patch_size=14))).model
    return lambda image: model(pixel_values=F.interpolate(image, (384, 384), mode="bilinear")).pooler_output.sum(1)


def _embedded(name: str) -> Callable[[], Callable[[Tensor], Tensor]]:
    """A reward whose model is part of the repository."""

    def build() -> Callable[[Tensor], Tensor]:
        from flow_grpo.places import load

        spec = REWARDS[name]
        assert spec.scorer is not None
        reward = load(spec.factory)(load(spec.scorer)(spec.model))
        return lambda image: reward(image, ["a red bag"], [{}])

    return build


def _imagereward() -> Callable[[Tensor], Tensor]:
    """BLIP with ViT-L/16 at 224 pixels and BERT's base size."""
    import torch
    from transformers import BlipTextConfig, BlipVisionConfig

    from flow_grpo.rewards.frozen import FrozenNetwork
    from flow_grpo.rewards.hpsv2 import image_path
    from flow_grpo.rewards.imagereward import LENGTH, BlipReward

    sizes: dict[str, Any] = {name: size for name, size in VIT_L.items() if name != "projection_dim"}
    vision = BlipVisionConfig(**sizes, image_size=224, patch_size=16)
    text = BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12)
    model: Any = FrozenNetwork(BlipReward(vision, text, (768, 1024, 128, 64, 16, 1))).model
    ids, path = torch.full((1, LENGTH), 7), image_path(224)
    return lambda image: model(path(image), ids, torch.ones_like(ids))


TIMED: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "pickscore": _clip(VIT_H),
    "clipscore": _clip(VIT_L),
    "hpsv2": _hpsv2,
    "imagereward": _imagereward,
    "aesthetic": _aesthetic,
    "siglip": _siglip,
    "ocr": _plain("ocr"),
    "jpeg_compressibility": _plain("jpeg_compressibility"),
    "jpeg_incompressibility": _plain("jpeg_incompressibility"),
    "target_colour": _plain("target_colour", "red"),
    "target_brightness": _plain("target_brightness", 0.5),
    "scenes": _embedded("scenes"),
    "scenes_soft": _embedded("scenes_soft"),
    "scenes_clip": _embedded("scenes_clip"),
}


def main() -> None:
    """Time what is asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", metavar="REWARD", choices=TIMED, default=[], help="time these first")
    names = parser.parse_args().measure
    if names:
        os.environ["OMP_NUM_THREADS"] = "1"
        sys.path.insert(0, str(ROOT))  # scripts import one another; no install offers them
        from scripts.bench.machine import cpu_model

        kept = json.loads(SECONDS.read_text(encoding="utf-8")) if SECONDS.exists() else {"seconds": {}}
        for name in names:
            kept = {"machine": cpu_model(), "seconds": kept["seconds"] | {name: measure(name)}}
            write_atomically(SECONDS, strict_json(kept, indent=1) + "\n")
    write_atomically(PAGE, text())


if __name__ == "__main__":
    main()
