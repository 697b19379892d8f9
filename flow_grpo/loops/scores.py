"""The rewards of an epoch's images: asked for as images are made, waited for at the end, and put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flow_grpo.metrics import MeanMetrics
from flow_grpo.policy import Policy
from flow_grpo.rewards.building import Begun, WeightedReward
from flow_grpo.rewards.composition import Scoring
from flow_grpo.rewards.registry import Metadata
from flow_grpo.runs.run import Run
from flow_grpo.types import RewardBatch


@dataclass
class EpochScores:
    """Of this process's images, batch by batch. A reward that fails ends the training at the next `run.check_stop`.

    Attributes:
        held_out: of each batch (B, M) float32, the rewards of the gate, once they are settled; empty without a gate.
    """

    reward: WeightedReward
    gate: Sequence[str]  # names of rewards that are not trained on
    run: Run
    held_out: list[Tensor] = field(default_factory=list)
    _begun: list[Scoring] = field(default_factory=list)
    _begun_of_base: list[Scoring] = field(default_factory=list)
    _begun_of_gate: list[Begun] = field(default_factory=list)
    _scores: list[RewardBatch] = field(default_factory=list)
    _scores_of_base: list[RewardBatch] = field(default_factory=list)

    @property
    def compares(self) -> bool:
        """Whether the base model's images are needed besides."""
        return bool(self.run.composition.rates)

    def begin(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Metadata,
        sample_ids: Tensor,
        of_base: bool = False,
    ) -> None:
        """Score a batch (B, 3, H, W), without waiting for what a server computes."""
        run, begun = self.run, self._begun_of_base if of_base else self._begun
        with run.failing_together():
            begun.append(run.composition.begin(self.reward, images, prompts, metadata, run.counters.epoch, sample_ids))
            if self.gate and not of_base:
                self._begun_of_gate.append(self.reward.begin(self.gate, images, prompts, metadata))

    def look(self) -> None:
        """Notice what has failed by now; it does not wait."""
        with self.run.failing_together():
            begun: list[Scoring | Begun] = [*self._begun, *self._begun_of_base, *self._begun_of_gate]
            for one in begun:
                if one.failed():
                    one.result()

    def settle(self) -> None:
        """Wait for all of them."""
        with self.run.failing_together():
            self._scores = [scores.result() for scores in self._begun]
            self._scores_of_base = [scores.result() for scores in self._begun_of_base]
            self.held_out = [torch.stack(list(begun.result().values()), 1) for begun in self._begun_of_gate]

    def objective(self, policy: Policy, order: Tensor, metrics: MeanMetrics) -> Tensor:
        """Collective: what is trained on, (N,) float32, once all is settled; the rewards' means and spreads are logged.

        Args:
            order: places of the images, in the order of their batches, by which they are wanted.
        """
        for scores in self._scores:
            means = {f"reward/{name}": values.mean() for name, values in scores.terms.items()}
            metrics.add(means, weight=len(scores.total))
        base = joined(self._scores_of_base, order) if self._scores_of_base else None
        return composed(policy, joined(self._scores, order), base, self.run, metrics)


def joined(parts: Sequence[RewardBatch], order: Tensor | None = None) -> RewardBatch:
    """The rewards of batches put together, and in another order."""
    chosen = slice(None) if order is None else order
    terms = {name: torch.cat([part.terms[name] for part in parts])[chosen] for name in parts[0].terms}
    return RewardBatch(torch.cat([part.total for part in parts])[chosen], terms)


def composed(policy: Policy, scores: RewardBatch, base: RewardBatch | None, run: Run, metrics: MeanMetrics) -> Tensor:
    """Collective: the objective (N,) of this process's images, by scales and multipliers that have seen all of them.

    The spread of every reward is logged, and what it is multiplied by where that changes.

    Args:
        base: the rewards of the base model's images of the same prompts and noise; None: there is no constraint.
    """
    composition, all_terms = run.composition, gathered(policy, scores)
    metrics.add({f"reward/{name}/std": values.std(correction=0) for name, values in all_terms.items()})
    if not composition.is_scaled:
        return scores.total
    composition.see(all_terms)
    if base is not None:
        metrics.add(composition.hold(gathered(policy, base), all_terms))
    metrics.add({f"reward/{name}/factor": factor for name, factor in composition.factors().items()})
    return composition.total(scores.terms)


def gathered(policy: Policy, scores: RewardBatch) -> dict[str, Tensor]:
    """Collective: each reward of all processes' images."""
    if not scores.terms:
        return {}
    everywhere = policy.accelerator.gather(torch.stack(list(scores.terms.values()), 1))  # (N, terms)
    return dict(zip(scores.terms, everywhere.unbind(1), strict=True))
