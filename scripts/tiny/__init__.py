"""What made assets/."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from flow_grpo.errors import ConfigError


def exit_code_of(action: Callable[[], None]) -> int:
    """Of a command: 0, or 2 after one sentence about bad input."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        action()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
