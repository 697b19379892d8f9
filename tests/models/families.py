"""Random tiny pipelines of every family, of diffusers' own classes, and how the stock pipeline is called.

To add a family: a file with a builder beside this one, and a `Case` below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from scripts.tiny import models as tiny_models
from tests.models.tiny_flux import build_flux
from tests.models.tiny_flux2_klein import build_flux2_klein
from tests.models.tiny_qwen_image import build_qwen_image
from tests.models.tiny_z_image import build_z_image


def negative_texts(pipeline: Any, negatives: list[str], max_sequence_length: int) -> Mapping[str, Any]:
    """The stock pipeline's arguments for a negative prompt of each image."""
    return {"negative_prompt": negatives}


def negative_embeds(pipeline: Any, negatives: list[str], max_sequence_length: int) -> Mapping[str, Any]:
    """Of FLUX.2-klein's pipeline, which takes no text."""
    embeds, _ = pipeline.encode_prompt(negatives, max_sequence_length=max_sequence_length)
    return {"negative_prompt_embeds": embeds}


@dataclass(frozen=True)
class Case:
    """One family, small enough for tests."""

    name: str
    build: Callable[[], Any]  # its pipeline, with random weights, the same at every call
    guided: Callable[[float], Mapping[str, Any]]  # our guidance scale, not 1 -> the stock pipeline's arguments
    unguided: Mapping[str, Any] = field(default_factory=dict)  # the same at scale 1
    away_from: Callable[[Any, list[str], int], Mapping[str, Any]] = negative_texts  # see there
    max_sequence_length: int = 8  # tokens of a prompt, in which the longest of the tests has room


def shake(transformer: torch.nn.Module) -> None:
    """Give the zero-initialised output and modulation layers weights, so that every input matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def build_sd3() -> Any:
    """That of `tests/conftest.py`."""
    sizes = {"vae_channels": (8, 16, 16), "text_width": 16, "width": 32, "heads": 2, "layers": 2}
    pipeline = tiny_models.build_pipeline(0, **sizes)
    shake(pipeline.transformer)
    return pipeline


def shaken(build: Callable[[], Any]) -> Callable[[], Any]:
    """The same with a transformer whose every input matters."""

    def build_shaken() -> Any:
        pipeline = build()
        shake(pipeline.transformer)
        return pipeline

    return build_shaken


def true_guidance(scale: float) -> Mapping[str, Any]:
    """Classifier-free guidance of pipelines whose `guidance_scale` is the distilled one (ours by default), or none."""
    return {"true_cfg_scale": scale, "negative_prompt": ["", ""]}


def added_guidance(scale: float) -> Mapping[str, Any]:
    """Z-Image's: how much of the difference is added to the conditional velocity."""
    return {"guidance_scale": scale - 1}


CASES = (
    Case("sd3", build_sd3, lambda scale: {"guidance_scale": scale}, {"guidance_scale": 1.0}),
    Case("flux", shaken(build_flux), true_guidance),
    Case("flux2_klein", shaken(build_flux2_klein), lambda scale: {"guidance_scale": scale}, {"guidance_scale": 1.0},
         away_from=negative_embeds),
    Case("qwen_image", shaken(build_qwen_image), true_guidance, max_sequence_length=32),
    Case("z_image", shaken(build_z_image), added_guidance, {"guidance_scale": 0.0}, max_sequence_length=64),
)  # fmt: skip
