"""What changed against the base model, on the images that both evaluations have of one prompt and noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.spatial.distance import squareform

from flow_grpo.diversity.paired import Change, change_of_means, change_of_reach, change_of_shares, change_of_vendi
from flow_grpo.runs.record import Record


def with_changes(record: Record, base: Record, paired: bool = True) -> Record:
    """The record with its changes against the base, on the images that both have of one prompt and noise.

    There are none where the two were not drawn, or rewarded, alike. `paired`: False where images of one number have
    nothing in common, as in two folders of images.
    """
    if record.setting != base.setting:
        return replace(record, changes={})
    found = {
        "reward": _reward_change(record, base, paired),
        "vendi": _vendi_change(record, base, paired),
        "reached": _reach_change(record, base, paired),
        "judge": _judge_change(record, base, paired),
    }
    return replace(record, changes={name: change for name, change in found.items() if change is not None})


def _pairs(record: Record, base: Record) -> list[tuple[int, int]]:
    """Positions (in the base, in the record) of the images of one prompt and noise."""
    old = base.images
    return [(old[key], i) for key, i in record.images.items() if key in old]


def _reward_change(record: Record, base: Record, paired: bool) -> Change | None:
    before, after = base.rewards.get("total"), record.rewards.get("total")
    if before is None or after is None:
        return None
    known = [(before[i], after[j], record.prompt[j]) for i, j in _pairs(record, base)]
    known = [row for row in known if None not in row]
    if not known:
        return None
    old, new, groups = (np.array(column) for column in zip(*known, strict=True))
    return change_of_means(old.astype(float), new.astype(float), groups, paired)


def _judge_change(record: Record, base: Record, paired: bool) -> Change | None:
    before, after = base.judge, record.judge
    if before is None or after is None or before.model != after.model or _judged_among(record) != _judged_among(base):
        return None
    pairs = [(i, j) for i, j in _pairs(record, base) if None not in (before.guess[i], after.guess[j])]
    if not pairs:
        return None
    old = np.array([before.guess[i] == base.prompt[i] for i, _ in pairs])
    return change_of_shares(old, np.array([after.guess[j] == record.prompt[j] for _, j in pairs]), paired)


def _judged_among(record: Record) -> set[str]:
    """The prompts among which the judge chose: of fewer, more images are right by chance."""
    guesses = record.judge.guess if record.judge else ()
    return {record.prompts[p] for p, guess in zip(record.prompt, guesses, strict=True) if guess is not None}


def _matched(record: Record, base: Record) -> list[tuple[int, int]]:
    """Places (in the base's distances, in the record's) of the prompts that both measured on the same noises."""
    before, after = base.diversity, record.diversity
    if before is None or after is None or before.features != after.features:
        return []
    old = {base.prompts[p]: i for i, p in enumerate(before.prompts)}
    places = [(old.get(record.prompts[p], -1), j) for j, p in enumerate(after.prompts)]
    return [(i, j) for i, j in places if i >= 0 and list(before.noise[i]) == list(after.noise[j])]


def _vendi_change(record: Record, base: Record, paired: bool) -> Change | None:
    places = _matched(record, base)
    if not places or base.diversity is None or record.diversity is None:
        return None
    old = [squareform(base.diversity.within[i]) for i, _ in places]
    new = [squareform(record.diversity.within[j]) for _, j in places]
    return change_of_vendi(old, new, record.diversity.order, paired)


def _reach_change(record: Record, base: Record, paired: bool) -> Change | None:
    places = _matched(record, base)
    if not places or base.diversity is None or record.diversity is None or record.diversity.to_base is None:
        return None
    old = [squareform(base.diversity.within[i]) for i, _ in places]
    new = [squareform(record.diversity.within[j]) for _, j in places]
    across = [
        np.reshape(record.diversity.to_base[j], (len(matrix),) * 2) for (_, j), matrix in zip(places, new, strict=True)
    ]
    return change_of_reach(old, new, across, paired=paired)
