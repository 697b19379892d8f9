"""The exact curve of a recipe's base model and reward: how much diversity the reward itself costs.

    python scripts/study/curve.py RECIPE [KEY=VALUE ...] [--images 1000] [--quick] [--out logs/curve]

Of all laws with the reward's mean, p_base exp(lambda R) is the nearest to the base model. It is read off the base
model's own images: base_images.py draws and keeps them in OUT/RECIPE, and goes on where it was cut short; exact_law.py
says what is computed. For a reward of 0 or 1 the end of the curve is exact: the base's right images.

It writes OUT/RECIPE/curve.json, which later figures read, and curve.png, and prints the curve. `--quick`: 200 images of
a prompt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from flow_grpo.commands.cli import configure, create_folder, one_sentence_errors

if TYPE_CHECKING:
    from scripts.study.base_images import BaseImages
    from scripts.study.exact_law import LawPoint

IMAGES, QUICK_IMAGES = 1000, 200
COLUMNS = ("reward", "judge", "kl", "vendi", "rke", "modes")
DRAWN = {"vendi": "Vendi score", "rke": "RKE", "modes": "entropy of modes"}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="whose model, reward, prompts and evaluation are taken")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="settings that are not the recipe's")
    parser.add_argument("--images", type=int, default=0, help=f"of each prompt (default: {IMAGES})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_IMAGES} images of each prompt")
    parser.add_argument("--out", type=Path, default=Path("logs/curve"), help="folder (default: logs/curve)")
    args = parser.parse_args(arguments)
    args.images = args.images or (QUICK_IMAGES if args.quick else IMAGES)
    if args.images < 100:
        parser.error(f"--images {args.images} is not allowed; it takes at least 100")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what is missing, compute, write; 0. A mistake ends the process with 2, and a sentence."""
    args = parse(arguments)
    with one_sentence_errors():
        from flow_grpo.files import read_object
        from flow_grpo.recipes.registry import get_config
        from flow_grpo.rewards.chosen import reward_weights
        from scripts.study.base_images import QUESTION, base_images, features_name

        config = configure(args.recipe, [f"--config.{change}" for change in args.changes], False, get_config)
        folder = args.out.resolve() / args.recipe
        create_folder(folder)
        images = base_images(config, args.images, folder)
        found = results(images) | {"rewards": reward_weights(config), "features": features_name(config)}
        found["drawing"] = read_object(folder / QUESTION)["drawing"]
    from flow_grpo.figure_text import optional_figure
    from flow_grpo.files import strict_json, write_atomically

    write_atomically(folder / "curve.json", strict_json(found, indent=1) + "\n")
    with optional_figure(folder / "curve.png"):
        draw(found["points"], folder / "curve.png")
    print(table(found))
    print(f"written to {folder / 'curve.json'}")
    return 0


def results(images: BaseImages) -> dict[str, Any]:
    """The curve as plain data, and which prompts it is of."""
    from scripts.study import exact_law

    kept = exact_law.can_be_right(images)
    chosen = images.of(kept)
    figures, places = exact_law.set_figures(chosen), np.arange(exact_law.SET_SIZE)[None]
    first = {
        name: [float(figure(prompt, places)[0]) for prompt in range(len(chosen.prompts))]
        for name, figure in figures.items()
    }
    points = exact_law.curve(chosen, exact_law.strengths_of(chosen.reward))
    return {
        "images": images.reward.shape[1],
        "set_size": exact_law.SET_SIZE,
        "prompts": list(chosen.prompts),
        "left_out": [prompt for prompt, use in zip(images.prompts, kept, strict=True) if not use],
        "base": {"reward": float(images.reward.mean()), "judge": float(images.right.mean())},
        "bandwidth": exact_law.bandwidth_of(chosen),
        "best": float(chosen.reward.max(1).mean()),
        "first": {"reward": chosen.reward[:, : exact_law.SET_SIZE].mean(1).tolist(), **first},
        "points": [_plain(point) for point in points],
    }


def _plain(point: LawPoint) -> dict[str, Any]:
    figures = {
        name: {
            "estimate": figure.estimate,
            "images": [figure.images.low, figure.images.high],
            "prompts": [figure.prompts.low, figure.prompts.high],
        }
        for name, figure in point.figures.items()
    }
    return {"strength": str(point.strength), "effective": point.effective, "figures": figures}


def table(found: Mapping[str, Any]) -> str:
    """The curve, a line for each strength: estimates, with half their interval over the base images."""
    columns = [name for name in COLUMNS if name in found["points"][0]["figures"]]
    lines = ["  ".join([f"{'lambda':>8}", *(f"{name:>16}" for name in columns), f"{'effective':>9}"])]
    for point in found["points"]:
        cells = []
        for name in columns:
            figure = point["figures"][name]
            half = (figure["images"][1] - figure["images"][0]) / 2
            cells.append(f"{figure['estimate']:9.4f} ±{half:.4f}")
        lines.append(
            "  ".join([f"{float(point['strength']):8.3g}", *(f"{c:>16}" for c in cells), f"{point['effective']:9.0f}"])
        )
    return "\n".join(lines)


def draw(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Each diversity against the mean reward, as a share of the base's, with its interval over the base images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    reward = [point["figures"]["reward"]["estimate"] for point in points]
    for name, title in DRAWN.items():
        if name in points[0]["figures"]:
            found = [point["figures"][name] for point in points]
            base = found[0]["estimate"]
            (line,) = axes.plot(reward, [100 * f["estimate"] / base for f in found], marker="o", ms=4, label=title)
            low, high = zip(*[[100 * end / base for end in f["images"]] for f in found], strict=True)
            axes.fill_between(reward, low, high, color=line.get_color(), alpha=0.2, lw=0)
    axes.set_xlabel("mean reward")
    axes.set_ylabel("% of the base model's")
    axes.set_title("What the reward itself costs: the law nearest to the base model, at each mean reward")
    axes.legend()
    figure.savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    raise SystemExit(main())
