"""A run's folder, counters, history and trackers: the only file that knows wandb and tensorboard.

    logs/<run_name>/config.json        the resolved configuration
                    environment.json   versions, revision, device and command line; one entry per resumption
                    metrics.jsonl      one strict JSON object a line; NaN and infinities are written as null
                    images/            <name>_<step>.png
                    steps/ diversity/  <label>_<step>.json: what evaluators keep of one evaluation
                    checkpoints/       flow_grpo/checkpoint.py
                    tensorboard/ wandb/

Everything a report shows is rebuilt from that folder. Only the main process writes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import netrc
import os
import platform
import shlex
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import broadcast_object_list
from PIL import Image
from tqdm import tqdm

from flow_grpo.errors import ConfigError
from flow_grpo.files import strict_json, write_atomically

if TYPE_CHECKING:
    from flow_grpo.settings import Settings

TRACKERS = ("wandb", "tensorboard")  # wandb first: the one that may have to be started twice
CONFIG_FILE, ENVIRONMENT_FILE, HISTORY_FILE, IMAGE_FOLDER = "config.json", "environment.json", "metrics.jsonl", "images"
RECORD_FOLDERS = ("steps", "diversity")  # of evaluators: <label>_<step>.json
# what a run writes before it has done anything: a folder that holds no more than this may be used again
EMPTY_RUN = frozenset({CONFIG_FILE, ENVIRONMENT_FILE, *TRACKERS})


@dataclass
class Counters:
    """What training has spent so far, over all processes; evaluation is not counted."""

    epoch: int = 0  # epochs completed
    seconds: float = 0.0
    network_evaluations: int = 0  # transformer forwards x images
    images: int = 0  # images sampled
    updates: int = 0  # optimizer steps taken
    nonfinite_updates: int = 0  # updates skipped for a non-finite loss or gradient

    def state_dict(self) -> dict[str, int | float]:
        """The counters by name, for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set every counter in place; a missing one is a KeyError."""
        for field in fields(self):
            kind = type(getattr(self, field.name))
            setattr(self, field.name, kind(state[field.name]))


class Run:
    """One training run: its folder, and everything that is written to it.

    Construct it on every process: it is collective, and all of them agree on the folder. With
    `config.resume_from` inside a run folder and no other `config.run_name`, that folder is appended to.

    Raises:
        ConfigError: on every process, if the folder already holds something and is not being resumed.
    """

    def __init__(self, settings: Settings, accelerator: Accelerator) -> None:
        self.settings = settings
        self.accelerator = accelerator
        self.is_main: bool = accelerator.is_main_process
        self.counters = Counters()
        self.folder, self.resumed = self._agree_on_folder()
        if self.is_main:
            environment = self._write_records()
            start_trackers(accelerator, settings.config, self.folder, environment["run_id"])

    @property
    def name(self) -> str:
        """The name of the run: that of its folder."""
        return self.folder.name

    # --- metrics and images ---------------------------------------------------------------------------

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append metrics and counters to metrics.jsonl and send them to the trackers; `step` is epochs completed."""
        if not self.is_main:
            return
        spent = self.counters.state_dict()
        del spent["epoch"]  # the step says it
        values = {name: _number(value) for name, value in (spent | dict(metrics)).items()}
        _append_line(self.folder / HISTORY_FILE, {"step": int(step)} | values)
        self.accelerator.log(values, step=step)

    def log_image(self, name: str, image: Image.Image | np.ndarray, step: int) -> None:
        """Write images/<name>_<step>.png and send it to the trackers.

        An array is (H, W) or (H, W, 3), of uint8 or of floats in [0, 1].
        """
        if not self.is_main:
            return
        pixels = _pixels(image)  # (H, W, 3)
        path = self.folder / IMAGE_FOLDER / f"{name}_{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        for tracker in self.accelerator.trackers:
            _log_image(tracker, name, pixels, step)

    def truncate_history(self, step: int, evaluation_redone: bool = True) -> None:
        """Forget what a resumed run will do again: metrics later than `step`, its checkpoint's epoch.

        The evaluation at `step` itself is forgotten too, unless it is not `evaluation_redone`; so are the evaluators'
        own records, files named <label>_<step>.json. The history is replaced in one piece; a last line torn by a crash
        goes with it.
        """
        if not self.is_main:
            return
        path, last_evaluation = self.folder / HISTORY_FILE, step - 1 if evaluation_redone else step
        if path.exists():
            lines = read_history(path)
            kept = [line for line in lines if line["step"] <= (last_evaluation if _is_evaluation(line) else step)]
            write_atomically(path, "".join(strict_json(line) + "\n" for line in kept))
        for record in (file for folder in RECORD_FOLDERS for file in (self.folder / folder).glob("*_*.json")):
            number = record.stem.rpartition("_")[2]
            if number.isdecimal() and int(number) > last_evaluation:
                record.unlink()

    # --- progress and time ----------------------------------------------------------------------------

    def progress(self, iterable_or_total: Iterable[Any] | int, description: str, leave: bool = False) -> tqdm[Any]:
        """A progress bar over an iterable, or over range(total); silent on all but the main process.

        `leave` keeps the finished bar on the screen: for the outermost loop. Where the output is a file, bars are
        redrawn rarely and short ones not drawn at all.
        """
        iterable = range(iterable_or_total) if isinstance(iterable_or_total, int) else iterable_or_total
        interactive = sys.stderr.isatty()
        return tqdm(
            iterable,
            desc=description,
            leave=leave,
            disable=not self.is_main,
            dynamic_ncols=True,
            mininterval=0.1 if interactive else 5.0,
            delay=0.0 if interactive or leave else 5.0,
        )

    @contextmanager
    def timer(self) -> Iterator[None]:
        """Add the wall time of a block to `counters.seconds`, the GPU's queue included.

        Collective: every process must enter it, and all are given the main process's time, so that they take the
        same decision on `config.max_seconds`. A block that raises is not counted.
        """
        start = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        self.counters.seconds += self._from_main(time.perf_counter() - start)

    def finish(self) -> None:
        """Close the trackers and leave the process group. Nothing can be logged to trackers afterwards."""
        self.accelerator.end_training()
        self.accelerator.trackers.clear()

    # --- setting up -----------------------------------------------------------------------------------

    def _from_main(self, value: Any) -> Any:
        """The main process's value, on every process."""
        return broadcast_object_list([value])[0]

    def _agree_on_folder(self) -> tuple[Path, bool]:
        """The folder chosen by the main process, and whether it is resumed; its refusal is raised on every process."""
        answer: tuple[Path, bool] | ConfigError | None = None
        if self.is_main:
            try:
                answer = _choose_folder(self.settings.config)
            except ConfigError as refusal:
                answer = refusal
        answer = self._from_main(answer)
        if isinstance(answer, ConfigError):
            raise answer
        assert answer is not None
        return answer

    def _write_records(self) -> dict[str, Any]:
        """Write config.json and environment.json; a resumed run keeps what the earlier session wrote."""
        config = json.loads(strict_json(self.settings.config.to_dict() | {"run_name": self.name}))
        environment = describe_environment(self.settings, self.accelerator)
        earlier_file = self.folder / ENVIRONMENT_FILE
        if self.resumed and earlier_file.exists():
            earlier = json.loads(earlier_file.read_text())
            before = flatten(json.loads((self.folder / CONFIG_FILE).read_text()))
            changes = {key: [before.get(key), new] for key, new in flatten(config).items() if before.get(key) != new}
            sessions = [*earlier.pop("earlier_sessions"), earlier]
            environment |= {"run_id": earlier["run_id"], "config_changes": changes, "earlier_sessions": sessions}
        write_atomically(self.folder / CONFIG_FILE, strict_json(config, indent=2) + "\n")
        write_atomically(earlier_file, strict_json(environment, indent=2) + "\n")
        return environment


