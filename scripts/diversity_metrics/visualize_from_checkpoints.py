"""A page that shows what training did: the base model and a run's checkpoints on the same prompts, noise and probes.

    python scripts/diversity_metrics/visualize_from_checkpoints.py --checkpoint_dir logs/RUN/checkpoints --visualize_all
    python scripts/diversity_metrics/visualize_from_checkpoints.py --checkpoint_dir logs/RUN/checkpoints \\
        --checkpoint_steps 100,200 --ema --num_prompts 4 --num_seeds 8

For each model, with one load of the base model: images, reward, what the judge recognises, Vendi, RKE, differential
entropy, the spread of the log-density, the film strip of the denoising, divergence and log-density at every step.
Samples are those of the run's evaluations: noise and probes are keyed, and the same for every model. The run's
config.json says everything; --num_prompts and --num_seeds only make it smaller. --reward says where the file of a
reward of the run's own has been moved to.

Written to --out (default: RUN/visualization, or RUN/visualization_ema), a folder as a run's:

    page.html      the page, which needs no other file
    evaluations/   a record of each model
    images/        film strips; curves along the path and against training
    results.json   every number

Metrics and figures go to the run's trackers under checkpoint/ or checkpoint_ema/. A run that never chose RKE's
bandwidth gets RUN/diversity/bandwidth.json. Nothing else of the run is written.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from flow_grpo.commands import cli
from flow_grpo.errors import ConfigError
from flow_grpo.page.build import build_page
from flow_grpo.rewards.own_files import read_option
from flow_grpo.rewards.registry import REWARDS
from flow_grpo.runs.config import read_config
from flow_grpo.runs.evaluations import records_of
from flow_grpo.runs.folder import CONFIG_FILE, EVALUATIONS, PAGE_FILE
from flow_grpo.runs.saved import finished_checkpoints
from flow_grpo.training.weights import choose_models, output_folder
from flow_grpo.training.words import evaluation

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

COMMAND = ("python", "scripts/diversity_metrics/visualize_from_checkpoints.py")
RESULTS = "results.json"
LEAST_SEEDS = 4  # an interval of Vendi and RKE needs so many images of a prompt


# --- what to show -------------------------------------------------------------------------------------------


def run_folder(given: str) -> Path:
    """The run whose checkpoints folder, or which itself, is given; ConfigError if it is neither."""
    folder = Path(given)
    run = folder.resolve().parent if folder.resolve().name == "checkpoints" else folder
    if not (run / CONFIG_FILE).is_file():
        raise ConfigError(f"--checkpoint_dir {given} is neither the checkpoints folder of a run nor a run folder.")
    return run


def chosen_checkpoints(args: argparse.Namespace, run: Path) -> str:
    """For `choose_models`: the base model and the checkpoints that the command line names.

    Raises:
        ConfigError: it names none, or some that are not there; or both ways of naming them.
    """
    found = finished_checkpoints(run / "checkpoints")
    everything = args.visualize_all.lower()
    if everything not in ("true", "false"):
        raise ConfigError(f"--visualize_all={args.visualize_all} is not allowed; it takes true or false.")
    if not found:
        raise ConfigError(f"--checkpoint_dir {args.checkpoint_dir} holds no checkpoint.")
    there = ", ".join(map(str, found))
    if (everything == "true") == bool(args.checkpoint_steps):
        raise ConfigError(f"Give either --visualize_all=True or --checkpoint_steps with some of {there}.")
    words = [word.strip() for word in args.checkpoint_steps.split(",")] if args.checkpoint_steps else []
    missing = [word for word in words if not word.isdecimal() or int(word) not in found]
    if missing:
        raise ConfigError(f"--checkpoint_steps: {run} has no checkpoint {missing[0]!r}; it has those of {there}.")
    return ",".join(["base", *(words or ["all"])])


def smaller(config: ConfigDict, num_prompts: int | None, num_seeds: int | None) -> dict[str, int]:
    """The keys that --num_prompts and --num_seeds change, each to no more than the run has."""
    from flow_grpo.prompts import PromptDataset

    changed = {}
    if num_seeds is not None:
        if not LEAST_SEEDS <= num_seeds <= config.num_seeds:
            raise ConfigError(f"--num_seeds {num_seeds} is not allowed; it takes {LEAST_SEEDS} to {config.num_seeds}.")
        changed["num_seeds"] = num_seeds
        for key in ("eval", "entropy"):
            changed[f"{key}.num_image_per_prompt"] = min(num_seeds, config[key].num_image_per_prompt)
    if num_prompts is not None:
        files = {"eval": config.prompts.test, "diversity": config.prompts.eval_diversity}
        present = {key: len(PromptDataset.load(path)) for key, path in files.items()}
        used = {key: config[key].num_prompts or count for key, count in present.items()}
        if not 1 <= num_prompts <= max(used.values()):
            raise ConfigError(f"--num_prompts {num_prompts} is not allowed; it takes 1 to {max(used.values())}.")
        changed |= {f"{key}.num_prompts": min(num_prompts, count) for key, count in used.items()}
        for key in ("entropy.num_prompts", "entropy.num_strip_prompts"):
            changed[key] = min(num_prompts, config.entropy[key.split(".")[1]])
    return changed


def place_reward(text: str, config: ConfigDict, run: Path) -> None:
    """Take what --reward says of where a reward of the run's own is now; ConfigError if it has none of that name."""
    asked = read_option(text, REWARDS)
    if not asked.place or asked.name not in config.reward_files:
        own = ", ".join(config.reward_files) or "none"
        raise ConfigError(f"--reward {text}: it says where a reward of {run}'s own is now; of its own it has {own}.")
    config.reward_files[asked.name] = asked.place


