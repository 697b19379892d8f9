"""What may be said in words: two verdicts, kept apart, and a direction for each figure.

A verdict needs an interval of the difference to the base that lies on one side of 0. Less diversity alone is no
exploitation, and a reward that rose alone is none either: that takes an independent judge who likes the same images
less. "not_shown" never means "not so": another judge, or more images, may show it.
"""

from __future__ import annotations

from flow_grpo.diversity.paired import Change


def diversity_verdict(vendi: Change | None) -> str:
    """ "less" or "more" diverse than the base, where the whole interval is; "not_shown"; "not_measured" for None."""
    if vendi is None:
        return "not_measured"
    if vendi.high < 0:
        return "less"
    return "more" if vendi.low > 0 else "not_shown"


def exploitation_verdict(reward: Change | None, judge: Change | None, independent: bool) -> str:
    """ "exploited": the reward rose and an independent judge fell, both beyond their intervals; else "not_shown".

    `judge` is the change of the share of images that the judge takes for their own prompt's. `independent`: its model
    is none of the rewards'; else "same_model". "no_reward" (also where both are missing) or "no_judge" for None.
    """
    if reward is None:
        return "no_reward"
    if judge is None:
        return "no_judge"
    if not independent:
        return "same_model"
    return "exploited" if reward.low > 0 and judge.high < 0 else "not_shown"


def direction(change: Change | None, higher_is_better: bool = True) -> str:
    """ "better" or "worse", where the whole interval is; "not_shown"; "not_measured" for None."""
    if change is None:
        return "not_measured"
    low, high = (change.low, change.high) if higher_is_better else (-change.high, -change.low)
    if low > 0:
        return "better"
    return "worse" if high < 0 else "not_shown"
