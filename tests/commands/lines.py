"""Command lines of fme, and the sentence with which one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from flow_grpo.commands import main

ROOT = Path(__file__).parents[2]


def fme(*arguments: str) -> int:
    return main.main(arguments)


def refusal(capsys, *arguments: str) -> str:
    """The one sentence with which a command line is refused."""
    with pytest.raises(SystemExit) as stopped:
        fme(*arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error
