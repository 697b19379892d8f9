"""Start a process: check the configuration against how it was launched, then set up accelerate."""

from __future__ import annotations

import os

import diffusers
import torch
import transformers
from accelerate import Accelerator
from ml_collections import ConfigDict

from flow_grpo.settings import Settings, resolve


def launch(config: ConfigDict) -> tuple[Settings, Accelerator]:
    """Resolve the configuration for the processes that were launched, and make their accelerator.

    Raises:
        ConfigError: see `settings.resolve`.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun and by accelerate launch
    cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true")
    settings = resolve(config, num_processes, cuda)
    if settings.config.num_threads > 0:
        torch.set_num_threads(settings.config.num_threads)
    diffusers.utils.logging.disable_progress_bar()  # our own bars tell what is worth telling
    transformers.utils.logging.disable_progress_bar()
    return settings, Accelerator(mixed_precision=settings.config.mixed_precision, cpu=not cuda)
