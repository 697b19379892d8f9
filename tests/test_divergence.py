"""The divergence at a point, against closed forms; the memory it takes; what it refuses."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flow_grpo import divergence as module
from flow_grpo.entropy import DivergenceEstimator, divergence, draw_probes
from flow_grpo.randomness import keyed_generator
from tests.velocities import EXACT, FLOW, PeakMemory, curved, generators, noise


def exact_trace(velocity, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """tr J sample by sample, by torch's own Jacobian."""
    jacobians = [torch.autograd.functional.jacobian(lambda y: velocity(y[None], sigma)[0], row) for row in x]
    return torch.stack([j.view(row.numel(), -1).trace() for j, row in zip(jacobians, x, strict=True)])


# --- the divergence at a point -------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, 3])
def test_the_exact_divergence_is_the_trace_of_the_jacobian(chunk):
    x = noise(4)
    found = divergence(curved, x, 0.4, DivergenceEstimator(exact=True, chunk=chunk))
    torch.testing.assert_close(found.mean, exact_trace(curved, x, 0.4), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.velocity, curved(x, 0.4), rtol=0, atol=0)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "orthogonal"])
def test_vjp_and_jvp_agree_for_every_kind_of_probe(distribution):
    x = noise(4)
    reverse = DivergenceEstimator(num_probes=5, distribution=distribution)
    forward = DivergenceEstimator(num_probes=5, distribution=distribution, product="jvp")
    probes = draw_probes(x, reverse, generators(4)(0))
    a, b = (divergence(curved, x, 0.4, estimator, probes).per_probe for estimator in (reverse, forward))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_vectorised_products_equal_those_one_by_one():
    x = noise(4)
    probes = draw_probes(x, DivergenceEstimator(num_probes=5), generators(4)(0))
    one, many = (
        divergence(curved, x, 0.4, DivergenceEstimator(num_probes=5, chunk=chunk), probes).per_probe for chunk in (0, 2)
    )
    torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-12)


def test_central_differences_agree_in_float32_within_1e_3():
    x = noise(4).float()
    probes = draw_probes(x, DivergenceEstimator(num_probes=5), generators(4)(0))
    difference = divergence(curved, x, 0.4, DivergenceEstimator(num_probes=5, product="difference"), probes)
    exact = divergence(curved, x, 0.4, DivergenceEstimator(num_probes=5), probes)
    torch.testing.assert_close(difference.per_probe, exact.per_probe, rtol=1e-3, atol=1e-3)


def test_central_differences_in_bfloat16_are_garbage():
    x = noise(4).float()
    probes = draw_probes(x, DivergenceEstimator(num_probes=5), generators(4)(0))
    half = divergence(
        lambda y, sigma: curved(y.bfloat16(), sigma).float(), x, 0.4,
        DivergenceEstimator(num_probes=5, product="difference"), probes,
    )  # fmt: skip
    exact = divergence(curved, x, 0.4, DivergenceEstimator(num_probes=5), probes)
    assert (half.per_probe - exact.per_probe).abs().max() > 1


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "orthogonal"])
def test_every_kind_of_probe_is_unbiased(distribution):
    """4,000 estimates at one point: their mean is within four standard errors of the trace."""
    x = noise(1).expand(4000, 8)
    estimator = DivergenceEstimator(num_probes=2, distribution=distribution)
    found = divergence(curved, x, 0.4, estimator, draw_probes(x, estimator, generators(4000)(0))).mean
    error = found.mean() - exact_trace(curved, x[:1], 0.4)[0]
    assert error.abs() < 4 * found.std() / math.sqrt(4000)


def test_as_many_orthogonal_probes_as_dimensions_give_the_exact_trace():
    x = noise(3)
    estimator = DivergenceEstimator(num_probes=8, distribution="orthogonal")
    found = divergence(curved, x, 0.4, estimator, draw_probes(x, estimator, generators(3)(0)))
    torch.testing.assert_close(found.mean, exact_trace(curved, x, 0.4), rtol=1e-5, atol=1e-5)


