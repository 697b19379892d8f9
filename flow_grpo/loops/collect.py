"""Which prompts an epoch trains on.

The order of the prompts is an infinite stream: one keyed permutation of the dataset after another. An epoch takes the
next `groups` entries, from a position that checkpoints keep, whatever the number of processes; every prompt is used
once before any is used again, also where the number of groups changes on the way.
"""

from __future__ import annotations

import torch

from flow_grpo.batching import BatchPlan
from flow_grpo.prompts import PromptDataset
from flow_grpo.randomness import keyed_generator
from flow_grpo.types import PromptBatch


def epoch_prompts(dataset: PromptDataset, plan: BatchPlan, seed: int, start: int, rank: int) -> PromptBatch:
    """The prompts of the images that process `rank` makes in an epoch: each of its prompts `group_size` times.

    A group may be split between processes; its members share `group_ids`.

    Args:
        start: position in the stream, the number of prompts that the epochs before have drawn.
    """
    sample_ids = torch.arange(plan.images)[plan.process_slice(rank)]  # (N,)
    group_ids = sample_ids // plan.group_size  # (N,)
    drawn = _stream(len(dataset), seed, start=start, count=plan.groups)
    rows = [drawn[group] for group in group_ids.tolist()]
    return PromptBatch(
        prompts=tuple(dataset.prompts[row] for row in rows),
        metadata=tuple(dataset.metadata[row] for row in rows),
        sample_ids=sample_ids,
        group_ids=group_ids,
    )


def _stream(size: int, seed: int, start: int, count: int) -> list[int]:
    """Entries start ... start + count - 1 of the stream of permutations of range(size)."""
    first, last = start // size, (start + count - 1) // size
    passes = [torch.randperm(size, generator=keyed_generator(seed, "prompts", i)) for i in range(first, last + 1)]
    offset = start - first * size
    return torch.cat(passes)[offset : offset + count].tolist()
