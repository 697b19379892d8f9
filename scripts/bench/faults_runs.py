"""Runs of seconds for scripts/bench/faults.py: started by forking, ended in every way, compared with unbroken ones."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flow_grpo import checkpoint, drtune, evaluation, grpo, launch, policy, rewards, step_visualizer, trainer
from flow_grpo.errors import ConfigError
from flow_grpo.runs.folder import HISTORY_FILE, RECORD_FOLDERS
from flow_grpo.runs.history import read_history
from flow_grpo.runs.saved import CHECKPOINTS, TENSORS, checkpoint_damage, checkpoint_state, finished_checkpoints
from flow_grpo.tracking import Run
from scripts import cli
from scripts.diversity_metrics import diversity_evaluator
from scripts.train import tiny_models, train_sd3

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = "scripts/train/train_sd3.py"
PROMPTS = ("a bag", "a boot", "a red coat", "a sandal")
EPOCHS = 4
LIMIT = 120.0  # seconds after which a start hangs
BY_ITSELF, AFTER_TERM = 3.0, 3.0  # of a process that has lost another; torchrun gives it 0 and 30 seconds
LITTER = (".partial-*", ".stale-*", ".dropped-*", "*.tmp")
LOST, LOADED, TRACEBACK, HANG, OTHER = FAULTS = ("lost", "loaded damaged", "tracebacks", "hangs", "other")
# what training imports late: the children have it already
PRELOADED = (diversity_evaluator, drtune, evaluation, grpo, launch, policy, rewards, step_visualizer, trainer)
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Kind:
    """What is trained."""

    loop: str = "grpo"  # or "drtune"
    processes: int = 1
    lora: bool = True  # False: full fine-tuning
    records: bool = False  # every evaluator's files besides
    more: bool = False  # an epoch less, which is done when the run goes on, and every checkpoint kept

    @property
    def epochs(self) -> int:
        """Of the unbroken run."""
        return EPOCHS - 1 if self.more else EPOCHS

    def __str__(self) -> str:
        return f"{self.loop} x {self.processes}{'' if self.lora else ', full'}"


@dataclass(frozen=True)
class Reference:
    """An unbroken run."""

    folder: Path
    seconds: float
    calls: int  # on the file system, of its longest checkpoint


@dataclass
class Result:
    """What became of one trial."""

    part: str
    number: int
    plan: str
    done: int = 0  # kills, damages, signals, ... that took place
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    log: str = ""

    def add(self, fault: str, note: str) -> None:
        """Count a fault of this trial."""
        self.faults.append(fault)
        self.notes.append(f"{fault}: {note}")


# --- processes ------------------------------------------------------------------------------------------


def nothing() -> None:
    """Before training."""


class Session:
    """One start of training: its processes, forked from this one, and what they say."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] = nothing,
        program: Sequence[str] = (),
    ) -> None:
        """`before`: called in each process; `program`: executed instead of what this process has loaded already."""
        self.log, self.codes = log, dict[int, int]()
        shared = dict(environment or {})
        if processes > 1:
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
            shared |= {"LOCAL_WORLD_SIZE": str(processes)}
        self.pids = []
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            pid = os.fork()
            if pid == 0:
                become_training(arguments, log, shared | ranks, before, program)
            self.pids.append(pid)

    def running(self) -> list[int]:
        """The processes that have not ended."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return [pid for pid in self.pids if pid not in self.codes]

    def wait(self, seconds: float = LIMIT) -> bool:
        """Whether all have ended, within so many seconds."""
        end = time.monotonic() + seconds
        while self.running():
            if time.monotonic() >= end:
                return False
            time.sleep(0.003)
        return True

    def _launched(self) -> bool:
        """Wait as torchrun does: once one of several has failed, SIGTERM to the others, and SIGKILL after a while."""
        end = time.monotonic() + LIMIT
        while self.running() and not any(self.codes.values()) and time.monotonic() < end:
            self.wait(0.05)
        if not any(self.codes.values()) or self.wait(BY_ITSELF):
            return not self.running()
        self.send(signal.SIGTERM)
        if not self.wait(AFTER_TERM):
            self.send(signal.SIGKILL)
        return self.wait()

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """A signal to the processes that have not ended, or to some of them."""
        chosen = self.pids if ranks is None else [self.pids[rank] for rank in ranks if rank < len(self.pids)]
        for pid in set(chosen) & set(self.running()):
            os.kill(pid, number)

    def ends(self, result: Result) -> list[int]:
        """The exit codes, once all have ended; what hangs is counted and killed. What they said is looked through."""
        if not self._launched():
            result.add(HANG, f"a process had not ended after {LIMIT:g} s")
            self.send(signal.SIGKILL)
            self.wait()
        if "Traceback" in self.said():
            result.add(TRACEBACK, "see the log")
        result.log = self.said()[-6000:]
        return [self.codes[pid] for pid in self.pids]

    def said(self) -> str:
        """What the processes have written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def become_training(
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    before: Callable[[], None],
    program: Sequence[str],
) -> None:
    """Of a forked process: train, and end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing outlives an interrupted benchmark
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout, sys.stderr = (os.fdopen(standard, "w", buffering=1, closefd=False) for standard in (1, 2))
    os.environ.update(environment)
    os.chdir(ROOT)
    code = 1
    try:
        before()
        if program:
            os.execv(program[0], [*program, *arguments])
        sys.argv = [SCRIPT, *arguments]
        cli.run(train_sd3.main, train_sd3.__doc__ or "")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- calls on the file system ---------------------------------------------------------------------------

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}
SAVING = ((checkpoint.Saver, "_attempt"),)
OPENING = ((Run, "__init__"), (checkpoint, "resume"))
Scope = tuple[tuple[Any, str], ...]


class Calls:
    """Counts the calls of a process that change files while it is inside some functions; may end it at one."""

    def __init__(self, scope: Scope, act: Callable[[int], None], done: Callable[[int], None] = lambda count: None):
        """`act` is called before each with its number, `done` with how many there were each time a function ends."""
        self.count, self.inside, self.act, self.done = 0, False, act, done
        for owner, name in scope:
            setattr(owner, name, self._scoped(getattr(owner, name)))
        for owner, name in ((os, "fsync"), (checkpoint, "save_file")):  # neither is audited
            setattr(owner, name, self._counted(getattr(owner, name)))
        sys.addaudithook(self._audit)

    def _scoped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def scoped(*args: Any, **kwargs: Any) -> Any:
            self.inside, before = True, self.count
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                self.done(self.count - before)

        return scoped

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._seen()
            return function(*args, **kwargs)

        return counted

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in CHANGES:
            self._seen()

    def _seen(self) -> None:
        if self.inside:
            self.count += 1
            self.act(self.count)


def kill_at(scope: Scope, call: int) -> Callable[[], None]:
    """For `Session`: SIGKILL just before so manieth call inside the scope."""

    def act(number: int) -> None:
        if number == call:
            os.kill(os.getpid(), signal.SIGKILL)

    def before() -> None:
        Calls(scope, act)

    return before


# --- the laboratory -------------------------------------------------------------------------------------


@dataclass
class Lab:
    """A temporary folder with random tiny models and the unbroken runs."""

    folder: Path
    references: dict[Kind, Reference] = field(default_factory=dict)

    def build(self) -> None:
        """Write sd3/, clip/, prompts.txt: random weights, output layers included, so that every input matters."""
        torch.set_num_threads(1)
        sizes: dict[str, Any] = {"vae_channels": (8, 16, 16), "text_width": 16, "width": 32, "heads": 2, "layers": 2}
        pipeline = tiny_models.build_pipeline(0, **sizes)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in pipeline.transformer.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        pipeline.save_pretrained(self.folder / "sd3")
        for part in tiny_models.build_clip(0, vision_width=32, vision_layers=2, vision_heads=2):
            part.save_pretrained(self.folder / "clip")
        (self.folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
        for path in [self.folder, *self.folder.rglob("*")]:  # read by trials under another user
            path.chmod(0o755 if path.is_dir() else 0o644)

    def beginning(self, kind: Kind, run: Path) -> list[str]:
        """The arguments that begin a run in a folder."""
        clip, prompts = self.folder / "clip", self.folder / "prompts.txt"
        values: dict[str, Any] = {
            "logdir": run.parent, "run_name": run.name, "trackers": (), "num_epochs": kind.epochs, "save_freq": 1,
            "pretrained.model": self.folder / "sd3", "prompts.train": prompts, "prompts.test": prompts,
            "prompts.eval_diversity": prompts, "reward_model.pickscore": clip, "reward_model.clipscore": clip,
            "diversity.model": clip, "num_seeds": 4, "eval.judge": clip, "eval.modes": "",
            "eval.num_image_per_prompt": 2, "lora.rank": 4, "num_checkpoint_limit": 2, "use_lora": kind.lora,
            "eval.num_steps": 2, "eval_freq": 2, "eval_diversity": True, "eval_diversity_freq": 2,
            "sample.groups_per_epoch": 4, "sample.num_image_per_prompt": 2, "sample.batch_size": 4,
            "train.batch_size": 4, "train.updates_per_epoch": 2, "drtune.num_train_steps": 2, "sample.num_steps": 4,
        }  # fmt: skip
        if kind.records:
            values |= {"visualize_steps": True, "visualize_steps_freq": 2, "entropy.num_image_per_prompt": 2}
            values |= {"eval_ode_log_prob": True, "eval_ode_log_prob_freq": 2, "entropy.num_probes": 1}
        if kind.more:
            values |= {"num_checkpoint_limit": 0}
        recipe = "tiny_sd3_use_gradient" if kind.loop == "drtune" else "tiny_sd3"
        return [f"--config=config/grpo.py:{recipe}", *(f"--config.{key}={value}" for key, value in values.items())]

    def refer(self, kind: Kind) -> None:
        """Make the unbroken run of a kind."""
        run, counts = self.folder / "unbroken" / str(len(self.references)), self.folder / "counts.txt"
        run.parent.mkdir(exist_ok=True)
        result, start = Result("unbroken", 0, str(kind)), time.monotonic()

        def note(count: int) -> None:
            with counts.open("a", encoding="utf-8") as file:
                file.write(f"{count}\n")

        def before() -> None:
            Calls(SAVING, lambda number: None, note)

        session = Session(self.beginning(kind, run), run.with_suffix(".log"), kind.processes, before=before)
        if any(session.ends(result)) or result.faults:
            raise RuntimeError(f"the unbroken run of {kind} failed:\n{result.log}")
        calls = max(map(int, counts.read_text(encoding="utf-8").split()), default=0)
        self.references[kind] = Reference(run, time.monotonic() - start, calls)


def resuming(run: Path, *more: str) -> list[str]:
    """The arguments that go on with a run."""
    return [f"--config.resume_from={run}", *more]


# --- what is left ---------------------------------------------------------------------------------------


def newest_whole(run: Path) -> int:
    """The epoch of the newest whole checkpoint, every byte compared; -1: there is none.

    One that was about to be replaced still counts: it comes back when the run goes on.
    """
    checkpoints = run / CHECKPOINTS
    found = list(finished_checkpoints(checkpoints).values()) + list(checkpoints.glob(".stale-checkpoint-*"))
    whole = [path for path in found if checkpoint_damage(path, deep=True) is None]
    return max((int(checkpoint_state(path)["counters"]["epoch"]) for path in whole), default=-1)


def damaged(run: Path) -> list[str]:
    """The checkpoints under their own names that are not whole."""
    found = finished_checkpoints(run / CHECKPOINTS).values()
    return [f"{path.name}: {problem}" for path in found if (problem := checkpoint_damage(path, deep=True))]


def litter(run: Path) -> list[str]:
    """What an interrupted write has left."""
    return [path.name for pattern in LITTER for path in run.rglob(pattern)]


def history(run: Path, without: str = "seconds") -> list[dict[str, Any]]:
    """The metrics, less those with a word in their name."""
    return [{k: v for k, v in line.items() if without not in k} for line in read_history(run / HISTORY_FILE)]


def last_tensors(run: Path) -> bytes:
    """Of the newest checkpoint: weights, average, optimizer."""
    folder = list(finished_checkpoints(run / CHECKPOINTS).values())[-1]
    return folder.name.encode() + (folder / TENSORS).read_bytes()


def records(run: Path) -> dict[str, bytes]:
    """The evaluators' own files."""
    return {file.name: file.read_bytes() for folder in RECORD_FOLDERS for file in (run / folder).glob("*.json")}


