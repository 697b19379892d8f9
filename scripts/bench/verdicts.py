"""Do the intervals of a change cover, how often do equal models get a verdict, and how small a loss is shown?

    python scripts/bench/verdicts.py --out assets/figures/verdicts --real

It writes `results.json` and `table.md`. One core, about 20 minutes. What is measured:

- Images are points in 16 dimensions, made unit length: `balanced` four orthogonal modes, `unbalanced` three of 70, 20
  and 10 %, each with normal spread 0.1, or `diffuse`, one direction plus 0.4 N(0, 1) in each dimension. All come from
  a noise z ~ N(0, I); the checkpoint's image i comes from rho z_i + sqrt(1 - rho^2) e_i, so that rho says how alike
  the two images of a noise are, and 0 is what independent folders are.
- Changes: `equal` none; `partial` 30 % of the images of balanced modes, 50 % of unbalanced ones, move to the first
  mode, or diffuse images spread 0.3 instead of 0.4; `nearly all` 95 % move.
- Reward: a normal figure of the noise, or exp of it. Judge: right where a normal figure is below a quantile; `rare`
  98 % are right and rho is 0.95, so that hardly any image changes.
- The truth is 0 for equal models by construction, known for reward and judge, and the mean over 10,000 sets of images
  for Vendi and reach. Prompts share one law: intervals hold them fixed.
- Verdicts are those of `flow_grpo.page.verdicts`. On equal models `diversity` counts "less" and "more" alike, and the
  reward and the judge that `exploited` looks at are both correlated with each other at 0.5.
- Power: unbalanced and balanced modes, rho 0.5, of which a growing share moves to the first mode.
- --real: 96 images of each of 10 prompts, once, by `assets/tiny_sd3` in 10 steps, in the features of
  `assets/tiny_features`. Each repeat takes 32 of the 96 for each prompt, 16 for either model; `half the same`: in every
  second place both models have the same image. The models are equal, and the truth is 0.

Seeds are used for nothing else: what was chosen by coverage was chosen with others. A coverage of 95 % in 200 repeats
has a standard error of 1.5 %; reward and judge have ten times as many, and their rows share draws of the noise.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import norm

from flow_grpo.diversity.paired import (
    NEIGHBOURS,
    Change,
    change_of_means,
    change_of_reach,
    change_of_shares,
    change_of_vendi,
    reached,
)
from flow_grpo.diversity.vendi import vendi_of_spectra
from flow_grpo.files import strict_json, write_atomically
from flow_grpo.page.verdicts import diversity_verdict, exploitation_verdict

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from scripts.bench.verdict_situations import BALANCED, UNBALANCED, Row, Situation, given, modes, row, situations

if TYPE_CHECKING:
    from torch import Tensor

TRUTH_SETS, CHUNK = 10_000, 500
REAL_IMAGES, REAL_STEPS = 96, 10
CHEAP = 10  # times as many repeats for reward and judge, which take no time


# --- Vendi and reach ----------------------------------------------------------------------------------------


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Between rows of unit length: (sets, n, d) twice -> (sets, n, n)."""
    return np.stack([cdist(a, b) for a, b in zip(x, y, strict=True)])


def both(old: np.ndarray, new: np.ndarray, paired: bool) -> tuple[Change, Change]:
    """Changes of Vendi and reach of features (prompts, n, d)."""
    a, b, c = distances(old, old), distances(new, new), distances(old, new)
    return given(change_of_vendi(a, b, paired=paired)), given(change_of_reach(a, b, c, paired=paired))