def test_gaussian_probes_vary_more_than_rademacher_ones():
    """Var = 2 |sym J|_F^2 for Gaussian probes; without the diagonal's part for Rademacher."""
    x = noise(1).expand(4000, 8)
    variance = {}
    for distribution in ("rademacher", "gaussian"):
        estimator = DivergenceEstimator(distribution=distribution)
        probes = draw_probes(x, estimator, generators(4000)(0))
        variance[distribution] = divergence(curved, x, 0.4, estimator, probes).mean.var().item()
    jacobian = torch.autograd.functional.jacobian(lambda y: curved(y[None], 0.4)[0], x[0])
    symmetric = (jacobian + jacobian.T) / 2
    whole, diagonal = symmetric.square().sum().item(), symmetric.diagonal().square().sum().item()
    assert variance["gaussian"] == pytest.approx(2 * whole, rel=0.1)
    assert variance["rademacher"] == pytest.approx(2 * (whole - diagonal), rel=0.1)


def test_the_squared_products_average_to_the_trace_of_j_squared():
    x, jacobian = noise(1).expand(4000, 8), FLOW.slope(0.4)
    expected = (jacobian @ jacobian).trace()
    exact = divergence(FLOW.velocity, x[:2], 0.4, EXACT, squared=True)
    torch.testing.assert_close(exact.squared[0], expected.expand(2), rtol=1e-10, atol=0)
    for product in ("vjp", "jvp"):
        estimator = DivergenceEstimator(product=product)
        probes = draw_probes(x, estimator, generators(4000)(0))
        found = divergence(FLOW.velocity, x, 0.4, estimator, probes, squared=True).squared[0]
        assert (found.mean() - expected).abs() < 4 * found.std() / math.sqrt(4000)


