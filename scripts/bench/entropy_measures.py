"""What scripts/bench/entropy.py measures of each method: errors, seconds, memory."""

from __future__ import annotations

import argparse
import logging
import math
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flow_grpo.entropy import DivergenceEstimator, divergence, draw_probes, ode_log_density
from scripts.bench.entropy_methods import Bench, Method, forward_difference, methods, reference, replaced_log_density
from scripts.bench.machine import cpu_model, peak_mib

REFERENCE_PROBES = 2


def log_densities(bench: Bench, method: Method, x_0: Tensor, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """log p_0 and the method's own probe variance (nan where it has none): (B,), (B,)."""
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
    command = [sys.executable, str(Path(__file__).with_name("entropy.py")), *options, f"--memory-of={steps}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def run_for_memory(bench: Bench) -> float:
    """Run once; the peak resident set of this process in MiB."""
    ids = range(bench.args.samples)
    log_densities(bench, Method("euler", 1, bench.args.memory_of), torch.zeros(len(ids), *bench.shape), ids)
    return peak_mib()


def bench_all(bench: Bench) -> dict[str, Any]:
    """All figures."""
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
