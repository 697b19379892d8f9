"""MATH 4: divergence, ODE log-density and entropy, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flow_grpo.entropy import (
    DivergenceEstimator,
    differential_entropy,
    divergence,
    draw_probes,
    ode_log_density,
)
from flow_grpo.randomness import keyed_generator
from scripts.diversity_metrics.toy_flows import GaussianFlow, UniformFlow

EXACT = DivergenceEstimator(exact=True)
FLOW = GaussianFlow.random(8)


def path(steps: int, rising: bool = False, last: float = 0.0) -> torch.Tensor:
    sigmas = torch.linspace(1, last, steps + 1, dtype=torch.float64)
    return sigmas.flip(0) if rising else sigmas


def noise(batch: int, dims: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generators(batch: int, seed: int = 0):
    """Probes keyed by (seed, evaluation, sample)."""
    return lambda evaluation: [keyed_generator(seed, "probe", evaluation, i) for i in range(batch)]


def curved(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """A velocity whose Jacobian is full and differs from point to point."""
    weight = torch.sin(torch.arange(x.shape[1] ** 2, dtype=x.dtype)).view(x.shape[1], -1)
    return torch.tanh(x @ weight * (0.5 + sigma)) - 0.3 * x


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


# --- along the path ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rising", [False, True])
def test_the_density_of_a_gaussian_flow_is_the_gaussians(rising):
    x = FLOW.mean + 0.3 * noise(5) if rising else noise(5)
    result = ode_log_density(FLOW.velocity, x, path(80, rising), EXACT, solver="rk4")
    torch.testing.assert_close(result.log_prob, FLOW.distribution.log_prob(result.x_0), rtol=0, atol=1e-4)


def test_data_to_noise_and_back_are_inverse():
    there = ode_log_density(FLOW.velocity, noise(5), path(80), EXACT, solver="rk4")
    back = ode_log_density(FLOW.velocity, there.x_0, path(80, rising=True), EXACT, solver="rk4")
    torch.testing.assert_close(back.x_1, noise(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(back.log_prob, there.log_prob, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_the_error_falls_with_the_solvers_order(solver, order):
    """Of log p_0 at given data, where the truth does not depend on the solver."""
    x_0 = FLOW.mean + 0.3 * noise(5)
    truth = FLOW.distribution.log_prob(x_0)
    errors = []
    for steps in (80, 160):
        result = ode_log_density(FLOW.velocity, x_0, path(steps, rising=True), EXACT, solver=solver)
        errors.append((result.log_prob - truth).mean().abs().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def discrete_log_density(x, sigmas):
    """log p of what Euler's discrete map really draws from N(0, I): the exact log-determinants."""
    log_prob = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1)
    for sigma, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        jacobian = torch.eye(x.shape[1], dtype=x.dtype) + (after - sigma) * FLOW.slope(sigma)
        log_prob = log_prob - torch.linalg.slogdet(jacobian).logabsdet
    return log_prob


def test_the_second_order_term_removes_most_of_the_bias_of_the_discrete_map():
    truth = discrete_log_density(noise(5), path(40))
    first, second = (
        ode_log_density(FLOW.velocity, noise(5), path(40), EXACT, second_order=second).log_prob
        for second in (False, True)
    )
    assert (second - truth).abs().max() < 0.2 * (first - truth).abs().max()


