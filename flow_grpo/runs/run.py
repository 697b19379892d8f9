"""A run: its counters, and everything that is written to its folder and told to its trackers.

Everything that a report shows is rebuilt from the run's folder, flow_grpo/runs/folder.py; only the main process writes.
"""

from __future__ import annotations

import errno
import io
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from tqdm import tqdm

from flow_grpo.errors import ConfigError, Interrupted, RewardFailed, TrainingStopped
from flow_grpo.files import write_atomically
from flow_grpo.messages import say
from flow_grpo.rewards import own_files
from flow_grpo.rewards.chosen import is_own, reward_names
from flow_grpo.rewards.composition import Composition
from flow_grpo.runs.dashboard import Description, pixels_of
from flow_grpo.runs.digest import base_digest, base_mismatch, base_words
from flow_grpo.runs.environment import write_records
from flow_grpo.runs.evaluations import LABELS, read_record
from flow_grpo.runs.folder import (
    HISTORY_FILE,
    IMAGE_FOLDER,
    PAGE_FILE,
    RECORD_FOLDERS,
    OpenFolder,
    flatten,
    keep_damaged,
    open_folder,
)
from flow_grpo.runs.history import append_line, is_evaluation, salvage_history, starts_with, write_history
from flow_grpo.runs.phases import Phases
from flow_grpo.runs.progress import Counters, bar
from flow_grpo.runs.saved import checkpoint_state
from flow_grpo.runs.stopping import Reason, StopWatch
from flow_grpo.runs.trackers import Board, choose_trackers, finish_trackers, start_trackers

if TYPE_CHECKING:
    from flow_grpo.settings import Settings


RECORD_NAME = re.compile(rf"(?:{'|'.join(LABELS)})_(?P<step>\d{{6,}})\.(?:json|webp)")  # of an evaluation
FAILURE = 1 << 16  # in the place of a reason to stop: the main process cannot write
NO_REWARD = 1 << 15  # likewise: some process has images without a reward


T = TypeVar("T")


