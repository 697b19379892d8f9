"""Small random models of the architectures that rewards run, saved as folders in the layout they are published in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from transformers import BertTokenizer, SiglipConfig, SiglipImageProcessor, SiglipModel

from flow_grpo.rewards.aesthetic import Aesthetic, AestheticScorer
from flow_grpo.rewards.hpsv2 import HpsScorer, HPSv2
from flow_grpo.rewards.imagereward import ImageReward, ImageRewardScorer
from flow_grpo.rewards.siglip import SiglipScore, SiglipScorer
from scripts.tiny import data as tiny_data
from scripts.tiny.models import build_clip, build_clip_tokenizer

SIDE = 32  # pixels of every image tower here
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "sneaker", "bag", "coat", "dress", "very"]
OPEN_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def save_hpsv2(folder: Path) -> None:
    torch.manual_seed(0)
    network = open_clip.CLIP(**OPEN_CLIP)
    torch.save({"epoch": 1, "state_dict": network.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))


def save_siglip(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = build_clip_tokenizer(tiny_data.all_captions())
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 64}
    config = SiglipConfig(text_config={**sizes, **text}, vision_config={**sizes, "image_size": SIDE, "patch_size": 8})
    model = SiglipModel(config)
    for parameter in model.parameters():  # those of the library are near 0: images would hardly count
        parameter.data += 0.02 * torch.randn(parameter.shape)
    model.logit_scale.data.fill_(math.log(10.0))
    model.logit_bias.data.fill_(-3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}, resample=2).save_pretrained(folder)


def save_aesthetic(folder: Path) -> None:
    model, processor = build_clip(0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = (model.config.projection_dim, 64, 32, 16, 8, 1)
    save_head(folder / "aesthetic-model.pth", sizes)


def head_tensors(sizes: tuple[int, ...], prefix: str = "") -> dict[str, Tensor]:
    """Of the five linear maps of the published heads, by their names there."""
    found = {}
    for place, columns, rows in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        found[f"{prefix}layers.{place}.weight"] = torch.randn(rows, columns) / columns**0.5
        found[f"{prefix}layers.{place}.bias"] = 0.1 * torch.randn(rows)
    return found


def save_head(path: Path, sizes: tuple[int, ...]) -> None:
    torch.save(head_tensors(sizes), path)


def blip_tensors() -> dict[str, Tensor]:
    """The tensors of a small ImageReward, by the names that the published file has."""
    torch.manual_seed(0)
    vision, text, patches, layers = 64, 128, (SIDE // 8) ** 2, 2
    found: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"] = torch.randn(rows, columns) / columns**0.5
        found[f"{name}.bias"] = 0.1 * torch.randn(rows)

    def norm(name: str, size: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = 1 + 0.1 * torch.randn(size), 0.1 * torch.randn(size)

    root = "blip.visual_encoder."
    found[f"{root}cls_token"], found[f"{root}pos_embed"] = (torch.randn(1, n, vision) for n in (1, patches + 1))
    linear(f"{root}patch_embed.proj", vision, 3 * 64)
    found[f"{root}patch_embed.proj.weight"] = found[f"{root}patch_embed.proj.weight"].view(vision, 3, 8, 8)
    for layer in (f"{root}blocks.{i}." for i in range(layers)):
        norm(f"{layer}norm1", vision), norm(f"{layer}norm2", vision)
        linear(f"{layer}attn.qkv", 3 * vision, vision), linear(f"{layer}attn.proj", vision, vision)
        linear(f"{layer}mlp.fc1", 4 * vision, vision), linear(f"{layer}mlp.fc2", vision, 4 * vision)
    norm(f"{root}norm", vision)

    root = "blip.text_encoder."
    found[f"{root}embeddings.word_embeddings.weight"] = torch.randn(len(WORDS), text)
    found[f"{root}embeddings.position_embeddings.weight"] = 0.1 * torch.randn(40, text)
    found[f"{root}embeddings.position_ids"] = torch.arange(40)[None]
    norm(f"{root}embeddings.LayerNorm", text)
    for layer in (f"{root}encoder.layer.{i}." for i in range(layers)):
        for part, width in (("attention", text), ("crossattention", vision)):
            linear(f"{layer}{part}.self.query", text, text)
            linear(f"{layer}{part}.self.key", text, width), linear(f"{layer}{part}.self.value", text, width)
            linear(f"{layer}{part}.output.dense", text, text), norm(f"{layer}{part}.output.LayerNorm", text)
        linear(f"{layer}intermediate.dense", 2 * text, text), linear(f"{layer}output.dense", text, 2 * text)
        norm(f"{layer}output.LayerNorm", text)
    linear("blip.vision_proj", 8, vision), linear("blip.text_proj", 8, text)
    return found | head_tensors((text, 64, 32, 16, 8, 1), "mlp.")


def save_imagereward(folder: Path) -> None:
    torch.save(blip_tensors(), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


@dataclass(frozen=True)
class Case:
    """A reward with a network: how a model of it is saved, loaded and asked."""

    save: Callable[[Path], None]
    scorer: Any
    reward: Any
    reads: bool = True  # the prompt


CASES = {
    "hpsv2": Case(save_hpsv2, HpsScorer, HPSv2),
    "siglip": Case(save_siglip, SiglipScorer, SiglipScore),
    "aesthetic": Case(save_aesthetic, AestheticScorer, Aesthetic, reads=False),
    "imagereward": Case(save_imagereward, ImageRewardScorer, ImageReward),
}
