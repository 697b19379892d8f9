"""What wandb and tensorboard are told of a run; the only file that knows them.

Metrics keep their names in metrics.jsonl. On a dashboard they stand in sections whose names sort in the order of use:

    a_reward/total         eval/reward/total, the current weights on held-out noise
    a_reward/total_ema     eval_ema/reward/total, the averaged weights
    a_reward/train         train/reward
    b_judge/ c_diversity/ d_entropy/    the same way
    e_training/            what else an epoch logs, and the counters
    samples/               images, in wandb also the table of every image and the page

A letter comes first because wandb sorts runs only by names that begin with one.
"""

from __future__ import annotations

import importlib.util
import math
import netrc
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from accelerate import Accelerator, PartialState
from accelerate.tracking import TensorBoardTracker, WandBTracker
from ml_collections import ConfigDict
from PIL import Image

from flow_grpo.diversity.images import read_rgb
from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import one_line
from flow_grpo.files import read_object
from flow_grpo.runs.folder import ENVIRONMENT_FILE, TRACKERS, flatten
from flow_grpo.runs.history import deciding_metric, is_evaluation
from flow_grpo.runs.record import Record

WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
WANDB_TAG = 64  # characters at most
AXES = ("epoch", "seconds", "network_evaluations")
SECTIONS = {
    "reward": "a_reward",
    "judge": "b_judge",
    "diversity": "c_diversity",
    "modes": "c_diversity/modes",
    "entropy": "d_entropy",
    "ode_log_prob": "d_entropy/ode_log_prob",
}
TRAINING, SAMPLES = "e_training", "samples"
SUMMARIES = {  # of a run's row in a table of runs; the rest: the last value
    "a_reward": "max,last",
    "b_judge": "max,last",
    "c_diversity": "min,last",
}
BEST = ("reward/total", "judge/accuracy", "diversity/vendi")  # shown of the evaluation that decides
ENDS = re.compile(r"diversity/\w+_(low|high)$")  # of intervals: no curves of their own
MOST_IMAGES = 80  # of one evaluation with a caption each: wandb shows about a hundred
CAPTION = 200  # characters


def shown_as(metric: str) -> str | None:
    """The dashboard's name of a metric of the history; None: it is not shown."""
    if ENDS.search(metric):
        return None
    label, _, rest = metric.partition("/")
    kind, _, name = rest.partition("/")
    if not rest:  # a counter
        return metric if metric in AXES else f"{TRAINING}/{metric}"
    if label == "train":
        return f"{SECTIONS['reward']}/train{rest[6:]}" if rest.startswith("reward") else f"{TRAINING}/{rest}"
    if label in ("eval", "eval_ema") and kind in SECTIONS:
        return f"{SECTIONS[kind]}/{name}{label[4:]}"
    return metric


def shown(values: Mapping[str, float]) -> dict[str, float]:
    """The values that a dashboard shows, by its names."""
    named = ((shown_as(name), value) for name, value in values.items())
    return {name: value for name, value in named if name is not None}


# --- what a run is, to those who look at many -----------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """A run's name, and its settings and environment as config.json and environment.json have them."""

    name: str
    config: Mapping[str, Any]  # by full names: flow_grpo.runs.folder.flatten
    environment: Mapping[str, Any]

    @property
    def method(self) -> str:
        """Which loop trains it."""
        return "drtune" if self.config.get("use_reward_gradient") else "grpo"

    @property
    def rewards(self) -> list[str]:
        """Those that are trained on."""
        keys = (key for key, weight in self.config.items() if key.startswith("reward_fn.") and weight)
        return [key.removeprefix("reward_fn.") for key in keys]

    @property
    def tags(self) -> list[str]:
        """Method, model, rewards."""
        model = Path(str(self.config.get("pretrained.model", ""))).name
        return [tag[:WANDB_TAG] for tag in (self.method, model, *self.rewards) if tag]

    @property
    def hyperparameters(self) -> dict[str, bool | int | float | str]:
        """Settings, device, batch plan and state of the code, flat."""
        keys = ("device", "processes", "batch_plan", "git")
        values = {**self.config, **flatten({key: self.environment.get(key) for key in keys})}
        return {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()
        }


# --- the two of them ------------------------------------------------------------------------------------


