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
    passes = [_permutation(size, seed, purpose, i) for i in range(first, last + 1)]
    offset = start - first * size
    return torch.cat(passes)[offset : offset + count].tolist()


def _permutation(size: int, seed: int, purpose: str, number: int) -> torch.Tensor:
    return torch.randperm(size, generator=keyed_generator(seed, purpose, number))


def weighted_stream(weights: Sequence[float], seed: int, purpose: str, start: int, count: int) -> list[int]:
    """`keyed_stream` of N entries by weight: of a pass of N places, entry i has N w_i / sum w, rounded up or down.

    Its expectation is that share exactly, by systematic sampling (Madow, Ann. Math. Stat. 20, 1949): N even points
    with one random offset, along the weights laid end to end. Equal weights give `keyed_stream` itself.
    """
    size = len(weights)
    lengths = torch.tensor(weights, dtype=torch.float64)
    ends = (lengths / lengths.max()).cumsum(0)  # of equal ones exactly 1, 2, ..., N
    ends = ends * (size / ends[-1])
    last_drawn = int((ends < ends[-1]).sum())  # for a point that rounding puts at the very end
    first, last = start // size, (start + count - 1) // size
    passes = []
    for i in range(first, last + 1):
        offset = torch.rand((), generator=keyed_generator(seed, f"{purpose} offset", i), dtype=torch.float64)
        rows = torch.searchsorted(ends, torch.arange(size) + offset, right=True).clamp(max=last_drawn)
        passes.append(rows[_permutation(size, seed, purpose, i)])
    begin = start - first * size
    return torch.cat(passes)[begin : begin + count].tolist()


def balanced_stream(groups: Sequence[Sequence[int]], seed: int, purpose: str, start: int, count: int) -> list[int]:
    """Members of groups: in every pass one of each group, in keyed order, and in pass i the i-th of its own stream.

    So the groups are drawn equally often, and every member of one before any of it again.
    """
    chosen = keyed_stream(len(groups), seed, purpose, start, count)
    numbers = (place // len(groups) for place in range(start, start + count))  # of passes
    return [
        groups[group][keyed_stream(len(groups[group]), seed, f"{purpose} of group {group}", number, 1)[0]]
        for group, number in zip(chosen, numbers, strict=True)
    ]


def evaluation_generators(seed: int, ids: Sequence[tuple[int, int]]) -> list[torch.Generator]:
    """Of the noise of evaluation images (prompt, sample): the same in every evaluator, at every checkpoint."""
    return [keyed_generator(seed, "eval", *image) for image in ids]


def sample_generators(seed: int, purpose: str, epoch: int, sample_ids: torch.Tensor) -> list[torch.Generator]:
    """One generator for each image, as `diffusers.utils.torch_utils.randn_tensor` takes them."""
    return [keyed_generator(seed, purpose, epoch, index) for index in sample_ids.tolist()]
