"""Every method on the embedded tiny SD3 at equal cost: reward, judge and diversity, beside the exact law.

    python scripts/bench/methods.py cost              seconds and memory of an epoch of each method, on a free core
    python scripts/bench/methods.py curve             the exact law, from 1,000 base images of each prompt
    python scripts/bench/methods.py train --jobs 2    three seeds of each method; done runs are skipped
    python scripts/bench/methods.py write             results.json, table.md and frontier.png

`cost` and `curve` are committed, in assets/figures/methods. The epochs of a method are 150 s over its seconds an epoch
there: fixed before any run, so that a busy machine changes nothing. About two hours on two cores.

- Recipes are `tiny_<method>` as they stand. Their learning rates were chosen by trials of 20 to 40 epochs with seed 42,
  which is not among the three. MORE has variants of them.
- Evaluation: 16 images of each of 10 prompts, on the same noise for all; reward, the held-out judge, diversity within a
  prompt in the judge's features.
- `seconds to` a gain: epochs until the smoothed reward has risen by it, times the method's seconds an epoch.
- PEPG and PAR have the same gradient: they differ by rounding.
- The exact law: figures of the base model's own images, weighted by exp(lambda R); Vendi and RKE of 16 drawn by weight.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_grpo.commands.cli import one_sentence_errors
from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object, strict_json, write_atomically
from flow_grpo.methods.registry import METHODS

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from scripts.bench.machine import cpu_model, peak_mib
from scripts.bench.methods_results import write
from scripts.study.plan import StudyRun
from scripts.study.run import train_all

if TYPE_CHECKING:
    from accelerate import Accelerator


ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "assets/figures/methods"
SECONDS, SEEDS, EVALUATIONS = 150.0, (0, 1, 2), 8
MORE: Mapping[str, tuple[str, Mapping[str, Any]]] = {  # name -> method, what differs from its recipe
    "anchored_kl": ("anchored", {"anchored.target_kl": 0.3}),
    "drtune_kl": ("drtune", {"train.beta": 0.1}),
}
ENTRIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    **MORE,
}
WARM_UP, ROUNDS = 1, 5  # epochs of each method
IMAGES, SET, REPEATS = 1000, 16, 50  # base images a prompt; images of a set whose diversity is measured, and sets
STRENGTHS = (0, 5, 10, 15, 20, 30, 40, 50, 60, 80, 100, 150, 200)  # beyond, fewer than 20 images carry the weight


# --- what an epoch costs ----------------------------------------------------------------------------------


def cost(out: Path) -> None:
    """Measure every method in turn, so that what else the machine does meets all of them alike; write cost.json."""
    with _epochs(list(ENTRIES)) as epochs:
        seconds = seconds_of(epochs, ROUNDS)
    peak = {name: _memory_of(name) for name in ENTRIES}
    found = {"machine": cpu_model(), "threads": 1, "rounds": ROUNDS, "seconds": seconds, "peak_mib": peak}
    write_atomically(out / "cost.json", strict_json(found, indent=1) + "\n")


def seconds_of(epochs: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The median of each one's epochs, in turn, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in epochs}
    for _ in range(WARM_UP + rounds):
        for name, epoch in epochs.items():
            begin = time.perf_counter()
            epoch()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found[WARM_UP:]) for name, found in times.items()}


@contextmanager
def _epochs(names: Sequence[str]) -> Iterator[dict[str, Callable[[], None]]]:
    """method -> a function that trains one epoch of its recipe."""
    import torch
    from accelerate import Accelerator

    torch.set_num_threads(1)
    recipes = {name: (f"tiny_{ENTRIES[name][0]}", ENTRIES[name][1]) for name in names}
    with tempfile.TemporaryDirectory() as folder, epochs_of(recipes, folder, Accelerator(cpu=True)) as epochs:
        yield epochs


@contextmanager
def epochs_of(
    recipes: Mapping[str, tuple[str, Mapping[str, Any]]], folder: str, accelerator: Accelerator
) -> Iterator[dict[str, Callable[[], None]]]:
    """name -> a function that trains one epoch of (recipe, what differs from it)."""
    with ExitStack() as stack:
        yield {
            name: _epoch_of(name, recipe, changes, folder, accelerator, stack)
            for name, (recipe, changes) in recipes.items()
        }


def _epoch_of(
    name: str, recipe: str, changes: Mapping[str, Any], folder: str, accelerator: Accelerator, stack: ExitStack
) -> Callable[[], None]:
    from flow_grpo import places
    from flow_grpo.methods.registry import method_of
    from flow_grpo.policy import Policy
    from flow_grpo.prompts import training_prompts
    from flow_grpo.recipes.registry import get_config
    from flow_grpo.rewards.building import build_reward
    from flow_grpo.runs.run import Run
    from flow_grpo.settings import resolve

    config = get_config(recipe)
    config.update_from_flattened_dict(dict(changes))
    config.logdir, config.run_name, config.trackers = folder, name, ()
    settings = resolve(config, 1, cuda=False)
    run = stack.enter_context(Run(settings, accelerator))
    policy, reward = Policy.load(settings, accelerator), build_reward(settings.config, accelerator.device)
    prompts, loop = training_prompts(config), places.load(method_of(config).loop)

    def epoch() -> None:
        loop(policy, prompts, reward, settings, run)
        run.counters.epoch += 1

    return epoch


def _memory_of(name: str) -> float:
    """The largest resident set of a fresh process that trains two epochs, in MiB."""
    command = [sys.executable, __file__, "memory", "--only", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{name}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return float(done.stdout.split()[-1])


def memory(name: str) -> None:
    """Train two epochs and print the largest resident set, in MiB."""
    with _epochs([name]) as epochs:
        epochs[name]()
        epochs[name]()
    print(peak_mib())


# --- the exact law ----------------------------------------------------------------------------------------


def curve(out: Path, logs: Path) -> None:
    """Draw the base model's images, measure them, and write the law of each strength to curve.json."""
    import numpy as np

    from flow_grpo import frontier
    from flow_grpo.diversity.rke import median_bandwidth, rke_score
    from flow_grpo.diversity.vendi import vendi_score
    from flow_grpo.recipes.registry import get_config
    from scripts.study.base_images import base_images

    images = base_images(get_config("tiny_drtune"), IMAGES, logs / "base")
    rewards, features = images.reward, images.features
    first = features[:, :SET]  # on which a run chooses its bandwidth
    bandwidth = median_bandwidth(list(first))
    draws = frontier.Draws.of(rewards, SET, REPEATS, seed=0)
    scores = {
        "vendi": frontier.of_features(features, vendi_score),
        "rke": frontier.of_features(features, lambda x: rke_score(x, bandwidth)),
    }
    rows = []
    for strength in STRENGTHS:
        point, weights = frontier.point(rewards, strength), frontier.weights(rewards, strength)
        row = {"strength": strength, "reward": point.reward, "kl": point.kl, "effective": point.effective}
        row["judge"] = frontier.expectation(weights, images.right)
        rows.append(row | {name: frontier.diversity(draws, strength, score)[0] for name, score in scores.items()})
    best = float(np.max(rewards, 1).mean())
    found = {"images": IMAGES, "prompts": len(rewards), "bandwidth": bandwidth, "best_of_all": best, "rows": rows}
    write_atomically(out / "curve.json", strict_json(found, indent=1) + "\n")


