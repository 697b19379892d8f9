"""Which evaluators a training has. Torch is not imported.

To add one: a file with its class (see `flow_grpo.evaluators.base.Evaluator`) and a function build(policy, reward,
settings, run) -> list of evaluators, none where the configuration asks for none; and its place in `BUILDERS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flow_grpo import places

if TYPE_CHECKING:
    from flow_grpo.evaluators.base import Evaluator
    from flow_grpo.policy import Policy
    from flow_grpo.rewards.building import WeightedReward
    from flow_grpo.runs.run import Run
    from flow_grpo.settings import Settings

BUILDERS = [  # "module:attribute", in the order in which they are asked
    "flow_grpo.evaluators.evaluation:build",
    "flow_grpo.evaluators.entropy:build",
    "flow_grpo.evaluators.film_strip:build",
    "flow_grpo.evaluators.diversity:build",
    "flow_grpo.evaluators.forward_kl:build",
    "flow_grpo.evaluators.exact_curve:build",
]


def build_evaluators(policy: Policy, reward: WeightedReward, settings: Settings, run: Run) -> list[Evaluator]:
    """All that the configuration asks for.

    Raises:
        ConfigError: a model cannot be loaded, or a run that goes on lacks what an evaluator needs of it.
    """
    found: list[Evaluator] = []
    for place in BUILDERS:
        found += places.load(place)(policy, reward, settings, run)
    return found
