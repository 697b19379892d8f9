"""The divergence of a velocity field at one point: exact, or by Hutchinson's estimator (arXiv 1810.01367).

div v = tr J, J = dv/dx, is computed exactly (D products with J) or estimated by E[z^T J z] over random probes z.
B samples in a batch, D dimensions each, n probes. `flow_grpo.entropy`, which integrates it along a path, hands on
everything public here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from flow_grpo.diffusers_patch.velocity import VelocityFn

DISTRIBUTIONS = ("rademacher", "gaussian", "orthogonal")
PRODUCTS = ("vjp", "jvp", "difference")


class NonFiniteError(ValueError):
    """A velocity or divergence is infinite or nan: the weights behind it are broken, not the arguments."""


@dataclass(frozen=True)
class DivergenceEstimator:
    """How div v is found.

    Attributes:
        exact: all D products with the unit vectors, in reverse mode; of the other fields, only `chunk` and `budget` are
            read.
        num_probes: n, averaged.
        distribution: "rademacher" (+-1: the lowest variance of independent probes), "gaussian", or "orthogonal" (n <= D
            orthogonal directions of length sqrt(D), uniformly rotated; at n = D the exact trace).
        product: how J meets a probe. "vjp": reverse mode, exact, works with fused attention; shares its forward with v.
            "jvp": forward mode, exact, needs attention that has one. "difference": (v(x + h z) - v(x - h z)) / 2h.
        step: h of "difference", for float32 or better: in half precision the rounding of v swamps it.
        hold: one draw of probes for the whole path. It is unbiased too, but its errors add up along the path.
        chunk: products of "vjp" (and of `exact`) evaluated at once; 0: one after the other, in the least memory, as
            those of "jvp" and "difference" always are.
        budget: bytes, instead of `chunk`: as many products of "vjp" at once as fit, and at least one. What one product
            adds is estimated as three times x (probe, contiguous copy, product) and, for the gradients inside the
            network, twice what its forward saves (a gradient in, one out), weights included. Not counted: what does not
            grow with the chunk (the forward itself, all n probes and products, the Jacobians of `exact`), and scratch
            memory of the kernels.
        agreed: what follows from whether all is finite here. Where a forward waits for other processes, it asks them,
            so that all go on, or none.
    """

    exact: bool = False
    num_probes: int = 1
    distribution: str = "rademacher"
    product: str = "vjp"
    step: float = 1e-3
    hold: bool = False
    chunk: int = 0
    budget: int = 0
    agreed: Callable[[bool], bool] = bool

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise ValueError(f"num_probes is {self.num_probes}; it must be at least 1")
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution is {self.distribution!r}; it must be one of {DISTRIBUTIONS}")
        if self.product not in PRODUCTS:
            raise ValueError(f"product is {self.product!r}; it must be one of {PRODUCTS}")
        if not self.step > 0:
            raise ValueError(f"step is {self.step}; it must be positive")
        for name in ("chunk", "budget"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.chunk and self.budget:
            raise ValueError(f"chunk is {self.chunk} and budget is {self.budget}; only one of them can be given")


@dataclass(frozen=True)
class Divergence:
    """div v at one point of a batch."""

    velocity: Tensor  # (B, ...): v(x, sigma), from the same forward where the product allows it
    per_probe: Tensor  # (n, B): z^T J z of each probe; (1, B) if exact
    squared: Tensor | None = None  # (n, B): z^T J J z of each probe, whose mean is tr(J^2)

    @property
    def mean(self) -> Tensor:
        """The estimate, (B,)."""
        return self.per_probe.mean(0)


# --- div v at one point --------------------------------------------------------------------------------


def draw_probes(like: Tensor, estimator: DivergenceEstimator, generators: Sequence[torch.Generator]) -> Tensor:
    """The n probes of each sample, with E[z z^T] = I: (n, B, ...), drawn on the CPU from each sample's own generator.

    Raises:
        ValueError: more orthogonal probes than dimensions; another number of generators than samples.
    """
    if len(generators) != len(like):
        raise ValueError(f"{len(like)} samples need as many probe generators, not {len(generators)}")
    n, shape = estimator.num_probes, like.shape[1:]
    if estimator.distribution == "orthogonal":
        draws = [_orthogonal(n, shape.numel(), generator).view(n, *shape) for generator in generators]
    elif estimator.distribution == "gaussian":
        draws = [torch.randn(n, *shape, generator=generator) for generator in generators]
    else:
        draws = [2.0 * torch.randint(2, (n, *shape), generator=generator) - 1 for generator in generators]
    return torch.stack(draws, 1).to(like)


def _orthogonal(n: int, dims: int, generator: torch.Generator) -> Tensor:
    """n orthogonal vectors of length sqrt(D), their directions uniform on the sphere: (n, D)."""
    if n > dims:
        raise ValueError(f"num_probes is {n}, but only {dims} directions are orthogonal in {dims} dimensions")
    q, r = torch.linalg.qr(torch.randn(dims, n, generator=generator))
    return math.sqrt(dims) * (q * r.diagonal().sign()).T


def divergence(
    velocity: VelocityFn,
    x: Tensor,
    sigma: float,
    estimator: DivergenceEstimator,
    probes: Tensor | None = None,
    *,
    squared: bool = False,
    enable_grad: bool = False,
) -> Divergence:
    """v and div v at x.

    Args:
        x: (B, ...), float32 or float64.
        probes: (n, B, ...), as `draw_probes` gives; not read if exact.
        squared: estimate tr(J^2) too, with as many products again.
        enable_grad: keep the graph, so that the result can be differentiated in x and in the weights behind v.

    Raises:
        ValueError: v has another shape than x.
        NonFiniteError: v or its divergence is not finite.
        MemoryError: exact, and the Jacobians of the batch would take more than 4 GiB.
        NotImplementedError: "jvp" through an operation without forward mode; `enable_grad` through one that has no
            second derivative.
    """
    if estimator.exact:
        _check_memory(x)
        units = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)  # (D, D)
        probes = units.view(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
    assert probes is not None
    v, multiply = _jacobian_products(velocity, x, sigma, estimator, enable_grad)
    with torch.set_grad_enabled(enable_grad):
        products = multiply(probes)  # (n, B, ...): J^T z, or J z
        if enable_grad:
            _check_differentiable(products)
        if estimator.exact:
            per_probe, square = _traces(products.flatten(2), squared)
        else:
            per_probe = _dot(probes, products)
            square = _dot(probes, multiply(products)) if squared else None
    finite = all(torch.isfinite(found).all() for found in (per_probe, square) if found is not None)
    if not estimator.agreed(finite):
        raise NonFiniteError(f"the divergence is not finite at sigma = {sigma}")
    return Divergence(v, per_probe, square)


def _traces(jacobian: Tensor, squared: bool) -> tuple[Tensor, Tensor | None]:
    """tr J and, if asked, tr(J^2) in float64, without a copy of the Jacobians (D, B, D): (1, B) each."""
    trace = jacobian.diagonal(dim1=0, dim2=2).double().sum(1)[None]
    if not squared:
        return trace, None
    return trace, torch.stack([_dot(row[None], jacobian[:, :, i].T[None]) for i, row in enumerate(jacobian)]).sum(0)


MAX_JACOBIAN_BYTES = 4 * 2**30


def _check_memory(x: Tensor) -> None:
    """The rows of the Jacobians exist twice while they are joined; the unit vectors are one matrix more."""
    dims = x[0].numel()
    needed = (2 * len(x) + 1) * dims**2 * x.element_size()
    if needed > MAX_JACOBIAN_BYTES:
        raise MemoryError(
            f"the exact divergence of {len(x)} samples of {dims} dimensions needs {needed / 2**30:.1f} GiB for their "
            f"Jacobians, more than {MAX_JACOBIAN_BYTES / 2**30:.0f} GiB: use smaller batches, or random probes"
        )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over the dimensions of each sample, accumulated in float64: (n, B, ...), (n, B, ...) -> (n, B)."""
    return (a.double() * b.double()).flatten(2).sum(2)


