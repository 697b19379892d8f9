"""assets/rewards.md: every reward, from flow_grpo/rewards/registry.py, and what an image costs.

    python scripts/docs/rewards.py                              writes the page
    python scripts/docs/rewards.py --measure hpsv2 ocr ...      first times these, into assets/rewards.json

Rewards with a network are timed at their real sizes on random weights: one image of 512 x 512 pixels, prompts encoded
before, CPU seconds of a process with one thread, the median of three.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
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
    score, image = TIMED[name](), torch.rand(1, 3, SIDE, SIDE)
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


def _aesthetic() -> Callable[[Tensor], Tensor]:
    """The image tower of CLIP ViT-L/14."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from flow_grpo.rewards.frozen import FrozenNetwork
    from flow_grpo.rewards.heads import LinearHead
    from flow_grpo.rewards.hpsv2 import image_path

    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    config = CLIPVisionConfig(**sizes, patch_size=14, projection_dim=768)
    model: Any = FrozenNetwork(CLIPVisionModelWithProjection(config)).model
    head, path = LinearHead((768, 1024, 128, 64, 16, 1)), image_path(224)
    return lambda image: head(model(path(image)).image_embeds)


def _imagereward() -> Callable[[Tensor], Tensor]:
    """BLIP with ViT-L/16 at 224 pixels and BERT's base size."""
    import torch
    from transformers import BlipTextConfig, BlipVisionConfig

    from flow_grpo.rewards.frozen import FrozenNetwork
    from flow_grpo.rewards.hpsv2 import image_path
    from flow_grpo.rewards.imagereward import LENGTH, BlipReward

    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    vision = BlipVisionConfig(**sizes, image_size=224, patch_size=16)
    text = BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12)
    model: Any = FrozenNetwork(BlipReward(vision, text, (768, 1024, 128, 64, 16, 1))).model
    ids, path = torch.full((1, LENGTH), 7), image_path(224)
    return lambda image: model(path(image), ids, torch.ones_like(ids))


TIMED: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "hpsv2": _hpsv2,
    "imagereward": _imagereward,
    "aesthetic": _aesthetic,
    "ocr": _plain("ocr"),
    "jpeg_compressibility": _plain("jpeg_compressibility"),
    "jpeg_incompressibility": _plain("jpeg_incompressibility"),
    "target_colour": _plain("target_colour", "red"),
    "target_brightness": _plain("target_brightness", 0.5),
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
