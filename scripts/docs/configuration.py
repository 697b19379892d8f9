"""docs/configuration.md: every key with its default, its meaning and what it takes, from flow_grpo/recipes/base.py.

python scripts/docs/configuration.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flow_grpo.files import write_atomically
from flow_grpo.recipes.base import SECTIONS

PAGE = Path(__file__).resolve().parents[2] / "docs/configuration.md"
TEMPLATE = "configuration.md.j2"


def text() -> str:
    """The page."""
    environment = Environment(  # Markdown: nothing is escaped
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    sections = {title[0].upper() + title[1:]: keys for title, keys in SECTIONS.items()}
    return environment.get_template(TEMPLATE).render(sections=sections, shown=repr)


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write_atomically(PAGE, text())


if __name__ == "__main__":
    main()
