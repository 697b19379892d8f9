"""What an evaluator is, and which images it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from flow_grpo.types import Samples


@dataclass(frozen=True)
class SampleRequest:
    """Images that an evaluator needs: those of its prompts that are also evaluated otherwise are shared."""

    prompts: tuple[str, ...]
    num_image_per_prompt: int


class Evaluator(Protocol):
    """Measures the samples of one evaluation."""

    name: str
    freq: int  # epochs from one evaluation to the next; 0: never
    collective: bool  # whether `evaluate` is called on every process, or on the main one only

    @property
    def request(self) -> SampleRequest | None:
        """What it looks at; None: `eval.num_image_per_prompt` images of each test prompt."""

    def evaluate(self, samples: Samples) -> dict[str, float]:
        """Metrics, without a prefix."""
