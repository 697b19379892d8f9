"""MATH 3: the reward gradient by one pass and by two, against autograd, closed forms and finite differences."""

from __future__ import annotations

import itertools

import pytest
import torch

from flow_grpo.diffusers_patch.step import step_coefficients
from flow_grpo.loops import reward_gradient as drtune
from flow_grpo.loops.reward_gradient import Chain, Objective, draw_chain, one_pass, run_chain, two_pass
from flow_grpo.losses import reward_loss, velocity_kl

SIGMAS = torch.linspace(1, 0, 7, dtype=torch.float64).tolist()
KINDS = ("ode", "sde", "dance", "cps")


class TinyNet(torch.nn.Module):
    """A two-layer velocity in float64 with a conditional and an unconditional half, guided at 4.5."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"first": (16, 8), "second": (8, 16), "prompt": (8,)}
        for name, shape in shapes.items():
            weight = 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)
            setattr(self, name, torch.nn.Parameter(weight))

    def branch(self, x, sigma, prompt):
        return torch.tanh((x + prompt) @ self.first.T + sigma) @ self.second.T

    def forward(self, x, sigma):
        uncond, cond = self.branch(x, sigma, 0 * self.prompt), self.branch(x, sigma, self.prompt)
        return uncond + 4.5 * (cond - uncond)


def noise():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def generators():
    return [torch.Generator().manual_seed(10 + i) for i in range(5)]


def loss_fn(x0):
    return reward_loss(torch.sin(x0).sum(1) - 0.1 * x0.square().sum(1))


def chain_of(kind, num_train_steps=3, early_stop=0, seed=0):
    return draw_chain(
        SIGMAS,
        sde_type=kind,
        noise_level=0.7,
        num_train_steps=num_train_steps,
        early_stop=early_stop,
        generator=torch.Generator().manual_seed(seed),
    )


def gradient(method, chain, penalty=False):
    """Gradient of every parameter, flat."""
    net, reference = TinyNet(), TinyNet()
    with torch.no_grad():
        reference.first += 0.1

    def kl(x, sigma, v):
        with torch.no_grad():
            v_ref = reference(x, sigma)
        return 0.3 * velocity_kl(v, v_ref)

    objective = Objective(net, loss_fn, kl if penalty else None)
    value = method(objective, noise(), chain, generators())
    return torch.cat([p.grad.flatten() for p in net.parameters()]), value


def autograd_gradient(chain, *, detach=True, penalty=False):
    """The same, by an independent rollout that autograd differentiates as a whole."""
    net, reference = TinyNet(), TinyNet()
    with torch.no_grad():
        reference.first += 0.1
    x, draws, total = noise(), generators(), 0.0
    for i, (sigma, step) in enumerate(zip(chain.sigmas, chain.steps, strict=True)):
        seen = x.detach() if detach else x
        v = net(seen, sigma)
        if i not in chain.train_steps:
            v = v.detach() if detach else v
        elif penalty:
            total = total + 0.3 * (v - reference(seen, sigma).detach()).square().mean() / len(chain.train_steps)
        x = step.a * x + step.b * v
        if step.s > 0:
            x = x + step.s * torch.stack([torch.randn(1, 8, generator=g, dtype=x.dtype)[0] for g in draws])
    (total + loss_fn(x)).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


CASES = list(itertools.product(KINDS, (1, 3, 6), (0, 1, 2)))
POSSIBLE = [(kind, k, m) for kind, k, m in CASES if k <= 6 - max(m - 1, 0)]


@pytest.mark.parametrize(("kind", "k", "m"), POSSIBLE)
def test_two_pass_equals_one_pass_equals_autograd(kind, k, m):
    """With guidance, K < T, early stop and every kind of step; also with the KL penalty."""
    for seed, penalty in itertools.product(range(3), (False, True)):
        chain = chain_of(kind, k, m, seed)
        reference = autograd_gradient(chain, penalty=penalty)
        assert relative(gradient(one_pass, chain, penalty)[0], reference) < 1e-10
        assert relative(gradient(two_pass, chain, penalty)[0], reference) < 1e-10


@pytest.mark.parametrize("penalty", [False, True])
def test_both_passes_report_the_same_loss_and_penalty(penalty):
    chain = chain_of("sde", early_stop=2)
    (_, one), (_, two) = gradient(one_pass, chain, penalty), gradient(two_pass, chain, penalty)
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.penalty, two.penalty, rtol=1e-12, atol=1e-15)


def test_without_detaching_the_input_the_gradient_differs():
    chain = chain_of("ode", num_train_steps=6)
    assert relative(autograd_gradient(chain, detach=False), gradient(one_pass, chain)[0]) > 0.05


def test_finite_differences_of_the_true_loss_agree_with_the_undetached_gradient():
    chain = chain_of("sde", num_train_steps=6)
    net = TinyNet()

    def loss(shift):
        with torch.no_grad():
            net.second += shift
            value = loss_fn(run_chain(net, noise(), chain, generators()).x0)
            net.second -= shift
        return value

    direction = torch.randn(8, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    h = 1e-5
    difference = (loss(h * direction) - loss(-h * direction)) / (2 * h)
    full = autograd_gradient(chain, detach=False)
    exact = (full[128:256].view(8, 16) * direction).sum()  # parameters in order: first (128), second (128), prompt
    detached = (gradient(one_pass, chain)[0][128:256].view(8, 16) * direction).sum()
    torch.testing.assert_close(difference, exact, rtol=1e-7, atol=0)
    assert (detached - difference).abs() > 0.01 * difference.abs()


def test_the_weight_without_the_later_steps_factors_is_wrong_for_stochastic_steps(monkeypatch):
    chain = chain_of("sde", num_train_steps=6)
    monkeypatch.setattr(Chain, "weight", lambda self, i: self.steps[i].b)
    assert relative(gradient(two_pass, chain)[0], autograd_gradient(chain)) > 0.01


def test_the_weight_of_an_ode_step_is_its_dt():
    chain = chain_of("ode")
    for i in range(6):
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
            x = x + step.s * torch.stack([torch.randn(1, 8, generator=g, dtype=x.dtype)[0] for g in draws])
    x0_hat = x - SIGMAS[3] * net(x, SIGMAS[3])
    torch.testing.assert_close(run_chain(net, noise(), chain, generators()).x0, x0_hat, rtol=1e-12, atol=1e-12)


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
