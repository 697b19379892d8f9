"""Diversity of the images of a folder, or of a checkpoint and its base model.

    python scripts/diversity_metrics/diversity_evaluator.py --images DIR [--reference DIR]
    python scripts/diversity_metrics/diversity_evaluator.py --checkpoint logs/RUN/checkpoints/checkpoint-000100 [--ema]

Vendi score, RKE and mean distance, within prompts and pooled, with intervals (flow_grpo/diversity/measure.py).
In a folder, each sub-folder is a prompt; images directly in it are one group. A reference is compared as a whole.

RKE needs a bandwidth that never changes. A run chooses it on its base model's samples and keeps it in
RUN/diversity/bandwidth.json, with the name of the features; --run takes both from there for a folder of images. Without
a run it is chosen on the reference, or else on the images themselves: RKE then says nothing across folders. Images that
are all alike give none: RKE is then not measured (null), the Vendi score is.

Written to --out: diversity.json and, if it can be drawn, diversity.png. Without --out a checkpoint's go to
RUN/diversity/<checkpoint>, and a folder's to logs/diversity/<folder>, or <folder>-2, -3, ... so that no earlier result
of that name is lost; the last line says where.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from flow_grpo.commands import cli
from flow_grpo.diversity import measure as diversity
from flow_grpo.diversity.features import EXTRACTORS, FeatureExtractor, load_extractor
from flow_grpo.diversity.images import read_images
from flow_grpo.diversity.measure import Diversity
from flow_grpo.diversity.vendi import check_bandwidth
from flow_grpo.errors import ConfigError
from flow_grpo.evaluators.diversity import (
    BANDWIDTH_FILE,
    FOLDER,
    diversity_request,
    extractor_of,
    features_by_prompt,
    fitting_bandwidth,
    measure,
    run_bandwidth,
    stored_bandwidth,
    usable,
    write_json,
)
from flow_grpo.figure_text import optional_figure
from flow_grpo.runs.config import read_config
from flow_grpo.runs.folder import fresh_folder
from flow_grpo.runs.progress import Bars
from flow_grpo.runs.saved import find_checkpoint
from flow_grpo.training.weights import Model, choose_models, load_weights, output_folder

if TYPE_CHECKING:
    from flow_grpo.policy import Policy

RESULTS, FIGURE = "diversity.json", "diversity.png"
MAX_NAMED = 20  # files left out that are named


def measure_images(args: argparse.Namespace) -> dict[str, Diversity]:
    """Of a folder, under its name."""
    extractor, stored = _extractor_and_bandwidth(args)
    reference = reference_features(args, extractor)
    features = folder_features(args.images, args.keep_readable, extractor)
    bandwidth = args.bandwidth or stored or fitting_bandwidth(reference or features)
    found = diversity.measure(features, usable(bandwidth), args.order, extractor.name, args.draws)
    return {Path(args.images).resolve().name: with_reference(found, features, reference)}


def folder_features(folder: str, keep_readable: bool, extractor: FeatureExtractor) -> dict[str, np.ndarray]:
    """Features of a folder's groups; images that are left out are counted and named."""
    images = read_images(Path(folder), keep_readable)
    for path in images.skipped[:MAX_NAMED]:
        print(f"left out, unreadable: {path}")
    if images.skipped:
        print(f"left out, unreadable: {len(images.skipped)} in {folder}")
    return images.features(extractor)


def reference_features(args: argparse.Namespace, extractor: FeatureExtractor) -> dict[str, np.ndarray] | None:
    """Those of --reference, if it is given; ConfigError if they are too few to compare with."""
    if not args.reference:
        return None
    features = folder_features(args.reference, args.keep_readable, extractor)
    if sum(map(len, features.values())) <= diversity.NEIGHBOURS:
        raise ConfigError(f"--reference {args.reference} has too few images; it takes over {diversity.NEIGHBOURS}.")
    return features


def _extractor_and_bandwidth(args: argparse.Namespace) -> tuple[FeatureExtractor, float | None]:
    """Those of --run, or those of the options."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not args.run:
        return load_extractor(args.extractor, args.model, args.pretrained, device), None
    extractor = extractor_of(read_config(Path(args.run), {}), device)
    bandwidth = args.bandwidth or stored_bandwidth(Path(args.run) / FOLDER, extractor.name)
    if bandwidth is None:
        raise ConfigError(f"--run {args.run} has no {FOLDER}/{BANDWIDTH_FILE}; it was not run with eval_diversity.")
    return extractor, bandwidth


def with_reference(
    found: Diversity, features: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray] | None
) -> Diversity:
    """The same, compared with a reference if there is one."""
    if reference is None:
        return found
    return replace(found, reference=diversity.against_reference(features, reference, found.bandwidth))


def measure_checkpoint(args: argparse.Namespace) -> dict[str, Diversity]:
    """Of the base model and of a checkpoint, on the noise of the run's own evaluations."""
    from flow_grpo.launch import launch
    from flow_grpo.policy import Policy

    checkpoint = find_checkpoint(args.checkpoint, subject=f"--checkpoint {args.checkpoint}").resolve()
    run, epoch = checkpoint.parents[1], checkpoint.name.removeprefix("checkpoint-")
    if not epoch.isdecimal():
        raise ConfigError(f"--checkpoint {args.checkpoint} is not named as a run names its own, checkpoint-000100.")
    config = read_config(run, {"eval_diversity": True})
    models = choose_models(run, f"base,{int(epoch)}", config, args.ema)
    settings, accelerator = launch(config)
    extractor = extractor_of(settings.config, accelerator.device)
    reference = reference_features(args, extractor)
    features = sampled_features(Policy.load(settings, accelerator), models, extractor, args.ema)
    bandwidth = args.bandwidth or run_bandwidth(config, run, extractor, features["base"])
    measured = {name: measure(groups, bandwidth, extractor.name, config) for name, groups in features.items()}
    return {name: with_reference(found, features[name], reference) for name, found in measured.items()}