# --- trackers -------------------------------------------------------------------------------------------


def start_trackers(accelerator: Accelerator, config: Any, folder: Path, run_id: str) -> None:
    """Start the configured trackers of a run folder; one that is not installed or not reachable never fails the run."""
    names = [name for name in TRACKERS if name in config.trackers and _is_installed(name)]
    if "wandb" not in names:
        return _init_trackers(accelerator, config, folder, names, run_id, mode="")
    from wandb.errors import Error as WandbError

    try:
        _init_trackers(accelerator, config, folder, names, run_id, wandb_mode())
    except WandbError as error:
        warnings.warn(f"wandb could not start ({error}); this run is kept offline in {folder}", stacklevel=2)
        accelerator.trackers.clear()
        _init_trackers(accelerator, config, folder, names, run_id, mode="offline")


def _init_trackers(
    accelerator: Accelerator, config: Any, folder: Path, names: list[str], run_id: str, mode: str
) -> None:
    wandb_options = {"name": folder.name, "dir": str(folder), "mode": mode}
    if mode == "online":  # an offline start after a failed online one must not claim the same id
        wandb_options |= {"id": run_id, "resume": "allow"}
    trackers: dict[str, GeneralTracker] = {}
    if "wandb" in names:
        trackers["wandb"] = WandBTracker(config.project, **wandb_options)
    if "tensorboard" in names:
        trackers["tensorboard"] = TensorBoardTracker("tensorboard", folder)
    hyperparameters = {
        key: value if _is_plain(value) else str(value) for key, value in flatten(config.to_dict()).items()
    }
    accelerator.log_with = list(trackers.values())
    accelerator.init_trackers(config.project, hyperparameters)


