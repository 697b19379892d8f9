"""Places in code: those that registries name, "module:attribute"; packages that may be missing; lines of errors."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from flow_grpo.errors import ConfigError


def load(place: str) -> Any:
    """What stands at "module:attribute"."""
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)


def check_packages(subject: str, packages: Sequence[str], extra: str) -> None:
    """ConfigError, beginning with `subject`, unless the packages of an extra of pyproject.toml are installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"{subject} needs {' and '.join(missing)}, not installed here; "
            f"pip install 'flow-matching-entropy[{extra}]' installs all that it needs."
        )


def line_in(error: BaseException, file: str) -> int | None:
    """The last line of a file that an error came through, or that is no Python; None: it was not there."""
    path = os.path.realpath(file)
    frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if os.path.realpath(f.filename) == path]
    if isinstance(error, SyntaxError) and error.filename and os.path.realpath(error.filename) == path:
        return error.lineno
    return frames[-1] if frames else None


def failure(error: BaseException, file: str = "") -> str:
    """FILE, line N: Error: the first line of its text; without a file, where it was raised."""
    if not file:
        frames = traceback.extract_tb(error.__traceback__)
        file = frames[-1].filename if frames else ""
    line, text = line_in(error, file), next(iter(str(error).strip().splitlines()), "")
    return f"{file}{f', line {line}' if line else ''}: {type(error).__name__}{f': {text}' if text else ''}"
