"""Every method trained where the optimum is known exactly, and held against it.

    python scripts/bench/tilt.py [--quick] [--out logs/bench/tilt] [--only "GRPO" "DRTune"] [--processes 2]

The reward is linear, R = c . x, and the base model the exact velocity of a Gaussian or of a mixture of three in the
plane, so that the law p_base exp(lambda R) is known: tilt_problem.py. Every entry of tilt_methods.py is trained by the
method's real loop, with three seeds, and held against the exact law twice: at equal mean reward, on its way, and, if it
has a lambda, against that lambda's law at its end. Beside it stand the base model, an exact sample of the same size,
and the exact law's own velocity in as many steps.

It writes results.json, table.md, which says what is measured, and distances.png. `--quick` is one seed with fewer
points, in less than ten minutes on two cores.

Departures from a training of images:

- The model is the exact base velocity plus an MLP, all of whose weights are trained: no LoRA, no text, no guidance.
- The decoder is the identity, so that the reward's gradient is c at every point.
- All groups of an epoch have the same prompt.
- Settings pass the checks of every run; the pretrained model and the reward that they must name are never loaded.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from flow_grpo.figure_text import optional_figure
from flow_grpo.files import strict_json, write_atomically
from scripts.bench.machine import cpu_model
from scripts.bench.tilt_methods import COMMON, ENTRIES, STRENGTH, Entry

if TYPE_CHECKING:
    from scripts.bench.tilt_training import Row, Sizes

SEEDS = (0, 1, 2)


def all_rows(entries: Mapping[str, Entry], seeds: Sequence[int], sizes: Sizes, processes: int) -> Iterator[Row]:
    """Of every training, in a fixed order whatever ends first; each runs in one thread of some process."""
    import torch
    from tqdm import tqdm

    from scripts.bench.tilt_problem import PROBLEMS
    from scripts.bench.tilt_training import reference_rows, train

    for problem in PROBLEMS.values():
        for seed in seeds:
            yield from reference_rows(problem, seed, sizes)
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        every = [(p, name, entry, seed, sizes) for name, entry in entries.items() for p in PROBLEMS for seed in seeds]
        jobs = [pool.submit(train, *each) for each in every]
        for done in tqdm(as_completed(jobs), total=len(jobs), desc="trainings"):
            done.result()  # one that failed ends the bench at once
        for job in jobs:
            yield from job.result()


def bench(arguments: argparse.Namespace, command: str) -> dict[str, Any]:
    """Train and measure everything; what is written as results.json."""
    import torch

    from scripts.bench.tilt_training import LEVEL, ODE_STEPS, Sizes

    torch.set_num_threads(1)
    start, seeds = time.perf_counter(), SEEDS[:1] if arguments.quick else SEEDS
    sizes = Sizes(samples=1000, evaluations=50) if arguments.quick else Sizes()
    entries = {name: entry for name, entry in ENTRIES.items() if not arguments.only or name in arguments.only}
    rows = [asdict(row) for row in all_rows(entries, seeds, sizes, arguments.processes)]
    return {
        "command": command,
        "device": cpu_model(),
        "threads": torch.get_num_threads(),
        "processes": arguments.processes,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seconds": time.perf_counter() - start,
        "seeds": list(seeds),
        **asdict(sizes),
        "ode_steps": ODE_STEPS,
        "level": LEVEL,
        "strength": STRENGTH,
        "common": dict(COMMON),
        "entries": {name: asdict(entry) for name, entry in entries.items()},
        "rows": rows,
    }


def write(results: dict[str, Any], out: Path) -> None:
    """results.json and table.md, then the figure."""
    from scripts.bench.tilt_report import figure, table

    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "results.json", strict_json(results, indent=1) + "\n")
    write_atomically(out / "table.md", table(results))
    with optional_figure(out / "distances.png"):
        figure(results).savefig(out / "distances.png", dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("logs/bench/tilt"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer points")
    parser.add_argument("--only", nargs="+", default=[], metavar="ENTRY", choices=list(ENTRIES))
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time (default: %(default)s)")
    given = sys.argv[1:] if arguments is None else list(arguments)
    parsed = parser.parse_args(given)
    write(bench(parsed, shlex.join(["python", "scripts/bench/tilt.py", *given])), parsed.out)


if __name__ == "__main__":
    main()
