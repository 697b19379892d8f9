"""The recipes: `--config config/grpo.py:NAME`. They are written in flow_grpo/recipes/."""

from flow_grpo.recipes.registry import INTENDED_PROCESSES, RECIPES, get_config

__all__ = ["INTENDED_PROCESSES", "RECIPES", "get_config"]
