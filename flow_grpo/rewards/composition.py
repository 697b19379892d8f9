"""What training makes of several rewards: weights, running scales, constraints (docs/rewards.md).

The objective is

    sum over rewards i of w_i R_i / s_i  +  sum over constraints j of lambda_j R_j / s_j,

s_i the standard deviation of R_i over all the images of the run so far, or 1 without `config.reward_normalise`; s_j
always that deviation. A constraint asks that the mean of R_j is no less than on the base model's images of the same
prompts and noise. Its multiplier lambda_j begins at 0 and ascends the dual,

    lambda_j <- max(0, lambda_j + rate_j (mean of R_j on the base's images - mean on the policy's) / s_j),

and s and lambda are constants of the gradient. What is evaluated is always the plain sum of w_i R_i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flow_grpo.randomness import sample_generators
from flow_grpo.rewards.augmentation import augmented
from flow_grpo.rewards.building import Begun, WeightedReward, in_batch
from flow_grpo.rewards.chosen import constraint_rates, reward_weights, trained_rewards
from flow_grpo.rewards.registry import Metadata
from flow_grpo.types import RewardBatch

NEGLIGIBLE = 1e-7  # a standard deviation below this share of the mean is rounding


@dataclass
class Moments:
    """Of all numbers that were added, but for those that are not finite (Welford, Technometrics 4, 1962; float64)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of the squared differences from the mean

    def add(self, values: Tensor) -> None:
        """Take (N,) more, of all processes: two sets of numbers are joined by Chan's formula."""
        new = values.detach().double().cpu()
        new = new[new.isfinite()]
        if len(new) == 0:
            return
        mean, squares = new.mean().item(), (new - new.mean()).square().sum().item()
        total, apart = self.count + len(new), mean - self.mean
        self.squares += squares + apart**2 * self.count * len(new) / total
        self.mean += apart * len(new) / total
        self.count = total

    @property
    def std(self) -> float:
        """What rewards are divided by: the standard deviation, or 1 where there is none."""
        std = math.sqrt(self.squares / self.count) if self.count else 0.0
        return std if std > NEGLIGIBLE * abs(self.mean) else 1.0