class WandB(WandBTracker):
    """accelerate's, with axes, summaries, sections, and what a run has besides numbers.

    Steps of wandb's own are not used: they would drop what a run that went on does again.

    Attributes:
        exit_code: with which the run is said to have ended.
    """

    def __init__(self, description: Description, project: str, **options: Any) -> None:
        """`options`: as of wandb.init."""
        group = description.config.get("recipe") or None
        super().__init__(project, group=group, job_type=description.method, tags=description.tags, **options)
        self.description = description
        self.exit_code = 0
        self._best = -math.inf

    def start(self) -> None:
        """Start the wandb run."""
        super().start()
        for axis in AXES:
            self.run.define_metric(axis, hidden=True)
        for section in (*dict.fromkeys(name.partition("/")[0] for name in SECTIONS.values()), TRAINING, SAMPLES):
            self.run.define_metric(f"{section}/*", step_metric="epoch", summary=SUMMARIES.get(section))
        best = self.run.summary.get("best/score")  # of a run that goes on
        self._best = best if isinstance(best, int | float) else -math.inf

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The hyperparameters."""
        self.run.config.update(values, allow_val_change=True)

    def log(self, values: Mapping[str, float], step: int | None = None, **_: Any) -> None:
        """Metrics of the history; `step` is the epoch. Those that are not finite are left out: they end a maximum."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.run.log({"epoch": step} | shown(finite))
        self._note_best(finite, step)

    def _note_best(self, values: Mapping[str, float], step: int | None) -> None:
        """Keep, in the summary, the evaluation whose deciding metric is the highest so far."""
        deciding = {label: deciding_metric(self.description.config, label) for label in ("eval_ema", "eval")}
        label = next((label for label, metric in deciding.items() if metric in values), None)
        if label is None or values[deciding[label]] <= self._best:
            return
        self._best = values[deciding[label]]
        self.run.summary.update({"best/epoch": step, "best/score": self._best})
        found = {name.replace("/", "_"): values.get(f"{label}/{name}") for name in BEST}
        self.run.summary.update({f"best/{name}": value for name, value in found.items() if value is not None})

    def log_images(self, values: Mapping[str, np.ndarray], step: int | None = None, **_: Any) -> None:
        """Images (1, H, W, 3) uint8 by name."""
        import wandb

        self.run.log({"epoch": step} | {f"{SAMPLES}/{name}": wandb.Image(image[0]) for name, image in values.items()})

    def log_record(self, record: Record) -> None:
        """An evaluation's images with captions, and a table of all of them."""
        import wandb

        told: dict[str, Any] = dict(zip(AXES, (record.epoch, record.seconds, record.network_evaluations), strict=True))
        pictures = [wandb.Image(image, caption=text) for image, text in captioned(record)]
        if pictures:
            told[f"{SAMPLES}/{record.label}_images"] = pictures
        columns, rows = table_of(record)
        told[f"{SAMPLES}/{record.label}_table"] = wandb.Table(columns=columns, data=rows)
        self.run.log(told)

    def log_page(self, page: Path) -> None:
        """The page of the run."""
        import wandb

        self.run.log({f"{SAMPLES}/page": wandb.Html(str(page), inject=False)})

    def log_checkpoints(
        self, prefix: str, metrics: Mapping[int, Mapping[str, float]], images: Mapping[str, np.ndarray]
    ) -> None:
        """What was measured of checkpoints after the run: on an axis of its own."""
        import wandb

        self.run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/epoch")
        for epoch, values in sorted(metrics.items()):
            self.run.log(_prefixed(prefix, values) | {f"{prefix}/epoch": epoch})
        for name, image in images.items():
            self.run.log({f"{prefix}/{name}": wandb.Image(image[0])})

    def finish(self) -> None:
        """End the wandb run, with `exit_code`."""
        self.run.finish(exit_code=self.exit_code)


