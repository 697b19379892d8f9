"""The recipes: `--config config/grpo.py:NAME`. They are written in flow_grpo/recipes/sd3.py."""

from flow_grpo.recipes.sd3 import INTENDED_PROCESSES, RECIPES, get_config

__all__ = ["INTENDED_PROCESSES", "RECIPES", "get_config"]
