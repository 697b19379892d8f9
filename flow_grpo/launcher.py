"""What a launcher tells a process through its environment, checked before anything acts on it.

accelerate obeys such variables without a word: some change what is trained, others make it wait for days. Those of a
plain `python`, `torchrun` or `accelerate launch` are let through. Nothing heavy is imported here: the answer is quick.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

from flow_grpo.errors import ConfigError

TRUE, FALSE = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")
HINT = "unset it, or start with `torchrun` or `accelerate launch` as in README.md"

PLAIN = "scripts/accelerate_configs/fsdp2.yaml"

# Ways of training that are not ours: gradients and weights would be shared among processes by somebody else.
OTHER_TRAINERS = tuple(
    f"ACCELERATE_USE_{name}" for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")
)
# The one value that leaves the training as it is; None: it must not be set.
HARMLESS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",  # accelerate divides the loss by it
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_FP8_BACKEND": "no",
    "ACCELERATE_TORCH_DEVICE": None,  # of every process; CUDA_VISIBLE_DEVICES chooses
}
# accelerate ends with a traceback unless these are truth values.
FLAGS = (
    "ACCELERATE_USE_CPU",
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_CPU_AFFINITY",
    "ACCELERATE_ENABLE_RICH",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH",
    "ACCELERATE_DYNAMO_USE_DYNAMIC",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION",
    "FORK_LAUNCHED",
    "USE_TORCH_XLA",
)
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # accelerate takes them for WORLD_SIZE


@dataclass(frozen=True)
class Launched:
    """What the launcher has started."""

    num_processes: int
    local_processes: int  # of them on this machine, as far as this process can tell
    use_cpu: bool  # even where there is a GPU


def read_launcher(environment: Mapping[str, str] = os.environ) -> Launched:
    """What this process was started as; ConfigError names the variable that would hang, end or change the training."""
    for name in OTHER_TRAINERS:
        if environment.get(name, "").lower() not in ("", *FALSE):
            raise ConfigError(
                f"{name}={environment[name]} is not supported: training shares gradients and weights itself; start "
                f"plain processes, as by {PLAIN}, with config.sharding=full where a model is too large for one GPU."
            )
    for name, harmless in HARMLESS.items():
        if name in environment and environment[name].lower() != harmless:
            advice = f"it takes {harmless}" if harmless else "unset it; CUDA_VISIBLE_DEVICES chooses GPUs"
            raise ConfigError(f"{name}={environment[name]} would change the training; {advice}.")
    for name in FLAGS:
        if environment.get(name, "no").lower() not in TRUE + FALSE:
            raise ConfigError(f"{name}={environment[name]} is not allowed; it takes true or false.")
    level, levels = environment.get("ACCELERATE_LOG_LEVEL", "info"), logging.getLevelNamesMapping()
    if level.upper() not in levels:
        raise ConfigError(f"ACCELERATE_LOG_LEVEL={level} is not allowed; it takes {', '.join(levels)}.")
    num_processes, local_processes = _processes(environment)
    return Launched(num_processes, local_processes, environment.get("ACCELERATE_USE_CPU", "no").lower() in TRUE)


def check_precision(mixed_precision: str, environment: Mapping[str, str] = os.environ) -> None:
    """ConfigError if the launcher was asked for another precision than the configuration's, which is the one used."""
    name = "ACCELERATE_MIXED_PRECISION"
    asked = environment.get(name, "no").lower()
    if asked not in ("no", mixed_precision):
        raise ConfigError(
            f'{name}={asked}, but config.mixed_precision = "{mixed_precision}" decides; give both the same, or launch '
            "with --mixed_precision no."
        )


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process says what is wrong: the first of its machine, or one that cannot tell."""
    rank = environment.get("LOCAL_RANK", "0").strip()
    return not rank.isdecimal() or int(rank) == 0


def _processes(environment: Mapping[str, str]) -> tuple[int, int]:
    """How many processes there are in all, and on this machine."""
    rank, local_rank = _whole(environment, "RANK", 0), _whole(environment, "LOCAL_RANK", 0)
    world, local_world = _whole(environment, "WORLD_SIZE", 1), _whole(environment, "LOCAL_WORLD_SIZE", 1)
    if local_rank is None and not rank and world in (None, 1):  # no launcher
        _check_no_mpi(environment, world)
        return 1, 1
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name, "").strip():
            raise ConfigError(f"{_cause(environment)}, but {name} is not set: no launcher did it; {HINT}.")
    assert rank is not None and local_rank is not None and world is not None  # noqa: PT018
    _below(environment, "RANK", rank, "WORLD_SIZE", world)
    _below(environment, "LOCAL_RANK", local_rank, "WORLD_SIZE", world)
    if local_world is not None:
        _below(environment, "LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_world)
        _below(environment, "LOCAL_WORLD_SIZE", local_world - 1, "WORLD_SIZE", world)
    if not 0 < (_whole(environment, "MASTER_PORT", 1) or 0) < 1 << 16:
        raise ConfigError(f"MASTER_PORT={environment['MASTER_PORT']} is not allowed; it takes 1 to 65535.")
    _whole(environment, "OMP_NUM_THREADS", 0)  # accelerate reads it where there are processes
    return world, max(local_world or 1, local_rank + 1)


def _cause(environment: Mapping[str, str]) -> str:
    """The variable that says that there is a launcher."""
    name = next(name for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK") if environment.get(name, "").strip())
    return f"{name}={environment[name]}"


def _check_no_mpi(environment: Mapping[str, str], world: int | None) -> None:
    """mpirun alone starts processes that would train side by side, or wait for one another."""
    for name in MPI_SIZES:
        if (_whole(environment, name, 0) or 1) > 1:
            raise ConfigError(f"{name}={environment[name]}, but WORLD_SIZE is {world or 'not set'}: {HINT}.")


def _below(environment: Mapping[str, str], name: str, value: int, size_name: str, size: int) -> None:
    if value >= size:
        raise ConfigError(f"{name}={environment[name]} does not fit {size_name}={size}; {HINT}.")


def _whole(environment: Mapping[str, str], name: str, low: int) -> int | None:
    """A whole number of at least `low`; None: the variable is not set."""
    given = environment.get(name)
    if given is None:
        return None
    text = given.strip()
    if not (text.isascii() and text.removeprefix("-").isdecimal() and len(text) < 10 and int(text) >= low):
        raise ConfigError(f"{name}={given} is not allowed; it takes a whole number of at least {low}.")
    return int(text)
