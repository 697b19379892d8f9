"""What an evaluator is, which images it asks for, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from flow_grpo.runs.record import Distances, Judged

if TYPE_CHECKING:
    from flow_grpo.types import Samples


@dataclass(frozen=True)
class SampleRequest:
    """Images that an evaluator needs: those of its prompts that are also evaluated otherwise are shared."""

    prompts: tuple[str, ...]
    num_image_per_prompt: int


@dataclass(frozen=True)
class Measured:
    """What an evaluator found of its N samples: metrics, without a prefix, and what it knows of each image.

    Where a prompt is named by a number, that is its place among the different prompts of these samples.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    rewards: Mapping[str, Sequence[float]] = field(default_factory=dict)  # name -> (N,)
    judge: Judged | None = None
    diversity: Distances | None = None


class Evaluator(Protocol):
    """Measures the samples of one evaluation."""

    name: str
    freq: int  # epochs from one evaluation to the next; 0: never
    collective: bool  # whether `evaluate` is called on every process, or on the main one only

    @property
    def request(self) -> SampleRequest | None:
        """What it looks at; None: `eval.num_image_per_prompt` images of each test prompt."""

    def evaluate(self, samples: Samples) -> Measured:
        """What it finds; its metrics are logged as <label>/<metric>."""
