"""Methods at equal cost on a testbed: reward, judge and diversity, beside the exact law.

    python scripts/bench/methods.py cost              seconds and memory of an epoch of each method, on free cores
    python scripts/bench/methods.py curve             the exact law, from images of the base model
    python scripts/bench/methods.py train --jobs 2    three seeds of each method; done runs are skipped
    python scripts/bench/methods.py search --jobs 2   what was tried in search of the method on the curve, once each
    python scripts/bench/methods.py write             results.json, table.md and frontier.png

All of `--testbed tiny`, unless another is named; testbeds.py says what they are. What `cost` and `curve` find is
committed, in assets/figures/methods and assets/figures/scenes, and so are the outcomes of runs: `write` adds those in
--logs to those that are there, as long as the exact law is of the same prompts.

- Recipes are <testbed>_<method> as they stand. Their learning rates were chosen by trials with seeds that are not among
  the three.
- Evaluation: images of the test prompts on the same noises for all; the judge is no reward's model; diversity is within
  a prompt, in the judge's features.
- Figures of the curve's prompts are held against the law of the same gain in reward, each over its own base images.
- `seconds to` a gain: epochs until the smoothed reward has risen by it, times the method's seconds an epoch.
- PEPG and PAR have the same gradient: they differ by rounding.
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
from typing import TYPE_CHECKING

from flow_grpo.commands.cli import one_sentence_errors
from flow_grpo.errors import ConfigError
from flow_grpo.files import read_object, strict_json, write_atomically

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from scripts.bench.machine import cpu_model, peak_mib
from scripts.bench.methods_results import write
from scripts.bench.testbeds import COST, CURVE, ROOT, SEARCH_SEED, TESTBEDS, Testbed
from scripts.study import curve as study_curve
from scripts.study.plan import StudyRun
from scripts.study.run import State, state_of, train_all

if TYPE_CHECKING:
    from accelerate import Accelerator

SEEDS = (0, 1, 2)
WARM_UP, ROUNDS = 1, 5  # epochs of each method


# --- what an epoch costs ----------------------------------------------------------------------------------


def cost(testbed: Testbed, labels: Sequence[str], out: Path) -> None:
    """Measure each in turn, so that what else the machine does meets all of them alike; add it to cost.json."""
    with _epochs(testbed, labels) as epochs:
        seconds = seconds_of(epochs, ROUNDS)
    peak = {label: _memory_of(testbed, label) for label in labels}
    path = out / COST
    kept = read_object(path) if path.exists() else {}
    found = {"machine": cpu_model(), "threads": testbed.threads, "rounds": ROUNDS}
    found |= {"seconds": kept.get("seconds", {}) | seconds, "peak_mib": kept.get("peak_mib", {}) | peak}
    write_atomically(path, strict_json(found, indent=1) + "\n")


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
def _epochs(testbed: Testbed, labels: Sequence[str]) -> Iterator[dict[str, Callable[[], None]]]:
    """label -> a function that trains one epoch of its recipe."""
    import torch
    from accelerate import Accelerator

    torch.set_num_threads(testbed.threads)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        accelerator = Accelerator(cpu=True)
        yield {label: _epoch_of(testbed, label, folder, accelerator, stack) for label in labels}


def _epoch_of(
    testbed: Testbed, label: str, folder: str, accelerator: Accelerator, stack: ExitStack
) -> Callable[[], None]:
    from flow_grpo import places
    from flow_grpo.methods.registry import method_of
    from flow_grpo.policy import Policy
    from flow_grpo.prompts import training_prompts
    from flow_grpo.recipes.registry import get_config
    from flow_grpo.rewards.building import build_reward
    from flow_grpo.runs.run import Run
    from flow_grpo.settings import resolve

    entry = testbed.entry(label)
    config = get_config(f"{testbed.name}_{entry.method}")
    config.update_from_flattened_dict({**testbed.settings, **entry.changes})
    config.logdir, config.run_name, config.trackers = folder, label, ()
    settings = resolve(config, 1, cuda=False)
    run = stack.enter_context(Run(settings, accelerator))
    policy, reward = Policy.load(settings, accelerator), build_reward(settings.config, accelerator.device)
    prompts, loop = training_prompts(config), places.load(method_of(config).loop)

    def epoch() -> None:
        loop(policy, prompts, reward, settings, run)
        run.counters.epoch += 1

    return epoch


def _memory_of(testbed: Testbed, label: str) -> float:
    """The largest resident set of a fresh process that trains two epochs, in MiB."""
    command = [sys.executable, __file__, "memory", "--testbed", testbed.name, "--only", label]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{label}: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return float(done.stdout.split()[-1])


def memory(testbed: Testbed, label: str) -> None:
    """Train two epochs and print the largest resident set, in MiB."""
    with _epochs(testbed, [label]) as epochs:
        epochs[label]()
        epochs[label]()
    print(peak_mib())


# --- the exact law ----------------------------------------------------------------------------------------


def curve(testbed: Testbed, out: Path, logs: Path) -> None:
    """Draw the base model's images, and write curve.json and curve.png."""
    recipe, changes = testbed.curve_of
    settings = [f"{key}={value}" for key, value in {"num_threads": testbed.threads, **changes}.items()]
    study_curve.main([recipe, *settings, "--images", str(testbed.base_images), "--out", str(logs)])
    for name in (CURVE, "curve.png"):
        write_atomically(out / name, (logs / recipe / name).read_bytes())


