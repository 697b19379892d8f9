"""Put a demo into the repository: its picture and numbers in assets/figures/demo/, its part of README.md.

    python scripts/study/publish.py logs/demo

The picture has the base model and two checkpoints of DRTune on the same prompts and noises, with three numbers under
each. tests/scripts/study/test_publish.py checks that the README says what assets/figures/demo/summary.json says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_grpo.commands.cli import one_sentence_errors
from flow_grpo.errors import ConfigError
from flow_grpo.files import read_text, strict_json, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flow_grpo.page.data import Evaluation, PageRun

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from scripts.study.paths import README, ROOT

FIGURES = ROOT / "assets/figures/demo"
PICTURE, SUMMARY, TEMPLATE = "picture.png", "summary.json", "demo.md.j2"
BEGIN, END = "<!-- demo -->", "<!-- /demo -->"
BEST = "DRTune, best by the judge"
PROMPTS, NOISES = ("a sneaker", "a bag", "a dress", "a shirt"), 8  # rows and columns of the picture


def summarise(drtune: PageRun, grpo: PageRun) -> dict[str, Any]:
    """What the README's table has: base, DRTune at GRPO's final reward, its best by the judge, both at their ends."""
    from flow_grpo.commands.demo import reached

    if cut := [run.name for run in (drtune, grpo) if run.epoch < run.config["num_epochs"]]:
        raise ConfigError(f"the run {cut[0]} was cut by the clock: such a demo is not published.")
    rows = [("base model", drtune.evaluations[0]), ("GRPO", grpo.last)]
    early = reached(drtune, grpo.last.figures["reward"])
    if early is not None:
        rows.append(("DRTune at GRPO's reward", early))
    rows += [(BEST, best(drtune)), ("DRTune", drtune.last)]
    return {
        "images": drtune.config["num_seeds"],
        "seed": drtune.config["seed"],
        "rates": {name: run.config["train.learning_rate"] for name, run in (("DRTune", drtune), ("GRPO", grpo))},
        "device": drtune.environment["device"],
        "threads": drtune.environment["threads"],
        "rows": [_row(name, evaluation) for name, evaluation in rows],
    }


def best(run: PageRun) -> Evaluation:
    """The evaluation whose checkpoint the run calls its best: by the judge."""
    if run.best is None:
        raise ConfigError(f"the run {run.name} was not judged: it is not that of a demo.")
    return run.evaluations[run.best]


def _row(name: str, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "name": name,
        "epoch": evaluation.epoch,
        "seconds": evaluation.seconds,
        "network_evaluations": evaluation.network_evaluations,
        "figures": dict(evaluation.figures),
        "changes": {figure: asdict(change) for figure, change in evaluation.changes.items()},
    }


def section(summary: Mapping[str, Any]) -> str:
    """The README's part, markers included."""
    from scripts.study.words import environment

    picture = (FIGURES / PICTURE).relative_to(ROOT).as_posix()
    text = environment().get_template(TEMPLATE).render(**summary, cell=cell, picture=picture)
    return f"{BEGIN}\n{text.strip()}\n{END}"


def cell(row: Mapping[str, Any], figure: str, scale: float, places: int) -> str:
    """A figure, with the interval of its paired difference to the base."""
    if figure not in row["figures"]:
        return "not measured"
    value = f"{row['figures'][figure] * scale:.{places}f}"
    change = row["changes"].get(figure)
    if change is None:
        return value
    return f"{value} ({change['low'] * scale:+.{places}f} to {change['high'] * scale:+.{places}f})"


def draw(run: PageRun, shown: Sequence[Evaluation]) -> Figure:
    """The same prompts and noises by every model, side by side."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.3 * len(shown), 2.75), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, gridspec_kw={"wspace": 0.06})[0]
    for axes, evaluation in zip(panels, shown, strict=True):
        tiles = _tiles(evaluation)
        rows = [np.concatenate([tiles[prompt, noise] for noise in range(NOISES)], axis=1) for prompt in PROMPTS]
        axes.imshow(np.concatenate(rows), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        figures, count = evaluation.figures, run.config["num_seeds"]
        numbers = (
            f"reward {figures['reward']:.3f}   {figures['vendi']:.1f} different of {count}   "
            f"judge {figures['judge']:.0%}"
        )
        axes.set_title(evaluation.name, fontsize=11)
        axes.set_xlabel(numbers, fontsize=10)
    return figure


def _tiles(evaluation: Evaluation) -> dict[tuple[str, int], Any]:
    """(prompt, noise) -> (h, w, 3) uint8, from the record's sprite."""
    from flow_grpo.diversity.images import read_rgb

    record = evaluation.record
    if record is None or record.sprite is None or record.sprite_path is None:
        raise ConfigError(f"{evaluation.name} of the demo has no record of its images.")
    (width, height), columns = record.sprite.cell, record.sprite.columns
    sheet, found = read_rgb(record.sprite_path), {}
    for place, image in enumerate(record.sprite.images):
        top, left = place // columns * height, place % columns * width
        key = (record.prompts[record.prompt[image]], record.noise[image])
        found[key] = sheet[top : top + height, left : left + width]
    return found


def publish(demo: Path) -> None:
    """Write the picture, the summary and the README's part; ConfigError if the folder is not that of a whole demo."""
    from flow_grpo.commands.demo import DEMOS
    from flow_grpo.page.data import read_run

    drtune, grpo = (read_run(demo / method.run_name, method.label) for method in DEMOS["tiny"].methods)
    summary = summarise(drtune, grpo)
    picture = draw(drtune, [drtune.evaluations[0], best(drtune), drtune.last])
    FIGURES.mkdir(parents=True, exist_ok=True)
    picture.savefig(FIGURES / PICTURE, dpi=110)
    write_atomically(FIGURES / SUMMARY, strict_json(summary, indent=1) + "\n")
    before, rest = read_text(README).split(BEGIN)
    write_atomically(README, before + section(summary) + rest.split(END)[1])


def main() -> None:
    """Exit code 2 after one sentence about bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="the folder of a demo")
    arguments = parser.parse_args()
    with one_sentence_errors():
        publish(arguments.demo)


if __name__ == "__main__":
    main()
