"""The study as data: every training run, by the claim that it serves.

A run's name says all that sets it apart, and is its folder under logs/study. Budgets are seconds of training, without
evaluation, or epochs where the cost of an update is not what is asked; network evaluations are recorded, and the
figures show both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

SECONDS = 150.0
QUICK_SECONDS = 60.0
RATIO_EPOCHS = 15
GENTLER = "DRTune lr 0.001"
SEARCH_SEED = 100  # no claim uses it
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
    seconds: float  # of training; 0: no limit
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
GRPO: Mapping[str, Any] = {
    "train.learning_rate": 3e-3,
    "train.clip_range": 1e-3,
    "train.updates_per_epoch": 4,
    "sample.num_steps": 5,
}
DRTUNE: Mapping[str, Any] = {"train.learning_rate": 1e-2}

# Forms of the ratio with their probes or draws (0: the exact trace); `sde` first: the others are held against it.
FORMS = (
    ("sde", 1), ("cfm", GRPO["sample.num_steps"]), ("ode_step", 1), ("ode_step", 4), ("ode_step", 16), ("ode_step", 0),
    ("ode_path", 1), ("ode_path", 4),
)  # fmt: skip


def claims(seeds: Sequence[int], seconds: float) -> list[StudyRun]:
    """Claims 1 and 2: reward and diversity of DRTune and GRPO."""
    pairs = [
        (
            StudyRun("claims", "DRTune", "tiny_sd3_use_gradient", seed, seconds, 4, DRTUNE),
            StudyRun("claims", "GRPO", "tiny_sd3", seed, seconds, 15, GRPO),
        )
        for seed in seeds
    ]
    return [run for pair in pairs for run in pair]


def search() -> list[StudyRun]:
    """The small search by which both methods were tuned: one seed that no claim uses, and less time than theirs.

    Learning rates first (and GRPO's clip range); then, from GRPO's best, one change of rollouts or updates at a time;
    then from the best of those once more. GRPO, the slower of the two, gets more trials than DRTune.
    """

    def run(label: str, recipe: str, eval_freq: int, overrides: Mapping[str, Any]) -> StudyRun:
        return StudyRun("search", label, recipe, SEARCH_SEED, 90.0, eval_freq, overrides)

    runs = [
        run(f"GRPO lr {r:g} clip {c:g}", "tiny_sd3", 15, {"train.learning_rate": r, "train.clip_range": c})
        for r in (1e-3, 3e-3)
        for c in (1e-3, 5e-3)
    ]
    runs += [
        run(f"DRTune lr {rate:g}", "tiny_sd3_use_gradient", 40, {"train.learning_rate": rate})
        for rate in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    ]
    changes: Mapping[str, Mapping[str, Any]] = {
        "window 3": {"sample.sde_window_size": 3},
        "noise 0.4": {"sample.noise_level": 0.4},
        "noise 1": {"sample.noise_level": 1.0},
        "half the steps": {"train.timestep_fraction": 0.5},
        "groups of 16": {"sample.num_image_per_prompt": 16, "sample.groups_per_epoch": 5},
        "4 updates": {"train.updates_per_epoch": 4},
        "8 updates": {"train.updates_per_epoch": 8},
    }
    first = {"train.learning_rate": 3e-3, "train.clip_range": 1e-3}
    runs += [run(f"GRPO {name}", "tiny_sd3", 15, {**first, **change}) for name, change in changes.items()]
    second = {**first, "train.updates_per_epoch": 4}
    changes = {"lr 0.01": {"train.learning_rate": 1e-2}, "5 sampler steps": {"sample.num_steps": 5}}
    return runs + [
        run(f"GRPO 4 updates {name}", "tiny_sd3", 15, {**second, **change}) for name, change in changes.items()
    ]


def ratios(seeds: Sequence[int], epochs: int) -> list[StudyRun]:
    """Claim 4: GRPO with each form of the likelihood ratio, all else alike, for the same number of updates.

    Without the exact trace, which takes 256 products where a probe takes one: gradient_noise.py has its gradient.
    """
    return [
        StudyRun(
            "ratio",
            f"{form} {probes}" if form != "sde" else form,
            "tiny_sd3",
            seed,
            0.0,
            5,
            {**GRPO, "num_epochs": epochs, "train.ratio": form, "train.ratio_probes": probes},
        )
        for form, probes in FORMS
        if probes > 0
        for seed in seeds
    ]


def frontier(seeds: Sequence[int], seconds: float) -> list[StudyRun]:
    """Reward against diversity at equal time: DRTune with a KL penalty, and with a tenth of the learning rate."""
    changes: dict[str, Mapping[str, Any]] = {
        f"DRTune beta {beta:g}": {**DRTUNE, "train.beta": beta} for beta in (0.01, 0.1, 1.0)
    }
    changes[GENTLER] = {"train.learning_rate": 1e-3}
    runs = []
    for seed in seeds:
        runs += [
            StudyRun("frontier", label, "tiny_sd3_use_gradient", seed, seconds, 8, overrides)
            for label, overrides in changes.items()
        ]
    return runs


def whole() -> list[StudyRun]:
    """`make study`."""
    seeds = range(5)
    return [
        *search(),
        *claims(seeds, SECONDS),
        *ratios(seeds[:3], RATIO_EPOCHS),
        *frontier(seeds[:3], SECONDS),
    ]


def quick() -> list[StudyRun]:
    """`make study-quick`: two new seeds of both methods, in two fifths of the time, to be held against the whole."""
    return [replace(run, group="quick") for run in claims((5, 6), QUICK_SECONDS)]