# --- the command ------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "curve", "train", "search", "write", "memory"))
    parser.add_argument("--testbed", choices=TESTBEDS, default="tiny", help="default: tiny")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    parser.add_argument("--only", default="", help="cost, train, search: of these, commas between")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="train: of these (default: 0 1 2)")
    parser.add_argument("--logs", type=Path, help="folder of the runs (default: logs/bench/TESTBED)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: the testbed's)")
    args = parser.parse_args(arguments)
    args.testbed = TESTBEDS[args.testbed]
    args.logs = (args.logs or Path("logs/bench") / args.testbed.name).resolve()
    args.out = args.out or args.testbed.results
    labels = args.testbed.tried if args.what == "search" else args.testbed.entries
    if not labels:
        parser.error(
            f"--testbed {args.testbed.name} has nothing to search: scripts/bench/testbeds.py names what is tried"
        )
    known = {**args.testbed.entries, **args.testbed.tried} if args.what in ("cost", "memory") else labels
    args.only = [word for word in args.only.split(",") if word] or list(labels)
    if unknown := [word for word in args.only if word not in known]:
        parser.error(f"--only {unknown[0]}: there is no such run; it takes {', '.join(known)}")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} is not allowed; it takes a whole number from 1 on")
    if wrong := [seed for seed in args.seeds if not 0 <= seed < SEARCH_SEED]:
        parser.error(f"--seeds {wrong[0]} is not allowed; it takes whole numbers from 0 to {SEARCH_SEED - 1}")
    return args


def done(runs: Sequence[StudyRun], logs: Path) -> list[StudyRun]:
    """Those that are done; the folders of others are named, as they are passed over."""
    found = []
    for run in runs:
        state = state_of(run, logs)
        if state is State.DONE:
            found.append(run)
        elif (logs / run.name).exists():
            why = "is not finished" if state is State.BEGUN else "is of other settings"
            print(f"{logs / run.name} {why}: it is left out.", file=sys.stderr)
    return found


def train(runs: Sequence[StudyRun], args: argparse.Namespace) -> int:
    """0, or 1 after naming the runs that failed."""
    failed = train_all([run for run in runs if run.label in args.only], args.logs, args.jobs)
    if failed:
        print(f"error: {', '.join(failed)} failed; their logs are in {args.logs}.", file=sys.stderr)
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one of the six; 0, or 1 after naming the runs that failed."""
    args = parse(arguments)
    testbed: Testbed = args.testbed
    with one_sentence_errors():
        args.out.mkdir(parents=True, exist_ok=True)
        if args.what == "memory":
            memory(testbed, args.only[0])
        elif args.what == "cost":
            cost(testbed, args.only, args.out)
        elif args.what == "curve":
            curve(testbed, args.out, args.logs)
        elif args.what == "train":
            return train(testbed.plan(args.seeds, args.out), args)
        elif args.what == "search":
            return train(testbed.search(args.out), args)
        else:
            runs = testbed.plan(args.seeds, args.out) + testbed.search(args.out)
            write(testbed, done(runs, args.logs), args.logs, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
