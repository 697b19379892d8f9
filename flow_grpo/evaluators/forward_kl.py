"""An alarm of hacking: how much worse the trained velocity fits the base model's own images (MATH 10).

L(theta) = E |v_theta(x_t, t) - (e - x_0)|^2 over images x_0 that the base model draws on the evaluation's noise, times
t and noises e: the flow-matching loss. Its rise stands for the forward KL divergence from the base's law to the trained
one (arXiv 2512.04332). At a rise by a tenth, the run says so.

Velocities are those without guidance, as the loss is of the network: a guided velocity fits no images. Images, times
and noises are keyed by (eval.seed, prompt, sample): the same at every checkpoint, and after resuming.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flow_grpo.diffusers_patch.velocity import VelocityFn
from flow_grpo.evaluators.base import Evaluator, Measured
from flow_grpo.forward_process import Point, matching_errors, noised, stratified_times
from flow_grpo.policy import UNGUIDED, Policy
from flow_grpo.randomness import evaluation_generators, keyed_generator
from flow_grpo.rewards.building import WeightedReward
from flow_grpo.runs.run import Run
from flow_grpo.settings import Settings
from flow_grpo.types import Samples

ALARM = 0.1  # rise of the loss, as a share of the base's
SAID = (
    "the flow-matching loss on the base model's images has risen by {rise:.0%}: the weights leave its law, as they do "
    "where a reward is exploited; look at the images."
)


class ForwardKLEvaluator:
    """`forward_kl/loss`, and `forward_kl/rise`: by how much it is above the base's, as a share of that."""

    name, request = "forward_kl", None

    def __init__(self, policy: Policy, settings: Settings, run: Run) -> None:
        self.collective = policy.sharded  # then all processes do the same
        self.policy, self.run, self.config = policy, run, settings.config
        self.freq = settings.config.eval_freq
        self._base: Tensor | None = None  # (N, C, h, w): the images, drawn when they are first needed
        self._base_loss = 0.0

    @torch.no_grad()
    def evaluate(self, samples: Samples) -> Measured:
        """Of the weights that the policy has now, on the base's images of the same prompts and noises."""
        if self._base is None:
            self._base = torch.cat([self._draw(samples, rows) for rows in self._batches(samples)])
            self._base_loss = self._loss(samples, self._base, trained=False)
        loss = self._loss(samples, self._base, trained=True)
        rise = loss / self._base_loss - 1
        if rise > ALARM:
            self.run.tell(SAID.format(rise=rise), key=self.name)
        return Measured({"forward_kl/loss": loss, "forward_kl/rise": rise})

    def _draw(self, samples: Samples, rows: slice) -> Tensor:
        generators = evaluation_generators(self.config.eval.seed, _ids(samples, rows))
        return self.policy.sample_base(samples.prompts[rows], generators, self.config.eval.num_steps).cpu()

    def _loss(self, samples: Samples, base: Tensor, trained: bool) -> float:
        """Mean over images, times, noises and dimensions."""
        total = 0.0
        for rows in self._batches(samples):
            velocity = self._velocity(samples, rows, trained)
            for point in self._points(base[rows].to(self.policy.device), samples, rows):
                total += matching_errors(velocity, point).double().sum().item()
        return total / len(base) / self.config.forward_kl.draws

    def _points(self, x_0: Tensor, samples: Samples, rows: slice) -> Iterator[Point]:
        """One at each time; the times are those of all images."""
        seed, ids = self.config.eval.seed, _ids(samples, rows)
        times = stratified_times(self.config.forward_kl.draws, keyed_generator(seed, "forward KL times"))
        for draw, t in enumerate(times):
            noise = self.policy.noise([keyed_generator(seed, "forward KL", *image, draw) for image in ids])
            yield noised(x_0, noise, t)

    def _velocity(self, samples: Samples, rows: slice, trained: bool) -> VelocityFn:
        of = self.policy.velocity if trained else self.policy.reference_velocity
        return of(self.policy.encode(samples.prompts[rows]), UNGUIDED)

    def _batches(self, samples: Samples) -> Iterator[slice]:
        size = self.config.eval.batch_size
        return (slice(start, start + size) for start in range(0, len(samples.prompts), size))


def _ids(samples: Samples, rows: slice) -> list[tuple[int, int]]:
    return list(zip(samples.prompt_ids[rows].tolist(), samples.sample_ids[rows].tolist(), strict=True))


def build(policy: Policy, reward: WeightedReward, settings: Settings, run: Run) -> list[Evaluator]:
    """The evaluator, if the configuration asks for it."""
    return [ForwardKLEvaluator(policy, settings, run)] if settings.config.eval_forward_kl else []