def log_checkpoints(
    accelerator: Accelerator,
    config: Any,
    folder: Path,
    prefix: str,
    metrics: Mapping[int, Mapping[str, float]],
    images: Mapping[str, Image.Image] | None = None,
) -> None:
    """Send what was measured of a run's checkpoints, after the run has ended, to the trackers of its folder.

    Args:
        prefix: metrics and images are named `prefix/<name>`, so that they are told from those of the training.
        metrics: epoch -> metrics. wandb, which takes no earlier step of a run that went on, gets `prefix/epoch` as
            their horizontal axis.
        images: of the last of these epochs.

    Raises:
        ConfigError: the folder is not that of a run.
    """
    try:
        run_id = json.loads((folder / ENVIRONMENT_FILE).read_text())["run_id"]
    except (OSError, ValueError, KeyError):
        raise ConfigError(f"{folder / ENVIRONMENT_FILE} does not name a run: {folder} is no run folder.") from None
    start_trackers(accelerator, config, folder, run_id)
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            tracker.tracker.define_metric(f"{prefix}/*", step_metric=f"{prefix}/epoch")
        for epoch, values in sorted(metrics.items()):
            named = {f"{prefix}/{name}": _number(value) for name, value in values.items()}
            if tracker.name == "wandb":
                tracker.log(named | {f"{prefix}/epoch": epoch})
            else:
                tracker.log(named, step=epoch)
        for name, image in (images or {}).items():
            _log_image(tracker, f"{prefix}/{name}", _pixels(image), None if tracker.name == "wandb" else max(metrics))
    accelerator.end_training()
    accelerator.trackers.clear()


def _log_image(tracker: GeneralTracker, name: str, pixels: np.ndarray, step: int | None) -> None:
    """One image (H, W, 3) uint8."""
    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    tracker.log_images({name: pixels[None]}, step=step, **layout)


# --- folders --------------------------------------------------------------------------------------------


