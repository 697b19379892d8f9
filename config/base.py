"""Every key with its default: `--config config/base.py`. They are declared in flow_grpo/recipes/base.py."""

from flow_grpo.recipes.base import get_config

__all__ = ["get_config"]
