"""The coverage study runs, and says what it found in both files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from scripts.bench import verdicts
from scripts.bench.verdict_situations import Situation, unit


def test_the_study_writes_its_rows(tmp_path, monkeypatch):
    few = [Situation("balanced, partial", 8, 2, 0.5), Situation("diffuse, equal", 8, 2, 0.0, False)]
    monkeypatch.setattr(verdicts, "situations", lambda: iter(few))
    monkeypatch.setattr(verdicts, "TRUTH_SETS", 500)
    monkeypatch.setattr(verdicts, "real_features", lambda: unit(np.random.default_rng(0).normal(size=(2, 40, 8))))
    assert verdicts.main(["--out", str(tmp_path / "new"), "--repeats", "2", "--real"]) == 0
    found = json.loads((tmp_path / "new" / "results.json").read_text())
    kinds = {(row["figure"], row["situation"]) for row in found["rows"]}
    assert {("Vendi", "balanced, partial"), ("reach", "diffuse, equal"), ("judge", "equal")} <= kinds
    assert {("Vendi", "tiny model, half the same"), ("reward", "reward up, judge down")} <= kinds
    assert len((tmp_path / "new" / "table.md").read_text().splitlines()) > len(found["rows"])
    assert found["power"]


def test_truths_are_those_of_the_change():
    equal = verdicts.truths(Situation("diffuse, equal", 8, 2, 0.0))
    assert equal == (0, 0)
    vendi, reach = verdicts.truths(Situation("balanced, nearly all", 8, 2, 0.0))
    assert vendi == pytest.approx(-2.2, abs=0.05)
    assert reach == pytest.approx(-0.6, abs=0.02)
