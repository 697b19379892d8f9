"""MATH 5: the likelihoods that GRPO's ratio may be made of."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from config.grpo import get_config
from flow_grpo import divergence
from flow_grpo.diffusers_patch.sd3_pipeline_with_logprob import pipeline_with_logprob
from flow_grpo.entropy import DivergenceEstimator, draw_probes
from flow_grpo.errors import TrainingStopped
from flow_grpo.likelihood_ratio import (
    CfmLikelihood,
    OdePathLikelihood,
    OdeStepLikelihood,
    RatioKeys,
    SdeLikelihood,
)
from flow_grpo.loops import policy_gradient as grpo
from flow_grpo.loops.collect import epoch_prompts
from flow_grpo.losses import policy_loss
from flow_grpo.metrics import MeanMetrics
from flow_grpo.randomness import keyed_generator
from flow_grpo.types import Trajectory

EXACT = DivergenceEstimator(exact=True)
SHAPE, DIMS, STEPS = (1, 2, 3), 6, 5
KEYS = RatioKeys(seed=0, epoch=3, update=0, sample_ids=(0, 1, 2, 3))
SDE = SdeLikelihood("sde", 0.7)
FORMS = {
    "sde": SDE,
    "ode_step, 1 probe": OdeStepLikelihood(DivergenceEstimator()),
    "ode_step, 4 probes": OdeStepLikelihood(DivergenceEstimator(num_probes=4)),
    "ode_step, exact": OdeStepLikelihood(EXACT),
    "ode_path, 1 probe": OdePathLikelihood(DivergenceEstimator()),
    "ode_path, 4 probes": OdePathLikelihood(DivergenceEstimator(num_probes=4)),
    "ode_path, exact": OdePathLikelihood(EXACT),
    "cfm, 1 draw": CfmLikelihood(1),
    "cfm, 4 draws": CfmLikelihood(4),
}
OPTIONS = [
    *[(form, probes) for form in ("ode_step", "ode_path") for probes in (1, 4, 0)],  # 0: the exact trace
    ("cfm", 1),
    ("cfm", 4),
]


# --- a tiny network in float64 ---------------------------------------------------------------------------


def weights(seed: int = 0) -> Tensor:
    """Of `net`, one vector."""
    generator = torch.Generator().manual_seed(seed)
    return 0.4 * torch.randn(2 * DIMS * DIMS + DIMS, generator=generator, dtype=torch.float64)


def net(theta: Tensor):
    """A velocity with a full Jacobian that changes from point to point and with the noise level."""
    first, bias, second = theta.split([DIMS * DIMS, DIMS, DIMS * DIMS])

    def velocity(x: Tensor, sigma: float) -> Tensor:
        hidden = torch.tanh(x.flatten(1) @ first.view(DIMS, DIMS) + (1 + sigma) * bias)
        return (hidden @ second.view(DIMS, DIMS) + 0.3 * x.flatten(1)).view_as(x)

    return velocity


def levels(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def rollout(velocity, steps: int = STEPS) -> Trajectory:
    """Four images in float64."""
    generators = [keyed_generator(0, "noise", i) for i in range(4)]
    noise = torch.stack([torch.randn(SHAPE, generator=g, dtype=torch.float64) for g in generators])
    return pipeline_with_logprob(velocity, noise, levels(steps), sde_type="sde", noise_level=0.7, generators=generators)


def gradient(function, theta: Tensor) -> Tensor:
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


def difference(function, theta: Tensor, direction: Tensor, h: float = 1e-5) -> Tensor:
    """Central difference along a direction."""
    with torch.no_grad():
        return (function(theta + h * direction) - function(theta - h * direction)) / (2 * h)


def log_p(theta: Tensor, x: Tensor, sigmas: Tensor, transport: bool = True) -> Tensor:
    """log p_theta(x_0) / D summed over images, from Jacobians alone; without transport the path does not move."""
    velocity, total = net(theta), x.new_zeros(())
    for sigma, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        at = x if transport else x.detach()
        for row in at:
            jacobian = torch.autograd.functional.jacobian(
                lambda y, sigma=sigma: velocity(y[None], sigma)[0], row, create_graph=True
            )
            total = total + (after - sigma) * jacobian.view(DIMS, DIMS).trace()
        x = x + (after - sigma) * velocity(at, sigma)
    if transport:
        total = total + torch.distributions.Normal(0.0, 1.0).log_prob(x).sum()
    return total / DIMS


@pytest.mark.parametrize("name", FORMS)
def test_the_gradient_of_every_form_equals_finite_differences_in_float64(name):
    form, theta = FORMS[name], weights()
    trajectory = rollout(net(theta))
    direction = weights(seed=1)
    for slot in range(form.slots(trajectory)):

        def log_prob(at, slot=slot):
            return form.score(net(at), trajectory, KEYS, slot).log_prob.sum()

        expected = difference(log_prob, theta, direction)
        torch.testing.assert_close(gradient(log_prob, theta) @ direction, expected, rtol=1e-6, atol=1e-9)
        assert expected.abs() > 1e-4


def test_the_gradient_of_ode_path_is_that_of_log_p_theta_computed_from_jacobians():
    form, theta, direction = OdePathLikelihood(EXACT), weights(), weights(seed=1)
    trajectory = rollout(net(theta))
    x_0, sigmas = trajectory.final_latents, trajectory.sigmas.flip(0)
    value = form.score(net(theta), trajectory, KEYS, 0).log_prob.sum()
    torch.testing.assert_close(value, log_p(theta, x_0, sigmas), rtol=1e-10, atol=0)
    found = gradient(lambda at: form.score(net(at), trajectory, KEYS, 0).log_prob.sum(), theta)
    expected = difference(lambda at: log_p(at, x_0, sigmas), theta, direction)
    torch.testing.assert_close(found @ direction, expected, rtol=1e-6, atol=1e-9)
    dropped = difference(lambda at: log_p(at, x_0, sigmas, transport=False), theta, direction)
    assert (dropped - expected).abs() > 0.1 * expected.abs()  # the broken twin


def test_ode_step_is_the_gradient_of_log_p_theta_without_its_transport():
    """On the ODE's own path, in 400 steps: all slots together come within 2 % of it, and far from the whole."""
    form, theta = OdeStepLikelihood(EXACT), weights()
    x_0 = rollout(net(theta)).final_latents[:1]
    rising, states = levels(400).flip(0), [x_0]
    for sigma, after in zip(rising[:-1].tolist(), rising[1:].tolist(), strict=True):
        states.append(states[-1] + (after - sigma) * net(theta)(states[-1], sigma))
    empty = x_0.new_zeros(1, 0)
    path = Trajectory(torch.stack(states[::-1], 1), rising.flip(0), tuple(range(400)), empty, empty)
    keys = replace(KEYS, sample_ids=(0,))

    def all_slots(at):
        return sum(form.score(net(at), path, keys, slot).log_prob.sum() for slot in range(400))

    found = gradient(all_slots, theta)
    dropped = gradient(lambda at: log_p(at, x_0, rising, transport=False), theta)
    whole = gradient(lambda at: log_p(at, x_0, rising), theta)
    assert (found - dropped).norm() < 0.02 * whole.norm()
    assert (found - whole).norm() > 0.3 * whole.norm()


