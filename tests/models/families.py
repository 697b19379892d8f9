"""Random tiny pipelines of every family, of diffusers' own classes, and how the stock pipeline is called.

To add a family: a file with a builder beside this one, and a `Case` below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from scripts.tiny import models as tiny_models


@dataclass(frozen=True)
class Case:
    """One family, small enough for tests."""

    name: str
    build: Callable[[], Any]  # its pipeline, with random weights, the same at every call
    guided: Callable[[float], Mapping[str, Any]]  # our guidance scale, not 1 -> the stock pipeline's arguments
    unguided: Mapping[str, Any] = field(default_factory=dict)  # the same at scale 1


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


CASES = (
    Case("sd3", build_sd3, lambda scale: {"guidance_scale": scale}, {"guidance_scale": 1.0}),
)  # fmt: skip
