"""The verdict on the ratio follows the numbers."""

from __future__ import annotations

import pytest

from flow_grpo.statistics import CountedInterval
from scripts.study.claims.claim_4 import gradients, probe_shares, ratio_verdict
from scripts.study.forms import Form
from scripts.study.words import said
from tests.scripts.study.builders import HIGHER, LOWER, ONE, UNCLEAR

SDE, ONE_PROBE, FOUR, SIXTEEN, EXACT = Form("sde", 1), *(Form("ode_step", probes) for probes in (1, 4, 16, 0))
NUMBERS = ("value", "low", "high")


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ({SDE: HIGHER, ONE_PROBE: HIGHER, EXACT: HIGHER}, "does not hold: ode_step trains with one probe"),
        ({SDE: HIGHER, ONE_PROBE: UNCLEAR, EXACT: HIGHER}, "not settled: ode_step is not shown to train with one "
         "probe, and trains with the exact trace, but the two are not told apart"),
        ({SDE: HIGHER, ONE_PROBE: LOWER, EXACT: UNCLEAR}, "holds in part: ode_step lowers the reward with one "
         "probe, and is not shown to train with the exact trace, where no probe adds variance"),
        ({SDE: HIGHER, ONE_PROBE: UNCLEAR, FOUR: HIGHER, SIXTEEN: UNCLEAR}, "not settled: ode_step is not shown to "
         "train with one probe, and is not shown to train with 16 probes, yet it trains with 4 probes"),
        ({SDE: HIGHER, ONE_PROBE: UNCLEAR, SIXTEEN: UNCLEAR}, "holds in part: ode_step is not shown to train with one "
         "probe, and is not shown to train with 16 probes; the exact trace is not yet run"),
        ({SDE: HIGHER, ONE_PROBE: LOWER}, "not settled: ode_step lowers the reward with one probe; more"),
        ({SDE: HIGHER, ONE_PROBE: ONE}, "cannot be settled: ode_step with one probe needs"),
        ({SDE: UNCLEAR, ONE_PROBE: UNCLEAR}, "cannot be settled: the control, sde, is not shown to train"),
        ({ONE_PROBE: UNCLEAR}, "cannot be settled: the control, sde, needs"),
    ],
)  # fmt: skip
def test_the_verdict_on_the_ratio(gains: dict[Form, CountedInterval], verdict: str) -> None:
    assert said("claim-4", "verdict", ratio_verdict(gains)).startswith(verdict)


def test_more_probes_are_the_cure_only_if_they_do_better_than_one() -> None:
    gains = {SDE: HIGHER, ONE_PROBE: UNCLEAR, SIXTEEN: HIGHER}
    assert said("claim-4", "verdict", ratio_verdict(gains, advantage=HIGHER)).startswith(
        "holds: ode_step is not shown to train with one probe, and"
    )
    assert said("claim-4", "verdict", ratio_verdict(gains, advantage=UNCLEAR)).startswith("not settled")


def test_probes_whose_noise_is_small_stand_in_for_the_exact_trace() -> None:
    row = {"form": "ode_step", "batches": 9, "low": 0.1, "high": 0.2}
    rows = [{**row, "probes": 16, "source": source, "value": 0.15} for source in ("uphill", "over_sde")]

    def share(snr: float) -> str:
        probes = {**row, "probes": 16, "source": "probes", "value": snr, "low": 0.8 * snr, "high": 1.2 * snr}
        return said("claim-4", "probe_noise", probe_shares(gradients([*rows, probes])))

    stands_in = "So a run with the exact trace would follow nearly the gradients of one with 16."
    assert share(60.0).endswith(f"2% (1% to 2%) with 16. {stands_in}")
    assert share(9.0).endswith("10% (8% to 12%) with 16.")


@pytest.mark.parametrize(
    ("uphill", "words"),
    [
        ((-0.2, -0.3, -0.1), "its exact gradient points down the reward"),
        ((0.2, 0.1, 0.3), "its exact gradient points up the reward"),
        ((0.1, -0.1, 0.3), "its exact gradient is not shown to point up the reward"),
    ],
)
def test_without_a_run_of_the_exact_trace_the_verdict_tells_of_its_gradient(
    uphill: tuple[float, ...], words: str
) -> None:
    row = {"form": "ode_step", "probes": 0, "source": "uphill", "batches": 9, **dict(zip(NUMBERS, uphill, strict=True))}
    gains = {SDE: HIGHER, ONE_PROBE: UNCLEAR, SIXTEEN: UNCLEAR}
    found = said("claim-4", "verdict", ratio_verdict(gains, gradients([row])))
    assert found.startswith("holds in part: ode_step is not shown to train with one probe, and is not shown to train")
    assert found.endswith(f"so not for a single probe's variance alone; {words}")
