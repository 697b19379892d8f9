"""Claim 4 with power: GRPO by each form of the likelihood ratio, in the plane and on one prompt of the tiny SD3.

    python scripts/study/ratios.py [--quick] [--only plane ode_step-0] [--out assets/study] [--processes 2]

Where GRPO's own ratio gains little more than its seeds differ by, a form that does not train may be biased, or drown in
the noise of its probes, or have the wrong learning rate, or too few images. Here the first can be told from the others,
as that ratio gains many times what its seeds differ by:

- In the plane, the problems of scripts/bench/tilt.py: the base flow is exact, the reward linear, the exact trace costs
  two products. What is trained is an MLP that is added to the velocity.
- On the tiny SD3, all images of an epoch are of one prompt, so that every group pulls the same way. The exact trace
  would take 256 products at each step and is not trained; gradient_noise.py has its gradient.

Every form is trained at each of some learning rates with a seed of its own (on images, with the fewest probes), and at
the rate with which it gained most, with five seeds that were not part of that choice. `--quick`: two further seeds and
fewer epochs, at the committed rates, in the plane. It writes ratios.json; what --only leaves out stays as it was there.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from flow_grpo.commands.cli import create_folder, one_sentence_errors
from scripts.study.paths import OUT, RATIOS
from scripts.study.testbeds import SEARCH_SEED, SEEDS_OF_CLAIMS

if TYPE_CHECKING:
    from flow_grpo.policy import Policy
    from flow_grpo.rewards.building import WeightedReward
    from flow_grpo.runs.run import Run

Form = tuple[str, int]  # of the ratio, with its probes or draws; 0: the exact trace


@dataclass(frozen=True)
class Setup:
    """A problem on which the forms are trained."""

    title: str
    epochs: int
    forms: Sequence[Form]  # the first is GRPO's own ratio, the control
    rates: Sequence[float]
    every: int  # epochs between measurements
    settings: Mapping[str, Any]

    @property
    def searched(self) -> list[Form]:
        """The forms whose learning rate is searched: in the plane all, on images those with the fewest probes."""
        first = dict(reversed(self.forms))
        return [(form, n) for form, n in self.forms if self.title != IMAGES or n == first[form]]


IMAGES = "one prompt of the tiny SD3"
PROMPT = "a sneaker"
IN_PLANE = {"sample.num_steps": 10, "sample.groups_per_epoch": 2, "train.clip_range": 0.01}
PLANE_FORMS = (
    ("sde", 1), ("cfm", 10), *(("ode_step", n) for n in (1, 4, 16, 0)), *(("ode_path", n) for n in (1, 4, 16, 0)),
)  # fmt: skip
IMAGE_FORMS = (
    ("sde", 1), ("cfm", 5), *(("ode_step", n) for n in (1, 4)), *(("ode_path", n) for n in (1, 4)),
)  # fmt: skip
SETUPS: Mapping[str, Setup] = {
    "gaussian": Setup("a Gaussian in the plane", 36, PLANE_FORMS, (1e-4, 3e-4, 1e-3), 3, IN_PLANE),
    "mixture": Setup("a mixture in the plane", 36, PLANE_FORMS, (1e-4, 3e-4, 1e-3), 3, IN_PLANE),
    "images": Setup(
        IMAGES, 8, IMAGE_FORMS, (3e-4, 1e-3, 3e-3), 2,
        {"sample.num_steps": 5, "train.clip_range": 1e-3, "train.updates_per_epoch": 4, "num_threads": 1},
    ),
}  # fmt: skip
PLANE = ("gaussian", "mixture")
PLACES = (*SETUPS, "plane")
QUICK_EPOCHS, QUICK_SEEDS = 12, (50, 51)
POINTS, MEASURED_IMAGES, CHUNK = 4000, 160, 40


@dataclass(frozen=True)
class Trained:
    """One training: the mean reward of the same noises by Euler's ODE, every so many epochs, the base's first."""

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


# --- one training -----------------------------------------------------------------------------------------


def train(problem: str, form: str, probes: int, rate: float, seed: int, epochs: int) -> Trained:
    """Train by GRPO's loop."""
    import torch

    torch.set_num_threads(1)
    setup = SETUPS[problem]
    changes = {**setup.settings, "train.learning_rate": rate, "train.ratio": form, "train.ratio_probes": probes}
    with (in_plane if problem in PLANE else on_images)(problem, changes, seed) as (epoch, reward, seconds):
        rewards = [reward()]
        for done in range(1, epochs + 1):
            epoch()
            if done % setup.every == 0:
                rewards.append(reward())
        return Trained(problem, form, probes, rate, seed, seconds() / epochs, rewards)


Opened = tuple[Callable[[], None], Callable[[], float], Callable[[], float]]  # an epoch, the reward, seconds so far


@contextmanager
def in_plane(problem: str, changes: Mapping[str, Any], seed: int) -> Iterator[Opened]:
    """A problem of scripts/bench/tilt.py."""
    from scripts.bench.tilt_methods import Entry
    from scripts.bench.tilt_problem import PROBLEMS as FLOWS
    from scripts.bench.tilt_problem import PROMPT as POINT
    from scripts.bench.tilt_problem import reward_of
    from scripts.bench.tilt_training import Sizes, noise, opened, points_of

    flow, x_1 = FLOWS[problem], noise(Sizes(samples=POINTS), seed)
    with opened(flow, Entry("grpo", SETUPS[problem].epochs, changes), seed) as (policy, run):
        velocity = policy.velocity(policy.encode([POINT] * POINTS), 1.0)

        def reward() -> float:
            return flow.reward(points_of(velocity, x_1)).mean().item()

        yield _epoch(policy, POINT, reward_of(flow), run), reward, lambda: run.counters.seconds


