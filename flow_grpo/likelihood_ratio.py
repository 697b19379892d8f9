"""The likelihoods GRPO's ratio may be made of: log r = log_prob under the current weights - under the sampling ones.

`config.train.ratio` names the form (MATH 5). All forms score the same rollout; each has its slots, the parts of an
image's likelihood that are trained one at a time, and a log_prob of a slot **per latent dimension**, the convention
on which clip ranges rest:

    sde       the Gaussian log-density of a stochastic step, the action that was really taken; a slot per step.
    ode_step  -dt div v(x_j, sigma_j) / D at the stored latents x_j; a slot per step.
    ode_path  log p_theta(x_0) / D of the final image under the ODE; one slot.
    cfm       -|v(x_t, t) - (e - x_0)|^2 / D, averaged over draws of (e, t) (arXiv 2507.21053); one slot.

v is the guided velocity, so log p_theta is the density of the *guided* ODE's push-forward of N(0, I), which is not the
law of the stochastic sampler that drew the images.

`ode_step` differentiates div v at fixed points. Along the path d log p / dtheta also has the transport term
-w . grad log p (w: the change of v), as the points move with the weights; `ode_step` drops it, so that what it follows
is not a score of anything the model samples, whatever the number of probes. `ode_path` keeps it.

Both sides of a ratio meet the same random numbers, keyed by (seed, epoch, image, step), and both reduce alike, so that
r is exactly 1 at the sampling weights. The experiment that `ode_step` repeats compared an unreduced tensor with a mean;
its ratio lay outside the clip range almost always before any update, which no number of probes can mend.

B images in a minibatch, W stochastic steps, D = C h w latent dimensions, n probes or draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from ml_collections import FrozenConfigDict
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flow_grpo.diffusers_patch.sd3_sde_with_logprob import StepResult, sde_step_with_logprob
from flow_grpo.diffusers_patch.velocity import VelocityFn
from flow_grpo.entropy import DivergenceEstimator, NonFiniteError, divergence, draw_probes, ode_log_density
from flow_grpo.errors import TrainingStopped
from flow_grpo.forward_process import stratified_times
from flow_grpo.randomness import keyed_generator
from flow_grpo.types import Trajectory


@dataclass(frozen=True)
class RatioKeys:
    """Which random numbers the images of a minibatch meet: the same on both sides of the ratio, in every pass."""

    seed: int
    epoch: int
    update: int  # to which the minibatch belongs, in the epoch
    sample_ids: tuple[int, ...]  # B, positions in the epoch over all processes

    def generators(self, purpose: str, *indices: int) -> list[torch.Generator]:
        """One generator per image."""
        return [keyed_generator(self.seed, purpose, self.epoch, sample, *indices) for sample in self.sample_ids]


@dataclass(frozen=True)
class Action:
    """A stochastic step as an action: what the KL and the normalised ratio need of it."""

    latents: Tensor  # (B, C, h, w): x
    levels: tuple[float, float]  # sigma, sigma'
    velocity: Tensor  # (B, C, h, w): v(x, sigma)
    step: StepResult


@dataclass(frozen=True)
class Score:
    """The likelihood of one slot of B images."""

    log_prob: Tensor  # (B,), per dimension
    action: Action | None = None  # of `sde` only


class Likelihood(Protocol):
    """One form of the ratio. Differentiable in the weights behind v unless gradients are switched off."""

    @property
    def recorded(self) -> bool:
        """Whether `trajectory.log_probs` already is this likelihood under the sampling weights."""

    def slots(self, trajectory: Trajectory) -> int:
        """How many parts are trained one at a time."""

    def score(self, velocity: VelocityFn, trajectory: Trajectory, keys: RatioKeys, slot: int) -> Score:
        """The likelihood of one slot of the B images of `trajectory`."""


def likelihood_of(config: FrozenConfigDict) -> Likelihood:
    """The form that `config.train.ratio` names, with `config.train.ratio_probes` probes or draws."""
    probes = config.train.ratio_probes
    estimator = DivergenceEstimator(num_probes=probes) if probes > 0 else DivergenceEstimator(exact=True)
    forms: dict[str, Likelihood] = {
        "sde": SdeLikelihood(config.sample.sde_type, config.sample.noise_level),
        "ode_step": OdeStepLikelihood(estimator),
        "ode_path": OdePathLikelihood(estimator),
        "cfm": CfmLikelihood(probes),
    }
    return forms[config.train.ratio]


# --- of the sampler's steps ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SdeLikelihood:
    """log N(x'; a x + b v, s^2 I) / D of each stochastic step (MATH 1 and 2)."""

    sde_type: str
    noise_level: float
    recorded = True

    def slots(self, trajectory: Trajectory) -> int:
        """W."""
        return len(trajectory.stochastic_steps)

    def score(self, velocity: VelocityFn, trajectory: Trajectory, keys: RatioKeys, slot: int) -> Score:
        """Of the step that was taken; no random numbers."""
        i = trajectory.stochastic_steps[slot]
        levels = trajectory.sigmas[i].item(), trajectory.sigmas[i + 1].item()
        x = trajectory.latents[:, i]
        v = velocity(x, levels[0])
        step = sde_step_with_logprob(
            x,
            v,
            *levels,
            noise_level=self.noise_level,
            sde_type=self.sde_type,
            next_latents=trajectory.latents[:, i + 1],
        )
        return Score(step.log_prob, Action(x, levels, v, step))


@dataclass(frozen=True)
class OdeStepLikelihood:
    """-dt div v(x_j, sigma_j) / D of each stochastic step: its share of log p along the ODE, the points held fixed.

    A biased score: see the module's docstring.
    """

    estimator: DivergenceEstimator
    recorded = False

    def slots(self, trajectory: Trajectory) -> int:
        """W: the steps that `sde` would train, so that the forms differ in nothing else."""
        return len(trajectory.stochastic_steps)

    def score(self, velocity: VelocityFn, trajectory: Trajectory, keys: RatioKeys, slot: int) -> Score:
        """With the probes of (image, step)."""
        i = trajectory.stochastic_steps[slot]
        sigma, sigma_next = trajectory.sigmas[i].item(), trajectory.sigmas[i + 1].item()
        x = trajectory.latents[:, i]
        probes = None
        if not self.estimator.exact:
            probes = draw_probes(x, self.estimator, keys.generators("ratio probe", i))
        with _second_derivatives():
            found = divergence(velocity, x, sigma, self.estimator, probes, enable_grad=torch.is_grad_enabled())
        return Score((sigma - sigma_next) * found.mean / x[0].numel())


# --- of the final image --------------------------------------------------------------------------------


@dataclass(frozen=True)
class OdePathLikelihood:
    """log p_theta(x_0) / D of the final image, from data to noise by Euler on the sampler's own noise levels.

    Prior, divergences and the transport of the path are all differentiated.
    """

    estimator: DivergenceEstimator
    recorded = False

    def slots(self, trajectory: Trajectory) -> int:
        """One: the image."""
        return 1

    def score(self, velocity: VelocityFn, trajectory: Trajectory, keys: RatioKeys, slot: int) -> Score:
        """With the probes of (image, evaluation)."""
        with _second_derivatives():
            density = ode_log_density(
                velocity,
                trajectory.final_latents,
                trajectory.sigmas.flip(0),
                self.estimator,
                lambda evaluation: keys.generators("ratio probe", evaluation),
                enable_grad=torch.is_grad_enabled(),
            )
        return Score(density.nats_per_dim)


@dataclass(frozen=True)
class CfmLikelihood:
    """-L of the final image, L = mean over draws of |v(x_t, t) - (e - x_0)|^2 / D, x_t = (1 - t) x_0 + t e.

    The ratio of arXiv 2507.21053: the flow-matching loss bounds -log p_theta(x_0). Each image has its own n noises.
    The n times are stratified, uniform within [k / n, (k + 1) / n), and common to the images of an update, because a
    velocity takes one noise level for its batch: what the advantages compare is compared at equal times.
    """

    draws: int
    recorded = False

    def slots(self, trajectory: Trajectory) -> int:
        """One: the image."""
        return 1

    def score(self, velocity: VelocityFn, trajectory: Trajectory, keys: RatioKeys, slot: int) -> Score:
        """With the noises of the image and the times of the update."""
        x_0 = trajectory.final_latents
        generators = keys.generators("ratio noise")
        losses = []
        for t in self.times(keys):
            e = torch.stack([torch.randn(x_0.shape[1:], generator=generator) for generator in generators]).to(x_0)
            error = velocity((1 - t) * x_0 + t * e, t) - (e - x_0)
            losses.append(error.square().flatten(1).mean(1))
        return Score(-torch.stack(losses).mean(0))

    def times(self, keys: RatioKeys) -> Sequence[float]:
        """n of them, rising, in (0, 1)."""
        return stratified_times(self.draws, keyed_generator(keys.seed, "ratio time", keys.epoch, keys.update))


@contextmanager
def _second_derivatives() -> Iterator[None]:
    """Plain attention, as the fused kernels have no second derivative; what goes wrong, in one sentence.

    Both sides of the ratio are computed in here, so that they round alike.

    Raises:
        TrainingStopped: the exact trace needs too much memory; the velocity or its divergence is not finite.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except MemoryError as error:
        raise TrainingStopped(
            f"config.train.ratio_probes = 0 with config.train.batch_size asks for too much: {error}"
        ) from error
    except NonFiniteError as error:
        raise TrainingStopped(f"the likelihood ratio cannot be computed: {error}; what was saved is intact") from error