def truths(situation: Situation) -> tuple[float, float]:
    """Expected differences of Vendi and reach."""
    if situation.name.endswith("equal"):
        return 0.0, 0.0
    rng, k = np.random.default_rng(99), min(NEIGHBOURS, situation.images // 3)
    vendi, reach = [], []
    for _ in range(TRUTH_SETS // CHUNK):
        old, new = situation.draw(CHUNK, rng)
        scores = [vendi_of_spectra(np.linalg.eigvalsh(x @ x.swapaxes(1, 2)), 1.0).mean() for x in (old, new)]
        a, b, c = distances(old, old), distances(new, new), distances(old, new)
        vendi.append(scores[1] - scores[0])
        reach.append(reached(c, b, k).mean() - reached(a, a, k).mean())
    return float(np.mean(vendi)), float(np.mean(reach))


def diversity_rows(situation: Situation, repeats: int) -> list[Row]:
    """Of Vendi and of reach."""
    rng, (vendi, reach) = np.random.default_rng(11), truths(situation)
    found = [both(*situation.draw(situation.prompts, rng), situation.paired) for _ in range(repeats)]
    changes = list(zip(*found, strict=True))
    return [row("Vendi", situation, vendi, changes[0]), row("reach", situation, reach, changes[1])]


# --- reward and judge ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """A reward and a judge: exp(skew of a normal) or a normal, and the share that is right, of the base and now."""

    name: str
    skewed: bool = False
    gain: float = 0.0
    right: tuple[float, float] = (0.8, 0.8)


FIGURES = (
    Figures("equal"),
    Figures("skewed reward, rare wrong, equal", skewed=True, right=(0.98, 0.98)),
    Figures("reward up, judge down", gain=0.5, right=(0.9, 0.7)),
    Figures("reward up, judge equal", gain=0.5),
    Figures("all right, then 95 %", right=(0.999, 0.95)),
)


def reward_and_judge(figures: Figures, situation: Situation, rng: np.random.Generator) -> tuple[Change, Change]:
    """Changes of one repeat."""
    sides = situation.noises(situation.prompts, rng, dims=2)
    groups = np.repeat(np.arange(situation.prompts), situation.images)
    rewards, rights = [], []
    for z, gain, right in zip(sides, (0.0, figures.gain), figures.right, strict=True):
        reward = 0.5 * z[..., 0] + math.sqrt(0.75) * z[..., 1]
        rewards.append((np.exp(reward) if figures.skewed else reward).ravel() + gain)
        rights.append((z[..., 0] < norm.ppf(right)).ravel())
    means = change_of_means(rewards[0], rewards[1], groups, situation.paired)
    return given(means), given(change_of_shares(rights[0], rights[1], situation.paired))


def reward_rows(figures: Figures, situation: Situation, repeats: int) -> tuple[list[Row], float]:
    """Of reward and judge, and the percentage of repeats with the verdict "exploited"."""
    rng = np.random.default_rng(12)
    found = [reward_and_judge(figures, situation, rng) for _ in range(repeats)]
    rewards, judges = zip(*found, strict=True)
    loss = figures.right[1] - figures.right[0]
    rows = [
        row("reward", situation, figures.gain, rewards, figures.name),
        row("judge", situation, loss, judges, figures.name),
    ]
    verdicts = [exploitation_verdict(reward, judge, True) == "exploited" for reward, judge in found]
    return rows, 100 * float(np.mean(verdicts))


# --- power --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Power:
    """How often a loss of so many different images is called one."""

    law: str
    images: int
    moved: float
    base: float  # mean Vendi of the base's images
    loss: float  # mean difference
    less: float  # % of repeats with the verdict
    reached: float  # mean change of the share that is reached


def power(law: str, shares: Sequence[float], images: int, moved: float, repeats: int) -> Power:
    """With 10 prompts and rho = 0.5."""
    rng, situation = np.random.default_rng(13), Situation("", images, 10, 0.5)
    old, new, found = modes(shares), modes(shares, moved), []
    for _ in range(repeats):
        a, b = situation.noises(situation.prompts, rng)
        found.append(both(old(a), new(b), True))
    vendi = [change for change, _ in found]
    return Power(
        law,
        images,
        moved,
        float(np.mean([change.old for change in vendi])),
        float(np.mean([change.difference for change in vendi])),
        100 * float(np.mean([diversity_verdict(change) == "less" for change in vendi])),
        float(np.mean([change.difference for _, change in found])),
    )


# --- real images --------------------------------------------------------------------------------------------


def real_features() -> np.ndarray:
    """(10, 96, d) unit features of the tiny model's images, of noises that are its own."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    from flow_grpo.diversity.features import load_extractor

    torch.set_num_threads(1)
    prompts = [line for line in Path("assets/prompts/tiny/eval_diversity.txt").read_text().splitlines() if line][:10]
    pipeline = StableDiffusion3Pipeline.from_pretrained("assets/tiny_sd3", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    encode, found = load_extractor(), []
    for number, prompt in enumerate(prompts):
        generators = [torch.Generator().manual_seed(1000 * number + image) for image in range(REAL_IMAGES)]
        images: Tensor = pipeline(
            [prompt] * REAL_IMAGES,
            num_inference_steps=REAL_STEPS,
            guidance_scale=1.0,
            generator=generators,
            output_type="pt",
            height=32,
            width=32,
        ).images
        found.append(encode(images.float().clamp(0, 1)).astype(np.float64))
    return np.stack(found)


def real_rows(features: np.ndarray, repeats: int) -> list[Row]:
    """Two equal models, of images drawn from these."""
    rows = []
    for name, same, paired in (
        ("tiny model", False, True),
        ("tiny model, half the same", True, True),
        ("tiny model", False, False),
    ):
        rng, found = np.random.default_rng(14), []
        for _ in range(repeats):
            chosen = np.argsort(rng.random(features.shape[:2]), axis=1)[:, :32, None]
            old, new = np.split(np.take_along_axis(features, chosen, axis=1), 2, axis=1)
            if same:
                new[:, ::2] = old[:, ::2]
            found.append(both(old, new, paired))
        situation = Situation(name, 16, len(features), 0.5 if same else 0.0, paired)
        vendi, reach = zip(*found, strict=True)
        rows += [row("Vendi", situation, 0.0, vendi), row("reach", situation, 0.0, reach)]
    return rows


# --- the command --------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], exploited: Sequence[tuple[str, float, bool, float]], powers: Sequence[Power]) -> str:
    """As Markdown."""
    lines = [
        "| figure | situation | n | prompts | rho | paired | truth | coverage % | less % | more % | +- | spread |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.figure} | {r.situation} | {r.images} | {r.prompts} | {r.rho:g} | {'yes' if r.paired else 'no'} | "
            f"{r.truth:.3f} | {r.coverage:.1f} | {r.less:.1f} | {r.more:.1f} | {r.half_width:.3f} | {r.spread:.3f} |"
        )
    lines += ["", "| reward and judge | rho | paired | exploited % |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {rho:g} | {'yes' if paired else 'no'} | {rate:.1f} |" for name, rho, paired, rate in exploited
    ]
    lines += ["", "| modes | n | moved | base | change | less % | change of reach |", "|---|---|---|---|---|---|---|"]
    for p in powers:
        lines.append(
            f"| {p.law} | {p.images} | {p.moved:g} | {p.base:.2f} | {p.loss:.2f} | {p.less:.1f} | {p.reached:.3f} |"
        )
    return "\n".join(
        [*lines, "", f"{rows[0].repeats} repeats, {rows[-1].repeats} of reward and judge; k = {NEIGHBOURS}.", ""]
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--real", action="store_true", help="also with images of the tiny model")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write both files, print the table."""
    args = parse(arguments)
    rows, exploited, powers = [], [], []
    if args.real:
        rows += real_rows(real_features(), args.repeats)
    for situation in situations():
        rows += diversity_rows(situation, args.repeats)
        print(*rows[-2:], sep="\n", file=sys.stderr, flush=True)
    for figures in FIGURES:
        for situation in (
            *(Situation("", 16, 10, rho) for rho in (0.0, 0.5, 0.95)),
            Situation("", 8, 10, 0.95),
            Situation("", 16, 10, 0.0, paired=False),
        ):
            found, rate = reward_rows(figures, situation, CHEAP * args.repeats)
            rows += found
            exploited.append((f"{figures.name}, n = {situation.images}", situation.rho, situation.paired, rate))
    for law, shares in (("balanced", BALANCED), ("unbalanced", UNBALANCED)):
        powers += [power(law, shares, n, moved, args.repeats) for n in (16, 8) for moved in (0.1, 0.2, 0.3, 0.5)]
    args.out.mkdir(parents=True, exist_ok=True)
    results = {
        "repeats": args.repeats,
        "rows": [asdict(r) for r in rows],
        "exploited": exploited,
        "power": [asdict(p) for p in powers],
    }
    text = table(rows, exploited, powers)
    write_atomically(args.out / "results.json", strict_json(results, indent=1) + "\n")
    write_atomically(args.out / "table.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
