"""Averages of what an epoch logs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


class MeanMetrics:
    """Weighted means of named scalars; tensors are not read back from the device before `result`."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._weights: dict[str, list[float]] = defaultdict(list)

    def add(self, values: Mapping[str, Tensor | float], weight: float = 1.0) -> None:
        """Take one observation of each scalar, e.g. of a microbatch with its size as weight."""
        for name, value in values.items():
            self._values[name].append(torch.as_tensor(value, dtype=torch.float32).detach())
            self._weights[name].append(weight)

    def result(self, accelerator: Accelerator) -> dict[str, float]:
        """The mean of each scalar over the observations of all processes, which must have added the same names.

        A name whose observations all weigh nothing is left out: a process adds one for what only others have observed.
        """
        if not self._values:
            return {}
        sums = []
        for name, values in self._values.items():
            weights = torch.tensor(self._weights[name], device=accelerator.device)
            stacked = torch.stack([value.to(accelerator.device) for value in values])
            sums.append(torch.stack([(stacked * weights).sum(), weights.sum()]))
        totals = accelerator.reduce(torch.stack(sums), reduction="sum")  # (names, 2)
        named = dict(zip(self._values, totals.unbind(), strict=True))
        return {name: (total / weight).item() for name, (total, weight) in named.items() if weight > 0}