@contextmanager
def on_images(problem: str, changes: Mapping[str, Any], seed: int) -> Iterator[Opened]:
    """The tiny SD3 and its reward."""
    import tempfile

    import torch
    from accelerate import Accelerator

    from flow_grpo.policy import Policy
    from flow_grpo.randomness import keyed_generator
    from flow_grpo.recipes.registry import get_config
    from flow_grpo.rewards.building import build_reward
    from flow_grpo.runs.run import Run
    from flow_grpo.settings import resolve

    config = get_config("tiny_grpo")
    config.update_from_flattened_dict({**changes, "seed": seed, "trackers": ()})
    with tempfile.TemporaryDirectory() as folder:
        config.logdir, config.run_name = folder, problem
        settings, accelerator = resolve(config, num_processes=1, cuda=False), Accelerator(cpu=True)
        with Run(settings, accelerator) as run:
            policy, score = Policy.load(settings, accelerator), build_reward(settings.config, accelerator.device)

            def reward() -> float:
                found = []
                for chunk in torch.arange(MEASURED_IMAGES).split(CHUNK):
                    noises = [keyed_generator(settings.config.eval.seed, "ratio noise", int(i)) for i in chunk]
                    with torch.no_grad():
                        images = policy.decode(policy.sample_ode([PROMPT] * CHUNK, noises).final_latents)
                        found.append(score(images, [PROMPT] * CHUNK, [{}] * CHUNK).total)
                return torch.cat(found).mean().item()

            yield _epoch(policy, PROMPT, score, run), reward, lambda: run.counters.seconds


def _epoch(policy: Policy, prompt: str, reward: WeightedReward, run: Run) -> Callable[[], None]:
    """One epoch of GRPO, all of whose groups are of one prompt."""
    from flow_grpo.loops.policy_gradient import train_epoch
    from flow_grpo.prompts import PromptDataset

    prompts = PromptDataset((prompt,), ({},))

    def epoch() -> None:
        with run.timer():
            train_epoch(policy, prompts, reward, policy.settings, run)
        run.counters.epoch += 1
        run.counters.groups += policy.settings.plan.groups

    return epoch


# --- all of them ------------------------------------------------------------------------------------------


def trainings(jobs: Sequence[tuple[Any, ...]], args: argparse.Namespace, title: str) -> Iterator[Trained]:
    """In the order of the jobs, whatever ends first; each in one thread of some process."""
    from tqdm import tqdm

    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        found = [pool.submit(train, *job) for job in jobs]
        for one in tqdm(found, title):
            yield one.result()


def best_rates(searched: Sequence[Trained]) -> dict[tuple[str, str, int], float]:
    """The rate with which each form gained most, on each problem; of those not searched, that of their form."""
    best: dict[tuple[str, str, int], Trained] = {}
    for one in searched:
        if one.key not in best or one.gain > best[one.key].gain:
            best[one.key] = one
    found = {key: one.rate for key, one in best.items()}
    firsts = {key[:2]: rate for key, rate in reversed(found.items())}
    every = [(problem, *form) for problem, setup in SETUPS.items() for form in setup.forms]
    return {key: found.get(key, firsts[key[:2]]) for key in every if key[:2] in firsts}


def study(args: argparse.Namespace) -> list[Trained]:
    """The search, and the runs with the rates that it found; of the quick ones, those with the committed rates."""
    if args.quick:
        rates = best_rates([one for one in read(OUT / RATIOS) if one.seed == SEARCH_SEED])
        keys = [(problem, *form) for problem in PLANE for form in SETUPS[problem].forms if asked(args, problem, form)]
        return list(trainings([(*k, rates[k], seed, QUICK_EPOCHS) for k in keys for seed in QUICK_SEEDS], args, "runs"))
    chosen = [
        (problem, form) for problem, setup in SETUPS.items() for form in setup.forms if asked(args, problem, form)
    ]
    jobs = [
        (problem, *form, rate, SEARCH_SEED, SETUPS[problem].epochs)
        for problem, form in chosen
        for rate in SETUPS[problem].rates
        if form in SETUPS[problem].searched
    ]
    searched = list(trainings(jobs, args, "learning rates"))
    rates = best_rates(searched)
    jobs = [
        (problem, *form, rates[problem, *form], seed, SETUPS[problem].epochs)
        for problem, form in chosen
        for seed in SEEDS_OF_CLAIMS
    ]
    return searched + list(trainings(jobs, args, "runs"))


def asked(args: argparse.Namespace, problem: str, form: Form) -> bool:
    """Whether --only names a problem, or the plane, and a form, where it names any."""
    place = "plane" if problem in PLANE else problem
    places, forms = ([word for word in args.only if (word in PLACES) == which] for which in (True, False))
    return (not places or problem in places or place in places) and (not forms or f"{form[0]}-{form[1]}" in forms)


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
    forms = dict.fromkeys(form for setup in SETUPS.values() for form in setup.forms)
    known = [*PLACES, *(f"{form}-{probes}" for form, probes in forms)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two further seeds, 12 epochs, in the plane")
    parser.add_argument("--only", nargs="+", default=[], choices=known, metavar="WORD", help=", ".join(known))
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
        found, path = study(args), args.out / RATIOS
        done = {one.key for one in found}
        others = read(path) if path.exists() and args.only else []
        write([*found, *(one for one in others if one.key not in done)], path)


if __name__ == "__main__":
    main()
