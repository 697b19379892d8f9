"""A history read and appended to."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest

from flow_grpo.errors import ConfigError
from flow_grpo.runs.history import append_line, read_history


@pytest.mark.parametrize("bad", ["{torn", "[1]", '{"seconds": 1}'])
def test_a_broken_line_inside_a_history_is_one_sentence_naming_it(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(ConfigError, match="line 2"):
        read_history(path)


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    """A disk that is full in the middle of a line; /dev/full takes nothing at all."""
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match="File too large"):
            append_line(path, {"step": 2, "train/reward": "x" * 100})
    finally:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_text() == '{"step": 1}\n'
