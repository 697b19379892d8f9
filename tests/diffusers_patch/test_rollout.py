"""The rollout against its formula in float64, and which steps carry gradient."""

import itertools

import torch

from flow_grpo.diffusers_patch.rollout import ode_steps, rollout
from flow_grpo.diffusers_patch.step import step_coefficients

LEVELS = [1.0, 0.7, 0.4, 0.0]
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NOISY = [step_coefficients("dance", a, b, 0.5) for a, b in itertools.pairwise(LEVELS)]


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


def gradient(**options) -> torch.Tensor:
    """Of the sum of x_0 with respect to a weight that every velocity is multiplied by."""
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    steps = rollout(lambda x, sigma: weight * torch.tanh(x), X, LEVELS, ode_steps(LEVELS), enable_grad=True, **options)
    (found,) = torch.autograd.grad(list(steps)[-1].next_latents.sum(), weight)
    return found


def test_every_step_is_affine_with_fresh_noise_of_its_image():
    noise, x = generators(), X
    taken = list(rollout(lambda x, sigma: sigma * x, X, LEVELS, NOISY, generators=generators()))
    for i, (step, sigma) in enumerate(zip(NOISY, LEVELS, strict=False)):
        torch.testing.assert_close(taken[i].mean, step.a * x + step.b * sigma * x, rtol=1e-14, atol=0)
        z = torch.stack([torch.randn(X.shape[1:], generator=g, dtype=torch.float64) for g in noise])
        x = step.a * x + step.b * sigma * x + step.s * z
        torch.testing.assert_close(taken[i].next_latents, x, rtol=1e-13, atol=1e-13)


def test_without_gradient_no_step_keeps_a_graph():
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    steps = list(rollout(lambda x, sigma: weight * x, X, LEVELS, ode_steps(LEVELS)))
    assert not any(step.velocity.requires_grad or step.next_latents.requires_grad for step in steps)


def test_detached_inputs_leave_the_linear_path_alone():
    x, by_hand = X, torch.zeros((), dtype=torch.float64)
    for step in ode_steps(LEVELS):
        by_hand = by_hand + step.b * torch.tanh(x).sum()
        x = x + step.b * 0.3 * torch.tanh(x)
    torch.testing.assert_close(gradient(detach=True), by_hand, rtol=1e-12, atol=0)
    assert not torch.isclose(gradient(detach=False), by_hand, rtol=1e-3)  # the broken twin


def test_only_trained_steps_carry_gradient():
    parts = [gradient(detach=True, trained_steps=(i,)) for i in range(3)]
    torch.testing.assert_close(sum(parts), gradient(detach=True), rtol=1e-12, atol=0)
    assert all(part != 0 for part in parts)


def test_the_callers_gradient_mode_is_left_alone():
    for _ in rollout(lambda x, sigma: x, X, LEVELS, ode_steps(LEVELS)):
        assert torch.is_grad_enabled()