class TensorBoard(TensorBoardTracker):
    """accelerate's, with the same sections as wandb, and the settings in the run's own folder of events."""

    exit_code = 0  # tensorboard has no place for it

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """For the page of hyperparameters: accelerate's way would show a run more for each session."""
        from torch.utils.tensorboard.summary import hparams

        metrics = {f"{SECTIONS[name.partition('/')[0]]}/{name.partition('/')[2]}": 0.0 for name in BEST}
        for part in hparams(values, metrics):
            self.writer.file_writer.add_summary(part)
        self.writer.flush()

    def log(self, values: Mapping[str, float], step: int | None = None, **_: Any) -> None:
        """Metrics of the history; the counters, which every line of it has, once an epoch."""
        once = {name: value for name, value in values.items() if "/" in name or not is_evaluation(values)}
        super().log(shown(once), step=step)

    def log_images(self, values: Mapping[str, np.ndarray], step: int | None = None, **_: Any) -> None:
        """Images (1, H, W, 3) uint8 by name."""
        super().log_images({f"{SAMPLES}/{name}": v for name, v in values.items()}, step=step, dataformats="NHWC")

    def log_record(self, record: Record) -> None:
        """Nothing: tensorboard has neither captions nor tables."""

    def log_page(self, page: Path) -> None:
        """Nothing: tensorboard shows no HTML."""

    def log_checkpoints(
        self, prefix: str, metrics: Mapping[int, Mapping[str, float]], images: Mapping[str, np.ndarray]
    ) -> None:
        """What was measured of checkpoints after the run."""
        for epoch, values in sorted(metrics.items()):
            super().log(_prefixed(prefix, values), step=epoch)
        for name, image in images.items():
            super().log_images({f"{prefix}/{name}": image}, step=max(metrics), dataformats="NHWC")


Board = WandB | TensorBoard


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": float(value) for name, value in values.items() if not ENDS.search(name)}


# --- an evaluation's images -----------------------------------------------------------------------------


def captioned(record: Record) -> list[tuple[np.ndarray, str]]:
    """The first images (H, W, 3) with "reward | judge | prompt"; none where there is no sprite to be read."""
    path, sprite = record.sprite_path, record.sprite
    if path is None or sprite is None:
        return []
    try:
        grid = read_rgb(path)  # (H, W, 3)
    except ConfigError:
        return []
    width, height = sprite.cell
    tiles = []
    for place, i in enumerate(sprite.images[:MOST_IMAGES]):
        row, column = divmod(place, sprite.columns)
        tile = grid[row * height :, column * width :][:height, :width]
        if tile.size:
            tiles.append((tile, caption(record, i)))
    return tiles


def caption(record: Record, i: int) -> str:
    """0.5120 | ✓ 0.93 | a bag: the reward; whether the judge likes the own prompt best, with its probability."""
    reward = (record.rewards.get("total") or {i: None})[i]
    parts = ["-" if reward is None else f"{reward:.4f}"]
    if record.judge is not None:
        guess, probability = record.judge.guess[i], record.judge.probability[i]
        mark = "-" if guess is None else "✓" if guess == record.prompt[i] else f"✗ {record.prompts[guess]}"
        parts.append(mark if probability is None else f"{mark} {probability:.2f}")
    return one_line(" | ".join([*parts, record.prompts[record.prompt[i]]]), CAPTION)


def table_of(record: Record) -> tuple[list[str | int], list[list[Any]]]:
    """Columns, and a row for each image."""
    columns: dict[str, Sequence[Any]] = {
        "epoch": [record.epoch] * len(record.prompt),
        "prompt": [record.prompts[p] for p in record.prompt],
        "noise": record.noise,
    }
    columns |= {f"reward {name}": values for name, values in record.rewards.items()}
    if record.judge is not None:
        guess = record.judge.guess
        columns["judge's guess"] = [None if g is None else record.prompts[g] for g in guess]
        columns["judge is right"] = [None if g is None else g == p for g, p in zip(guess, record.prompt, strict=True)]
        columns["judge's probability"] = record.judge.probability
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


# --- starting and ending --------------------------------------------------------------------------------


def choose_trackers(wanted: Sequence[str]) -> tuple[str, ...]:
    """Those of the wanted ones that are installed.

    Raises:
        ConfigError: WANDB_MODE is none that wandb knows.
    """
    names = tuple(name for name in TRACKERS if name in wanted and _is_installed(name))
    if "wandb" in names:
        wandb_mode()
    return names


def start_trackers(
    names: Sequence[str], description: Description, folder: Path, run_id: str = "", purge_step: int | None = None
) -> list[Board]:
    """Start trackers that write into `folder`. A wandb that cannot be reached leaves the run offline.

    Args:
        run_id: under which wandb knows the run; empty: a new one.
        purge_step: of a run that goes on, the first step that is done again: tensorboard forgets it and later ones.

    Raises:
        OSError: something cannot be written; none is left running.
    """
    PartialState(cpu=True)  # accelerate's trackers ask for it; in a training it is there already
    boards: list[Board] = []
    try:
        for name in names:
            board = _start_wandb(description, folder, run_id) if name == "wandb" else _tensorboard(folder, purge_step)
            if board is not None:
                boards.append(board)
                board.store_init_configuration(description.hyperparameters)
    except OSError:
        finish_trackers(boards, exit_code=1)
        raise
    return boards


