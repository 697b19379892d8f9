"""What the study's runs rest on: the cost of their epochs, and the exact law.

    python scripts/study/prepare.py cost --testbed scenes --only nft,grpo   seconds and memory of an epoch, cores free
    python scripts/study/prepare.py curve --testbed scenes                  the exact law, from the base model's images

What they find is committed, in assets/study/TESTBED; testbeds.py says what the testbeds are.
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
from scripts.study import curve as study_curve
from scripts.study.paths import ROOT
from scripts.study.testbeds import COST, CURVE, TESTBEDS, Testbed

if TYPE_CHECKING:
    from accelerate import Accelerator

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
    parser.add_argument("what", choices=("cost", "curve", "memory"))
    parser.add_argument("--testbed", choices=TESTBEDS, default="tiny", help="default: tiny")
    parser.add_argument("--only", default="", help="cost: of these, commas between")
    parser.add_argument("--logs", type=Path, default=Path("logs/study"), help="curve: of the images it is read off")
    parser.add_argument("--out", type=Path, help="folder of the results (default: assets/study/TESTBED)")
    args = parser.parse_args(arguments)
    args.testbed = TESTBEDS[args.testbed]
    args.out = args.out or args.testbed.results
    known = {**args.testbed.entries, **args.testbed.tried}
    args.only = [word for word in args.only.split(",") if word] or list(args.testbed.entries)
    if unknown := [word for word in args.only if word not in known]:
        parser.error(f"--only {unknown[0]}: there is no such run; it takes {', '.join(known)}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one of the three; 0."""
    args = parse(arguments)
    with one_sentence_errors():
        args.out.mkdir(parents=True, exist_ok=True)
        if args.what == "memory":
            memory(args.testbed, args.only[0])
        elif args.what == "cost":
            cost(args.testbed, args.only, args.out)
        else:
            curve(args.testbed, args.out, args.logs.resolve())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
