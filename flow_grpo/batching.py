"""The batch arithmetic: how the images of an epoch are divided among processes and updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flow_grpo.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

MOST_IMAGES = 10_000_000  # of an epoch


@dataclass(frozen=True)
class BatchPlan:
    """How the images of an epoch are divided among processes and updates.

    Sample ids 0 ... images - 1 run through the groups in order. A process makes a contiguous slice of them, which may
    begin or end within a group. Update u trains the ids with id % updates == u: the same images on any number of
    processes, and a share of every group.
    """

    groups: int  # prompts of an epoch
    group_size: int  # images of each
    images: int  # of an epoch, over all processes
    images_per_process: int
    images_per_update: int  # per process
    updates: int  # optimizer steps into which an epoch's images are divided

    def process_slice(self, rank: int) -> slice:
        """The sample ids that process `rank` makes."""
        return slice(rank * self.images_per_process, (rank + 1) * self.images_per_process)

    def update_indices(self, update: int) -> Tensor:
        """The images of one update, (images_per_update,) int64: positions in the slice of any process."""
        import torch

        return torch.arange(update, self.images_per_process, self.updates)


def plan_batches(groups: int, group_size: int, updates: int, num_processes: int) -> BatchPlan:
    """Divide groups * group_size images evenly; where that is impossible, ConfigError names values that would work."""
    images = groups * group_size
    if images > MOST_IMAGES:
        raise ConfigError(
            f"config.sample.groups_per_epoch = {groups} groups of {group_size} are {images} images; an epoch takes at "
            f"most {MOST_IMAGES}."
        )
    if images % (num_processes * updates):
        raise ConfigError(_uneven(groups, group_size, updates, num_processes))
    return BatchPlan(
        groups=groups,
        group_size=group_size,
        images=images,
        images_per_process=images // num_processes,
        images_per_update=images // num_processes // updates,
        updates=updates,
    )


def _uneven(groups: int, group_size: int, updates: int, num_processes: int) -> str:
    """The sentence about an epoch that does not divide: the nearest numbers of groups, and of updates, that do."""
    images, parts = groups * group_size, num_processes * updates
    step = parts // math.gcd(group_size, parts)
    below = groups // step * step
    works = f"{below} or {below + step}" if below else f"{step}"
    advice = f"config.sample.groups_per_epoch = {works} would work"
    if images % num_processes == 0:
        nearest = min(_divisors(images // num_processes), key=lambda divisor: abs(divisor - updates))
        advice += f", and so would config.train.updates_per_epoch = {nearest}"
    return (
        f"config.sample.groups_per_epoch = {groups} groups of {group_size} are {images} images, which do not divide "
        f"into config.train.updates_per_epoch = {updates} equal parts on each of {num_processes} processes; {advice}."
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