def finish_trackers(boards: Sequence[Board], exit_code: int = 0) -> None:
    """End them; one that can no longer write is left as it is."""
    for board in boards:
        board.exit_code = exit_code
        with suppress(OSError):
            board.finish()


def _tensorboard(folder: Path, purge_step: int | None) -> TensorBoard:
    board = TensorBoard("tensorboard", folder, purge_step=purge_step)
    board.start()
    return board


def _start_wandb(description: Description, folder: Path, run_id: str) -> WandB | None:
    """wandb's run; offline where it cannot be reached, None where it cannot even write that."""
    from wandb.errors import Error as WandbError

    wanted = wandb_mode()
    for mode in dict.fromkeys((wanted, "offline")):
        os.environ["WANDB_MODE"] = mode  # wandb reads it too, and knows small letters only
        before = set(_wandb_folders(folder))
        options = {"name": description.name, "dir": str(folder), "mode": mode}
        if mode == "online" and run_id:  # offline, a second folder of one id would replace the first when it is synced
            options |= {"id": run_id, "resume": "allow"}
        board = WandB(description, str(description.config.get("project") or "flow-matching-entropy"), **options)
        try:
            board.start()
        except WandbError as error:
            then = "goes on without wandb" if mode == "offline" else f"is kept offline in {folder}"
            warnings.warn(f"wandb could not start ({one_line(str(error))}); this run {then}", stacklevel=2)
            for failed in set(_wandb_folders(folder)) - before:  # or `wandb sync` would make an empty run of it
                shutil.rmtree(failed, ignore_errors=True)
            continue
        return board
    return None


def _wandb_folders(folder: Path) -> list[Path]:
    """Of wandb's runs, in the folder that it was given."""
    return [path for path in (folder / "wandb").glob("*run-*-*") if not path.is_symlink()]


def wandb_mode() -> str:
    """The environment's WANDB_MODE; without one, or without a key, "online" becomes "offline": wandb never asks.

    Raises:
        ConfigError: WANDB_MODE is none that wandb knows.
    """
    given = os.environ.get("WANDB_MODE") or "online"
    mode = given.lower()
    if mode not in WANDB_MODES:
        raise ConfigError(f"WANDB_MODE={given} is not allowed; it takes {', '.join(WANDB_MODES)}.")
    return "offline" if mode == "online" and not _has_wandb_key() else mode


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        logins = netrc.netrc(str(file))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(logins.authenticators(host) is not None for host in _wandb_hosts())


def _wandb_hosts() -> list[str]:
    """Under which `wandb login` may have kept a key: wandb has moved its own server once."""
    import wandb

    given = os.environ.get("WANDB_BASE_URL")
    own = [given] if given else [wandb.Settings().base_url, "https://api.wandb.ai"]
    return [urlparse(str(url)).hostname or "" for url in own]


def _is_installed(tracker: str) -> bool:
    if importlib.util.find_spec(tracker) is not None:
        return True
    warnings.warn(
        f"tracker {tracker!r} is not installed (pip install {tracker}): the run goes on without it", stacklevel=2
    )
    return False


# --- after the run --------------------------------------------------------------------------------------


def log_checkpoints(
    accelerator: Accelerator,
    config: ConfigDict,
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
        environment = read_object(folder / ENVIRONMENT_FILE)
        run_id = str(environment["run_id"])
    except (ConfigError, KeyError):
        raise ConfigError(f"{folder / ENVIRONMENT_FILE} does not name a run: {folder} is no run folder.") from None
    description = Description(folder.name, flatten(config.to_dict()), environment)
    pictures = {name: pixels_of(image)[None] for name, image in (images or {}).items()}
    boards = start_trackers(choose_trackers(config.trackers), description, folder, run_id)
    for board in boards:
        board.log_checkpoints(prefix, metrics, pictures)
    finish_trackers(boards)
    accelerator.end_training()


def pixels_of(image: Image.Image | np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 of a picture, or of an array (H, W) or (H, W, 3) of uint8 or of floats in [0, 1]."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if np.issubdtype(image.dtype, np.floating):
        image = np.round(image.clip(0, 1) * 255).astype(np.uint8)
    return np.asarray(Image.fromarray(image).convert("RGB"))