Products = Callable[[Tensor], Tensor]  # (n, B, ...) -> (n, B, ...)


def _jacobian_products(
    velocity: VelocityFn, x: Tensor, sigma: float, estimator: DivergenceEstimator, enable_grad: bool
) -> tuple[Tensor, Products]:
    """v, and the function that multiplies J (or its transpose: the traces are the same) with probes."""
    if estimator.product == "vjp" or estimator.exact:
        return _reverse_mode(velocity, x, sigma, estimator, enable_grad)
    with torch.set_grad_enabled(enable_grad):
        v = _checked(velocity(x, sigma), x, sigma, estimator)
    if estimator.product == "jvp":
        return v, lambda probes: torch.stack([_forward_mode(velocity, x, sigma, z) for z in probes])
    h = estimator.step
    return v, lambda probes: torch.stack(
        [(velocity(x + h * z, sigma) - velocity(x - h * z, sigma)) / (2 * h) for z in probes]
    )


def _reverse_mode(
    velocity: VelocityFn, x: Tensor, sigma: float, estimator: DivergenceEstimator, enable_grad: bool
) -> tuple[Tensor, Products]:
    """J^T z by backpropagation; one forward serves v and every product."""
    saved = _SavedBytes() if estimator.budget else nullcontext()
    with torch.enable_grad(), saved:
        x = x if enable_grad and x.requires_grad else x.detach().requires_grad_()
        v = _checked(velocity(x, sigma), x, sigma, estimator)
    chunk = estimator.chunk
    if isinstance(saved, _SavedBytes):
        chunk = estimator.budget // (3 * x.nbytes + 2 * saved.count)

    def pull(z: Tensor, batched: bool) -> Tensor:
        options = {"retain_graph": True, "create_graph": enable_grad, "allow_unused": True}
        found = torch.autograd.grad(v, x, z.to(v.dtype), is_grads_batched=batched, **options)[0]
        return torch.zeros_like(z) if found is None else found  # a velocity that depends on weights, but not on x

    def multiply(probes: Tensor) -> Tensor:
        if not v.requires_grad:  # a velocity that depends on nothing
            return torch.zeros_like(probes)
        if chunk <= 1:
            return torch.stack([pull(z, batched=False) for z in probes])
        return torch.cat([pull(part.contiguous(), batched=True) for part in probes.split(chunk)])

    return (v if enable_grad else v.detach()), multiply


