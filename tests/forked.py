"""Scripts started as `python` and `torchrun` start them, without the ten seconds that their imports take.

Each process is forked from a server that has imported torch, diffusers and the package already. What a launcher itself
does is tested where a real one starts the command: tests/scripts/test_train_sd3.py, tests/runs/test_stopping.py. What
must not import torch needs a real interpreter, too.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess

import torch

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["diffusers", "flow_grpo.training.opening", "flow_grpo.policy", "flow_grpo.loops.policy_gradient",
     "flow_grpo.loops.drtune", "flow_grpo.evaluators.registry", "flow_grpo.rewards.building", "matplotlib.pyplot"]
)  # fmt: skip


class Forked:
    """A command on some processes: `script.py ...`, `-m module ...` or `-c program ...`."""

    def __init__(
        self,
        *command: str | Path,
        processes: int = 1,
        cwd: Path = ROOT,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | (environment or {})
        size, port = str(processes), str(_free_port())
        self.processes = []
        for rank in map(str, range(processes)):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
            arguments = [str(part) for part in command], env | (place if processes > 1 else {}), str(cwd)
            process = SERVER.Process(target=_become, args=(*arguments, f"{self.folder.name}/{rank}"))
            process.start()
            self.processes.append(process)

    def poll(self) -> int | None:
        """The exit code, of the first that failed if one did; None while all that has ended ended well."""
        codes = [process.exitcode for process in self.processes]
        return next((code for code in codes if code), None if None in codes else 0)

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def finish(self, timeout: float = 600) -> CompletedProcess[str]:
        """Wait until all have ended; where one fails, or takes too long, the others are ended."""
        end = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        code = self.poll()
        if code != 0:
            self.send_signal(signal.SIGTERM if code else signal.SIGKILL)
        for process in self.processes:
            process.join(30)
        self.send_signal(signal.SIGKILL)
        with self.folder as folder:
            said = ["".join(path.read_text() for path in sorted(Path(folder).glob(f"*.{n}"))) for n in (1, 2)]
        if code is None:
            raise TimeoutError(f"not done after {timeout} seconds:\n{said[1]}")
        return CompletedProcess([], code, *said)


def run(*command: str | Path, processes: int = 1, cwd: Path = ROOT, **environment: str) -> CompletedProcess[str]:
    """What the command said, and its exit code; it has ended."""
    return Forked(*command, processes=processes, cwd=cwd, environment=environment).finish()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _become(command: list[str], environment: dict[str, str], cwd: str, out: str) -> None:
    """In the forked process: be what Python is after `python <command>`."""
    for number in (1, 2):
        os.dup2(os.open(f"{out}.{number}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    if command[0] == "-m":
        sys.path.insert(0, cwd)
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(command[0]).resolve().parent))
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
