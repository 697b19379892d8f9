"""Group-relative advantages (GRPO, arXiv 2402.03300)."""

from __future__ import annotations

import torch
from torch import Tensor

ADVANTAGE_MODES = ("all", "positive", "negative", "weighted")
ADVANTAGE_STDS = ("group", "batch", "none")
EPSILON = 1e-4  # added to the standard deviation, as in Flow-GRPO
POSITIVE_WEIGHT = 0.1  # lambda of `weighted`, arXiv 2506.01347


def group_advantages(rewards: Tensor, group_ids: Tensor, advantage_std: str = "group") -> Tensor:
    """A = (R - mean of the group) / (std + 1e-4), or with "none" the difference alone.

    Args:
        rewards: (N,), over all processes.
        group_ids: (N,) int64; images with the same id share a prompt. Groups may differ in size.
        advantage_std: "group": the standard deviation of the image's group; "batch": of all N rewards; "none".

    Returns:
        (N,) float64, exactly 0 in groups of equal float32 rewards, whose sums float64 holds without rounding. The
        standard deviation is the population's (divided by n, not n - 1), as in Flow-GRPO.

    Raises:
        ValueError: unknown `advantage_std`.
    """
    r = rewards.double()
    index, counts = _group_index(group_ids)
    mean = _group_sum(r, index, counts) / counts
    centred = r - mean[index]
    if advantage_std == "none":
        return centred
    if advantage_std == "batch":
        return centred / (r.std(correction=0) + EPSILON)
    if advantage_std == "group":
        variance = _group_sum(centred.square(), index, counts) / counts
        return centred / (variance.sqrt()[index] + EPSILON)
    raise ValueError(f"advantage_std is {advantage_std!r}; it must be one of {ADVANTAGE_STDS}")


def apply_advantage_mode(advantages: Tensor, mode: str) -> Tensor:
    """Keep the part of the advantages that `mode` trains on.

    all: A. positive (PSR): max(A, 0). negative (NSR): min(A, 0). weighted: 0.1 max(A, 0) + min(A, 0).
    The names are those of arXiv 2506.01347, where rewards are binary and the models are language models; here they
    act on group-normalised continuous rewards.

    Raises:
        ValueError: unknown mode.
    """
    if mode == "all":
        return advantages
    if mode == "positive":
        return advantages.clamp(min=0)
    if mode == "negative":
        return advantages.clamp(max=0)
    if mode == "weighted":
        return POSITIVE_WEIGHT * advantages.clamp(min=0) + advantages.clamp(max=0)
    raise ValueError(f"advantage_mode is {mode!r}; it must be one of {ADVANTAGE_MODES}")


def zero_std_fraction(rewards: Tensor, group_ids: Tensor) -> float:
    """Fraction of groups whose rewards are all equal: they teach nothing."""
    index, counts = _group_index(group_ids)
    low = torch.full((len(counts),), torch.inf, dtype=rewards.dtype, device=rewards.device)
    low = low.scatter_reduce(0, index, rewards, "amin")
    high = torch.full_like(low, -torch.inf).scatter_reduce(0, index, rewards, "amax")
    return (low == high).double().mean().item()


def _group_index(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Position of each image's group among the distinct groups (N,), and the groups' sizes (G,)."""
    _, index, counts = group_ids.unique(return_inverse=True, return_counts=True)
    return index, counts


def _group_sum(values: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """Sum of the values of each group: (G,)."""
    return values.new_zeros(len(counts)).index_add(0, index, values)
