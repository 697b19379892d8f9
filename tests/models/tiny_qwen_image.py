"""A random tiny Qwen-Image pipeline: 32 x 32 pixels are 8 x 8 latents of 4 channels, which are 16 tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.models.tiny_qwen_tokenizer import build_tokenizer

TEMPLATE = (  # the pipeline's own words, of which it drops the first 34 tokens: each word must be one
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:\nuser\nassistant\n"
)


def build_qwen_image() -> Any:
    """With the scheduler and the kinds of parts of Qwen/Qwen-Image."""
    tokenizer = build_tokenizer(TEMPLATE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=1.0,
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=0.9,
                max_image_seq_len=8192,
                shift_terminal=0.02,
            ),
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 2, 2],
                num_res_blocks=1,
                temperal_downsample=[False, True],
                latents_mean=[-0.7571, -0.7089, -0.9113, 0.1075],
                latents_std=[2.8184, 1.4541, 2.3275, 2.6558],
            ),
            text_encoder=build_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                axes_dims_rope=(4, 6, 6),
            ),
        )


def build_text_encoder(vocab_size: int, width: int = 16) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers of text, and one of an image tower that no prompt reaches."""
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": vocab_size,
                "bos_token_id": None,
                "eos_token_id": None,
                "hidden_size": width,
                "intermediate_size": 2 * width,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            vision_config={
                "depth": 1,
                "hidden_size": width,
                "intermediate_size": width,
                "num_heads": 2,
                "out_hidden_size": width,
                "fullatt_block_indexes": [0],
            },
        )
    )
