"""Means over observations and processes."""

from __future__ import annotations

import pytest
import torch

from flow_grpo.metrics import MeanMetrics


class Alone:
    """What `result` asks of accelerate, on one process, or on two of which the other has added `sums`."""

    device = torch.device("cpu")

    def __init__(self, *sums: tuple[float, float]) -> None:
        self.sums = torch.tensor(sums)

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        return tensor + self.sums if len(self.sums) else tensor


def test_a_mean_is_weighted():
    metrics = MeanMetrics()
    metrics.add({"a": 1.0, "b": torch.tensor(5.0)}, weight=3)
    metrics.add({"a": 3.0}, weight=1)
    assert metrics.result(Alone()) == {"a": 1.5, "b": 5.0}
    assert MeanMetrics().result(Alone()) == {}


def test_processes_count_by_what_they_have_observed():
    """Three observations of 1 here, one of 5 there: not the mean of the two means."""
    metrics = MeanMetrics()
    metrics.add({"a": 1.0}, weight=3)
    assert metrics.result(Alone((5.0, 1.0))) == {"a": 2.0}


def test_what_only_another_process_has_observed_is_its_mean_and_what_none_has_is_left_out():
    metrics = MeanMetrics()
    metrics.add({"a": 0.0, "b": 0.0}, weight=0)
    assert metrics.result(Alone((4.0, 2.0), (0.0, 0.0))) == {"a": pytest.approx(2.0)}
