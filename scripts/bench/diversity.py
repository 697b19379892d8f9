"""Time and memory of the diversity scores, beside the vendi-score package.

    python scripts/bench/diversity.py --out logs/bench/diversity [--sizes 1000,10000,50000] [--dims 768] [--threads 2]

It writes `results.json` and `table.md`. What is measured, and its limits:

- Features: synthetic, float32, unit length: 100 clusters, the i-th drawn with probability proportional to 1 / i; a
  sample is normalise(c + 0.7 z) with the cluster's centre c and z from N(0, I), of --seed. All methods read one file.
- The bandwidth h of the Gaussian kernel is `median_bandwidth` of the first 1000 of them.
- Each measurement is a fresh process with --threads BLAS threads. Seconds: one call, imports and reading left out.
- Memory: the peak resident set of that process (Linux), in MiB, whole. The rows of processes that score nothing say how
  much of it are imports and features.
- A process that runs longer than --limit-seconds, or asks for more than --limit-gib, did not finish.
- Ours take float32 and work in float64. The package takes the features as they are, in float32; for its Gaussian
  `score_K` we make the kernel matrix in float64, in place, and its time counts.
- Random features: their values carry the error that they state; the cost is that of all repeats and of both
  orders together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from scripts.bench.machine import cpu_model, peak_mib

if TYPE_CHECKING:
    import numpy as np

UNRESOLVED = " (r too small)"
COSINE, GAUSSIAN, RKE, ERROR = "cosine Vendi_1", "Gaussian Vendi_1", "RKE", ", error"
CLUSTERS, SPREAD, MEDIAN_ROWS = 100, 0.7, 1000
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


# --- the methods: features (n, d) to values by name ---------------------------------------------------------


def package() -> ModuleType:
    """The vendi-score package, imported only by the processes that measure it."""
    from vendi_score import vendi

    return vendi


def gaussian_kernel(x: np.ndarray, bandwidth: float) -> np.ndarray:
    """exp(-|x - y|^2 / (2 h^2)) of unit rows, one matrix: (n, n) float64."""
    import numpy as np

    rows = x.astype(np.float64)
    kernel = rows @ rows.T
    kernel -= 1
    kernel /= bandwidth**2
    return np.exp(kernel, out=kernel)


def methods() -> dict[str, Callable[[np.ndarray, argparse.Namespace], dict[str, float]]]:
    """Each takes the features and the options; `score_dual` is meant for n > d."""
    from flow_grpo.diversity.fkea import fkea_scores
    from flow_grpo.diversity.rke import rke_score
    from flow_grpo.diversity.vendi import vendi_score

    def random_features(x: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
        scores = fkea_scores(x, args.bandwidth, (1.0, 2.0), args.frequencies, args.repeats, args.seed)
        named = {GAUSSIAN if scores[1.0].resolved else GAUSSIAN + UNRESOLVED: scores[1.0], RKE: scores[2.0]}
        errors = {name + ERROR: score.error for name, score in named.items()}
        return {name: score.value for name, score in named.items()} | errors

    def package_kernel(x: np.ndarray, args: argparse.Namespace, order: float) -> float:
        return package().score_K(gaussian_kernel(x, args.bandwidth), q=order)

    return {
        "nothing, our imports": lambda *_: {},
        "vendi-score, nothing": lambda *_: {},
        "exact cosine Vendi": lambda x, _: {COSINE: vendi_score(x)},
        "vendi-score `score_dual`": lambda x, _: {COSINE: package().score_dual(x)},
        "vendi-score `score_X`": lambda x, _: {COSINE: package().score_X(x)},
        "exact RKE": lambda x, args: {RKE: rke_score(x, args.bandwidth)},
        "vendi-score `score_K`, q = 2": lambda x, args: {RKE: package_kernel(x, args, 2)},
        "exact Gaussian Vendi": lambda x, args: {GAUSSIAN: vendi_score(x, 1.0, "gaussian", args.bandwidth)},
        "vendi-score `score_K`": lambda x, args: {GAUSSIAN: package_kernel(x, args, 1)},
        "random features": random_features,
    }


# --- one measurement ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of the table; no numbers, and a reason, for what did not finish."""

    n: int
    method: str
    values: dict[str, float]
    seconds: float | None = None
    peak_mib: float | None = None
    failure: str = ""


