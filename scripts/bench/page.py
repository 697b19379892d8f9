"""Weight and opening time of the page.

    python scripts/bench/page.py [RUN_FOLDER ...] [--out assets/figures/page] [--repeats 7]

It writes `results.json` and `table.md`. Without run folders it measures two made-up runs of 12 evaluations: of 160
images of 32 x 32 pixels each, and of 80 images of 192 x 192.

- Weight: bytes of the HTML file, and of the pictures in it before base64.
- Opening: a headless Chromium that has started already opens the file from the disk; from the navigation's start
  (Navigation Timing) until both grids are drawn, all pictures decoded. Median of --repeats, each on an empty tab.
- Moving: the time in which the page draws all that depends on the checkpoint, which the slider calls for. Median over
  all checkpoints, their pictures decoded before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import one another; no install offers them

from flow_grpo.commands import cli
from flow_grpo.page.build import build_page
from scripts.bench.machine import cpu_model
from tests.synthetic_records import write_records

FLAGS = (
    "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "hide-scrollbars",
)  # fmt: skip
SYNTHETIC = {"12 evaluations of 160 images of 32 px": (16, 32), "12 evaluations of 80 images of 192 px": (8, 192)}
EPOCHS = range(0, 120, 10)
SECONDS = 60  # to wait for a page

READY = "return document.documentElement.dataset.ready && performance.getEntriesByName('first-grid')[0].startTime"
MOVES = """const times = [];
for (const round of [0, 1])  // in the first one the pictures are decoded
  for (let i = 0; i < RUNS[0].checkpoints.length; i += 1) {
    state.right = i;
    const start = performance.now();
    update();
    if (round) times.push(performance.now() - start);
  }
return times;"""


@dataclass(frozen=True)
class Measured:
    """One row of the table."""

    page: str
    html_bytes: int
    picture_bytes: int
    build_seconds: float
    opening_ms: float  # median
    opening_ms_worst: float
    moving_ms: float  # median


def start_browser(binary: str, driver: str, profile: Path) -> Any:
    """A headless Chromium with a profile of its own, which notes its requests and what its console says."""
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def measure(browser: Any, name: str, folders: Sequence[Path], repeats: int, scratch: Path) -> Measured:
    """Build one page and open it so many times."""
    start = time.perf_counter()
    page = build_page(folders, scratch / "page.html")
    seconds = time.perf_counter() - start
    opening = [open_once(browser, page) for _ in range(repeats)]
    pictures = sum(path.stat().st_size for folder in folders for path in folder.glob("evaluations/*.webp"))
    moving = statistics.median(browser.execute_script(MOVES))
    middle = statistics.median(opening)
    return Measured(name, page.stat().st_size, pictures, seconds, middle, max(opening), moving)


def open_once(browser: Any, page: Path) -> float:
    """Milliseconds from the navigation's start until both grids are drawn."""
    browser.get("about:blank")
    browser.get(page.resolve().as_uri())
    return float(WebDriverWait(browser, SECONDS, 0.05).until(lambda driver: driver.execute_script(READY)))


def table(rows: Sequence[Measured]) -> str:
    """The rows in Markdown."""
    lines = ["| page | HTML, MiB | pictures, MiB | built in, s | opens in, ms | slowest, ms | moves in, ms |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        sizes = f"{row.html_bytes / 2**20:.2f} | {row.picture_bytes / 2**20:.2f} | {row.build_seconds:.2f}"
        times = f"{row.opening_ms:.0f} | {row.opening_ms_worst:.0f} | {row.moving_ms:.0f}"
        lines.append(f"| {row.page} | {sizes} | {times} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write; exit code 2 after one sentence about bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="RUN_FOLDER", help="measured as one page")
    parser.add_argument("--out", type=Path, default=Path("assets/figures/page"), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="openings of a page (default: %(default)s)")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="default: %(default)s")
    parser.add_argument("--chromedriver", default="/usr/bin/chromedriver", help="default: %(default)s")
    args = parser.parse_args(argv)
    with cli.one_sentence_errors(), tempfile.TemporaryDirectory() as scratch:
        rows = measure_all(args, Path(scratch))
    write(args.out, rows)
    print(table(rows), end="")


def measure_all(args: argparse.Namespace, scratch: Path) -> list[Measured]:
    """The page of the given folders, or those of the made-up runs."""
    pages = {", ".join(folder.name for folder in args.folders): args.folders} if args.folders else made_up(scratch)
    browser = start_browser(args.chromium, args.chromedriver, scratch / "profile")
    try:
        version = browser.capabilities["browserVersion"]
        print(f"Chromium {version}, {cpu_model()}", file=sys.stderr)
        return [measure(browser, name, folders, args.repeats, scratch) for name, folders in pages.items()]
    finally:
        browser.quit()


def made_up(scratch: Path) -> dict[str, list[Path]]:
    """A run for each row of SYNTHETIC."""
    return {
        name: [write_records(scratch / f"run-{size}", EPOCHS, noises=noises, size=size)]
        for name, (noises, size) in SYNTHETIC.items()
    }


def write(out: Path, rows: Sequence[Measured]) -> None:
    """results.json and table.md."""
    out.mkdir(parents=True, exist_ok=True)
    results = {"cpu": cpu_model(), "pages": [asdict(row) for row in rows]}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
