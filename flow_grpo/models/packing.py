"""Latents as the tokens that some transformers take: squares of 2 x 2, row by row."""

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

SIDE = 2  # of the square of latents that is one token


def pack(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> tokens (B, (h / 2) (w / 2), 4 C)."""
    return pixel_unshuffle(latents, SIDE).flatten(2).mT


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens -> latents (B, C, height, width): `pack` undone."""
    return pixel_shuffle(tokens.mT.unflatten(2, (height // SIDE, width // SIDE)), SIDE)