class Composition:
    """How the rewards of a configuration make the objective, and what of it changes as training goes on."""

    def __init__(self, config: Any) -> None:
        self.weights, self.rates = reward_weights(config), constraint_rates(config)
        self.names = trained_rewards(config)
        self.normalise, self.augment, self.seed = config.reward_normalise, config.reward_augment, config.seed
        self.moments = {name: Moments() for name in self.names if self.normalise or name in self.rates}
        self.multipliers = dict.fromkeys(self.rates, 0.0)

    @property
    def is_scaled(self) -> bool:
        """Whether the objective changes with what has been seen."""
        return bool(self.moments)

    @property
    def lacks_scale(self) -> bool:
        """Whether rewards are to be divided by the deviation of images, and there are none yet."""
        return self.normalise and any(self.moments[name].count == 0 for name in self.weights)

    def factors(self) -> dict[str, float]:
        """What each reward is multiplied by at present."""
        found = dict.fromkeys(self.names, 0.0)
        for name, weight in self.weights.items():
            found[name] += weight / (self.moments[name].std if self.normalise else 1.0)
        for name, multiplier in self.multipliers.items():
            found[name] += multiplier / self.moments[name].std
        return found

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The objective of images, (B,), from their rewards."""
        parts = [factor * terms[name] for name, factor in self.factors().items() if factor != 0]
        return torch.stack(parts).sum(0)

    def begin(
        self,
        reward: WeightedReward,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Metadata,
        epoch: int,
        sample_ids: Tensor,
    ) -> Scoring:
        """Score images that training has made (B, 3, H, W), without waiting for what a server computes.

        Args:
            sample_ids: (B,): their numbers in the epoch, by which the changes of `config.reward_augment` are keyed.

        Raises:
            RewardFailed: naming the batch.
        """
        when = f"in epoch {epoch + 1}, batch of {_numbers(sample_ids)},"
        with in_batch(when):
            if self.augment:
                images = augmented(images, sample_generators(self.seed, "augment", epoch, sample_ids), self.augment)
            return Scoring(self, reward.begin(self.names, images, prompts, metadata), when)

    def score(
        self,
        reward: WeightedReward,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Metadata,
        epoch: int,
        sample_ids: Tensor,
    ) -> RewardBatch:
        """The objective of the images, with gradient, and its rewards, unweighted; as `begin`."""
        return self.begin(reward, images, prompts, metadata, epoch, sample_ids).result()

    def see(self, terms: Mapping[str, Tensor]) -> None:
        """Take the rewards (N,) of more images, of all processes, into the scales."""
        for name, moments in self.moments.items():
            moments.add(terms[name])

    def hold(self, base: Mapping[str, Tensor], terms: Mapping[str, Tensor]) -> dict[str, float]:
        """Move the multipliers by the constraints' rewards (N,) of the base's images and of the policy's.

        Those are of the same prompts and noise, one by one; pairs that are not finite are left out. Returns what is
        logged.
        """
        logged: dict[str, float] = {}
        for name, rate in self.rates.items():
            apart = (base[name] - terms[name]).double()
            apart = apart[apart.isfinite()]
            gap = apart.mean().item() if len(apart) else 0.0
            moved = self.multipliers[name] + rate * gap / self.moments[name].std
            self.multipliers[name] = max(0.0, moved)
            logged |= {f"reward/{name}/below_base": gap, f"reward/{name}/multiplier": self.multipliers[name]}
        return logged

    # --- in a checkpoint --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        moments = {name: asdict(moments) for name, moments in self.moments.items()}
        return {"moments": moments, "multipliers": dict(self.multipliers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Those of the rewards that are still there; what it lacks begins anew."""
        for name in self.moments.keys() & state.get("moments", {}).keys():
            self.moments[name] = Moments(**state["moments"][name])
        for name in self.multipliers.keys() & state.get("multipliers", {}).keys():
            self.multipliers[name] = float(state["multipliers"][name])


@dataclass(frozen=True)
class Scoring:
    """The rewards of images that training has made, some of which a server may still compute."""

    composition: Composition
    begun: Begun
    when: str  # in which batch, for a sentence

    def failed(self) -> bool:
        """Whether it is known already that there are none; it does not wait."""
        return self.begun.failed()

    def result(self) -> RewardBatch:
        """Wait for them: the objective, with gradient, and the rewards, unweighted. Raises RewardFailed."""
        with in_batch(self.when):
            terms = self.begun.result()
        return RewardBatch(self.composition.total(terms), terms)


def gradient_shares(images: Tensor, terms: Mapping[str, Tensor], factors: Mapping[str, float]) -> dict[str, Tensor]:
    """|g_i| / sum_j |g_j|, g_i the gradient of factor_i R_i at an image; the mean over images: scalars.

    One backward pass through each reward's network, none through what made the images. Rewards without a factor are 0.

    Args:
        images: (B, 3, H, W), in the graph of the terms, which is kept.
    """
    norms = {name: images.new_zeros(len(images)) for name in terms}
    for name, score in terms.items():
        if factors[name] != 0 and score.requires_grad:
            (gradient,) = torch.autograd.grad(factors[name] * score.sum(), images, retain_graph=True)
            norms[name] = gradient.flatten(1).norm(dim=1)
    whole = torch.stack(list(norms.values())).sum(0).clamp(min=torch.finfo(images.dtype).tiny)  # (B,)
    return {name: (norm / whole).mean() for name, norm in norms.items()}


def _numbers(ids: Tensor) -> str:
    """Image 3, or images 3 to 9."""
    low, high = int(ids.min()), int(ids.max())
    return f"image {low}" if low == high else f"images {low} to {high}"
