"""The quick runs lie within the committed intervals, or are named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flow_grpo.errors import ConfigError
from flow_grpo.statistics import prediction_interval
from scripts.study import quick
from scripts.study.outcomes import write_rows
from scripts.study.paths import RATIOS
from scripts.study.quick import at_end, compare, of_ratios
from scripts.study.ratios import PLANE
from scripts.study.run import State
from scripts.study.testbeds import TINY
from tests.scripts.study.claims.builders import BIASED, TINY_ENDS, measured, results, trained


def half_run(label="drtune"):
    """A seed of the committed runs, as far as the quick ones go."""
    found = measured(TINY, TINY_ENDS).of(label)[2]
    return {name: value[:3] if isinstance(value, list) else value for name, value in found.items()}


def test_a_quick_run_is_held_against_the_committed_seeds_at_its_own_epoch():
    found = {name: (value, others) for name, value, others in at_end(half_run(), measured(TINY, TINY_ENDS))}
    value, others = found["tiny, drtune, epoch 40: reward"]
    assert value == pytest.approx(0.51 + 0.04 / 2)
    assert others == pytest.approx([0.51 + 0.04 / 2 * (1 + (seed - 2) / 100) for seed in range(5)])
    assert prediction_interval(others).holds(value)


def test_a_form_of_the_ratio_is_held_against_as_many_epochs():
    short = [replace(one, reward=one.reward[:5]) for one in trained(BIASED) if one.form == "sde" and one.seed < 5]
    (gaussian, *_) = of_ratios(short, trained(BIASED))
    name, value, others = gaussian
    assert name == "gaussian, sde, 1"
    assert value == pytest.approx(2.0 * 4 / 12)
    assert others == pytest.approx([(2.0 + 0.01 * (seed - 2)) * 4 / 12 for seed in range(5)])


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Quick runs that are all done, each the middle of a committed one."""
    everything = results()
    monkeypatch.setattr(quick, "state_of", lambda run, _: State.DONE)
    monkeypatch.setattr(
        quick, "outcome",
        lambda testbed, run, _: next(m for m in everything.testbeds if m.testbed is testbed).of(run.label)[2],
    )  # fmt: skip
    rows = [vars(one) for one in trained(BIASED) if one.seed == 2 and one.problem in PLANE]
    write_rows(rows, tmp_path / RATIOS)
    return tmp_path


def test_runs_like_the_committed_ones_are_within(logs):
    found = compare(logs, results())
    assert all(item.within for item in found)
    assert len(found) == 5 * 3 + 20  # runs times figures, forms on two problems


def test_a_run_that_is_not_like_them_is_outside(logs):
    other = trained({**BIASED, ("sde", 1): 9.0})
    write_rows([vars(one) for one in other if one.seed == 2 and one.problem in PLANE], logs / RATIOS)
    outside = [item.quantity for item in compare(logs, results()) if not item.within]
    assert outside == ["gaussian, sde, 1", "mixture, sde, 1"]


def test_what_is_missing_is_named(logs, monkeypatch):
    (logs / RATIOS).unlink()
    with pytest.raises(ConfigError, match=r"ratios\.json is missing; `python scripts/study/ratios\.py --quick` writes"):
        compare(logs, results())
    monkeypatch.setattr(quick, "state_of", lambda run, _: State.BEGUN)
    with pytest.raises(ConfigError, match=r"tiny-drtune-seed50 is not done; `python scripts/study/run\.py --quick`"):
        compare(logs, results())
