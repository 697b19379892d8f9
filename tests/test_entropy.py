"""The ODE log-density and the entropy, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from flow_grpo import entropy
from flow_grpo.entropy import DivergenceEstimator, NonFiniteError, differential_entropy, ode_log_density
from flow_grpo.randomness import keyed_generator
from scripts.diversity_metrics.toy_flows import GaussianFlow, UniformFlow
from tests.velocities import EXACT, FLOW, PeakMemory, curved, generators, noise, path


@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_memory_does_not_grow_with_the_number_of_steps(solver):
    def peak(steps, enable_grad):
        x, theta = noise(2, 1024), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        estimator = DivergenceEstimator(num_probes=2)
        with PeakMemory() as memory:
            ode_log_density(
                lambda y, s: theta * torch.tanh(y), x, path(steps), estimator, generators(2), solver=solver,
                enable_grad=enable_grad,
            )  # fmt: skip
        return memory.peak

    assert peak(80, False) < 1.1 * peak(10, False)
    assert peak(80, True) > 4 * peak(10, True)  # the twin: every step is kept


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
@pytest.mark.parametrize(("distribution", "n"), [("rademacher", 2), ("rademacher", 8), ("orthogonal", 12)])
def test_the_stated_probe_error_is_the_spread_over_draws(hold, distribution, n):
    """12 orthogonal probes of 16 dimensions: without 1 - n / D the stated error would be twice the spread."""
    dims = 16 if distribution == "orthogonal" else 64
    flow, x = GaussianFlow.random(dims), noise(1, dims).expand(300, dims)
    estimator = DivergenceEstimator(num_probes=n, hold=hold, distribution=distribution)
    result = ode_log_density(flow.velocity, x, path(20), estimator, generators(300))
    assert result.probe_variance.mean().sqrt().item() == pytest.approx(result.log_prob.std().item(), rel=0.15)
    torch.testing.assert_close(result.probe_standard_error, result.probe_variance.sqrt())


def test_as_many_orthogonal_probes_as_dimensions_have_no_error():
    estimator = DivergenceEstimator(num_probes=8, distribution="orthogonal")
    result = ode_log_density(curved, noise(3), path(4), estimator, generators(3))
    assert (result.probe_variance == 0).all()


def test_half_precision_noise_is_followed_in_float32():
    x = noise(3).bfloat16()
    result = ode_log_density(curved, x, path(10), EXACT)
    assert result.x_0.dtype == torch.float32
    assert torch.equal(result.log_prob, ode_log_density(curved, x.float(), path(10), EXACT).log_prob)


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
    assert estimate.probe_part == pytest.approx(4 / math.sqrt(20000))
    assert estimate.sample_part == pytest.approx(3 / math.sqrt(20000), rel=0.04)


def test_probes_that_seem_to_vary_more_than_all_leave_no_share_for_the_samples():
    values = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    estimate = differential_entropy(values, torch.full((3,), 4.0), dims=2)
    assert (estimate.sample_part, estimate.log_prob_std_corrected, estimate.log_prob_std) == (0.0, 0.0, 1.0)
    assert estimate.standard_error == pytest.approx(1 / math.sqrt(3))
    assert estimate.probe_part == pytest.approx(2 / math.sqrt(3))


def test_the_interval_of_five_samples_covers_in_95_percent_of_repetitions():
    """4,000 repetitions; with the normal distribution's 1.96 instead of Student's t it would be 88 %."""
    draws = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimates = [differential_entropy(row, torch.zeros(5), dims=1) for row in draws]
    assert estimates[0].half_width_95 == pytest.approx(2.776445 * estimates[0].standard_error, rel=1e-6)  # a table's t
    covered = sum(abs(estimate.entropy) < estimate.half_width_95 for estimate in estimates) / 4000
    normal = sum(abs(estimate.entropy) < 1.96 * estimate.standard_error for estimate in estimates) / 4000
    assert 0.93 <= covered <= 0.97
    assert normal < 0.9


def test_statistics_are_those_of_the_values():
    values = torch.tensor([-3.0, -1.0, 0.0, 4.0], dtype=torch.float64)
    estimate = differential_entropy(values, torch.full((4,), torch.nan), dims=2)
    assert (estimate.entropy, estimate.minimum, estimate.maximum) == (0.0, -3.0, 4.0)
    assert estimate.quantiles[0.5] == -0.5
    assert math.isnan(estimate.log_prob_std_corrected)
    assert estimate.log_prob_std == pytest.approx(values.std().item())


def test_quantiles_and_units_of_an_entropy():
    values = torch.linspace(-30, -10, 101, dtype=torch.float64)
    estimate = differential_entropy(values, torch.zeros(101), dims=4)
    assert estimate.quantiles == pytest.approx({q: -30 + 20 * q for q in (0.05, 0.25, 0.5, 0.75, 0.95)})
    assert estimate.entropy == pytest.approx(20.0)
    assert estimate.nats_per_dim == pytest.approx(5.0)
    assert estimate.bits_per_dim == pytest.approx(5 / math.log(2))


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"solver": "midpoint"}, "'midpoint'"),
        ({"solver": "rk4", "second_order": True}, "second_order"),
        ({"sigmas": torch.tensor([1.0, 0.5, 0.7])}, "fall or rise"),
        ({"sigmas": torch.tensor([0.9, 0.5, 0.0])}, "between 1 and 0"),
        ({"sigmas": torch.tensor([1.0, 0.5, -0.1])}, "between 1 and 0"),
        ({"estimator": DivergenceEstimator()}, "probe_generators"),
        ({"velocity": lambda x, s: x[:, :4]}, r"step 0 of 4: the velocity has shape \(3, 4\)"),
    ],
)
def test_an_impossible_path_is_refused(arguments, part):
    defaults = {"velocity": curved, "x": noise(3), "sigmas": path(4), "estimator": EXACT}
    with pytest.raises(ValueError, match=part):
        ode_log_density(**defaults | arguments)


def kinked(x, sigma):
    """A finite velocity whose slope is infinite from sigma = 0.5 on."""
    return x if sigma > 0.6 else (x - x.detach()).abs().sqrt()


@pytest.mark.parametrize(
    ("velocity", "part"),
    [
        (lambda x, s: x / (s > 0.6), r"step 2 of 4: the velocity is not finite at sigma = 0\.5"),
        (kinked, r"step 2 of 4: the divergence is not finite at sigma = 0\.5"),
    ],
)
@pytest.mark.parametrize("estimator", [EXACT, DivergenceEstimator(num_probes=2)])
def test_what_is_not_finite_is_told_from_bad_arguments(velocity, part, estimator):
    with pytest.raises(NonFiniteError, match=part):
        ode_log_density(velocity, noise(3), path(4), estimator, generators(3))
    with pytest.raises(ValueError, match="shape") as refusal:
        ode_log_density(lambda x, s: x[:, :4], noise(3), path(4), estimator, generators(3))
    assert not isinstance(refusal.value, NonFiniteError)


def test_one_sample_has_no_error():
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        differential_entropy(torch.zeros(1), torch.zeros(1), 3)
