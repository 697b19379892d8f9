"""The head of the aesthetic predictor and of ImageReward: linear maps one after another, with nothing between them.

Between them was dropout, in training. It still counts in the names: layers.0, 2, 4, 6 and 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

PLACES = (0, 2, 4, 6, 7)


class LinearHead(nn.Module):
    """Five linear maps, features (..., d) -> (..., 1)."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """From the six sizes: of the features, between the maps, and 1."""
        super().__init__()
        self.layers = nn.ModuleDict(
            {str(place): nn.Linear(*pair) for place, pair in zip(PLACES, pairwise(sizes), strict=True)}
        )

    @property
    def dtype(self) -> torch.dtype:
        """That of its weights."""
        return next(self.parameters()).dtype

    @staticmethod
    def sizes(weights: Mapping[str, Tensor], prefix: str = "") -> tuple[int, ...]:
        """Those that published weights have; KeyError for those of another head."""
        shapes = [weights[f"{prefix}layers.{place}.weight"].shape for place in PLACES]
        return (shapes[0][1], *(rows for rows, _ in shapes))

    def forward(self, features: Tensor) -> Tensor:
        """The last map's answers."""
        for layer in self.layers.values():
            features = layer(features)
        return features
