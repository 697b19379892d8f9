"""Error against seconds of ODE log-densities: this project's, and the finite differences that it replaces.

    python scripts/bench/entropy.py [--out logs/bench/entropy] [--seed 0] [--threads 2]

Every method estimates log p_0 at the same data of the trained tiny SD3, from data to noise, in 40 steps, so that all
have one true value. It writes `results.json`, `table.md` and `error_vs_seconds.png`.

What is measured, and its limits:

- Reference: RK4 in 800 steps. The trapezoid rule over exact traces (256 products each) at every tenth node, plus what
  all 801 nodes change, found with two held probes: exact traces at all of them would cost hours, and the change hardly
  depends on the probe. `reference.error` is how much it does.
- Error: over `--distinct` data, with `--draws` probe draws each (one draw for 16 probes). Bias is the mean error, with
  its standard error; the probe standard error is the spread between draws (nan with one), or the method's own estimate.
- Seconds: of `--samples` log-densities: the median of three evaluations of velocity and divergence after a warm-up,
  times the number of evaluations. Fixed-step solvers do nothing else.
- The replaced approach: Euler, one Gaussian probe, (v(x + h z) - v(x)) . z / h at h = 1e-3; also with 4 and 16 probes
  averaged, so that the curves can be compared at any time.
- Equal time: our fp32 error frontier, interpolated log-log at the baseline's seconds; see `at_equal_time`.
- Memory: the peak resident set of a fresh process, so that nothing else has raised it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import optional_figure

COLOURS = {"replaced fp32": "#D55E00", "replaced bf16": "#CC79A7", "euler": "#0072B2", "heun": "#009E73", "rk4": "#000"}


def write_table(results: dict[str, Any], path: Path) -> None:
    """The rows, and below them the three comparisons."""
    lines = [
        "| method | weights | probes | bias, nats | probe standard error | RMSE, nats | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results["rows"]:
        bias = f"{r['bias_nats']:.2f} ± {r['bias_standard_error']:.2f}"
        numbers = f"{r['probe_standard_error']:.2f} | {r['rmse_nats']:.2f} | {r['seconds']:.2f}"
        lines.append(f"| {r['method']} | {r['dtype']} | {r['probes']} | {bias} | {numbers} |")
    ref, memory = results["reference"], results["peak_memory_mib"]
    lines += [
        "",
        f"{results['distinct']} data with {results['draws']} probe draws each (one with 16 probes); seconds are for "
        f"{results['samples']} samples on {results['threads']} thread(s). Reference: exact traces at {ref['nodes']} "
        f"nodes, refined {ref['refinement']} times; its error {ref['error']:.2f} nats; mean log p_0 {ref['mean']:.2f}.",
        "",
        *(
            f"- at the seconds of the replaced approach with {c['probes']} probe(s): our fp32 frontier has "
            f"{c['ratio']:.2f} of its RMSE (at {c['time_ratio']:.2f} of its time)"
            for c in results["equal_time"]
        ),
        *(
            f"- bf16 against fp32, {c['method']}, {c['probes']} probe(s): mean {c['mean_difference_nats']:+.2f} nats "
            f"({c['relative_to_mean_log_prob']:.2%} of the mean log p_0), per sample {c['rms_difference_nats']:.2f} "
            f"nats ({c['rms_relative_to_rms_log_prob']:.2%} of the RMS log p_0)"
            for c in results["bf16"]
        ),
        *(f"- peak memory, {steps} steps: {mib:.0f} MiB" for steps, mib in memory.items()),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw(results: dict[str, Any], path: Path) -> None:
    """RMSE against seconds; one line per family, over 1, 4 and 16 probes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, colour in COLOURS.items():
        solver, _, dtype = label.partition(" ")
        rows = [r for r in results["rows"] if r["solver"] == solver and r["dtype"] == (dtype or "fp32")]
        rows = [r for r in rows if not r["second_order"] and r["steps"] == results["steps"]]
        name = f"replaced: forward difference, Gaussian, {dtype}" if dtype else f"{solver}, Rademacher by VJP, fp32"
        style: dict[str, Any] = {
            "color": colour,
            "marker": "s" if dtype else "o",
            "linestyle": "--" if dtype else "-",
            "label": name,
        }
        axes.plot([r["seconds"] for r in rows], [r["rmse_nats"] for r in rows], **style)
        for r in rows:
            at = (r["seconds"], r["rmse_nats"])
            axes.annotate(str(r["probes"]), at, (4, 4), textcoords="offset points", fontsize=8, color=colour)
    axes.set(xscale="log", yscale="log", xlabel=f"seconds for {results['samples']} samples")
    axes.set_ylabel("root-mean-square error of log p₀, nats")
    axes.set_title(f"Tiny SD3, {results['steps']} steps; the numbers are probes", fontsize=10)
    axes.grid(which="both", alpha=0.2)
    figure.legend(loc="outside lower center", fontsize=8, ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 0, or 2 after one sentence about bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="logs/bench/entropy", help="folder to write (default: %(default)s)")
    parser.add_argument("--model", default="assets/tiny_sd3")
    parser.add_argument("--prompts", default="assets/prompts/tiny/test.txt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=64, help="of the timings (default: %(default)s)")
    parser.add_argument("--distinct", type=int, default=64, help="data with an exact reference (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=2, help="probe draws for each (default: %(default)s)")
    parser.add_argument("--nodes", type=int, default=80, help="exact traces of the reference (default: %(default)s)")
    parser.add_argument("--refinement", type=int, default=10, help="of the nodes, by probes (default: %(default)s)")
    parser.add_argument("--memory-of", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    import torch

    from scripts.bench.entropy_measures import bench_all, run_for_memory
    from scripts.bench.entropy_methods import Bench

    torch.set_num_threads(args.threads)
    try:
        bench = Bench(Path(args.model), Path(args.prompts), args)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if args.memory_of:
        print(run_for_memory(bench))
        return 0
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = bench_all(bench)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_table(results, out / "table.md")
    with optional_figure(out / "error_vs_seconds.png"):
        draw(results, out / "error_vs_seconds.png")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them
    sys.exit(main())
