"""A random tiny Z-Image pipeline: 32 x 32 pixels are 8 x 8 latents of 4 channels, which are 16 tokens, padded to 32."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from scripts.tiny.models import build_vae
from tests.models.tiny_qwen_tokenizer import build_tokenizer


def build_z_image() -> Any:
    """With the kinds of parts of Tongyi-MAI/Z-Image."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=build_vae((8, 16, 16)),
            text_encoder=build_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=ZImageTransformer2DModel(
                in_channels=4,
                dim=32,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=16,
                axes_dims=[4, 6, 6],
            ),
        )


def build_text_encoder(vocab_size: int, width: int = 16) -> Qwen3Model:
    """Three layers, of which the pipeline reads two."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
