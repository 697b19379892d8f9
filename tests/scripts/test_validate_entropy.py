"""The toy flows against quadrature and brute force, and what validate_entropy.py found and writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from scripts.diversity_metrics import entropy_targets, entropy_validation, validate_entropy
from scripts.diversity_metrics.toy_flows import GaussianFlow, MixtureFlow, UniformFlow, fit_mlp

COMMITTED = Path(__file__).parents[2] / "assets" / "figures" / "entropy_validation"
MIXTURE = MixtureFlow.random(5, 3, seed=1)
LINE = MixtureFlow(*(torch.tensor(v, dtype=torch.float64) for v in ([0.2, 0.8], [[-1.0], [1.5]], [0.3, 0.6])))


def points(count: int, dims: int, scale: float = 1.5) -> torch.Tensor:
    return scale * torch.randn(count, dims, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the flows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.05, 0.4, 0.9, 1.0])
def test_the_mixtures_velocity_follows_from_the_score_of_its_marginal(sigma):
    """e_hat = -sigma score = x + (1 - sigma) v."""
    x = points(20, 3).requires_grad_()
    (score,) = torch.autograd.grad(MIXTURE.log_density(x, sigma).sum(), x)
    v = MIXTURE.velocity(x, sigma)
    torch.testing.assert_close(x + (1 - sigma) * v, -sigma * score, rtol=1e-9, atol=1e-10)


def posterior_velocity(data: torch.Tensor, mass: torch.Tensor, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[e - x_0 | x_sigma = x] in one dimension by quadrature: data (N,), their mass (N,), x (B, 1)."""
    noise = (x - (1 - sigma) * data) / sigma  # (B, N)
    weight = (mass.log() - 0.5 * noise.square()).softmax(1)
    return (weight * (noise - data)).sum(1, keepdim=True)


@pytest.mark.parametrize("sigma", [0.1, 0.4, 0.9])
def test_the_mixtures_velocity_is_the_posterior_mean(sigma):
    data = torch.linspace(-8, 8, 40001, dtype=torch.float64)
    x = points(20, 1)
    expected = posterior_velocity(data, LINE.log_density(data[:, None]).exp(), x, sigma)
    torch.testing.assert_close(LINE.velocity(x, sigma), expected, rtol=1e-9, atol=1e-10)


def test_with_equal_responsibilities_the_mixtures_velocity_is_wrong():
    sigma, x = 0.4, points(20, 1)
    even = MixtureFlow(torch.full_like(LINE.weights, 0.5), LINE.means, LINE.stds)
    assert (even.velocity(x, sigma) - LINE.velocity(x, sigma)).abs().max() > 0.1


@pytest.mark.parametrize("sigma", [0.1, 0.4, 0.9])
def test_the_uniforms_velocity_is_the_posterior_mean(sigma):
    data = torch.linspace(-1.5, 1.5, 400_001, dtype=torch.float64)
    x = points(10, 1, 0.8)
    expected = posterior_velocity(data, torch.ones_like(data), x, sigma)
    torch.testing.assert_close(UniformFlow(1.5).velocity(x, sigma), expected, rtol=1e-4, atol=1e-4)


def test_a_mixture_of_one_component_is_a_gaussian_flow():
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    gaussian = GaussianFlow(mean, 0.49 * torch.eye(2, dtype=torch.float64))
    one = torch.ones(1, dtype=torch.float64)
    mixture = MixtureFlow(one, mean[None], 0.7 * one)
    for sigma in (0.0, 0.3, 1.0):
        x = points(10, 2)
        torch.testing.assert_close(mixture.velocity(x, sigma), gaussian.velocity(x, sigma), rtol=1e-11, atol=1e-12)
    assert mixture.entropy_by_integration() == pytest.approx(gaussian.entropy, abs=1e-10)