# --- the runs ---------------------------------------------------------------------------------------------


def plan(out: Path = RESULTS) -> list[StudyRun]:
    """Three seeds of each method, with epochs for 150 s by the committed seconds an epoch."""
    seconds = read_object(out / "cost.json")["seconds"]
    runs = []
    for seed in SEEDS:
        for name, (method, changes) in ENTRIES.items():
            epochs = max(1, round(SECONDS / seconds[name]))
            every = max(1, round(epochs / EVALUATIONS))
            once = {"num_epochs": epochs, "eval_ode_log_prob_freq": epochs, **changes}
            runs.append(StudyRun("methods", name, f"tiny_{method}", seed, 0.0, every, once))
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one of the four; 0, or 1 after naming the runs that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "curve", "train", "write", "memory"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    parser.add_argument("--only", default="", help="train: methods, commas between (default: all)")
    parser.add_argument("--logs", type=Path, default=Path("logs/bench/methods"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(arguments)
    only = [word for word in args.only.split(",") if word]
    with one_sentence_errors():
        if args.what == "memory":
            memory(only[0])
        elif args.what == "train":
            failed = train_all(
                [r for r in plan(args.out) if not only or r.label in only], args.logs.resolve(), args.jobs
            )
            if failed:
                print(f"error: {', '.join(failed)} failed; their logs are in {args.logs}.", file=sys.stderr)
            return 1 if failed else 0
        else:
            args.out.mkdir(parents=True, exist_ok=True)
            steps: dict[str, Callable[[], None]] = {
                "cost": lambda: cost(args.out),
                "curve": lambda: curve(args.out, args.logs.resolve()),
                "write": lambda: write(plan(args.out), args.logs, args.out),
            }
            steps[args.what]()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
