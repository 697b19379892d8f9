"""The testbeds on which methods are compared: their runs, how these are measured, and the exact curve beside them.

- `tiny`: the tiny SD3, a CLIP's similarity as reward, all on one thread. GRPO gains little more here than seeds differ.
- `scenes`: headroom (docs/scenes.md). A reward of 0 or 1 for methods that look at rewards alone, the log-probability of
  being right for those that take its gradient; trained on captions of two objects, counting and position.

The epochs of a run are its budget in seconds over its committed seconds an epoch, fixed before any run: a busy machine
changes nothing. Torch is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object
from flow_grpo.methods.registry import METHODS
from flow_grpo.scenes.captions import KINDS
from scripts.study.plan import StudyRun

ROOT = Path(__file__).resolve().parents[2]
COST, CURVE = "cost.json", "curve.json"
SEARCH_SEED = 100  # of what was tried: no result uses it
HARD_PROMPTS = "assets/prompts/scenes/test_hard.jsonl"


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
    results: Path  # folder of what is committed
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

    def entry(self, label: str) -> Entry:
        """Of a run."""
        return {**self.entries, **self.tried}[label]

    def seconds_an_epoch(self, label: str, cost: Mapping[str, Any]) -> float:
        """As measured; of what was not measured itself, its method's."""
        found = cost["seconds"].get(label, cost["seconds"].get(self.entry(label).method))
        if found is None:
            raise ConfigError(f"{self.results / COST} does not say what an epoch of {label} costs; `cost` measures it.")
        return float(found)

    def run(self, label: str, seed: int, out: Path) -> StudyRun:
        """The run of one entry and seed, with epochs by the committed cost."""
        entry, cost = self.entry(label), read_object(out / COST)
        budget = self.seconds[METHODS[entry.method].reward_gradient]
        epochs = max(1, round(budget / self.seconds_an_epoch(label, cost)))
        every = -(-epochs // self.evaluations)
        curve = out.resolve() / CURVE
        settings = {
            "num_epochs": epochs,
            "save_freq": every,
            "eval_ode_log_prob_freq": epochs,
            "eval.curve": str(curve.relative_to(ROOT) if curve.is_relative_to(ROOT) else curve),
            **self.settings,
            **entry.changes,
        }
        return StudyRun(self.name, label, f"{self.name}_{entry.method}", seed, 0.0, every, settings)

    def plan(self, seeds: Sequence[int], out: Path) -> list[StudyRun]:
        """Every method with each seed."""
        return [self.run(label, seed, out) for seed in seeds for label in self.entries]

    def search(self, out: Path) -> list[StudyRun]:
        """What was tried, once each."""
        return [self.run(label, SEARCH_SEED, out) for label in self.tried]


EVERY_METHOD = {name: Entry(name) for name in METHODS}

TINY = Testbed(
    name="tiny",
    results=ROOT / "assets/figures/methods",
    threads=1,
    seconds={True: 150.0, False: 150.0},
    evaluations=8,
    settings={},
    curve_of=("tiny_drtune", {}),
    base_images=1000,
    reward="reward/total",
    columns={"nats": "entropy/nats"},
    gains=(0.005, 0.01, 0.02),
    entries=EVERY_METHOD
    | {
        "anchored_kl": Entry("anchored", {"anchored.target_kl": 0.3}, "anchored, 0.3 nats"),
        "drtune_kl": Entry("drtune", {"train.beta": 0.1}, "DRTune, KL 0.1"),
    },
    tried={},
)
SCENES = Testbed(
    name="scenes",
    results=ROOT / "assets/figures/scenes",
    threads=2,
    seconds={True: 210.0, False: 420.0},
    evaluations=3,
    settings={
        "prompts.train": "assets/prompts/scenes/train_hard.jsonl",
        "prompts.eval_diversity": HARD_PROMPTS,
        "eval.num_image_per_prompt": 8,
        "diversity.num_draws": 50,
        "eval.rewards": ("scenes",),
        "eval_ode_log_prob": False,
    },
    curve_of=("scenes_nft", {"prompts.eval_diversity": HARD_PROMPTS}),
    base_images=400,
    reward="reward/scenes",
    columns={f"judge_{kind}": f"judge/accuracy_{kind}" for kind in KINDS},
    gains=(0.05, 0.1, 0.2),
    entries={name: Entry(name) for name in ("nft", "grpo", "drtune", "anchored")},
    tried={},
)
TESTBEDS = {testbed.name: testbed for testbed in (TINY, SCENES)}
