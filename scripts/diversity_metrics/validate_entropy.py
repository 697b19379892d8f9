"""Check the entropy of `flow_grpo.entropy` against distributions whose entropy is known.

    python scripts/diversity_metrics/validate_entropy.py [--out assets/figures/entropy_validation] [--seed 0]

Each target is reached from noise twice: by its exact velocity field, and (small D) by an MLP trained on its samples by
conditional flow matching. With the exact field, estimate minus theory is the error of the method alone and must be
within a few standard errors of 0. With an MLP it also holds the misfit of the MLP, which is no error of the method.

The sharper check is the density error, mean of log p - log q over the samples x_0 drawn by the flow: p is the estimated
density, q the target's in closed form, at the same points. The spread of log q over the samples drops out of it; with
the exact field it is the bias of the solver and the noise of the probes, with an MLP the Kullback-Leibler divergence
KL(p || q).

Entropies are in nats, summed over the D dimensions, unless they say bits per dimension. The uniform's velocity is
singular at sigma = 0: its exact path stops at a small sigma, where x / (1 - sigma) is the uniform plus a little normal
noise; its theory is the entropy of that. Euler, Heun and RK4 here step over sigmas that crowd towards the data,
sigma_i = s + (1 - s)(1 - i/T)^2, s the last; the study of convergence has even steps, as samplers do.

It writes results.json, table.md, samples.png, errors.png and convergence.png. The same seed gives the same numbers
(seconds aside) on the same machine and number of threads.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_grpo.commands import cli
from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import optional_figure
from flow_grpo.files import strict_json, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from scripts.diversity_metrics.entropy_targets import Target
    from scripts.diversity_metrics.entropy_validation import Row

OUT = "assets/figures/entropy_validation"
COMMAND = "python scripts/diversity_metrics/validate_entropy.py --seed {seed}"
MLP_SAMPLES = 4000  # at most: its velocity costs more than a closed form
SHOWN = 2000  # points of a panel


def validate(out: Path, seed: int, fraction: float) -> list[Row]:
    """Estimate everything and write the files."""
    from tqdm import tqdm

    from scripts.diversity_metrics.entropy_targets import targets
    from scripts.diversity_metrics.entropy_validation import all_convergence, flow_samples, learn, make_row

    start = time.perf_counter()
    every = targets(fraction, seed)
    jobs = [(target, "exact") for target in every] + [(target, "MLP") for target in every if target.learnt]
    rows: list[Row] = []
    samples: dict[str, dict[str, Tensor]] = {}
    for chosen, field in (bar := tqdm(jobs)):
        target = chosen
        bar.set_description(f"{target.name}, {field}")
        if field == "exact":
            velocity, last = target.velocity, target.last_sigma
        else:
            velocity, last = learn(target, fraction, seed), 0.0
            target = replace(target, num_samples=min(target.num_samples, MLP_SAMPLES))
        before = time.perf_counter()
        result = flow_samples(target, velocity, last, seed)
        rows.append(make_row(target, field, result, last, time.perf_counter() - before))
        if target.dims == 2:
            clouds = samples.setdefault(target.name, {})
            clouds[field], clouds["noise"] = result.x_0[:SHOWN] / (1 - last), result.x_1[:SHOWN]
    add_target_samples(every, samples, seed)
    write(out, rows, all_convergence(), samples, {"seed": seed, "fraction": fraction}, start)
    return rows


def add_target_samples(every: Sequence[Target], samples: dict[str, dict[str, Tensor]], seed: int) -> None:
    """As many draws of each shown target as there are of its flows."""
    from flow_grpo.randomness import keyed_generator

    for target in every:
        if target.name in samples:
            count = len(samples[target.name]["noise"])
            samples[target.name]["target"] = target.sample(count, keyed_generator(seed, f"shown {target.name}"))


def write(
    out: Path,
    rows: Sequence[Row],
    points: Sequence[dict[str, Any]],
    samples: dict[str, dict[str, Tensor]],
    settings: dict[str, Any],
    start: float,
) -> None:
    """results.json and table.md, then the figures; `start` is when the command began, by time.perf_counter."""
    import torch

    from scripts.diversity_metrics.entropy_validation import TRAINING_STEPS
    from scripts.diversity_metrics.entropy_validation_report import (
        convergence_figure,
        errors_figure,
        samples_figure,
        table,
    )

    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "table.md", table(rows))
    extra = "" if settings["fraction"] == 1 else f" --fraction {settings['fraction']:g}"
    results = {
        "command": COMMAND.format(seed=settings["seed"]) + extra,
        **settings,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start,
        "training_steps": TRAINING_STEPS,
        "rows": [asdict(row) for row in rows],
        "convergence": list(points),
    }
    write_atomically(out / "results.json", strict_json(results, indent=1) + "\n")
    with optional_figure(out / "samples.png"):
        samples_figure(samples).savefig(out / "samples.png", dpi=110)
    with optional_figure(out / "errors.png"):
        errors_figure(rows).savefig(out / "errors.png", dpi=130)
    with optional_figure(out / "convergence.png"):
        convergence_figure(points).savefig(out / "convergence.png", dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Validate; exit code 2 after one sentence about bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=OUT, help="folder of the results (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the samples and training steps, for a trial")
    args = parser.parse_args(arguments)
    with cli.one_sentence_errors():
        if not 0 < args.fraction <= 1:
            raise ConfigError(f"--fraction {args.fraction:g} is not allowed; it must be above 0 and at most 1.")
        validate(Path(args.out), args.seed, args.fraction)
        print((Path(args.out) / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them
    main()
