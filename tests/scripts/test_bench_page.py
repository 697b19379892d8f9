"""The table of the page's bench."""

from scripts.bench.page import Measured, table


def test_the_table_has_a_line_for_each_page() -> None:
    row = Measured("a run", 3 << 20, 2 << 20, 0.25, 281.6, 407.2, 31.4)
    assert table([row]).splitlines()[2:] == ["| a run | 3.00 | 2.00 | 0.25 | 282 | 407 | 31 |"]
