"""The page in a headless Chromium: its first screen, and what holds of every kind of page. Skipped where there is none,
except in CI.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from flow_grpo.page.build import build_page
from tests.page.pages import EPOCHS, HOSTILE, KINDS, Page
from tests.synthetic_records import write_records

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