class _SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that a forward inside the block saves for its backward."""

    def __init__(self) -> None:
        self.count = 0
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        self.count += tensor.nbytes
        return tensor.detach()  # an operation that keeps its own output, and with it itself, would never be freed


def _check_differentiable(products: Tensor) -> None:
    """Autograd notices a missing second derivative only in the caller's backward: look for its mark in the graph."""
    waiting, seen = [products.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("NotImplemented"):
            raise NotImplementedError(
                "this velocity has an operation without a second derivative, as fused attention is, and enable_grad "
                "needs it: run inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            )
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]


def _forward_mode(velocity: VelocityFn, x: Tensor, sigma: float, z: Tensor) -> Tensor:
    """J z by forward-mode differentiation: (B, ...)."""
    try:
        return torch.func.jvp(lambda y: velocity(y, sigma), (x.contiguous(),), (z.contiguous(),))[1]
    except NotImplementedError as error:
        raise NotImplementedError(
            "this velocity has an operation without forward mode, as fused attention is: use product='vjp', or run "
            "inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        ) from error


def _checked(v: Tensor, x: Tensor, sigma: float, estimator: DivergenceEstimator) -> Tensor:
    if v.shape != x.shape:
        raise ValueError(f"the velocity has shape {tuple(v.shape)}; it must be that of x, {tuple(x.shape)}")
    if not estimator.agreed(bool(torch.isfinite(v).all())):
        raise NonFiniteError(f"the velocity is not finite at sigma = {sigma}")
    return v
