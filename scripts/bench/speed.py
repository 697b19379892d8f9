"""What an epoch costs beside the calls of its models, the least that it can cost: on one core, by the tiny SD3.

    python scripts/bench/speed.py                       every case, and what the cost depends on
    python scripts/bench/speed.py --quick               the cases alone, three rounds each
    python scripts/bench/speed.py --against COMMIT      beside another commit, in a worktree of it
    python scripts/bench/speed.py --gpu                 SD3.5-medium of random weights at 512 pixels, on a GPU

- Seconds are CPU seconds of a process with one thread; of several processes, those of the busiest. A case has a process
  of its own (speed_worker.py), and in each of its rounds everything that is compared is timed once, in turn: an epoch,
  then the calls of its models alone, then upstream's order of calls. With --against the processes of the two trees take
  turns, round by round, too; only one computes at a time.
- A ratio is the median over rounds. Its interval is the range of the rounds, which holds the true median with a
  probability of 1 - 2^(1 - rounds) where rounds are independent.
- Calls: network, decoder, rewards and judge, as many as the epoch was counted to make, on batches of the same sizes.
  They step nothing, draw no noise, update nothing. An evaluation's network calls are those of its sampler; those of the
  log-densities are a forward and a product with J for each probe.
- Compiled calls: the whole network by torch.compile, which is at least as quick as the package's, block by block.
- Upstream: speed_upstream.py says how.
- A first epoch is left out; of a compiled network, what it takes longer is the compiling, without that of torch's own
  worker processes, or the reading of what torch has kept.

Writes results.json and table.md into assets/figures/speed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scripts.bench.speed_cases import ALL, CASES, SCALES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "assets/figures/speed"
ROUNDS, QUICK_ROUNDS = 5, 3
MARK = "TIMED "  # of a worker's lines that are meant for us; libraries print, too

Round = Mapping[str, float]


class Processes:
    """The worker or workers of a case, with the package of a tree; each waits until it is asked for a round."""

    def __init__(self, name: str, tree: Path, alone: bool, place: Path) -> None:
        self.name, self.tree, count = name, tree, ALL[name].processes
        command = [sys.executable, str(HERE / "speed_worker.py"), name, *(["--alone"] if alone else [])]
        packages = place / "packages"  # the bench is of this tree, the package of the other
        packages.mkdir()
        for package in ("flow_grpo", "config"):
            (packages / package).symlink_to(tree / package)
        (packages / "scripts").symlink_to(ROOT / "scripts")
        common = os.environ | {"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
        if count > 1:
            common |= {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
            common |= {"MASTER_PORT": str(_free_port()), "SPEED_LOGDIR": str(place)}
        self._errors = [(place / f"errors-{rank}").open("w+", encoding="utf-8") for rank in range(count)]
        self._all = [
            subprocess.Popen(
                command, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}),
            )
            for rank, errors in enumerate(self._errors)
        ]  # fmt: skip

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            if process.stdin is not None:
                process.stdin.close()
        for process, errors in zip(self._all, self._errors, strict=True):
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
            errors.close()

    def told(self) -> dict[str, float] | None:
        """What the case is; None where the tree does not know one of its settings."""
        return self._read()

    def round(self) -> dict[str, float]:
        """One round: seconds by part, of the busiest process."""
        for process in self._all:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        found = self._read()
        assert found is not None, "a tree that began knows its settings"
        return found

    def _read(self) -> dict[str, float] | None:
        from flow_grpo.errors import ConfigError

        lines = [self._line(process) for process in self._all]
        if all(lines):
            every = [json.loads(line) for line in lines]
            return {key: max(one[key] for one in every) for key in every[0]}
        self._errors[0].seek(0)
        end = (self._errors[0].read().strip().splitlines() or ["it said nothing"])[-1]
        if self.tree != ROOT and end.startswith(("KeyError", "flow_grpo.errors.ConfigError")):
            return None
        raise ConfigError(f"{self.name} in {self.tree}: {end}")

    @staticmethod
    def _line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                return line.removeprefix(MARK)
        return ""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def summary(told: Mapping[str, float], rounds: Sequence[Round], before: Sequence[float] = ()) -> dict[str, Any]:
    """A case's row: medians of seconds, and the ratios [median, least, most] of the rounds.

    Args:
        told: images, evaluations, trained, first.
        rounds: seconds by part: "seconds" is the epoch's.
        before: the other tree's, of the same rounds.
    """
    found: dict[str, Any] = dict(told)
    for part in rounds[0]:
        found[part] = statistics.median(one[part] for one in rounds)
    found["images_per_second"] = told["images"] / found["seconds"]
    epochs = [one["seconds"] for one in rounds]
    beside = {
        "network": [one["network"] for one in rounds],
        "calls": [one["network"] + one.get("scoring", 0.0) for one in rounds],
    }
    if "compiled" in rounds[0]:
        beside["best"] = [one["compiled"] + one.get("scoring", 0.0) for one in rounds]
    found["ratios"] = {name: spread(epochs, values) for name, values in beside.items()}
    if "upstream" in rounds[0]:  # images a second over upstream's
        found["ratios"]["upstream"] = spread([one["upstream"] for one in rounds], epochs)
    if before:
        found["before"] = statistics.median(before)
        found["ratios"]["before"] = spread(before, epochs)
    return found


def spread(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """[median, least, most] of the ratios pair by pair."""
    ratios = [one / other for one, other in zip(numerators, denominators, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def timed(name: str, rounds: int, other: Path | None) -> dict[str, Any]:
    """The row of a case, beside another tree if there is one."""
    with ExitStack() as stack:
        places = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2)]
        here = stack.enter_context(Processes(name, ROOT, False, places[0]))
        told = here.told()
        assert told is not None, "only another tree may lack a setting"
        there = stack.enter_context(Processes(name, other, True, places[1])) if other is not None else None
        if there is not None and there.told() is None:
            there = None
        mine, theirs = [], []
        for _ in range(rounds):
            mine.append(here.round())
            if there is not None:
                theirs.append(there.round()["seconds"])
    return {"case": name, **summary(told, mine, theirs)}


def table(results: Mapping[str, Any]) -> str:
    """The results in words."""
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=False, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("speed.md.j2").render(results=results, ratio=_ratio, certain=_certain)


def _ratio(row: Mapping[str, Any], name: str) -> str:
    """Of a cell."""
    if name not in row["ratios"]:
        return "-"
    median, least, most = row["ratios"][name]
    return f"{median:.2f} ({least:.2f} to {most:.2f})"


def _certain(rounds: int) -> str:
    return f"{100 * (1 - 2 ** (1 - rounds)):.0f} %"


def main() -> int:
    """Time all cases, or write the table of what was timed again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds of the cases alone")
    parser.add_argument("--against", metavar="COMMIT", default="", help="time this commit, too")
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=list(ALL), default=[])
    parser.add_argument("--rounds", type=int, default=0, help=f"of a case (default: {ROUNDS})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--table", action="store_true", help="only write table.md again, from results.json")
    parser.add_argument("--gpu", action="store_true", help="SD3.5-medium on a GPU instead, into gpu.json")
    arguments = parser.parse_args()
    from flow_grpo.commands.cli import one_sentence_errors

    with one_sentence_errors():
        if arguments.gpu:
            from scripts.bench.speed_gpu import write as write_gpu

            write_gpu(arguments.out)
        elif not arguments.table:
            write(arguments)
        if not arguments.gpu:
            results = json.loads((arguments.out / "results.json").read_text(encoding="utf-8"))
            (arguments.out / "table.md").write_text(table(results), encoding="utf-8")
    return 0


