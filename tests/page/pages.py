"""A page in a browser, and what the pages of the tests are made of."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from flow_grpo.runs.evaluations import read_record, write_record

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
HOSTILE = (
    "<img src=x onerror=window.hacked=1>",
    "</script><script>window.hacked=2</script>",
    "<!-- <script>",
    "\"'&amp; {{ 7*7 }} ${8*8}",
)
EPOCHS = (0, 10, 20, 40, 60, 80, 120)
SECONDS = 20  # to wait for what the browser does


KINDS = ("run", "seeds", "hostile", "large", "folders", "begun", "baseless", "bare", "old")


def without_base_images(folder: Path) -> Path:
    """The run when its first evaluation could write no pictures."""
    base = read_record(folder / "evaluations/eval_000000.json")
    write_record(folder, replace(base, sprite=None), None)
    return folder


def without_base(folder: Path) -> Path:
    """The run when its first evaluation is lost."""
    (folder / "evaluations/eval_000000.json").unlink()
    (folder / "metrics.jsonl").unlink()
    return folder


def beside_curve(folder: Path, weight: float = 1.0) -> Path:
    """The run when it was held against an exact curve, of the last evaluation's reward alone that is beyond it."""
    points = [{"reward": 0.5, "vendi": 4.0}, {"reward": 0.53, "vendi": 3.0}, {"reward": 0.7, "vendi": 2.0}]
    figures = [
        {"strength": "1.0", "figures": {name: {"estimate": x} for name, x in (point | {"rke": 3.0}).items()}}
        for point in points
    ]
    curve = {
        "prompts": ["a bag"], "set_size": 16, "rewards": {"pickscore": weight}, "features": "x", "bandwidth": 0.5,
        "first": {"reward": [0.5], "vendi": [4.0], "rke": [3.0]}, "best": 0.8, "drawing": "x", "points": figures,
    }  # fmt: skip
    (folder / "curve.json").write_text(json.dumps(curve))
    paths = sorted((folder / "evaluations").glob("eval_*.json"))
    for path in paths[:-1]:
        record = json.loads(path.read_text())
        ends = {"": 0.874, "_low": 0.812, "_high": 0.936}
        record["extra"] |= {f"diversity/kept_of_exact{end}": share for end, share in ends.items()}
        record.pop("sha256", None)
        path.write_text(json.dumps(record))
    return folder


class Page:
    """A page in the browser, and what a reader may do with it."""

    def __init__(self, driver: Any, pages: dict[str, Path]) -> None:
        self.driver, self.pages = driver, pages

    def open(self, page: str | Path, address: str = "", width: int = 1280) -> Page:
        """Afresh, at a width in CSS pixels; `address` is what follows the #."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.get("about:blank")
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # what came before
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        path = self.pages[page] if isinstance(page, str) else page
        self.driver.get(path.as_uri() + (f"#{address}" if address else ""))
        self.until(lambda: self.js("return document.documentElement.dataset.ready"))
        return self

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, condition: Any) -> Any:
        return WebDriverWait(self.driver, SECONDS, 0.03).until(lambda _: condition())

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def count(self, selector: str) -> int:
        return self.js("return document.querySelectorAll(arguments[0]).length", selector)

    def text(self, selector: str) -> str:
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def texts(self, selector: str) -> list[str]:
        return self.js("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def address(self) -> str:
        return self.js("return location.hash")

    def shows(self, model: str) -> None:
        """Wait until the right model is this one, everywhere on the page."""
        self.until(lambda: self.text("#right-name") == model and model in self.text(".row.head span:last-child"))

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> set[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return {url.partition(":")[0] for url in sent}
