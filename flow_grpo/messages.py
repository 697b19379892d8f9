"""What a person is told besides metrics: one line on the terminal, said once for all processes of a machine."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from flow_grpo.launcher import speaks


def say(text: str) -> None:
    """Write one line to stderr, above any progress bar."""
    if speaks():
        from tqdm import tqdm

        tqdm.write(" ".join(text.split()), file=sys.stderr)


class PatientStream:
    """A text stream that swallows what cannot be written: a run whose terminal has gone goes on.

    What the terminal's encoding lacks is written as an escape.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if hasattr(stream, "reconfigure"):  # not of a stream that a test has put in its place
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """As of the stream."""
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        """As of the stream."""
        try:
            self._stream.flush()
        except OSError:
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
