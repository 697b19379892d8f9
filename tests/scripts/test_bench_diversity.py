"""The benchmark of the diversity scores: its data, its limits, and that its methods agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.bench import diversity as bench


def rows_of(folder) -> dict[str, dict]:
    return {row["method"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}


def test_the_command_runs_and_its_methods_agree(tmp_path, monkeypatch):
    kept = {name: score for name, score in bench.methods().items() if "nothing" not in name and "score_X" not in name}
    monkeypatch.setattr(bench, "methods", lambda: kept)  # each is a process of a second or two
    assert bench.main(["--sizes=60", "--dims=16", "--frequencies=64", "--threads=1", f"--out={tmp_path}"]) == 0
    rows = rows_of(tmp_path)
    assert list(rows) == list(kept)
    values = {method: row["values"] for method, row in rows.items()}
    cosine = values["exact cosine Vendi"][bench.COSINE]
    package = values["vendi-score `score_dual`"][bench.COSINE]
    assert package == pytest.approx(cosine, rel=1e-4)  # it stays in float32
    for exact, package, name in (
        ("exact RKE", "vendi-score `score_K`, q = 2", bench.RKE),
        ("exact Gaussian Vendi", "vendi-score `score_K`", bench.GAUSSIAN),
    ):
        assert values[package][name] == pytest.approx(values[exact][name], rel=1e-5)
        random = values["random features"]
        key = name if name in random else name + bench.UNRESOLVED
        assert abs(random[key] - values[exact][name]) < 8 * random[key + bench.ERROR] < values[exact][name]
    assert all(row["seconds"] >= 0 and row["peak_mib"] > 10 and not row["failure"] for row in rows.values())
    table = (tmp_path / "table.md").read_text()
    assert sum(line.startswith("| 60 |") for line in table.splitlines()) == len(rows)


def test_what_takes_too_long_did_not_finish(tmp_path):
    assert bench.main(["--sizes=20", "--dims=4", "--limit-seconds=0.01", f"--out={tmp_path}"]) == 0
    rows = rows_of(tmp_path)
    assert all(row["failure"] == "over 0.01 s" and row["seconds"] is None for row in rows.values())
    assert "did not finish: over 0.01 s" in (tmp_path / "table.md").read_text()


def test_what_asks_for_too_much_memory_did_not_finish(tmp_path):
    features = tmp_path / "x.npy"
    np.save(features, bench.make_features(3000, 8, 0))
    row = bench.measure("exact Gaussian Vendi", 3000, features, 1.0, bench.parse(["--limit-gib=0.06"]))
    assert (row.failure, row.peak_mib) == ("over 0.06 GiB", None)


def test_a_method_that_fails_says_why(tmp_path):
    row = bench.measure("exact RKE", 3, tmp_path / "missing.npy", 1.0, bench.parse([]))
    assert "missing.npy" in row.failure


def test_the_peak_of_a_process_grows_by_what_it_holds(tmp_path):
    """A parent's memory is not counted: here it is torch's, of other tests."""
    peaks = []
    for n in (1000, 40_000):
        np.save(tmp_path / "x.npy", bench.make_features(n, 256, 0))
        peaks.append(bench.measure("nothing, our imports", n, tmp_path / "x.npy", 1.0, bench.parse([])).peak_mib)
    assert peaks[1] - peaks[0] == pytest.approx(39_000 * 256 * 4 / 2**20, rel=0.15)


def test_features_are_keyed_unit_rows_in_clusters():
    x = bench.make_features(500, 64, 0)
    assert x.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(x, bench.make_features(500, 64, 0))
    products = x @ x.T
    assert (products > 0.5).sum(1).max() > 50, "no cluster"
    assert (products < 0.3).mean() > 0.5, "one cluster"


def test_bad_sizes_are_named(tmp_path, capsys):
    for sizes in ("1", "10,x", "", "-5"):
        assert bench.main([f"--sizes={sizes}", f"--out={tmp_path}"]) == 2
        assert f"--sizes is {sizes!r}" in capsys.readouterr().err


# --- the committed table: python scripts/bench/diversity.py --out assets/figures/diversity_bench --------------

COMMITTED = json.loads((Path(__file__).parents[2] / "assets/figures/diversity_bench/results.json").read_text())


def committed(n: int, method: str) -> dict:
    return next(row for row in COMMITTED["rows"] if row["n"] == n and row["method"] == method)


def test_exact_cosine_vendi_of_50000_images_takes_under_a_minute_and_2_gib():
    row = committed(50_000, "exact cosine Vendi")
    assert (COMMITTED["dims"], COMMITTED["threads"]) == (768, 2)
    assert row["seconds"] < 60
    assert row["peak_mib"] < 2048


def test_in_the_committed_table_ours_agrees_with_the_package_where_it_finishes():
    pairs = {
        "exact cosine Vendi": "vendi-score `score_dual`",
        "exact RKE": "vendi-score `score_K`, q = 2",
        "exact Gaussian Vendi": "vendi-score `score_K`",
    }
    for n in (1000, 10_000):
        for ours, package in pairs.items():
            (value,), (theirs,) = (committed(n, method)["values"].values() for method in (ours, package))
            assert value == pytest.approx(theirs, rel=1e-5), (n, ours)
