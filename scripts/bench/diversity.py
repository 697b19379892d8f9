"""Time and memory of the diversity scores, beside the vendi-score package.

    python scripts/bench/diversity.py --out logs/bench/diversity [--sizes 1000,10000,50000] [--dims 768] [--threads 2]

It writes `results.json` and `table.md`. What is measured, and its limits:

- Features: synthetic, float32, unit length: 100 clusters, the i-th drawn with probability proportional to 1 / i; a
  sample is normalise(c + 0.7 z) with the cluster's centre c and z from N(0, I), of --seed. All methods read one file.
- The bandwidth h of the Gaussian kernel is the median distance within the first 1000 of them.
- Each measurement is a fresh process with --threads BLAS threads. Seconds: one call, imports and reading left out.
- Memory: the peak resident set of that process, in MiB, whole. `loaded` is that of one that imports numpy, scipy and
  our scores and reads the features, but scores nothing: what is above it is the method's own.
- A process that runs longer than --limit-seconds, or asks for more than --limit-gib, did not finish.
- Ours take float32 and work in float64. The package takes the features as they are, in float32; for its Gaussian
  `score_K` we make the kernel matrix in float64, in place, and its time counts.
- Random features: their values carry the standard error over repeats; the cost is that of all repeats and of both
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
from typing import TYPE_CHECKING, Any

from flow_grpo.errors import ConfigError
from scripts.bench.entropy import cpu_model

if TYPE_CHECKING:
    import numpy as np

    Score = Callable[[np.ndarray, argparse.Namespace], dict[str, float]]

CLUSTERS, SPREAD, MEDIAN_ROWS = 100, 0.7, 1000
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


# --- the methods: features (n, d) to values by name ---------------------------------------------------------


def nothing(x: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
    """No score, after the imports."""
    from scripts.diversity_metrics import fkea, rke, vendi  # noqa: F401 - their memory is what is measured

    return {}


def our_cosine(x: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
    """Exact Vendi_1, the d x d or n x n side."""
    from scripts.diversity_metrics.vendi import vendi_score

    return {"cosine Vendi_1": vendi_score(x)}


def package_dual(x: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
    """The package's d x d side."""
    from vendi_score import vendi

    return {"cosine Vendi_1": vendi.score_dual(x)}


