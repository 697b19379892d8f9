"""The study as data: every training run, by the claim that it serves.

A run's name says all that sets it apart, and is its folder under logs/study. Budgets are seconds of training, without
evaluation; network evaluations are recorded, and the figures show both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

SECONDS = 150.0
RATIO_SECONDS = 150.0
QUICK_SECONDS = 60.0
NO_LIMIT = 1_000_000  # epochs: the clock stops a run

# How all runs are evaluated. Samples are shared, so that diversity costs no further image.
EVALUATION: Mapping[str, Any] = {
    "num_epochs": NO_LIMIT,
    "num_checkpoint_limit": 1,
    "num_threads": 1,  # two runs share two cores
    "eval.ema": False,
    "eval_diversity": True,
    "eval_ode_log_prob": True,
    "num_seeds": 16,
    "entropy.num_prompts": 10,
    "entropy.num_image_per_prompt": 8,
    "entropy.num_probes": 2,
}


@dataclass(frozen=True)
class StudyRun:
    """One training run."""

    group: str  # the claim that it serves: "claims", "search", "ratio" or "frontier"
    label: str  # the curve that it belongs to, with the other seeds
    recipe: str
    seed: int
    seconds: float  # of training
    eval_freq: int  # epochs
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its folder: group, label and seed."""
        words = "".join(letter if letter.isalnum() or letter == "." else " " for letter in self.label.lower())
        return f"{self.group}-{'-'.join(words.split())}-seed{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """What is changed of the recipe."""
        frequencies = ("eval_freq", "eval_diversity_freq", "eval_ode_log_prob_freq")
        times = {**dict.fromkeys(frequencies, self.eval_freq), "save_freq": 4 * self.eval_freq}
        return {**EVALUATION, **times, "max_seconds": self.seconds, "seed": self.seed, **self.overrides}


# The two methods as the search below left them.
GRPO: Mapping[str, Any] = {}
DRTUNE: Mapping[str, Any] = {}


def claims(seeds: Sequence[int], seconds: float) -> list[StudyRun]:
    """Claims 1 and 2: reward and diversity of DRTune and GRPO."""
    pairs = [
        (
            StudyRun("claims", "DRTune", "tiny_sd3_use_gradient", seed, seconds, 12, DRTUNE),
            StudyRun("claims", "GRPO", "tiny_sd3", seed, seconds, 10, GRPO),
        )
        for seed in seeds
    ]
    return [run for pair in pairs for run in pair]


def search() -> list[StudyRun]:
    """The small search by which both methods were tuned: one seed that no claim uses, and a third of the time."""
    rates = (3e-4, 1e-3, 3e-3)
    runs = [
        StudyRun(
            "search",
            f"GRPO lr {rate:g} clip {clip:g}",
            "tiny_sd3",
            100,
            90.0,
            15,
            {"train.learning_rate": rate, "train.clip_range": clip},
        )
        for rate in rates[1:]
        for clip in (1e-3, 5e-3)
    ]
    runs += [
        StudyRun("search", f"DRTune lr {rate:g}", "tiny_sd3_use_gradient", 100, 90.0, 40, {"train.learning_rate": rate})
        for rate in rates
    ]
    return runs


def ratios(seeds: Sequence[int], seconds: float) -> list[StudyRun]:
    """Claim 4: GRPO with each form of the likelihood ratio; the clip range and all else are GRPO's."""
    forms = [("sde", 1)]
    forms += [("ode_step", probes) for probes in (1, 4, 16)]
    forms += [("ode_path", probes) for probes in (1, 4)]
    forms += [("cfm", 10)]
    return [
        StudyRun(
            "ratio",
            f"{form} {probes}" if form != "sde" else form,
            "tiny_sd3",
            seed,
            seconds,
            5,
            {**GRPO, "train.ratio": form, "train.ratio_probes": probes},
        )
        for seed in seeds
        for form, probes in forms
    ]


def frontier(seeds: Sequence[int], seconds: float) -> list[StudyRun]:
    """Reward against diversity at equal time: the KL penalty, and weighted or negative advantages."""
    runs = []
    for seed in seeds:
        for beta in (0.01, 0.1, 1.0):
            runs.append(
                StudyRun(
                    "frontier",
                    f"DRTune beta {beta:g}",
                    "tiny_sd3_use_gradient",
                    seed,
                    seconds,
                    24,
                    {**DRTUNE, "train.beta": beta},
                )
            )
            runs.append(
                StudyRun("frontier", f"GRPO beta {beta:g}", "tiny_sd3", seed, seconds, 12, {**GRPO, "train.beta": beta})
            )
        for mode in ("weighted", "negative"):
            runs.append(
                StudyRun(
                    "frontier",
                    f"GRPO {mode}",
                    "tiny_sd3",
                    seed,
                    seconds,
                    12,
                    {**GRPO, "train.advantage_mode": mode},
                )
            )
    return runs


def whole() -> list[StudyRun]:
    """`make study`."""
    seeds = range(5)
    return [
        *search(),
        *claims(seeds, SECONDS),
        *ratios(seeds[:3], RATIO_SECONDS),
        *frontier(seeds[:3], SECONDS),
    ]


def quick() -> list[StudyRun]:
    """`make study-quick`: two seeds of the two methods, in a quarter of the time, to be held against the whole."""
    return [replace(run, group="quick") for run in claims(range(2), QUICK_SECONDS)]
