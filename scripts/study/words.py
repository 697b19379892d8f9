"""The words of the study: Jinja templates beside the claims, whose macros take numbers and codes and give Markdown."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flow_grpo.statistics import CountedInterval

FOLDER = Path(__file__).parent


@cache
def environment() -> Environment:
    """Of all templates of the study; Markdown: nothing is escaped."""
    made = Environment(
        loader=FileSystemLoader([FOLDER, FOLDER / "claims"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"fmt": format, "shown": shown, "named": named}
    return made


def shown(value: CountedInterval, digits: int = 2, scale: float = 1.0, sign: str = "") -> str:
    """Mean +- half width; a dash where no seed has the figure."""
    if not value.count:
        return "-"
    half = f" ± {scale * (value.high - value.estimate):.{digits}f}" if value.known else ""
    return f"{scale * value.estimate:{sign}.{digits}f}{half}"


def named(form: tuple[str, int]) -> str:
    """A form of the likelihood ratio with its probes; 0: the exact trace."""
    ratio, probes = form
    return ratio if ratio in ("sde", "cfm") else f"{ratio}, {'exact' if probes == 0 else probes}"


def said(anchor: str, part: str, *arguments: Any) -> str:
    """What a macro of a claim's template says, as Markdown; "" where the template has none of this name."""
    module = environment().get_template(template_of(anchor)).module
    macro = getattr(module, part, None)
    return "" if macro is None else markdown(macro(*arguments))


def template_of(anchor: str) -> str:
    """The file beside the claim's."""
    return f"{anchor.replace('-', '_')}.md.j2"


def markdown(text: str) -> str:
    """A line for each paragraph and each row of a table, whatever lines the template has; a row begins with |."""
    return "\n\n".join(_block(block) for block in re.split(r"\n\s*\n", text.strip()))


def _block(text: str) -> str:
    if not text.startswith("|"):
        return " ".join(text.split())
    rows: list[str] = []
    for line in (line.strip() for line in text.splitlines()):
        if line.startswith("|"):
            rows.append(line)
        else:
            rows[-1] += f" {line}"
    return "\n".join(rows)