def results_folder(given: str, run: Path, label: str) -> Path:
    """Where the results go.

    Raises:
        ConfigError: it is a file, or holds what another command wrote.
    """
    out = output_folder(given or run / ("visualization_ema" if label == "eval_ema" else "visualization"))
    others = (out / CONFIG_FILE).exists() or ((out / EVALUATIONS).exists() and not (out / RESULTS).exists())
    if given and others:
        raise ConfigError(f"--out {given} holds evaluations of another command; it takes a folder of its own.")
    return out


def visualize(args: argparse.Namespace, command: str) -> None:
    """Refuse what cannot be; then measure, draw, and write it all."""
    run, label = run_folder(args.checkpoint_dir), "eval_ema" if args.ema else "eval"
    config = read_config(run, {"eval_diversity": True, "eval.curve": ""})
    for text in args.reward:
        place_reward(text, config, run)
    models = choose_models(run, chosen_checkpoints(args, run), config, args.ema)
    config.update_from_flattened_dict(smaller(config, args.num_prompts, args.num_seeds))
    out = results_folder(args.out, run, label)

    from scripts.diversity_metrics.checkpoint_measures import measure_checkpoints  # torch

    results = measure_checkpoints(models, config, run, out / RESULTS, label)
    page = build_page([out], out / PAGE_FILE, command, label=label, names=[results["run"]])
    print(*filter(None, map(evaluation, records_of(out, label))), sep="\n")
    for model in results["models"]:
        for part, why in model["failures"].items():
            print(f"{model['name']}: no {part}: {why}.")
    print(f"page: {page}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; dashes are taken for underscores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options: dict[str, dict[str, Any]] = {
        "checkpoint_dir": {"required": True, "help": "the checkpoints folder of a run, or the run folder"},
        "visualize_all": {"nargs": "?", "const": "true", "default": "false", "help": "true: every checkpoint"},
        "checkpoint_steps": {"default": "", "help": "instead: epochs that have a checkpoint, with commas between"},
        "num_prompts": {"type": int, "help": "use only the first so many prompts"},
        "num_seeds": {"type": int, "help": f"use at most so many images of a prompt, {LEAST_SEEDS} or more"},
        "out": {"default": "", "help": "folder of the results (default: RUN/visualization)"},
    }
    for name, option in options.items():
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **option)
    told = "where a reward of the run's own is now"
    parser.add_argument("--reward", action="append", default=[], metavar="NAME=FILE.py:THING", help=told)
    parser.add_argument("--ema", action="store_true", help="the averaged weights of the checkpoints")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Visualize; exit code 2 after one sentence about bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parse(given)
    with cli.one_sentence_errors():
        visualize(args, shlex.join([*COMMAND, *given]))


if __name__ == "__main__":
    main()
