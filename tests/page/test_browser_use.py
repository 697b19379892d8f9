"""The page in a headless Chromium: what a reader does with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from flow_grpo.page.data import read_runs
from tests.page.pages import EPOCHS, Page
from tests.synthetic_records import base_images, drifted

# --- the exact law ------------------------------------------------------------------------------------------------


def test_a_run_beside_an_exact_curve_is_told_what_it_keeps_of_it(view: Page) -> None:
    view.open("curve", "right=10")
    assert view.text("#sentence").endswith(
        "Of the different images that a gain like this leaves, it keeps 87 % (81 to 94 %)."
    )
    assert view.count("#scatter .line.law") == 1
    view.open("curve", "right=20")
    assert view.text("#sentence").endswith("No law of the base's images has so much reward to be compared with.")
    view.open("curve", "right=0")
    assert "law" not in view.text("#sentence")
    view.open("run")
    assert view.count("#scatter .line.law") == 0
    assert "keeps" not in view.text("#sentence")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"diversity/kept_of_exact": 0.874}, "that a gain like this leaves, it keeps 87 %."),
        ({"diversity/kept_of_exact": 0.874, "diversity/off_support": 1}, "no law of the base's images goes so far."),
    ],
)
def test_a_share_without_an_interval_and_a_reward_off_the_support_have_words(view: Page, extra, words) -> None:
    view.open("curve")
    said = view.js(f"return keptWords({{ evaluations: [{{ extra: {json.dumps(extra)} }}] }}, "
                   f"{{ epoch: 1, extra: {json.dumps(extra)} }})")  # fmt: skip
    assert said.endswith(words)


def test_the_law_ends_where_the_dots_do(view: Page) -> None:
    view.open("curve")
    law = view.js("return lawPoints([{ points: [{ x: RUNS[0].curve[0][0] }, { x: RUNS[0].curve[1][0] + 0.017 }] }])")
    base = view.js("return RUNS[0].curve[0]")
    assert [point["x"] - base[0] for point in law] == pytest.approx([0, 0.03, 0.047])
    assert law[2]["y"] / base[1] == pytest.approx((3 - 0.1) / 4)


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


def test_images_that_were_not_judged_or_are_of_no_prompt_are_told_apart(view: Page) -> None:
    """Images that are drawn for their diversity alone have no guess, and are no mistakes."""
    view.open("run")
    checkpoint = "{ guess: [null, -1, 0, 1], prompt: [0, 0, 0, 0], run: { prompts: ['a bag', 'a boot'] } }"
    said = view.js(f"return [0, 1, 2, 3].map((place) => judgement({checkpoint}, place))")
    assert [(one["disagrees"], one["words"]) for one in said] == [
        (False, "not judged"),
        (True, "judge: something else"),
        (False, "judge agrees: a bag"),
        (True, "judge sees a boot"),
    ]


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
