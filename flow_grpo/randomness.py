"""Random generators keyed by what they are for, never by call order or process.

One and many processes, and resumed and unbroken runs, therefore draw the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def keyed_generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU generator that depends on (seed, purpose, indices) and nothing else."""
    key = repr((seed, purpose, *map(int, indices))).encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)  # manual_seed takes 63 bits


def keyed_stream(size: int, seed: int, purpose: str, start: int, count: int) -> list[int]:
    """Entries start ... start + count - 1 of an infinite stream: one keyed permutation of range(size) after another."""
    first, last = start // size, (start + count - 1) // size
    passes = [torch.randperm(size, generator=keyed_generator(seed, purpose, i)) for i in range(first, last + 1)]
    offset = start - first * size
    return torch.cat(passes)[offset : offset + count].tolist()


def evaluation_generators(seed: int, ids: Sequence[tuple[int, int]]) -> list[torch.Generator]:
    """Of the noise of evaluation images (prompt, sample): the same in every evaluator, at every checkpoint."""
    return [keyed_generator(seed, "eval", *image) for image in ids]


def sample_generators(seed: int, purpose: str, epoch: int, sample_ids: torch.Tensor) -> list[torch.Generator]:
    """One generator for each image, as `diffusers.utils.torch_utils.randn_tensor` takes them."""
    return [keyed_generator(seed, purpose, epoch, index) for index in sample_ids.tolist()]