def package_primal(x: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
    """The package's n x n side."""
    from vendi_score import vendi

    return {"cosine Vendi_1": vendi.score_X(x)}


def our_rke(x: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
    """Exact RKE, by blocks."""
    from scripts.diversity_metrics.rke import rke_score

    return {"RKE": rke_score(x, args.bandwidth)}


def our_gaussian(x: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
    """Exact Gaussian Vendi_1: n x n."""
    from scripts.diversity_metrics.vendi import vendi_score

    return {"Gaussian Vendi_1": vendi_score(x, kernel="gaussian", bandwidth=args.bandwidth)}


def random_features(x: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
    """Both Gaussian scores, with their standard errors."""
    from scripts.diversity_metrics.fkea import fkea_scores

    scores = fkea_scores(x, args.bandwidth, (1.0, 2.0), args.frequencies, args.repeats, args.seed)
    named = {"Gaussian Vendi_1": scores[1.0], "RKE": scores[2.0]}
    errors = {f"{name}, standard error": score.standard_error for name, score in named.items()}
    return {**{name: score.value for name, score in named.items()}, **errors}


def package_kernel(x: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
    """The package's `score_K` of the Gaussian kernel matrix, q = 1."""
    from vendi_score import vendi

    return {"Gaussian Vendi_1": vendi.score_K(gaussian_kernel(x, args.bandwidth))}


def package_kernel_rke(x: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
    """The package's `score_K` of the Gaussian kernel matrix, q = 2."""
    from vendi_score import vendi

    return {"RKE": vendi.score_K(gaussian_kernel(x, args.bandwidth), q=2)}


def gaussian_kernel(x: np.ndarray, bandwidth: float) -> np.ndarray:
    """exp(-|x - y|^2 / (2 h^2)), one matrix: (n, n) float64."""
    import numpy as np

    rows = x.astype(np.float64)
    half = np.square(rows).sum(1) / 2
    kernel = rows @ rows.T
    kernel -= half
    kernel -= half[:, None]
    kernel /= bandwidth**2
    return np.exp(kernel, out=kernel)


METHODS: dict[str, Score] = {
    "cosine, exact": our_cosine,
    "cosine, vendi-score `score_dual`": package_dual,
    "cosine, vendi-score `score_X`": package_primal,
    "RKE, exact": our_rke,
    "RKE, vendi-score `score_K`": package_kernel_rke,
    "Gaussian, exact": our_gaussian,
    "Gaussian, vendi-score `score_K`": package_kernel,
    "random features": random_features,
}


# --- one measurement ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of the table; nan and a reason for what did not finish."""

    n: int
    method: str
    values: dict[str, float]
    seconds: float = float("nan")
    peak_mib: float = float("nan")
    failure: str = ""


def peak_mib() -> float:
    """Peak resident set of this process; ru_maxrss, where there is no /proc, may include that of its parent."""
    path = Path("/proc/self/status")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    kib = found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 1024


def run_child(args: argparse.Namespace) -> int:
    """Score the features of a file once and print values, seconds and memory as JSON."""
    import numpy as np
    import scipy.linalg  # noqa: F401 - imported before the clock starts

    x = np.load(args.features)
    score = METHODS.get(args.measure, nothing)
    score(x[: min(len(x), 8)], args)  # imports what it needs
    limit = int(args.limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    start = time.perf_counter()
    try:
        values = score(x, args)
    except MemoryError as error:
        print(error, file=sys.stderr)
        return 3
    seconds = time.perf_counter() - start
    print(json.dumps({"values": values, "seconds": seconds, "peak_mib": peak_mib()}))
    return 0


def measure(method: str, n: int, features: Path, bandwidth: float, args: argparse.Namespace) -> Row:
    """The row of a method, by a fresh process."""
    named = {key: getattr(args, key) for key in ("seed", "frequencies", "repeats", "limit_gib")}
    options = {**named, "measure": method, "features": features, "bandwidth": bandwidth}
    command = [sys.executable, "-m", "scripts.bench.diversity"]
    command += [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    threads = dict.fromkeys(THREAD_VARIABLES, str(args.threads))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=args.limit_seconds, env={**os.environ, **threads}
        )
    except subprocess.TimeoutExpired:
        return Row(n, method, {}, failure=f"over {args.limit_seconds:g} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Row(n, method, {}, failure=f"over {args.limit_gib:g} GiB" if done.returncode == 3 else last)
    return Row(n, method, **json.loads(done.stdout.splitlines()[-1]))


def make_features(n: int, dims: int, seed: int) -> np.ndarray:
    """Clustered unit vectors: (n, dims) float32; see the top."""
    import numpy as np

    rng = np.random.default_rng([seed, n])
    centres = rng.standard_normal((CLUSTERS, dims), dtype=np.float32)
    weights = 1 / np.arange(1, CLUSTERS + 1)
    x = rng.standard_normal((n, dims), dtype=np.float32)
    x *= SPREAD
    x += centres[rng.choice(CLUSTERS, n, p=weights / weights.sum())]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def bench_size(n: int, args: argparse.Namespace, folder: Path) -> tuple[dict[str, float], list[Row]]:
    """n with its bandwidth and the memory of a process that scores nothing, and the rows."""
    import numpy as np

    from scripts.diversity_metrics.rke import median_bandwidth

    x, path = make_features(n, args.dims, args.seed), folder / f"{n}.npy"
    np.save(path, x)
    bandwidth = median_bandwidth([x[:MEDIAN_ROWS]])
    loaded = measure("loaded", n, path, bandwidth, argparse.Namespace(**{**vars(args), "limit_seconds": None}))
    rows = []
    for method in METHODS:
        if METHODS[method] is package_dual and n <= args.dims:
            continue  # no smaller side
        rows.append(measure(method, n, path, bandwidth, args))
        print(rows[-1], file=sys.stderr)
    path.unlink()
    return {"n": n, "bandwidth": bandwidth, "loaded_mib": loaded.peak_mib}, rows


# --- output -------------------------------------------------------------------------------------------------


def write_table(results: dict[str, Any], path: Path) -> None:
    """A row for each measurement; below it what they share."""
    lines = ["| n | method | values | seconds | peak MiB |", "|---|---|---|---|---|"]
    for r in results["rows"]:
        values = []
        for name, value in r["values"].items():
            error = r["values"].get(f"{name}, standard error")
            if not name.endswith("error"):
                values.append(f"{name} = {value:.6g}" + (f" ± {error:.2g}" if error is not None else ""))
        numbers = f"{r['seconds']:.2f} | {r['peak_mib']:.0f}" if not r["failure"] else "did not finish | "
        lines.append(f"| {r['n']} | {r['method']} | {'; '.join(values) or r['failure']} | {numbers} |")
    lines += [
        "",
        f"{results['dims']} dimensions, {results['threads']} thread(s), {results['machine']['cpu']}. Random features: "
        f"{results['repeats']} repeats of r = {results['frequencies']} frequencies, ± one standard error. Limits: "
        f"{results['limit_seconds']:g} s and {results['limit_gib']:g} GiB.",
        "",
        *(
            f"- n = {s['n']}: h = {s['bandwidth']:.4g}; {s['loaded_mib']:.0f} MiB of the peak are the imports and the "
            "features"
            for s in results["sizes"]
        ),
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


def sizes_of(text: str) -> list[int]:
    """The numbers of --sizes."""
    if not all(part.strip().isdecimal() and int(part) >= 2 for part in text.split(",")):
        raise ConfigError(f"--sizes = {text!r} must be whole numbers of at least 2, separated by commas")
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 0, or 2 after one sentence about bad input."""
    args = parse(arguments)
    if args.measure:
        return run_child(args)
    try:
        sizes = sizes_of(args.sizes)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        measured = [bench_size(n, args, Path(folder)) for n in sizes]
    shared = ("dims", "threads", "seed", "frequencies", "repeats", "limit_seconds", "limit_gib")
    results = {
        **{key: getattr(args, key) for key in shared},
        "machine": {"cpu": cpu_model(), "system": platform.system()},
        "sizes": [size for size, _ in measured],
        "rows": [asdict(row) for _, rows in measured for row in rows],
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_table(results, out / "table.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
