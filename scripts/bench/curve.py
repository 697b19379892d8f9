"""Does the exact curve agree with closed forms, and do its intervals cover?

    python scripts/bench/curve.py [--repeats 500] [--out assets/figures/curve]

The base laws are a Gaussian and a mixture of three in the plane, and the reward is linear, so that p_base exp(lambda R)
is known in closed form (tilt_problem.py). A reward of 0 or 1 is besides: whether a linear one is above its 70 %
quantile; its law is drawn by rejection. Each repeat draws `IMAGES` points for each of `PROMPTS` prompts from the base,
and the curve's figures at a strength are held against the truth: mean reward and KL by their closed forms (of 0 or 1,
by counting), Vendi score and RKE of 16 points by `SETS` sets drawn from the law itself. Features of a point (x, y) are
(cos x, sin x, cos y, sin y), made unit length.

It writes results.json and table.md. Half an hour on one core; a coverage of 95 % in 500 repeats has a standard error of
1.0 %.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tqdm import tqdm

from flow_grpo.diversity.vendi import vendi_of_spectra
from flow_grpo.files import strict_json, write_atomically
from flow_grpo.randomness import keyed_generator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from scripts.bench.tilt_problem import PROBLEMS, Problem
from scripts.study import exact_law
from scripts.study.base_images import BaseImages

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "curve.md.j2"
PROMPTS, IMAGES, REPEATS_OF_SETS = 4, 400, 60
SETS = 40_000  # from the law itself
STRENGTHS = (0.0, 0.5, 1.0)
QUANTILE = 0.7  # of the reward, above which one of 0 or 1 is 1
FIGURES = ("reward", "kl", "vendi", "rke")


@dataclass(frozen=True)
class Row:
    """One figure of one law."""

    law: str
    strength: float
    figure: str
    truth: float
    mean: float  # of the estimates
    error: float  # standard error of that mean
    covered: float  # share of the repeats whose interval holds the truth


def features_of(x: np.ndarray) -> np.ndarray:
    """(..., 2) -> (..., 4), of unit length."""
    return np.stack([np.cos(x[..., 0]), np.sin(x[..., 0]), np.cos(x[..., 1]), np.sin(x[..., 1])], -1) / math.sqrt(2)


def points(problem: Problem, strength: float, count: int, purpose: str, number: int = 0) -> np.ndarray:
    """(count, 2) from the law."""
    generator = keyed_generator(0, f"curve bench {problem.name} {strength:g} {purpose}", number)
    return problem.law(strength).sample(count, generator).numpy()


def base_images(problem: Problem, repeat: int, binary: bool) -> BaseImages:
    """What the curve is given."""
    x = points(problem, 0.0, PROMPTS * IMAGES, "base", repeat).reshape(PROMPTS, IMAGES, 2)
    reward = x @ problem.direction.numpy()
    if binary:
        reward = (reward > threshold(problem)).astype(float)
    return BaseImages(tuple(map(str, range(PROMPTS))), reward, reward > 0, features_of(x))


@cache
def threshold(problem: Problem) -> float:
    """The quantile of the reward that one of 0 or 1 is asked to exceed, of the base law."""
    return float(np.quantile(points(problem, 0.0, 1_000_000, "threshold") @ problem.direction.numpy(), QUANTILE))


def truth(problem: Problem, strength: float, binary: bool, bandwidth: float) -> dict[str, float]:
    """The figures of the law itself."""
    if binary:
        p = 1 - QUANTILE
        pi = 1.0 if math.isinf(strength) else p * math.exp(strength) / (1 - p + p * math.exp(strength))
        wrong = 0.0 if pi == 1 else (1 - pi) * math.log((1 - pi) / (1 - p))
        found = {"reward": pi, "kl": pi * math.log(pi / p) + wrong}
        x = _mixture(problem, pi, SETS * exact_law.SET_SIZE)
    else:
        reward = problem.reward_of(strength)
        log_partition = _log_partition(problem, strength)
        found = {"reward": reward, "kl": strength * reward - log_partition}
        x = points(problem, strength, SETS * exact_law.SET_SIZE, "truth")
    sets = features_of(x.reshape(SETS, exact_law.SET_SIZE, 2))
    kernels = sets @ sets.transpose(0, 2, 1)
    found["vendi"] = float(vendi_of_spectra(np.linalg.eigvalsh(kernels), 1.0).mean())
    squares = np.exp(-np.maximum(2 - 2 * kernels, 0) / bandwidth**2).sum((1, 2))
    return found | {"rke": float((exact_law.SET_SIZE**2 / squares).mean())}


def _mixture(problem: Problem, pi: float, count: int) -> np.ndarray:
    """Points of which a share pi is right, each kind as the base has them."""
    x, level = points(problem, 0.0, 8 * count, "mixture"), threshold(problem)
    right = x @ problem.direction.numpy() > level
    chosen = np.random.default_rng(0).random(count) < pi
    found = np.empty((count, 2))
    found[chosen], found[~chosen] = x[right][: chosen.sum()], x[~right][: (~chosen).sum()]
    return found


def _log_partition(problem: Problem, strength: float) -> float:
    """log E exp(lambda R) under the base, by integrating the mean reward over the strength (Gauss-Legendre)."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    at = strength * (nodes + 1) / 2
    return float(strength / 2 * sum(w * problem.reward_of(s) for s, w in zip(at, weights, strict=True)))


