"""The verdict on speed follows the numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from scripts.study.claims import claim_1, judge
from scripts.study.claims.claim_1 import speed_verdict, untuned
from scripts.study.comparison import SeedCrossing
from scripts.study.pages import section
from scripts.study.words import said
from tests.scripts.study.builders import record, results_of, study_of


def fractions(*values: float, meaningful: bool = True) -> list[SeedCrossing]:
    return [SeedCrossing(seed, 0.6, meaningful, value, value, 10.0) for seed, value in enumerate(values)]


@pytest.mark.parametrize(
    ("crossings", "verdict"),
    [
        (fractions(0.05, 0.06, 0.07), "holds"),
        (fractions(0.05, 0.06, 0.30), "holds in part: faster"),  # the interval ends above 20 %
        (fractions(0.5, 0.9, 1.6), "not shown"),
        (fractions(1.4, 1.5, 1.6), "does not hold"),
        (fractions(0.05, 0.06, float("nan")), "does not hold: DRTune reached GRPO's final reward in 2 of 3 seeds"),
        (fractions(0.05), "cannot be said: one seed"),
        (fractions(float("nan"), meaningful=False), "cannot be said: GRPO's reward did not rise"),
    ],
)
def test_the_verdict_on_speed(crossings: list[SeedCrossing], verdict: str) -> None:
    assert said("claim-1", "verdict", speed_verdict(crossings)).startswith(verdict)


def test_a_flipped_number_flips_a_section() -> None:
    columns = {
        "vendi": (4, 3, 1),
        "rke": (4, 3, 1),
        "accuracy": (0.8, 0.9, 0.6),
        "nats": (3, 2, 1),
        "spread": (3, 2, 1),
    }
    rising = {**columns, "accuracy": (0.8, 0.85, 0.9)}
    drtunes = [record(seed=seed, reward=(0.5, 0.7 + 0.01 * seed, 0.9), **columns) for seed in range(3)]
    grpos = [record("GRPO", seed, (0.5, 0.52, 0.54), (0, 50, 100), **columns) for seed in range(3)]
    study = study_of([*drtunes, *grpos])
    assert section(claim_1.CLAIM, results_of(study)).verdict == "holds"
    assert section(judge.CLAIM, results_of(study)).verdict == "yes, of DRTune and GRPO"
    slow = [record(seed=seed, reward=(0.5, 0.51, 0.53), **rising) for seed in range(3)]
    study = study_of([*slow, *grpos])
    assert (
        section(claim_1.CLAIM, results_of(study)).verdict
        == "does not hold: DRTune reached GRPO's final reward in 0 of 3 seeds"
    )
    assert section(judge.CLAIM, results_of(study)).verdict == "yes, of GRPO"


def test_claims_that_did_not_take_the_searchs_best_settings_say_so() -> None:
    def tried(label: str, rate: float | None, reward: float) -> SimpleNamespace:
        overrides = {} if rate is None else {"train.learning_rate": rate}
        kinds = {"method": "GRPO", "recipe": "tiny_sd3", "label": label, "overrides": overrides}
        return SimpleNamespace(**kinds, final=lambda name: reward)

    def warning(claimed: float | None, *search: SimpleNamespace) -> str:
        groups = {"claims": [tried("GRPO", claimed, 0.6)], "search": list(search)}
        return said("claim-1", "warning", untuned(SimpleNamespace(of=groups.get)))  # type: ignore[arg-type]

    default, faster = tried("GRPO lr 0.001", 1e-3, 0.5), tried("GRPO lr 0.003", 3e-3, 0.55)
    assert "has been tuned yet" in warning(None)
    assert "GRPO (best: GRPO lr 0.003)" in warning(None, default, faster)
    assert warning(3e-3, default, faster) == ""
    assert warning(None, default) == ""  # the recipe's own rate
    more = tried("GRPO", 3e-3, 0.6)
    more.overrides = {**more.overrides, "train.updates_per_epoch": 4}  # what the search did not find best
    late = {"claims": [more], "search": [faster]}
    assert "GRPO (best: GRPO lr 0.003)" in said("claim-1", "warning", untuned(SimpleNamespace(of=late.get)))  # type: ignore[arg-type]