def test_the_gaussians_velocity_agrees_with_the_formula():
    flow, x, sigma = GaussianFlow.random(6), points(4, 6), 0.3
    mixed = (1 - sigma) ** 2 * flow.covariance + sigma**2 * torch.eye(6, dtype=torch.float64)
    gain = (sigma * torch.eye(6, dtype=torch.float64) - (1 - sigma) * flow.covariance) @ torch.linalg.inv(mixed)
    expected = (x - (1 - sigma) * flow.mean) @ gain.T - flow.mean
    torch.testing.assert_close(flow.velocity(x, sigma), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(flow.slope(sigma), gain, rtol=1e-11, atol=1e-11)


def test_the_integrated_entropy_does_not_depend_on_the_grid_and_is_that_of_a_product():
    """Of two far components: the entropy of one plus that of the choice."""
    half = torch.full((2,), 0.5, dtype=torch.float64)
    for dims in (1, 2):
        means = torch.tensor([[-20.0] * dims, [20.0] * dims], dtype=torch.float64)
        mixture = MixtureFlow(half, means, torch.ones(2, dtype=torch.float64))
        expected = math.log(2) + 0.5 * dims * math.log(2 * math.pi * math.e)
        assert mixture.entropy_by_integration(0.3) == pytest.approx(expected, abs=1e-9)
    assert LINE.entropy_by_integration(0.1) == pytest.approx(LINE.entropy_by_integration(0.23), abs=1e-10)


def test_the_sampled_entropy_agrees_with_integration():
    value, error = LINE.entropy_by_sampling(200_000, generator())
    assert abs(value - LINE.entropy_by_integration()) < 4 * error
    assert error < 0.003


def test_integration_in_many_dimensions_is_refused():
    with pytest.raises(ValueError, match="grid of 3 dimensions"):
        MIXTURE.entropy_by_integration()


def test_the_smoothed_uniforms_entropy_grows_by_what_its_two_edges_add():
    """H = log 2h + std / h times the integral of -Phi log Phi, 0.903197..., if std << h."""
    edge = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    phi = torch.special.ndtr(edge)
    constant = -torch.trapezoid(phi * torch.special.log_ndtr(edge), edge).item()
    flow, std = UniformFlow(1.5), 0.02 / 0.98
    assert flow.entropy(3, 0.02) - flow.entropy(3) == pytest.approx(3 * constant * std / 1.5, rel=1e-9)


def test_the_smoothed_uniforms_density_is_that_of_its_samples():
    flow, sigma = UniformFlow(1.5), 0.2
    y = flow.sample(100_000, 1, generator()) + sigma / (1 - sigma) * torch.randn(
        100_000, 1, generator=generator(1), dtype=torch.float64
    )
    values = -flow.log_density(y, sigma)
    assert abs(values.mean().item() - flow.entropy(1, sigma)) < 4 * values.std().item() / math.sqrt(100_000)


@pytest.mark.parametrize("flow", [GaussianFlow.random(2, 1), MixtureFlow.ring(3, 2.0, 0.25)])
def test_samples_have_the_density_that_is_stated(flow):
    x = flow.sample(50_000, generator())
    if isinstance(flow, GaussianFlow):
        values, entropy = -flow.distribution.log_prob(x), flow.entropy
    else:
        values, entropy = -flow.log_density(x), flow.entropy_by_integration()
    assert abs(values.mean().item() - entropy) < 4 * values.std().item() / math.sqrt(len(x))


def test_training_brings_the_mlp_near_the_exact_velocity():
    flow = GaussianFlow.isotropic(1, 0.5)
    x = points(200, 1, 0.7)

    def distance(steps: int) -> float:
        model = fit_mlp(flow.sample, 1, steps, generator())
        return (model.velocity(x.float(), 0.5) - flow.velocity(x, 0.5)).square().mean().sqrt().item()

    assert distance(200) < 0.2 < distance(1)


# --- the committed results -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    return json.loads((COMMITTED / "results.json").read_text(encoding="utf-8"))


def exact_rows(results):
    return [row for row in results["rows"] if row["field"] == "exact"]


def test_every_exact_field_gives_the_theory_within_four_standard_errors(results):
    assert len(exact_rows(results)) == 10
    for row in exact_rows(results):
        assert abs(row["estimate"] - row["theory"]) < 4 * row["standard_error"], row["target"]


def test_with_the_divergences_sign_flipped_no_exact_field_does(results):
    for row in exact_rows(results):
        assert row["prior_part"] + row["divergence_part"] == pytest.approx(row["estimate"], abs=1e-9)
        flipped = row["prior_part"] - row["divergence_part"]
        assert abs(flipped - row["theory"]) > 4 * row["standard_error"], row["target"]


def test_the_solvers_bias_is_below_a_tenth_of_the_standard_error(results):
    """Seen in the density error wherever the trace is exact."""
    for row in exact_rows(results):
        if row["probes"] == 0:
            assert abs(row["density_error"]) < 0.1 * row["standard_error"], row["target"]
        else:
            assert abs(row["density_error"]) < 4 * row["density_error_standard_error"], row["target"]


def test_the_theory_is_the_closed_form(results):
    theory = {row["target"]: row["theory"] for row in exact_rows(results)}
    assert theory["Gaussian, std 0.1, 16-d"] == pytest.approx(8 * math.log(2 * math.pi * math.e * 0.01))
    assert theory["uniform, 16-d"] == pytest.approx(16 * (math.log(3) + 0.903197 * (0.01 / 0.99) / 1.5), abs=1e-6)


@pytest.mark.parametrize(("solver", "order"), [("Euler", 1), ("Heun", 2), ("RK4", 4)])
def test_the_bias_falls_with_the_solvers_order(results, solver, order):
    bias = {p["steps"]: abs(p["against_target"]) for p in results["convergence"] if p["solver"] == solver}
    assert math.log2(bias[80] / bias[160]) == pytest.approx(order, abs=0.3)


def test_the_second_order_term_gains_an_order_against_eulers_own_map(results):
    bias = {(p["solver"], p["steps"]): abs(p["against_map"]) for p in results["convergence"] if "against_map" in p}
    second = "Euler, second-order log-determinant"
    assert math.log2(bias["Euler", 80] / bias["Euler", 160]) == pytest.approx(1, abs=0.3)
    assert math.log2(bias[second, 80] / bias[second, 160]) == pytest.approx(2, abs=0.3)


# --- the command ---------------------------------------------------------------------------------------


def test_the_command_writes_its_files_and_repeats_itself(tmp_path, monkeypatch, capsys):
    keep_small(monkeypatch)
    found = []
    for name in ("one", "two"):
        validate_entropy.main(["--out", str(tmp_path / name), "--fraction", "0.001", "--seed", "7"])
        written = sorted(path.name for path in (tmp_path / name).iterdir())
        assert written == ["convergence.png", "errors.png", "results.json", "samples.png", "table.md"]
        found.append(json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8")))
    assert found[0]["command"].endswith("validate_entropy.py --seed 7 --fraction 0.001")
    for first, second in zip(found[0]["rows"], found[1]["rows"], strict=True):
        assert first | {"seconds": 0} == second | {"seconds": 0}
    assert "| mixture of 8, 2-d |" in capsys.readouterr().out


def keep_small(monkeypatch):
    """Two targets in two dimensions, few steps."""
    whole = entropy_targets.targets
    monkeypatch.setattr(entropy_validation, "STEPS", 6)
    monkeypatch.setattr(entropy_validation, "CONVERGENCE_STEPS", (5, 10))
    monkeypatch.setattr(entropy_targets, "targets", lambda *args: [t for t in whole(*args) if t.dims == 2])


@pytest.mark.parametrize("fraction", ["0", "1.5"])
def test_an_impossible_fraction_is_refused_in_one_sentence(fraction, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_code:
        validate_entropy.main(["--out", str(tmp_path), "--fraction", fraction])
    assert exit_code.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: --fraction {fraction} is not allowed")