@pytest.mark.parametrize("probes", [1, 4, 0])
def test_on_a_linear_flow_both_ode_forms_are_known_in_closed_form(probes):
    """v = theta x, div v = theta D, Rademacher probes exact: only `ode_path` has the term of the moving x_1."""
    estimator = DivergenceEstimator(num_probes=probes) if probes else EXACT
    theta = torch.tensor(0.7, dtype=torch.float64)
    trajectory = rollout(lambda x, sigma: theta * x)
    dt, growth = 1 / STEPS, 1 + theta / STEPS
    step_form, path_form = OdeStepLikelihood(estimator), OdePathLikelihood(estimator)

    def of_step(at):
        return step_form.score(lambda x, sigma: at * x, trajectory, KEYS, 2).log_prob

    torch.testing.assert_close(of_step(theta), (dt * theta).expand(4), rtol=1e-12, atol=0)
    slope = gradient(lambda at: of_step(at).sum(), theta)
    torch.testing.assert_close(slope, slope.new_tensor(4 * dt), rtol=1e-12, atol=0)
    assert (-slope - 4 * dt).abs() > 0.1  # the broken twin: dt with its sign flipped

    squared = trajectory.final_latents.square().flatten(1).sum(1)
    log_p_0 = theta - 0.5 * math.log(2 * math.pi) - 0.5 * squared * growth ** (2 * STEPS) / DIMS
    found = path_form.score(lambda x, sigma: theta * x, trajectory, KEYS, 0).log_prob
    torch.testing.assert_close(found, log_p_0, rtol=1e-12, atol=0)
    slope = gradient(lambda at: path_form.score(lambda x, sigma: at * x, trajectory, KEYS, 0).log_prob.sum(), theta)
    transport = -(squared * growth ** (2 * STEPS - 1) / DIMS).sum()
    torch.testing.assert_close(slope, 4 + transport, rtol=1e-12, atol=0)
    assert transport.abs() > 1