def sampled_features(
    policy: Policy, models: Sequence[Model], extractor: FeatureExtractor, ema: bool
) -> dict[str, dict[str, np.ndarray]]:
    """model -> prompt -> (n, d), every model on the same noise; afterwards the policy has the weights of the last."""
    from flow_grpo.evaluators.evaluation import draw_samples
    from flow_grpo.prompts import PromptDataset
    from flow_grpo.runs.run import Run

    settings, base = policy.settings, [parameter.detach().clone() for parameter in policy.trainable]
    prompts, bars = PromptDataset.load(settings.config.prompts.test), Bars()
    features = {}
    for model in bars.progress(models, "models"):
        load_weights(policy, model, base, ema)
        samples = draw_samples(policy, prompts, settings, cast(Run, bars), [diversity_request(settings.config)])
        features[model.name] = features_by_prompt(samples, extractor)
    return features


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", help="a folder of images, or of a folder of images for each prompt")
    source.add_argument("--checkpoint", help="a checkpoint of a run, or a run: its latest")
    parser.add_argument("--reference", default="", help="a folder of images to compare with, e.g. real ones")
    parser.add_argument("--keep-readable", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--ema", action="store_true", help="with --checkpoint: its averaged weights")
    parser.add_argument("--run", default="", help="with --images: take features and bandwidth of this run")
    parser.add_argument("--extractor", default="clip", choices=EXTRACTORS, help="with --images (default: clip)")
    parser.add_argument(
        "--model", default="assets/tiny_features", help="directory, hub id or open_clip's name or .json"
    )
    parser.add_argument("--pretrained", default="", help="open_clip: tag or file of weights")
    parser.add_argument("--order", type=float, default=1.0, help="--images: q of Vendi; inf is allowed (default: 1)")
    parser.add_argument("--bandwidth", type=float, default=0.0, help="h of RKE (default: see above)")
    parser.add_argument("--draws", type=int, default=1000, help="--images: bootstrap draws (default: 1000)")
    parser.add_argument(
        "--out", default="", help="default: logs/diversity/<folder>[-2, ...], or RUN/diversity/<checkpoint>"
    )
    args = parser.parse_args(arguments)
    given = {name for name in ("extractor", "model", "pretrained") if getattr(args, name) != parser.get_default(name)}
    if args.checkpoint and (args.run or given):
        parser.error("--run, --extractor, --model and --pretrained are for --images; a checkpoint knows its run's")
    if args.run and given:
        parser.error("--run brings its own features; give no --extractor, --model or --pretrained with it")
    if not 50 <= args.draws <= 1_000_000:
        parser.error(f"--draws {args.draws} is not allowed; it takes a whole number, 50 to 1000000")
    if args.images and args.ema:
        parser.error("--ema is for --checkpoint")
    return args


def evaluate(args: argparse.Namespace) -> dict[str, Diversity]:
    """Measure, write the numbers, print the tables, then draw."""
    if args.bandwidth:  # nan too
        check_bandwidth(args.bandwidth)
    if args.checkpoint:
        checkpoint = find_checkpoint(args.checkpoint, subject=f"--checkpoint {args.checkpoint}").resolve()
        default = checkpoint.parents[1] / FOLDER / (checkpoint.name + ("_ema" if args.ema else ""))
    else:
        default = Path("logs") / FOLDER / Path(args.images).resolve().name
    out = output_folder(args.out or default)
    found = measure_checkpoint(args) if args.checkpoint else measure_images(args)
    if not args.out and args.images:
        out = fresh_folder(out)
    cli.create_folder(out)
    write_json(out / RESULTS, {name: diversity.record(measured) for name, measured in found.items()})
    for name, measured in found.items():
        print(f"{name}\n{diversity.table(measured)}\n")
    with optional_figure(out / FIGURE):
        diversity.figure(list(found.values())[-1]).savefig(out / FIGURE, dpi=130)
    print(f"written to {out}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; exit code 2 after one sentence about bad input."""
    args = parse(arguments)
    with cli.one_sentence_errors():
        evaluate(args)


if __name__ == "__main__":
    main()