def run_child(args: argparse.Namespace) -> int:
    """Score the features of a file once; print values, seconds and memory as JSON."""
    import numpy as np

    x, score = np.load(args.features), methods()[args.measure]
    if args.measure.startswith("vendi-score"):
        package()  # imported before the clock starts
    limit = int(args.limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    start = time.perf_counter()
    values = {name: float(value) for name, value in score(x, args).items()}
    seconds = time.perf_counter() - start
    print(json.dumps({"values": values, "seconds": seconds, "peak_mib": peak_mib()}))
    return 0


def measure(method: str, n: int, features: Path, bandwidth: float, args: argparse.Namespace) -> Row:
    """The row of a method, by a fresh process."""
    named = {key: getattr(args, key) for key in ("seed", "frequencies", "repeats", "limit_gib")}
    options = {**named, "measure": method, "features": features, "bandwidth": bandwidth}
    command = [sys.executable, __file__]
    command += [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    env = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(args.threads))}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit_seconds, env=env)
    except subprocess.TimeoutExpired:
        return Row(n, method, {}, failure=f"over {args.limit_seconds:g} s")
    if done.returncode == 0:
        return Row(n, method, **json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Row(n, method, {}, failure=f"over {args.limit_gib:g} GiB" if "MemoryError" in last else last)


def make_features(n: int, dims: int, seed: int) -> np.ndarray:
    """Clustered unit vectors: (n, dims) float32; see the top."""
    import numpy as np

    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((CLUSTERS, dims), dtype=np.float32)
    weights = 1 / np.arange(1, CLUSTERS + 1)
    x = rng.standard_normal((n, dims), dtype=np.float32)
    x *= SPREAD
    x += centres[rng.choice(CLUSTERS, n, p=weights / weights.sum())]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def bench_size(n: int, args: argparse.Namespace, folder: Path) -> tuple[float, list[Row]]:
    """The bandwidth, and the rows of n samples."""
    import numpy as np

    from flow_grpo.diversity.rke import median_bandwidth

    x, path = make_features(n, args.dims, args.seed), folder / f"{n}.npy"
    np.save(path, x)
    bandwidth = median_bandwidth([x[:MEDIAN_ROWS]])
    rows = []
    for method in methods():
        if "score_dual" not in method or n > args.dims:
            rows.append(measure(method, n, path, bandwidth, args))
            print(rows[-1], file=sys.stderr)
    path.unlink()
    return bandwidth, rows


# --- output -------------------------------------------------------------------------------------------------


def values_text(values: dict[str, float]) -> str:
    """The scores, each with its error where it states one."""
    errors = {name: f" ± {values[name + ERROR]:.2g}" for name in values if name + ERROR in values}
    return "; ".join(f"{k} = {v:.6g}{errors.get(k, '')}" for k, v in values.items() if not k.endswith(ERROR))


def write_table(results: dict[str, Any], path: Path) -> None:
    """A row for each measurement; below it what they share."""
    lines = ["| n | method | values | seconds | peak MiB |", "|---|---|---|---|---|"]
    for r in results["rows"]:
        numbers = (
            f"did not finish: {r['failure']} | |" if r["failure"] else f"{r['seconds']:.3f} | {r['peak_mib']:.0f} |"
        )
        lines.append(f"| {r['n']} | {r['method']} | {values_text(r['values'])} | {numbers}")
    lines += [
        "",
        f"{results['dims']} dimensions, {results['threads']} thread(s), {results['machine']['cpu']}. Random features: "
        f"{results['repeats']} repeats of r = {results['frequencies']} frequencies, ± their stated error. Limits: "
        f"{results['limit_seconds']:g} s and {results['limit_gib']:g} GiB. Bandwidths: "
        + ", ".join(f"{h:.4g} at n = {n}" for n, h in results["bandwidths"].items()),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; the last three are for the processes that measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="logs/bench/diversity", help="folder to write (default: %(default)s)")
    parser.add_argument("--sizes", default="1000,10000,50000", help="numbers of samples (default: %(default)s)")
    parser.add_argument("--dims", type=int, default=768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frequencies", type=int, default=1024, help="r of the random features (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit-seconds", type=float, default=1200, help="of a process (default: %(default)s)")
    parser.add_argument("--limit-gib", type=float, default=16, help="of a process (default: %(default)s)")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    parser.add_argument("--features", default="", help=argparse.SUPPRESS)
    parser.add_argument("--bandwidth", type=float, default=1.0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 0, or 2 after one sentence about bad input."""
    args = parse(arguments)
    if args.measure:
        return run_child(args)
    if not all(part.isdecimal() and int(part) >= 2 for part in args.sizes.split(",")):
        print(f"--sizes is {args.sizes!r}; it must be whole numbers of at least 2, with commas.", file=sys.stderr)
        return 2
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        measured = {n: bench_size(n, args, Path(folder)) for n in map(int, args.sizes.split(","))}
    shared = ("dims", "threads", "seed", "frequencies", "repeats", "limit_seconds", "limit_gib")
    results = {
        **{key: getattr(args, key) for key in shared},
        "machine": {"cpu": cpu_model(), "system": platform.system()},
        "bandwidths": {str(n): bandwidth for n, (bandwidth, _) in measured.items()},
        "rows": [asdict(row) for _, rows in measured.values() for row in rows],
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_table(results, out / "table.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
