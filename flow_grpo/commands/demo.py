"""Train an embedded model by two methods from the same start, and look at both on one page.

    fme demo [--out logs/demo] [--seed 42]     the tiny SD3, by DRTune and by GRPO: less than ten minutes
    fme demo scenes [...]                      scenes (docs/scenes.md), by DRTune and by DiffusionNFT: half an hour

Each run trains a fixed number of epochs; the times are those of both and their evaluations, on a free machine of two
cores. The base model is the evaluation before training. Settings are the recipes' own, except how often they evaluate
and save. Runs that are cut by --max-seconds are not compared.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import jinja2

from flow_grpo.commands.train import run_process, train_command
from flow_grpo.commands.view import view
from flow_grpo.crossing import first_at_least
from flow_grpo.errors import ConfigError
from flow_grpo.messages import say
from flow_grpo.page.data import Evaluation, PageRun, read_run
from flow_grpo.page.words import FIGURES, load
from flow_grpo.runs.folder import PAGE_FILE, fresh_folder

TEMPLATE = "demo.txt.j2"


@dataclass(frozen=True)
class Method:
    """One of the two runs."""

    label: str
    run_name: str
    recipe: str
    epochs: int
    eval_freq: int  # epochs; also of the checkpoints
    entropy_freq: int = 0  # epochs; a multiple of eval_freq; 0: never
    measured: str = ""  # a reward that is measured besides


@dataclass(frozen=True)
class Demo:
    """Two runs, and what they are compared by."""

    methods: tuple[Method, Method]
    level: str  # of FIGURES: when does the first have what the second has at its end?
    shown: tuple[str, ...]  # of FIGURES
    max_seconds: float  # several times what the slower run takes on a free machine


DEMOS = {
    "tiny": Demo(
        (
            Method("DRTune", "drtune", "tiny_drtune", epochs=360, eval_freq=30, entropy_freq=120),
            Method("GRPO", "grpo", "tiny_grpo", epochs=100, eval_freq=10, entropy_freq=50),
        ),
        level="reward",
        shown=FIGURES,
        max_seconds=600.0,
    ),
    "scenes": Demo(
        (
            Method("DRTune", "drtune", "scenes_drtune", epochs=120, eval_freq=20, measured="scenes"),
            Method("DiffusionNFT", "nft", "scenes_nft", epochs=60, eval_freq=10),
        ),
        level="judge",  # the two are given different rewards
        shown=tuple(figure for figure in FIGURES if figure != "reward"),
        max_seconds=3600.0,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("which", nargs="?", choices=DEMOS, default="tiny", metavar="|".join(DEMOS), help="of what")
    parser.add_argument("--out", type=Path, default=Path("logs/demo"), help="folder; logs/demo-2, ... if it exists")
    parser.add_argument("--seed", type=int, default=42, help="keys every random number (default: 42)")
    parser.add_argument("--epochs", type=int, default=0, help="at most so many of each run (default: all)")
    parser.add_argument(
        "--max-seconds", "--max_seconds", type=float, metavar="SECONDS",
        help="at most so much training of each run (default: 600; 3600 of scenes); cut runs are not compared",
    )  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    """Train both, print the outcome and where the page is; the exit code is that of the first run that fails."""
    demo = DEMOS[arguments.which]
    max_seconds = demo.max_seconds if arguments.max_seconds is None else arguments.max_seconds
    if not max_seconds > 0:
        raise ConfigError(f"--max-seconds {max_seconds:g} is not allowed; it takes a number above 0.")
    if arguments.epochs < 0 or arguments.seed < 0:
        raise ConfigError("--epochs and --seed take whole numbers of at least 0.")
    begin = time.monotonic()
    out = _fresh(arguments.out)
    for number, method in enumerate(demo.methods, start=1):
        epochs = min(method.epochs, arguments.epochs or method.epochs)
        print(f"[{number}/{len(demo.methods)}] {method.label}: {epochs} epochs", flush=True)
        changes = changed(method, out, epochs, arguments.seed, max_seconds)
        code = run_process(train_command(method.recipe, changes, method.run_name))
        if code != 0:
            return _give_up(method, code, out)
    page = view([out / method.run_name for method in demo.methods], out / PAGE_FILE)
    print(outcome(demo, out, (time.monotonic() - begin) / 60).rstrip())
    print(f"page: {page}")
    return 0


def _fresh(out: Path) -> Path:
    """The folder of both runs; ConfigError if it cannot be made."""
    try:
        return fresh_folder(out.expanduser().resolve())
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made ({error.strerror}).") from None


def changed(method: Method, out: Path, epochs: int, seed: int, max_seconds: float) -> list[str]:
    """The settings of one run that are not its recipe's, as KEY=VALUE."""
    settings = {
        "logdir": out,
        "seed": seed,
        "num_epochs": epochs,
        "max_seconds": float(max_seconds),
        "eval_freq": method.eval_freq,
        "eval.ema": "false",
        "save_freq": method.eval_freq,
        "num_checkpoint_limit": 0,
    }
    if method.entropy_freq:
        settings |= {"eval_ode_log_prob": "true", "eval_ode_log_prob_freq": method.entropy_freq}
    if method.measured:
        settings["eval.rewards"] = f'("{method.measured}",)'
    return [f"{key}={value}" for key, value in settings.items()]


def _give_up(method: Method, code: int, out: Path) -> int:
    """Say which run failed; leave no empty folder behind."""
    if not any(out.iterdir()):
        out.rmdir()
    if code > 128:  # by a signal, which that training has told
        say("the demo ends here, without the comparison of the two methods; `fme demo` begins another.")
    else:
        say(f"error: training with {method.label} ended with exit code {code}; its message is above.")
    return code


# --- the outcome ---------------------------------------------------------------------------------------


def outcome(demo: Demo, out: Path, minutes: float) -> str:
    """What the two runs have come to, in words; where one was cut, that alone."""
    first, second = demo.methods
    runs = {method.label: read_run(out / method.run_name, method.run_name) for method in demo.methods}
    target = runs[second.label]
    shown = {load()["base"]: target.evaluations[0]} | {label: run.last for label, run in runs.items()}
    environment = jinja2.Environment(  # plain text: nothing is escaped
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(TEMPLATE).render(
        cut={label: run for label, run in runs.items() if run.epoch < run.config["num_epochs"]},
        minutes=minutes,
        rows=[[label, *(_shown(evaluation, name) for name in demo.shown)] for label, evaluation in shown.items()],
        titles=[load()["figures"][name]["short"] for name in demo.shown],
        images=target.config["num_seeds"],
        rose=target.last.figures[demo.level] > target.evaluations[0].figures[demo.level],
        level=_shown(target.last, demo.level),
        what=demo.level,
        runs=runs,
        first=first.label,
        second=second.label,
        reached=reached(runs[first.label], target.last.figures[demo.level], demo.level),
    )


def reached(run: PageRun, level: float, figure: str = "reward") -> Evaluation | None:
    """The first evaluation of a run with at least this much of a figure; None: there is none."""
    place = first_at_least([e.figures.get(figure, math.nan) for e in run.evaluations], level)
    return None if place is None else run.evaluations[place]


def _shown(evaluation: Evaluation, name: str) -> str:
    """A figure as it is printed; empty where it is not known."""
    value = evaluation.figures.get(name)
    form = "{:.1%}" if load()["figures"][name]["unit"] == "share" else "{:.4f}" if name == "reward" else "{:.2f}"
    return "" if value is None else form.format(value)
