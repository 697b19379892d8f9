"""docs/configuration.md is what flow_grpo/recipes/base.py says."""

from flow_grpo.recipes.base import KEYS
from scripts.docs.configuration import PAGE, text


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == text(), "run python scripts/docs/configuration.py"


def test_every_key_is_on_it_with_what_it_takes():
    page = text()
    for key in KEYS.values():
        assert f"**`{key.name}`**" in page
        assert f"Takes {key.rule.allowed}." in page
