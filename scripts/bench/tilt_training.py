"""Train one method on one problem by its own loop, and hold it against the exact laws."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from flow_grpo import places
from flow_grpo.diffusers_patch.sd3_pipeline_with_logprob import pipeline_with_logprob
from flow_grpo.diffusers_patch.velocity import VelocityFn
from flow_grpo.divergence import DivergenceEstimator
from flow_grpo.entropy import ode_log_density
from flow_grpo.methods.registry import METHODS
from flow_grpo.policy import Policy
from flow_grpo.prompts import PromptDataset
from flow_grpo.randomness import keyed_generator
from flow_grpo.recipes.base import get_config
from flow_grpo.runs.progress import Counters
from flow_grpo.runs.run import Run
from flow_grpo.settings import resolve
from scripts.bench.tilt_measures import Measures, exact_sample, measure
from scripts.bench.tilt_methods import (
    AT_END,
    AT_LEVEL,
    BASE,
    DISCRETE,
    EXACT,
    STRENGTH,
    Entry,
    changes_of,
)
from scripts.bench.tilt_problem import PROBLEMS, PROMPT, Flow, Points, Problem, reward_of

LEVEL = 0.75  # lambda of the law whose mean reward is the level
ODE_STEPS = 100  # Euler's, of what is measured


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    samples: int = 4000  # points
    evaluations: int = 100  # of a training, evenly over its epochs


@dataclass(frozen=True)
class Row:
    """One state of one training, or of none, against the law of one lambda."""

    problem: str
    entry: str
    seed: int
    at: str  # "level": the law has the points' own mean reward; "end": it is that of the method's own lambda
    strength: float  # lambda of the law
    measures: Measures
    kl: float | None  # KL(points' law || law), nats; None: the points have no density
    epoch: int = 0
    images: int = 0
    network_evaluations: int = 0
    seconds: float = 0.0


# --- measuring --------------------------------------------------------------------------------------------------


def noise(sizes: Sizes, seed: int) -> Tensor:
    """x_1 of the points that are measured, (n, 1, 1, 2): the same at every evaluation."""
    return torch.randn(sizes.samples, 1, 1, 2, generator=keyed_generator(seed, "eval"))


def sigmas() -> Tensor:
    """(ODE_STEPS + 1,), even."""
    return torch.linspace(1, 0, ODE_STEPS + 1, dtype=torch.float64)


def points_of(velocity: VelocityFn, x_1: Tensor) -> Tensor:
    """x_0, (n, 2)."""
    with torch.no_grad():
        return pipeline_with_logprob(velocity, x_1, sigmas()).final_latents.flatten(1)


def kl_to(velocity: VelocityFn, x_1: Tensor, law: Flow) -> float:
    """KL(law of the velocity's points || law) in nats: the mean of log p - log q over the points, p of Euler's map."""
    found = ode_log_density(velocity, x_1, sigmas(), DivergenceEstimator(exact=True), second_order=True)
    return (found.log_prob - law.log_density(found.x_0.flatten(1).double())).mean().item()


def same_reward(x: Tensor, problem: Problem) -> float:
    """The lambda at which the law has the points' mean reward."""
    return problem.strength_of(problem.reward(x.double()).mean().item())


def reference_rows(problem: Problem, seed: int, sizes: Sizes) -> list[Row]:
    """Of the base model, of exact draws, and of the law's own velocity in as many steps, against both laws."""
    rows, x_1 = list[Row](), noise(sizes, seed)
    for at, strength in ((AT_LEVEL, LEVEL), (AT_END, STRENGTH)):
        law = problem.law(strength)
        for name, flow in ((BASE, problem.flow), (DISCRETE, law)):
            rows.append(row_of(problem, name, seed, at, strength, velocity_of(flow), x_1, None))
        exact = measure(exact_sample(law, sizes.samples, seed), law, problem)
        rows.append(Row(problem.name, EXACT, seed, at, strength, exact, None))
    return rows


def velocity_of(flow: Flow) -> VelocityFn:
    """The exact velocity, for latents (B, 1, 1, 2), in float64."""
    return lambda x, sigma: flow.velocity(x.flatten(1).double(), sigma).view_as(x)


# --- training ---------------------------------------------------------------------------------------------------


@contextmanager
def opened(problem: Problem, entry: Entry, seed: int) -> Iterator[tuple[Policy, Run]]:
    """The policy of a problem's base model, and a run in a folder that is deleted afterwards."""
    config = get_config()
    config.update_from_flattened_dict(changes_of(entry, seed))
    with tempfile.TemporaryDirectory() as folder:
        config.logdir, config.run_name = folder, "run"
        settings = resolve(config, num_processes=1, cuda=False)
        accelerator = Accelerator(cpu=True)
        with Run(settings, accelerator) as run:
            yield Policy(Points.of(problem, seed), settings, accelerator), run


def train(problem_name: str, name: str, entry: Entry, seed: int, sizes: Sizes) -> list[Row]:
    """Train an entry, to its last epoch if it has a lambda of its own and else to the level; what was found of it.

    Averaged weights are measured where they are kept. A training that does not come to the level has no row of it.
    """
    problem, x_1, rows = PROBLEMS[problem_name], noise(sizes, seed), dict[str, Row]()
    level = problem.reward_of(LEVEL)
    with opened(problem, entry, seed) as (policy, run):
        velocity = policy.velocity(policy.encode([PROMPT] * sizes.samples), 1.0)
        for _ in epochs(problem, entry, policy, run, max(1, entry.epochs // sizes.evaluations)):
            ended = run.counters.epoch == entry.epochs
            with policy.ema_weights():
                x = points_of(velocity, x_1)
                if AT_LEVEL not in rows and problem.reward(x).mean() >= level:
                    own = same_reward(x, problem)
                    rows[AT_LEVEL] = row_of(problem, name, seed, AT_LEVEL, own, velocity, x_1, run)
                if ended and entry.strength is not None:
                    rows[AT_END] = row_of(problem, name, seed, AT_END, entry.strength, velocity, x_1, run)
            if AT_LEVEL in rows and entry.strength is None:
                break
    return list(rows.values())


def epochs(problem: Problem, entry: Entry, policy: Policy, run: Run, every: int) -> Iterator[int]:
    """Train by the method's own loop; the number of epochs done, where something is measured."""
    train_epoch = places.load(METHODS[entry.method].loop)
    prompts, reward = PromptDataset((PROMPT,), ({},)), reward_of(problem)
    for epoch in range(1, entry.epochs + 1):
        policy.network_evaluations = 0
        with run.timer():
            train_epoch(policy, prompts, reward, policy.settings, run)
        run.counters.epoch = epoch
        run.counters.groups += policy.settings.plan.groups
        run.counters.network_evaluations += policy.network_evaluations
        if epoch % every == 0 or epoch == entry.epochs:
            yield epoch


def row_of(
    problem: Problem, name: str, seed: int, at: str, strength: float, velocity: VelocityFn, x_1: Tensor, run: Run | None
) -> Row:
    """What the points of a velocity are, against the law of one lambda; without a run nothing was spent on them."""
    law, spent = problem.law(strength), Counters() if run is None else run.counters
    measures = measure(points_of(velocity, x_1), law, problem)
    kl = kl_to(velocity, x_1, law)
    return Row(
        problem.name, name, seed, at, strength, measures, kl,
        spent.epoch, spent.images, spent.network_evaluations, spent.seconds,
    )  # fmt: skip
