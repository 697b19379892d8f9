"""A run on tensorboard, in its own folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import TensorBoardTracker

from flow_grpo.runs.dashboard import BEST, SAMPLES, SECTIONS, prefixed, shown
from flow_grpo.runs.history import is_evaluation
from flow_grpo.runs.record import Record


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
            super().log(prefixed(prefix, values), step=epoch)
        for name, image in images.items():
            super().log_images({f"{prefix}/{name}": image}, step=max(metrics), dataformats="NHWC")


def start_tensorboard(folder: Path, purge_step: int | None) -> TensorBoard:
    """Its events begin; of a run that goes on, those from `purge_step` on are forgotten."""
    board = TensorBoard("tensorboard", folder, purge_step=purge_step)
    board.start()
    return board
