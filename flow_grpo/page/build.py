"""`build_page`: run folders -> one HTML file that needs nothing else, neither a network nor another file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from flow_grpo.errors import ConfigError
from flow_grpo.files import strict_json, write_atomically
from flow_grpo.page.contents import contents_of
from flow_grpo.page.data import read_runs
from flow_grpo.page.words import load

MINUS = "\N{MINUS SIGN}"
HERE = Path(__file__).parent
TEMPLATE, STYLE, SCRIPTS = "page.html.j2", "page.css", (
    "text.js", "charts.js", "state.js", "images.js", "plots.js", "page.js",
)  # fmt: skip


def build_page(
    folders: Sequence[Path],
    out: Path,
    command: str = "",
    live: bool = False,
    label: str = "eval",
    names: Sequence[str] = (),
) -> Path:
    """Write the page of one or more run folders, in one piece; the file that was there is replaced.

    Args:
        out: an .html, in a folder that is made if needed.
        command: by which the page can be made again, shown at its end.
        live: whether the first run goes on: the page then loads itself again every so often.
        label: "eval": the current weights; "eval_ema": the averaged ones.
        names: what the runs are called; none: as their folders.

    Returns:
        `out`.

    Raises:
        ConfigError: a folder holds no evaluation of that label, or is no run's; or `out` cannot be written.
    """
    contents = contents_of(read_runs(folders, label, names), live, label)
    script = "\n".join(_asset(name) for name in SCRIPTS)
    style = _asset(STYLE)
    html = _template().render(
        contents=contents,
        words=load(),
        command=command,
        policy=content_policy(script, style),
        style=Markup(style),
        script=Markup(script),
        data=Markup(safe_json(contents.data)),
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, html.encode("utf-8", "backslashreplace"))  # folders of undecodable names
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}).") from None
    return out


def content_policy(script: str, style: str) -> str:
    """What a browser may do with the page: run this script, apply this style, show pictures in it; nothing else.

    Whatever a prompt or a name held, it would not run.
    """
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    return (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def safe_json(value: object) -> str:
    """JSON that may stand in a <script>: no text in it can end the element, or open a comment."""
    text = strict_json(value)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


@cache
def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template(TEMPLATE)


def number(value: float, unit: str = "number", sign: bool = False) -> str:
    """Three significant digits, or per cent of a share; with a true minus, and no sign of 0."""
    if unit == "share":
        near = sign and abs(value) < 0.005  # "-7 to 0" would deny that 0 lies outside
        shown = f"{100 * value:+.1g}" if near else f"{100 * value:+.0f}"
    else:
        shown = f"{value:+#.3g}".rstrip(".")
    if not float(shown):
        return "0"
    return shown.removeprefix("" if sign else "+").replace("-", MINUS)
