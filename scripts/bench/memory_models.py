"""The published sizes of six models and of PickScore, and their modules without weights.

The numbers are those of each repository's config.json as far as it is known; they were typed by hand, as no repository
could be fetched here. What is left to the library's default is what the default was made for. `Model.published` is what
the model is said to have, in billions of parameters of its transformer; tests compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from ml_collections import ConfigDict
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from flow_grpo.models.loading import class_of
from flow_grpo.models.registry import FLUX, FLUX2_KLEIN, QWEN_IMAGE, SD3, Z_IMAGE, Family
from flow_grpo.recipes.registry import get_config
from flow_grpo.rewards.clip import ClipScorer, PickScore
from flow_grpo.rewards.image_path import ImagePath
from flow_grpo.types import PromptEmbeds

Parts = Callable[[], nn.Module]


@dataclass(frozen=True)
class Model:
    """One model: its parts, and what a prompt becomes."""

    name: str
    family: Family
    published: tuple[float, float]  # parameters of the transformer, in billions: between these
    recipe: str  # whose settings it is counted at
    transformer: Parts
    vae: Parts
    text_encoders: tuple[tuple[Parts, int], ...]  # and of how many tokens each reads a prompt
    prompt: tuple[int, int]  # tokens and width of a prompt's embedding
    pooled: int = 0  # width of the pooled one; 0: none
    hidden_states: bool = False  # whether its pipeline asks the text encoder for those of every layer


# --- parts ------------------------------------------------------------------------------------------------


def _kl_vae(scaling: float, shift: float) -> Parts:
    return lambda: diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _sd3(**sizes: Any) -> Parts:
    return lambda: diffusers.SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        attention_head_dim=64,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        qk_norm="rms_norm",
        **sizes,
    )


def _clip_text(width: int, layers: int, heads: int, projected: bool = True) -> Parts:
    def build() -> nn.Module:
        settings: Any = transformers.CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=width,
            hidden_act="gelu" if width > 1000 else "quick_gelu",
        )
        kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
        return kind(settings)

    return build


def _t5_xxl() -> nn.Module:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
        )
    )


def _qwen3_4b(head: bool) -> Parts:
    def build() -> nn.Module:
        settings = transformers.Qwen3Config(
            vocab_size=151936,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        )
        return (transformers.Qwen3ForCausalLM if head else transformers.Qwen3Model)(settings)

    return build


def _qwen25_vl_7b() -> nn.Module:
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
    }
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    settings = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return transformers.Qwen2_5_VLForConditionalGeneration(settings)


def _pickscore() -> nn.Module:
    """CLIP ViT-H/14."""
    vision = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    }
    text = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    }
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)  # type: ignore[arg-type]
    )


CLIP_L = (_clip_text(768, 12, 12), 77)
SD3_TEXT = (CLIP_L, (_clip_text(1280, 32, 20), 77), (_t5_xxl, 256))

MODELS = (
    Model(
        "SD3.5-medium", SD3, (2.2, 2.5), "pickscore_sd3",
        transformer=_sd3(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
        ),
        vae=_kl_vae(1.5305, 0.0609), text_encoders=SD3_TEXT, prompt=(77 + 256, 4096), pooled=2048,
    ),
    Model(
        "SD3.5-large", SD3, (7.9, 8.2), "pickscore_sd3",
        transformer=_sd3(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192),
        vae=_kl_vae(1.5305, 0.0609), text_encoders=SD3_TEXT, prompt=(77 + 256, 4096), pooled=2048,
    ),
    Model(
        "FLUX.1-dev", FLUX, (11.8, 12.1), "pickscore_flux_grpo",
        transformer=lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
        vae=_kl_vae(0.3611, 0.1159), text_encoders=((_clip_text(768, 12, 12, projected=False), 77), (_t5_xxl, 512)),
        prompt=(512, 4096), pooled=768,
    ),
    Model(
        "FLUX.2-klein-4B", FLUX2_KLEIN, (3.8, 4.2), "pickscore_flux2_klein_grpo",
        transformer=lambda: diffusers.Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=3 * 2560,
            guidance_embeds=False,
        ),
        vae=lambda: diffusers.AutoencoderKLFlux2(), text_encoders=((_qwen3_4b(head=True), 512),),
        prompt=(512, 3 * 2560), hidden_states=True,
    ),
    Model(
        "Qwen-Image", QWEN_IMAGE, (20.0, 20.9), "pickscore_qwen_image_grpo",
        transformer=lambda: diffusers.QwenImageTransformer2DModel(),
        vae=lambda: diffusers.AutoencoderKLQwenImage(), text_encoders=((_qwen25_vl_7b, 512),),
        prompt=(512, 3584), hidden_states=True,
    ),
    Model(
        "Z-Image", Z_IMAGE, (5.9, 6.3), "pickscore_z_image_grpo",
        transformer=lambda: diffusers.ZImageTransformer2DModel(),
        vae=_kl_vae(0.3611, 0.1159), text_encoders=((_qwen3_4b(head=False), 512),),
        prompt=(512, 2560), hidden_states=True,
    ),
)  # fmt: skip


# --- whole ------------------------------------------------------------------------------------------------


def build_family(model: Model, device: torch.device, precision: torch.dtype) -> Any:
    """The class of its family, on what that reads of a pipeline: transformer and VAE (float32).

    Every prompt becomes the same embedding, of the published shape.
    """
    with device:
        parts = {"transformer": model.transformer().to(precision), "vae": model.vae()}
    pipeline = SimpleNamespace(
        **parts,
        components=parts,
        vae_scale_factor=8,
        config=SimpleNamespace(is_distilled=False),
        set_progress_bar_config=lambda **_: None,
    )
    kind: Any = class_of(model.family)
    family = kind(pipeline, 3.5)
    family.encode = lambda prompt, max_sequence_length: prompt_embeds(model, device)
    return family


def prompt_embeds(model: Model, device: torch.device) -> PromptEmbeds:
    """Of one prompt, in bf16, as long as its family takes them; every token is the prompt's own."""
    tokens, width = model.prompt
    pooled = torch.zeros(1, model.pooled, dtype=torch.bfloat16, device=device) if model.pooled else None
    return PromptEmbeds(
        torch.zeros(1, tokens, width, dtype=torch.bfloat16, device=device),
        pooled,
        full_mask(tokens, str(device)) if model.family in (QWEN_IMAGE, Z_IMAGE) else None,
    )