def test_the_uniforms_density_is_constant():
    flow = UniformFlow(1.5)
    x_0 = 2 * torch.rand(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    sigmas = path(400, rising=True, last=0.02)
    result = ode_log_density(flow.velocity, x_0, sigmas, EXACT, solver="rk4")
    truth = -flow.entropy(3) - 3 * math.log(1 - 0.02)  # at sigma = 0.02 the data are shrunk by 1 - sigma
    torch.testing.assert_close(result.log_prob, torch.full((6,), truth).double(), rtol=0, atol=1e-3)


def test_with_the_sign_of_the_divergence_flipped_the_density_is_wrong():
    result = ode_log_density(FLOW.velocity, noise(5), path(80), EXACT, solver="rk4")
    flipped = result.prior - result.step_integrals.sum(1)
    assert (flipped - FLOW.distribution.log_prob(result.x_0)).abs().min() > 1


def test_without_the_prior_the_density_is_wrong():
    result = ode_log_density(FLOW.velocity, noise(5), path(80), EXACT, solver="rk4")
    assert (result.step_integrals.sum(1) - FLOW.distribution.log_prob(result.x_0)).abs().min() > 1


def spread(hold: bool, distribution: str = "rademacher", n: int = 1) -> float:
    """Standard deviation over 400 draws of probes of log p of one sample of a 64-d flow."""
    flow = GaussianFlow.random(64)
    x = noise(1, 64).expand(400, 64)
    estimator = DivergenceEstimator(num_probes=n, hold=hold, distribution=distribution)
    return ode_log_density(flow.velocity, x, path(20), estimator, generators(400)).log_prob.std().item()


def test_one_probe_held_along_the_path_varies_more_than_fresh_ones():
    assert spread(hold=True) > 1.5 * spread(hold=False)


def test_along_the_path_gaussian_probes_vary_more_than_rademacher_ones():
    assert spread(hold=False, distribution="gaussian") > 1.5 * spread(hold=False)


@pytest.mark.parametrize("hold", [False, True])
def test_the_stated_probe_error_is_the_spread_over_draws(hold):
    flow = GaussianFlow.random(64)
    x = noise(1, 64).expand(300, 64)
    estimator = DivergenceEstimator(num_probes=8, hold=hold)
    result = ode_log_density(flow.velocity, x, path(20), estimator, generators(300))
    assert result.probe_variance.mean().sqrt().item() == pytest.approx(result.log_prob.std().item(), rel=0.15)


def test_the_probe_error_is_zero_if_exact_and_unknown_with_one_probe():
    assert (ode_log_density(FLOW.velocity, noise(3), path(4), EXACT).probe_variance == 0).all()
    one = ode_log_density(FLOW.velocity, noise(3), path(4), DivergenceEstimator(), generators(3))
    assert one.probe_variance.isnan().all()


def test_a_samples_density_does_not_depend_on_its_batch():
    estimator = DivergenceEstimator(num_probes=2)
    whole = ode_log_density(FLOW.velocity, noise(3), path(10), estimator, generators(3))
    alone = ode_log_density(
        FLOW.velocity, noise(3)[1:2], path(10), estimator, lambda k: [keyed_generator(0, "probe", k, 1)]
    )
    torch.testing.assert_close(alone.log_prob[0], whole.log_prob[1], rtol=1e-12, atol=0)


def test_units_are_consistent():
    result = ode_log_density(FLOW.velocity, noise(3), path(10), EXACT)
    torch.testing.assert_close(result.nats_per_dim, result.log_prob / 8)
    torch.testing.assert_close(result.bits_per_dim, -result.log_prob / 8 / math.log(2))


# --- gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [EXACT, DivergenceEstimator(num_probes=2), DivergenceEstimator(product="jvp")])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_gradient_of_log_p_theta_equals_finite_differences(estimator, solver):
    """At fixed data, transport and prior included, in float64."""
    x_0, scale = 0.5 * noise(2), torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def log_prob(theta, enable_grad):
        result = ode_log_density(
            lambda x, sigma: theta * curved(x, sigma), x_0, path(5, rising=True), estimator, generators(2),
            solver=solver, enable_grad=enable_grad,
        )  # fmt: skip
        return result.log_prob.sum()

    (gradient,) = torch.autograd.grad(log_prob(scale, True), scale)
    h = 1e-5
    difference = (log_prob(scale.detach() + h, False) - log_prob(scale.detach() - h, False)) / (2 * h)
    torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=1e-8)


def test_no_graph_is_kept_unless_asked():
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    result = ode_log_density(lambda x, s: scale * curved(x, s), noise(2), path(5), EXACT)
    assert not result.log_prob.requires_grad


# --- entropy -------------------------------------------------------------------------------------------


def test_the_interval_covers_the_entropy_in_95_percent_of_repetitions():
    """1,000 repetitions of 200 samples with 2 probes each, of a Gaussian flow in 8 dimensions."""
    flow, covered = GaussianFlow.random(8), 0
    x = noise(200_000)
    estimator = DivergenceEstimator(num_probes=2)
    probes = torch.Generator().manual_seed(5)
    result = _with_shared_generator(flow, x, estimator, probes)
    # the solver's own bias is removed by comparing with the entropy of the discrete path
    truth = -_with_shared_generator(flow, x, EXACT, probes).log_prob.mean().item()
    for log_prob, variance in zip(result.log_prob.split(200), result.probe_variance.split(200), strict=True):
        estimate = differential_entropy(log_prob, variance, 8)
        covered += abs(estimate.entropy - truth) < 1.96 * estimate.standard_error
    assert 0.93 <= covered / 1000 <= 0.97


