"""The study as data: its two testbeds, the runs on them, how these are measured, and the exact curve beside them.

- `tiny`: the tiny SD3, a CLIP's similarity as reward, all on one thread. GRPO gains little more here than seeds differ.
- `scenes`: headroom (docs/scenes.md). A reward of 0 or 1 for methods that look at rewards alone, the log-probability of
  being right for those that take its gradient; trained on captions of two objects, counting and position.

The epochs of a run are its budget in seconds over its committed seconds an epoch, fixed before any run: a busy machine
changes nothing. Torch is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object
from flow_grpo.methods.registry import METHODS
from flow_grpo.scenes.captions import KINDS
from scripts.study.paths import OUT, ROOT

COST, CURVE = "cost.json", "curve.json"
SEEDS, SEEDS_OF_CLAIMS = range(3), range(5)  # of every method, and of those that the claims are about
SEARCH_SEED, QUICK_SEED = 100, 50  # of what was tried, and of `make study-quick`: no result uses them
HARD_PROMPTS = "assets/prompts/scenes/test_hard.jsonl"

# How all runs are evaluated. Samples are shared, so that diversity costs no further image.
EVALUATION: Mapping[str, Any] = {
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

    testbed: str
    label: str  # that it shares with the other seeds
    recipe: str
    seed: int
    eval_freq: int  # epochs
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its folder: testbed, label and seed."""
        return f"{self.testbed}-{self.label.replace('_', '-')}-seed{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """What is changed of the recipe."""
        frequencies = ("eval_freq", "eval_diversity_freq", "eval_ode_log_prob_freq", "save_freq")
        return {**EVALUATION, **dict.fromkeys(frequencies, self.eval_freq), "seed": self.seed, **self.overrides}


@dataclass(frozen=True)
class Entry:
    """A method, and what differs from its recipe."""

    method: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""  # what people call it; empty: the method's title

    @property
    def title(self) -> str:
        """As tables have it."""
        return self.name or METHODS[self.method].title


@dataclass(frozen=True)
class Testbed:
    """One of them; its recipes are <name>_<method>."""

    name: str
    title: str
    threads: int  # with which the cost of an epoch is measured; runs have one each
    seconds: Mapping[bool, float]  # of training on free cores: True, by the reward's gradient; False, by rewards alone
    evaluations: int  # of a run, after the base's
    settings: Mapping[str, Any]  # of every run
    curve_of: tuple[str, Mapping[str, Any]]  # recipe whose base model and reward it is of, and what differs from it
    base_images: int  # of each prompt, for the curve
    reward: str  # metric of the reward that the curve is of
    columns: Mapping[str, str]  # figures beside those of every testbed -> metrics
    gains: tuple[float, ...]  # of that reward, at which methods are compared
    entries: Mapping[str, Entry]
    tried: Mapping[str, Entry]  # in search of the method on the curve

    def __str__(self) -> str:
        return self.name

    @property
    def results(self) -> Path:
        """The folder of what is committed."""
        return OUT / self.name

    def entry(self, label: str) -> Entry:
        """Of a run."""
        return {**self.entries, **self.tried}[label]

    def seconds_an_epoch(self, label: str, cost: Mapping[str, Any]) -> float:
        """As measured; of what was not measured itself, its method's."""
        found = cost["seconds"].get(label, cost["seconds"].get(self.entry(label).method))
        if found is None:
            raise ConfigError(
                f"{self.results / COST} does not say what an epoch of {label} costs; scripts/study/prepare.py measures "
                "it."
            )
        return float(found)

    def run(self, label: str, seed: int, out: Path | None = None) -> StudyRun:
        """The run of one entry and seed, with epochs by the committed cost; `out`: the folder of cost and curve."""
        folder = self.results if out is None else out.resolve()
        entry, cost = self.entry(label), read_object(folder / COST)
        budget = self.seconds[METHODS[entry.method].reward_gradient]
        epochs = max(1, round(budget / self.seconds_an_epoch(label, cost)))
        curve = folder / CURVE
        settings = {
            "num_epochs": epochs,
            "eval.curve": str(curve.relative_to(ROOT) if curve.is_relative_to(ROOT) else curve),
            **self.settings,
            **entry.changes,
        }
        return StudyRun(self.name, label, f"{self.name}_{entry.method}", seed, -(-epochs // self.evaluations), settings)

    def plan(self) -> list[StudyRun]:
        """Every method with each of its seeds, and what was tried, once."""
        seeds = {label: SEEDS_OF_CLAIMS if label in CLAIMED else SEEDS for label in self.entries}
        runs = [self.run(label, seed) for seed in SEEDS_OF_CLAIMS for label in seeds if seed in seeds[label]]
        return runs + [self.run(label, SEARCH_SEED) for label in self.tried]

    def quick(self) -> list[StudyRun]:
        """One more seed of what the claims are about, each evaluated twice and stopped at the middle."""
        runs = [self.run(label, QUICK_SEED) for label in QUICK[self.name]]
        return [replace(run, overrides={**run.overrides, "num_epochs": half(run)}, eval_freq=half(run)) for run in runs]


def half(run: StudyRun) -> int:
    """The epoch of a whole run's evaluation next to its middle."""
    return run.eval_freq * round(run.settings["num_epochs"] / run.eval_freq / 2)


CLAIMED = ("drtune", "grpo", "nft", "anchored")
QUICK = {"tiny": ("drtune", "grpo", "anchored"), "scenes": ("drtune", "anchored")}
COSINE, W_ONE = {"train.lr_scheduler": "cosine"}, {"anchored.weight": "1"}
RISING = {"anchored.ramp_epochs": 80, **COSINE}
EVERY_METHOD = {name: Entry(name) for name in METHODS}

TINY = Testbed(
    name="tiny",
    title="the tiny SD3",
    threads=1,
    seconds={True: 150.0, False: 150.0},
    evaluations=8,
    settings={},
    curve_of=("tiny_drtune", {}),
    base_images=1000,
    reward="reward/total",
    columns={},
    gains=(0.005, 0.01, 0.02),
    entries=EVERY_METHOD
    | {
        "anchored_kl": Entry("anchored", {"anchored.target_kl": 0.3}, "anchored, 0.3 nats"),
        "drtune_kl": Entry("drtune", {"train.beta": 0.1}, "DRTune, KL 0.1"),
    },
    tried={
        "anchored_2000": Entry("anchored", {"anchored.strength": 2000.0}, "lambda 2,000"),
        "anchored_2000_ramp": Entry(
            "anchored", {"anchored.strength": 2000.0, **RISING}, "lambda rising to 2,000, falling rate"
        ),
        "anchored_1": Entry("anchored", W_ONE, "w = 1"),
        "anchored_1_cosine": Entry("anchored", W_ONE | COSINE, "w = 1, falling rate"),
        "anchored_1_ramp": Entry("anchored", W_ONE | RISING, "w = 1, lambda rising, falling rate"),
    },
)
SCENES = Testbed(
    name="scenes",
    title="scenes",
    threads=2,
    seconds={True: 210.0, False: 420.0},
    evaluations=3,
    settings={
        "prompts.train": "assets/prompts/scenes/train_hard.jsonl",
        "prompts.eval_diversity": HARD_PROMPTS,
        "eval.num_image_per_prompt": 8,
        "diversity.num_draws": 50,
        "eval.rewards": ("scenes",),
    },
    curve_of=("scenes_nft", {"prompts.eval_diversity": HARD_PROMPTS}),
    base_images=400,
    reward="reward/scenes",
    columns={f"judge_{kind}": f"judge/accuracy_{kind}" for kind in KINDS},
    gains=(0.05, 0.1, 0.2),
    entries={name: Entry(name) for name in ("nft", "grpo", "drtune", "anchored")}
    | {"anchored_60": Entry("anchored", {"anchored.strength": 60.0, **COSINE}, "anchored, lambda 60, falling rate")},
    tried={
        "anchored_60_constant": Entry("anchored", {"anchored.strength": 60.0}, "lambda 60"),
        "anchored_60_ramp": Entry(
            "anchored",
            {"anchored.strength": 60.0, "anchored.ramp_epochs": 50, **COSINE},
            "lambda rising to 60 over 50 epochs, falling rate",
        ),
        "anchored_80_ramp": Entry(
            "anchored",
            {"anchored.strength": 80.0, "anchored.ramp_epochs": 98, **COSINE},
            "lambda rising to 80 over 98 epochs, falling rate",
        ),
        "anchored_60_falling": Entry("anchored", {"anchored.strength": 60.0, **COSINE}, "lambda 60, falling rate"),
        "anchored_120": Entry("anchored", {"anchored.strength": 120.0}, "lambda 120"),
        "anchored_200_cut": Entry(
            "anchored",
            {"anchored.strength": 200.0, "anchored.largest_shift": 0.35},
            "lambda 200, shifts cut at 0.35",
        ),
    },
)
TESTBEDS = {testbed.name: testbed for testbed in (TINY, SCENES)}
