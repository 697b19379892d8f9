"""Entropy and log-densities of the base model and of a run's checkpoints, and the log-density of given images.

    python scripts/diversity_metrics/eval_ode_log_prob.py --run logs/RUN
    python scripts/diversity_metrics/eval_ode_log_prob.py --run logs/RUN --checkpoints base,10,20 --ema
    python scripts/diversity_metrics/eval_ode_log_prob.py --run logs/RUN --images DIR --prompt "a bag"

The density is that of VAE-scaled latents, given the prompt, under the guided ODE of the run's evaluation (config.eval)
and in as many steps; no density of pixels, no law of a stochastic sampler, and no probability. The run's config.json
says everything else; noise and probes are keyed, the same for every model, and for the run's own evaluations.

Intervals are Student's, at 95 %, with the degrees of freedom of the samples: n - 1 for one prompt, by Welch and
Satterthwaite for the mean over several.

Images are encoded to the mode of the VAE's posterior and carried from data to noise. Euler's steps are there not those
of the sampler turned round (and the first is at sigma = 0): give --num-steps or --solver to have both agree.

Written to --out (default: RUN/ode_log_prob, or RUN/ode_log_prob_ema; with --images the first of these, -2, -3, ... that
is not there): ode_log_prob.json and, if it can be drawn, ode_log_prob.png. The scalars go to the run's trackers under
checkpoint/ or checkpoint_ema/. Nothing else of the run is written. The last line says where.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flow_grpo.commands import cli
from flow_grpo.errors import ConfigError
from flow_grpo.figure_text import optional_figure
from flow_grpo.files import strict_json, write_atomically
from flow_grpo.models.pipeline_files import image_size
from flow_grpo.runs.config import read_config
from flow_grpo.runs.folder import fresh_folder
from flow_grpo.training.weights import choose_models

RESULTS, FIGURE = "ode_log_prob.json", "ode_log_prob.png"
OVERRIDES = {  # command-line option -> configuration key
    "num_probes": "entropy.num_probes",
    "num_image_per_prompt": "entropy.num_image_per_prompt",
    "num_prompts": "entropy.num_prompts",
    "solver": "entropy.solver",
    "num_steps": "eval.num_steps",
}


def create_folder(args: argparse.Namespace, run: Path) -> Path:
    """The folder of the results: --out, or one in the run's, a fresh one for given images.

    Raises:
        ConfigError: it cannot be a folder.
    """
    path = Path(args.out) if args.out else run / ("ode_log_prob_ema" if args.ema else "ode_log_prob")
    try:
        if args.images and not args.out:
            return fresh_folder(path)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be a folder: {error.strerror}.") from error
    return path


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write the files and the trackers; what ode_log_prob.json holds."""
    overrides = {key: getattr(args, name) for name, key in OVERRIDES.items() if getattr(args, name) is not None}
    if args.num_prompts is not None:
        overrides["eval.num_prompts"] = 0  # not only those that the training evaluated
    run = Path(args.run)
    config = read_config(run, overrides)
    if not args.images and (args.prompt or args.prompts):
        raise ConfigError("--prompt and --prompts say what --images shows; give --images too.")
    from scripts.diversity_metrics.given_images import pairing, read_images

    models = choose_models(run, args.checkpoints, config, args.ema)
    images = read_images(Path(args.images), args.prompt, args.prompts, image_size(config)) if args.images else []
    if args.prompts:
        print(pairing(images))
    out = create_folder(args, run)

    from flow_grpo.launch import launch
    from flow_grpo.policy import Policy
    from flow_grpo.runs.trackers import log_checkpoints
    from scripts.diversity_metrics.log_densities import evaluated_prompts, measure
    from scripts.diversity_metrics.log_densities_report import figure, logged, results, table

    settings, accelerator = launch(config)
    prompts = evaluated_prompts(config)
    if args.num_prompts is not None and len(prompts) < args.num_prompts:
        raise ConfigError(f"--num-prompts {args.num_prompts} is more than the {len(prompts)} of {config.prompts.test}.")
    measured = measure(Policy.load(settings, accelerator), models, prompts, images, args.ema)
    record = results(measured, settings.config, run, args.ema)
    write_atomically(out / RESULTS, strict_json(record, indent=1) + "\n")
    with optional_figure(out / FIGURE):
        figure(record).savefig(out / FIGURE, dpi=130)
    log_checkpoints(
        accelerator,
        config,
        run,
        "checkpoint_ema" if args.ema else "checkpoint",
        {model["step"]: logged(model) for model in record["models"]},
    )
    print(table(record), f"\n\nwritten to {out}", sep="")
    return record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="the folder of a run")
    parser.add_argument(
        "--checkpoints", default="base,all", help='"base", "all", "latest", epochs; commas between (default: base,all)'
    )
    parser.add_argument("--ema", action="store_true", help="the averaged weights of the checkpoints")
    parser.add_argument("--images", default="", help="a folder of images whose log-density to find")
    parser.add_argument("--prompt", default="", help="the prompt of all images")
    parser.add_argument("--prompts", default="", help="a file of prompts, one for each image in the order of the names")
    parser.add_argument("--out", default="", help="folder of the results (default: RUN/ode_log_prob)")
    for name, key in OVERRIDES.items():
        kind = str if name == "solver" else int
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"instead of the run's config.{key}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate; exit code 2 after one sentence about bad input."""
    args = parse(arguments)
    with cli.one_sentence_errors():
        evaluate(args)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them
    main()
