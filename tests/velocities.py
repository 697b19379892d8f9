"""Velocities, paths, noise and probes for the tests of the divergence and the entropy."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flow_grpo.entropy import (
    DivergenceEstimator,
)
from flow_grpo.randomness import keyed_generator
from scripts.diversity_metrics.toy_flows import GaussianFlow

EXACT = DivergenceEstimator(exact=True)
FLOW = GaussianFlow.random(8)


def path(steps: int, rising: bool = False, last: float = 0.0) -> torch.Tensor:
    sigmas = torch.linspace(1, last, steps + 1, dtype=torch.float64)
    return sigmas.flip(0) if rising else sigmas


def noise(batch: int, dims: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generators(batch: int, seed: int = 0):
    """Probes keyed by (seed, evaluation, sample)."""
    return lambda evaluation: [keyed_generator(seed, "probe", evaluation, i) for i in range(batch)]


def curved(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """A velocity whose Jacobian is full and differs from point to point."""
    weight = torch.sin(torch.arange(x.shape[1] ** 2, dtype=x.dtype)).view(x.shape[1], -1)
    return torch.tanh(x @ weight * (0.5 + sigma)) - 0.3 * x


class PeakMemory(TorchDispatchMode):
    """The most bytes, beyond what was there before, that the tensors made inside the block took together."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.live = {key: kept for key, kept in self.live.items() if not kept[0].expired()}
        self._add((args, kwargs), 0)  # what was there before
        result = function(*args, **(kwargs or {}))
        self._add(result, 1)
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result

    def _add(self, values, counted):
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live.setdefault(storage._cdata, (StorageWeakRef(storage), counted * storage.nbytes()))