def _with_shared_generator(flow, x, estimator, generator):
    """`ode_log_density` with probes drawn for the whole batch at once: one generator per sample is slow for 200,000."""
    from flow_grpo import entropy

    original = entropy.draw_probes

    def draw(like, estimator, _):
        shape = (estimator.num_probes, *like.shape)
        return (2 * torch.randint(2, shape, generator=generator) - 1).to(like)

    entropy.draw_probes = draw
    try:
        return ode_log_density(flow.velocity, x, path(10), estimator, lambda k: [])
    finally:
        entropy.draw_probes = original


def test_the_entropy_of_a_gaussian_flow_is_the_gaussians():
    result = ode_log_density(FLOW.velocity, noise(4000), path(40), EXACT, solver="rk4")
    estimate = differential_entropy(result.log_prob, result.probe_variance, 8)
    assert abs(estimate.entropy - FLOW.entropy) < 4 * estimate.standard_error


def test_the_probes_share_of_the_spread_is_taken_out():
    """Log-densities of standard deviation 3, observed with probe noise of standard deviation 4."""
    generator = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(20000, generator=generator) + 4 * torch.randn(20000, generator=generator)
    estimate = differential_entropy(values, torch.full((20000,), 16.0), dims=10)
    assert estimate.log_prob_std == pytest.approx(5.0, rel=0.02)
    assert estimate.log_prob_std_corrected == pytest.approx(3.0, rel=0.04)
    assert estimate.standard_error == pytest.approx(math.hypot(estimate.sample_part, estimate.probe_part))


def test_statistics_are_those_of_the_values():
    values = torch.tensor([-3.0, -1.0, 0.0, 4.0], dtype=torch.float64)
    estimate = differential_entropy(values, torch.full((4,), torch.nan), dims=2)
    assert (estimate.entropy, estimate.minimum, estimate.maximum) == (0.0, -3.0, 4.0)
    assert estimate.quantiles[0.5] == -0.5
    assert math.isnan(estimate.log_prob_std_corrected)
    assert estimate.log_prob_std == pytest.approx(values.std().item())


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


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_probes": 0}, "num_probes is 0"),
        ({"distribution": "uniform"}, "'uniform'"),
        ({"product": "adjoint"}, "'adjoint'"),
        ({"step": 0.0}, r"step is 0\.0"),
    ],
)
def test_an_impossible_estimator_is_refused(change, part):
    with pytest.raises(ValueError, match=part):
        DivergenceEstimator(**change)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"solver": "midpoint"}, "'midpoint'"),
        ({"solver": "rk4", "second_order": True}, "second_order"),
        ({"sigmas": torch.tensor([1.0, 0.5, 0.7])}, "fall or rise"),
        ({"sigmas": torch.tensor([0.9, 0.5, 0.0])}, "between 1 and 0"),
        ({"estimator": DivergenceEstimator()}, "probe_generators"),
        ({"velocity": lambda x, s: x[:, :4]}, r"step 0 of 4: the velocity has shape \(3, 4\)"),
        ({"velocity": lambda x, s: x / (s > 0.6)}, "step 2 of 4: the velocity is not finite at sigma = 0.5"),
    ],
)
def test_an_impossible_path_is_refused(arguments, part):
    defaults = {"velocity": curved, "x": noise(3), "sigmas": path(4), "estimator": EXACT}
    with pytest.raises(ValueError, match=part):
        ode_log_density(**defaults | arguments)


def test_too_many_dimensions_for_the_exact_trace_are_refused_with_the_memory():
    with pytest.raises(MemoryError, match=r"65536 dimensions needs 32\.0 GiB"):
        divergence(curved, torch.zeros(2, 65536), 0.5, EXACT)


def test_more_orthogonal_probes_than_dimensions_are_refused():
    estimator = DivergenceEstimator(num_probes=9, distribution="orthogonal")
    with pytest.raises(ValueError, match="only 8 directions"):
        draw_probes(noise(2), estimator, generators(2)(0))


def test_one_sample_has_no_error():
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        differential_entropy(torch.zeros(1), torch.zeros(1), 3)
