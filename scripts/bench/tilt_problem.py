"""Two problems whose optimum is known exactly, and a model of points in the plane that the real loops train.

R = c . x is linear, and the base flow is a Gaussian or a mixture of them with its exact velocity, so that the law
p_base exp(lambda R) is of the same form, in closed form (MATH 8). What is trained is the base velocity plus a small
MLP, which is zero at first. An "image" is a point, a latent of shape (1, 1, 2), and its decoder is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from flow_grpo.diffusers_patch.velocity import linear_guidance
from flow_grpo.randomness import keyed_generator
from flow_grpo.rewards.building import WeightedReward
from flow_grpo.types import PromptEmbeds
from scripts.diversity_metrics.toy_flows import GaussianFlow, MixtureFlow, MlpFlow

Flow = GaussianFlow | MixtureFlow
WIDTH = 64  # of the MLP
PROMPT = "a point"  # which nothing reads
STRONGEST = 30.0  # lambda is looked for between minus and plus this


@dataclass(frozen=True)
class Problem:
    """A base flow in the plane, and the direction c of the reward R = c . x."""

    name: str
    flow: Flow
    direction: Tensor  # (2,): c

    def law(self, strength: float) -> Flow:
        """p_base exp(lambda R), normalised; `strength`: lambda."""
        return self.flow.tilted(strength * self.direction)

    def reward(self, x: Tensor) -> Tensor:
        """R: (..., 2) -> (...)."""
        return x @ self.direction.to(x.dtype)

    def reward_of(self, strength: float) -> float:
        """E R under the law."""
        return self.reward(self.law(strength).mean).item()

    def strength_of(self, reward: float) -> float:
        """The lambda at which the law has this mean reward, which rises with lambda; ValueError if there is none."""
        return brentq(lambda strength: self.reward_of(strength) - reward, -STRONGEST, STRONGEST, xtol=1e-10)


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


PROBLEMS: Mapping[str, Problem] = {
    problem.name: problem
    for problem in (
        Problem("gaussian", GaussianFlow(_tensor([0.5, -0.5]), _tensor([[1.0, 0.4], [0.4, 0.5]])), _tensor([1.0, 0.5])),
        Problem("mixture", MixtureFlow.ring(3, radius=1.2, std=0.5), _tensor([1.0, 0.5])),
    )
}


# --- the model ------------------------------------------------------------------------------------------------


class CorrectedVelocity(nn.Module):
    """v_base(x, s), exact and in float64, plus an MLP of x and s whose last layer is zero at first."""

    def __init__(self, flow: Flow, seed: int) -> None:
        super().__init__()
        self.flow = flow
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_generator(seed, "correction").initial_seed())
            self.correction = MlpFlow(2, WIDTH)
        last = self.correction.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        """(B, 2) -> (B, 2), at least float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        base = self.flow.velocity(x.double(), sigma).to(wide)
        return base + self.correction.velocity(x.float(), sigma).to(wide)


class _Pipeline:
    """What a policy asks of diffusers' pipeline."""

    def __init__(self, transformer: nn.Module) -> None:
        self.components = {"transformer": transformer}

    def set_progress_bar_config(self, **_: Any) -> None:
        """There is none."""


class Points:
    """A `ModelFamily` (see there) of points in the plane. Its prompts are ignored, and it has no files."""

    def __init__(self, pipeline: _Pipeline, distilled_guidance: float = 1.0) -> None:
        self.pipeline: Any = pipeline
        self.transformer: Any = pipeline.components["transformer"]
        self.vae: Any = None

    @staticmethod
    def of(problem: Problem, seed: int) -> Points:
        """The base model of a problem; the seed draws the MLP's first weights."""
        return Points(_Pipeline(CorrectedVelocity(problem.flow, seed)))

    def encode(self, prompt: str, max_sequence_length: int) -> PromptEmbeds:
        """Nothing."""
        return PromptEmbeds(torch.zeros(1, 1, 1), torch.zeros(1, 1))

    @staticmethod
    def velocity(transformer: nn.Module, latents: Tensor, sigma: float, embeds: PromptEmbeds) -> Tensor:
        """(B, 1, 1, 2) -> (B, 1, 1, 2)."""
        return transformer(latents.flatten(1), sigma).view_as(latents)

    guide = staticmethod(linear_guidance)

    def sigmas(self, num_steps: int, height: int, width: int) -> Tensor:
        """Even steps: (num_steps + 1,)."""
        return torch.linspace(1, 0, num_steps + 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """(1, 1, 2)."""
        return 1, 1, 2

    def decode(self, latents: Tensor) -> Tensor:
        """The points themselves: (B, 1, 1, 2)."""
        return latents

    def encode_image(self, images: Tensor) -> Tensor:
        """The points themselves: (B, 1, 1, 2)."""
        return images

    def modules_without_effect(self) -> Sequence[str]:
        """None."""
        return ()

    @classmethod
    def empty_transformer(cls, settings: dict[str, Any]) -> nn.Module:
        """Not asked for: there are no files."""
        raise NotImplementedError

    @classmethod
    def load_transformer(cls, folder: Path) -> tuple[nn.Module, Sequence[str]]:
        """Not asked for: there are no files."""
        raise NotImplementedError

    @classmethod
    def save_lora(cls, folder: Path, layers: dict[str, Tensor]) -> None:
        """Not asked for: there is no LoRA."""
        raise NotImplementedError


class Along:
    """The reward of a problem, as a `RewardModel`."""

    name, differentiable = "along", True

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Points (B, 1, 1, 2) -> (B,)."""
        return self.problem.reward(images.flatten(1))


def reward_of(problem: Problem) -> WeightedReward:
    """R alone, with weight 1, under the name of the reward that the configuration has."""
    return WeightedReward({"pickscore": Along(problem)}, {"pickscore": 1.0})
