"""The page in a headless Chromium: what a reader does with it. Skipped where there is none, except in CI."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from flow_grpo.page.build import build_page
from flow_grpo.page.data import read_runs
from flow_grpo.runs.evaluations import read_record, write_record
from scripts.bench.page import start_browser
from tests.synthetic_records import base_images, drifted, write_records
from tests.synthetic_runs import write_run

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
HOSTILE = (
    "<img src=x onerror=window.hacked=1>",
    "</script><script>window.hacked=2</script>",
    "<!-- <script>",
    "\"'&amp; {{ 7*7 }} ${8*8}",
)
EPOCHS = (0, 10, 20, 40, 60, 80, 120)
SECONDS = 20  # to wait for what the browser does


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
        "old": [write_run(root / "old", [0.5, 0.6, 0.7], [0, 5, 10], True, diversity=True)],
    }  # fmt: skip
    return {name: build_page(folders, root / f"{name}.html", "fme view <run>") for name, folders in runs.items()}


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


@pytest.fixture
def view(browser: Any, pages: dict[str, Path]) -> Iterator[Page]:
    yield Page(browser, pages)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


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


# --- first screen -----------------------------------------------------------------------------------------------


def test_the_first_screen_says_both_verdicts_and_the_sentence(view: Page) -> None:
    view.open("run")
    assert view.text("#diversity-verdict") == "Less diverse than the base"
    assert view.text("#exploitation-verdict") == "Reward exploited"
    assert view.text("#sentence") == (
        "Of 16 images of one prompt the base makes about 3.2 different ones, this checkpoint 1.0."
    )
    assert view.texts("#figures h3") == [
        "Reward", "Different images of 16", "Base images still reached", "Judge recognises the prompt",
    ]  # fmt: skip
    assert view.texts("#figures .tone") == ["better", "worse", "worse", "worse"]
    assert re.search(r"0\.510 → 0\.55\d.*95 %: \+0\.0\d+ to \+0\.0\d+", view.text("[data-figure=reward]"))


def test_verdicts_are_of_the_checkpoint_that_is_shown(view: Page) -> None:
    view.open("run", "right=10")
    assert view.text("#diversity-verdict") == "Less diverse than the base"
    assert view.text("#exploitation-verdict") == "Exploitation of the reward not shown by this judge: look"
    view.open("run", "right=0")
    assert view.text("#diversity-verdict") == "This is the base"


@pytest.mark.parametrize(
    ("kind", "missing", "verdict"),
    [
        ("folders", "Not measured: reward, judge.", "Exploitation of the reward not looked for: no reward"),
        ("bare", "Not measured: different images, base images reached, judge.",
         "Exploitation of the reward not looked for: no judge"),
        ("old", "Not measured: base images reached.", "Exploitation of the reward not looked for: no records"),
    ],
)  # fmt: skip
def test_what_was_not_measured_is_said(view: Page, kind: str, missing: str, verdict: str) -> None:
    view.open(kind)
    assert view.text("#figures-note") == missing
    assert view.text("#exploitation-verdict") == verdict


def test_a_run_without_records_shows_its_pictures_and_curves(view: Page) -> None:
    view.open("old")
    widths = view.js("return [...document.querySelectorAll('.pictures img')].map((image) => image.naturalWidth)")
    assert widths == [8 * 33] * 2
    assert view.count("#charts svg") == 3
    assert view.texts("#figures .tone") == ["no interval"] * 3


def test_two_folders_have_no_training(view: Page) -> None:
    view.open("folders")
    assert not view.find("#along").is_displayed()
    assert view.count(".on-the-right .tile") == 160
    assert view.text("#images-note").startswith("No judge was asked.")
    assert re.fullmatch(
        r"Of 16 images of one prompt, base model makes about \d\.\d different ones, and after \d\.\d\.",
        view.text("#sentence"),
    )


def test_one_thing_alone_is_no_base(view: Page) -> None:
    view.open("alone")
    assert view.text("#diversity-verdict") == "Compared with nothing"
    assert view.text("#sentence") == "Of 16 images of one prompt, about 3.2 are different ones."
    assert set(view.texts("#figures .tone")) == {"compared with nothing"}


def test_the_first_images_that_there_are_do_not_stand_in_for_the_bases(view: Page) -> None:
    view.open("blind")
    assert view.js("return RUNS[0].base.name") == "base model"
    assert view.js("return RUNS[0].baseCheckpoint === undefined")
    assert not view.find("#prompts").is_displayed()
    assert view.complaints() == []


def test_a_run_that_has_begun_shows_its_base(view: Page) -> None:
    view.open("begun")
    assert view.text("#diversity-verdict") == "This is the base"
    assert view.text("#sentence") == "Of 16 images of one prompt the base makes about 3.2 different ones."
    assert view.find("#right").get_attribute("disabled")
    assert view.texts("#figures .tone") == ["the base"] * 3
    assert not view.find("#suspects").is_displayed()


def test_a_run_without_its_base_is_compared_with_nothing(view: Page) -> None:
    view.open("baseless")
    assert view.text("#models") == "epoch 20"
    assert view.count("#charts .base") == 0
    assert not view.find("#suspects").is_displayed()
    assert not view.find("#prompts").is_displayed()


# --- grids ------------------------------------------------------------------------------------------------------


def test_tiles_show_the_pixels_of_their_image(view: Page) -> None:
    view.open("run", "right=20")
    shown = view.js(
        """const canvas = document.querySelectorAll('.on-the-right')[3].querySelectorAll('canvas')[5];
        return [...canvas.getContext('2d').getImageData(0, 0, 32, 32).data];"""
    )
    images = drifted(base_images(10, 16), 0.97 * (1 - np.exp(-20 / 12)))
    pixels = np.array(shown).reshape(32, 32, 4)[..., :3]
    np.testing.assert_array_equal(pixels, (images[3, 5].transpose(1, 2, 0) * 255).round())


def test_the_rest_of_many_images_is_shown_when_asked_for(view: Page) -> None:
    view.open("many")
    assert view.count(".on-the-right .tile") == 640
    view.find("#filter").send_keys("prompt 29")
    view.until(lambda: view.count(".on-the-right .tile") == 32)
    assert not view.find("#more-prompts").is_displayed()
    view.find("#filter").send_keys(Keys.BACKSPACE * 9)
    view.until(
        lambda: view.text("#more-prompts") == "show all 30 prompts" and view.find("#more-prompts").is_displayed()
    )
    view.find("#more-prompts").click()
    view.until(lambda: view.count(".on-the-right .tile") == 960)


def test_images_are_framed_where_the_judge_disagrees(view: Page, pages: dict[str, Path]) -> None:
    record = read_runs([pages["run"].parent / "drtune"])[0].last.record
    assert record is not None
    assert record.judge is not None
    wrong = int(np.sum(np.not_equal(record.judge.guess, record.prompt)))
    view.open("run")
    assert 0 < wrong < 160
    assert view.count(".on-the-right .disagrees") == wrong


def test_pointing_at_an_image_frames_the_same_noise_on_the_other_side(view: Page) -> None:
    view.open("run")
    ActionChains(view.driver).move_to_element(view.find(".on-the-left .tile")).perform()
    view.until(lambda: view.count(".on-the-right .tile.twin") == 1 and view.count(".tile.twin") == 2)


def test_arrow_keys_walk_through_the_grid(view: Page) -> None:
    view.open("run")
    view.js("document.querySelector('.on-the-left .tile').focus()")
    view.press(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert view.js("return document.activeElement.ariaLabel").startswith("a trouser, noise 1, base model")
    assert view.text("#right-name") == "epoch 120"  # the page itself does not move


def test_suspects_were_recognised_at_the_base_and_gained_reward(view: Page) -> None:
    view.open("run")
    found = int(view.text("#suspects-note").split()[0])
    assert view.count(".card") == 12 < found
    view.find("#more-suspects").click()
    view.until(lambda: view.count(".card") == found)
    assert view.count(".card .tile.disagrees") == found  # the second of each pair
    gains = [re.search(r"reward ([\d.]+) → ([\d.]+)", text) for text in view.texts(".card")]
    assert all(gain and float(gain[2]) > float(gain[1]) for gain in gains)


# --- the bar ----------------------------------------------------------------------------------------------------


def test_the_slider_moves_the_right_model(view: Page) -> None:
    view.open("run")
    view.find("#right").send_keys(Keys.ARROW_LEFT)
    view.shows("epoch 80")
    assert view.address() == "#right=80"
    assert view.find("#right").get_attribute("aria-valuetext") == "epoch 80"
    view.find("#previous").click()
    view.shows("epoch 60")
    view.find("#next").click()
    view.shows("epoch 80")


def test_arrow_keys_move_the_right_model(view: Page) -> None:
    view.open("run")
    view.press(Keys.ARROW_LEFT)
    view.shows("epoch 80")
    view.press(Keys.ARROW_RIGHT)
    view.shows("epoch 120")
    assert view.address() == ""


def test_the_left_model_is_chosen(view: Page) -> None:
    view.open("run")
    Select(view.find("#left")).select_by_visible_text("epoch 20")
    view.until(lambda: view.text(".row.head span:nth-child(2)") == "epoch 20")
    assert view.address() == "#left=20"


def test_the_filter_leaves_the_prompts_that_contain_it(view: Page) -> None:
    view.open("run")
    view.find("#filter").send_keys("SH")
    view.until(lambda: view.texts(".row .prompt") == ["", "a t-shirt", "a shirt"])
    assert view.texts(".losses tbody th") == ["a shirt", "a t-shirt"]
    assert view.address() == "#filter=SH"
    assert "2 of 10 prompts." in view.text("#images-note")
    view.press(Keys.ARROW_LEFT)  # moves the cursor in the text, not the checkpoint
    assert view.text("#right-name") == "epoch 120"


def test_prompts_stand_by_their_loss_and_filter_the_page(view: Page) -> None:
    view.open("run")
    changes = [int(text.rstrip(" %").replace("\N{MINUS SIGN}", "-")) for text in view.texts(".losses td:nth-child(4)")]
    assert len(changes) == 10
    assert changes == sorted(changes)
    view.find(".losses button").click()
    view.until(lambda: view.count(".losses tbody tr") == 1)
    assert view.js("return document.activeElement.className") == "link"  # it still has the focus


def test_the_bar_stays(view: Page) -> None:
    view.open("run")
    view.js("scrollTo(0, 1500)")
    assert abs(view.js("return document.getElementById('bar').getBoundingClientRect().top")) < 1


# --- charts -----------------------------------------------------------------------------------------------------


def test_hovering_one_chart_marks_the_evaluation_in_all(view: Page) -> None:
    view.open("run")
    dots = view.driver.find_elements(By.CSS_SELECTOR, "#charts .chart:first-child .dot")
    ActionChains(view.driver).move_to_element(dots[3]).perform()
    view.until(lambda: all(text.startswith("epoch 40: ") for text in view.texts("#charts .readout")))
    assert view.count("#charts .hover[visibility=visible]") == 4
    ActionChains(view.driver).move_to_element(view.find("h1")).perform()
    view.until(lambda: all(text.startswith("epoch 120: ") for text in view.texts("#charts .readout")))


def test_a_click_on_a_chart_goes_to_that_checkpoint(view: Page) -> None:
    view.open("run")
    dots = view.driver.find_elements(By.CSS_SELECTOR, "#charts .chart:nth-child(2) .dot")
    ActionChains(view.driver).move_to_element(dots[2]).click().perform()
    view.shows("epoch 20")


def test_the_horizontal_axis_is_chosen(view: Page) -> None:
    view.open("run")
    ticks = "#charts .chart:first-child svg text[text-anchor=middle]"
    Select(view.find("#axis")).select_by_visible_text("in network evaluations")
    view.until(lambda: any(text.endswith("K") for text in view.texts(ticks)))
    assert view.address() == "#axis=network_evaluations"


def test_a_dot_of_the_scatter_shows_its_images_and_goes_there(view: Page) -> None:
    view.open("run")
    dots = view.driver.find_elements(By.CSS_SELECTOR, "#scatter .dot")
    assert len(dots) == len(EPOCHS)
    ActionChains(view.driver).move_to_element(dots[1]).perform()
    view.until(lambda: view.text("#thumbnails h3") == "epoch 10")
    assert view.count("#thumbnails .tile") == 18
    view.js("arguments[0].focus()", dots[2])
    assert view.text("#thumbnails h3") == "epoch 20"
    view.press(Keys.ENTER)
    view.shows("epoch 20")


def test_marks_of_a_chart_are_where_the_numbers_are(view: Page) -> None:
    view.open("run")
    heights = view.js(
        "return [...document.querySelectorAll('#charts .chart:first-child .dot')].map((d) => +d.getAttribute('cy'))"
    )
    figures = [e.figures["reward"] for e in read_runs([view.pages["run"].parent / "drtune"])[0].evaluations]
    slope, offset = np.polyfit(figures, heights, 1)
    assert slope < 0
    np.testing.assert_allclose(np.polyval([slope, offset], figures), heights, atol=0.1)


# --- one image at every checkpoint ------------------------------------------------------------------------------


def test_an_image_opens_at_every_checkpoint(view: Page) -> None:
    view.open("run")
    view.driver.find_elements(By.CSS_SELECTOR, ".on-the-right .tile")[16 + 2].click()
    view.until(lambda: view.text("#dialog-title") == "a trouser, noise 2")
    assert view.count("#film figure") == len(EPOCHS)
    assert view.texts("#pair b") == ["base model", "epoch 120"]
    view.press(Keys.ARROW_LEFT)
    view.until(lambda: view.texts("#pair b") == ["base model", "epoch 80"])
    view.press(Keys.ARROW_DOWN)
    view.until(lambda: view.text("#dialog-title") == "a trouser, noise 3")
    view.press(Keys.ARROW_UP, Keys.ARROW_UP)
    view.until(lambda: view.text("#dialog-title") == "a trouser, noise 1")
    assert view.address() == "#right=80&prompt=a+trouser&noise=1"
    view.press(Keys.ESCAPE)
    view.until(lambda: view.address() == "#right=80")
    assert view.js("return document.activeElement.dataset.image") == "1 a trouser"
    assert view.text("#right-name") == "epoch 80"


def test_the_buttons_of_the_dialog_move_too(view: Page) -> None:
    view.open("run", "prompt=a+bag&noise=0")
    for button, title in (
        ("noise-down", "a bag, noise 1"),
        ("noise-up", "a bag, noise 0"),
        ("noise-up", "a bag, noise 0"),
    ):
        view.find(f"#{button}").click()
        view.until(lambda title=title: view.text("#dialog-title") == title)
    view.find("#dialog-previous").click()
    view.until(lambda: view.text(".film .current b") == "epoch 80")
    view.find("#film figure:first-child .tile").click()
    view.until(lambda: view.text(".film .current b") == "base model")
    view.find("#close").click()
    view.until(lambda: not view.js("return document.getElementById('dialog').open"))


# --- the address ------------------------------------------------------------------------------------------------


def test_the_address_brings_everything_back(view: Page) -> None:
    address = "left=20&right=60&filter=sh&axis=seconds&prompt=a+shirt&noise=4&open=measured"
    view.open("run", address)
    assert view.text("#right-name") == "epoch 60"
    assert view.text("#left option:checked") == "epoch 20"
    assert view.find("#filter").get_attribute("value") == "sh"
    assert view.find("#axis").get_attribute("value") == "seconds"
    assert view.text("#dialog-title") == "a shirt, noise 4"
    assert view.js("return document.getElementById('fold-measured').open")
    view.js("update()")
    assert view.address() == f"#{address}"


@pytest.mark.parametrize(
    "address", ["right=abc", "run=none&left=1e999", "prompt=no+such&noise=99", "axis=x&open=y", "%"]
)
def test_a_senseless_address_is_a_page_all_the_same(view: Page, address: str) -> None:
    view.open("run", address)
    assert view.count(".row") == 11
    assert view.complaints() == []


# --- several runs -----------------------------------------------------------------------------------------------


def test_seeds_are_one_line_with_a_band(view: Page) -> None:
    view.open("seeds")
    assert view.texts("#legend > span:not(.quiet)") == ["fast, mean of 2 seeds", "slow, mean of 2 seeds"]
    assert view.count("#charts .chart:first-child .band") == 3  # two means, and the run itself, which has none
    assert view.texts(".runs tbody th") == ["fast", "slow"]
    assert view.count(".runs .tone") == 4


def test_a_run_is_chosen_and_compared_with_another_ones_images(view: Page) -> None:
    view.open("seeds")
    Select(view.find("#run")).select_by_visible_text("slow-seed2")
    view.until(lambda: view.text("#run-name") == "slow-seed2")
    Select(view.find("#left")).select_by_index(3)  # the last of fast-seed1
    view.until(lambda: view.text(".row.head span:nth-child(2)") == "fast-seed1: epoch 40")
    assert view.address() == "#run=slow-seed2&leftrun=fast-seed1&left=40"
    assert view.count(".on-the-left .tile") == view.count(".on-the-right .tile") == 160


# --- every kind of page -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_asked_of_a_network_and_nothing_is_wrong(view: Page, kind: str) -> None:
    view.open(kind)
    view.js("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    view.press(Keys.ARROW_LEFT)
    view.until(lambda: view.js("return state.right === Math.max(RUNS[0].checkpoints.length - 2, 0)"))
    assert view.requests() <= {"file", "data"}
    assert view.complaints() == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [390, 820])
def test_a_narrow_screen_does_not_scroll_sideways(view: Page, kind: str, width: int) -> None:
    view.open(kind, "open=numbers,extra,settings,environment,measured,command", width)
    sizes = view.js("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert sizes == [width, width]


def test_the_dialog_fits_a_telephone(view: Page) -> None:
    view.open("large", "prompt=a+long+prompt%2C+number+3%2C+of+many+words&noise=2", 390)
    box = view.js("const b = document.getElementById('dialog').getBoundingClientRect(); return [b.left, b.right]")
    assert 0 <= box[0] < box[1] <= 390
    assert view.js("const d = document.getElementById('dialog'); return d.scrollWidth <= d.clientWidth")


@pytest.mark.parametrize(("scheme", "dark"), [("dark", True), ("light", False)])
def test_colours_follow_the_device_and_are_legible(view: Page, scheme: str, dark: bool) -> None:
    view.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    view.open("run")
    colour = """const [selector, name] = arguments;
        return getComputedStyle(document.querySelector(selector))[name].match(/[\\d.]+/g).slice(0, 3).map(Number);"""
    paper = view.js(colour, "body", "backgroundColor")
    assert (_luminance(paper) < 0.05) == dark
    for selector in ("body", ".quiet", "h1 .worse", "#filter", ".link"):
        assert _contrast(view.js(colour, selector, "color"), paper) >= 4.5, selector  # WCAG AA
    for tone in (".tone.better", ".tone.worse"):
        assert _contrast(view.js(colour, tone, "color"), view.js(colour, tone, "backgroundColor")) >= 4.5, tone
    assert _contrast(view.js(colour, "svg text", "fill"), paper) >= 4.5
    assert _contrast(view.js(colour, "svg .line", "stroke"), paper) >= 3


def _luminance(colour: list[float]) -> float:
    """WCAG's relative luminance of 8-bit sRGB."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def _contrast(one: list[float], other: list[float]) -> float:
    dark, light = sorted([_luminance(one), _luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def test_prompts_that_are_html_are_text(view: Page) -> None:
    view.open("hostile")
    assert view.texts(".row .prompt")[1:] == list(HOSTILE)
    assert view.js("return window.hacked") is None
    assert view.text("#run-name") == "<b>hostile"
    assert view.count("body img") == 0
    view.find(".on-the-right .tile").click()
    view.until(lambda: view.text("#dialog-title") == f"{HOSTILE[0]}, noise 0")
    assert view.js("return window.hacked") is None


def test_a_script_that_got_into_the_page_would_not_run(view: Page) -> None:
    view.open("run")
    view.js("document.body.insertAdjacentHTML('beforeend', '<img src=data: onerror=window.hacked=3>')")
    view.js("const s = document.createElement('script'); s.textContent = 'window.hacked = 4'; document.body.append(s)")
    assert view.js("return window.hacked") is None
    assert any("Content Security Policy" in message for message in view.complaints())


@pytest.mark.parametrize("kind", ["run", "seeds", "folders"])
def test_a_screen_reader_is_told_what_everything_is(view: Page, kind: str) -> None:
    view.open(kind)
    nodes = view.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = ("button", "slider", "combobox", "searchbox", "image", "img", "dialog", "group")
    told = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored")]
    named = [(role, name) for role, name in told if role in roles]
    assert ("slider", "right epoch 120") in named or kind != "run"
    assert [role for role, name in named if not name and role != "group"] == []
    assert view.js("return document.documentElement.lang") == "en"
    assert view.js("return [...document.querySelectorAll('h1, h2')][0].tagName") == "H1"


def test_one_stop_of_the_tab_key_leads_into_the_grids(view: Page) -> None:
    view.open("run")
    assert view.count("#grids [tabindex='0']") == 1


def test_the_printed_page_is_open_and_without_controls(view: Page) -> None:
    view.open("run", width=760)
    view.js("dispatchEvent(new Event('beforeprint'))")
    view.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert view.js("return [...document.querySelectorAll('details')].every((d) => d.open)")
    assert not view.find("#bar").is_displayed()
    assert view.js("return document.documentElement.scrollWidth") == 760
    assert view.driver.execute_cdp_cmd("Page.printToPDF", {})["data"].startswith("JVBERi0")  # %PDF-
    view.js("dispatchEvent(new Event('afterprint'))")
    assert view.count("details[open]") == 0


# --- a run that goes on -----------------------------------------------------------------------------------------


def test_the_page_of_a_run_that_goes_on_loads_itself_again(view: Page, tmp_path: Path) -> None:
    folder = write_records(tmp_path / "run", EPOCHS[:3])
    page = build_page([folder], tmp_path / "page.html", live=True)
    page.write_text(page.read_text().replace('"refresh": 20', '"refresh": 0.2'))
    view.open(page, "filter=bag")
    assert re.fullmatch(r"training: epoch 20, at \d{4}-\d\d-\d\d \d\d:\d\d .*", view.text("#status"))
    write_records(tmp_path / "later" / "run", EPOCHS[:5])
    build_page([tmp_path / "later" / "run"], page, live=False)
    view.until(lambda: view.js("return document.documentElement.dataset.ready"))
    view.until(lambda: view.text("#right-name") == "epoch 60")
    assert view.address() == "#filter=bag"
    assert not view.find("#status").is_displayed()


def test_it_waits_while_an_image_is_open(view: Page, tmp_path: Path) -> None:
    page = build_page([write_records(tmp_path / "run", EPOCHS[:3])], tmp_path / "page.html", live=True)
    page.write_text(page.read_text().replace('"refresh": 20', '"refresh": 0.3'))
    view.open(page, "prompt=a+bag&noise=1")
    view.js("window.same = true; window.passed = 0; setInterval(() => (window.passed += 1), 300)")
    view.until(lambda: view.js("return window.passed") > 3)
    assert view.js("return window.same")
    view.find("#close").click()
    view.until(lambda: view.js("return window.same") is None)
