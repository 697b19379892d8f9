"""flow_grpo/launcher.py: what the environment of a process may say."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flow_grpo.errors import ConfigError
from flow_grpo.launch import launch
from flow_grpo.launcher import Launched, check_precision, read_launcher, speaks

ROOT = Path(__file__).parents[1]
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1", "GROUP_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "0",
}  # fmt: skip
ACCELERATE = {  # by scripts/accelerate_configs/cpu.yaml
    "ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip

ALLOWED = [
    ({}, Launched(1, 1, False)),
    ({"WORLD_SIZE": "1"}, Launched(1, 1, False)),
    ({"PMI_SIZE": "1", "PMI_RANK": "0"}, Launched(1, 1, False)),  # srun
    (ACCELERATE, Launched(1, 1, True)),
    (TORCHRUN, Launched(4, 2, False)),
    (TORCHRUN | ACCELERATE, Launched(4, 2, True)),
    (TORCHRUN | {"PMI_SIZE": "2"}, Launched(4, 2, False)),  # srun of torchrun
    (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, Launched(1, 1, False)),
    ({"ACCELERATE_USE_CPU": "yes", "ACCELERATE_USE_FSDP": "false"}, Launched(1, 1, True)),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "OMP_NUM_THREADS": "4,2"}, Launched(1, 1, False)),
]


@pytest.mark.parametrize(("environment", "launched"), ALLOWED)
def test_what_launchers_set_is_let_through(environment, launched):
    assert read_launcher(environment) == launched


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in TORCHRUN.items() if key != name}


REFUSED = [
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 would change"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ""}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS= would"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND=INDUCTOR would change"),
    ({"ACCELERATE_FP8_BACKEND": "TE"}, "ACCELERATE_FP8_BACKEND=TE"),
    ({"ACCELERATE_TORCH_DEVICE": "cuda:0"}, "ACCELERATE_TORCH_DEVICE=cuda:0 .* CUDA_VISIBLE_DEVICES"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true is not supported.*sharding=full"),
    ({"ACCELERATE_USE_FSDP": "1"}, "ACCELERATE_USE_FSDP=1 .* plain processes, as by scripts/.*fsdp2.yaml"),
    ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "ACCELERATE_USE_MEGATRON_LM=True"),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "ACCELERATE_USE_PARALLELISM_CONFIG=true"),
    ({"ACCELERATE_USE_SAGEMAKER": "true"}, "ACCELERATE_USE_SAGEMAKER=true"),
    ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU=maybe .* true or false"),
    ({"ACCELERATE_DYNAMO_USE_DYNAMIC": ""}, "ACCELERATE_DYNAMO_USE_DYNAMIC= .* true or false"),
    ({"ACCELERATE_LOG_LEVEL": "loud"}, "ACCELERATE_LOG_LEVEL=loud"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set: no launcher"),
    ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 is not allowed"),
    ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0, but RANK is not set"),
    ({"RANK": "1"}, "RANK=1, but WORLD_SIZE is not set"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not allowed"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE= is not allowed"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is not allowed"),
    (TORCHRUN | {"RANK": "x"}, "RANK=x is not allowed"),
    (TORCHRUN | {"LOCAL_RANK": "1.0"}, "LOCAL_RANK=1.0 is not allowed"),
    (TORCHRUN | {"RANK": "4"}, "RANK=4 does not fit WORLD_SIZE=4"),
    (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2 does not fit LOCAL_WORLD_SIZE=2"),
    (TORCHRUN | {"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5 does not fit WORLD_SIZE=4"),
    (without("MASTER_ADDR"), "MASTER_ADDR is not set"),
    (without("MASTER_PORT"), "MASTER_PORT is not set"),
    (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
    (TORCHRUN | {"OMP_NUM_THREADS": "4,2"}, "OMP_NUM_THREADS=4,2"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2, but WORLD_SIZE is not set"),
    ({"PMI_SIZE": "many"}, "PMI_SIZE=many"),
]


@pytest.mark.parametrize(("environment", "message"), REFUSED)
def test_what_would_hang_end_or_change_the_training_is_refused_by_name(environment, message):
    with pytest.raises(ConfigError, match=message):
        read_launcher(environment)


@pytest.mark.parametrize(("asked", "precision"), [("no", "bf16"), ("bf16", "bf16"), (None, "fp16")])
def test_a_launcher_that_asks_for_no_precision_or_the_same_is_let_through(asked, precision):
    check_precision(precision, {} if asked is None else {"ACCELERATE_MIXED_PRECISION": asked})


@pytest.mark.parametrize(("asked", "precision"), [("bf16", "no"), ("fp8", "bf16"), ("fp16", "bf16")])
def test_a_launcher_that_asks_for_another_precision_is_refused(asked, precision):
    with pytest.raises(ConfigError, match=f'MIXED_PRECISION={asked}, but config.mixed_precision = "{precision}"'):
        check_precision(precision, {"ACCELERATE_MIXED_PRECISION": asked})


BEFORE_ANYTHING_LOADS = [
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set"),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "ACCELERATE_MIXED_PRECISION=bf16"),
]


@pytest.mark.parametrize(("environment", "message"), BEFORE_ANYTHING_LOADS)
def test_a_process_is_not_started_in_an_environment_that_is_refused(config, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("flow_grpo.launch.Accelerator", lambda **_: pytest.fail("accelerate was set up"))
    with pytest.raises(ConfigError, match=message):
        launch(config)


def test_sharding_is_refused_where_torch_is_too_old_for_it(config, monkeypatch):
    config.sharding = "full"
    monkeypatch.setattr("torch.__version__", "2.7.1+cpu")
    with pytest.raises(ConfigError, match=r'config\.sharding = "full" needs torch 2\.8 or later; this is 2\.7\.1'):
        launch(config)


def test_more_processes_than_gpus_are_refused(config, monkeypatch):
    for name, value in (TORCHRUN | {"RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE=2 processes share 1 GPUs"):
        launch(config)


def test_an_address_where_processes_cannot_meet_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "ACCELERATE_USE_CPU": "1"}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        command = [sys.executable, "scripts/train/train_sd3.py", "--config", "config/grpo.py:tiny_sd3"]
        environment = os.environ | TORCHRUN | alone | address
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"error: MASTER_ADDR=127.0.0.1, MASTER_PORT={address['MASTER_PORT']}: the processes cannot" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_process_of_a_machine_speaks_and_one_that_cannot_tell():
    assert [speaks({"LOCAL_RANK": rank}) for rank in ("0", "1", "x", "")] == [True, False, True, True]
    assert speaks({})


def test_reading_the_environment_loads_no_torch():
    code = "import sys, flow_grpo.launcher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
