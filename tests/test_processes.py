"""By every method, one process and two give the same samples and the same gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import forked
from tests.worker import NAMES, SHARDED

WORKER = Path(__file__).parent / "worker.py"


def run_worker(processes: int, *arguments: str | Path) -> Path:
    """The last argument is the file that the worker writes."""
    result = forked.run(*arguments, processes=processes)
    assert result.returncode == 0, result.stderr
    return Path(arguments[-1])


@pytest.fixture(scope="module")
def one_and_two(random_models, tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one process found by every method, and what two did."""
    folder = tmp_path_factory.mktemp("processes")
    files = [run_worker(number, WORKER, random_models, folder / f"{number}.pt") for number in (1, 2)]
    one, two = (torch.load(file, weights_only=True) for file in files)
    return one, two


@pytest.mark.parametrize("name", NAMES)
def test_one_and_two_processes_give_the_same_gradient_by_every_method(one_and_two, name):
    """3 groups of 4, of which two processes share one."""
    one, two = (found[name] for found in one_and_two)
    assert one["gradient"].norm() > 0
    assert ((two["gradient"] - one["gradient"]).norm() / one["gradient"].norm()).item() < 1e-5
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", SHARDED)
def test_two_processes_that_share_the_weights_give_the_gradient_of_one(one_and_two, name):
    one, two = one_and_two[0][name], one_and_two[1][f"{name}_sharded"]
    assert ((two["gradient"] - one["gradient"]).norm() / one["gradient"].norm()).item() < 1e-5
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "grpo_sharded"])
def test_one_and_two_processes_draw_the_same_samples(one_and_two, kind):
    """7 evaluation images, which two processes do not divide."""
    one, two = one_and_two[0]["grpo"], one_and_two[1][kind]
    assert len(one["images"]) == len(two["images"]) == 7
    torch.testing.assert_close(two["images"], one["images"], rtol=0, atol=1e-5)
    torch.testing.assert_close(two["latents"], one["latents"], rtol=1e-5, atol=1e-5)


def test_one_and_two_processes_measure_the_same_diversity_and_keep_the_same_record(random_models, tmp_path):
    """5 images of each of 3 prompts, which two processes do not divide. One image a batch: all that may differ is a
    last bit of the reward and the judge, whose kernels add up by where the gathered images lie in memory.
    """
    worker = WORKER.with_name("diversity_worker.py")
    one, two = (json.loads(run_worker(n, worker, random_models, tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert list(two["counts"].values()) == [5, 5, 5]
    assert one["metrics"]["eval/diversity/vendi"] > 1
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
    assert two["sprite"] == one["sprite"]
    assert (len(one["record"]["noise"]), one["record"]["judge"]["guess"].count(None)) == (15, 14)
    for name in ("rewards", "judge"):
        assert close(two["record"].pop(name), one["record"].pop(name))
    assert two["record"] == one["record"]


def close(found: Any, expected: Any) -> bool:
    """The same, but for the last bits of numbers."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return found == (pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else expected)