def test_the_flow_matching_loss_equals_an_independent_computation():
    trajectory, form = rollout(net(weights())), CfmLikelihood(3)
    found = form.score(lambda x, t: (0.5 + t) * x, trajectory, KEYS, 0).log_prob
    for image, sample in enumerate(KEYS.sample_ids):
        generator = keyed_generator(0, "ratio noise", 3, sample)
        x_0, losses = trajectory.final_latents[image].flatten().tolist(), []
        for t in form.times(KEYS):
            e = torch.randn(SHAPE, generator=generator).double().flatten().tolist()
            errors = [(0.5 + t) * ((1 - t) * x + t * n) - (n - x) for x, n in zip(x_0, e, strict=True)]
            losses.append(sum(error**2 for error in errors) / DIMS)
        assert -found[image].item() == pytest.approx(sum(losses) / 3, rel=1e-12)


def test_the_times_of_cfm_fill_their_strata_and_are_an_updates_own():
    form = CfmLikelihood(8)
    drawn = [form.times(replace(KEYS, update=update)) for update in range(50)]
    assert all(k / 8 <= t <= (k + 1) / 8 for times in drawn for k, t in enumerate(times))
    assert len({times[0] for times in drawn}) == 50
    assert form.times(replace(KEYS, sample_ids=(7,))) == form.times(KEYS)
    assert sum(times[0] for times in drawn) / 50 == pytest.approx(1 / 16, abs=0.02)


@pytest.mark.parametrize("name", [name for name in FORMS if "exact" not in name])
def test_an_images_likelihood_does_not_depend_on_its_minibatch(name):
    form, velocity = FORMS[name], net(weights())
    trajectory = rollout(velocity)
    whole = form.score(velocity, trajectory, KEYS, 0).log_prob
    part = form.score(velocity, trajectory[[2, 3]], replace(KEYS, sample_ids=(2, 3)), 0).log_prob
    torch.testing.assert_close(part, whole[2:], rtol=1e-12, atol=1e-14)
    if name != "sde":  # the broken twin: probes keyed by the place in the minibatch
        moved = form.score(velocity, trajectory[[2, 3]], replace(KEYS, sample_ids=(0, 1)), 0).log_prob
        assert (moved - whole[2:]).abs().min() > 1e-6


# --- a random tiny SD3 -----------------------------------------------------------------------------------


def experience_of(parts):
    """An epoch's rollouts, with their likelihoods under the sampling weights."""
    batch = epoch_prompts(parts.prompts, parts.settings.plan, parts.settings.config.seed, 0, 0)
    return grpo.collect(parts.policy, batch, parts.reward, parts.settings, parts.run, MeanMetrics())


