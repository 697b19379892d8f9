"""Flows whose velocity, density and entropy are known exactly (MATH 4), in float64, and a small MLP to learn them.

x_s = (1 - s) x_0 + s e, e ~ N(0, I); the exact velocity is v(x, s) = E[e - x_0 | x_s = x]. Entropies and log-densities
are in nats, summed over the D dimensions; B points in a batch, K components in a mixture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class GaussianFlow:
    """Data N(m, S): with C = (1 - s)^2 S + s^2 I, v = (s I - (1 - s) S) C^-1 (x - (1 - s) m) - m."""

    mean: Tensor  # (D,)
    covariance: Tensor  # (D, D)

    @staticmethod
    def random(dims: int, seed: int = 0) -> GaussianFlow:
        """A full covariance with eigenvalues between 0.1 and about 2.1, and a standard normal mean."""
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(dims, dims, generator=generator, dtype=torch.float64) / math.sqrt(dims)
        covariance = 0.5 * root @ root.T + 0.1 * torch.eye(dims, dtype=torch.float64)
        return GaussianFlow(torch.randn(dims, generator=generator, dtype=torch.float64), covariance)

    @staticmethod
    def isotropic(dims: int, std: float) -> GaussianFlow:
        """N(0, std^2 I)."""
        return GaussianFlow(torch.zeros(dims, dtype=torch.float64), std**2 * torch.eye(dims, dtype=torch.float64))

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (D,) and eigenvectors (D, D) of S, in whose basis every J is diagonal."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return values, vectors

    def _gain(self, sigma: float) -> Tensor:
        """The eigenvalues of J, (D,)."""
        values = self._eigen[0]
        return (sigma - (1 - sigma) * values) / ((1 - sigma) ** 2 * values + sigma**2)

    def slope(self, sigma: float) -> Tensor:
        """J = dv/dx, (D, D): the same at every x."""
        vectors = self._eigen[1]
        return vectors * self._gain(sigma) @ vectors.T

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """v, (B, D)."""
        vectors = self._eigen[1]
        return (x - (1 - sigma) * self.mean) @ vectors * self._gain(sigma) @ vectors.T - self.mean

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws of x_0, (count, D)."""
        z = torch.randn(count, len(self.mean), generator=generator, dtype=torch.float64)
        return self.mean + z @ torch.linalg.cholesky(self.covariance).T

    @property
    def distribution(self) -> torch.distributions.MultivariateNormal:
        """The law of x_0."""
        return torch.distributions.MultivariateNormal(self.mean, self.covariance)

    def log_density(self, x: Tensor) -> Tensor:
        """log p of x_0: (B, D) -> (B,)."""
        return self.distribution.log_prob(x)

    def tilted(self, slope: Tensor) -> GaussianFlow:
        """The law p exp(b . x), normalised: N(m + S b, S). `slope`: b, (D,)."""
        return GaussianFlow(self.mean + self.covariance @ slope, self.covariance)

    @property
    def entropy(self) -> float:
        """D/2 log(2 pi e) + 1/2 log det S."""
        return 0.5 * len(self.mean) * math.log(2 * math.pi * math.e) + 0.5 * self.covariance.logdet().item()


