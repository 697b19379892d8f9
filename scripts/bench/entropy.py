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
import copy
import json
import logging
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import optional_figure

if TYPE_CHECKING:
    from torch import Tensor

    from flow_grpo.diffusers_patch.velocity import VelocityFn
    from flow_grpo.entropy import ProbeGenerators
    from flow_grpo.types import PromptEmbeds

DIFFERENCE_STEP = 1e-3
REFERENCE_PROBES = 2
COLOURS = {"replaced fp32": "#D55E00", "replaced bf16": "#CC79A7", "euler": "#0072B2", "heun": "#009E73", "rk4": "#000"}


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    solver: str  # "replaced", or a solver of flow_grpo.entropy
    probes: int
    steps: int
    second_order: bool = False
    dtype: str = "fp32"

    @property
    def evaluations(self) -> int:
        """Of the velocity and its divergence."""
        return self.steps * {"replaced": 1, "euler": 1, "heun": 2, "rk4": 4}[self.solver]

    @property
    def name(self) -> str:
        """As the table has it."""
        solver = "forward difference, Gaussian, Euler" if self.solver == "replaced" else self.solver
        return f"{solver}{' + second order' if self.second_order else ''}, {self.steps} steps"


def methods(steps: int) -> list[Method]:
    """The rows: what is replaced, ours, ours at `steps` evaluations, ours in bfloat16."""
    rows = [Method("replaced", n, steps, dtype=dtype) for dtype in ("fp32", "bf16") for n in (1, 4, 16)]
    rows += [Method(solver, n, steps) for solver in ("euler", "heun", "rk4") for n in (1, 4, 16)]
    rows += [Method("heun", 1, max(steps // 2, 1)), Method("rk4", 1, max(steps // 4, 1))]
    rows += [Method("euler", 1, steps, second_order=True)]
    return rows + [Method("euler", n, steps, dtype="bf16") for n in (1, 4)] + [Method("heun", 1, steps, dtype="bf16")]


# --- the approach that is replaced ------------------------------------------------------------------------


def forward_difference(velocity: VelocityFn, x: Tensor, sigma: float, probes: Tensor) -> tuple[Tensor, Tensor]:
    """v and the mean over probes of z . (v(x + h z) - v(x)) / h: (B, ...), (B,)."""
    import torch

    v = velocity(x, sigma)
    traces = [(z * (velocity(x + DIFFERENCE_STEP * z, sigma) - v)).flatten(1).sum(1) / DIFFERENCE_STEP for z in probes]
    return v, torch.stack(traces).mean(0)


def replaced_log_density(
    velocity: VelocityFn, x_0: Tensor, sigmas: Tensor, generators: ProbeGenerators, num_probes: int = 1
) -> Tensor:
    """log p_0(x_0) by Euler and one-sided differences along rising sigmas: (B,) float64."""
    import torch

    from flow_grpo.entropy import LOG_2PI, DivergenceEstimator, draw_probes

    x, integral = x_0, torch.zeros(len(x_0), dtype=torch.float64)
    gaussian = DivergenceEstimator(num_probes=num_probes, distribution="gaussian")
    levels = sigmas.tolist()
    with torch.no_grad():
        for i, (sigma, after) in enumerate(pairwise(levels)):
            v, trace = forward_difference(velocity, x, sigma, draw_probes(x, gaussian, generators(i)))
            integral += (after - sigma) * trace.double()
            x = x + (after - sigma) * v
    return integral - 0.5 * (x.double().square().flatten(1).sum(1) + x[0].numel() * LOG_2PI)


# --- model, data and reference ----------------------------------------------------------------------------


class Bench:
    """The model in both precisions, the embedded prompts, and the data."""

    def __init__(self, model: Path, prompts: Path, args: argparse.Namespace) -> None:
        import torch

        from flow_grpo.prompts import PromptDataset
        from flow_grpo.types import PromptEmbeds
        from scripts.tiny.measure import load_pipeline

        if not (model / "model_index.json").is_file():
            raise ConfigError(f"--model: {model} holds no pipeline")
        pipeline = load_pipeline(model)
        texts = list(PromptDataset.load(str(prompts)).prompts)
        with torch.no_grad():
            embeds, _, pooled, _ = pipeline.encode_prompt(
                [*texts, ""], None, None, do_classifier_free_guidance=False, max_sequence_length=8
            )
        self.args, self.embeds, self.count = args, PromptEmbeds(embeds, pooled), len(texts)
        transformer = pipeline.transformer.requires_grad_(False).eval()
        self.transformers = {"fp32": transformer, "bf16": copy.deepcopy(transformer).bfloat16()}
        self.shape = (transformer.config.in_channels, *[transformer.config.sample_size] * 2)

    def velocity(self, ids: Sequence[int], dtype: str = "fp32") -> VelocityFn:
        """The guided velocity of the prompts of these samples, in turn."""
        import torch

        from flow_grpo.diffusers_patch.velocity import guided_velocity
        from flow_grpo.models.sd3 import SD3
        from flow_grpo.types import PromptEmbeds

        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        typed = PromptEmbeds(self.embeds.prompt_embeds.to(kind), self.embeds.pooled_prompt_embeds.to(kind))
        embeds: PromptEmbeds = typed[[i % self.count for i in ids]]
        negative = typed[[self.count] * len(ids)]
        network = partial(SD3.velocity, self.transformers[dtype])
        return lambda x, sigma: guided_velocity(network, x, sigma, embeds, negative, self.args.guidance)

    def data(self, count: int) -> Tensor:
        """x_0 of keyed noise, by RK4: (count, C, h, w)."""
        import torch

        from flow_grpo.randomness import keyed_generator

        noise = [torch.randn(self.shape, generator=keyed_generator(self.args.seed, "x_1", i)) for i in range(count)]
        return follow(self.velocity(range(count)), torch.stack(noise), 1.0, 0.0, 1 / self.args.steps)

    def probe_generators(self, ids: Sequence[int]) -> ProbeGenerators:
        """Keyed by (seed, evaluation, row, sample): rows that repeat a sample have their own probes."""
        from flow_grpo.randomness import keyed_generator

        seed = self.args.seed
        return lambda evaluation: [keyed_generator(seed, "probe", evaluation, row, i) for row, i in enumerate(ids)]


def follow(velocity: VelocityFn, x: Tensor, start: float, end: float, step: float) -> Tensor:
    """x at `end`, by RK4 in steps no longer than `step`."""
    import torch

    count = max(1, math.ceil(abs(end - start) / step - 1e-9))
    h = (end - start) / count
    with torch.no_grad():
        for i in range(count):
            sigma = start + i * h
            a = velocity(x, sigma)
            b = velocity(x + h / 2 * a, sigma + h / 2)
            c = velocity(x + h / 2 * b, sigma + h / 2)
            d = velocity(x + h * c, max(sigma + h, 0.0))
            x = x + h / 6 * (a + 2 * b + 2 * c + d)
    return x


def reference(velocity: VelocityFn, x_0: Tensor, nodes: int, refinement: int, probes: Tensor) -> tuple[Tensor, float]:
    """log p_0(x_0) and the root-mean-square error of it that the probes leave, in nats.

    RK4 follows the path, a step for each of `nodes * refinement` equal intervals. The trapezoid rule takes exact traces
    at every `refinement`-th level; the probes, held along the path, say what all the levels change.

    Args:
        probes: (n >= 2, B, ...).
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    from flow_grpo.entropy import LOG_2PI, DivergenceEstimator, divergence

    levels, x, exact, held = np.linspace(0, 1, nodes * refinement + 1), x_0, [], []
    held_estimator, exact_estimator = DivergenceEstimator(num_probes=len(probes)), DivergenceEstimator(exact=True)
    for i, level in enumerate(tqdm(levels, desc="reference", leave=False)):
        if i:
            x = follow(velocity, x, levels[i - 1], level, 1.0)
        held.append(divergence(velocity, x, float(level), held_estimator, probes).per_probe.numpy())
        if i % refinement == 0:
            exact.append(divergence(velocity, x, float(level), exact_estimator).mean.numpy())
    coarse = np.trapezoid(exact, levels[::refinement], axis=0)  # (B,)
    change = np.trapezoid(held, levels, axis=0) - np.trapezoid(
        held[::refinement], levels[::refinement], axis=0
    )  # (n, B)
    error = math.sqrt(change.var(0, ddof=1).mean() / len(probes))
    log_prior = -0.5 * (x.double().square().flatten(1).sum(1) + x[0].numel() * LOG_2PI)
    return log_prior + torch.from_numpy(coarse + change.mean(0)), error


# --- measurements ------------------------------------------------------------------------------------------


def log_densities(bench: Bench, method: Method, x_0: Tensor, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """log p_0 and the method's own probe variance (nan where it has none): (B,), (B,)."""
    import torch

    from flow_grpo.entropy import DivergenceEstimator, ode_log_density

    velocity, generators = bench.velocity(ids, method.dtype), bench.probe_generators(ids)
    sigmas = torch.linspace(0, 1, method.steps + 1)
    if method.solver == "replaced":
        found = replaced_log_density(velocity, x_0, sigmas, generators, method.probes)
        return found, torch.full_like(found, torch.nan)
    density = ode_log_density(
        velocity, x_0, sigmas, DivergenceEstimator(num_probes=method.probes), generators,
        solver=method.solver, second_order=method.second_order,
    )  # fmt: skip
    return density.log_prob, density.probe_variance


def seconds_per_evaluation(bench: Bench, method: Method) -> float:
    """Median of three evaluations of v and div v on `--samples` latents, after a warm-up."""
    import torch

    from flow_grpo.entropy import DivergenceEstimator, divergence, draw_probes

    ids = range(bench.args.samples)
    x, velocity = torch.randn(len(ids), *bench.shape), bench.velocity(ids, method.dtype)
    kind = "gaussian" if method.solver == "replaced" else "rademacher"
    estimator, seconds = DivergenceEstimator(num_probes=method.probes, distribution=kind), []
    for i in range(4):
        start = time.perf_counter()
        probes = draw_probes(x, estimator, bench.probe_generators(ids)(i))
        if method.solver == "replaced":
            with torch.no_grad():
                forward_difference(velocity, x, 0.5, probes)
        else:
            divergence(velocity, x, 0.5, estimator, probes, squared=method.second_order)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[1]


def measure(bench: Bench, method: Method, x_0: Tensor, exact: Tensor) -> tuple[dict[str, Any], Tensor]:
    """One row, and its log-densities (draws, distinct)."""
    draws = bench.args.draws if method.probes < 16 else 1
    ids = list(range(len(x_0))) * draws
    found, variance = log_densities(bench, method, x_0.repeat(draws, 1, 1, 1), ids)
    errors = found.view(draws, -1) - exact
    between = errors.var(0).mean().item() if draws > 1 else variance.mean().item()
    row = {
        "method": method.name,
        "solver": method.solver,
        "second_order": method.second_order,
        "dtype": method.dtype,
        "steps": method.steps,
        "probes": method.probes,
        "bias_nats": errors.mean().item(),
        "bias_standard_error": (errors.mean(0).std() / math.sqrt(len(x_0))).item(),
        "probe_standard_error": math.sqrt(between),
        "rmse_nats": errors.square().mean().sqrt().item(),
    }
    return row, found


def against_fp32(rows: list[dict[str, Any]], found: list[Tensor], exact: Tensor, dims: int) -> list[dict[str, Any]]:
    """How far bfloat16 is from fp32 with the same probes: of the mean log p_0, and per sample in nats."""
    by_key = {(r["solver"], r["probes"], r["steps"], r["second_order"], r["dtype"]): i for i, r in enumerate(rows)}
    comparisons = []
    for (*key, dtype), i in by_key.items():
        if dtype != "bf16" or key[0] == "replaced":
            continue
        full = found[by_key[(*key, "fp32")]]
        difference = found[i] - full
        comparisons.append(
            {
                "method": rows[i]["method"],
                "probes": rows[i]["probes"],
                "rms_difference_nats": difference.square().mean().sqrt().item(),
                "mean_difference_nats": difference.mean().item(),
                "relative_to_mean_log_prob": abs(difference.mean() / full.mean()).item(),
                "rms_relative_to_rms_log_prob": (difference.square().mean() / exact.square().mean()).sqrt().item(),
                "rms_nats_per_dim": difference.square().mean().sqrt().item() / dims,
            }
        )
    return comparisons


def at_equal_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """RMSE of our fp32 frontier, at each fp32 baseline's seconds, as a share of the baseline's.

    The frontier is the methods that no faster one beats; between two of them log RMSE is interpolated linearly in log
    seconds. A baseline faster than all of them meets the fastest, and `time_ratio` then says how much longer it takes.
    """
    import numpy as np

    ours = [r for r in rows if r["dtype"] == "fp32" and r["solver"] != "replaced"]
    frontier: list[tuple[float, float]] = []
    for seconds, rmse in sorted((r["seconds"], r["rmse_nats"]) for r in ours):
        if not frontier or rmse < frontier[-1][1]:
            frontier.append((seconds, rmse))
    times, errors = np.log(np.array(frontier)).T
    comparisons = []
    for base in (r for r in rows if r["dtype"] == "fp32" and r["solver"] == "replaced"):
        at = math.log(base["seconds"])
        ratio = math.exp(np.interp(at, times, errors)) / base["rmse_nats"]
        time_ratio = max(1.0, math.exp(times[0] - at))
        comparisons.append(
            {"probes": base["probes"], "seconds": base["seconds"], "ratio": ratio, "time_ratio": time_ratio}
        )
    return comparisons


def peak_memory(args: argparse.Namespace, steps: int) -> float:
    """Peak resident MiB of a fresh process that runs Euler with one probe in so many steps."""
    options = [
        f"--{key}={getattr(args, key)}" for key in ("model", "prompts", "seed", "threads", "samples", "guidance")
    ]
    command = [sys.executable, __file__, *options, f"--memory-of={steps}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def run_for_memory(bench: Bench) -> float:
    """Run once; the peak resident set of this process in MiB (Linux counts KiB)."""
    import torch

    ids = range(bench.args.samples)
    log_densities(bench, Method("euler", 1, bench.args.memory_of), torch.zeros(len(ids), *bench.shape), ids)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- output ------------------------------------------------------------------------------------------------


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


def bench_all(bench: Bench) -> dict[str, Any]:
    """All figures."""
    import torch
    from tqdm import tqdm

    from flow_grpo.entropy import DivergenceEstimator, draw_probes

    args = bench.args
    memory = {str(steps): peak_memory(args, steps) for steps in (10, 80)}
    rows, found = [], []
    seconds = [seconds_per_evaluation(bench, method) for method in tqdm(methods(args.steps), desc="seconds")]
    x_0, ids = bench.data(args.distinct), range(args.distinct)
    probes = draw_probes(x_0, DivergenceEstimator(num_probes=REFERENCE_PROBES), bench.probe_generators(ids)(0))
    exact, error = reference(bench.velocity(ids), x_0, args.nodes, args.refinement, probes)
    for method, cost in zip(tqdm(methods(args.steps), desc="errors"), seconds, strict=True):
        row, values = measure(bench, method, x_0, exact)
        row["seconds"] = cost * method.evaluations
        rows.append(row)
        found.append(values)
        logging.info("%s", row)
    named = ("seed", "threads", "samples", "distinct", "draws", "steps", "guidance")
    return {
        **{key: getattr(args, key) for key in named},
        "machine": {"cpu": cpu_model(), "system": platform.system(), "torch": str(torch.__version__)},
        "reference": {
            "nodes": args.nodes,
            "refinement": args.refinement,
            "error": error,
            "mean": exact.mean().item(),
            "log_prob": exact.tolist(),
        },
        "rows": rows,
        "equal_time": at_equal_time(rows),
        "bf16": against_fp32(rows, found, exact, x_0[0].numel()),
        "peak_memory_mib": memory,
    }


def cpu_model() -> str:
    """The processor's name, as Linux or else Python knows it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


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
