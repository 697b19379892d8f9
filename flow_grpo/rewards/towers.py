"""A network of two towers, one for images and one for texts, as a scorer of images against texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flow_grpo.rewards.frozen import FrozenNetwork
from flow_grpo.rewards.image_path import ImagePath, check_images

TEXT_CACHE_SIZE = 4096  # texts whose features are kept, d floats each


class TwoTowers(FrozenNetwork, ABC):
    """Features of images and texts of unit length, and their cosine.

    Texts are encoded one by one, so a text's features do not depend on the texts beside it: a resumed run sees the same
    bits.
    """

    def __init__(
        self, network: torch.nn.Module, image_path: ImagePath, device: torch.device | str = "cpu", **options: Any
    ) -> None:
        """Take a network over; the options are FrozenNetwork's."""
        super().__init__(network, device, **options)
        self.image_path = image_path
        self._text_feature = lru_cache(maxsize=TEXT_CACHE_SIZE)(self._encode_text)

    @abstractmethod
    def _image_tower(self, pixels: Tensor) -> Tensor:
        """(B, 3, *crop) -> (B, d)."""

    @abstractmethod
    def _text_tower(self, text: str) -> Tensor:
        """One text -> (1, d)."""

    def image_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1] -> (B, d) of unit length; ValueError for other images."""
        check_images(images)
        with self.weights_here() as (dtype, precise):
            pixels = self.image_path(images.to(self.device, precise))  # (B, 3, *crop)
            return F.normalize(self._image_tower(pixels.to(dtype)).to(precise), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, d) of unit length, without gradient; cut to the longest text the model takes."""
        return torch.stack([self._text_feature(text) for text in texts])

    def cosines(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """cos(image, text) of each pair: (B, 3, H, W) and B texts -> (B,) float32."""
        if len(images) != len(texts):
            raise ValueError(f"each image needs its text, got {len(images)} images and {len(texts)} texts")
        return (self.image_features(images) * self.text_features(texts)).sum(-1)

    @torch.no_grad()
    def _encode_text(self, text: str) -> Tensor:
        """(d,)."""
        with self.weights_here() as (_, precise):
            return F.normalize(self._text_tower(text).to(precise), dim=-1)[0]
