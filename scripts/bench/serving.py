"""What a served reward costs a training: images a second, and how much of the server's time sampling hides.

    python scripts/bench/serving.py

The tiny SD3 trains by GRPO, in 1 and in 2 processes, with a reward that sleeps a known time for each image: not at all,
in the training's own process, and in one `fme serve`, asked by 1 and by 4 requests at once. The server scores one
request after another. Seconds are of the wall clock, since a sleeping process uses no others: medians of an epoch,
without the first. What else ran on the machine is noted by its load. Hidden is the part of the server's sleep by which
epochs did not become longer. It writes results.json and table.md into assets/figures/serving.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # scripts import one another; no install offers them

OUT = ROOT / "assets/figures/serving"
SLEEP = 0.05  # seconds an image
GROUPS, SAMPLES, BATCH, EPOCHS = 4, 8, 4, 5  # images of an epoch are GROUPS * SAMPLES
PROCESSES = (1, 2)
FME = (sys.executable, "-m", "flow_grpo.commands.main")
REWARD = """
import time

def score(images, prompts):
    time.sleep({seconds} * len(images))
    return images.flatten(1).mean(1)
"""
NAMES = {"no sleep": "fast.py", "local": "slow.py"}  # files of rewards in the training's own process
REQUESTS = {"served, 1 request": 1, "served, 4 requests": 4}  # at once
CASES = (*NAMES, *REQUESTS)
ROW = "row.json"


@contextmanager
def served(place: str) -> Iterator[str]:
    """The address of a server of this reward."""
    server = subprocess.Popen(
        [*FME, "serve", f"slow={place}", "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert server.stdout is not None
    try:
        said = server.stdout.readline()
        found = re.search(r"http://\S+", said)
        if found is None:
            raise SystemExit(f"the server did not start: {said}{server.stdout.read()}")
        yield found[0]
    finally:
        server.terminate()
        server.wait()


def train(case: str, address: str, folder: Path) -> list[float]:
    """Of the process that trains, or of all of them together: seconds of each epoch after the first."""
    from flow_grpo.methods.registry import black_box
    from flow_grpo.recipes.base import declare
    from flow_grpo.recipes.registry import get_config
    from flow_grpo.training.opening import open_training

    config = get_config("tiny_grpo")
    declare(config, ["reward_files.slow"])
    config.reward_fn.pickscore = 0.0
    config.reward_files.slow = address if case.startswith("served") else f"{folder / NAMES[case]}:score"
    config.remote.concurrency, config.remote.batch_size = REQUESTS.get(case, 1), BATCH
    config.sample.groups_per_epoch, config.sample.num_image_per_prompt = GROUPS, SAMPLES
    config.sample.batch_size, config.train.batch_size = BATCH, BATCH
    config.num_epochs, config.eval_freq, config.save_freq = EPOCHS, 0, 0
    config.logdir, config.run_name = str(folder / os.environ.get("WORLD_SIZE", "1")), case.replace(" ", "_")
    with open_training(config) as training:
        training.fit(black_box(config))
        lines = map(json.loads, (training.run.folder / "metrics.jsonl").read_text().splitlines())
    rates = [line["perf/images_per_second"] for line in lines if "perf/images_per_second" in line]
    return [GROUPS * SAMPLES / rate for rate in rates[1:]]


def work(case: str, address: str, folder: Path) -> None:
    """Of each process that trains: one case, and its row into a file."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    epochs = train(case, address, folder)
    seconds = statistics.median(epochs)
    row = {
        "case": case, "processes": processes, "seconds": seconds, "epochs": epochs,
        "images_per_second": GROUPS * SAMPLES / seconds, "load": os.getloadavg()[0],
    }  # fmt: skip
    if os.environ.get("RANK", "0") == "0":
        (folder / ROW).write_text(json.dumps(row))


def measure(folder: Path) -> list[dict[str, Any]]:
    """The rows of all cases, by one process and by two."""
    for case, name in NAMES.items():
        (folder / name).write_text(REWARD.format(seconds=SLEEP if case == "local" else 0.0))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    rows: list[dict[str, Any]] = []
    with served(f"{folder / NAMES['local']}:score") as address:
        for processes in PROCESSES:
            launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes)) if processes > 1 else ()
            for case in CASES:
                command = [sys.executable, *launcher, __file__, "--work", case, address, str(folder)]
                subprocess.run(command, cwd=ROOT, env=environment, check=True)
                rows.append(json.loads((folder / ROW).read_text()))
    return rows


def hidden(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> float:
    """1: epochs are as long as without sleep; 0: longer by all that is slept for an epoch's images, one by one."""
    (free,) = (r for r in rows if r["case"] == "no sleep" and r["processes"] == row["processes"])
    return 1 - (row["seconds"] - free["seconds"]) / (SLEEP * GROUPS * SAMPLES)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| reward | processes | seconds an epoch | images a second | hidden | load |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['case']} | {row['processes']} | {row['seconds']:.2f} | {row['images_per_second']:.2f} | "
        f"{'' if row['case'] == 'no sleep' else format(hidden(row, rows), '.0%')} | {row['load']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train by every case, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results")
    parser.add_argument("--work", nargs=3, metavar=("CASE", "ADDRESS", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        case, address, folder = arguments.work
        work(case, address, Path(folder))
        return
    out = arguments.out
    from flow_grpo.files import strict_json, write_atomically
    from scripts.bench.machine import cpu_model

    with tempfile.TemporaryDirectory() as place:
        rows = measure(Path(place))
    out.mkdir(parents=True, exist_ok=True)
    results = {
        "cpu": cpu_model(), "cores": os.cpu_count(), "command": "python scripts/bench/serving.py", "sleep": SLEEP,
        "images": GROUPS * SAMPLES, "batch": BATCH, "rows": rows,
    }  # fmt: skip
    write_atomically(out / "results.json", strict_json(results, indent=1) + "\n")
    write_atomically(out / "table.md", table(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
