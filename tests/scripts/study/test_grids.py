"""The committed image grids."""

from __future__ import annotations

from scripts.study.grids import samples
from tests.scripts.study.builders import record, study_of


def test_the_committed_grids_are_base_equal_reward_and_ends() -> None:
    whole = study_of([record(), record("GRPO", reward=(0.5, 0.55), seconds=(0, 20))])
    assert [(sample.title, sample.step, sample.reward) for sample in samples(whole)] == [
        ("base", 0, 0.5),
        ("DRTune at GRPO's reward, 10 s", 10, 0.6),
        ("DRTune, 20 s", 20, 0.9),
        ("GRPO, 20 s", 10, 0.55),
    ]
