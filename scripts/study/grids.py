"""The few image grids that are committed with the study's results."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from flow_grpo.crossing import first_at_least
from flow_grpo.runs.folder import IMAGE_FOLDER
from scripts.study.records import REWARD
from scripts.study.study_records import Study, StudyRecord


@dataclass(frozen=True)
class Sample:
    """An image grid that is committed with the results."""

    title: str
    method: str | None  # None: the base model
    run: str
    step: int
    reward: float

    @property
    def file(self) -> str:
        """Below the folder of the results."""
        return f"grids/{self.run}_{self.step:06d}.png"


def samples(study: Study) -> list[Sample]:
    """Of the first seed with both methods: base, DRTune at GRPO's reward, DRTune at its end, GRPO at its end."""
    if not study.pairs():
        return []
    drtune, grpo = study.pairs()[0]
    reached = first_at_least(drtune.rising_reward, grpo.final(REWARD))
    chosen: list[tuple[str, StudyRecord, int]] = [("base", drtune, 0)]
    if reached is not None:
        chosen.append(("DRTune at GRPO's reward", drtune, reached))
    chosen += [("DRTune", drtune, -1), ("GRPO", grpo, -1)]
    return [
        Sample(
            title if title == "base" else f"{title}, {record.curve('seconds')[i]:.0f} s",
            None if title == "base" else record.method,
            record.name,
            int(record.curve("step")[i]),
            float(record.curve(REWARD)[i]),
        )
        for title, record, i in chosen
    ]


def copy_grids(study: Study, logs: Path, out: Path) -> None:
    """From the run folders to the results; those of earlier results go."""
    chosen = samples(study)
    for old in set((out / "grids").glob("*.png")) - {out / sample.file for sample in chosen}:
        old.unlink()
    for sample in chosen:
        (out / sample.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(logs / sample.run / IMAGE_FOLDER / f"eval_{sample.step:06d}.png", out / sample.file)
