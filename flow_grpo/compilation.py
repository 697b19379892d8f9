"""The transformer's blocks compiled by torch: the same numbers up to rounding, in fewer passes over the memory.

A block is compiled, not the network: the many blocks of one kind share a graph, and what each family does around them
stays as it is. Graphs are of fixed shapes, of the batches that training is made of; a batch of another size, the last
of an epoch or an evaluation's, runs the same blocks eagerly, so that no odd number of images compiles anew. LoRA on and
off, with gradient and without, are graphs of their own. What differentiates a block in another way than by one
backward pass (several probes of one forward, forward mode, second derivatives) takes `Compiled.eager`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flow_grpo.parallel import blocks_of
from flow_grpo.settings import Settings

# "auto" compiles from so many evaluations of a process on. The tiny SD3 on one core, the smallest network there is:
# 84 s of compiling are won back after 84 s / 0.2 ms = 420,000 forwards. A larger network wins more by each.
PAYS_FROM = 500_000
TOKENS = (
    64  # prompts that differ in length are padded to multiples of it, so that not each length is a graph of its own
)
GRAPHS = 64  # of one kind of block, at most; torch's 8 are fewer than sizes x LoRA x gradient


def is_compiled(settings: Settings) -> bool:
    """Whether the blocks of a run's transformer are compiled.

    "auto" counts the sampler's evaluations of the whole run, not those that are left: resumed and unbroken runs do the
    same. A run that the clock ends has no such count, and is not compiled.
    """
    config = settings.config
    if config.compile != "auto":
        return bool(config.compile == "on")
    if config.max_seconds > 0 or not settings.can_compile:
        return False
    images = config.num_epochs * settings.plan.images_per_process
    return images * config.sample.num_steps * _halves(settings) >= PAYS_FROM


def batch_sizes(settings: Settings) -> frozenset[int]:
    """The batches that meet the network in every epoch: of the sampler and of training, on one process."""
    config, plan = settings.config, settings.plan
    sizes = min(config.sample.batch_size, plan.images_per_process), min(config.train.batch_size, plan.images_per_update)
    return frozenset(_halves(settings) * size for size in sizes)


def _halves(settings: Settings) -> int:
    """Latents in a forward for each image: with guidance, both halves run at once, or one after the other."""
    config = settings.config
    together = config.sample.guidance_scale != 1 and not config.drtune.detach_unconditional
    return 2 if together else 1


class Compiled:
    """Transformers whose blocks are compiled, for batches of these sizes alone."""

    def __init__(self, transformers: Iterable[Any], sizes: Iterable[int], backend: str = "inductor") -> None:
        """`backend`: torch's name of what makes a graph fast."""
        self.sizes, self._on = frozenset(sizes), True
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        for transformer in transformers:
            for block in blocks_of(transformer):
                self._compile(block, backend)

    def _compile(self, block: nn.Module, backend: str) -> None:
        """In place: names and hooks of the module stay. Gradient checkpointing runs what is chosen here again."""
        eager: Callable[..., Any] = block.forward
        compiled = torch.compile(eager, dynamic=False, backend=backend)

        @functools.wraps(eager)
        def forward(*args: Any, **kwargs: Any) -> Any:
            batch = len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
            return (compiled if self._on and batch in self.sizes else eager)(*args, **kwargs)

        block.forward = forward

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Nothing compiled runs in the block; backward passes of its forwards belong into it, too."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before