def _command(arguments: argparse.Namespace) -> str:
    """What makes the results again, wherever they are written."""
    against = f" --against {arguments.against}" if arguments.against else ""
    rounds = f" --rounds {arguments.rounds}" if arguments.rounds else ""
    only = "".join(f" {name!r}" for name in arguments.only)
    return f"python scripts/bench/speed.py{' --quick' * arguments.quick}{against}{rounds}{' --only' * bool(only)}{only}"


def write(arguments: argparse.Namespace) -> None:
    """Time what was asked for, and write the results after every case."""
    from flow_grpo.files import strict_json, write_atomically
    from scripts.bench.golden import worktree
    from scripts.bench.machine import cpu_model

    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    names = arguments.only or [*CASES, *(() if arguments.quick else SCALES)]
    results: dict[str, Any] = {
        "machine": cpu_model(), "load": os.getloadavg()[0], "rounds": rounds, "against": arguments.against,
        "command": _command(arguments), "rows": [],
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()), "tree")
        other = stack.enter_context(worktree(arguments.against, place)) if arguments.against else None
        for name in names:
            row = timed(name, rounds, other if ALL[name].before else None)
            results["rows"].append(row)
            results["load_after"] = os.getloadavg()[0]
            print(f"{name:<24} {json.dumps(row)}", flush=True)
            write_atomically(arguments.out / "results.json", strict_json(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