def differences(run: Path, unbroken: Path, without: str = "") -> list[str]:
    """How a run that was broken and went on differs from the unbroken one, in words; one record may be left out."""
    ours, theirs = records(run), records(unbroken)
    for found in (ours, theirs):
        found.pop(without, None)
    try:
        same = {
            "tensors": last_tensors(run) == last_tensors(unbroken),
            "metrics": history(run) == history(unbroken),
            "records": ours == theirs,
        }
    except (ConfigError, OSError, IndexError) as error:  # of whatever was written: it is the thing examined
        return [f"unreadable: {error}"]
    return [f"other {name}" for name, equal in same.items() if not equal]


def finish(session: Session, run: Path, unbroken: Path, result: Result) -> None:
    """The last start of a trial, which nothing breaks: it ends well and like the unbroken run."""
    codes = session.ends(result)
    if any(codes):
        result.add(LOST, f"the last start ended with {codes}")
    elif different := differences(run, unbroken):
        result.add(LOST, "; ".join(different))
    elif left := litter(run):
        result.add(OTHER, f"left {left}")


@contextmanager
def trial_folder(lab: Lab, result: Result) -> Iterator[Path]:
    """A folder for one trial, which goes unless something went wrong."""
    folder = lab.folder / result.part / str(result.number)
    folder.mkdir(parents=True)
    yield folder
    if not result.faults:
        shutil.rmtree(folder, ignore_errors=True)
