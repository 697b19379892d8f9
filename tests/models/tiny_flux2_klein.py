"""A random tiny FLUX.2-klein, of diffusers' and transformers' own classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from scripts.tiny import data as tiny_data

TEXT_WIDTH, LAYERS = 16, 28  # of the text encoder; its layers 9, 18 and 27 are read
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"


def build_qwen_tokenizer(corpus: Sequence[str]) -> Qwen2Tokenizer:
    """Byte-level BPE that spells each word of `corpus`, after a space, from its left; and a short chat template."""
    words = dict.fromkeys("\u0120" + word for line in corpus for word in line.split())  # \u0120 is the space
    merges: list[Any] = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges), "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_flux2_klein(is_distilled: bool = False) -> Any:
    """FLUX.2-klein-base's parts; 32 x 32 images are 4 x 4 tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = build_qwen_tokenizer(tiny_data.all_captions())
        return Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=build_vae(),
            text_encoder=Qwen3ForCausalLM(
                Qwen3Config(
                    vocab_size=len(tokenizer),
                    hidden_size=TEXT_WIDTH,
                    intermediate_size=TEXT_WIDTH,
                    num_hidden_layers=LAYERS,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=8,
                    max_position_embeddings=512,
                )
            ),
            tokenizer=tokenizer,
            transformer=Flux2Transformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=3 * TEXT_WIDTH,
                guidance_embeds=False,
                axes_dims_rope=(4, 4, 4, 4),
            ),
            is_distilled=is_distilled,
        )


def build_vae() -> AutoencoderKLFlux2:
    """With statistics of the latents' channels that normalising by them changes."""
    stages = 3
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=tiny_data.RESOLUTION,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae
