"""A browser, pages of every kind, and a view of them. Without Chromium their tests are skipped, except in CI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flow_grpo.page.build import build_page
from scripts.bench.page import start_browser
from tests.page.pages import CHROMIUM, DRIVER, EPOCHS, HOSTILE, Page, beside_curve, without_base, without_base_images
from tests.synthetic_records import write_records
from tests.synthetic_runs import write_run


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One Chromium for all tests; it notes every request and every message of the console."""
    if CHROMIUM is None or DRIVER is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs chromium and chromedriver for the tests of the page.")
        pytest.skip("there is no chromium with its chromedriver")
    driver = start_browser(CHROMIUM, DRIVER, tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of every kind, by name."""
    root = tmp_path_factory.mktemp("pages")
    runs = {
        "run": [write_records(root / "drtune", EPOCHS)],
        "seeds": [write_records(root / f"{name}-seed{seed}", EPOCHS[:4], seed=seed, speed=speed, overrides=rate)
                  for name, speed, rate in (("fast", 1, {}), ("slow", 0.2, {"train.learning_rate": 1e-4}))
                  for seed in (1, 2)],
        "hostile": [write_records(root / "<b>hostile", EPOCHS[:3], HOSTILE, noises=8)],
        "large": [write_records(root / "large", EPOCHS[:3], [f"a long prompt, number {i}, of many words" for i in
                                                             range(10)], noises=8, size=256)],
        "folders": [write_records(root / "folders", (0, 1), parts=("diversity", "images"), names={1: "after"},
                                  trained=False)],
        "alone": [write_records(root / "alone", (0,), parts=("diversity", "images"), trained=False)],
        "blind": [without_base_images(write_records(root / "blind", EPOCHS[:3]))],
        "many": [write_records(root / "many", (0, 10), [f"prompt {i}" for i in range(30)], 32, parts=("images",))],
        "begun": [write_records(root / "begun", (0,))],
        "baseless": [without_base(write_records(root / "baseless", EPOCHS[:3]))],
        "bare": [write_records(root / "bare", EPOCHS[:3], parts=("reward",))],
        "curve": [beside_curve(write_records(root / "curve", EPOCHS[:3], overrides={"reward_fn.pickscore": 1.0}))],
        "old": [write_run(root / "old", [0.5, 0.6, 0.7], [0, 5, 10], True, diversity=True)],
    }  # fmt: skip
    return {name: build_page(folders, root / f"{name}.html", "fme view <run>") for name, folders in runs.items()}


@pytest.fixture
def view(browser: Any, pages: dict[str, Path]) -> Iterator[Page]:
    yield Page(browser, pages)
    browser.get("about:blank")  # a page that loads itself again would go on doing so
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
