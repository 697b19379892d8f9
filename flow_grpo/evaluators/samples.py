"""Evaluators that look at the images alone: rewards, a judge, and the modes that it recognises."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from scipy.stats import entropy
from torch import Tensor

from flow_grpo.evaluators.base import Measured
from flow_grpo.rewards.building import WeightedReward
from flow_grpo.rewards.clip import ClipScorer
from flow_grpo.runs.record import Judged
from flow_grpo.settings import read_modes
from flow_grpo.types import Samples


class RewardEvaluator:
    """`reward/total`, the weighted sum that is trained on, and `reward/<name>` of every reward in use."""

    name, collective, request = "reward", False, None

    def __init__(self, reward: WeightedReward, batch_size: int, device: torch.device, freq: int = 1) -> None:
        self.reward, self.batch_size, self.device, self.freq = reward, batch_size, device, freq

    @torch.no_grad()
    def evaluate(self, samples: Samples) -> Measured:
        """Means over the samples, and the rewards of each."""
        found: dict[str, list[float]] = {}
        for part in _slices(len(samples.prompts), self.batch_size):
            images = samples.images[part].to(self.device)
            scores = self.reward.evaluate(images, samples.prompts[part], samples.metadata[part])
            for name, value in {"total": scores.total, **scores.terms}.items():
                found.setdefault(name, []).extend(value.double().tolist())
        means = {f"reward/{name}": sum(values) / len(values) for name, values in found.items()}
        return Measured(means, rewards=found)


class SharedFeatures:
    """A scorer's features of the images of an evaluation: embedded once for all evaluators that share this."""

    def __init__(self, scorer: ClipScorer, batch_size: int) -> None:
        self.scorer, self.batch_size = scorer, batch_size
        self._samples: Callable[[], Samples | None] = lambda: None  # the last ones, as long as they are there
        self._features = torch.empty(0)

    def __call__(self, samples: Samples) -> Tensor:
        """(N, d)."""
        if self._samples() is not samples:
            slices = _slices(len(samples.images), self.batch_size)
            parts = [self.scorer.image_features(samples.images[part]) for part in slices]
            self._samples, self._features = weakref.ref(samples), torch.cat(parts)
        return self._features


class JudgeEvaluator:
    """How well a CLIP that is not the reward recognises each image's prompt among the evaluated ones.

    `judge/accuracy`: share of images whose best-matching prompt is their own. `judge/similarity`: mean cosine with it.
    Both are nan if an image is not finite.
    """

    name, collective, request = "judge", False, None

    def __init__(self, features: SharedFeatures, freq: int = 1, model: str = "", independent: bool = True) -> None:
        """`model`: its name; `independent`: no reward that is trained on comes from it."""
        self.features, self.scorer, self.freq = features, features.scorer, freq
        self.model, self.independent = model, independent

    @torch.no_grad()
    def evaluate(self, samples: Samples) -> Measured:
        """Over all samples; of each, the prompt that is guessed, and the probability of its own."""
        candidates = tuple(dict.fromkeys(samples.prompts))
        similarity = (self.features(samples) @ self.scorer.text_features(candidates).T).cpu()  # (N, candidates)
        own = torch.tensor([candidates.index(prompt) for prompt in samples.prompts])
        finite, guess = similarity.isfinite().all(1), similarity.argmax(1)  # (N,)
        metrics = {
            "judge/accuracy": (guess == own).double().mean().item() if finite.all() else math.nan,
            "judge/similarity": similarity.gather(1, own[:, None]).double().mean().item(),
        }
        chances = (self.scorer.logit_scale.double().exp().cpu() * similarity.double()).softmax(1)  # (N, candidates)
        guesses = [place if fine else None for place, fine in zip(guess.tolist(), finite.tolist(), strict=True)]
        probability = chances.gather(1, own[:, None]).squeeze(1).tolist()
        return Measured(metrics, judge=Judged(self.model, self.independent, guesses, probability))


class ModeEvaluator:
    """Counts the known modes of each prompt, e.g. the colours of "a sneaker", as the judge sees them.

    `modes/<mode>`: share of the images. `modes/entropy`: of these shares, in nats; log of the number of modes at most.
    All are nan if an image is not finite.
    """

    name, collective, request = "modes", False, None

    def __init__(self, features: SharedFeatures, modes: Mapping[str, Mapping[str, str]], freq: int = 1) -> None:
        """`modes`: prompt -> mode -> the caption that describes it."""
        self.features, self.scorer, self.modes, self.freq = features, features.scorer, modes, freq

    @classmethod
    def load(cls, features: SharedFeatures, path: str, freq: int = 1) -> ModeEvaluator:
        """Read the modes from a JSON file; ConfigError if it holds something else."""
        return cls(features, read_modes(Path(path), "config.eval.modes: "), freq)

    @torch.no_grad()
    def evaluate(self, samples: Samples) -> Measured:
        """Over the samples of prompts whose modes are known; nothing if there are none."""
        counts: dict[str, float] = {}
        for prompt in dict.fromkeys(samples.prompts):
            if not self.modes.get(prompt):
                continue
            features = self.features(samples)[[i for i, other in enumerate(samples.prompts) if other == prompt]]
            names, captions = zip(*self.modes[prompt].items(), strict=True)
            found = features @ self.scorer.text_features(captions).T  # (n, captions)
            best, unknown = found.argmax(1), 0.0 if found.isfinite().all() else math.nan
            for index, name in enumerate(names):
                counts[name] = counts.get(name, 0.0) + int((best == index).sum()) + unknown
        if not counts:
            return Measured()
        total = sum(counts.values())
        shares = {f"modes/{name}": count / total for name, count in counts.items()}
        return Measured(shares | {"modes/entropy": float(entropy(list(counts.values())))})


def _slices(total: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover range(total)."""
    return (slice(start, start + size) for start in range(0, total, size))