@dataclass(frozen=True)
class UniformFlow:
    """Data uniform on [-h, h]^D: x_0 given x is normal(x / (1 - s), s / (1 - s)) truncated to [-h, h].

    At s = 0 the density has a jump and v a singularity. A path must stop at some s > 0, where x_s / (1 - s) is the
    uniform plus normal noise of standard deviation s / (1 - s): its density and entropy are given here too.
    """

    half_width: float

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """v, (B, D), for s > 0."""
        if sigma >= 1:
            return x  # x tells nothing of x_0, whose mean is 0
        normal = torch.distributions.Normal(0.0, 1.0)
        mean, std = x / (1 - sigma), sigma / (1 - sigma)
        low, high = (-self.half_width - mean) / std, (self.half_width - mean) / std
        mass = normal.cdf(high) - normal.cdf(low)
        shift = (normal.log_prob(low).exp() - normal.log_prob(high).exp()) / mass.clamp(min=1e-300)
        return (x - (mean + std * shift)) / sigma

    def sample(self, count: int, dims: int, generator: torch.Generator) -> Tensor:
        """Draws of x_0, (count, D)."""
        return self.half_width * (2 * torch.rand(count, dims, generator=generator, dtype=torch.float64) - 1)

    def log_density(self, y: Tensor, sigma: float) -> Tensor:
        """log p of y = x_s / (1 - s), s > 0: (B, D) -> (B,)."""
        return self._marginal(y, sigma).log().sum(1)

    def _marginal(self, y: Tensor, sigma: float) -> Tensor:
        """The density of each coordinate of y = x_s / (1 - s)."""
        std = sigma / (1 - sigma)
        inside = (self.half_width - y.abs()) / std  # the nearer edge: its tail is computed without cancellation
        other = (self.half_width + y.abs()) / std
        return (torch.special.ndtr(inside) - torch.special.ndtr(-other)) / (2 * self.half_width)

    def entropy(self, dims: int, sigma: float = 0.0) -> float:
        """D log(2h), of x_0; for s > 0 that of x_s / (1 - s), by the trapezoidal rule."""
        if sigma == 0:
            return dims * math.log(2 * self.half_width)
        std = sigma / (1 - sigma)
        edge = self.half_width + 10 * std
        y = torch.arange(-edge, edge, std / 64, dtype=torch.float64)
        density = self._marginal(y, sigma)
        return -dims * torch.trapezoid(density * density.clamp(min=1e-300).log(), y).item()


