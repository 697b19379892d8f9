"""Where the time of an epoch goes, and the most memory that it took."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

KIB = 1 if sys.platform == "darwin" else 1024  # bytes in the unit of getrusage


class Phases:
    """Wall-clock seconds of this process by the name of a phase, a GPU's queue included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of a block; phases do not overlap."""
        start = time.perf_counter()
        yield
        self._wait()
        self._seconds[name] += time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def begin(self) -> None:
        """Forget what was, the peak of a GPU's memory too."""
        self._seconds.clear()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, since `begin`."""
        return dict(self._seconds)

    def peak_memory_gib(self) -> float:
        """On a GPU the most that was allocated since `begin`; on a CPU the most that the process has ever held."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB / 2**30