def rows_of(problem: Problem, binary: bool, strengths: Sequence[float], repeats: int) -> list[Row]:
    """Every figure at each strength."""
    kept: dict[tuple[float, str], list[tuple[float, bool]]] = {}
    bandwidth = exact_law.bandwidth_of(base_images(problem, -1, binary))
    known = {strength: truth(problem, strength, binary, bandwidth) for strength in strengths}
    name = f"{problem.name}, 0 or 1" if binary else problem.name
    for repeat in tqdm(range(repeats), desc=name):
        images = base_images(problem, repeat, binary)
        figures: Mapping[str, Callable[..., np.ndarray]] = exact_law.set_figures(images, bandwidth)
        for strength in strengths:
            found = exact_law.figures_at(images, strength, figures, repeat, REPEATS_OF_SETS)
            for figure in FIGURES:
                interval = found[figure].images
                right = known[strength][figure]
                kept.setdefault((strength, figure), []).append(
                    (interval.estimate, interval.holds(right) or interval.high - interval.low < 1e-12)
                )
    rows = []
    for (strength, figure), values in kept.items():
        estimates = np.array([value for value, _ in values])
        covered = float(np.mean([holds for _, holds in values]))
        error = float(estimates.std(ddof=1) / math.sqrt(repeats))
        rows.append(Row(name, strength, figure, known[strength][figure], float(estimates.mean()), error, covered))
    return rows


def table(rows: Sequence[Row], repeats: int) -> str:
    """The page's text."""
    environment = Environment(  # Markdown: nothing is escaped
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template(TEMPLATE).render(rows=rows, repeats=repeats, images=IMAGES, prompts=PROMPTS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write both files; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=500, help="default: 500")
    parser.add_argument("--out", type=Path, default=ROOT / "assets/figures/curve", help="folder of the results")
    args = parser.parse_args(arguments)
    if args.repeats < 2:
        parser.error(f"--repeats {args.repeats} is not allowed; it takes at least 2")
    rows = []
    for problem in PROBLEMS.values():
        rows += rows_of(problem, False, STRENGTHS, args.repeats)
        rows += rows_of(problem, True, (0.0, 1.0, math.inf), args.repeats)
    args.out.mkdir(parents=True, exist_ok=True)
    plain = [asdict(row) | {"strength": str(row.strength)} for row in rows]
    write_atomically(args.out / "results.json", strict_json({"repeats": args.repeats, "rows": plain}, indent=1) + "\n")
    write_atomically(args.out / "table.md", table(rows, args.repeats))
    print((args.out / "table.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