SKEWED = torch.randn(8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def skewed(x, sigma):
    """J = SKEWED, far from symmetric."""
    return x @ SKEWED.T


@pytest.mark.parametrize("product", ["vjp", "jvp"])
def test_the_trace_of_j_squared_is_not_that_of_j_transposed_j(product):
    x, expected = noise(1).expand(4000, 8), (SKEWED @ SKEWED).trace()
    exact = divergence(skewed, x[:3], 0.4, EXACT, squared=True)
    torch.testing.assert_close(exact.squared, expected.expand(1, 3), rtol=1e-10, atol=0)
    estimator = DivergenceEstimator(product=product)
    found = divergence(skewed, x, 0.4, estimator, draw_probes(x, estimator, generators(4000)(0)), squared=True).squared
    allowed = 4 * found.std() / math.sqrt(4000)
    assert (found.mean() - expected).abs() < allowed
    assert (found.mean() - SKEWED.square().sum()).abs() > 4 * allowed  # the twin


@pytest.mark.parametrize("estimator", [EXACT, DivergenceEstimator(num_probes=2)])
def test_large_terms_that_cancel_in_float32_do_not_swallow_the_small(estimator):
    x, slope = torch.zeros(1, 3), torch.tensor([1e8, 1.0, -1e8])
    found = divergence(lambda y, s: y * slope, x, 0.4, estimator, draw_probes(x, estimator, generators(1)(0)))
    assert found.mean.tolist() == [1.0]
    assert slope.sum() == 0.0  # the twin


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("enable_grad", [False, True])
def test_a_velocity_that_does_not_depend_on_x_has_no_divergence(chunk, enable_grad):
    x, theta = noise(2), torch.ones(2, 8, dtype=torch.float64, requires_grad=True)
    estimator = DivergenceEstimator(num_probes=3, chunk=chunk)
    probes = draw_probes(x, estimator, generators(2)(0))
    for velocity in (lambda y, s: torch.full_like(y, 0.3), lambda y, s: theta * s):
        found = divergence(velocity, x, 0.4, estimator, probes, enable_grad=enable_grad)
        assert (found.per_probe == 0).all()
        assert found.velocity.shape == x.shape


def test_the_velocity_carries_a_graph_only_if_asked():
    x, theta = noise(2), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    kept, dropped = (
        divergence(lambda y, s: theta * curved(y, s), x, 0.4, EXACT, enable_grad=asked) for asked in (True, False)
    )
    assert kept.velocity.requires_grad
    assert kept.mean.requires_grad
    assert not dropped.velocity.requires_grad
    assert not dropped.mean.requires_grad


def test_orthogonal_probes_point_everywhere_alike():
    """Mean 0 and covariance I over 4,000 draws: a plain QR decomposition leaves a sign that LAPACK chose."""
    like = noise(1, 4).expand(4000, 4)
    probes = draw_probes(like, DivergenceEstimator(num_probes=2, distribution="orthogonal"), generators(4000)(0))
    assert probes.mean(1).abs().max() < 5 / math.sqrt(4000)
    second_moments = torch.einsum("nbi,nbj->nij", probes, probes) / 4000
    assert (second_moments - torch.eye(4, dtype=torch.float64)).abs().max() < 0.1
    torch.testing.assert_close((probes[0] * probes[1]).sum(1), torch.zeros(4000).double(), rtol=0, atol=1e-5)


# --- memory --------------------------------------------------------------------------------------------


class Wide(torch.nn.Module):
    """A network whose activations are much larger than x."""

    def __init__(self):
        super().__init__()
        self.into, self.out = torch.nn.Linear(16, 1024), torch.nn.Linear(1024, 16)

    def forward(self, x, sigma):
        return self.out(torch.tanh(self.into(x)))


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("chunk", [0, 64])
def test_the_exact_trace_takes_the_memory_that_it_states(squared, chunk, monkeypatch):
    x, weight = noise(8, 64).float(), noise(64, 64).float()
    stated = (2 * 8 + 1) * 64**2 * 4
    with PeakMemory() as memory:
        divergence(lambda y, s: y @ weight, x, 0.5, DivergenceEstimator(exact=True, chunk=chunk), squared=squared)
    assert 0.9 < memory.peak / stated < 1.1
    monkeypatch.setattr(module, "MAX_JACOBIAN_BYTES", stated)
    divergence(lambda y, s: y @ weight, x, 0.5, EXACT)
    monkeypatch.setattr(module, "MAX_JACOBIAN_BYTES", stated - 1)
    with pytest.raises(MemoryError, match="8 samples of 64 dimensions"):
        divergence(lambda y, s: y @ weight, x, 0.5, EXACT)


def test_chunks_fit_their_budget():
    """Beyond what one product after the other takes; twice the memory gives larger chunks, and the same numbers."""
    network, x = Wide(), noise(64, 16).float()
    probes = draw_probes(x, DivergenceEstimator(num_probes=32), generators(64)(0))

    def run(**options):
        with PeakMemory() as memory:
            found = divergence(network, x, 0.5, DivergenceEstimator(num_probes=32, **options), probes)
        return memory.peak, found.per_probe

    least, expected = run()
    peaks = []
    for budget in (2**22, 2**23, 2**24):
        peak, found = run(budget=budget)
        assert peak - least < budget
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        peaks.append(peak)
    assert least < peaks[0] < peaks[1] < peaks[2]
    assert run(chunk=32)[0] - least > 2**22  # the twin: all at once
    assert run(budget=1)[0] == least


@pytest.mark.parametrize("enable_grad", [False, True])
@pytest.mark.parametrize("options", [{"budget": 2**24}, {"chunk": 4}, {}], ids=["budget", "chunk", "one-by-one"])
def test_what_a_forward_saves_is_given_back(options, enable_grad):
    network, x, made = Wide(), noise(64, 16).float().requires_grad_(), []
    network.out.register_forward_hook(lambda module, inputs, output: made.append(weakref.ref(inputs[0])))
    estimator = DivergenceEstimator(num_probes=4, **options)
    probes = draw_probes(x, estimator, generators(64)(0))
    found = divergence(network, x, 0.5, estimator, probes, enable_grad=enable_grad)
    del found
    assert [reference() for reference in made] == [None]


# --- a guided SD3 --------------------------------------------------------------------------------------


@pytest.fixture
def guided(config, build):
    """The velocity of the random tiny SD3 at guidance 4.5, and noise: two samples of 256 dimensions."""
    policy = build(config).policy
    x = policy.noise([keyed_generator(0, "x", i) for i in range(2)])
    return policy.velocity(policy.encode(["a bag", "a red coat"]), 4.5), x


def test_probes_agree_with_the_exact_trace_of_a_guided_sd3(guided):
    velocity, x = guided
    exact = divergence(velocity, x, 0.6, EXACT).mean
    estimator = DivergenceEstimator(num_probes=256, distribution="orthogonal")
    found = divergence(velocity, x, 0.6, estimator, draw_probes(x, estimator, generators(2)(0)))
    torch.testing.assert_close(found.mean, exact, rtol=1e-4, atol=1e-3)


def test_jvp_works_with_plain_attention(guided):
    velocity, x = guided
    probes = draw_probes(x, DivergenceEstimator(), generators(2)(0))
    reverse = divergence(velocity, x, 0.6, DivergenceEstimator(), probes)
    with sdpa_kernel(SDPBackend.MATH):
        forward = divergence(velocity, x, 0.6, DivergenceEstimator(product="jvp"), probes)
    torch.testing.assert_close(forward.per_probe, reverse.per_probe, rtol=1e-3, atol=1e-3)


def test_jvp_through_fused_attention_says_what_to_use(guided):
    velocity, x = guided
    probes = draw_probes(x, DivergenceEstimator(), generators(2)(0))
    with pytest.raises(NotImplementedError, match="product='vjp'"):
        divergence(velocity, x, 0.6, DivergenceEstimator(product="jvp"), probes)


def test_a_gradient_through_fused_attention_says_what_to_use(guided):
    velocity, x = guided
    weight = torch.tensor(1.0, requires_grad=True)
    probes = draw_probes(x, DivergenceEstimator(), generators(2)(0))

    def gradient():
        found = divergence(
            lambda y, s: weight * velocity(y, s), x, 0.6, DivergenceEstimator(), probes, enable_grad=True
        )
        return torch.autograd.grad(found.mean.sum(), weight)[0]

    with pytest.raises(NotImplementedError, match=r"second derivative.*SDPBackend\.MATH"):
        gradient()
    divergence(velocity, x, 0.6, DivergenceEstimator(), probes)  # without a gradient it works
    with sdpa_kernel(SDPBackend.MATH):
        assert gradient().item() != 0


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_probes": 0}, "num_probes is 0"),
        ({"distribution": "uniform"}, "'uniform'"),
        ({"product": "adjoint"}, "'adjoint'"),
        ({"step": 0.0}, r"step is 0\.0"),
        ({"chunk": -1}, "chunk is -1"),
        ({"budget": -1}, "budget is -1"),
        ({"chunk": 2, "budget": 2}, "only one of them"),
    ],
)
def test_an_impossible_estimator_is_refused(change, part):
    with pytest.raises(ValueError, match=part):
        DivergenceEstimator(**change)


def test_every_sample_needs_a_generator_of_its_own():
    with pytest.raises(ValueError, match="3 samples need as many probe generators, not 2"):
        draw_probes(noise(3), DivergenceEstimator(), generators(2)(0))


def test_too_many_dimensions_for_the_exact_trace_are_refused_with_the_memory():
    with pytest.raises(MemoryError, match=r"65536 dimensions needs 80\.0 GiB"):
        divergence(curved, torch.zeros(2, 65536), 0.5, EXACT)


def test_more_orthogonal_probes_than_dimensions_are_refused():
    estimator = DivergenceEstimator(num_probes=9, distribution="orthogonal")
    with pytest.raises(ValueError, match="only 8 directions"):
        draw_probes(noise(2), estimator, generators(2)(0))
