"""Places in code that registries name, "module:attribute": imported when they are asked for, not before."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load(place: str) -> Any:
    """What stands at "module:attribute"."""
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)
