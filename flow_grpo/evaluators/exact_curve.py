"""Where a model stands beside the exact curve of its base and reward: which share of the law's diversity it keeps.

- `diversity/kept_of_exact` (Vendi), `diversity/kept_of_exact_rke`, and of scenes `diversity/kept_of_exact_modes`: 1 on
  the curve, below 1 where diversity is lost that the reward does not ask for; nan beyond the curve, where no law of the
  base's images has so much reward. `..._low`, `..._high`: the ends of its 95 % interval over prompts.
- `diversity/lost_beside_exact`, `..._rke`, `..._modes`: the same as a number of images, or nats.
- `exact_curve/reward`, `exact_curve/vendi`, ...: the model's own figures on the curve's prompts.
- `diversity/off_support`: 1 where the reward is above that of the base's best images, else 0.

What is compared with what: flow_grpo/curve.py.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flow_grpo.curve import Curve
from flow_grpo.diversity.features import NonFiniteFeatures
from flow_grpo.diversity.rke import rke_score
from flow_grpo.diversity.vendi import vendi_score
from flow_grpo.errors import ConfigError
from flow_grpo.evaluators.base import Measured, SampleRequest
from flow_grpo.evaluators.diversity import extractor_of, features_by_prompt, how_often
from flow_grpo.evaluators.evaluation import drawing_of
from flow_grpo.evaluators.samples import RewardEvaluator
from flow_grpo.evaluators.scenes import scene_modes, seen_by_prompt
from flow_grpo.files import write_atomically
from flow_grpo.paths import find
from flow_grpo.prompts import PromptDataset
from flow_grpo.rewards.building import WeightedReward, load_scorer
from flow_grpo.rewards.registry import SCENE_SCORER
from flow_grpo.runs.folder import CURVE_FILE
from flow_grpo.scenes.captions import parse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flow_grpo.diversity.features import FeatureExtractor
    from flow_grpo.evaluators.base import Evaluator
    from flow_grpo.policy import Policy
    from flow_grpo.rewards.scenes import SceneScorer
    from flow_grpo.runs.run import Run
    from flow_grpo.settings import Settings
    from flow_grpo.types import Samples


class ExactCurveEvaluator:
    """Compares `Curve.set_size` images of each of the curve's prompts with the curve."""

    name, collective = "exact curve", False

    def __init__(
        self,
        curve: Curve,
        extractor: FeatureExtractor,
        reward: RewardEvaluator,
        detector: SceneScorer | None,
        freq: int,
    ) -> None:
        """`reward`: of the curve's rewards; `detector`: the judge of scenes, whose modes the curve has; else None."""
        self.curve, self.extractor, self.reward, self.detector, self.freq = curve, extractor, reward, detector, freq
        self.request = SampleRequest(curve.prompts, curve.set_size)

    def evaluate(self, samples: Samples) -> Measured:
        """Over the curve's prompts."""
        try:
            figures = self.figures(samples)
        except NonFiniteFeatures as error:  # they do not end the run
            warnings.warn(f"nothing is held against the exact curve: {error}", stacklevel=2)
            figures = dict.fromkeys(self.curve.first, [math.nan] * len(self.curve.prompts))
        found = {f"exact_curve/{name}": float(np.mean(values)) for name, values in figures.items()}
        found["diversity/off_support"] = float(self.curve.is_off_support(figures["reward"]))
        for name, kept in self.curve.kept(figures).items():
            suffix = "" if name == "vendi" else f"_{name}"
            share = f"diversity/kept_of_exact{suffix}"
            found |= {share: kept.share.estimate, f"{share}_low": kept.share.low, f"{share}_high": kept.share.high}
            found[f"diversity/lost_beside_exact{suffix}"] = kept.lost.estimate
        return Measured(found)

    def figures(self, samples: Samples) -> Mapping[str, Sequence[float]]:
        """The curve's figures of these images, of each of its prompts, in its order."""
        by_prompt, rewards = features_by_prompt(samples, self.extractor), self.reward.evaluate(samples).rewards["total"]
        features = [by_prompt[prompt] for prompt in self.curve.prompts]
        of_prompt: dict[str, list[float]] = {}
        for prompt, value in zip(samples.prompts, rewards, strict=True):
            of_prompt.setdefault(prompt, []).append(value)
        found = {
            "reward": [float(np.mean(of_prompt[prompt])) for prompt in self.curve.prompts],
            "vendi": [vendi_score(group) for group in features],
            "rke": [rke_score(group, self.curve.bandwidth) for group in features],
        }
        if self.detector is not None:
            seen = seen_by_prompt(self.detector, samples)
            found["modes"] = [scene_modes(parse(text).kind, seen[text])["entropy"] for text in self.curve.prompts]
        return found


def build(policy: Policy, reward: WeightedReward, settings: Settings, run: Run) -> list[Evaluator]:
    """The evaluator, if the configuration names a curve."""
    config = settings.config
    if not config.eval.curve:
        return []
    path = Path(find(config.eval.curve))
    curve = Curve.read(path)
    extractor = extractor_of(config, policy.device)
    if curve.features != extractor.name:
        raise ConfigError(
            f"config.eval.curve = {config.eval.curve!r} is of the features {curve.features!r}, not {extractor.name!r}, "
            "as config.diversity has them; it takes a curve of these."
        )
    if curve.drawing != drawing_of(config, PromptDataset.load(config.prompts.test).prompts):
        raise ConfigError(
            f"config.eval.curve = {config.eval.curve!r} is of images that were drawn otherwise than this run's: by "
            "another model, config.prompts.test, size, guidance, eval.num_steps or eval.seed; scripts/study/curve.py "
            "makes one."
        )
    if run.is_main and run.holds_folder():
        with run.writing(CURVE_FILE):  # a page is made from the folder alone
            write_atomically(run.folder / CURVE_FILE, path.read_bytes())
    weighted = WeightedReward(reward.models, curve.rewards)
    detector = None
    if "modes" in curve.law:
        detector = load_scorer("config.eval.judge", SCENE_SCORER, config.eval.judge, policy.device)
    measured = RewardEvaluator(weighted, config.eval.batch_size, policy.device)
    return [ExactCurveEvaluator(curve, extractor, measured, detector, how_often(config))]