def fresh_folder(folder: Path) -> Path:
    """Create and return `folder`, or `folder-2`, `folder-3`, ...: the first that does not exist."""
    for number in itertools.count(1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("unreachable")


def _choose_folder(config: Any) -> tuple[Path, bool]:
    """The run's folder, created, and whether it is an earlier run's that goes on."""
    logdir, name = Path(config.logdir), config.run_name
    resumed = run_folder_of(config.resume_from)
    if resumed is not None and (not name or resumed.resolve() == (logdir / name).resolve()):
        return resumed, True
    if not name:
        now = datetime.now(UTC)
        return fresh_folder(logdir / f"{config.recipe or 'run'}-{now:%Y%m%d-%H%M%S}"), False
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"run_name={name!r} must name a folder under logdir={config.logdir!r}.")
    folder = logdir / name
    folder.mkdir(parents=True, exist_ok=True)
    if {entry.name for entry in folder.iterdir()} - EMPTY_RUN:
        raise ConfigError(
            f"run_name={name!r}: {folder} already holds a run, which is not overwritten; choose another run_name, "
            f"or continue it with resume_from={str(folder)!r}."
        )
    return folder, False


def run_folder_of(resume_from: str) -> Path | None:
    """The run folder that `resume_from` (itself, its checkpoints or one of them) lies in; None: no run's."""
    if not resume_from:
        return None
    path = Path(resume_from)
    candidates = (path, *path.resolve().parents[:2])
    return next((folder for folder in candidates if (folder / ENVIRONMENT_FILE).is_file()), None)


# --- history --------------------------------------------------------------------------------------------


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order; a last line torn by a crash is left out.

    Raises:
        ConfigError: if another line is not a JSON object with a step.
    """
    lines = path.read_text().splitlines()
    history = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise ConfigError(f"{path}, line {number}, is not JSON: {line[:60]!r}.") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ConfigError(f"{path}, line {number}, is not an object with an integer 'step': {line[:60]!r}.")
        history.append(record)
    return history


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    return any(name.startswith(("eval/", "eval_ema/")) for name in line)


def _append_line(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(strict_json(record) + "\n")
        file.flush()


# --- values ---------------------------------------------------------------------------------------------


def _number(value: Any) -> int | float:
    """A Python number of a number, a numpy scalar or a tensor of one element."""
    return value if isinstance(value, int) else float(value)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"sample": {"num_steps": 10}} -> {"sample.num_steps": 10}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if np.issubdtype(image.dtype, np.floating):
        image = np.round(image.clip(0, 1) * 255).astype(np.uint8)
    return np.asarray(Image.fromarray(image).convert("RGB"))


# --- wandb ----------------------------------------------------------------------------------------------


def wandb_mode() -> str:
    """The environment's WANDB_MODE; without one, or without a key, "online" becomes "offline": wandb never asks."""
    mode = os.environ.get("WANDB_MODE", "online")
    return "offline" if mode == "online" and not _has_wandb_key() else mode


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _is_installed(tracker: str) -> bool:
    if importlib.util.find_spec(tracker) is not None:
        return True
    warnings.warn(
        f"tracker {tracker!r} is not installed (pip install {tracker}): the run goes on without it", stacklevel=2
    )
    return False


# --- environment ----------------------------------------------------------------------------------------


def describe_environment(settings: Settings, accelerator: Accelerator) -> dict[str, Any]:
    """What a run ran on and with: enough to repeat it."""
    return {
        "run_id": uuid.uuid4().hex[:8],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "git": _git_state(),
        "device": _device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": _package_versions(),
        "batch_plan": asdict(settings.plan),
        "config_changes": {},  # against the session before, of a resumed run: key -> [old, new]
        "earlier_sessions": [],  # environments of the sessions before, of a resumed run
    }


def _package_versions() -> dict[str, str]:
    distributions = importlib.metadata.distributions()
    return dict(sorted((package.name, package.version) for package in distributions if package.name))


def _git_state() -> dict[str, Any] | None:
    """Revision of this code and whether it has uncommitted changes; None outside a git checkout of it."""
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    status = _git(here.parent, "status", "--porcelain")
    return {"revision": _git(here.parent, "rev-parse", "HEAD"), "dirty": bool(status)}


def _git(folder: Path, *arguments: str) -> str | None:
    """What a git command prints; None where it fails or there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"cpu ({models[0] if models else platform.machine()})"
