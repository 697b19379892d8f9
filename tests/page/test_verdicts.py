"""The words: both verdicts need intervals beyond 0, and exploitation needs three things at once."""

from __future__ import annotations

import pytest

from flow_grpo.diversity.paired import Change
from flow_grpo.page.verdicts import direction, diversity_verdict, exploitation_verdict


def change(low: float, high: float) -> Change:
    return Change(old=0.0, new=(low + high) / 2, difference=(low + high) / 2, low=low, high=high)


UP, DOWN, UNCLEAR, NOTHING = change(0.1, 0.3), change(-0.3, -0.1), change(-0.1, 0.3), change(0.0, 0.0)


@pytest.mark.parametrize(
    ("vendi", "verdict"),
    [(DOWN, "less"), (UP, "more"), (UNCLEAR, "not_shown"), (NOTHING, "not_shown"), (None, "not_measured")],
)
def test_diversity_is_less_only_where_the_whole_interval_is(vendi, verdict):
    assert diversity_verdict(vendi) == verdict


@pytest.mark.parametrize("end", [(-0.3, 0.0), (0.0, 0.3)])
def test_an_interval_that_ends_at_0_shows_nothing(end):
    assert diversity_verdict(change(*end)) == direction(change(*end)) == "not_shown"


def test_exploited_is_a_reward_that_rose_and_an_independent_judge_that_fell():
    assert exploitation_verdict(UP, DOWN, True) == "exploited"


@pytest.mark.parametrize("reward", [UP, DOWN, UNCLEAR, NOTHING])
@pytest.mark.parametrize("judge", [UP, DOWN, UNCLEAR, NOTHING])
def test_anything_else_is_not_shown(reward, judge):
    if (reward, judge) != (UP, DOWN):
        assert exploitation_verdict(reward, judge, True) == "not_shown"


@pytest.mark.parametrize("judge", [UP, DOWN, UNCLEAR, NOTHING])
def test_a_judge_of_the_rewards_own_model_shows_nothing(judge):
    assert exploitation_verdict(UP, judge, False) == "same_model"


def test_what_was_not_measured_is_named():
    assert exploitation_verdict(None, DOWN, True) == exploitation_verdict(None, None, True) == "no_reward"
    assert exploitation_verdict(UP, None, True) == "no_judge"
    assert direction(None) == "not_measured"


def test_direction_knows_figures_that_are_better_low():
    assert [direction(x) for x in (UP, DOWN, UNCLEAR)] == ["better", "worse", "not_shown"]
    assert [direction(x, higher_is_better=False) for x in (UP, DOWN, UNCLEAR)] == ["worse", "better", "not_shown"]