@lru_cache
def full_mask(tokens: int, device: str) -> Tensor:
    """(1, tokens): with data, as networks read its numbers."""
    with unset_fake_temporarily():
        return torch.ones(1, tokens, dtype=torch.bool, device=device)


def build_reward(device: torch.device, dtype: torch.dtype = torch.float32) -> PickScore:
    """PickScore as `ClipScorer` loads it, without tokenizer: the features of every text are zeros."""
    scorer: Any = ClipScorer.__new__(ClipScorer)
    scorer.device, scorer.offload = device, False
    scorer.model = _pickscore().to(device, dtype).eval().requires_grad_(False)
    scorer.image_path = ImagePath(224, (224, 224), (0.5,) * 3, (0.5,) * 3)
    scorer._text_feature = lambda text: torch.zeros(1024, dtype=dtype, device=device)
    return PickScore(scorer)


def parameters(module: nn.Module) -> int:
    """How many it has."""
    return sum(parameter.numel() for parameter in module.parameters())


def settings(model: Model, pixels: int, tuning: str) -> ConfigDict:
    """Its recipe's, one image at a time, on prompts that are here, without a KL penalty."""
    config = get_config(model.recipe)
    config.resolution, config.use_lora, config.train.beta, config.train.ema = pixels, tuning == "lora", 0.0, True
    config.lora.target_modules = config.lora.target_modules or model.family.lora_targets
    for name in ("train", "test", "eval_diversity"):
        config.prompts[name] = "assets/prompts/tiny/test.txt"
    return config