def minibatch_of(parts, experience):
    return grpo._minibatch(parts.policy, experience, torch.arange(8), parts.settings.config)


def perturb(policy, scale: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter += scale * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def small(config):
    """Latents of 16 dimensions, for the sake of the exact trace."""
    config.resolution = 8
    return config


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize(("ratio", "probes"), OPTIONS)
def test_at_the_sampling_weights_every_ratio_is_exactly_one_and_nothing_is_clipped(
    small, build, ratio, probes, guidance
):
    small.train.ratio, small.train.ratio_probes, small.sample.guidance_scale = ratio, probes, guidance
    parts = build(small)
    perturb(parts.policy)
    experience = experience_of(parts)
    assert experience.old_log_probs.shape == (8, 4 if ratio == "ode_step" else 1)
    for slot in range(experience.old_log_probs.shape[1]):
        terms = grpo.step_loss(minibatch_of(parts, experience), slot, parts.settings.config)
        assert terms["ratio_error"].item() == 0.0
        assert terms["clip_fraction"].item() == 0.0
        assert terms["loss"].requires_grad


@pytest.mark.parametrize(("ratio", "probes"), [option for option in OPTIONS if option[1] > 0])
def test_with_fresh_probes_on_the_new_side_the_ratio_is_not_one(small, build, ratio, probes):
    small.train.ratio, small.train.ratio_probes = ratio, probes
    parts = build(small)
    minibatch = minibatch_of(parts, experience_of(parts))
    fresh = replace(minibatch, keys=replace(minibatch.keys, seed=7))
    terms = grpo.step_loss(fresh, 0, parts.settings.config)
    assert terms["ratio_error"] > 1e-3
    assert terms["clip_fraction"] > 0.5


def test_an_unreduced_tensor_against_a_mean_is_clipped_nearly_always_before_any_update(small, build):
    """The original experiment's comparison: z (J^T z) of each dimension on one side, their mean on the other."""
    small.train.ratio = "ode_step"
    parts = build(small)
    minibatch = minibatch_of(parts, experience_of(parts))
    x, sigmas = minibatch.trajectory.latents[:, 1], minibatch.trajectory.sigmas
    probes = draw_probes(x, DivergenceEstimator(), minibatch.keys.generators("ratio probe", 1))
    x = x.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        v = minibatch.velocity(x, sigmas[1].item())
    unreduced = (sigmas[1] - sigmas[2]) * (probes[0] * torch.autograd.grad(v, x, probes[0])[0]).flatten(1)  # (B, D)
    old = minibatch.old_log_probs[:, 1]
    torch.testing.assert_close(unreduced.double().mean(1), old, rtol=1e-5, atol=1e-7)
    compared = policy_loss((unreduced - old[:, None]).flatten(), torch.ones(8 * 16), clip_range=1e-4)
    assert compared.clip_fraction > 0.98
    assert grpo.step_loss(minibatch, 1, parts.settings.config)["clip_fraction"] == 0.0


@pytest.mark.parametrize("name", ["tiny_sd3_ode_step", "tiny_sd3_ode_path", "tiny_sd3_cfm"])
def test_an_epoch_of_every_recipe_changes_the_weights_and_counts_its_forwards(config, build, name):
    train = get_config(name).train
    config.train.ratio, config.train.ratio_probes, config.train.updates_per_epoch = train.ratio, train.ratio_probes, 2
    parts = build(config)
    before = [p.detach().clone() for p in parts.policy.trainable]
    metrics = [parts.train(grpo) for _ in range(2)]  # LoRA's A moves from the second update on
    assert all(not torch.equal(a, b) for a, b in zip(parts.policy.trainable, before, strict=True))
    for epoch in metrics:
        assert epoch["ratio_error"] < 1e-6
        assert epoch["skipped_updates"] == 0.0
        assert epoch["ratio_std"] > 0  # of the second update
    evaluations = train.ratio_probes if train.ratio == "cfm" else 4
    assert parts.policy.network_evaluations == 2 * 8 * (4 + 2 * evaluations)


@pytest.mark.parametrize("ratio", ["ode_step", "ode_path", "cfm"])
def test_the_gradient_of_an_update_raises_the_likelihood_of_what_was_rewarded(config, build, ratio):
    """At ratio 1 it is that of -A log p, averaged over images and slots, in whatever minibatches."""
    config.train.ratio, config.train.max_grad_norm, config.train.learning_rate = ratio, 1e9, 1e-12
    grads = []
    for size in (8, 3):
        config.train.batch_size, config.run_name = size, f"run-{size}"
        parts = build(config)
        perturb(parts.policy)
        experience = experience_of(parts)
        parts.policy.optimizer.step = lambda: None
        parts.policy.optimizer.zero_grad = lambda: None
        parts.train(grpo)
        grads.append(torch.cat([p.grad.flatten() for p in parts.policy.trainable]))
    for parameter in parts.policy.trainable:
        parameter.grad = None
    minibatch = minibatch_of(parts, experience)
    slots = range(experience.old_log_probs.shape[1])
    total = sum((experience.advantages * minibatch.score(slot).log_prob).mean() for slot in slots)
    (-total / len(slots)).backward()
    expected = torch.cat([p.grad.flatten() for p in parts.policy.trainable])
    for found in grads:
        assert ((found - expected).norm() / expected.norm()).item() < 1e-4


def test_only_the_slots_that_some_pass_trains_are_scored_beforehand(config, build):
    config.train.ratio, config.train.timestep_fraction, config.train.num_inner_epochs = "ode_step", 0.25, 2
    config.train.updates_per_epoch = 2
    parts = build(config)
    experience = experience_of(parts)
    for update in range(2):
        asked_for = {grpo._trained_slots(experience, parts.settings, inner, update)[0] for inner in range(2)}
        scored = experience.old_log_probs[update::2].isfinite()
        assert {slot for slot in range(4) if scored[:, slot].all()} == asked_for
        assert {slot for slot in range(4) if scored[:, slot].any()} == asked_for
    assert parts.train(grpo)["skipped_updates"] == 0.0


def test_ratio_std_is_the_standard_deviation_of_log_r_over_images_and_slots(config, build, monkeypatch):
    config.train.batch_size, config.train.num_inner_epochs = 3, 2
    parts = build(config)
    seen: list[Tensor] = []

    def spy(log_ratio, *arguments):
        seen.append(log_ratio.detach())
        return policy_loss(log_ratio, *arguments)

    monkeypatch.setattr(grpo, "policy_loss", spy)
    metrics = parts.train(grpo)
    values = torch.cat(seen)
    assert len(values) == 2 * 8 * 4
    assert metrics["ratio_std"] == pytest.approx(values.double().std(correction=0).item(), rel=1e-4)
    assert metrics["log_ratio_mean"] == pytest.approx(values.double().mean().item(), rel=1e-3, abs=1e-10)


@pytest.mark.parametrize("ratio", ["ode_step", "ode_path"])
def test_an_exact_trace_that_is_too_large_stops_with_one_sentence(config, build, monkeypatch, ratio):
    config.train.ratio, config.train.ratio_probes = ratio, 0
    monkeypatch.setattr(divergence, "MAX_JACOBIAN_BYTES", 1000)
    with pytest.raises(TrainingStopped, match=r"ratio_probes = 0 with config.train.batch_size .* 256 dimensions"):
        build(config).train(grpo)


def test_a_velocity_that_is_not_finite_stops_with_one_sentence(config, build):
    config.train.ratio = "ode_path"
    parts = build(config)
    experience = experience_of(parts)
    with torch.no_grad():
        parts.policy.trainable[0].fill_(math.nan)
    with pytest.raises(TrainingStopped, match=r"step 0 of 4: the velocity is not finite"):
        minibatch_of(parts, experience).score(0)
