"""MATH 3 and 8: gradients through a detached chain, against autograd, closed forms and finite differences."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from flow_grpo.diffusers_patch.step import step_coefficients
from flow_grpo.loops import drtune
from flow_grpo.loops.drtune import (
    Chain,
    chain_gradient,
    equally_spaced,
    executed_steps,
    lagrange,
    lagrange_weights,
    last_step,
    run_chain,
    sparse,
)
from tests.loops.tiny_net import (
    BASE,
    SIGMAS,
    TinyNet,
    generators,
    gradient_by,
    losses,
    noise,
    objective_of,
    relative,
    step_noise,
)

KINDS = ("ode", "sde", "dance", "cps", "memoryless")


def executed(kind, early_stop=0, generator=None):
    generator = generator or torch.Generator().manual_seed(0)
    return executed_steps(SIGMAS, sde_type=kind, noise_level=0.7, early_stop=early_stop, generator=generator)


def chain_of(kind, num_train_steps=3, early_stop=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return equally_spaced(executed(kind, early_stop, generator), num_train_steps, generator)


def gradient(two_pass, chain, beta=0.0):
    return gradient_by(partial(chain_gradient, chain=chain, two_pass=two_pass), beta)


def autograd_gradient(chain, *, detach=True, beta=0.0, gains=None):
    """The same, by an independent rollout that autograd differentiates as a whole.

    A gain multiplies the gradient of a step's velocity and leaves its value.
    """
    net = TinyNet()
    x, draws, total = noise(), generators(), 0.0
    for i, (sigma, step) in enumerate(zip(chain.sigmas, chain.steps, strict=True)):
        seen = x.detach() if detach else x
        v = net(seen, sigma)
        if i not in chain.train_steps:
            v = v.detach() if detach else v
        elif beta:
            total = total + beta * (v - BASE(seen, sigma)).square().mean() / len(chain.train_steps)
        if gains is not None and i in gains:
            v = gains[i] * v + (1 - gains[i]) * v.detach()
        x = step.a * x + step.b * v
        if step.s > 0:
            x = x + step.s * step_noise(draws)
    (total + losses(x).mean()).backward()
    return net.gradient()


CASES = list(itertools.product(KINDS, (1, 3, 6), (0, 1, 2)))
POSSIBLE = [(kind, k, m) for kind, k, m in CASES if k <= 6 - max(m - 1, 0)]


@pytest.mark.parametrize(("kind", "k", "m"), POSSIBLE)
def test_two_pass_equals_one_pass_equals_autograd(kind, k, m):
    """With guidance, K < T, early stop and every kind of step; also with the KL penalty."""
    for seed, beta in itertools.product(range(3), (0.0, 0.3)):
        chain = chain_of(kind, k, m, seed)
        reference = autograd_gradient(chain, beta=beta)
        assert relative(gradient(False, chain, beta)[0], reference) < 1e-10
        assert relative(gradient(True, chain, beta)[0], reference) < 1e-10


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_both_passes_report_the_same_loss_and_penalty(beta):
    chain = chain_of("sde", early_stop=2)
    (_, one), (_, two) = gradient(False, chain, beta), gradient(True, chain, beta)
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.terms["kl_penalty"], two.terms["kl_penalty"], rtol=1e-12, atol=1e-15)


def test_the_penalty_can_be_of_the_early_steps_alone():
    """Levels 1, 2/3 and 1/3 are trained: at 0.6 and above, two of the three count."""
    chain = next(c for c in (chain_of("ode", 3, seed=s) for s in range(9)) if c.train_steps == (0, 2, 4))
    net, whole = TinyNet(), gradient(True, chain)[0]
    objective = replace(objective_of(net, 0.3), kl_min_sigma=0.6)
    chain_gradient(objective, noise(), generators(), chain=chain, two_pass=True)
    early = replace(chain, train_steps=(0, 2))
    penalty = (autograd_gradient(early, beta=0.3) - autograd_gradient(early)) * 2 / 3
    assert relative(net.gradient(), whole + penalty) < 1e-9


def test_without_detaching_the_input_the_gradient_differs():
    chain = chain_of("ode", num_train_steps=6)
    assert relative(autograd_gradient(chain, detach=False), gradient(False, chain)[0]) > 0.05


def test_finite_differences_of_the_true_loss_agree_with_the_undetached_gradient():
    chain = chain_of("sde", num_train_steps=6)
    net = TinyNet()

    def loss(shift):
        with torch.no_grad():
            net.second += shift
            value = losses(run_chain(net, noise(), chain, generators()).x0).mean()
            net.second -= shift
        return value

    direction = torch.randn(8, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    h = 1e-5
    difference = (loss(h * direction) - loss(-h * direction)) / (2 * h)
    full = autograd_gradient(chain, detach=False)
    exact = (full[128:256].view(8, 16) * direction).sum()  # parameters in order: first (128), second (128), prompt
    detached = (gradient(False, chain)[0][128:256].view(8, 16) * direction).sum()
    torch.testing.assert_close(difference, exact, rtol=1e-7, atol=0)
    assert (detached - difference).abs() > 0.01 * difference.abs()


def test_the_weight_without_the_later_steps_factors_is_wrong_for_stochastic_steps(monkeypatch):
    chain = chain_of("sde", num_train_steps=6)
    monkeypatch.setattr(Chain, "weight", lambda self, i: self.steps[i].b)
    assert relative(gradient(True, chain)[0], autograd_gradient(chain)) > 0.01


def test_the_weight_of_an_ode_step_is_its_dt():
    chain = chain_of("ode")
    for i in chain.train_steps:
        assert chain.weight(i) == pytest.approx(SIGMAS[i + 1] - SIGMAS[i], abs=1e-15)


# --- the drawn chain -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_trained_steps_are_equally_spaced_and_every_fitting_offset_occurs(k):
    stride, seen = 6 // k, set()
    for seed in range(200):
        steps = chain_of("ode", k, seed=seed).train_steps
        assert len(steps) == k
        assert all(b - a == stride for a, b in itertools.pairwise(steps))
        seen.add(steps[0])
    assert seen == set(range(6 - (k - 1) * stride))


def test_sampling_stops_uniformly_in_the_last_m_steps_and_trains_only_executed_ones():
    lengths = []
    for seed in range(600):
        chain = chain_of("ode", 2, early_stop=3, seed=seed)
        lengths.append(len(chain.steps))
        assert max(chain.train_steps) < len(chain.steps)
    for length in (4, 5, 6):
        assert lengths.count(length) / 600 == pytest.approx(1 / 3, abs=0.06)
    assert set(lengths) == {4, 5, 6}


@pytest.mark.parametrize("kind", KINDS)
def test_early_stop_decodes_x0_hat(kind):
    chain = next(c for c in (chain_of(kind, 1, 3, seed) for seed in range(50)) if len(c.steps) == 4)
    net, draws = TinyNet(), generators()
    x = noise()
    for sigma, after in itertools.pairwise(SIGMAS[:4]):
        step = step_coefficients(kind, sigma, after, 0.7)
        x = step.a * x + step.b * net(x, sigma)
        if step.s > 0:
            x = x + step.s * step_noise(draws)
    x0_hat = x - SIGMAS[3] * net(x, SIGMAS[3])
    torch.testing.assert_close(run_chain(net, noise(), chain, generators()).x0, x0_hat, rtol=1e-12, atol=1e-12)


# --- FlowBP and ReFL -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("two", [False, True])
def test_sparse_steps_have_the_gradient_of_autograd_times_their_gain(kind, two):
    for seed in range(4):
        chain = sparse(executed(kind), 3, bias=1.0, gain=0.5, generator=torch.Generator().manual_seed(seed))
        reference = autograd_gradient(chain, gains=dict(zip(chain.train_steps, chain.gains, strict=True)))
        assert relative(gradient(two, chain)[0], reference) < 1e-10
        assert relative(gradient(two, replace(chain, gains=None))[0], reference) > 0.05


@pytest.mark.parametrize(("gain", "share"), [(0.0, None), (1.0, 1.0)])
def test_the_gain_says_how_far_the_trained_steps_stand_for_the_whole_way(gain, share):
    chain = sparse(executed("ode"), 2, bias=1.0, gain=gain, generator=torch.Generator().manual_seed(0))
    expected = sum(SIGMAS[i + 1] - SIGMAS[i] for i in chain.train_steps) if share is None else -share
    assert sum(map(chain.weight, chain.train_steps)) == pytest.approx(expected, abs=1e-12)


def successive(n, count, bias):
    """The probability of every set of `count` steps drawn one after another, each with a weight of (i + 1)^bias."""
    weights, found = [(i + 1) ** bias for i in range(n)], Counter()
    for order in itertools.permutations(range(n), count):
        probability, left = 1.0, sum(weights)
        for i in order:
            probability, left = probability * weights[i] / left, left - weights[i]
        found[tuple(sorted(order))] += probability
    return found


@pytest.mark.parametrize(("bias", "fits"), [(1.0, True), (0.0, False)])
def test_sparse_steps_are_drawn_without_replacement_with_rising_weights(bias, fits):
    """The broken twin draws all alike."""
    generator, drawn = torch.Generator().manual_seed(0), Counter()
    for _ in range(4000):
        drawn[sparse(executed("ode"), 2, bias=bias, gain=0.5, generator=generator).train_steps] += 1
    expected = successive(6, 2, 1.0)
    observed = [drawn[steps] for steps in expected]
    p_value = stats.chisquare(observed, [4000 * p for p in expected.values()]).pvalue
    assert (p_value > 1e-3) == fits


def test_the_expected_sparse_gradient_is_that_of_all_sets_by_their_probability():
    chain = executed("ode")
    exact = 0.0
    for steps, probability in successive(6, 2, 1.0).items():
        way = sum(SIGMAS[i + 1] - SIGMAS[i] for i in steps)
        g = 1 + 0.5 * (-1 / way - 1)
        exact = exact + probability * g * autograd_gradient(replace(chain, train_steps=steps))
    generator, total = torch.Generator().manual_seed(1), 0.0
    for _ in range(600):
        total = total + gradient(True, sparse(chain, 2, 1.0, 0.5, generator))[0]
    assert relative(total / 600, exact) < 0.1


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_lagrange_weights_integrate_polynomials_exactly(degree):
    nodes = [0.9, 0.5, 0.2]
    weights = lagrange_weights(nodes, 0.9, 0.0)
    found = sum(w * node**degree for w, node in zip(weights, nodes, strict=True))
    assert found == pytest.approx(-(0.9 ** (degree + 1)) / (degree + 1), rel=1e-13)


def test_a_lagrange_leap_has_the_gradient_of_its_trained_supports():
    for seed in range(5):
        chain = lagrange(executed("ode"), 3, 2, bias=1.0, generator=torch.Generator().manual_seed(seed))
        net, state = TinyNet(), run_chain(TinyNet(), noise(), executed("ode"))
        x0 = state.x0.detach().requires_grad_()
        (slope,) = torch.autograd.grad(losses(x0).mean(), x0)
        x, states = noise(), []
        with torch.no_grad():
            for i, sigma in enumerate(SIGMAS[:-1]):
                states.append(x)
                x = x + (SIGMAS[i + 1] - sigma) * net(x, sigma)
        sum((chain.weight(i) * slope * net(states[i], SIGMAS[i])).sum() for i in chain.train_steps).backward()
        assert relative(gradient(True, chain)[0], net.gradient()) < 1e-9
        assert len(chain.train_steps) == 2


def test_the_weights_of_a_lagrange_leap_are_those_of_its_three_supports():
    """By numerical integration of the polynomial through unit values."""
    generator = torch.Generator().manual_seed(3)
    chain = lagrange(executed("ode"), 3, 3, bias=1.0, generator=generator)
    nodes = [SIGMAS[i] for i in chain.train_steps]
    grid = np.linspace(nodes[0], 0, 20001)
    for j, i in enumerate(chain.train_steps):
        values = np.ones_like(grid)
        for k in range(3):
            if k != j:
                values *= (grid - nodes[k]) / (nodes[j] - nodes[k])
        assert chain.weight(i) == pytest.approx(np.trapezoid(values, grid), rel=1e-6)


@pytest.mark.parametrize("two", [False, True])
def test_refl_has_the_gradient_of_the_reward_at_x0_hat_of_the_step_where_it_stops(two):
    for seed in range(6):
        chain = last_step(executed("ode", 3, torch.Generator().manual_seed(seed)))
        net, x, n = TinyNet(), noise(), len(chain.steps)
        with torch.no_grad():
            for i in range(n - 1):
                x = x + (SIGMAS[i + 1] - SIGMAS[i]) * net(x, SIGMAS[i])
        losses(x - SIGMAS[n - 1] * net(x, SIGMAS[n - 1])).mean().backward()
        assert relative(gradient(two, chain)[0], net.gradient()) < 1e-10
        assert relative(gradient(two, replace(chain, steps=executed("ode").steps[:n]))[0], net.gradient()) > 0.01 or (
            n == 6  # there the last Euler step is x0_hat
        )


# --- memory --------------------------------------------------------------------------------------------


def peak_of_saved(method):
    """The most bytes that autograd keeps at a time, of tensors that are not parameters."""
    held, peak = 0, 0

    class Kept:
        def __init__(self, tensor):
            nonlocal held, peak
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            held += self.size
            peak = max(peak, held)

        def __del__(self):
            nonlocal held
            held -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        gradient_by(method)
    return peak


def test_the_memory_of_two_passes_does_not_grow_with_the_trained_steps_and_that_of_one_does():
    peaks = {
        (two, k): peak_of_saved(partial(chain_gradient, chain=chain_of("ode", k), two_pass=two))
        for two, k in itertools.product((False, True), (1, 6))
    }
    assert peaks[True, 6] == peaks[True, 1]
    assert peaks[False, 6] > 3 * peaks[False, 1]


def test_the_memory_of_two_passes_does_not_grow_with_the_steps():
    peaks = []
    for steps in (6, 48):
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
        generator = torch.Generator().manual_seed(0)
        chain = executed_steps(sigmas, sde_type="ode", noise_level=0.0, generator=generator)
        chain = equally_spaced(chain, steps, generator)
        peaks.append(peak_of_saved(partial(chain_gradient, chain=chain, two_pass=True)))
    assert peaks[0] == peaks[1]


# --- the epoch -----------------------------------------------------------------------------------------


def lora_state(policy):
    return [p.detach().clone() for p in policy.trainable]


def test_an_epoch_changes_every_lora_parameter_and_no_frozen_one(config, build):
    config.use_reward_gradient = True
    config.num_epochs = 3
    parts = build(config)
    modules = (parts.policy.transformer, parts.policy.vae, parts.policy.pipeline.text_encoder_3)
    frozen = {n: p.detach().clone() for m in modules for n, p in m.named_parameters() if not p.requires_grad}
    before = lora_state(parts.policy)
    for _ in range(3):  # B starts at zero: the gradient of A is zero until B has moved
        parts.train(drtune)
    after = {n: p for m in modules for n, p in m.named_parameters() if not p.requires_grad}
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert all(not torch.equal(a, b) for a, b in zip(lora_state(parts.policy), before, strict=True))


def test_two_passes_train_as_one_does_on_sd3(config, build):
    config.use_reward_gradient = True
    config.sample.guidance_scale = 4.5
    config.drtune.early_stop = 2
    config.train.beta = 0.1
    grads = []
    for two in (False, True):
        config.drtune.two_pass, config.run_name = two, f"run-{two}"
        parts = build(config)
        for p in parts.policy.trainable:  # away from B = 0, so that the KL counts
            p.data += 0.02
        parts.policy.optimizer.step = lambda: None
        parts.policy.optimizer.zero_grad = lambda: None
        parts.train(drtune)
        grads.append(torch.cat([p.grad.flatten() for p in parts.policy.trainable]))
    assert relative(grads[1], grads[0]) < 1e-4


def test_the_microbatch_size_does_not_change_the_update(config, build):
    config.use_reward_gradient = True
    states = []
    for size in (8, 3):
        config.train.batch_size, config.run_name = size, f"run-{size}"
        parts = build(config)
        parts.policy.optimizer.step = lambda: None
        parts.policy.optimizer.zero_grad = lambda: None
        parts.train(drtune)
        states.append(torch.cat([p.grad.flatten() for p in parts.policy.trainable]))
    assert relative(states[1], states[0]) < 1e-5


def test_a_dozen_updates_raise_the_reward(config, build):
    config.use_reward_gradient = True
    config.sample.num_image_per_prompt = 4
    config.train.learning_rate = 2e-2
    parts = build(config)
    rewards = [parts.train(drtune)["reward"] for _ in range(12)]
    assert min(rewards[-3:]) > max(rewards[:3]) + 0.001


def test_offloaded_rewards_and_a_checkpointed_decode_train_the_same(config, build):
    config.use_reward_gradient = True
    metrics = []
    for spared in (False, True):
        config.offload_rewards = config.pretrained.vae_checkpointing = spared
        config.run_name = f"run-{spared}"
        metrics.append(build(config).train(drtune))
    assert metrics[0]["grad_norm"] > 0
    assert metrics[0]["reward"] == pytest.approx(metrics[1]["reward"], rel=1e-5)
    assert metrics[0]["grad_norm"] == pytest.approx(metrics[1]["grad_norm"], rel=1e-4)
