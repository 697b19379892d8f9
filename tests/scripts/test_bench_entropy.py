"""The benchmark of the entropy estimators: what it compares with, its reference, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flow_grpo.entropy import DivergenceEstimator, draw_probes, ode_log_density
from flow_grpo.randomness import keyed_generator
from scripts.bench import entropy as bench
from scripts.bench import entropy_measures
from scripts.bench.entropy_methods import forward_difference, methods, reference, replaced_log_density
from scripts.diversity_metrics.toy_flows import GaussianFlow
from tests import forked

FLOW = GaussianFlow.random(8)


def generators(evaluation: int) -> list[torch.Generator]:
    return [keyed_generator(0, "probe", evaluation, i) for i in range(3)]


@pytest.fixture
def data() -> torch.Tensor:
    return FLOW.distribution.sample((3,))


def test_the_one_sided_difference_of_a_linear_field_is_its_quadratic_form(data):
    probes = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v, trace = forward_difference(FLOW.velocity, data, 0.4, probes)
    expected = torch.einsum("nbi,ij,nbj->nb", probes, FLOW.slope(0.4), probes).mean(0)
    torch.testing.assert_close(trace, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(v, FLOW.velocity(data, 0.4), rtol=0, atol=0)


def test_the_replaced_approach_is_our_euler_with_gaussian_probes_where_differences_are_exact(data):
    sigmas = torch.linspace(0, 1, 21, dtype=torch.float64)
    ours = ode_log_density(
        FLOW.velocity, data, sigmas, DivergenceEstimator(num_probes=4, distribution="gaussian"), generators
    )
    replaced = replaced_log_density(FLOW.velocity, data, sigmas, generators, 4)
    torch.testing.assert_close(replaced, ours.log_prob, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("refinement", [1, 40])
def test_refining_the_reference_by_probes_brings_it_to_the_closed_form_of_a_gaussian(data, refinement):
    orthogonal = DivergenceEstimator(num_probes=8, distribution="orthogonal")  # the exact trace in 8 dimensions
    found, _ = reference(FLOW.velocity, data, 6, refinement, draw_probes(data, orthogonal, generators(0)))
    worst = (found - FLOW.distribution.log_prob(data)).abs().max()
    assert worst < 2e-3 if refinement > 1 else worst > 1e-2, worst


def test_the_references_error_is_the_spread_of_the_refinement_between_probes(data):
    probes = draw_probes(data, DivergenceEstimator(num_probes=2), generators(0))
    found, error = reference(FLOW.velocity, data, 4, 8, probes)
    one, other = (reference(FLOW.velocity, data, 4, 8, torch.stack([z, z]))[0] for z in probes)
    torch.testing.assert_close(error, ((one - other) / 2).square().mean().sqrt().item(), rtol=1e-9, atol=0)
    torch.testing.assert_close(found, (one + other) / 2, rtol=1e-12, atol=1e-12)


def test_the_command_runs(random_models, tmp_path, capsys, monkeypatch):
    fork = SimpleNamespace(run=lambda command, **_: forked.run(*command[1:]))
    monkeypatch.setattr(entropy_measures, "subprocess", fork)  # what it measures in processes of their own
    sizes = ["--threads=1", "--steps=4", "--samples=2", "--distinct=2", "--nodes=1", "--refinement=2"]
    options = [f"--model={random_models / 'sd3'}", f"--prompts={random_models / 'prompts.txt'}", f"--out={tmp_path}"]
    assert bench.main([*sizes, *options]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["rows"]) == len(methods(4))
    assert {"table.md", "error_vs_seconds.png"} <= {path.name for path in tmp_path.iterdir()}


def test_a_missing_model_is_named(tmp_path, capsys):
    assert bench.main([f"--model={tmp_path}", f"--out={tmp_path}"]) == 2
    assert str(tmp_path) in capsys.readouterr().err


# --- the committed table: python scripts/bench/entropy.py --out assets/figures/entropy_bench ------------------

COMMITTED = json.loads((Path(__file__).parents[2] / "assets/figures/entropy_bench/results.json").read_text())


def test_the_committed_table_is_of_40_steps_and_64_samples_and_has_every_row():
    assert (COMMITTED["steps"], COMMITTED["samples"], COMMITTED["distinct"]) == (40, 64, 64)
    rows = {(r["solver"], r["probes"], r["steps"], r["second_order"], r["dtype"]) for r in COMMITTED["rows"]}
    assert rows == {(m.solver, m.probes, m.steps, m.second_order, m.dtype) for m in methods(40)}


def test_the_reference_is_converged_against_every_error_that_it_judges():
    assert COMMITTED["reference"]["error"] < 0.1 * min(row["rmse_nats"] for row in COMMITTED["rows"])


def test_at_equal_time_ours_has_at_most_half_the_error_of_what_it_replaces():
    for comparison in COMMITTED["equal_time"]:
        assert comparison["ratio"] <= 0.5, comparison
        assert comparison["time_ratio"] <= 1.1, comparison


def test_bf16_weights_stay_within_one_percent_of_fp32():
    for comparison in COMMITTED["bf16"]:
        assert comparison["rms_relative_to_rms_log_prob"] <= 0.01, comparison


def test_peak_memory_is_the_same_at_10_and_80_steps():
    few, many = (COMMITTED["peak_memory_mib"][steps] for steps in ("10", "80"))
    assert many == pytest.approx(few, rel=0.03)
