r"""Text that anybody may have written, a prompt or the name of a folder, made fit for a figure.

It is no mathematics (a dollar is a dollar), has no control characters, is broken into a few short lines, and holds only
characters that some installed font can draw: any other is written as Python writes it, \u7ea2 or \U0001f392.
"""

from __future__ import annotations

import textwrap
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

WIDTH, LINES = 60, 2  # letters in a line, and lines, unless a figure has less room
ELLIPSIS = " …"
MAX_FONTS = 300  # installed families searched for a character that matplotlib's own font lacks
INVISIBLE = ("Cf", "Cc")  # Unicode's categories of what has no shape: formats, such as joiners, and controls
SELECTORS = range(0xFE00, 0xFE10)  # variants of the character before; also without a shape


def figure_text(text: str, width: int = WIDTH, lines: int = LINES) -> str:
    """For any text of a matplotlib figure: call it before the axes are made, for it may add a font to matplotlib's."""
    from matplotlib import rcParams

    clean = one_line(text)
    fonts = _fonts_for(clean)
    families = [*rcParams["font.family"], *(family for family, _ in fonts)]
    rcParams["font.family"] = list(dict.fromkeys(families))
    return _laid_out(_drawable(clean, [file for _, file in fonts]), width, lines).replace("$", r"\$")


def sheet_text(text: str, width: int, lines: int) -> tuple[str, str]:
    """For Pillow, which draws a text in one font: the text, and the file of the font that has most of it."""
    clean = one_line(text)
    file = max((file for _, file in _fonts_for(clean)), key=lambda file: sum(ord(c) in _glyphs(file) for c in clean))
    return _laid_out(_drawable(clean, [file]), width, lines), file


def one_line(text: str, width: int | None = None) -> str:
    """Without line breaks and what has no shape; shortened to `width` letters. Also for tables in a terminal."""
    spaced = " ".join(text.split())
    shown = "".join(c for c in spaced if unicodedata.category(c) not in INVISIBLE and ord(c) not in SELECTORS)
    return shown if width is None or len(shown) <= width else shown[: width - len(ELLIPSIS)].rstrip() + ELLIPSIS


@contextmanager
def optional_figure(path: Path) -> Iterator[None]:
    """Draw and save a figure in this block: if that fails it is a warning, for the numbers are written already."""
    try:
        yield
    except Exception as error:  # drawing meets fonts, pictures, a full disk: no list of errors would be complete
        reason = one_line(str(error), 200) or type(error).__name__
        warnings.warn(f"{path} could not be drawn ({reason}); the results beside it are whole", stacklevel=3)


# --- layout ---------------------------------------------------------------------------------------------------


def _laid_out(text: str, width: int, lines: int) -> str:
    """In lines of at most so many letters; a letter of East Asian width takes the room of two."""
    if any(unicodedata.east_asian_width(c) in "WF" for c in text):
        width //= 2
    found = textwrap.wrap(text, width)
    if len(found) > lines:
        last = found[lines - 1][: width - len(ELLIPSIS)].rstrip() + ELLIPSIS
        found = [*found[: lines - 1], last]
    return "\n".join(found)


# --- fonts ----------------------------------------------------------------------------------------------------


def _drawable(text: str, files: Sequence[str]) -> str:
    """With every character that none of the fonts has written as its number."""
    return "".join(
        c if any(ord(c) in _glyphs(file) for file in files) else c.encode("ascii", "backslashreplace").decode()
        for c in text
    )


def _fonts_for(text: str) -> list[tuple[str, str]]:
    """Family and file of matplotlib's own font, then of others that have characters which those before lack."""
    own, *others = _installed_fonts()
    found, missing = [own], {ord(c) for c in text} - _glyphs(own[1])
    for font in others:
        if not missing:
            break
        if missing & _glyphs(font[1]):
            found.append(font)
            missing -= _glyphs(font[1])
    return found


@cache
def _installed_fonts() -> list[tuple[str, str]]:
    """Family and file: DejaVu Sans, then one of each family of the system, Noto's sans-serif fonts first."""
    from matplotlib import get_data_path
    from matplotlib.font_manager import fontManager

    bundled = get_data_path()
    own = str(Path(bundled) / "fonts/ttf/DejaVuSans.ttf")
    upright = sorted(fontManager.ttflist, key=lambda font: (font.style != "normal", font.weight != 400, font.fname))
    families: dict[str, str] = {}
    for font in upright:
        if not font.fname.startswith(bundled):  # what is left there is for mathematics, or draws boxes for everything
            families.setdefault(font.name, font.fname)
    others = sorted(families.items(), key=lambda item: (not item[0].startswith("Noto Sans"), item[0]))
    return [("DejaVu Sans", own), *others[:MAX_FONTS]]


@cache
def _glyphs(file: str) -> frozenset[int]:
    """The characters that a font has; none if it cannot be read, or consists of pictures of one size."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(file)
        font.set_size(12, 72)  # refused by a font that is pictures of another size
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(font.get_charmap())
