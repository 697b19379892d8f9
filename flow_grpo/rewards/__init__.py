"""Rewards: functions of images in [0, 1], prompts and metadata. `registry.py` lists them; one file per scorer.

Importing this package is cheap: torch and transformers load with the first reward that is built.
"""

from flow_grpo.rewards.registry import (
    REWARDS,
    RewardModel,
    RewardSpec,
    WeightedReward,
    build_reward,
    check_checkpoint,
    reward_names,
    reward_weights,
    validate_rewards,
)

__all__ = [
    "REWARDS",
    "RewardModel",
    "RewardSpec",
    "WeightedReward",
    "build_reward",
    "check_checkpoint",
    "reward_names",
    "reward_weights",
    "validate_rewards",
]
