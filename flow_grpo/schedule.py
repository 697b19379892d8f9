"""The learning rate of every update, by diffusers' schedules.

It follows from the settings and the number of updates applied before, which checkpoints count: no state is saved, and a
resumed run goes on as the unbroken one, or by the present settings where these were changed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler

from flow_grpo.recipes.base import DECAYING
from flow_grpo.settings import Settings


def learning_rates(settings: Settings) -> Callable[[int], float]:
    """Updates applied before -> the learning rate of the next; after the schedule's end its last one stays."""
    train, total = settings.config.train, settings.total_updates
    nothing = torch.optim.SGD([torch.zeros(())], lr=train.learning_rate)  # the schedule asks for an optimizer
    schedule = get_scheduler(
        train.lr_scheduler,
        nothing,
        num_warmup_steps=train.lr_warmup_steps,
        num_training_steps=total,
        num_cycles=train.lr_num_cycles,
        power=train.lr_power,
    )
    (factor,) = schedule.lr_lambdas
    ends = train.lr_scheduler in DECAYING  # where "cosine" would rise again
    return lambda updates: train.learning_rate * factor(min(updates, total) if ends else updates)
