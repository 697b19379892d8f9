"""Start a process: check the configuration against how it was launched, then set up accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from diffusers import FlowMatchEulerDiscreteScheduler
from ml_collections import ConfigDict
from torch.distributed import DistError

from flow_grpo.errors import ConfigError, Interrupted, TrainingStopped
from flow_grpo.files import read_object
from flow_grpo.launcher import check_precision, read_launcher
from flow_grpo.messages import say
from flow_grpo.models import hub
from flow_grpo.models.files import LOADING_ERRORS, first_line
from flow_grpo.models.loading import check_prompt_length, class_of
from flow_grpo.models.lora_places import check_lora_targets
from flow_grpo.models.pipeline_files import family_of, pixels_per_token
from flow_grpo.models.scheduler import noise_levels
from flow_grpo.runs.stopping import StopWatch
from flow_grpo.settings import Settings, resolve

# The other processes wait in the next collective call while the main one evaluates: however long that takes, they must
# not give up. A process that dies is noticed all the same, by the launcher, which ends the others.
PATIENCE = timedelta(days=7)
# gloo's words for such a death, which come as plain RuntimeErrors
LOST_PROCESS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo")


def launch(config: ConfigDict) -> tuple[Settings, Accelerator]:
    """Resolve the configuration for the processes that were launched, and make their accelerator.

    Raises:
        ConfigError: see `launcher.read_launcher` and `settings.resolve`; or a model that is neither here nor on the
            hub.
    """
    launched = read_launcher()
    cuda = torch.cuda.is_available() and not launched.use_cpu
    if cuda and launched.local_processes > (gpus := torch.cuda.device_count()):
        raise ConfigError(
            f"LOCAL_WORLD_SIZE={launched.local_processes} processes share {gpus} GPUs of this machine; start at most "
            "one for each, or set ACCELERATE_USE_CPU=true."
        )
    settings = resolve(config, launched.num_processes, cuda, fetch=True)
    check_precision(settings.config.mixed_precision)
    _check_torch(settings)
    if settings.config.num_threads > 0:
        torch.set_num_threads(settings.config.num_threads)
    diffusers.utils.logging.disable_progress_bar()  # our own bars tell what is worth telling
    transformers.utils.logging.disable_progress_bar()
    _check_pipeline(settings)
    if launched.num_processes > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:  # set by hand, or by a cluster
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        say(f"waiting at {address} until all {launched.num_processes} processes are there.")
    try:
        accelerator = Accelerator(
            mixed_precision=settings.config.mixed_precision,
            cpu=not cuda,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except DistError as error:
        address = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')}, MASTER_PORT={os.environ.get('MASTER_PORT')}"
        raise ConfigError(f"{address}: the processes cannot meet there ({first_line(error)}).") from error
    _check_launcher(accelerator, launched.num_processes)
    return settings, accelerator


@contextmanager
def one_of_many(stop: StopWatch) -> Iterator[None]:
    """For what a process does with others: what torch.distributed raises where another has ended, as a sentence.

    Raises:
        TrainingStopped: another has ended.
        Interrupted: and this one was asked to stop as well.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error, read_launcher().num_processes):
            raise
        if reason := stop.reason():
            raise Interrupted(reason, "when another process had ended already; what was saved is intact") from None
        raise TrainingStopped("another process of this run has ended; what was saved is intact") from None


def is_lost_process(error: RuntimeError, num_processes: int) -> bool:
    """Whether this is what torch.distributed raises when another process has ended."""
    if num_processes == 1 or isinstance(error, TrainingStopped):
        return False
    return isinstance(error, DistError) or any(words in str(error) for words in LOST_PROCESS)


def _check_torch(settings: Settings) -> None:
    """FSDP2 gives up the weights that are in no block only from 2.8 on; before, changed ones would not be seen."""
    if settings.config.sharding == "full" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        raise ConfigError(f'config.sharding = "full" needs torch 2.8 or later; this is {torch.__version__}.')


def _check_pipeline(settings: Settings) -> None:
    """What its own classes make of a pipeline's settings."""
    config = settings.config
    pretrained = config.pretrained
    folder = hub.folder_of(pretrained.model, pretrained.revision)
    if folder is None:  # the hub's cache was emptied since
        raise ConfigError(f"config.pretrained.model = {pretrained.model!r} is no longer in the hub's cache.")
    files = (folder / "scheduler/scheduler_config.json", folder / "transformer/config.json")
    scheduler_settings, transformer_settings = (read_object(file, "config.pretrained.model: ") for file in files)
    try:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_settings)
        transformer = class_of(family_of(folder)).empty_transformer(transformer_settings)
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"config.pretrained.model: {pretrained.model} has settings that make no model: {first_line(error)}"
        ) from error
    height, width = (side // pixels_per_token(folder) for side in settings.image_size)
    for steps in (config.sample.num_steps, config.eval.num_steps):
        noise_levels(scheduler, steps, height * width)
    if config.use_lora:
        check_lora_targets((name for name, _ in transformer.named_modules()), config.lora.target_modules)
    check_prompt_length(pretrained.model, folder, config.max_sequence_length)


def _check_launcher(accelerator: Accelerator, num_processes: int) -> None:
    """Plain data parallelism, by a launcher that says how many processes it has started."""
    supported = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    kind = accelerator.distributed_type
    if kind not in supported or accelerator.num_processes != num_processes:
        raise ConfigError(
            f"accelerate was launched as {kind.value} with {accelerator.num_processes} processes, "
            f"WORLD_SIZE={num_processes}; use plain multi-process training, as in scripts/accelerate_configs/"
        )
