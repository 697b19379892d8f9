"""How much of DRTune's diversity comes back if its LoRA is scaled down at sampling time: the claims' last checkpoints.

    python scripts/study/lora_scales.py [--logs logs/study] [--out assets/study] [--scales 0.2,0.4,0.6,0.8]

The weights are W_0 + s (alpha / r) B A, the evaluation is that of the training: its prompts, noise, judge, features and
bandwidth, for the current weights. s = 1 is the run's last evaluation, s = 0 the base model's.

Written to --out, once all runs are evaluated: lora_scales.json, which `claims.frontier` reads. Nothing of a run is
written.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flow_grpo.commands import cli
from flow_grpo.errors import ConfigError
from flow_grpo.recipes.registry import get_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from scripts.study import plan
from scripts.study.paths import OUT
from scripts.study.plan import StudyRun

if TYPE_CHECKING:
    from flow_grpo.evaluators.evaluation import Evaluator
    from flow_grpo.policy import Policy
    from flow_grpo.prompts import PromptDataset
    from flow_grpo.runs.run import Run
    from scripts.study.study_records import StudyRecord

TRAIN = "python scripts/study/run.py --only claims-drtune"


# --- one run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedModel:
    """A run's last checkpoint with the evaluators of its training; what they keep goes to a scratch folder."""

    policy: Policy
    prompts: PromptDataset
    evaluators: Sequence[Evaluator]
    scratch: Run

    @classmethod
    def load(cls, folder: Path, scratch: Path) -> TrainedModel:
        """Of a run folder.

        Raises:
            ConfigError: it is damaged, has no LoRA, or no bandwidth.
        """
        from flow_grpo.runs.config import read_config
        from flow_grpo.training.weights import choose_models, load_weights

        config = read_config(folder, {"logdir": str(scratch), "run_name": folder.name, "trackers": ()})
        if not config.use_lora:
            raise ConfigError(f"{folder} has no LoRA to scale: it was trained with config.use_lora = False.")
        (model,) = choose_models(folder, "latest", config, ema=False)

        from flow_grpo.evaluators.diversity import (
            BANDWIDTH_FILE,
            FOLDER,
            DiversityEvaluator,
            extractor_of,
            stored_bandwidth,
        )
        from flow_grpo.evaluators.evaluation import sample_evaluators
        from flow_grpo.launch import launch
        from flow_grpo.policy import Policy
        from flow_grpo.prompts import PromptDataset
        from flow_grpo.rewards.building import build_reward
        from flow_grpo.runs.run import Run

        settings, accelerator = launch(config)
        device = accelerator.device
        extractor = extractor_of(config, device)
        bandwidth = config.diversity.bandwidth or stored_bandwidth(folder / FOLDER, extractor.name)
        if bandwidth is None:
            raise ConfigError(f"{folder / FOLDER / BANDWIDTH_FILE} is missing: {folder} never measured diversity.")
        policy, run = Policy.load(settings, accelerator), Run(settings, accelerator)
        load_weights(policy, model, policy.trainable, ema=False)
        evaluators = sample_evaluators(build_reward(settings.config, device), settings, device)
        evaluators.append(DiversityEvaluator(extractor, bandwidth, settings, run))
        return cls(policy, PromptDataset.load(config.prompts.test), evaluators, run)

    def evaluate(self, scale: float) -> dict[str, float]:
        """The metrics of the frontier with the LoRA scaled; afterwards its scale is 1 again.

        Raises:
            ConfigError: one of them is not finite.
        """
        from peft.helpers import rescale_adapter_scale

        from flow_grpo.evaluators.evaluation import evaluate
        from scripts.study.records import ACCURACY, REWARD, RKE, VENDI

        with rescale_adapter_scale(self.policy.transformer, scale):
            found = evaluate(self.policy, self.prompts, self.evaluators, self.policy.settings, self.scratch, "eval")
        metrics = {name: found.metrics[f"eval/{name}"] for name in (REWARD, VENDI, RKE, ACCURACY)}
        lost = [name for name, value in metrics.items() if not math.isfinite(value)]
        if lost:
            raise ConfigError(f"{', '.join(lost)} cannot be measured: not finite.")
        return metrics


# --- all runs -----------------------------------------------------------------------------------------------


def drtune_claims() -> list[StudyRun]:
    """The planned runs of the claims that train on the reward's gradient."""
    return [run for run in plan.whole() if run.group == "claims" and get_config(run.recipe).use_reward_gradient]


def entries(logs: Path, scales: Sequence[float]) -> list[dict[str, Any]]:
    """What lora_scales.json holds: an entry for each finished run and scale, by seed and scale.

    Raises:
        ConfigError: no run is finished, or one cannot be evaluated.
    """
    from tqdm import tqdm

    from scripts.study.collect import collect

    records = sorted(collect(drtune_claims(), logs).records, key=lambda record: record.seed)
    if not records:
        raise ConfigError(f"--logs {logs} holds no finished DRTune run of the claims; `{TRAIN}` trains them.")
    found = []
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=len(records) * len(scales), desc="LoRA scales") as bar:
        for record in records:
            model = TrainedModel.load(logs / record.name, Path(scratch))
            for scale in scales:
                found.append(entry(record, model, scale))
                bar.update()
    return found


def entry(record: StudyRecord, model: TrainedModel, scale: float) -> dict[str, Any]:
    """One scaled LoRA; ConfigError, with the run's name, if it cannot be evaluated."""
    try:
        metrics = model.evaluate(scale)
    except ConfigError as error:
        raise ConfigError(f"{record.name}, LoRA scaled by {scale:g}: {error}") from error
    return {
        "label": record.label,
        "method": record.method,
        "seed": record.seed,
        "scale": scale,
        "seconds": record.final("seconds"),
        **metrics,
    }


# --- the command --------------------------------------------------------------------------------------------


def parse_scales(text: str) -> list[float]:
    """Different numbers between 0 and 1, ascending; ConfigError if one is none."""
    found = set()
    for word in text.split(","):
        try:
            scale = float(word)
        except ValueError:
            raise ConfigError(f"--scales {text}: {word!r} is not a number.") from None
        if not 0 < scale < 1:
            raise ConfigError(f"--scales {text}: {word.strip()} is not between 0 (base model) and 1 (as trained).")
        found.add(scale)
    return sorted(found)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, default=Path("logs/study"), help="run folders (default: logs/study)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results (default: assets/study)")
    parser.add_argument("--scales", default="0.2,0.4,0.6,0.8", help="between 0 and 1 (default: 0.2,0.4,0.6,0.8)")
    return parser.parse_args(arguments)


def write_scales(args: argparse.Namespace) -> None:
    """Evaluate, then write lora_scales.json: strict JSON, a line for each entry."""
    from flow_grpo.training.weights import output_folder

    scales, out = parse_scales(args.scales), output_folder(args.out)
    found = entries(args.logs, scales)

    from scripts.study.study_records import SCALES_FILE, write_rows

    write_rows(found, out / SCALES_FILE)
    print(f"{len(found)} scaled LoRAs in {out / SCALES_FILE}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file; exit code 2 after one sentence about bad input."""
    args = parse(arguments)
    with cli.one_sentence_errors():
        write_scales(args)


if __name__ == "__main__":
    main()
