"""A random tiny FLUX.1, of diffusers' and transformers' own classes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel

from scripts.tiny import data as tiny_data
from scripts.tiny import models as tiny_models

WIDTH = 32  # of the transformer, and of both text encoders


def build_flux(guidance_embeds: bool = True) -> Any:
    """FLUX.1-dev's parts; FLUX.1-schnell's without `guidance_embeds`. 32 x 32 images are 4 x 4 tokens."""
    corpus = tiny_data.all_captions()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer, tokenizer_2 = tiny_models.build_clip_tokenizer(corpus), tiny_models.build_t5_tokenizer(corpus)
        clip = tiny_models.build_text_encoder(tokenizer, "quick_gelu", WIDTH, 2).config
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4),
            vae=tiny_models.build_vae((8, 16, 16)),
            text_encoder=CLIPTextModel(CLIPTextConfig(**clip.to_dict())),
            tokenizer=tokenizer,
            text_encoder_2=tiny_models.build_t5_encoder(tokenizer_2, WIDTH, 2, 2),
            tokenizer_2=tokenizer_2,
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=WIDTH // 2,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(4, 6, 6),
            ),
        )
