"""Texts that anybody may have written, in figures."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from flow_grpo import figure_text as module
from flow_grpo.figure_text import figure_text, one_line, optional_figure, sheet_text

CHINESE, EMOJI = "红包", "\U0001f392"


@pytest.fixture
def fonts(monkeypatch):
    """Three fonts: one of everything up to Arabic, one of Chinese, one of emoji."""
    glyphs = {"own.ttf": range(0x700), "chinese.ttf": range(0x4E00, 0xA000), "emoji.ttf": range(0x1F000, 0x20000)}
    installed = [("Own", "own.ttf"), ("Chinese", "chinese.ttf"), ("Emoji", "emoji.ttf")]
    monkeypatch.setattr(module, "_installed_fonts", lambda: installed)
    monkeypatch.setattr(module, "_glyphs", lambda file: frozenset(glyphs[file]))
    with mpl.rc_context({"font.family": ["sans-serif"]}):
        yield installed


def pixels(text: str, **options) -> np.ndarray:
    figure = Figure(figsize=(6, 1))
    figure.text(0.1, 0.5, text, **options)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


@pytest.mark.parametrize(
    "text", ["a $^$ bag", r"$\frac{$", "costs $5 or $10", r"a \$ and \\$ b", "$", "$$", "100 % {x}_1"]
)
def test_a_dollar_is_a_dollar(text):
    """Drawn as it would be with mathematics switched off."""
    np.testing.assert_array_equal(pixels(figure_text(text)), pixels(text, parse_math=False))


def test_a_text_is_broken_into_few_lines_and_shortened():
    shown = figure_text("a red bag with a long strap and two pockets", 16, 2)
    assert shown == "a red bag with a\nlong strap and …"
    shown = figure_text(160 * "x", 20, 2).split("\n")
    assert shown == [20 * "x", 18 * "x" + " …"]
    assert figure_text("short") == "short"
    assert figure_text("") == ""


def test_controls_line_breaks_and_joiners_have_no_shape():
    assert one_line("a\nred\t bag\x1b[31m\u202e\u200d\ufe0f\x00") == "a red bag[31m"
    assert one_line(100 * "x", 10) == "xxxxxxxx …"


def test_what_no_font_has_is_written_as_its_number(fonts):
    fonts[:] = fonts[:1]
    assert figure_text(f"{CHINESE} {EMOJI} \udcff") == r"\u7ea2\u5305 \U0001f392 \udcff"


def test_what_another_font_has_is_drawn_with_it(fonts):
    assert figure_text(CHINESE) == CHINESE
    assert mpl.rcParams["font.family"] == ["sans-serif", "Own", "Chinese"]
    assert Text(0, 0, CHINESE).get_fontfamily() == ["sans-serif", "Own", "Chinese"]


def test_wide_letters_take_twice_the_room(fonts):
    assert figure_text(10 * CHINESE, 12, 2) == f"{3 * CHINESE}\n{2 * CHINESE} …"


def test_a_sheet_takes_the_font_that_has_most_of_a_text(fonts):
    assert sheet_text("a bag", 20, 1) == ("a bag", "own.ttf")
    assert sheet_text(5 * CHINESE + "حق", 80, 1) == (5 * CHINESE + r"\u062d\u0642", "chinese.ttf")


def test_every_text_can_be_drawn_without_a_complaint():
    texts = [f"{CHINESE} حقيبة {EMOJI} \udcff\x00", 160 * "漢", "\U0001f469\u200d\U0001f467 ❤\ufe0f", "\U0001d538 ﷽"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in texts:
            assert (pixels(figure_text(text)) < 255).any()


def test_a_figure_that_fails_is_a_warning():
    said = r"^a\.png could not be drawn \(no more\); the results beside it are whole$"
    with pytest.warns(UserWarning, match=said), optional_figure(Path("a.png")):
        raise ValueError("no\nmore")
