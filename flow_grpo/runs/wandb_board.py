"""A run on wandb; offline where there is no key, or the server cannot be reached."""

from __future__ import annotations

import math
import netrc
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from accelerate.tracking import WandBTracker

from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import one_line
from flow_grpo.runs.dashboard import (
    AXES,
    BEST,
    SAMPLES,
    SECTIONS,
    TRAINING,
    Description,
    captioned,
    prefixed,
    shown,
    table_of,
)
from flow_grpo.runs.history import deciding_metric
from flow_grpo.runs.record import Record

WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
SUMMARIES = {  # of a run's row in a table of runs; the rest: the last value
    "a_reward": "max,last",
    "b_judge": "max,last",
    "c_diversity": "min,last",
}


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
        found_by = ((label, metric) for label, metric in deciding.items() if metric is not None and metric in values)
        label, metric = next(found_by, ("", None))
        if metric is None or values[metric] <= self._best:
            return
        self._best = values[metric]
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
            self.run.log(prefixed(prefix, values) | {f"{prefix}/epoch": epoch})
        for name, image in images.items():
            self.run.log({f"{prefix}/{name}": wandb.Image(image[0])})

    def finish(self) -> None:
        """End the wandb run, with `exit_code`."""
        self.run.finish(exit_code=self.exit_code)


def start_wandb(description: Description, folder: Path, run_id: str) -> WandB | None:
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
