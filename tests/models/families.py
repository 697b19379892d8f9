"""Random tiny pipelines of every family, of diffusers' own classes, and how the stock pipeline is called.

To add a family: a file with a builder beside this one, and a `Case` below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from scripts.tiny import models as tiny_models
from tests.models import tiny_qwen_image, tiny_z_image


@dataclass(frozen=True)
class Case:
    """One family, small enough for tests."""

    name: str
    build: Callable[[], Any]  # its pipeline, with random weights, the same at every call
    guided: Callable[[float], Mapping[str, Any]]  # our guidance scale, not 1 -> the stock pipeline's arguments
    unguided: Mapping[str, Any] = field(default_factory=dict)  # the same at scale 1
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


def build_qwen_image() -> Any:
    """That of `tiny_qwen_image`."""
    pipeline = tiny_qwen_image.build_pipeline()
    shake(pipeline.transformer)
    return pipeline


def build_z_image() -> Any:
    """That of `tiny_z_image`."""
    pipeline = tiny_z_image.build_pipeline()
    shake(pipeline.transformer)
    return pipeline


CASES = (
    Case("sd3", build_sd3, lambda scale: {"guidance_scale": scale}, {"guidance_scale": 1.0}),
    Case(
        "qwen_image",
        build_qwen_image,
        lambda scale: {"true_cfg_scale": scale, "negative_prompt": ["", ""]},
        {"true_cfg_scale": 1.0},
        max_sequence_length=32,
    ),
    Case(
        "z_image",
        build_z_image,
        lambda scale: {"guidance_scale": scale - 1},  # how much of the difference is added to the conditional velocity
        {"guidance_scale": 0.0},
        max_sequence_length=64,
    ),
)
