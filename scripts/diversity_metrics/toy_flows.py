"""Flows whose velocity, density and entropy are known exactly (MATH 4); float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianFlow:
    """Data N(m, S): with C = (1 - s)^2 S + s^2 I, v = (s I - (1 - s) S) C^-1 (x - (1 - s) m) - m."""

    mean: Tensor  # (D,)
    covariance: Tensor  # (D, D)

    @staticmethod
    def random(dims: int, seed: int = 0) -> GaussianFlow:
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(dims, dims, generator=generator, dtype=torch.float64) / math.sqrt(dims)
        covariance = 0.5 * root @ root.T + 0.1 * torch.eye(dims, dtype=torch.float64)
        return GaussianFlow(torch.randn(dims, generator=generator, dtype=torch.float64), covariance)

    def slope(self, sigma: float) -> Tensor:
        """J = dv/dx, (D, D): the same at every x."""
        eye = torch.eye(len(self.mean), dtype=torch.float64)
        mixed = (1 - sigma) ** 2 * self.covariance + sigma**2 * eye
        return torch.linalg.solve(mixed, sigma * eye - (1 - sigma) * self.covariance)

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        return (x - (1 - sigma) * self.mean) @ self.slope(sigma).T - self.mean

    @property
    def distribution(self) -> torch.distributions.MultivariateNormal:
        return torch.distributions.MultivariateNormal(self.mean, self.covariance)

    @property
    def entropy(self) -> float:
        return 0.5 * len(self.mean) * math.log(2 * math.pi * math.e) + 0.5 * self.covariance.logdet().item()


@dataclass(frozen=True)
class UniformFlow:
    """Data uniform on [-h, h]^D: x_0 given x is normal(x / (1 - s), s / (1 - s)) truncated to [-h, h]."""

    half_width: float

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        if sigma >= 1:
            return x  # x tells nothing of x_0, whose mean is 0
        normal = torch.distributions.Normal(0.0, 1.0)
        mean, std = x / (1 - sigma), sigma / (1 - sigma)
        low, high = (-self.half_width - mean) / std, (self.half_width - mean) / std
        mass = normal.cdf(high) - normal.cdf(low)
        shift = (normal.log_prob(low).exp() - normal.log_prob(high).exp()) / mass.clamp(min=1e-300)
        return (x - (mean + std * shift)) / sigma

    def entropy(self, dims: int) -> float:
        return dims * math.log(2 * self.half_width)
