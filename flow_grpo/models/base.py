"""What training and evaluation ask of a family of flow-matching models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from flow_grpo.types import PromptEmbeds


class ModelFamily(Protocol):
    """A loaded pipeline of one family. Everything that is the family's own is here, and nothing of a training.

    Latents are what the sampler moves: (B, C, h, w), float32, VAE-scaled. Where the transformer takes them packed, as
    tokens, `velocity` packs and unpacks them; no other code knows of it.
    """

    pipeline: Any  # diffusers' pipeline
    transformer: Any  # the modules, whose classes are the family's
    vae: Any

    def __init__(self, pipeline: Any, distilled_guidance: float) -> None:
        """`distilled_guidance`: the scale of a model whose guidance is an input of its network; others ignore it."""

    # --- the prompt's side
    def encode(self, prompt: str, max_sequence_length: int) -> PromptEmbeds:
        """The conditioning of one prompt, by however many text encoders there are."""

    # --- the network
    def velocity(self, transformer: nn.Module, latents: Tensor, sigma: float, embeds: PromptEmbeds) -> Tensor:
        """One forward: latents (B, C, h, w) at a noise level in (0, 1] -> v = dx/dsigma, at least float32.

        In our sign and time (v = e - x_0, sigma = 1 noise), whatever the network predicts. `transformer`: this
        family's, with these weights or others. No classifier-free guidance: see `guide`.
        """

    def guide(self, v_uncond: Tensor, v_cond: Tensor, scale: float) -> Tensor:
        """The velocity under classifier-free guidance of both halves, each (B, C, h, w), as the stock pipeline has it.

        At scale 1 it is `v_cond`. Most families: `diffusers_patch.velocity.linear_guidance`.
        """

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """Noise levels of a sampler of so many steps, as the stock pipeline has them: (num_steps + 1,), down to 0."""

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(C, h, w) of the latents of an image of so many pixels."""

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
