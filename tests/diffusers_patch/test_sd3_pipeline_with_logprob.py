"""The rollout: which steps are stochastic, what is kept of them, and gradients through it."""

import pytest
import torch

from flow_grpo.diffusers_patch.sd3_pipeline_with_logprob import pipeline_with_logprob, stochastic_steps
from flow_grpo.diffusers_patch.sd3_sde_with_logprob import sde_step_with_logprob
from flow_grpo.types import Trajectory

SIGMAS = torch.linspace(1, 0, 6, dtype=torch.float64)


def field(x, sigma):
    """A velocity that mixes dimensions and depends on sigma."""
    return torch.tanh(x.roll(1, -1)) * (0.5 + sigma) - 0.3 * x


def noise(batch=3):
    return torch.randn(batch, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def generators(batch=3):
    return [torch.Generator().manual_seed(i) for i in range(batch)]


def roll(kind, **options):
    return pipeline_with_logprob(
        field, noise(), SIGMAS, sde_type=kind, noise_level=0.7, generators=generators(), **options
    )


@pytest.mark.parametrize(("kind", "steps"), [("ode", ()), ("sde", (0, 1, 2, 3, 4)), ("cps", (0, 1, 2, 3))])
def test_stochastic_steps_are_those_with_noise(kind, steps):
    assert stochastic_steps(SIGMAS.tolist(), kind, 0.7) == steps
    assert roll(kind).stochastic_steps == steps


def test_the_ode_rollout_is_eulers_method():
    x = noise()
    for sigma, after in zip(SIGMAS[:-1].tolist(), SIGMAS[1:].tolist(), strict=True):
        x = x + (after - sigma) * field(x, sigma)
    torch.testing.assert_close(roll("ode").final_latents, x, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["sde", "dance", "cps"])
def test_stored_states_reproduce_every_log_prob_and_mean(kind):
    trajectory = roll(kind, keep_means=True)
    for slot, i in enumerate(trajectory.stochastic_steps):
        x = trajectory.latents[:, i]
        step = sde_step_with_logprob(
            x, field(x, SIGMAS[i].item()), SIGMAS[i].item(), SIGMAS[i + 1].item(),
            noise_level=0.7, sde_type=kind, next_latents=trajectory.latents[:, i + 1],
        )  # fmt: skip
        assert torch.equal(step.log_prob, trajectory.log_probs[:, slot])
        assert torch.equal(step.mean, trajectory.means[:, slot])


def test_means_are_kept_only_when_asked_for_and_change_nothing_else():
    without, kept = roll("sde"), roll("sde", keep_means=True)
    assert without.means is None
    assert without[:1].means is None
    assert Trajectory.cat([without, without]).means is None
    assert Trajectory.cat([kept[:1], kept[1:]]).means.equal(kept.means)
    assert without.latents.equal(kept.latents)
    assert without.log_probs.equal(kept.log_probs)


def test_outside_the_window_steps_are_deterministic():
    trajectory = roll("sde", window=range(1, 3))
    assert trajectory.stochastic_steps == (1, 2)
    x, sigma, after = trajectory.latents[:, 3], SIGMAS[3].item(), SIGMAS[4].item()
    torch.testing.assert_close(trajectory.latents[:, 4], x + (after - sigma) * field(x, sigma), rtol=0, atol=0)


def test_an_image_does_not_depend_on_its_batch():
    whole = roll("sde")
    alone = pipeline_with_logprob(
        field, noise()[1:2], SIGMAS, sde_type="sde", noise_level=0.7, generators=generators()[1:2]
    )
    torch.testing.assert_close(alone.latents[0], whole.latents[1], rtol=0, atol=1e-14)


def test_no_graph_unless_asked_and_then_through_every_step():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    def final(value, enable_grad):
        rollout = pipeline_with_logprob(
            lambda x, sigma: value * field(x, sigma), noise(), SIGMAS, sde_type="sde", noise_level=0.7,
            generators=generators(), enable_grad=enable_grad,
        )  # fmt: skip
        return rollout.final_latents.square().sum()

    assert not final(scale, False).requires_grad
    (gradient,) = torch.autograd.grad(final(scale, True), scale)
    h = 1e-6
    difference = (final(scale.detach() + h, False) - final(scale.detach() - h, False)) / (2 * h)
    torch.testing.assert_close(gradient, difference, rtol=1e-7, atol=0)
