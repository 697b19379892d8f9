"""Claim 4 where nothing is in the way: GRPO by each form of the likelihood ratio, on two problems in the plane.

    python scripts/study/ratios.py [--quick] [--only ode_step-0] [--out assets/study] [--processes 2]

On the tiny SD3 a form that does not train may be biased, or drown in the noise of its probes, or have the wrong
learning rate, or too few images. Here each of these can be told from the others: the base flow is exact, the reward is
linear, the exact trace costs two products, and GRPO's own ratio gains many times what its seeds differ by. The problems
and the model are those of scripts/bench/tilt.py: latents of two dimensions, a velocity that is exact at first, plus an
MLP, trained by GRPO's real loop.

Every form is trained at each of RATES with a seed of its own, and at the rate with which it gained most, with five
seeds that were not part of that choice. `--quick`: two seeds, 12 epochs, at the committed rates. It writes ratios.json.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from flow_grpo.commands.cli import create_folder, one_sentence_errors
from scripts.study.paths import OUT, RATIOS
from scripts.study.testbeds import SEARCH_SEED, SEEDS_OF_CLAIMS

STEPS = 10  # of the sampler, all stochastic
FORMS = (  # of the ratio, with probes or draws; 0: the exact trace. The first is GRPO's own, the control
    ("sde", 1), ("cfm", STEPS),
    *(("ode_step", probes) for probes in (1, 4, 16, 0)),
    *(("ode_path", probes) for probes in (1, 4, 16, 0)),
)  # fmt: skip
PROBLEMS = ("gaussian", "mixture")
RATES = (1e-4, 3e-4, 1e-3)
EPOCHS, QUICK_EPOCHS, EVERY = 36, 12, 3
QUICK_SEEDS = (50, 51)
POINTS = 4000  # that are measured
SETTINGS: Mapping[str, Any] = {
    "sample.num_steps": STEPS,
    "sample.groups_per_epoch": 2,
    "train.clip_range": 0.01,
}


@dataclass(frozen=True)
class Trained:
    """One training: the mean reward of the same noises by Euler's ODE, every EVERY epochs, the base's first."""

    problem: str
    form: str
    probes: int
    rate: float
    seed: int
    seconds: float  # of training, an epoch
    reward: Sequence[float]

    @property
    def key(self) -> tuple[str, str, int]:
        """Of its form on its problem."""
        return self.problem, self.form, self.probes

    @property
    def gain(self) -> float:
        """In reward, at the end; minus infinity where it is no number."""
        found = self.reward[-1] - self.reward[0]
        return found if np.isfinite(found) else -np.inf


def train(problem_name: str, form: str, probes: int, rate: float, seed: int, epochs: int) -> Trained:
    """Train by GRPO's loop."""
    import torch

    from scripts.bench.tilt_methods import Entry
    from scripts.bench.tilt_problem import PROBLEMS as FLOWS
    from scripts.bench.tilt_problem import PROMPT
    from scripts.bench.tilt_training import Sizes, noise, opened, points_of
    from scripts.bench.tilt_training import epochs as trained_epochs

    torch.set_num_threads(1)
    changes = {**SETTINGS, "train.learning_rate": rate, "train.ratio": form, "train.ratio_probes": probes}
    problem, entry, x_1 = FLOWS[problem_name], Entry("grpo", epochs, changes), noise(Sizes(samples=POINTS), seed)
    with opened(problem, entry, seed) as (policy, run):
        velocity = policy.velocity(policy.encode([PROMPT] * POINTS), 1.0)

        def reward() -> float:
            return problem.reward(points_of(velocity, x_1)).mean().item()

        rewards = [reward()]
        rewards += [reward() for _ in trained_epochs(problem, entry, policy, run, EVERY)]
        return Trained(problem_name, form, probes, rate, seed, run.counters.seconds / epochs, rewards)


def trainings(jobs: Sequence[tuple[Any, ...]], processes: int, title: str) -> Iterator[Trained]:
    """In the order of the jobs, whatever ends first; each in one thread of some process."""
    from tqdm import tqdm

    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        found = [pool.submit(train, *job) for job in jobs]
        for one in tqdm(found, title):
            yield one.result()


def best_rates(searched: Sequence[Trained]) -> dict[tuple[str, str, int], float]:
    """The rate with which each form gained most, on each problem."""
    best: dict[tuple[str, str, int], Trained] = {}
    for one in searched:
        if one.key not in best or one.gain > best[one.key].gain:
            best[one.key] = one
    return {key: one.rate for key, one in best.items()}


def study(args: argparse.Namespace) -> list[Trained]:
    """The search, and the runs with the rates that it found; of the quick ones, those with the committed rates."""
    chosen = [(p, f, n) for p in PROBLEMS for f, n in FORMS if not args.only or f"{f}-{n}" in args.only]
    if args.quick:
        rates = best_rates([one for one in read(OUT / RATIOS) if one.seed == SEARCH_SEED])
        jobs = [(*key, rates[key], seed, QUICK_EPOCHS) for key in chosen for seed in QUICK_SEEDS]
        return list(trainings(jobs, args.processes, "runs"))
    jobs = [(*key, rate, SEARCH_SEED, EPOCHS) for key in chosen for rate in RATES]
    searched = list(trainings(jobs, args.processes, "learning rates"))
    rates = best_rates(searched)
    jobs = [(*key, rates[key], seed, EPOCHS) for key in chosen for seed in SEEDS_OF_CLAIMS]
    return searched + list(trainings(jobs, args.processes, "runs"))


def read(path: Path) -> list[Trained]:
    """What is committed."""
    from flow_grpo.files import read_json

    found: Any = read_json(path)
    return [Trained(**one | {"reward": [math.nan if v is None else v for v in one["reward"]]}) for one in found]


def write(found: Sequence[Trained], path: Path) -> None:
    """A line for each training."""
    from scripts.study.outcomes import rounded, write_rows

    write_rows([asdict(one) | {"reward": [rounded(value) for value in one.reward]} for one in found], path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    known = [f"{form}-{probes}" for form, probes in FORMS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two further seeds, 12 epochs")
    parser.add_argument("--only", nargs="+", default=[], choices=known, metavar="FORM-PROBES", help=", ".join(known))
    parser.add_argument("--out", type=Path, help=f"folder (default: {OUT.name}, with --quick logs/study)")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time (default: 2)")
    args = parser.parse_args(arguments)
    if args.processes < 1:
        parser.error(f"--processes {args.processes} is not allowed; it takes a whole number from 1 on")
    args.out = args.out or (Path("logs/study") if args.quick else OUT)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and write."""
    args = parse(arguments)
    with one_sentence_errors():
        create_folder(args.out)
        write(study(args), args.out / RATIOS)


if __name__ == "__main__":
    main()
