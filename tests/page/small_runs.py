"""Small runs, and what a page of them gives its scripts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

EPOCHS = (0, 10, 20)
SMALL: dict[str, Any] = {"prompts": ("a bag", "a boot"), "noises": 8, "epochs": EPOCHS}


def data_of(page: Path) -> dict[str, Any]:
    """What the page gives its scripts."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])
