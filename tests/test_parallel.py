"""Trainings with sharded weights are those with replicated ones; no process waits for one that is done.

On three processes, whose shares of images, and of most weights, are not equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.families import CASES
from tests.parallel_worker import BROKEN, OTHER_FAMILIES, TRAININGS
from tests.test_processes import run_worker

WORKER = Path(__file__).with_name("parallel_worker.py")
ROUNDING = 2e-6  # of weights that have moved by 1e-3
OF_FAMILIES = 1e-5  # in guidance of other families: AdamW divides by gradients that are nearly 0


@pytest.fixture(scope="module")
def found(random_models, tmp_path_factory) -> dict[tuple[str, str], dict[str, Any]]:
    """By training and sharding, or broken twin; a process that waits for ever ends in a timeout."""
    folder = tmp_path_factory.mktemp("parallel")
    for case in CASES:
        case.build().save_pretrained(folder / "models" / case.name)
    for name in ("clip", "prompts.txt"):
        (folder / "models" / name).symlink_to(random_models / name)
    file = run_worker(3, WORKER, folder / "models", folder / "found.pt")
    return torch.load(file, weights_only=True)


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference of a weight, its average or its old value."""
    kept = [name for name in one["tensors"] if not name.startswith("optimizer.")]
    assert one["tensors"].keys() == other["tensors"].keys()
    return max((one["tensors"][name] - other["tensors"][name]).abs().max().item() for name in kept)


@pytest.mark.parametrize("name", TRAININGS)
def test_sharded_and_replicated_trainings_end_with_the_same_weights_and_metrics(found, name):
    replicated, sharded = found[name, "none"], found[name, "full"]
    moved = [v for k, v in replicated["tensors"].items() if k.startswith("weights.") and ".lora_B." in k]
    assert name == "full" or max(value.abs().max().item() for value in moved) > 5e-4
    assert distance(replicated, sharded) < (OF_FAMILIES if name in OTHER_FAMILIES else ROUNDING)
    assert sharded["metrics"] == pytest.approx(replicated["metrics"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", TRAININGS)
def test_the_optimizers_moments_are_the_same(found, name):
    replicated, sharded = (found[name, kind]["tensors"] for kind in ("none", "full"))
    for key in [key for key in replicated if key.startswith("optimizer.")]:
        torch.testing.assert_close(sharded[key], replicated[key], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("twin", BROKEN)
def test_a_twin_that_does_not_gather_anew_or_does_not_reduce_is_seen(found, twin):
    name, _ = BROKEN[twin]
    assert distance(found[name, "none"], found[name, twin]) > 10 * ROUNDING


def test_as_many_forwards_are_made_on_every_process_where_not_as_many_images_teach(found):
    assert len(set(found["uneven", "none"]["evaluations"])) > 1
    assert len(set(found["uneven", "full"]["evaluations"])) == 1


def test_the_base_models_velocity_is_that_with_adapters_off(found):
    replicated, sharded = found["guided", "none"], found["guided", "full"]
    assert (sharded["tuned"] - sharded["base"]).abs().max() > 1e-3
    for name in ("tuned", "base", "again", "product"):
        torch.testing.assert_close(sharded[name], replicated[name], rtol=1e-5, atol=1e-5)


def test_evaluations_are_the_same_and_the_film_strip_is_drawn_once(found):
    """7 images, 5 log-densities: three processes do not divide them."""
    replicated, sharded = found["guided", "none"], found["guided", "full"]
    names = {name.split("/")[1] for name in sharded["evaluated"]}
    assert names == {"reward", "entropy", "ode_log_prob", "forward_kl"}
    assert sharded["evaluated"] == pytest.approx(replicated["evaluated"], rel=1e-3, abs=1e-5)
    assert sharded["drawn"] == replicated["drawn"]
    assert "eval_strip_000002.png" in sharded["drawn"]


def test_a_forward_has_as_many_flops(found):
    assert found["guided", "full"]["flops"] == found["guided", "none"]["flops"] > 0


def test_a_velocity_that_is_not_finite_on_one_process_ends_the_log_densities_of_all(found):
    assert found["guided", "full"]["stopped"] == [True, True, True]


def test_moments_of_8_bits_are_the_same_on_every_process_and_go_on_bit_for_bit(found):
    """The moments of the process that saves are those that all go on from."""
    eight = found["full", "eight_bits"]
    first = eight["unbroken"][0]
    assert torch.uint8 in {value.dtype for name, value in first.items() if name.startswith("optimizer.state1.")}
    assert any(not torch.equal(value, eight["between"][name]) for name, value in first.items())
    for tensors in (*eight["unbroken"], *eight["resumed"]):
        assert tensors.keys() == first.keys()
        assert all(torch.equal(value, first[name]) for name, value in tensors.items())