@dataclass(frozen=True)
class MixtureFlow:
    """Data drawn from sum_k w_k N(m_k, t_k^2 I).

    x_s is the mixture of N((1 - s) m_k, c_k I), c_k = (1 - s)^2 t_k^2 + s^2, so v = sum_k r_k(x) v_k(x), r_k being the
    responsibilities and v_k the velocity of component k alone.
    """

    weights: Tensor  # (K,), summing to 1
    means: Tensor  # (K, D)
    stds: Tensor  # (K,): t_k

    @staticmethod
    def ring(components: int, radius: float, std: float) -> MixtureFlow:
        """Components on a circle, D = 2, whose weights rise from the first to three times as much at the last."""
        angles = torch.arange(components, dtype=torch.float64) * (2 * math.pi / components)
        weights = torch.linspace(1, 3, components, dtype=torch.float64)
        means = radius * torch.stack([angles.cos(), angles.sin()], 1)
        return MixtureFlow(weights / weights.sum(), means, torch.full_like(weights, std))

    @staticmethod
    def random(components: int, dims: int, seed: int = 0) -> MixtureFlow:
        """Standard normal means, standard deviations from 0.3 to 0.7, weights as in `ring`."""
        means = torch.randn(components, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        weights = torch.linspace(1, 3, components, dtype=torch.float64)
        return MixtureFlow(weights / weights.sum(), means, torch.linspace(0.3, 0.7, components, dtype=torch.float64))

    def _log_joint(self, x: Tensor, sigma: float) -> Tensor:
        """log(w_k N(x; (1 - s) m_k, c_k I)), (B, K)."""
        variance = (1 - sigma) ** 2 * self.stds**2 + sigma**2  # (K,)
        distance = (x[:, None] - (1 - sigma) * self.means).square().sum(2)  # (B, K)
        log_scale = 0.5 * x.shape[1] * (2 * math.pi * variance).log()
        return self.weights.log() - log_scale - 0.5 * distance / variance

    @property
    def mean(self) -> Tensor:
        """E x_0, (D,)."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """Of x_0, (D, D): within the components, and between them."""
        apart = self.means - self.mean  # (K, D)
        within = (self.weights @ self.stds**2) * torch.eye(len(self.mean), dtype=self.means.dtype)
        return within + apart.T * self.weights @ apart

    def tilted(self, slope: Tensor) -> MixtureFlow:
        """The law p exp(b . x), normalised: m_k + t_k^2 b, and w_k exp(b . m_k + t_k^2 b . b / 2). `slope`: b, (D,)."""
        variance = self.stds**2
        log_weights = self.weights.log() + self.means @ slope + variance * slope.square().sum() / 2
        return MixtureFlow(log_weights.softmax(0), self.means + variance[:, None] * slope, self.stds)

    def responsibilities(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """r_k, the probability that x_s came from component k: (B, D) -> (B, K). Their mean over the law is w_k."""
        return self._log_joint(x, sigma).softmax(1)

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """v, (B, D)."""
        responsibility = self.responsibilities(x, sigma)  # (B, K)
        variance = (1 - sigma) ** 2 * self.stds**2 + sigma**2
        gain = (sigma - (1 - sigma) * self.stds**2) / variance  # v_k = gain_k (x - (1 - s) m_k) - m_k
        constant = (1 + (1 - sigma) * gain)[:, None] * self.means  # (K, D)
        return (responsibility @ gain)[:, None] * x - responsibility @ constant

    def log_density(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """log p of x_s: (B, D) -> (B,)."""
        return self._log_joint(x, sigma).logsumexp(1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws of x_0, (count, D)."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[component] + self.stds[component, None] * z

    def entropy_by_integration(self, spacing: float = 0.1) -> float:
        """-integral of p log p by the trapezoidal rule, which converges exponentially for such a p.

        Args:
            spacing: of the grid, in units of the smallest t_k.

        Raises:
            ValueError: D > 2, where the grid would be too large.
        """
        dims = self.means.shape[1]
        if dims > 2:
            raise ValueError(f"the grid of {dims} dimensions is too large; integration is for 1 or 2")
        margin, step = 12 * self.stds.max().item(), spacing * self.stds.min().item()
        low, high = (self.means.amin(0) - margin).tolist(), (self.means.amax(0) + margin).tolist()
        axes = [torch.arange(a, b, step, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
        points = torch.cartesian_prod(*axes).view(-1, dims)
        total = 0.0
        for part in points.split(100_000):
            log_p = self.log_density(part)
            total -= (log_p.exp() * log_p).sum().item()
        return total * step**dims

    def entropy_by_sampling(self, count: int, generator: torch.Generator) -> tuple[float, float]:
        """-mean log p over draws from p, with its standard error."""
        values = torch.cat([-self.log_density(part) for part in self.sample(count, generator).split(50_000)])
        return values.mean().item(), values.std().item() / math.sqrt(count)


class MlpFlow(nn.Module):
    """A velocity learned from samples: an MLP of x and of sines and cosines of s."""

    def __init__(self, dims: int, width: int = 128) -> None:
        super().__init__()
        layers = [nn.Linear(dims + 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dims))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """v: (B, D), (B, 1) -> (B, D)."""
        phase = sigma * sigma.new_tensor([0.5, 1.0, 2.0, 4.0]) * math.pi
        return self.layers(torch.cat([x, phase.sin(), phase.cos()], 1))

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """v, (B, D), at one s for the whole batch."""
        return self(x, x.new_full((len(x), 1), sigma))


def fit_mlp(
    sample: Callable[[int, torch.Generator], Tensor],
    dims: int,
    steps: int,
    generator: torch.Generator,
    batch: int = 512,
    learning_rate: float = 3e-3,
) -> MlpFlow:
    """Conditional flow matching (arXiv 2210.02747): least squares of v(x_s, s) on e - x_0, s uniform on [0, 1].

    Args:
        sample: draws of x_0, (count, generator) -> (count, D).
        generator: of the data and the noise; one draw of it seeds the first weights.

    Returns:
        The trained network, in float32, its weights frozen. Adam, with cosine decay of the learning rate to zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        model = MlpFlow(dims)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x_0 = sample(batch, generator).float()
        noise = torch.randn(batch, dims, generator=generator)
        sigma = torch.rand(batch, 1, generator=generator)
        loss = (model((1 - sigma) * x_0 + sigma * noise, sigma) - (noise - x_0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)
