"""What training and evaluation ask of a family of flow-matching models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from flow_grpo.types import PromptEmbeds


class ModelFamily(Protocol):
    """A loaded pipeline of one family. Everything that is the family's own is here, and nothing of a training.

    Latents are what the sampler moves: float32, VAE-scaled, packed where the transformer takes them so.
    """

    pipeline: Any  # diffusers' pipeline
    transformer: Any  # the modules, whose classes are the family's
    vae: Any

    def __init__(self, pipeline: Any) -> None: ...

    # --- the prompt's side
    def encode(self, prompt: str, max_sequence_length: int) -> PromptEmbeds:
        """The conditioning of one prompt, by however many text encoders there are."""

    # --- the network
    @staticmethod
    def velocity(transformer: nn.Module, latents: Tensor, sigma: float, embeds: PromptEmbeds) -> Tensor:
        """One forward: latents (B, ...) at a noise level in (0, 1] -> v = dx/dsigma, at least float32.

        `transformer`: this family's, with these weights or others. No classifier-free guidance: see
        `diffusers_patch.velocity.guided_velocity`. A model whose guidance is distilled into it reads its scale here.
        """

    def sigmas(self, num_steps: int, resolution: int) -> Tensor:
        """Noise levels of a sampler of so many steps, by the pipeline's own scheduler: (num_steps + 1,), down to 0."""

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """Of one image's latents."""

    # --- the image's side
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, ...) -> images (B, 3, H, W) in [0, 1], float32, differentiable."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> the latents of the posterior's mode, float32."""

    # --- LoRA and files
    def modules_without_effect(self) -> Sequence[str]:
        """Names of the transformer's modules that no gradient reaches."""

    @classmethod
    def empty_transformer(cls, settings: dict[str, Any]) -> nn.Module:
        """One of these settings, without weights: what its modules are called."""

    @classmethod
    def load_transformer(cls, folder: Path) -> tuple[nn.Module, Sequence[str]]:
        """The transformer that full fine-tuning saved, in float32, and the names of the weights that it lacks."""

    @classmethod
    def save_lora(cls, folder: Path, layers: dict[str, Tensor]) -> None:
        """Write LoRA layers in the file that stock diffusers loads into this family's pipeline."""
