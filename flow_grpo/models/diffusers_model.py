"""What the families of diffusers have in common, or most of them: files, linear guidance, scale and shift."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flow_grpo.diffusers_patch.velocity import linear_guidance


class DiffusersModel:
    """The part of a `ModelFamily` (see there what the methods are) that a family takes over, or replaces."""

    pipeline_class: ClassVar[Any]
    transformer_class: ClassVar[Any]

    def __init__(self, pipeline: Any, distilled_guidance: float = 1.0) -> None:
        self.pipeline = pipeline
        self.transformer, self.vae = pipeline.transformer, pipeline.vae
        self.distilled_guidance = distilled_guidance

    guide = staticmethod(linear_guidance)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w), a multiple of the VAE's less a shift -> images (B, 3, H, W) in [0, 1], float32."""
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return (self.vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, C, h, w): `decode` undone."""
        posterior = self.vae.encode(images.to(self.vae.device, self.vae.dtype) * 2 - 1).latent_dist
        return (posterior.mode().float() - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def modules_without_effect(self) -> Sequence[str]:
        """None."""
        return ()

    @classmethod
    def empty_transformer(cls, settings: dict[str, Any]) -> nn.Module:
        """On the meta device."""
        with torch.device("meta"):  # shapes and names alone
            return cls.transformer_class.from_config(settings)

    @classmethod
    def load_transformer(cls, folder: Path) -> tuple[nn.Module, Sequence[str]]:
        """Safe tensors alone."""
        found: Any = cls.transformer_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
        transformer, info = found
        return transformer.to(torch.float32), sorted(info["missing_keys"])

    @classmethod
    def save_lora(cls, folder: Path, layers: dict[str, Tensor]) -> None:
        """pytorch_lora_weights.safetensors."""
        cls.pipeline_class.save_lora_weights(folder, transformer_lora_layers=layers)
