"""A small velocity in float64 and what the gradient tests share: an objective, and how far two gradients are apart."""

from __future__ import annotations

import torch

from flow_grpo.loops.reward_gradient import Objective

SIGMAS = torch.linspace(1, 0, 7, dtype=torch.float64).tolist()


class TinyNet(torch.nn.Module):
    """A two-layer velocity with a conditional and an unconditional half, guided at 4.5."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"first": (16, 8), "second": (8, 16), "prompt": (8,)}
        for name, shape in shapes.items():
            weight = 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)
            setattr(self, name, torch.nn.Parameter(weight))
        with torch.no_grad():
            self.first += shift

    def branch(self, x, sigma, prompt):
        return torch.tanh((x + prompt) @ self.first.T + sigma) @ self.second.T

    def forward(self, x, sigma):
        uncond, cond = self.branch(x, sigma, 0 * self.prompt), self.branch(x, sigma, self.prompt)
        return uncond + 4.5 * (cond - uncond)

    def gradient(self):
        """Of every parameter, flat."""
        return torch.cat([p.grad.flatten() for p in self.parameters()])


def noise():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def generators():
    return [torch.Generator().manual_seed(10 + i) for i in range(5)]


def step_noise(draws):
    """What a stochastic step draws from one generator per image."""
    return torch.stack([torch.randn(1, 8, generator=g, dtype=torch.float64)[0] for g in draws])


def losses(x0):
    """-R of each image."""
    return -(torch.sin(x0).sum(1) - 0.1 * x0.square().sum(1))


BASE = TinyNet(shift=0.1).requires_grad_(False)


def base_product(x, sigma, cotangent):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        v = BASE(x, sigma)
        return v.detach(), torch.autograd.grad(v, x, cotangent)[0]


def objective_of(net, beta=0.0):
    """With the base model as the reference."""
    return Objective(net, losses, BASE, base_product, beta)


def gradient_by(method, beta=0.0):
    """The gradient of every parameter, flat, and the value, of method(objective, latents, generators)."""
    net = TinyNet()
    value = method(objective_of(net, beta), noise(), generators())
    return net.gradient(), value


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()
