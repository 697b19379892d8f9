"""Start a process: check the configuration against how it was launched, then set up accelerate."""

from __future__ import annotations

import os

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType
from ml_collections import ConfigDict

from flow_grpo.errors import ConfigError
from flow_grpo.settings import Settings, resolve


def launch(config: ConfigDict) -> tuple[Settings, Accelerator]:
    """Resolve the configuration for the processes that were launched, and make their accelerator.

    Raises:
        ConfigError: see `settings.resolve`; or a launcher, FSDP or DeepSpeed plugin that is not supported.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun and by accelerate launch
    cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true")
    settings = resolve(config, num_processes, cuda)
    if settings.config.num_threads > 0:
        torch.set_num_threads(settings.config.num_threads)
    diffusers.utils.logging.disable_progress_bar()  # our own bars tell what is worth telling
    transformers.utils.logging.disable_progress_bar()
    accelerator = Accelerator(mixed_precision=settings.config.mixed_precision, cpu=not cuda)
    _check_launcher(accelerator, num_processes)
    return settings, accelerator


def _check_launcher(accelerator: Accelerator, num_processes: int) -> None:
    """Plain data parallelism, by a launcher that says how many processes it has started."""
    supported = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    kind = accelerator.distributed_type
    if kind not in supported or accelerator.num_processes != num_processes:
        raise ConfigError(
            f"accelerate was launched as {kind.value} with {accelerator.num_processes} processes, "
            f"WORLD_SIZE={num_processes}; use plain multi-process training, as in scripts/accelerate_configs/"
        )
