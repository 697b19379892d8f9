"""docs/*.md that are written by hand: tables that can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["methods.md", "diversity.md", "speed.md", "scenes.md"])
def test_no_cell_of_a_table_is_empty_or_longer_than_a_line(page):
    rows = [line.strip("|") for line in (DOCS / page).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [cell.strip() for row in rows for cell in row.split("|")]
    assert cells
    assert [cell for cell in cells if not 0 < len(cell) <= 60] == []