class Run:
    """One training run: its folder, and everything that is written to it.

    Construct it on every process: it is collective, and all of them agree on the folder, which is locked until
    `finish`. With `config.resume_from` inside a run folder and no other `config.run_name`, that folder is appended to.

    Attributes:
        composition: what training makes of several rewards, as far as the run has come.
        checkpoint: the one to go on from, whole; None: training begins.
        resumed: whether the folder is an earlier run's that goes on.

    Raises:
        ConfigError: on every process, if the folder already holds something and is not being resumed, is being
            written by another process, or cannot be written; or there is no whole checkpoint to go on from.
    """

    def __init__(self, settings: Settings, accelerator: Accelerator, stop: StopWatch | None = None) -> None:
        """`stop`: None, no signal is looked at."""
        self.settings = settings
        self.accelerator = accelerator
        self.is_main: bool = accelerator.is_main_process
        self.counters = Counters()
        self.composition = Composition(settings.config)
        self.phase = Phases(accelerator.device)
        self._stop = stop or StopWatch({})
        self._opened: OpenFolder | None = None  # of the main process
        self._failure = ""  # why the main process can no longer write metrics
        self._unrewarded: RewardFailed | None = None  # of this process
        self._told: set[str] = set()
        self._uncounted = 0.0  # seconds
        self._logged = False  # whether there is a history, which must not vanish
        self._start_trackers: Callable[[], list[Board]] | None = None  # of the main process, until it has been called
        self.folder, self.resumed, self.checkpoint = self.from_main(self._open)
        self.run_id: str = self.from_main(self._begin)
        if self.checkpoint is not None:
            self.tell(f"going on from {self.checkpoint}{'' if self.resumed else f' in the new folder {self.folder}'}.")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.finish(0 if error is None else getattr(error, "exit_code", 1))

    @property
    def name(self) -> str:
        """The name of the run: that of its folder."""
        return self.folder.name

    def holds_folder(self) -> bool:
        """Whether the folder is still the one that was locked; always, of a process that writes nothing."""
        return self._opened is None or self._opened.lock.is_in_place()

    @property
    def begins(self) -> bool:
        """Whether the base model is still to be evaluated: a run that begins, or was stopped before it had been."""
        if self.checkpoint is None:
            return True
        state = checkpoint_state(self.checkpoint)
        return state["counters"]["epoch"] == 0 and not state.get("evaluated", True)

    @cached_property
    def base_sha256(self) -> str | None:
        """Digest of the base model's files; None where they cannot be found."""
        return base_digest(self.settings.config.pretrained)

    @cached_property
    def reward_sha256(self) -> dict[str, str]:
        """Digests of the files of one's own rewards, by name."""
        config = self.settings.config
        own = [name for name in reward_names(config) if is_own(config, name)]
        return {name: own_files.digest(config.reward_files[name]) for name in own}

    # --- metrics and images ---------------------------------------------------------------------------

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append metrics and counters to metrics.jsonl and send them to the trackers; `step` is epochs completed.

        Where that cannot be written, the next `check_stop` ends the training.
        """
        if not self.is_main:
            return
        self._tell_trackers()  # they read the history when they start
        spent = self.counters.state_dict()
        del spent["epoch"], spent["groups"]  # the step says them
        values = {name: _number(value) for name, value in (spent | dict(metrics)).items()}
        try:
            if not self.holds_folder():
                raise FileNotFoundError(errno.ENOENT, "the folder has been moved or deleted")
            append_line(self.folder / HISTORY_FILE, {"step": int(step)} | values, create=not self._logged)
            self._logged = True
        except OSError as error:
            self._failure = (
                f"{self.folder / HISTORY_FILE} cannot be written ({error.strerror}) after {self.counters.epoch} "
                "epochs; the checkpoints that were saved are intact"
            )
        self._tell_trackers(lambda tracker: tracker.log(values, step=step))

    def log_image(self, name: str, image: Image.Image | np.ndarray, step: int) -> None:
        """Write images/<name>_<step>.png and send it to the trackers; one that cannot be written is told and left out.

        An array is (H, W) or (H, W, 3), of uint8 or of floats in [0, 1].
        """
        if not self.is_main:
            return
        pixels = pixels_of(image)  # (H, W, 3)
        path = self.folder / IMAGE_FOLDER / f"{name}_{step:06d}.png"
        if not self.holds_folder():
            return  # `log` tells
        with self.writing(str(path)):
            path.parent.mkdir(exist_ok=True)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            write_atomically(path, buffer.getvalue())
        self._tell_trackers(lambda tracker: tracker.log_images({name: pixels[None]}, step=step))

    def log_record(self, path: Path) -> None:
        """Send the record of an evaluation, which has been written there, to the trackers."""
        if self.is_main and self.settings.config.trackers:
            record = read_record(path)
            self._tell_trackers(lambda tracker: tracker.log_record(record))

    def _tell_trackers(self, what: Callable[[Board], None] = lambda tracker: None) -> None:
        """Of the main process: tell every tracker. The first word starts them: a run that never began is not shown.

        Where one cannot write, the run goes on without them.
        """
        try:
            if self._start_trackers is not None:
                start, self._start_trackers = self._start_trackers, None
                self.accelerator.trackers = start()
            for tracker in self.accelerator.trackers:
                what(tracker)
        except OSError as error:
            self.tell(f"a tracker cannot write ({error.strerror or error}): the run goes on without trackers.")
            finish_trackers(self.accelerator.trackers, exit_code=1)
            self.accelerator.trackers = []

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """For records that a run can do without: an OSError inside the block is told once, and no more."""
        try:
            yield
        except OSError as error:
            self.tell(f"{what} could not be written ({error.strerror}); the run goes on.", key="record")

    def tell(self, text: str, key: str = "") -> None:
        """Say something on the terminal, once: texts with the same key count as the same."""
        if self.is_main and (key or text) not in self._told:
            self._told.add(key or text)
            say(text)

    def truncate_history(
        self, step: int, evaluation_redone: bool = True, expected: Mapping[str, Any] | None = None
    ) -> None:
        """Forget what a resumed run will do again: metrics later than `step`, its checkpoint's epoch.

        The evaluation at `step` itself is forgotten too, unless it is not `evaluation_redone`; so are the evaluators'
        own records, files named <label>_<step>.json and .webp. The history is replaced in one piece; a last line torn
        by a crash goes with it, and so do damaged lines, in a file of their own.

        Args:
            expected: size and digest of the history at `step`, as the checkpoint has them; it is checked against them.
        """
        if not self.is_main:
            return
        last_evaluation = step - 1 if evaluation_redone else step
        path = self.folder / HISTORY_FILE
        if path.exists():
            self._logged = True
            self._truncate_lines(path, step, last_evaluation, expected)
        elif expected is not None and expected.get("size"):
            self.tell(f"{path} is missing: the history of the epochs so far is lost, and goes on from here.")
        for record in [file for name in RECORD_FOLDERS for file in (self.folder / name).glob("eval*_*")]:
            match = RECORD_NAME.fullmatch(record.name)
            if match is not None and int(match["step"]) > last_evaluation:
                record.unlink()

    def _truncate_lines(self, path: Path, step: int, last_evaluation: int, expected: Mapping[str, Any] | None) -> None:
        """Of the history: byte for byte where it is as it was, else line by line."""
        if expected is not None and starts_with(path, expected):
            os.truncate(path, expected["size"])
            return
        if expected is not None:
            self.tell(f"{path} is not what it was when the checkpoint was saved: what can be read of it is kept.")
        lines, lost = salvage_history(path)
        if lost:
            self.tell(f"{path} has {lost} damaged lines: as it was, it is now {keep_damaged(path)}.")
        kept = [line for line in lines if line["step"] <= (last_evaluation if is_evaluation(line) else step)]
        write_history(path, kept)

    # --- stopping -------------------------------------------------------------------------------------

    def arm(self) -> None:
        """Training begins: from now on, note a signal instead of ending at once; `check_stop` raises it."""
        self._stop.armed = True
        if self.is_main:
            self._tell_trackers()

    def check_stop(self, ended: bool = False) -> None:
        """Collective: every process asks, after the same minibatches, and all are told the same.

        Args:
            ended: whether there is nothing left to stop.

        Raises:
            Interrupted: some process was asked to stop.
            TrainingStopped: the main process can no longer write metrics.
            RewardFailed: a reward failed inside `failing_together`, on this process or another.
        """
        asked = int(self._stop.reason() or 0)
        if self._failure:
            code = FAILURE
        elif self._unrewarded:
            code = asked or NO_REWARD  # who is asked to stop does not wait for scores: that is no failure
        else:
            code = 0 if ended else asked
        if self.accelerator.num_processes > 1:
            codes = self.accelerator.gather(torch.tensor([code], device=self.accelerator.device))
            code = int(codes.max())
        if code == FAILURE:
            raise TrainingStopped(self._failure or "the main process can no longer write the run's metrics")
        if code == NO_REWARD:
            failure = next(one for one in gather_object([self._unrewarded]) if one is not None)
            failure.agreed = True
            raise failure
        if code:
            raise Interrupted(Reason(code), f"after epoch {self.counters.epoch}")

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """A reward that fails in the block ends the training at the next `check_stop`, on every process."""
        try:
            yield
        except RewardFailed as error:
            self._unrewarded = self._unrewarded or RewardFailed(error.name, error.what, error.when)

    # --- progress and time ----------------------------------------------------------------------------

    def progress(self, iterable_or_total: Iterable[Any] | int, description: str, leave: bool = False) -> tqdm[Any]:
        """A progress bar over an iterable, or over range(total); silent on all but the main process.

        `leave` keeps the finished bar on the screen: for the outermost loop. Where the output is a file, bars are
        redrawn rarely and short ones not drawn at all.
        """
        return bar(iterable_or_total, description, leave, silent=not self.is_main)

    @contextmanager
    def timer(self) -> Iterator[None]:
        """Add the wall time of a block to `counters.seconds`, the GPU's queue included.

        Collective: every process must enter it, and all are given the main process's time, so that they take the
        same decision on `config.max_seconds`. A block that raises is not counted.
        """
        start, self._uncounted = self._now(), 0.0
        yield
        self.counters.seconds += self._broadcast(self._now() - start - self._uncounted)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Within `timer`: the wall time of a block that only does again what the run has paid for."""
        start = self._now()
        yield
        self._uncounted += self._now() - start

    def _now(self) -> float:
        """Seconds, once the GPU's queue is empty."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)
        return time.perf_counter()

    def finish(self, exit_code: int = 0) -> None:
        """Close the trackers, leave the process group, and unlock the folder. Nothing can be logged afterwards.

        Args:
            exit_code: with which the run ends, for the trackers.
        """
        try:
            if self._start_trackers is None and (self.folder / PAGE_FILE).is_file():
                self._tell_trackers(lambda tracker: tracker.log_page(self.folder / PAGE_FILE))
            finish_trackers(self.accelerator.trackers, exit_code)
            self.accelerator.trackers.clear()
            self.accelerator.end_training()
        finally:
            if self._opened is not None:
                self._opened.lock.release()

    # --- setting up -----------------------------------------------------------------------------------

    def from_main(self, function: Callable[[], T]) -> T:
        """Collective: what `function` returns on the main process, on every process; so is what it refuses."""
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = function()
            except (ConfigError, TrainingStopped) as error:
                answer[1] = error
        value, refusal = self._broadcast(answer)
        if refusal is not None:
            self._release_refused()
            raise refusal
        return value

    def _broadcast(self, value: Any) -> Any:
        """The main process's value, on every process."""
        return broadcast_object_list([value])[0]

    def _release_refused(self) -> None:
        """Unlock a folder that this run turned out not to use."""
        if self._opened is not None and not hasattr(self, "run_id"):
            self._opened.lock.release()

    def _open(self) -> tuple[Path, bool, Path | None]:
        self._opened = opened = open_folder(self.settings.config)
        if opened.checkpoint is not None:
            self._check_base(opened.checkpoint)
        return opened.path, opened.resumed, opened.checkpoint

    def _check_base(self, checkpoint: Path) -> None:
        """ConfigError if the checkpoint is of other base weights than those in the configuration's folder."""
        if problem := base_mismatch(checkpoint, self.base_sha256):
            raise ConfigError(f"{base_words(self.settings.config.pretrained)} {problem}")

    def _begin(self) -> str:
        """Write the records and choose the trackers; the run's id."""
        names = choose_trackers(self.settings.config.trackers)
        earlier = self.checkpoint if self.resumed else None
        environment = write_records(self.folder, self.settings, self.accelerator, earlier)
        settings = flatten(self.settings.config.to_dict())
        description = Description(self.name, settings | {"run_name": self.name}, environment)
        self._start_trackers = lambda: self._started(names, description)
        return str(environment["run_id"])

    def _started(self, names: Sequence[str], description: Description) -> list[Board]:
        """The trackers; those that forget what is done again are told the rest once more."""
        first, once_more = self._done_again()
        trackers = start_trackers(names, description, self.folder, self.run_id, first)
        for tracker in trackers:
            for line in once_more if tracker.name == "tensorboard" else ():
                tracker.log({name: _number(value) for name, value in line.items() if name != "step"}, step=first)
        return trackers

    def _done_again(self) -> tuple[int | None, list[dict[str, Any]]]:
        """The first epoch of which something is logged again, and what was logged of it that is not; None: none is."""
        if not self.resumed or self.checkpoint is None:
            return None, []
        state = checkpoint_state(self.checkpoint)
        epoch, path = state["counters"]["epoch"], self.folder / HISTORY_FILE
        if state.get("evaluated", True):
            return epoch + 1, []
        lines = salvage_history(path)[0] if path.is_file() else []
        return epoch, [line for line in lines if line["step"] == epoch and not is_evaluation(line)]


def _number(value: Any) -> int | float:
    """A Python number of a number, a numpy scalar or a tensor of one element; nan of None, as histories have it."""
    return math.nan if value is None else value if isinstance(value, int) else float(value)
