"""The serving bench: its measure, and that its committed table and the sentence in the docs are its results'."""

from __future__ import annotations

import json

import pytest

from scripts.bench.serving import GROUPS, OUT, ROOT, SAMPLES, SLEEP, hidden, table


def row(case: str, seconds: float, processes: int = 1) -> dict:
    return {"case": case, "processes": processes, "seconds": seconds, "images_per_second": 1.0, "load": 1.0}


def test_hidden_is_the_part_of_the_sleep_that_epochs_do_not_show():
    slept = SLEEP * GROUPS * SAMPLES
    rows = [row("no sleep", 2.0), row("served", 2.0 + slept / 4)]
    assert hidden(rows[1], rows) == pytest.approx(0.75)
    assert hidden(row("local", 2.0 + slept), rows) == pytest.approx(0.0)


def test_the_committed_table_is_of_the_committed_results():
    results = json.loads((OUT / "results.json").read_text())
    assert (OUT / "table.md").read_text() == table(results["rows"])


def test_the_docs_quote_the_results():
    rows = json.loads((OUT / "results.json").read_text())["rows"]
    seconds = {(r["case"], r["processes"]): f"{r['seconds']:.1f}" for r in rows}
    said = " ".join((ROOT / "docs/rewards.md").read_text().split())
    for processes in (1, 2):
        found = [seconds[case, processes] for case in ("no sleep", "local", "served, 4 requests")]
        assert "{} s without it, {} s with it in the training's own process, {} s served".format(*found) in said or (
            "{}, {} and {} s".format(*found) in said
        )
